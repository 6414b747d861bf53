"""A Hugging Face Hub on the loopback interface, in memory: what the client asks of it to push and pull models.

Repositories with branches and commits, tokens and private repositories, regular and LFS uploads, downloads with ranges.
``faults`` make it misbehave. It is written after what huggingface_hub sends, for the tests alone.
"""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OWNER = 'hf_owner'  # may read and write everything
READER = 'hf_reader'  # may read everything


@dataclass
class Repo:
    private: bool = False
    branches: dict = field(default_factory=dict)  # name: sha
    commits: dict = field(default_factory=dict)  # sha: {path: bytes}

    def __post_init__(self):
        self.commit('main', {})

    def files(self, revision='main'):
        sha = self.sha(revision)
        return None if sha is None else self.commits[sha]

    def sha(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)

    def commit(self, branch, files):
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())
        sha = hashlib.sha1(json.dumps([len(self.commits), branch, content]).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha


class Hub:
    """The server and its state; use it as a context manager."""

    def __init__(self):
        self.repos = {}
        self.objects = {}  # LFS: sha256: bytes
        self.requests = []  # (method, path)
        self.faults = {}  # name: how many times, see _Handler
        self.uploading = threading.Event()
        self.lock = threading.Lock()
        self.storage = None  # address that files under LFS are redirected to

    def __enter__(self):
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo_id, files, private=False):
        """Put a repository there without the client."""
        repo = self.repos[repo_id] = Repo(private)
        repo.commit('main', files)
        return repo

    def fault(self, name):
        with self.lock:
            if self.faults.get(name, 0) < 1:
                return False
            self.faults[name] -= 1
            return True


class _Error(Exception):
    def __init__(self, status, code='', message=''):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Drop(Exception):
    """Close the connection without an answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    @property
    def hub(self):
        return self.server.hub

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        try:
            if self.token not in (None, OWNER, READER):
                raise _Error(401, message='Invalid credentials in Authorization header')
            for method, pattern, handle in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    return handle(self, **match.groupdict())
            raise _Error(404, message=f'no such page: {path}')
        except _Error as error:
            self.body()  # or the rest of it would be taken for the next request
            headers = {k: v for k, v in (('X-Error-Code', error.code), ('X-Error-Message', error.message)) if v}
            self.send(error.status, json.dumps({'error': error.message}).encode(), headers)
        except _Drop:
            self.close_connection = True
            self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = answer

    @property
    def token(self):
        return self.headers.get('Authorization', '').removeprefix('Bearer ') or None

    def body(self):
        if not hasattr(self, '_body') or self._request is not self.headers:
            self._request = self.headers
            self._body = self.rfile.read(int(self.headers.get('Content-Length') or 0)) \
                if self.headers.get('Transfer-Encoding') != 'chunked' else b''.join(self._chunks())
        return self._body

    def _chunks(self):
        while size := int(self.rfile.readline().split(b';')[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def send(self, status, data=b'', headers=None):
        self.send_response(status)
        headers = {'Content-Length': str(len(data)), 'Content-Type': 'application/json', **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def json(self, value, status=200):
        self.body()
        self.send(status, json.dumps(value).encode())

    def repo(self, name, write=False):
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.token is None):
            # As the Hub does: without a token, who does not exist and who is private are the same.
            raise _Error(401 if self.token is None else 404, 'RepoNotFound', 'Repository not found')
        if write and self.token != OWNER:
            raise _Error(403 if self.token else 401, message=f'You don\'t have write access to {name}')
        return repo

    # The API

    def create(self):
        asked = json.loads(self.body())
        if self.token != OWNER:
            raise _Error(403 if self.token else 401, message='You don\'t have the rights to create a model')
        name = '/'.join(filter(None, [asked.get('organization') or 'owner', asked['name']]))
        exists = name in self.hub.repos
        if not exists:
            self.hub.repos[name] = Repo(asked.get('visibility') == 'private' or bool(asked.get('private')))
        self.json({'url': f'{self.hub.url}/{name}', 'name': name, 'id': name}, 409 if exists else 200)

    def validate_yaml(self):
        self.json({'errors': [], 'warnings': []})

    def preupload(self, repo, revision):
        self.revision(self.repo(repo, write=True), revision)
        self.json({'files': [
            {'path': f['path'], 'uploadMode': 'lfs' if f['path'].endswith(('.safetensors', '.bin')) else 'regular',
             'shouldIgnore': False}
            for f in json.loads(self.body())['files']
        ]})

    def lfs_batch(self, repo):
        self.repo(repo, write=True)
        self.json({'transfer': 'basic', 'objects': [
            {'oid': o['oid'], 'size': o['size'], **({} if o['oid'] in self.hub.objects else {
                'actions': {'upload': {'href': f'{self.hub.url}/lfs/{o["oid"]}', 'header': {}}},
            })}
            for o in json.loads(self.body())['objects']
        ]})

    def lfs_put(self, oid):
        if self.hub.fault('upload_drops'):
            self.rfile.read(1000)
            raise _Drop
        if self.hub.fault('upload_hangs'):
            self.rfile.read(1000)
            self.hub.uploading.set()
            while self.rfile.read(65536):
                threading.Event().wait(1)  # slower than any test
            raise _Drop
        if self.hub.fault('upload_refused'):
            raise _Error(403, message='The storage is full')
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise _Error(400, message='The upload is damaged')
        self.hub.objects[oid] = data
        self.send(200)

    def commit(self, repo, revision):
        repository = self.repo(repo, write=True)
        self.revision(repository, revision)
        if self.hub.fault('commit_refused'):
            raise _Error(400, message='The commit is malformed')
        files, header = dict(repository.files(revision)), {}
        for line in filter(None, self.body().split(b'\n')):
            entry = json.loads(line)
            value = entry['value']
            if entry['key'] == 'header':
                header = value
            elif entry['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif entry['key'] == 'lfsFile':
                if value['oid'] not in self.hub.objects:
                    raise _Error(400, message=f'{value["path"]} has not been uploaded')
                files[value['path']] = self.hub.objects[value['oid']]
            elif entry['key'] == 'deletedFile':
                files.pop(value['path'], None)
        branch = revision
        if 'create_pr=1' in urlsplit(self.path).query:
            branch = f'refs/pr/{1 + sum(b.startswith("refs/pr/") for b in repository.branches)}'
        sha = repository.commit(branch, files)
        answer = {'success': True, 'commitOid': sha, 'commitUrl': f'{self.hub.url}/{repo}/commit/{sha}'}
        if branch != revision:
            answer['pullRequestUrl'] = f'{self.hub.url}/{repo}/discussions/{branch.rpartition("/")[2]}'
        assert header.get('summary')
        self.json(answer)

    def branch(self, repo, revision):
        repository = self.repo(repo, write=True)
        start = json.loads(self.body() or b'{}').get('startingPoint') or 'main'
        repository.branches[revision] = repository.sha(start)
        self.json({})

    def info(self, repo, revision='main'):
        repository = self.repo(repo)
        sha = self.revision(repository, revision)
        self.json({
            'id': repo, 'modelId': repo, 'sha': sha, 'private': repository.private, 'tags': [], 'downloads': 0,
            'likes': 0, 'siblings': [{'rfilename': path} for path in repository.commits[sha]],
        })

    def tree(self, repo, revision):
        repository = self.repo(repo)
        sha = self.revision(repository, revision)
        entries = []
        for path, data in repository.commits[sha].items():
            entry = {'type': 'file', 'path': path, 'size': len(data), 'oid': _git_oid(data)}
            if path.endswith('.safetensors'):
                entry['lfs'] = {'oid': hashlib.sha256(data).hexdigest(), 'size': len(data), 'pointerSize': 130}
            entries.append(entry)
        self.json(entries)

    def revision(self, repository, revision):
        sha = repository.sha(revision)
        if sha is None:
            raise _Error(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return sha

    def resolve(self, repo, revision, path):
        repository = self.repo(repo)
        sha = self.revision(repository, revision)
        data = repository.commits[sha].get(path)
        if data is None:
            self.body()
            return self.send(404, b'', {
                'X-Error-Code': 'EntryNotFound', 'X-Error-Message': 'Entry not found', 'X-Repo-Commit': sha})
        lfs = path.endswith('.safetensors')
        headers = {
            'X-Repo-Commit': sha,
            'ETag': f'"{hashlib.sha256(data).hexdigest() if lfs else _git_oid(data)}"',
            'Accept-Ranges': 'bytes',
            'Content-Type': 'application/octet-stream',
        }
        if lfs and self.hub.storage:
            return self.send(302, b'', {
                'X-Repo-Commit': sha, 'X-Linked-ETag': headers['ETag'], 'X-Linked-Size': str(len(data)),
                'Location': f'{self.hub.storage}/{path}'})
        if self.command == 'HEAD' or not lfs:
            return self.send(200, data, headers)
        if self.hub.fault('download_short'):
            return self.send(200, data[:len(data) // 2], headers)
        if self.hub.fault('download_damaged_header'):
            data = data[:20] + bytes([data[20] ^ 0xff]) + data[21:]
        if self.hub.fault('download_damaged_values'):
            data = data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]
        match = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        start = int(match[1]) if match else 0
        if start:
            headers['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        if self.hub.fault('download_drops'):
            self.send_response(206 if start else 200)
            for name, value in {**headers, 'Content-Length': str(len(data) - start)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[start:start + (len(data) - start) // 2])
            self.wfile.flush()
            raise _Drop
        self.send(206 if start else 200, data[start:], headers)


def _git_oid(data):
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


_REPO = r'(?P<repo>[^/]+/[^/]+)'
_ROUTES = (
    ('POST', r'/api/repos/create', _Handler.create),
    ('POST', r'/api/validate-yaml', _Handler.validate_yaml),
    ('POST', rf'/api/models/{_REPO}/preupload/(?P<revision>.+)', _Handler.preupload),
    ('POST', rf'/api/models/{_REPO}/commit/(?P<revision>.+)', _Handler.commit),
    ('POST', rf'/api/models/{_REPO}/branch/(?P<revision>.+)', _Handler.branch),
    ('GET', rf'/api/models/{_REPO}/tree/(?P<revision>.+)', _Handler.tree),
    ('GET', rf'/api/models/{_REPO}/revision/(?P<revision>.+)', _Handler.info),
    ('GET', rf'/api/models/{_REPO}', _Handler.info),
    ('POST', rf'/{_REPO}\.git/info/lfs/objects/batch', _Handler.lfs_batch),
    ('PUT', r'/lfs/(?P<oid>[0-9a-f]{64})', _Handler.lfs_put),
    ('GET HEAD', rf'/{_REPO}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)', _Handler.resolve),
)
