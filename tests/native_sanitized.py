"""Random programs through an engine that was compiled to notice what it must not do, in a process of its own.

    CXX='g++ -DCSP_GUARD' python -m tests.native_sanitized LEVEL SEED COUNT
"""
import json
import random
import sys
from typing import Any, List, Optional

import torch

from cspnet_timm.deployment.native import NativeEngine, Plan, calibrate, memory
from cspnet_timm.deployment.native.checking import check
from cspnet_timm.deployment.native.records import BLOCK, LAYER

from . import native_fuzz
from .native_graphs import Source, random_plan


def mutated(source: random.Random, plan: Plan) -> Plan:
    """The plan as a file that somebody has changed; raises a ValueError if it is not believed."""
    text, tensors = plan.to_bytes()
    data = json.loads(text)
    for _ in range(source.choice([1, 1, 2, 3])):
        holders: List[Any] = [data['input'], *data['outputs'], *data['operations'], *(data['ranges'] or [])]
        holders += [v for op in data['operations'] for v in op.values() if isinstance(v, list)]
        holder = source.choice(holders)
        key = source.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        value = holder[key]
        if isinstance(value, bool):
            holder[key] = not value
        elif isinstance(value, (int, float)):
            holder[key] = source.choice([0, 1, 2, 3, value - 1, value + 1, 2 * value, 7, 16, 33, 64])
        elif isinstance(value, str):
            holder[key] = source.choice(['conv', 'act', 'pool', 'mean', 'relu', 'silu', 'max', 'mean_padded'])
    if tensors and source.random() < 0.2:
        name = source.choice(sorted(tensors))
        tensors[name] = tensors[name] * float('nan') if source.random() < 0.5 else tensors[name][:-1]
    return Plan.from_bytes(json.dumps(data), tensors)


def run_changed(source: random.Random, engine: NativeEngine, x: torch.Tensor) -> bool:
    """Change a number of a record, and run it if it is believed."""
    size, = engine._sizes.values()
    program = size.program(len(x) >= engine.threads)
    record = source.choice(program.records)
    holder, names = record.fields, list(LAYER)
    if record.blocks and source.random() < 0.3:
        holder, names = source.choice(record.blocks), list(BLOCK)
    name = source.choice([n for n in names if n not in ('koff', 'blocks')])
    value = holder[name]
    holder[name] = source.choice([
        0, 1, 2, value + 1, value - 1, value * 2, value + 64, value - 64, value // 2, -1, 1 << 20])
    try:
        check(program.records, program.steps, program.memories)
    except ValueError:
        return False
    engine(x)
    return True


def leave_memory(level: str) -> None:
    """A program that nobody checked, and that writes where it must not: this process should not outlive it."""
    with native_fuzz.level(level):
        plan = random_plan(Source(3))
        engine = NativeEngine(plan, 1)
        size, = engine._sizes.values()
        program = size.program(True)
        program.records[0].fields['out_off'] += program.arena.total
        engine(torch.zeros(1, *plan.input_shape))


def main(level: str, seed: int, count: int) -> None:
    memory.CHUNK_BYTES = 0  # every tensor in an area of its own
    torch.set_num_threads(1)
    if not count:
        return leave_memory(level)
    ran = dict(plans=0, files=0, records=0)
    refused = dict(plans=0, files=0, records=0)
    with native_fuzz.level(level):
        for s in range(seed, seed + count):
            source = Source(s)
            plan = random_plan(source, 8)
            x = source.numbers(5, *plan.input_shape)
            precision, threads = source.pick(['bfloat16', 'int8']), source.pick([1, 2])
            plan = calibrate(plan, [x]) if precision == 'int8' else plan
            tuning = native_fuzz.small_caches(source)
            native_fuzz.check_plan(plan, x, source, precision, threads, tuning)
            ran['plans'] += 1
            for _ in range(3):
                other: Optional[Plan] = None
                try:
                    other = mutated(source.random, plan)
                    shapes = other.shapes(*other.input_shape[1:])
                    if max(other.input_shape) > 256 or max(c * h * w for c, h, w in shapes) > 1 << 22:
                        continue
                    for n in (1, 3):
                        NativeEngine(other, threads, precision if other.ranges else 'bfloat16', tuning)(
                            torch.randn(n, *other.input_shape))
                    ran['files'] += 1
                except (ValueError, MemoryError):
                    refused['files'] += 1
            for _ in range(6):
                engine = NativeEngine(plan, threads, precision, tuning)
                done = run_changed(source.random, engine, x[:source.pick([1, 3])])
                ran['records'] += done
                refused['records'] += not done
    print('ran', ran, 'refused', refused)
    return None


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
