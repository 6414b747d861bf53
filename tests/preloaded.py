"""A Python without the five seconds that importing PyTorch and timm takes, for tests that start processes.

``python()`` gives a program that is called as Python is: with a script, ``-m module`` or ``-c code``, in any folder,
with any environment, input and outputs. A process that has imported both is forked for it, whose ``sys.executable`` is
that program again. Its exit code and the signal that ended it are passed on, and it does not outlive its caller's.

A real Python is started instead where the two could differ: with options or variables that Python or the libraries
read when they start. What is about the start itself, its time or its memory, wants ``sys.executable``.
"""
import ast
import atexit
import builtins
import faulthandler
import functools
import gc
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from pathlib import Path
from typing import Dict, List, Optional, Tuple

OPTIONS = ('-u', '-W', '-X')  # the others are Python's own business
READ_EARLY = ('HF_', 'HUGGINGFACE_', 'XDG_', 'TORCH_', 'CSPNET_TIMM_AUTOLOAD', 'LD_PRELOAD', 'PYTHON')
READ_LATE = (
    'PYTHONPATH', 'PYTHONSAFEPATH', 'TORCH_BACKEND', 'TORCH_DEVICE_BACKEND_AUTOLOAD', 'TORCH_HOME', 'TORCH_NCCL',
    'PYTORCH_NVML')
MESSAGE = 1 << 16

_ENVIRONMENT = dict(os.environ)  # and not that of the test which calls first
_SERVERS: List[subprocess.Popen] = []

# The program is a Python that imports next to nothing: it hands over what it was given, and ends as it is told.
PROGRAM = '''#!{executable} -IS
import os, sys
folder, early, late, options = {folder!r}, {early!r}, {late!r}, {options!r}
environment = dict(os.environ)
theirs = eval(open(folder + '/environment').read())
differ = {{k for k in {{*environment, *theirs}} if environment.get(k) != theirs.get(k)}}
arguments = sys.argv[1:]
first = next((a for a in arguments if a[:1] != '-' or a in ('-c', '-m')), '')
before = arguments[:arguments.index(first)] if first else ()
if not first or any(a[:2] not in options for a in before) or any(
        k.startswith(early) and not k.startswith(late) for k in differ):
    os.execv({executable!r}, [{executable!r}, *arguments])
import _socket, array, signal
channel = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
channel.connect(folder + '/socket')
request = repr((arguments, os.getcwd(), environment)).encode()
channel.sendmsg([len(request).to_bytes(8, 'big')],
                [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array('i', [0, 1, 2]))])
channel.sendall(request)
answer = channel.recv(64)
code = int(answer or 1)
if code < 0:
    import resource
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), -code)
os._exit(code)
'''


@functools.cache
def python() -> str:
    """The program to call as Python; what it needs is started at the first call, and ends with this process."""
    if sys.platform != 'linux':
        return sys.executable
    folder = tempfile.mkdtemp(prefix='preloaded-')
    program = Path(folder) / 'python'
    program.write_text(PROGRAM.format(
        executable=sys.executable, folder=folder, early=READ_EARLY, late=READ_LATE, options=OPTIONS))
    program.chmod(0o755)
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, _ENVIRONMENT.get('PYTHONPATH')]))
    server = subprocess.Popen(
        [sys.executable, __file__, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**_ENVIRONMENT, 'PYTHONPATH': path})
    if server.stdout.read(5) != b'ready':
        raise RuntimeError('The process that imports torch and timm for others did not start.')
    _SERVERS.append(server)  # whose end of its input is the end of this process
    return str(program)


def cpu_seconds() -> float:
    """What the processes took that this one has started here, in seconds of a core."""
    ticks = 0
    for server in _SERVERS:
        with open(f'/proc/{server.pid}/stat') as file:
            ticks += sum(map(int, file.read().rpartition(') ')[2].split()[11:15]))  # its own, and those that ended
    return ticks / os.sysconf('SC_CLK_TCK')


def _serve(folder: Path) -> List[str]:
    """Fork a process for each caller; returns in that process alone, with its arguments."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / 'socket'))
    listener.listen()
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken)
    (folder / 'environment').write_text(repr(dict(os.environ)))
    os.write(1, b'ready')
    callers: Dict[socket.socket, int] = {}
    while True:
        ready = select.select([0, wake, listener, *callers], [], [])[0]
        if 0 in ready:  # the end of the tests
            for process in callers.values():
                _kill(process)
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)
        if listener in ready:
            caller = listener.accept()[0]
            request = _receive(caller)
            if request is None:
                caller.close()
                continue
            process = os.fork()
            if not process:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (listener, caller, *callers):
                    other.close()
                os.close(wake)
                os.close(woken)
                return _become(*request)
            for file in request[1]:
                os.close(file)
            callers[caller] = process
        if wake in ready:
            os.read(wake, 4096)
            while True:
                try:
                    process, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if not process:
                    break
                caller = next(c for c, p in callers.items() if p == process)
                del callers[caller]
                try:
                    caller.send(str(os.waitstatus_to_exitcode(status)).encode())
                except OSError:
                    pass  # it has gone
                caller.close()
        for caller in [c for c in ready if c in callers]:
            # A caller says nothing more: that it can be read means that it has ended.
            _kill(callers[caller])


def _kill(process: int) -> None:
    for kill in (os.kill, os.killpg):  # it has no group of its own in its first moment
        try:
            kill(process, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _receive(caller: socket.socket) -> Optional[Tuple[bytes, List[int]]]:
    head, files, *_ = socket.recv_fds(caller, 8, 3)
    length, request = int.from_bytes(head, 'big'), b''
    while len(request) < length:
        part = caller.recv(MESSAGE)
        if not part:
            return None
        request += part
    return request, files


def _become(request: bytes, files: List[int]) -> List[str]:
    """Take over a caller's folder, environment, input and outputs; gives its arguments."""
    arguments, folder, environment = ast.literal_eval(request.decode())
    os.setsid()
    for i, file in enumerate(files):
        os.dup2(file, i)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return arguments


def _run(arguments: List[str], program: str, base: List[str]) -> None:
    """What Python does with its arguments."""
    import torch

    while arguments[0] not in ('-c', '-m') and arguments[0].startswith('-'):
        option = arguments.pop(0)
        value = '' if option == '-u' else option[2:] or arguments.pop(0)
        if option[:2] == '-W':
            action, _, category = value.partition('::')
            warnings.simplefilter(action, getattr(builtins, category, Warning))
        elif value == 'faulthandler':
            faulthandler.enable()
    threads = os.environ.get('OMP_NUM_THREADS', '')
    if threads.isdigit():
        torch.set_num_threads(int(threads))
    sys.executable = program
    paths = [os.path.abspath(p) for p in os.environ.get('PYTHONPATH', '').split(os.pathsep) if p]
    kind = arguments.pop(0)
    first = {'-m': os.getcwd(), '-c': ''}.get(kind, os.path.dirname(os.path.abspath(kind)))
    sys.path[:] = [*([] if os.environ.get('PYTHONSAFEPATH') else [first]), *paths, *base]
    sys.orig_argv = [program, kind, *arguments]
    if kind == '-m':
        sys.argv = ['-m', *arguments[1:]]
        runpy.run_module(arguments[0], run_name='__main__', alter_sys=True)
        return
    main = types.ModuleType('__main__')
    main.__builtins__ = builtins
    sys.modules['__main__'] = main
    if kind == '-c':
        sys.argv = ['-c', *arguments[1:]]
        code = compile(arguments[0], '<string>', 'exec')
    else:
        sys.argv = [kind, *arguments]
        main.__file__ = kind
        code = compile(Path(kind).read_bytes(), kind, 'exec')
    exec(code, main.__dict__)


if __name__ == '__main__':
    import torchvision  # noqa: F401
    from timm import data, optim, scheduler  # noqa: F401

    given = {os.path.abspath(p) for p in os.environ['PYTHONPATH'].split(os.pathsep)}
    standard = [p for p in sys.path[1:] if os.path.abspath(p) not in given]
    gc.freeze()  # or looking for garbage would copy all that the processes share
    called = _serve(Path(sys.argv[1]))
    status = 1
    try:
        _run(called, sys.argv[1] + '/python', standard)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and end.code is not status:
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:  # and not as Python ends, which takes apart all that was imported
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status & 255)
