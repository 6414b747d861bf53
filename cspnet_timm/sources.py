"""Files of weights, from the places that have them: a folder of the user's, the Hugging Face Hub, a host on the web.

A set of weights names its places in the order in which they are tried (:class:`Source`). What arrives is checked by
size and hash wherever it comes from, appears under its name complete or not at all, and goes on where it was cut off.
If no place has the file, one error says what each of them answered, and how to go on by hand. Nothing here waits for
long: a host that cannot be reached, does not answer or sends too slowly is left for the next one.
"""
import contextlib
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import ssl
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Union
from urllib.parse import unquote, urlsplit

__all__ = [
    'FOLDER_VARIABLE', 'DownloadError', 'Source', 'check_file', 'describe_failure', 'fetch', 'fetch_into', 'find_local',
    'is_offline', 'open_url', 'sha256_of',
]

_logger = logging.getLogger(__name__)

FOLDER_VARIABLE = 'CSPNET_TIMM_WEIGHTS'
USER_AGENT = 'cspnet-timm'  # some hosts answer 403 to those who have none
SUFFIXES = ('.safetensors', '.pth', '.pt', '.bin', '.pdparams', '.weights', '.h5', '.ckpt', '.tar')

ANSWER_SECONDS = 8  # for a host to be found, to connect and to begin to answer
READ_SECONDS = 30  # between two pieces of a file
MIN_BYTES_PER_SECOND = 2000  # over READ_SECONDS, below which a host is as good as down
ATTEMPTS = 3  # for a file that is cut off
_CHUNK = 1 << 20
_TRUE = ('1', 'on', 'yes', 'true')

_HASH_IN_NAME = re.compile(  # not a date
    r'-(?!20[12]\d[01]\d[0-3]\d\.)([0-9a-f]{7,8})(?:_\d{8})?\.\w+$')


class DownloadError(RuntimeError):
    """No place has the file, or what was found there is another one."""


@dataclass(frozen=True)
class Source:
    """One place that a file of weights is to be had from: an address, or a repository on the Hugging Face Hub.

    Attributes:
        url: The address.
        repo_id: The repository, ``'user/name'`` or ``'user/name@revision'``, in place of an address.
        filename: The file's name, by default the last part of the address.
        sha256: SHA-256 of the file, or its first digits; by default the eight that OpenMMLab writes into a name.
        size: Bytes of the file; 0 where nobody says.
        manual: The file is not downloaded, because its licence or its host does not allow it.
    """

    url: str = ''
    repo_id: str = ''
    filename: str = ''
    sha256: str = ''
    size: int = 0
    manual: bool = False

    def __post_init__(self) -> None:
        if bool(self.url) == bool(self.repo_id):
            raise ValueError(f'a source has either an address or a repository, not {self.url!r} and {self.repo_id!r}.')
        if not self.filename:
            object.__setattr__(self, 'filename', unquote(urlsplit(self.url).path.rpartition('/')[2]))
        if not self.sha256 and (match := _HASH_IN_NAME.search(self.filename)):
            object.__setattr__(self, 'sha256', match[1])

    @property
    def link(self) -> str:
        """Address for a browser."""
        if self.url:
            return self.url
        repo_id, _, revision = self.repo_id.partition('@')
        return f'https://huggingface.co/{repo_id}/resolve/{revision or "main"}/{self.filename}'

    def local_name(self, name: str) -> str:
        """The file's name in a folder of many: its own, but on the Hub every repository's file has the same.

        Args:
            name: Of the weights, ``'architecture.tag'``.

        Returns:
            A name without directories.
        """
        return self.filename if self.url else f'{name}{Path(self.filename).suffix}'


def sha256_of(path: Union[str, Path]) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_file(path: Union[str, Path], source: Source) -> None:
    """Compare a file with what its source says of it.

    Args:
        path: The file.
        source: Where it comes from.

    Raises:
        DownloadError: If its size or its hash is another one, or it is a page of HTML.
    """
    path = Path(path)
    with path.open('rb') as file:
        head = file.read(256).lstrip().lower()
    if head.startswith((b'<!doctype html', b'<html', b'<?xml')):
        raise DownloadError('a page for a browser, and no file of weights')
    size = path.stat().st_size
    if source.size and size != source.size:
        raise DownloadError(f'the file has {size} bytes and not {source.size}: it is cut short, or another one')
    if source.sha256:
        digest = sha256_of(path)
        if not digest.startswith(source.sha256):
            raise DownloadError(
                f'the file has the SHA-256 {digest[:max(8, len(source.sha256))]} and not {source.sha256}: '
                'it is damaged, or another one')


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` says that no host may be asked."""
    return any(os.environ.get(name, '').strip().lower() in _TRUE for name in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE'))


# A folder of the user's

def user_folder() -> Optional[Path]:
    """The folder that ``CSPNET_TIMM_WEIGHTS`` names.

    Returns:
        The folder; None if the variable is not set.

    Raises:
        DownloadError: If there is no such folder.
    """
    value = os.environ.get(FOLDER_VARIABLE, '').strip()
    if not value:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise DownloadError(f'{FOLDER_VARIABLE}={value}: there is no such folder.')
    return folder


def find_local(name: str, sources: Sequence[Source], folder: Path) -> Optional[Path]:
    """Look for weights in a folder: a released file under its own name, or what was made of it under the tag's.

    Args:
        name: Of the weights, ``'architecture.tag'``.
        sources: Their sources, the manual ones included.
        folder: The folder.

    Returns:
        A file: under the name of a source, as ``<name>.safetensors`` or with another suffix, or in a folder that was
        converted from one (``<name>/model.safetensors``, or any with a ``config.json`` that names it). None if there
        is none.

    Raises:
        DownloadError: If a file has the name of a source and other contents.
    """
    for source in sources:
        for path in (folder / source.filename, folder / source.local_name(name)) if source.url else ():
            if path.is_file():
                try:
                    check_file(path, source)
                except DownloadError as error:
                    raise DownloadError(f'{path}: {error}. It should be {source.link}') from error
                return path
    for suffix in SUFFIXES:
        if (path := folder / f'{name}{suffix}').is_file():
            return path
    repositories = [source.repo_id.partition('@')[0].rpartition('/')[2] for source in sources if source.repo_id]
    for directory in (name, *repositories):
        if (path := folder / directory / 'model.safetensors').is_file():
            return path
    for config in sorted(folder.glob('*/config.json')):
        if (path := config.with_name('model.safetensors')).is_file() and _names(config, name):
            return path
    return None


def _names(config: Path, name: str) -> bool:
    try:
        content = json.loads(config.read_text(encoding='utf-8'))
        return f'{content["architecture"]}.{content["pretrained_cfg"]["tag"]}' == name
    except (OSError, ValueError, KeyError, TypeError):
        return False  # somebody else's


# A host on the web

class _Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects as urllib does, without handing on what proves who asks."""

    def redirect_request(
            self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str,
    ) -> Optional[urllib.request.Request]:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if old.scheme == 'https' and new.scheme != 'https':
            raise urllib.error.URLError(f'redirects from https to {new.scheme}: {newurl}')
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            for header in ('Authorization', 'Cookie', 'Proxy-authorization'):
                request.remove_header(header)
        return request


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def open_url(
        url: str,
        method: str = 'GET',
        headers: Optional[Dict[str, str]] = None,
        follow: bool = True,
) -> Any:
    """Open an address, within seconds or not at all; a host whose name is not found in time counts as silent.

    Args:
        url: The address.
        method: ``'GET'`` or ``'HEAD'``.
        headers: Further ones; an ``Authorization`` goes to no other host.
        follow: Follow redirects; without, a redirect is an answer like any other.

    Returns:
        The response, to be closed.

    Raises:
        OSError: If there is no answer, or one that says no; ``urllib.error.HTTPError`` is one.
    """
    request = urllib.request.Request(url, method=method, headers={'User-Agent': USER_AGENT, **(headers or {})})
    opener = urllib.request.build_opener(_Redirect if follow else _NoRedirect)
    answer: List[Any] = []
    given_up = threading.Event()

    def ask() -> None:
        try:
            response = opener.open(request, timeout=ANSWER_SECONDS)
        except Exception as error:
            answer.append(error)
        else:
            answer.append(response)
            if given_up.is_set():
                response.close()

    # In a thread, since looking up a host's name cannot be given a time.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS + 1)
    if not answer:
        given_up.set()
        raise TimeoutError(f'no answer within {ANSWER_SECONDS} s')
    if isinstance(answer[0], Exception):
        if not isinstance(answer[0], (OSError, http.client.HTTPException)):
            raise OSError(f'{type(answer[0]).__name__}: {answer[0]}') from answer[0]
        raise answer[0]
    return answer[0]


def describe_failure(error: BaseException) -> str:
    """What a host answered, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f'answers {error.code} {error.reason}'
    if isinstance(error, urllib.error.URLError):
        if isinstance(error.reason, BaseException):
            return describe_failure(error.reason)
        return str(error.reason)
    if isinstance(error, ssl.SSLCertVerificationError):
        return f'its certificate is not valid ({error.verify_message})'
    if isinstance(error, TimeoutError):
        return str(error) if str(error).startswith(('no answer', 'too slow')) else 'no answer in time'
    if isinstance(error, (ConnectionError, http.client.HTTPException)):
        return f'the connection failed ({error or type(error).__name__})'
    if isinstance(error, OSError):
        return f'cannot be reached ({error.strerror or error})'
    return str(error)


def _timeout(response: Any, seconds: float) -> None:
    with contextlib.suppress(AttributeError):  # of the standard library's inside; without it, ANSWER_SECONDS hold
        response.fp.raw._sock.settimeout(seconds)


def _receive(response: Any, path: Path, start: int, bar: Any) -> None:
    """Write what comes to the end of a file; an OSError if it ends early or comes too slowly."""
    expected = response.headers.get('Content-Length')
    left = int(expected) if expected and expected.isdigit() else None
    began, window = time.monotonic(), 0
    with path.open('ab' if start else 'wb') as file:
        while chunk := response.read1(_CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
            window += len(chunk)
            left = None if left is None else left - len(chunk)
            if (seconds := time.monotonic() - began) >= READ_SECONDS:
                if window < MIN_BYTES_PER_SECOND * seconds:
                    raise TimeoutError(f'too slow, {window / seconds:.0f} bytes per second')
                began, window = time.monotonic(), 0
    if left:
        raise ConnectionError(f'{left} bytes before the end')


def _download(source: Source, path: Path, progress: bool) -> None:
    """Download to a path, going on with what an earlier attempt has left beside it.

    Args:
        source: An address.
        path: The file, which appears complete and checked.
        progress: Show a bar on a terminal.

    Raises:
        DownloadError: If what arrives is not what the source says.
        OSError: If it does not arrive.
    """
    from huggingface_hub.utils import tqdm

    part = path.with_name(f'.{path.name}.{hashlib.sha1(source.url.encode()).hexdigest()[:8]}.part')
    validator = part.with_suffix('.etag')
    error: Optional[Exception] = None
    for _ in range(ATTEMPTS):
        known = validator.read_text().strip() if validator.exists() else ''
        start = part.stat().st_size if known and part.exists() else 0
        headers = {'Range': f'bytes={start}-', 'If-Range': known} if start else {}
        try:
            try:
                response = open_url(source.url, headers=headers)
            except urllib.error.HTTPError as refusal:
                if refusal.code != 416:
                    raise
                _remove(part, validator)  # what is there is no part of what the host has now
                continue
            with response:
                _timeout(response, READ_SECONDS)
                if start and response.status != 206:
                    start = 0
                tag = response.headers.get('ETag') or response.headers.get('Last-Modified') or ''
                if tag.startswith('W/'):
                    tag = ''  # says that two files are alike, not that their bytes are
                validator.write_text(tag)
                length = response.headers.get('Content-Length', '')
                total = start + int(length) if length.isdigit() else None
                if source.size and total is not None and total != source.size:
                    raise DownloadError(f'the file has {total} bytes and not {source.size}: it is another one')
                with tqdm(
                        total=total, initial=start, unit='B', unit_scale=True, desc=path.name,
                        disable=None if progress else True) as bar:
                    _receive(response, part, start, bar)
            check_file(part, source)
        except DownloadError:
            _remove(part, validator)
            if not start:
                raise
            continue  # the beginning was of another file
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as failure:
            error = failure
            if isinstance(failure, TimeoutError) or not part.exists() or not part.stat().st_size:
                break  # down, or slow: another attempt would take as long
            continue
        os.replace(part, path)
        _remove(validator)
        return
    raise error or DownloadError('what arrives changes from one attempt to the next')


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


# The Hub

def _cached_on_hub(source: Source, cache_dir: Optional[Union[str, Path]]) -> Optional[Path]:
    from huggingface_hub import try_to_load_from_cache

    repo_id, _, revision = source.repo_id.partition('@')
    path = try_to_load_from_cache(repo_id, source.filename, cache_dir=cache_dir, revision=revision or None)
    return Path(path) if isinstance(path, str) else None


def _download_from_hub(source: Source, cache_dir: Optional[Union[str, Path]]) -> Path:
    from huggingface_hub import constants, get_token, hf_hub_download, hf_hub_url

    repo_id, _, revision = source.repo_id.partition('@')
    # The Hub's client retries for most of a minute. One question, and no answer is an answer.
    url = hf_hub_url(repo_id, source.filename, revision=revision or None, endpoint=constants.ENDPOINT)
    token = get_token()
    try:
        with open_url(url, 'HEAD', {'Authorization': f'Bearer {token}'} if token else {}, follow=False):
            pass
    except urllib.error.HTTPError as error:
        if error.code not in (301, 302, 303, 307, 308):
            raise
    path = Path(hf_hub_download(repo_id, source.filename, revision=revision or None, cache_dir=cache_dir))
    blob = path.resolve()  # which the client names after the file's hash, and does not check
    expected = source.sha256 or (blob.name if re.fullmatch('[0-9a-f]{64}', blob.name) else '')
    try:
        check_file(blob, Source(repo_id=source.repo_id, filename=source.filename, sha256=expected, size=source.size))
    except DownloadError as error:
        _remove(blob, path)
        raise DownloadError(f'{error}; it was removed') from error
    return path


# All of them

@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Of several processes that want one file, one downloads it."""
    from huggingface_hub.utils import WeakFileLock

    with WeakFileLock(path.with_name(f'.{path.name}.lock')):
        yield


def _web_cache(cache_dir: Optional[Union[str, Path]]) -> Path:
    from timm.models import _hub

    return Path(cache_dir or _hub.get_cache_dir())


def _try(source: Source, cache_dir: Optional[Union[str, Path]], progress: bool) -> Path:
    if source.repo_id:
        return _download_from_hub(source, cache_dir)
    directory = _web_cache(cache_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / source.filename
    with _lock(path):
        if not path.exists():  # another process may have been first
            _logger.info('Downloading %s to %s', source.url, path)
            _download(source, path, progress)
    return path


def _cached(source: Source, cache_dir: Optional[Union[str, Path]]) -> Optional[Path]:
    if source.repo_id:
        return _cached_on_hub(source, cache_dir)
    path = _web_cache(cache_dir) / source.filename
    if not path.is_file():
        return None
    try:
        check_file(path, source)
    except DownloadError as error:
        _logger.warning('%s: %s; it is downloaded again.', path, error)
        _remove(path)
        return None
    return path


def fetch(
        name: str,
        sources: Sequence[Source],
        license: str = 'unknown',
        cache_dir: Optional[Union[str, Path]] = None,
        check: Optional[Callable[[Path], object]] = None,
        progress: bool = True,
) -> Path:
    """Get a file of weights: from the user's folder, from a cache, or from the first source that has it.

    Args:
        name: Of the weights, ``'architecture.tag'``.
        sources: Where they are to be had, in the order in which the places are tried.
        license: Their licence, for the error.
        cache_dir: In place of the caches of torch and of the Hub; looked through like the user's folder, too.
        check: Raises a ValueError for a file that is none; called with what has been downloaded, if nobody says its
            hash.
        progress: Show a bar on a terminal.

    Returns:
        The file.

    Raises:
        DownloadError: If no place has the file, with what each of them answered and how to go on by hand.
    """
    folder = user_folder()
    for directory in (folder, Path(cache_dir) if cache_dir else None):
        if directory and directory.is_dir() and (path := find_local(name, sources, directory)) is not None:
            return path
    for source in (s for s in sources if not s.manual):
        if (path := _cached(source, cache_dir)) is not None:
            return path
    return _first(name, sources, license, folder, check, lambda source: _try(source, cache_dir, progress))


def _first(
        name: str,
        sources: Sequence[Source],
        license: str,
        folder: Optional[Path],
        check: Optional[Callable[[Path], object]],
        get: Callable[[Source], Path],
) -> Path:
    answers: Dict[str, str] = {}
    for source in (s for s in sources if not s.manual):
        if is_offline() and not source.url.startswith('file:'):
            answers[source.link] = 'not asked, since HF_HUB_OFFLINE is set'
            continue
        try:
            path = get(source)
            if check is not None and not source.sha256 and not source.repo_id:
                try:
                    check(path)
                except ValueError as error:
                    _remove(path)
                    raise DownloadError(f'no file of weights, and removed ({error})') from error
            return path
        except Exception as error:  # of the Hub's client, too, which has dozens
            answers[source.link] = describe_failure(error)
            _logger.debug('%s: %s', source.link, answers[source.link])
    raise DownloadError(_by_hand(name, sources, license, answers, folder))


def _by_hand(
        name: str,
        sources: Sequence[Source],
        license: str,
        answers: Dict[str, str],
        folder: Optional[Path],
) -> str:
    if answers:
        lines = [f'The weights of {name} could not be downloaded:', *(f'- {k}: {v}' for k, v in answers.items())]
    else:
        lines = [f'The weights of {name} cannot be downloaded automatically.']
    source = next((s for s in sources if s.manual), sources[-1])
    filename = source.local_name(name)
    where = f'the folder {folder} of {FOLDER_VARIABLE}' if folder else f'a folder that {FOLDER_VARIABLE} names'
    lines.append(
        f'Get the file from {source.link} (licence: {license}), and put it as {filename} into {where}, or pass it: '
        f'timm.create_model({name!r}, pretrained=True, pretrained_cfg_overlay=dict(file=\'path/of/{filename}\')).')
    if answers:
        lines.append(f'Where there is a network, `cspnet-timm download --filter {name} --out DIR` fills such a folder.')
    return '\n'.join(lines)


def fetch_into(
        name: str,
        sources: Sequence[Source],
        folder: Path,
        license: str = 'unknown',
        check: Optional[Callable[[Path], object]] = None,
        progress: bool = True,
) -> Path:
    """Get a file of weights into a folder that :data:`FOLDER_VARIABLE` can name; what is there is kept.

    Args:
        name: Of the weights, ``'architecture.tag'``.
        sources: Where they are to be had, in the order in which the places are tried.
        folder: The folder, which exists.
        license: Their licence, for the error.
        check: As for :func:`fetch`.
        progress: Show a bar on a terminal.

    Returns:
        The file in the folder.

    Raises:
        DownloadError: If no place has the file.
    """
    try:
        found = find_local(name, sources, folder)
    except DownloadError as error:
        _logger.warning('%s; it is downloaded again.', error)
        for source in sources:
            _remove(folder / source.local_name(name))
        found = None
    if found is not None:
        return found

    def get(source: Source) -> Path:
        path = folder / source.local_name(name)
        if source.repo_id:
            temporary = path.with_name(f'.{path.name}.part')
            shutil.copyfile(_download_from_hub(source, None), temporary)
            os.replace(temporary, path)
        else:
            _download(source, path, progress)
        return path

    return _first(name, sources, license, folder, check, get)
