"""benchmarks/gpu_check.py whole, in its small form: every step runs, and what dies costs one step."""
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.preloaded import python

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'

pytestmark = pytest.mark.slow


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module('gpu_check')
    for name in ('gpu_check', 'speed', 'paper'):
        sys.modules.pop(name, None)


def test_the_small_form(tmp_path):
    subprocess.run([python(), str(BENCHMARKS / 'gpu_check.py'), '--small', '--minutes', '30', '--out',
                    str(tmp_path)], check=True, timeout=1800)
    report = json.loads((tmp_path / 'gpu_check.json').read_text())
    assert report['faults'] == [] and report['small']
    results = report['results']
    assert all(r['value'] > 0 for r in results)
    roads = {(r['batch'], r['road']) for r in results if r['step'] == 'forward'}
    assert roads == {(2, road) for road in (
        'timm eager', 'timm compile', 'ours eager', 'ours compile', 'deployed as_is',
        'deployed space_to_depth+join_partitions', 'deploy()')}
    assert all(r['difference'] < 0.1 for r in results if 'difference' in r)
    assert {r['road'] for r in results if r['step'] == 'training'} == {
        'timm eager', 'timm compile', 'ours eager', 'ours compile'}
    assert [r['step'] for r in results if r['step'] in ('promise', 'tests')] == ['promise', 'tests']
    table = (tmp_path / 'gpu_check.md').read_text()
    assert '| `cspnet_nano` | 2 |' in table and 'product, TFLOP/s' in table and 'no more' in table


def test_what_dies_costs_one_step(gpu_check, tmp_path):
    run = gpu_check.Run(gpu_check.Settings(small=True), tmp_path, minutes=5)
    assert run.process('dies', [sys.executable, '-c', 'import os; os.kill(os.getpid(), 11)'], 60).startswith('SIGSEGV')
    assert run.process('fails', [sys.executable, '-c', 'raise SystemExit("why")'], 60) == 'exit code 1: why'
    assert run.process('hangs', [sys.executable, '-c', 'import time; time.sleep(60)'], 5.5).startswith('ended after')
    run.step('promise', 60, csp='no_such_network', plain='cspnet_nano')
    report = json.loads((tmp_path / 'gpu_check.json').read_text())
    assert 'no_such_network' in report['faults'][0]['fault'] and '**promise_' in (tmp_path / 'gpu_check.md').read_text()
    run.end = 0
    run.step('ceilings', 60)
    assert run.faults[-1]['fault'] == 'not started: no time is left'
