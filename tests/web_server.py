"""A host of files on the loopback interface that misbehaves as hosts do.

``files`` are served by name under every path; the first part of the path says how: ``/good/…`` as it should be,
``/cut/…`` closes the connection in the middle of the file, once, ``/always_cut/…`` every time, and so on below.
"""
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Web:
    """The server and its state; use it as a context manager."""

    def __init__(self):
        self.files = {}
        self.requests = []  # (method, path, headers)
        self.cut = set()  # paths that have been cut off once
        self.elsewhere = ''  # where /redirect/ leads
        self.released = threading.Event()

    def __enter__(self):
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
        self.server.daemon_threads = True
        self.server.web = self
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        web = self.server.web
        path = urlsplit(self.path).path
        web.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        _, how, name = path.split('/', 2)
        data = web.files.get(name)
        if how == 'silent':
            return web.released.wait(30)
        if how == 'refuses' or (how == 'picky' and self.headers.get('User-Agent', '').startswith('Python-urllib')):
            return self.send(403, b'no')
        if how == 'broken':
            return self.send(503, b'later')
        if how == 'page':
            return self.send(200, b'<!DOCTYPE html><title>Home</title>', {'Content-Type': 'text/html'})
        if how in ('redirect', 'for_good', 'loop'):
            target = f'{web.elsewhere}/good/{name}' if how != 'loop' else self.path
            return self.send(301 if how == 'for_good' else 302, b'', {'Location': target})
        if data is None:
            return self.send(404, b'')
        if how == 'other':
            data = data + b'more'
        if how == 'wrong':
            data = data[:-1] + bytes([data[-1] ^ 1])
        headers = {'ETag': f'"{len(data)}"'} if how != 'untagged' else {}
        match = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        start = 0
        if match and self.headers.get('If-Range') == headers.get('ETag') and how != 'no_ranges':
            start = int(match[1])
            headers['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        body = data[start:]
        if how == 'slow':
            self.begin(200, headers, len(body))
            for i in range(len(body)):
                self.wfile.write(body[i:i + 1])
                self.wfile.flush()
                if web.released.wait(0.05):
                    return None
        if how == 'stalls':
            self.begin(200, headers, len(body))
            self.wfile.write(body[:10])
            self.wfile.flush()
            return web.released.wait(30)
        if how == 'always_cut' or (how in ('cut', 'no_ranges', 'untagged') and path not in web.cut):
            web.cut.add(path)
            self.begin(206 if start else 200, headers, len(body))
            self.wfile.write(body[:len(body) // 2])
            return None
        return self.send(206 if start else 200, body, headers)

    def begin(self, status, headers, length):
        self.send_response(status)
        for key, value in {'Content-Length': str(length), **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    def send(self, status, body, headers=None):
        self.begin(status, headers or {}, len(body))
        if self.command != 'HEAD':
            self.wfile.write(body)
