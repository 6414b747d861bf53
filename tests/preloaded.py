"""Programs as ``python program arguments`` runs them, but for the five seconds that importing PyTorch and timm takes.

A process that has imported both is forked for each. Programs that read the environment while they import, and those
that a launcher starts, want processes of their own.
"""
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from typing import List, Tuple

_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload(['torch', 'torchvision', 'timm', 'timm.data', 'timm.optim', 'timm.scheduler'])


def _main(arguments: List[str], folder: str, output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    sys.argv = arguments
    sys.path.insert(0, folder)
    runpy.run_path(arguments[0], run_name='__main__')


def execute(arguments: List[str], folder: Path, timeout: float) -> Tuple[int, str]:
    """Run a program.

    Args:
        arguments: Of the program, which is the first of them.
        folder: Where it runs.
        timeout: In seconds.

    Returns:
        Its exit code, -15 after the timeout, and what it wrote to both of its outputs.
    """
    output = folder / f'{os.getpid()}.output'
    process = _CONTEXT.Process(target=_main, args=(arguments, str(folder), str(output)))
    process.start()
    process.join(timeout)
    process.terminate()
    process.join()
    written = output.read_text() if output.exists() else ''
    output.unlink(missing_ok=True)
    return process.exitcode, written
