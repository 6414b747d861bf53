"""What the plugin adds to ``import torch`` and ``import timm``: ``python benchmarks/import_cost.py [--runs 15]``.

Each run is a process of its own that imports timm under ``-X importtime``; the plugin's share is what the interpreter
booked on its modules, so that the noise of an import of seconds does not drown a cost of milliseconds.
"""
import argparse
import re
import statistics
import subprocess
import sys
from typing import Dict, List


def _cumulative(module: str) -> Dict[str, float]:
    result = subprocess.run(
        [sys.executable, '-X', 'importtime', '-c', f'import {module}'], capture_output=True, text=True, check=True)
    times: Dict[str, float] = {}
    for line in result.stderr.splitlines():
        match = re.fullmatch(r'import time:\s+\d+ \|\s+(\d+) \|\s+(\S+)', line)
        if match:
            # A module that is forgotten and imported again is booked twice.
            times[match[2]] = times.get(match[2], 0.) + int(match[1]) / 1e3
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--runs', type=int, default=15)
    runs = parser.parse_args().runs
    rows: Dict[str, List[float]] = {k: [] for k in ('import torch', 'import timm', 'at torch', 'at timm')}
    for _ in range(runs):
        torch_alone = _cumulative('torch')
        rows['import torch'].append(torch_alone['torch'])
        rows['at torch'].append(torch_alone.get('cspnet_timm', 0.) + torch_alone.get('cspnet_timm.autoload', 0.))
        both = _cumulative('timm')
        rows['import timm'].append(both['timm'])
        rows['at timm'].append(both.get('cspnet_timm.families', 0.))
    medians = {name: statistics.median(values) for name, values in rows.items()}
    for module in ('torch', 'timm'):
        whole, share = medians[f'import {module}'], medians[f'at {module}']
        print(f'import {module}: median of {runs} {whole:.0f} ms, of which the plugin {share:.2f} ms '
              f'({share / (whole - share):.2%} on top)')


if __name__ == '__main__':
    main()
