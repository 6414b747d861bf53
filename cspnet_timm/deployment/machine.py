"""What the hardware can do, and whether it is quiet enough to measure."""
import os
import platform
import shlex
import shutil
import statistics
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

__all__ = ['PRECISIONS', 'cpp_compiler', 'describe', 'elapsed', 'interleave', 'native_precisions']

PRECISIONS = ('float32', 'bfloat16', 'float16', 'int8')


def native_precisions(device: torch.device) -> Tuple[str, ...]:
    """Precisions for which the device has arithmetic of its own, the exact one first.

    Args:
        device: A CPU or a CUDA device.

    Returns:
        Names out of :data:`PRECISIONS`.
    """
    if device.type == 'cuda':
        found = ['float32', 'float16']
        if torch.cuda.is_bf16_supported(including_emulation=False):
            found.append('bfloat16')
        return tuple(found)
    found = ['float32']
    if platform.machine().lower() in ('arm64', 'aarch64'):
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            found.append('bfloat16')
    else:
        if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
            found.append('bfloat16')
        if torch.cpu._is_amx_tile_supported() or torch.cpu._is_vnni_supported():
            found.append('int8')
    return tuple(found)


def cpp_compiler() -> Optional[List[str]]:
    """The command that compiles C++: ``$CXX``, or the first of g++, c++ and clang++ that there is; None without one."""
    own = os.environ.get('CXX')
    if own:
        command = shlex.split(own)
        return command if command and shutil.which(command[0]) else None
    return next(([name] for name in ('g++', 'c++', 'clang++') if shutil.which(name)), None)


def describe(device: torch.device) -> Dict[str, Any]:
    """The machine in words: processor, precisions, threads and versions."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else _processor()
    return dict(
        device=name, precisions=list(native_precisions(device)), threads=torch.get_num_threads(),
        python=platform.python_version(), torch=torch.__version__, platform=platform.platform())


def _processor() -> str:
    try:
        with open('/proc/cpuinfo') as file:
            for line in file:
                if line.startswith('model name'):
                    return line.split(':', 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def elapsed(call: Callable[[], Any], count: int, device: torch.device) -> float:
    """Time some calls: on a GPU by its own events, between what comes before and behind.

    Args:
        call: What to time.
        count: How often it is called.
        device: Where it computes.

    Returns:
        Milliseconds of all calls.
    """
    if device.type == 'cuda':
        with torch.cuda.device(device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(count):
                call()
            last.record()
            last.synchronize()
        return first.elapsed_time(last)
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) * 1e3


def interleave(
        calls: Sequence[Callable[[], Any]],
        device: torch.device,
        seconds: float,
        rounds: int = 5,
) -> List[float]:
    """Time callables in turn, so that whatever slows the machine down slows all of them down.

    Args:
        calls: What to time.
        device: Where they compute.
        seconds: About how long to measure each, at least ``rounds`` calls.
        rounds: How often each has its turn.

    Returns:
        The median milliseconds of each.
    """
    counts = []
    for call in calls:
        elapsed(call, 1, device)  # the first call may allocate, and page in
        counts.append(max(int(seconds / rounds / max(elapsed(call, 1, device) * 1e-3, 1e-6)), 1))
    times: List[List[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, count, row in zip(calls, counts, times):
            row.append(elapsed(call, count, device) / count)
    return [statistics.median(row) for row in times]
