"""The engine's machine code: compiled once per machine by its own C++ compiler, kept in the user's cache."""
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterator, Optional, Sequence, Tuple

from ..machine import cpp_compiler
from .records import compare

__all__ = ['cache_dir', 'has_bfloat16', 'library', 'unavailable']

SOURCES = Path(__file__).with_name('cpp')
FLAGS = ['-O3', '-std=c++17', '-shared', '-fPIC', '-pthread', '-fno-math-errno']
# What the engine is compiled for, as the kernel calls it: all of the first, and of the others what there is.
NEEDED = ('avx512f', 'avx512bw', 'avx512dq', 'avx512vl', 'avx512_vnni', 'fma')
BFLOAT16 = ('avx512_bf16',)
TILES = ('avx512_bf16', 'avx512_fp16', 'amx_tile', 'amx_bf16', 'amx_int8')


def cache_dir() -> Path:
    """Where the compiled engine lies: ``$CSPNET_TIMM_CACHE``, else ``cspnet_timm`` in the user's cache."""
    own = os.environ.get('CSPNET_TIMM_CACHE')
    if own:
        return Path(own)
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'cspnet_timm'


def unavailable() -> Optional[str]:
    """Why the native engine cannot run here.

    Returns:
        None if it can, else one sentence.
    """
    if sys.platform != 'linux' or platform.machine() not in ('x86_64', 'AMD64'):
        return f'The native engine is for Linux on x86-64, and this is {sys.platform} on {platform.machine()}.'
    missing = [flag for flag in NEEDED if flag not in cpu_flags()]
    if missing:
        return f'The native engine needs a CPU with AVX-512 and VNNI, and this one lacks {", ".join(missing)}.'
    try:
        library()
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def cpu_flags() -> frozenset:
    """What the kernel says that the CPU has; empty where there is no Linux."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(':')[1] for line in lines if line.startswith('flags')), '').split())


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16, and the engine need not do it in float32."""
    return BFLOAT16[0] in cpu_flags()


def _units(tiles: bool) -> Tuple[str, ...]:
    """Of the CPU's units what the engine is compiled for."""
    extra = [BFLOAT16, TILES] if tiles else [BFLOAT16]
    return tuple(dict.fromkeys([*NEEDED, *(u for units in extra if cpu_flags().issuperset(units) for u in units)]))


@functools.cache
def _load(path: str) -> ctypes.CDLL:
    lib = ctypes.CDLL(path)
    i64, pointer, whole = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    for name, result, arguments in (
            ('csp_description', ctypes.c_char_p, []), ('csp_tiles', whole, []), ('csp_permission', whole, []),
            ('csp_alloc', pointer, [i64]), ('csp_free', None, [pointer]), ('csp_team', pointer, [whole]),
            ('csp_team_free', None, [pointer]), ('csp_team_pid', whole, [pointer]),
            ('csp_program', pointer, [pointer, i64, i64, i64, i64]),
            ('csp_reserve', whole, [pointer, pointer]), ('csp_steps', None, [pointer, pointer, i64]),
            ('csp_program_free', None, [pointer]), ('csp_run', None, [pointer, pointer, i64]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    compare(lib.csp_description().decode())
    return lib


def library() -> ctypes.CDLL:
    """The compiled engine; compiled now if it is not in the cache.

    Returns:
        The library.

    Raises:
        RuntimeError: If there is no compiler, or it fails.
    """
    lib = _compiled(_units(tiles=True))
    # A system may withhold the tiles' registers from programs.
    return _compiled(_units(tiles=False)) if lib.csp_permission() else lib


def _compiled(units: Sequence[str]) -> ctypes.CDLL:
    compiler = cpp_compiler()
    if compiler is None:
        raise RuntimeError('The native engine is compiled on the machine it runs on, and no C++ compiler was found '
                           '(g++, c++, clang++ or $CXX).')
    command = [*compiler, *FLAGS, *(f'-m{u.replace("_", "-" if "amx" in u else "")}' for u in units)]
    made_of = [_sources(), shlex.join(command).encode(), _version(tuple(compiler))]
    key = hashlib.sha256(b'\0'.join(made_of)).hexdigest()[:24]
    path = cache_dir() / f'engine-{key}.so'
    if not path.exists():
        _compile(compiler, command, path)
    return _load(str(path))


def _compile(compiler: Sequence[str], command: Sequence[str], path: Path) -> None:
    """Put the compiled engine there, unless another process that started at the same time has."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix='.so')
    except OSError as error:
        raise RuntimeError(f'The native engine has no place for its compiled form: {error}. '
                           'Set CSPNET_TIMM_CACHE to a folder of yours.') from error
    os.close(handle)
    try:
        with _alone(path.parent):
            if path.exists():
                return
            done = subprocess.run(
                [*command, str(SOURCES / 'engine.cpp'), '-o', temporary], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f'The native engine could not be compiled by {shlex.join(compiler)}: '
                                   f'{(done.stderr.strip().splitlines() or ["no message"])[0][:300]}')
            os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is within; where a folder cannot be locked, do not wait."""
    import fcntl  # there is one where the engine is: on Linux

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
            stack.callback(fcntl.flock, handle, fcntl.LOCK_UN)  # a process forked meanwhile may have the folder open
        yield


@functools.cache
def _sources() -> bytes:
    """What the sources were when this process first asked: they belong to the Python that it runs."""
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in ('.cpp', '.h'))
    return hashlib.sha256(b'\0'.join(path.read_bytes() for path in sources)).digest()


@functools.cache
def _version(compiler: tuple) -> bytes:
    return subprocess.run([*compiler, '--version'], capture_output=True).stdout
