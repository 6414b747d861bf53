"""Random plans and networks through the native engine, many of them.

    python -m tests.native_fuzz --plans 20000 --networks 2000

Every one that is accepted is compared with its reference on batches of 1, 2, 3 and 5: each image gives bit for bit what
it gives in any other batch, and what it gives beside an image of NaN or infinities.
"""
import argparse
import collections
import contextlib
import time
import traceback
from typing import Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch

from cspnet_timm.deployment.native import NativeEngine, Plan, UnsupportedNetwork, build, calibrate, correct, lower
from cspnet_timm.deployment.native.tuning import Tuning

from . import native_reference as reference
from .native_graphs import RandomNetwork, Source, random_plan

LEVELS = {'vnni': build.NEEDED, 'bfloat16': build.NEEDED + build.BFLOAT16, 'tiles': build.NEEDED + build.TILES}
LEVELS = {name: units for name, units in LEVELS.items() if build.cpu_flags().issuperset(units)}


@contextlib.contextmanager
def level(name: str) -> Iterator[None]:
    """The engine as it is on a CPU that has less."""
    before = build.cpu_flags
    build.cpu_flags = lambda: frozenset(LEVELS[name])  # type: ignore[assignment]
    try:
        yield
    finally:
        build.cpu_flags = before


def check_plan(plan: Plan, x: torch.Tensor, source: Source, precision: str, threads: int,
               tuning: Optional[Tuning] = None) -> None:
    """Compare a plan with the reference.

    Args:
        plan: With ranges for int8.
        x: Five images.
        source: Of small decisions.
        precision: Of the engine.
        threads: Of the engine.
        tuning: Of the engine.

    Raises:
        AssertionError: Where they differ.
    """
    engine = NativeEngine(plan, threads, precision, tuning)
    got = [y.clone() for y in engine(x)]
    smallest = 2. ** -14 if engine.tiles else 1e-20
    images = x.double().numpy()
    with np.errstate(invalid='ignore', over='ignore'):
        exact = reference.run(plan, images)
        rounded = reference.run(plan, images, precision, smallest)
    for (v, _), y in zip(plan.outputs, got):
        a, b = exact[v], rounded[v]
        y = y.double().numpy().reshape(a.shape)
        assert y.shape == a.shape
        # Several roundings that fall elsewhere are as far off as those of the reference are, not as their sum.
        bound = 6 * np.abs(a - b).max() + 2 ** -7 * np.abs(a).max() + 1e-30
        if precision == 'int8':
            bound = bound * 3 + 2 * max(reference.steps_and_zeros(plan, v, smallest)[0].max(), 1e-30)
        error = np.minimum(np.abs(y - a), np.abs(y - b)).max()
        assert error <= bound, f'output {v} is {error} off, {bound} allowed'
    for n in (1, 2, 3, 5):
        start = source.pick(range(6 - n))
        for y, whole in zip(engine(x[start:start + n]), got):
            assert torch.equal(y, whole[start:start + n]), f'{n} images from {start} differ from them among five'
    bad, k = x.clone(), source.pick(range(5))
    bad[k] = source.pick([float('nan'), float('inf'), -float('inf')])
    for part in (slice(0, 5), slice(max(k - 1, 0), k + 2)):
        for y, whole in zip(engine(bad[part]), got):
            keep = torch.arange(5)[part] != k
            assert torch.equal(y[keep], whole[part][keep]), f'image {k}, which is no number, comes through'
    for y, whole in zip(engine(x[k:k + 1]), got):
        assert torch.equal(y, whole[k:k + 1]), 'what was no number stays'


def some_halves(plan: Plan, source: Source) -> List[int]:
    """Values that stay in bfloat16 among bytes; the reference rounds them too, which only makes its bounds wider."""
    often = source.pick([[False], [False, True], [False] * 4 + [True]])
    return [v for v in range(1, len(plan.operations) + 1) if source.pick(often)]


def small_caches(source: Source) -> Tuning:
    """What large maps do, small ones do too: bands, buffers that roll, weights that stream, layers that are shared."""
    return Tuning(
        block=source.pick([256 << 10, 1000, 4000]), large_weights=source.pick([1 << 20, 4000]),
        large_block=source.pick([700 << 10, 3000]), streamed_weights=source.pick([1200 << 10, 2000]),
        steps_at_once=source.pick([16, 1, 2]), segment_weights=source.pick([600 << 10, 20000]),
        together_weights=source.pick([1500 << 10, 10000]), band=source.pick([800 << 10, 800, 3000, 10000]),
        longest_run=source.pick([256, 16]), chunk=source.pick([4, 1, 2]))


def one(source: Source, kind: str) -> Optional[str]:
    """Draw one plan or network and check it; what it was refused with, if it was."""
    with level(source.pick(list(LEVELS))):
        precision, threads = source.pick(['bfloat16', 'int8']), source.pick([1, 2])
        if kind == 'plan':
            plan = random_plan(source)
            x = source.numbers(5, *plan.input_shape)
        else:
            network = RandomNetwork(source)
            x = source.numbers(5, *network.shape)
            try:
                plan = lower(network, x[:2])
            except UnsupportedNetwork as error:
                return str(error)
            with torch.no_grad():
                expected = network(x)
            for (v, _), y in zip(plan.outputs, expected):
                a = reference.run(plan, x.double().numpy())[v]
                bound = 0.03 * float(y.abs().max()) + 1e-5
                assert a.reshape(y.shape).shape == tuple(y.shape)
                assert np.abs(a.reshape(y.shape) - y.double().numpy()).max() <= bound, 'lowered to something else'
        if precision == 'int8':
            plan.halves = some_halves(plan, source)
            plan = calibrate(plan, [x])
            plan = correct(plan, [x[:3], x[3:]]) if source.pick([True, False]) else plan
        try:
            check_plan(plan, x, source, precision, threads, small_caches(source))
        except UnsupportedNetwork as error:
            return str(error)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--plans', type=int, default=200)
    parser.add_argument('--networks', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--failures', type=int, default=20, help='after how many to stop')
    arguments = parser.parse_args()
    refused: Dict[str, collections.Counter] = {}
    failed: List[Tuple[str, int]] = []
    for kind, count in (('plan', arguments.plans), ('network', arguments.networks)):
        refused[kind] = collections.Counter()
        start = time.time()
        for seed in range(arguments.seed, arguments.seed + count):
            try:
                why = one(Source(seed), kind)
            except Exception:
                failed.append((kind, seed))
                print(f'{kind} {seed}:', '; '.join(traceback.format_exc().strip().splitlines()[-3:]), flush=True)
                if len(failed) >= arguments.failures:
                    raise SystemExit(f'{len(failed)} failures, {seed - arguments.seed + 1} {kind}s') from None
                continue
            if why:
                refused[kind][why.split(' in steps')[0][:90]] += 1
        print(f'{count} {kind}s in {time.time() - start:.0f} s, {sum(refused[kind].values())} refused:', flush=True)
        for why, number in refused[kind].most_common():
            print(f'  {number} {why}')
    if failed:
        raise SystemExit(f'{len(failed)} failures')


if __name__ == '__main__':
    main()
