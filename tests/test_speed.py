"""benchmarks/speed.py: what it writes, and that it writes nothing when the machine is busy."""
import functools
import importlib
import json
import sys
from pathlib import Path

import pytest

from cspnet_timm.deployment import search
from cspnet_timm.deployment.backends import BACKENDS

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'

pytestmark = pytest.mark.slow


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module('speed')
    monkeypatch.setitem(module.PAIRS, 'nano', ('cspnet_nano', 'cspnet_nano'))
    yield module
    for name in ('speed', 'paper'):
        sys.modules.pop(name, None)


def arguments(out, *more):
    return ['--pairs', 'nano', '--own', 'cspnet_nano', '--batches', '2', '--sizes', '64', '--resolutions', '64',
            '--seconds', '0.01', '--rounds', '3', '--compile', '--out', str(out), *more]


def test_report(speed, tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    monkeypatch.setattr(speed, 'busy_fraction', lambda: 0.5)
    monkeypatch.setattr(speed, 'native_precisions', lambda device: ('float32',))
    # What takes its time: the forms and the exporter to ONNX are tested elsewhere; and both networks are one here.
    monkeypatch.setattr(search, 'FORMS', {})
    monkeypatch.setattr(BACKENDS['onnxruntime'], 'unavailable', classmethod(lambda cls, device: 'not here'))
    monkeypatch.setattr(speed, 'peak_memory', functools.cache(speed.peak_memory))
    speed.main(arguments(tmp_path, '--allow-busy', '--sections', 'routes', 'resolution', 'throughput', 'training'))
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        'speed.json', 'speed.md', 'speed_latency.png', 'speed_roofline.png', 'speed_throughput.png']
    report = json.loads((tmp_path / 'speed.json').read_text())
    assert report['busy'] and 'mean nothing' in (tmp_path / 'speed.md').read_text()
    assert report['rates']['bytes_per_second'] > 1e8 and report['rates']['operations_per_second']['float32'] > 1e8
    cases = report['cases']
    assert {c['section'] for c in cases} == {'routes', 'resolution', 'throughput', 'training'}
    assert {c['task'] for c in cases} == {'forward', 'features', 'training'}
    assert all(ms > 0 for c in cases for ms in c['milliseconds'].values())
    assert all(mib > 1 for c in cases for mib in c.get('mib', {}).values())
    for case in cases:
        if case['section'] == 'routes':
            assert 'ours deploy' in case['milliseconds']
            assert case['precision'] == 'int8' or {'timm eager', 'ours eager'} < set(case['milliseconds'])
            assert case['chosen']['difference'] < (0.5 if case['precision'] == 'int8' else 0.1)
            assert case['flops'] == pytest.approx(2 * 2 * 0.16e9 * 64 ** 2 / 256 ** 2, rel=0.1)
    table = (tmp_path / 'speed.md').read_text()
    assert table.startswith('# Speed on ') and report['date'] in table and ' rows; the ratio is ' in table
    assert '`cspnet_nano`' in table and report['machine']['device'] in table
    assert 'Wrote' in capsys.readouterr().out


def test_what_was_measured_before_is_kept(speed, tmp_path):
    def report(machine, *cases):
        cases = [dict(section=section, task='forward', name=name, size=64, batch=1, precision='float32',
                      milliseconds={'csp': ms}) for section, name, ms in cases]
        return dict(machine=machine, busy=False, cases=cases, rounds=1)

    path = tmp_path / 'speed.json'
    new = report('this', ('promise', 'a', 3), ('routes', 'c', 4))
    assert speed.joined(new, path) == new
    path.write_text(json.dumps(report('this', ('routes', 'a', 1), ('promise', 'a', 2), ('promise', 'b', 2))))
    both = [(c['section'], c['name'], c['milliseconds']['csp']) for c in speed.joined(new, path)['cases']]
    assert both == [('routes', 'a', 1), ('routes', 'c', 4), ('promise', 'a', 3), ('promise', 'b', 2)]
    with pytest.raises(SystemExit, match='another machine'):
        speed.joined(report('that'), path)
    path.write_text(json.dumps(dict(report('that'))))
    with pytest.raises(SystemExit, match='another machine'):  # before anything is measured
        speed.main(arguments(tmp_path, '--keep'))


def test_the_pairs_are_the_same_networks(speed):
    for own, other in speed.PAIRS.values():
        counts = [speed.count(name, 64) for name in (own, other)]
        assert counts[0]['weights'] == pytest.approx(counts[1]['weights'], rel=0.02), own
        assert counts[0]['flops'] == pytest.approx(counts[1]['flops'], rel=0.02), own


def test_a_busy_machine(speed, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, 'busy_fraction', lambda: 0.5)
    with pytest.raises(SystemExit, match='busy: 50%'):
        speed.main(arguments(tmp_path / 'none'))
    assert not (tmp_path / 'none').exists()


def test_busy_fraction(speed):
    busy = speed.busy_fraction(0.2)
    assert busy is None or 0 <= busy <= 1


@pytest.mark.parametrize('more, message', [
    (['--rounds', '0'], 'rounds'), (['--batches', '0'], 'batches'), (['--sections', 'colour'], 'colour'),
    (['--pairs', 'vgg'], 'vgg'),
])
def test_arguments(speed, tmp_path, more, message, capsys):
    with pytest.raises(SystemExit):
        speed.main(arguments(tmp_path, *more))
    assert message in capsys.readouterr().err
