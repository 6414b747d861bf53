"""The process in which candidates are tried that may end it: started by ``isolation``, which has the other end.

It reads a line for every job, tries the candidate in a process forked for it (where there is no safe fork: itself),
and answers with a line. It never runs the caller's script, and imports neither timm nor what the caller imported.
"""
import faulthandler
import importlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, Dict, Optional, TextIO

FORKS = sys.platform == 'linux'  # elsewhere system libraries do not survive it
POLL = 0.02  # seconds between two looks at a job


def main() -> None:
    """Answer the jobs that come in until there are no more."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), 'w', encoding='utf-8')  # whatever else is printed goes elsewhere
    os.dup2(2, 1)
    import torch  # noqa: F401  (once, for all that are forked from here)

    from . import contract  # noqa: F401
    from .backends import base  # noqa: F401

    _answer(answers, dict(ready=True))
    while True:
        line = sys.stdin.buffer.readline() if not FORKS else _read_line()
        if not line:
            os._exit(0)  # at once, and whatever a library has yet to say
        job = json.loads(line)
        if FORKS:
            _answer(answers, _watch(job))
        else:
            _try(job)
            _answer(answers, dict(done=True))


def _read_line() -> bytes:
    line = b''
    while not line.endswith(b'\n'):
        byte = os.read(0, 1)  # without a buffer, so that select sees what there is
        if not byte:
            return b''
        line += byte
    return line


def _answer(answers: TextIO, content: Dict[str, Any]) -> None:
    answers.write(json.dumps(content) + '\n')
    answers.flush()


def _watch(job: Dict[str, Any]) -> Dict[str, Any]:
    """Fork a process for a job and wait for it, up to the job's limit or until nobody asks any more."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()  # so that its compilers end with it
            _end_with_parent()
            _first_to_go()
            _try(job)
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + job['limit']
    answer: Optional[Dict[str, Any]] = None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if answer is None and time.monotonic() > deadline:
            answer = dict(hung=True)
            _kill(pid)
        if select.select([0], [], [], POLL)[0]:  # nothing is sent while a job runs: the caller is gone
            _kill(pid)
            os._exit(0)
    _kill(pid)  # what it has left behind
    if answer is not None:
        return answer
    if os.WIFSIGNALED(status):
        return dict(signal=os.WTERMSIG(status))
    return dict(done=True) if os.WEXITSTATUS(status) == 0 else dict(exit=os.WEXITSTATUS(status))


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _end_with_parent() -> None:
    """Have the system end this process with the one that started it, where it can."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError, TypeError):
        pass


def _first_to_go() -> None:
    """Where memory runs out, this process is ended and not the caller."""
    try:
        Path('/proc/self/oom_score_adj').write_text('1000')
    except OSError:
        pass


def _keep_compiler_cache() -> None:
    """Let PyTorch's compiler find what it has compiled before, where it would be without this process."""
    import getpass
    import re
    import tempfile

    try:
        user = re.sub(r'[\\/:*?"<>|]', '_', getpass.getuser())
    except (OSError, KeyError, ImportError):
        return
    os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', os.path.join(tempfile.gettempdir(), f'torchinductor_{user}'))


def _try(job: Dict[str, Any]) -> None:
    """Convert, run for the first time and compare; what came out lies in the job's folder."""
    folder = Path(job['folder'])
    stage = folder / 'stage'
    log = open(folder / 'log', 'w')
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log, all_threads=False)
    import tempfile

    import torch

    from . import contract
    from .backends import Arrangement
    from .report import first_line

    _keep_compiler_cache()
    try:
        stage.write_text('converting')
        module, _, name = job['backend'].partition(':')
        backend: Any = importlib.import_module(module)
        for part in name.split('.'):
            backend = getattr(backend, part)
        for first in backend.imports:
            importlib.import_module(first)
        os.environ['TMPDIR'] = tempfile.tempdir = str(folder)
        torch.set_num_threads(job['threads'])
        torch.set_float32_matmul_precision(job['matmul'])
        files = {path.name: path.read_bytes() for path in Path(job['files']).iterdir()}
        read = backend.finish if job['prepared'] else backend.from_parts
        converted = read(files, job['precision'], job['shape'])
        stage.write_text('getting ready to run')
        trials = torch.load(job['trials'], map_location=job['device'], weights_only=False)
        if job['arrangement'] is None:
            arrangement = converted.arrangements(len(trials.example), job['threads'])[0]
        else:
            arrangement = Arrangement.parse(job['arrangement'])
        runner = converted.runner(arrangement, job['threads'])
        stage.write_text('running')
        found = contract.check(runner, trials, job['precision'], job['bound'])
        if job['prepared']:
            stage.write_text('writing what was converted')
            (folder / 'parts').mkdir()
            for name, content in converted.parts().items():
                (folder / 'parts' / name).write_bytes(content)
        result: Dict[str, Any] = dict(differences=found)
    except Exception as error:  # whatever a library has to say
        result = dict(error=first_line(error))
    (folder / 'result.json').write_text(json.dumps(result))
