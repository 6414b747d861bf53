"""What the plugin adds to ``import torch`` and ``import timm``: ``python benchmarks/import_cost.py [--runs 15]``.

Each run is a process of its own, without torch's scan of entry points; it imports torch and timm, then does and times
what the scan and the hook would have done. A difference of two imports of seconds would drown milliseconds in noise.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Dict, List

_RUN = """
import importlib, json, sys, time
times = {}
start = time.perf_counter()
import torch
times['import torch'] = time.perf_counter() - start
torch.__spec__._initializing = True  # as it is while torch scans the entry points
start = time.perf_counter()
importlib.import_module('cspnet_timm.autoload').install()
times['at torch'] = time.perf_counter() - start
torch.__spec__._initializing = False
sys.meta_path.pop(0)
start = time.perf_counter()
import timm
times['import timm'] = times['import torch'] + time.perf_counter() - start
start = time.perf_counter()
import cspnet_timm
times['at timm'] = time.perf_counter() - start
assert timm.is_model('cspnet_nano')
print(json.dumps(times))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--runs', type=int, default=15)
    runs = parser.parse_args().runs
    rows: Dict[str, List[float]] = {}
    for _ in range(runs):
        result = subprocess.run(
            [sys.executable, '-c', _RUN], capture_output=True, text=True, check=True,
            env={**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'})
        for name, seconds in json.loads(result.stdout).items():
            rows.setdefault(name, []).append(1e3 * seconds)
    medians = {name: statistics.median(values) for name, values in rows.items()}
    for module in ('torch', 'timm'):
        whole, share = medians[f'import {module}'], medians[f'at {module}']
        print(f'import {module}: median of {runs} {whole:.0f} ms, to which the plugin adds {share:.2f} ms '
              f'({share / whole:.2%} of it)')


if __name__ == '__main__':
    main()
