"""What the native engine reads and writes, checked before it runs and watched while it does; and its layering."""
import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cspnet_timm.deployment.native import NativeEngine, Plan, build, calibrate, memory, records, unavailable
from cspnet_timm.deployment.native import engine as module
from cspnet_timm.deployment.native.checking import check
from cspnet_timm.deployment.native.tuning import Tuning

from .native_fuzz import LEVELS
from .native_graphs import Source, random_plan
from .preloaded import python

WHY_NOT = unavailable()
runs_here = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
ROOT = Path(__file__).resolve().parent.parent


def test_it_could_be_a_package_of_its_own():
    """Of this package it imports ``machine`` alone, and nothing of timm."""
    folder = Path(build.__file__).parent
    for path in folder.glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or '']
            elif isinstance(node, ast.ImportFrom) and node.level > 1:
                assert (node.level, node.module) == (2, 'machine'), f'{path.name} imports {node.module}'
                continue
            else:
                continue
            for name in names:
                root = name.split('.')[0]
                assert root == 'torch' or root in sys.stdlib_module_names, f'{path.name} imports {name}'
    for path in [*folder.glob('*.py'), *(folder / 'cpp').iterdir()]:
        text = path.read_text().lower().replace('cspnet_timm', '')
        assert 'timm' not in text and 'cross stage' not in text and 'cross_stage' not in text, path.name


@runs_here
def test_both_halves_call_things_the_same():
    description = build.library().csp_description().decode()
    records.compare(description)
    names = {line.split()[0] for line in description.splitlines()}
    assert names == {'Kind', 'Act', 'Mode', 'Flow', 'Pool', 'Binary', 'Place', 'Layer', 'Block', 'Step', 'Run', 'Job',
                     'EpilogueTiles', 'Epilogue'}
    text = ''.join(path.read_text() for path in (Path(build.__file__).parent / 'cpp').iterdir())
    known = [line.split()[1] for line in text.splitlines() if line.startswith('enum ')]
    assert {name.replace('Flavour', '') for name in known} <= names
    for a, b, message in (
            ('in_w in_c', 'in_c in_w', 'member 5 of Layer is in_w in Python and in_c in C'),
            ('float16:mul', 'float32:mul', 'member 1 of EpilogueTiles is float16:mul in Python'),
            (' SIGMOID', '', 'member 6 of Act is SIGMOID in Python and MISH in C'),
            ('\nRun ', '\nRan ', 'Run is known to one of them alone'),
            ('barrier', 'barrier more', 'member 9 of Step is nothing in Python and more in C')):
        assert a in description
        with pytest.raises(RuntimeError, match=message):
            records.compare(description.replace(a, b))


@runs_here
@pytest.mark.parametrize('precision', ['bfloat16', 'int8'])
def test_programs_that_leave_their_memory_are_refused(precision):
    """Every place of every record, moved before its memory and behind it."""
    tried = 0
    for seed in range(4):
        plan = random_plan(Source(seed))
        x = torch.rand(2, *plan.input_shape)
        plan = calibrate(plan, [x]) if precision == 'int8' else plan
        engine = NativeEngine(plan, 2, precision)
        size, = engine._sizes.values()
        for apart in (True, False):
            program = size.program(apart)
            for record in program.records:
                holders = [(record.fields, 'out_off')] if not record.blocks and record.fields['out_c'] else []
                holders += [(block, 'out_off') for block in record.blocks]
                if record.fields['in_c']:
                    holders.append((record.fields, 'in_off'))
                for holder, name in holders:
                    kept = holder[name]
                    for value in (-1, kept + program.arena.total, 1 << 62):
                        holder[name] = value
                        with pytest.raises(ValueError, match=r'The program.s layer \d+ \('):
                            check(program.records, program.steps, program.memories)
                        tried += 1
                    holder[name] = kept
            check(program.records, program.steps, program.memories)
            if not apart:
                for steps in program.steps:
                    steps[-1] = steps[-1]._replace(y1=steps[-1].y1 + 1)
                with pytest.raises(ValueError, match='a step of images'):
                    check(program.records, program.steps, program.memories)
    assert tried > 100


@runs_here
def test_more_memory_than_there_is_is_refused(monkeypatch):
    operations = [dict(op='zeros', x=0, channels=1 << 12), dict(op='act', x=1, kind='relu', slope=0.)]
    plan = Plan((3, 64, 64), operations, [(2, False)], {})
    x, tuning = torch.zeros(2, 3, 64, 64), Tuning(band=1 << 40)  # images are taken together
    engine = NativeEngine(plan, 1, tuning=tuning)
    monkeypatch.setattr(module, 'available_bytes', lambda: 200 << 20)
    assert engine(x)[0].shape == (2, 1 << 12, 64, 64)
    assert [p.images for p in next(iter(engine._sizes.values())).programs.values()] == [2]  # not four at a time
    monkeypatch.setattr(module, 'available_bytes', lambda: 10 << 20)
    with pytest.raises(MemoryError, match=r"takes \d+ MiB for this network at this size .*there are 10 MiB"):
        NativeEngine(plan, 1, tuning=tuning)(x)


@runs_here
def test_plans_of_endless_work_are_refused():
    op = dict(op='pool', x=0, kind='max', kernel=[63, 63], stride=1, pad=[31, 31], ceil=False)
    with pytest.raises(ValueError, match='multiplications'):
        Plan((64, 1 << 11, 1 << 11), [{**op, 'x': i} for i in range(100)], [(100, False)], {})
    with pytest.raises(ValueError, match='outputs'):
        Plan((1, 4, 4), [], [(0, False)] * 10000, {})
    with pytest.raises(ValueError, match='joins more than'):
        Plan((1, 4, 4), [dict(op='cat', xs=[0] * 5000)], [(1, False)], {})


@runs_here
def test_threads_that_the_system_does_not_give(monkeypatch):
    engine = NativeEngine(random_plan(Source(1)), 1)

    class Library:
        def csp_team(self, count):
            return None

        def __getattr__(self, name):
            return getattr(build.library(), name)

    engine._lib = Library()
    with pytest.raises(RuntimeError, match='wants 1 threads'):
        engine(torch.zeros(1, *engine.plan.input_shape))


def test_equal_tensors_lie_once():
    if WHY_NOT is None:
        pool = memory.Pool()
        a, b = pool.keep(torch.arange(9)), pool.keep(torch.arange(9))
        assert a == b != pool.keep(torch.arange(8)) and pool.sizes[a] == 72


def sanitized(tmp_path, flags, level, *numbers, preload=''):
    """Run native_sanitized in a process of its own, with an engine of its own, compiled in half the time."""
    compiler = tmp_path / 'compiler'
    compiler.write_text(f'#!/bin/sh\nexec g++ "$@" {flags}\n')  # the last level counts
    compiler.chmod(0o755)
    environment = {**os.environ, 'CXX': str(compiler), 'CSPNET_TIMM_CACHE': str(tmp_path), 'LD_PRELOAD': preload,
                   'ASAN_OPTIONS': 'detect_leaks=0', 'OMP_NUM_THREADS': '1'}
    return subprocess.run([python(), '-W', 'ignore', '-m', 'tests.native_sanitized', level, *map(str, numbers)],
                          cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)


@runs_here
@pytest.mark.slow
@pytest.mark.parametrize('level', LEVELS)
def test_guarded_memory(tmp_path, level):
    """Pages that nobody may touch around all memory, and nothing that is a number in it: the same results."""
    done = sanitized(tmp_path, '-O0 -DCSP_GUARD', level, 0, 20)
    assert done.returncode == 0 and done.stdout.startswith('ran'), done.stdout[-500:] + done.stderr[-3000:]
    assert sanitized(tmp_path, '-O0 -DCSP_GUARD', level, 0, 0).returncode < 0  # what was not checked is noticed


@runs_here
@pytest.mark.slow
@pytest.mark.parametrize('level', [*LEVELS][-1:])  # a minute and more each: of all after a change of the engine
def test_sanitizers(tmp_path, level):
    """AddressSanitizer and UndefinedBehaviorSanitizer have nothing to say."""
    if shutil.which('g++') is None:
        pytest.skip('needs g++')
    libraries = [subprocess.run(['g++', f'-print-file-name={name}'], capture_output=True, text=True).stdout.strip()
                 for name in ('libasan.so', 'libstdc++.so.6')]
    flags = '-O0 -fsanitize=address,undefined -fno-sanitize-recover=all'
    done = sanitized(tmp_path, flags, level, 1000, 6, preload=' '.join(libraries))
    assert done.returncode == 0 and 'ran' in done.stdout, done.stdout[-500:] + done.stderr[-3000:]
    assert sanitized(tmp_path, flags, level, 0, 0, preload=' '.join(libraries)).returncode != 0
