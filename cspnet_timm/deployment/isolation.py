"""Trying candidates in a process of their own: what ends it or hangs in it is a line of the report.

A library or a compiler that is given a network makes machine code that nobody has run before. It is converted, run for
the first time and compared in a process that is started for the purpose (``worker``); only what survived is taken
into the caller's. The network gets there as files that :meth:`Backend.prepare` has written, so it need not be
picklable, and the caller's script is not run again.
"""
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Dict, List, Optional, Tuple, Type

import torch

from .backends import Arrangement, Backend
from .contract import Trials
from .report import DeployError

__all__ = ['Isolation', 'Lost', 'impossible']

START = 120.  # seconds that the process may take until it answers
SLACK = 10.  # seconds beyond a job's limit, after which the process itself is given up
QUIET, EVERY = 10., 30.  # seconds until a job is said to be still running, and between two times that it is
PACKAGE = __name__.partition('.')[0]
# The package without its __init__, which imports timm to register the models: that takes longer than all else.
ENTRY = (
    'import sys; sys.path[:] = sys.argv[1].split(sys.argv[2]); package = type(sys)(sys.argv[3]); '
    'package.__path__ = [sys.argv[4]]; sys.modules[sys.argv[3]] = package; '
    'from importlib import import_module; import_module(sys.argv[3] + ".deployment.worker").main()')


class Lost(DeployError):
    """A candidate that did not come back, or that an exception ended; the message is the report's line."""


def impossible() -> Optional[str]:
    """Why no process can be started for a candidate here, None if one can."""
    name = os.path.basename(sys.executable or '')
    if getattr(sys, 'frozen', False) or not re.match(r'(?i)python|pypy', name):
        return (
            f'there is no Python interpreter to start (sys.executable is {sys.executable!r}), so what may end its '
            'process is not tried; isolate=False tries it in this one')
    return None


class Isolation:
    """The process for candidates; started once, used for all of them, and started again when one of them ended it.

    Use it as a context manager, which ends it.

    Attributes:
        trials: What candidates are compared on; needed at the first attempt, not before.
    """

    def __init__(self, threads: int, limit: float, say: Callable[[str], None]) -> None:
        """
        Args:
            threads: Threads that compute.
            limit: Seconds that each candidate may take.
            say: Is given a sentence while a candidate takes long.
        """
        self.trials: Optional[Trials] = None
        self.threads = threads
        self.limit = limit
        self.say = say
        self.folder = Path(tempfile.mkdtemp(prefix='cspnet-timm-'))
        self.jobs = 0
        self.process: Optional[subprocess.Popen] = None
        self.answers: queue.Queue[Dict[str, Any]] = queue.Queue()
        self.ready = False

    def __enter__(self) -> 'Isolation':
        return self

    def __exit__(
            self,
            kind: Optional[Type[BaseException]],
            error: Optional[BaseException],
            trace: Optional[TracebackType],
    ) -> None:
        self._stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start the process, which goes on importing meanwhile.

        Raises:
            Lost: If it cannot be started.
        """
        reason = impossible()
        if reason is not None:
            raise Lost(reason)
        if self.process is not None and self.process.poll() is None:
            return
        path = os.pathsep.join(os.path.abspath(p or os.curdir) for p in sys.path)
        try:
            with open(self.folder / 'log', 'ab') as log:
                self.process = subprocess.Popen(
                    [sys.executable, '-c', ENTRY, path, os.pathsep, PACKAGE, str(Path(__file__).parents[1])],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
                    env={**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'})
        except OSError as error:
            raise Lost(f'no process could be started for it: {error}; isolate=False tries it in this one') from error
        self.answers = queue.Queue()
        self.ready = False
        threading.Thread(target=_read, args=(self.process.stdout, self.answers), daemon=True).start()

    def wait(self) -> None:
        """Wait until the process is ready; it is started if it is not.

        Raises:
            Lost: If it does not get ready.
        """
        self.start()
        if not self.ready:
            answer = self._answer(START)
            if answer is None or not answer.get('ready'):
                self._stop()
                log = _last_line(self.folder / 'log')
                raise Lost(f'the process for it did not start{log}; isolate=False tries it in this one')
            self.ready = True

    def settle(self) -> None:
        """Let the process get ready if it is starting, so that it takes no time from what is measured."""
        if self.process is not None and not self.ready:
            try:
                self.wait()
            except Lost:
                pass  # the next attempt says so

    def attempt(
            self,
            backend: Type[Backend],
            files: Dict[str, bytes],
            *,
            prepared: bool,
            precision: str,
            bound: float,
            arrangement: Optional[Arrangement] = None,
            what: str = '',
    ) -> Tuple[List[float], Dict[str, bytes]]:
        """Convert, run and compare a candidate in the process.

        Args:
            backend: Its backend.
            files: What :meth:`Backend.prepare` or :meth:`Backend.parts` gave.
            prepared: It was the former, and is to be converted.
            precision: What it computes in.
            bound: The largest relative difference on the example.
            arrangement: How the batch is laid out; the most promising one by default.
            what: What to call it.

        Returns:
            The relative differences on the example, and the parts of what was converted.

        Raises:
            Lost: If the process died or took too long, or the candidate raised an exception; the message says where.
        """
        assert self.trials is not None
        self.wait()
        self.jobs += 1
        folder = self.folder / str(self.jobs)
        (folder / 'files').mkdir(parents=True)
        try:
            for name, content in files.items():
                (folder / 'files' / name).write_bytes(content)
            return self._attempt(folder, dict(
                backend=f'{backend.__module__}:{backend.__qualname__}', folder=str(folder), files=str(folder / 'files'),
                trials=str(self._trials()), prepared=prepared, precision=precision, bound=bound, limit=self.limit,
                arrangement=None if arrangement is None else str(arrangement), threads=self.threads,
                shape=list(self.trials.example.shape), device=str(self.trials.example.device),
                matmul=torch.get_float32_matmul_precision()), what)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _trials(self) -> Path:
        path = self.folder / 'trials.pt'
        if not path.exists():
            torch.save(self.trials, path)
        return path

    def _attempt(self, folder: Path, job: Dict[str, Any], what: str) -> Tuple[List[float], Dict[str, bytes]]:
        assert self.process is not None and self.process.stdin is not None
        began = time.monotonic()
        try:
            self.process.stdin.write(json.dumps(job).encode() + b'\n')
            self.process.stdin.flush()
        except OSError:
            pass  # it died meanwhile, as its answer will tell
        told = QUIET
        while True:
            left = self.limit + SLACK - (time.monotonic() - began)
            answer = self._answer(max(min(left, told - (time.monotonic() - began)), 0.01))
            passed = time.monotonic() - began
            if answer is not None or passed > self.limit + SLACK:
                break
            if passed >= told:
                self.say(f'{what}: {_stage(folder)} for {passed:.0f} s, given up after {self.limit:.0f} s')
                told += EVERY
        if answer is None or 'end' in answer:
            answer = self._ended(hung=answer is None)
        where = f'while {_stage(folder)}{_frame(folder / "log")}'
        if answer.get('hung'):
            raise Lost(f'took longer than {self.limit:g} s {where}, and was ended')
        if 'signal' in answer:
            raise Lost(f'ended its process by {_name(answer["signal"])} {where}')
        result = folder / 'result.json'
        if 'exit' in answer or not result.exists():
            raise Lost(f'ended its process with exit code {answer.get("exit", 0)} {where}')
        found = json.loads(result.read_text())
        if 'error' in found:
            raise Lost(found['error'])
        parts = {path.name: path.read_bytes() for path in (folder / 'parts').iterdir()} if job['prepared'] else {}
        return found['differences'], parts

    def _answer(self, seconds: float) -> Optional[Dict[str, Any]]:
        try:
            return self.answers.get(timeout=seconds)
        except queue.Empty:
            return None

    def _ended(self, hung: bool) -> Dict[str, Any]:
        """What became of the process itself, which does not answer any more."""
        code = None if self.process is None else self.process.poll()
        if code is None and not hung and self.process is not None:
            code = self.process.wait(SLACK)
        self._stop()
        if hung:
            return dict(hung=True)
        return dict(signal=-code) if code is not None and code < 0 else dict(exit=code)

    def _stop(self) -> None:
        process, self.process, self.ready = self.process, None, False
        if process is None:
            return
        try:
            if process.stdin is not None:
                process.stdin.close()  # by which it ends, and what it has forked
        except OSError:
            pass
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _read(pipe: Any, answers: 'queue.Queue[Dict[str, Any]]') -> None:
    with pipe:
        for line in pipe:
            try:
                answers.put(json.loads(line))
            except ValueError:
                pass
    answers.put(dict(end=True))  # nobody answers any more


def _name(number: int) -> str:
    try:
        name = f' ({signal.Signals(number).name})'
    except ValueError:
        name = ''
    return f'signal {number}{name}' + (', as the system does where memory runs out,' if number == 9 else '')


def _stage(folder: Path) -> str:
    try:
        return (folder / 'stage').read_text()
    except OSError:
        return 'starting'


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors='replace').strip().splitlines()
    except OSError:
        return ''
    return f': {lines[-1][:200]}' if lines else ''


def _frame(log: Path) -> str:
    """Where Python was, by what its fault handler has written."""
    try:
        text = log.read_text(errors='replace')
    except OSError:
        return ''
    found = re.search(r'most recent call first\):\n\s*File "(.*?)", line (\d+) in (\S+)', text)
    return f', in {found[3]} ({os.path.basename(found[1])}, line {found[2]})' if found else ''

