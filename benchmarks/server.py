"""A server with dynamic batches: latency and resident memory over many calls of random batch, every backend.

    python benchmarks/server.py --out docs

A process of its own for each backend deploys the network for a batch in the middle and is called with batches of 1 to
32 images in random order. What counts is that it neither stalls (the slowest call beside the median of calls of the
same batch) nor grows (resident memory at the end beside that after the first tenth). Writes ``server.json`` and
``server.md``.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from paper import write_files
from speed import create

from cspnet_timm import deploy
from cspnet_timm.deployment.backends import BACKENDS
from cspnet_timm.deployment.machine import describe

HERE = Path(__file__).resolve()


def resident() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2 ** 20


def serve(backend: str, model: str, size: int, batch: int, most: int, calls: int) -> Dict[str, Any]:
    """Deploy, and call.

    Args:
        backend: What runs it.
        model: The network.
        size: Side of the images.
        batch: Images it is deployed for.
        most: Images in a call at most.
        calls: How many.

    Returns:
        Milliseconds and MiB.
    """
    network = deploy(create(model, torch.device('cpu')), torch.rand(batch, 3, size, size), backend=backend,
                     seconds=0.2, progress=False)
    images = torch.rand(most, 3, size, size)
    order = random.Random(0)
    times: Dict[int, List[float]] = {}
    memory = [resident()]
    for i in range(calls):
        n = order.randint(1, most)
        start = time.perf_counter()
        network(images[:n])
        times.setdefault(n, []).append((time.perf_counter() - start) * 1e3)
        if (i + 1) % max(calls // 10, 1) == 0:
            memory.append(resident())
    medians = {n: statistics.median(row) for n, row in times.items()}
    per_image = sorted(t / n for n, row in times.items() for t in row)
    return dict(
        backend=backend, precision=network.report.precision, arrangement=network.report.arrangement,
        per_image=statistics.median(per_image), one=medians.get(1), all=medians.get(most),
        p99=per_image[int(0.99 * (len(per_image) - 1))],
        slowest=max(max(row) - medians[n] for n, row in times.items()), memory=memory)


def _conclusion(results: List[Dict[str, Any]]) -> List[str]:
    if not results:
        return []
    first = min(results, key=lambda r: r['per_image'])
    grown = max(r['memory'][-1] - r['memory'][1] for r in results)
    return [f'`{first["backend"]}` takes least time for an image, {first["per_image"]:.2f} ms; once a tenth of the '
            f'calls is done, every backend grows by less than {int(max(grown, 0)) + 1} MiB.', '']


def table(report: Dict[str, Any]) -> List[str]:
    """The results as Markdown."""
    machine, size = report['machine'], report['size']
    lines = [
        f'# A server with dynamic batches, {report["date"]}', '',
        *_conclusion(report['results']),
        f'{machine["device"]}, {machine["threads"]} threads: `{report["model"]}` at {size} × {size}, deployed for a '
        f'batch of {report["batch"]}, {report["calls"]} calls of 1 to {report["most"]} images in random order. '
        'Milliseconds; resident MiB before the first call, after a tenth of them, and at the end. `python '
        f'benchmarks/server.py --size {size}` measures it.', '',
        '| backend | | one image | most images | per image, median | 99 % | slowest call over the median of its '
        'batch | MiB | after a tenth | at the end |',
        '| --- | --- |' + ' ---: |' * 8]
    for r in report['results']:
        lines.append(
            f'| {r["backend"]} | {r["precision"]} | {r["one"]:.2f} | {r["all"]:.1f} | {r["per_image"]:.2f} | '
            f'{r["p99"]:.2f} | {r["slowest"]:.0f} | ' + ' | '.join(f'{r["memory"][i]:.0f}' for i in (0, 1, -1)) + ' |')
    return lines


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description='Latency and memory of deployed networks in a server.')
    parser.add_argument('--out', type=Path, required=True, help='folder for the results')
    parser.add_argument('--model', default='cspnet_nano')
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--batch', type=int, default=8, help='images that it is deployed for')
    parser.add_argument('--most', type=int, default=32, help='images in a call at most')
    parser.add_argument('--calls', type=int, default=2000)
    parser.add_argument('--backends', nargs='+', choices=BACKENDS, help='by default all but the compiler')
    parser.add_argument('--step', choices=BACKENDS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.step:
        print(json.dumps(serve(args.step, args.model, args.size, args.batch, args.most, args.calls)))
        return
    cpu = torch.device('cpu')
    names = args.backends or [
        name for name, backend in BACKENDS.items()
        if backend.unavailable(cpu) is None and not name.startswith('inductor')]
    results = []
    for name in names:
        command = [sys.executable, '-W', 'ignore', str(HERE), '--step', name, '--out', '.', '--model', args.model,
                   '--size', str(args.size), '--batch', str(args.batch), '--most', str(args.most),
                   '--calls', str(args.calls)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(f'{name}: {results[-1]["per_image"]:.2f} ms per image, {results[-1]["memory"][-1]:.0f} MiB', flush=True)
    report = dict(
        date=time.strftime('%Y-%m-%d'), machine=describe(cpu), model=args.model, size=args.size, batch=args.batch,
        most=args.most, calls=args.calls, results=results)
    write_files({
        'server.json': lambda path: path.write_text(json.dumps(report, indent=1)),
        'server.md': lambda path: path.write_text('\n'.join(table(report)) + '\n'),
    }, args.out)


if __name__ == '__main__':
    main()
