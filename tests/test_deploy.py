"""The fastest callable of a model: equal to it, in every form, of every backend, from a file and in a new process."""
import copy
import json
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from timm.models import reparameterize_model

from cspnet_timm import deploy
from cspnet_timm.deployment import Deployed, DeployError, search
from cspnet_timm.deployment.backends import BACKENDS, Arrangement
from cspnet_timm.deployment.forms import (
    FORMS,
    JointPartition,
    SumMerge,
    join_partitions,
    regroup,
    space_to_depth,
    split_merges,
)
from cspnet_timm.deployment.machine import native_precisions
from cspnet_timm.deployment.quantize import quantize
from tests.preloaded import python
from tests.samples import FAMILIES
from tests.test_contract import check_outputs
from tests.zoo import create, create_for, create_short, distance

CPU = torch.device('cpu')
DATA = [name for name, backend in BACKENDS.items() if not backend.runs_code]
GPU = torch.device('cuda')
# What rounding may make of a network with random statistics.
BOUNDS = {'float32': 1e-4, 'bfloat16': 0.05, 'int8': 0.2}
SLOW_BACKENDS = {'inductor', 'inductor_tuned', 'onnxruntime', 'openvino'}
CASES = [  # one precision of each backend is fast, but for the compiler, of which every case takes half a minute
    pytest.param(name, precision, marks=pytest.mark.slow if name in SLOW_BACKENDS or i else ())
    for name, backend in BACKENDS.items() for i, precision in enumerate(backend.precisions(CPU))
    if precision in BOUNDS and (name, precision) not in (('inductor', 'float32'), ('inductor_tuned', 'bfloat16'))
]


def image(batch=2, size=(64, 64)):
    return torch.randn(batch, 3, *size)


def needs(backend):
    reason = BACKENDS[backend].unavailable(CPU)
    if reason is not None:
        pytest.skip(f'{backend}: {reason}')


def quick(model, example, **kwargs):
    """Deploy with the shortest measurement."""
    if kwargs.get('precision') == 'int8':
        kwargs.setdefault('calibration', [example])
    kwargs.setdefault('isolate', False)  # test_isolation.py has what is done in another process
    return deploy(model, example, seconds=0.01, progress=False, **kwargs)


def differences(a, b):
    return [distance(p, q) for p, q in zip(a, b)] if isinstance(b, (list, tuple)) else [distance(a, b)]


# Folding


def test_what_is_folded_is_trainable_where_its_parts_are():
    for name in ('cspnet_nano', 'cspnet_ppyoloe_plus_t'):
        model = timm.create_model(name)
        assert all(p.requires_grad for p in reparameterize_model(model).parameters())
        assert not any(p.requires_grad for p in reparameterize_model(model.requires_grad_(False)).parameters())
    model = timm.create_model('cspnet_nano', norm_layer='frozenbatchnorm2d')  # its offsets are no parameters
    trainable = {name for name, p in reparameterize_model(model).named_parameters() if p.requires_grad}
    assert {'stem.conv1.conv.weight', 'head.fc.bias'} <= trainable and 'stem.conv1.conv.bias' not in trainable
    model = timm.create_model('cspnet_nano')
    model.stem.requires_grad_(False)
    folded = reparameterize_model(model)
    assert {name.split('.')[0] for name, p in folded.named_parameters() if not p.requires_grad} == {'stem'}
    assert all(p.requires_grad for p in folded.layer1.parameters())


# Forms


def test_forms(build):
    model = reparameterize_model(build())
    keys = list(model.state_dict())
    x = image()
    with torch.no_grad():
        expected = model(x)
        for form in FORMS.values():
            changed = form(model)
            if changed is not None:
                assert distance(changed(x), expected) < 1e-5
                assert list(changed.state_dict()) != keys or form is regroup
        for forms in (FORMS.values(), reversed(FORMS.values())):  # one upon the other
            changed = model
            for form in forms:
                changed = form(changed) or changed
            assert distance(changed(x), expected) < 1e-5
    assert list(model.state_dict()) == keys


def _of_kind(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


@pytest.mark.parametrize('name, form, count', [
    ('cspnet_nano', join_partitions, 4), ('cspnet_nano', split_merges, 4),
    ('cspnet_yolo11n', join_partitions, None), ('cspnet_plain_resnext50', regroup, 10),
])
def test_what_a_form_changes(name, form, count):
    model = reparameterize_model(timm.create_model(name).eval())
    changed = form(model)
    kinds = {join_partitions: JointPartition, split_merges: SumMerge}
    if form is regroup:
        narrow = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        wide = [m for m in changed.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        assert min(m.in_channels // m.groups for m in narrow) == 4
        assert {m.in_channels // m.groups for m in wide} == {32}
        assert sum(m.groups != n.groups for m, n in zip(narrow, wide)) == 13  # all but those of the last level
    else:
        other = split_merges if form is join_partitions else join_partitions
        found = _of_kind(changed, kinds[form])
        assert found and count in (None, len(found))
        assert form(changed) is None  # nothing is left to change
        both = other(changed)
        assert both is None or all(_of_kind(both, kind) for kind in kinds.values())
        assert both is not None or name != 'cspnet_nano'
    x = image()
    with torch.no_grad():
        assert distance(changed(x), model(x)) < 1e-5


@pytest.mark.parametrize('in_chs', [1, 3, 4])
@pytest.mark.parametrize(
    'kernel, pad', [(2, 0), (3, 1), (3, 0), (4, 1), (4, 2), (5, 2), (6, 2), (7, 3), (7, 2), (8, 3)])
def test_a_stem_reads_patches(in_chs, kernel, pad):
    """Exact to rounding for every kernel and odd sizes; a multiple of eight channels, and three taps or more."""
    conv = nn.Conv2d(in_chs, 8, kernel, stride=2, padding=pad).double()
    patches = space_to_depth(nn.Sequential(conv))[0]
    assert patches.conv.in_channels == {1: 8, 3: 16, 4: 16}[in_chs] and patches.conv.stride == (1, 1)
    assert patches.conv.kernel_size[0] == max(3, (kernel + 2) // 2 if pad % 2 else (kernel + 1) // 2)
    with torch.no_grad():
        for size in ((16, 16), (15, 16), (16, 17), (9, 11)):
            x = torch.randn(2, in_chs, *size).double()
            assert torch.allclose(patches(x), conv(x), rtol=0, atol=1e-12)


def test_stems_of_the_families():
    kernels = {}
    for name in (*FAMILIES, 'cspnet_yolov5n', 'cspnet_resnet50'):
        model = reparameterize_model(create(name))
        changed = space_to_depth(model)
        if changed is not None:
            conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
            kernels.setdefault(conv.kernel_size[0], []).append(name)
            x = image(size=(64, 96))
            with torch.no_grad():
                assert distance(changed.stem(x), model.stem(x)) < 1e-6
    assert {3, 6, 7} <= set(kernels)


def test_convolutions_that_read_no_patches():
    for kwargs in (dict(stride=1), dict(stride=2, dilation=2), dict(stride=2, padding=(1, 0)), dict(stride=(2, 1)),
                   dict(stride=2, padding=1, padding_mode='reflect'), dict(stride=2, groups=3)):
        assert space_to_depth(nn.Sequential(nn.Conv2d(3, 6, 3, **kwargs))) is None
    assert space_to_depth(nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1))) is None


def test_regroup_keeps_what_it_cannot_widen():
    for conv in (nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 64, 3), nn.Conv2d(96, 96, 3, groups=3)):
        assert regroup(nn.Sequential(conv)) is None
    conv = nn.Sequential(nn.Conv2d(36, 72, 3, groups=6, stride=2, bias=False))  # 6 in, 12 out: two fit into 32
    x = torch.randn(1, 36, 9, 9)
    wide = regroup(conv)
    assert wide[0].groups == 3 and wide[0].bias is None
    assert torch.allclose(wide(x), conv(x), atol=1e-5)


# Backends


@pytest.mark.parametrize('backend, precision', CASES)
def test_backend(backend, precision, tmp_path):
    needs(backend)
    model = create_for(backend, 7)  # the compiler takes a network in test_the_compiler_takes_the_forms
    example = image(5)
    # The others get to another process and back in test_isolation.py.
    deployed = quick(model, example, backend=backend, precision=precision, isolate=backend == 'inductor')
    report = deployed.report
    assert (report.backend, report.precision, report.shape) == (backend, precision, [5, 3, 64, 64])
    assert report.milliseconds > 0 and report.original_milliseconds > 0 and report.speedup > 0
    with torch.no_grad():
        assert report.differences == pytest.approx([distance(deployed(example), model(example))], rel=0.3)
        for batch in (1, 2, 5, 11):
            x = image(batch)
            y = deployed(x)
            assert y.shape == (batch, 7) and y.dtype == torch.float32
            assert distance(y, model(x)) < BOUNDS[precision], batch
            last = deployed(x.contiguous(memory_format=torch.channels_last))
            assert distance(last, y) < 1e-6
            assert distance(deployed(torch.flip(x, [0])), torch.flip(y, [0])) < 1e-2  # every row has its image
    check_outputs(deployed)

    path = tmp_path / 'network.bin'
    deployed.save(path)
    assert [f.name for f in tmp_path.iterdir()] == ['network.bin']
    if backend not in DATA:
        with pytest.raises(DeployError, match='allow_code=True'):
            deploy.load(path)
    x = image(3)
    torch.save(x, tmp_path / 'x.pt')
    (tmp_path / 'load.py').write_text(
        'import torch\n'
        'from cspnet_timm import deploy\n'
        f'network = deploy.load({str(path)!r}, allow_code=True)\n'
        'x = torch.load("x.pt")\n'
        'torch.save([network(x), network(x[:1])], "y.pt")\n'
        f'assert network.report.backend == {backend!r}\n'
    )
    done = subprocess.run([python(), 'load.py'], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    whole, first = torch.load(tmp_path / 'y.pt')
    assert distance(whole, deployed(x)) < 1e-6 and distance(first, deployed(x[:1])) < 1e-6


@pytest.mark.parametrize('backend', [
    pytest.param(name, marks=pytest.mark.slow if name.startswith('o') else ()) for name in DATA])
def test_features(backend):
    needs(backend)
    model = create('cspnet_yolov8n', features_only=True, out_indices=(1, 2, 4))
    precision = BACKENDS[backend].precisions(CPU)[0]
    deployed = quick(model, image(), backend=backend, precision=precision)
    x = image(3)
    with torch.no_grad():
        expected = model(x)
    outputs = deployed(x)
    assert isinstance(outputs, list) and len(outputs) == len(deployed.report.differences) == 3
    assert max(differences(outputs, expected)) < BOUNDS[precision]


@pytest.mark.networks('stages_detectors')
def test_every_stage(build, monkeypatch):
    """Every block and stage, in the precision that is chosen by default."""
    needs('openvino')
    monkeypatch.setattr(search, 'FORMS', {})  # test_forms has them
    model = build()
    deployed = quick(model, image(1), backend='openvino')  # of one image there is one arrangement
    x = image()
    with torch.no_grad():
        assert distance(deployed(x), model(x)) < BOUNDS[deployed.report.precision]


@pytest.mark.parametrize('name', ['resnet18', pytest.param('cs3darknet_focus_s', marks=pytest.mark.slow)])
def test_any_model_of_timm(name):
    needs('openvino')
    model = create(name, num_classes=5)
    deployed = quick(model, image(), backend='openvino', precision='float32')
    x = image(3)
    with torch.no_grad():
        assert distance(deployed(x), model(x)) < 1e-4


def test_a_model_is_left_as_it_was():
    model = timm.create_model('cspnet_nano', num_classes=3)
    before = copy.deepcopy(model.state_dict())
    quick(model, image(), backend='eager')
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.slow
def test_the_fastest_is_chosen(capsys):
    names = [name for name in ('openvino', 'onnxruntime', 'eager') if BACKENDS[name].unavailable(CPU) is None]
    model = create('cspnet_nano')
    deployed = deploy(model, image(4), backend=names, seconds=0.05, isolate=False)
    report = deployed.report
    measured = [c for c in report.candidates if 'milliseconds' in c]
    assert {c['backend'] for c in measured} == set(names)
    with_forms = {c['backend'] for c in measured if c['forms']}  # of what was ahead then; in the end another may be
    assert len(with_forms) <= 1 and all(BACKENDS[name].forms(CPU) for name in with_forms)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(report.candidates) + 2 and all(line.startswith('deploy: ') for line in printed)
    assert re.search(r'openvino \w+, onnxruntime float32, eager \w+ to try, about \d+ (s|min) in all', printed[0])
    assert report.backend in str(report) and f'{report.milliseconds:.2f} ms' in str(report)
    assert 'float32' in report.machine['precisions']
    quick(model, image(), backend='eager')
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_forms_that_are_faster_are_put_upon_one_another(monkeypatch):
    needs('openvino')
    monkeypatch.setattr(search, 'GAIN', 1e6)  # each is taken
    monkeypatch.setattr(search, 'CLOSE', 0)  # for good
    report = quick(create('cspnet_nano'), image(), backend='openvino', precision='float32').report
    assert report.forms == ['join_partitions', 'split_merges']


def test_arrangements():
    converted = object.__new__(BACKENDS['openvino'])
    assert converted.arrangements(8, 2) == [Arrangement(2, 4), Arrangement(2, 2), Arrangement(1, 8)]
    assert converted.arrangements(1, 2) == [Arrangement(1, 1)]
    assert converted.arrangements(7, 1) == [Arrangement(1, 7)]
    assert converted.arrangements(32, 16)[0] == Arrangement(16, 2)


def test_int8_is_calibrated():
    model = reparameterize_model(create('cspnet_nano'))
    x = image(8)
    with torch.no_grad():
        expected = model(x)
        same, wider = quantize(model, [x]), quantize(model, [x * 40])
        assert distance(same(x), expected) < 0.15
        assert distance(same(x), expected) < distance(wider(x), expected)
        rectified = quantize(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 1)), [x])
        assert rectified[1].range == (0, 255) and same.stem.conv1.conv.range == (-128, 127)
    assert not any('scale' in key for key in model.state_dict())


@torch.no_grad()
def test_int8_has_a_budget(tmp_path):
    """Judged on images that nothing was fitted to; layers are taken back until the bound holds, and are named."""
    needs('native')
    model = nn.Sequential(OrderedDict(
        stem=nn.Conv2d(3, 32, 3, 2, 1), act=nn.SiLU(), conv=nn.Conv2d(32, 48, 3, padding=1), last=nn.ReLU())).eval()
    model.stem.weight[0] *= 40
    model.conv.weight[:, 0] /= 40
    x = torch.nn.functional.interpolate(image(16), scale_factor=0.25).repeat_interleave(4, 2).repeat_interleave(4, 3)
    batches = [x[:4], x[4:8], x[8:12], x[12:]]
    kwargs = dict(precision='int8', backend='native', calibration=iter(batches))
    plain = quick(model, x[:2], **kwargs)
    assert plain.report.held_back == 4 and not plain.report.higher
    assert 'on 4 images held back from calibration' in str(plain.report)
    error = distance(plain(batches[-1]), model(batches[-1]))
    assert plain.report.differences == [pytest.approx(error, rel=1e-3)]
    assert distance(plain(batches[-1]), plain(x[:4])) > 0.01  # or it would not matter which images they are
    fast = quick(model, x[:2], **dict(kwargs, calibration=batches, max_difference=error / 2))
    assert distance(fast(batches[-1]), model(batches[-1])) <= error / 2
    assert fast.report.higher == ['act'] and fast.report.candidates[0]['higher'] == ['act']
    assert 'in bfloat16 and not in int8: act' in str(fast.report)
    fast.save(tmp_path / 'fast')
    again = deploy.load(tmp_path / 'fast')
    assert torch.equal(again(x), fast(x)) and again.report.higher == ['act'] and again.report.held_back == 4
    with pytest.raises(DeployError, match=r'but for 2 in bfloat16: .*held back from calibration by .* 1e-06 allows'):
        quick(model, x[:2], **dict(kwargs, calibration=batches, max_difference=1e-6))
    one = quick(model, x[:2], **dict(kwargs, calibration=batches[:1]))
    assert not one.report.held_back and 'held back' not in str(one.report)
    assert one.report.differences == [pytest.approx(distance(one(x[:2]), model(x[:2])), rel=1e-3)]


DOCS = Path(__file__).parents[1] / 'docs' / 'deploy.md'
SNIPPETS = re.findall(r'^```python\n(.*?)^```', DOCS.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize('number', range(len(SNIPPETS)))
def test_the_page(number, tmp_path, monkeypatch):
    needs('openvino')
    if 'int8' in SNIPPETS[number] and 'int8' not in native_precisions(CPU):
        pytest.skip('this processor has no int8 arithmetic')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'executable', python())  # of the process in which candidates are tried
    # What is chosen does not matter here: little is measured, and no other forms nor the slowest backend are tried.
    monkeypatch.setattr(search, 'FORMS', {})
    monkeypatch.setattr(BACKENDS['inductor'], 'unavailable', classmethod(lambda cls, device: 'it has its own tests'))
    interleave = search.interleave
    monkeypatch.setattr(search, 'interleave', lambda calls, device, *args: interleave(calls, device, 0.01))
    exec(compile(SNIPPETS[number], str(DOCS), 'exec'), {})


# Errors, before any work


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(precision='float8'), ValueError, r"precision='float8' .*'int8'"),
    (dict(backend='tensorflow'), ValueError, r"backend='tensorflow' .*'openvino'"),
    (dict(backend=()), ValueError, 'names none'),
    (dict(precision='int8', calibration=None), ValueError, 'pass calibration'),
    (dict(precision='float32', calibration=[torch.zeros(1, 3, 64, 64)]), ValueError, 'calibration is for'),
    (dict(precision='float16'), DeployError, r"precision='float16' cannot be had: this machine"),
    (dict(backend='eager', precision='int8', calibration=[]), DeployError, 'int8'),
    (dict(threads=0), ValueError, 'threads=0'),
    (dict(backend='eager', precision='float32', max_difference=0.), DeployError, 'differs from the model'),
])
def test_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        quick(timm.create_model('cspnet_nano').bfloat16().float(), image(), **kwargs)


@pytest.mark.parametrize('example, message', [
    (torch.zeros(3, 64, 64), r'\(B, C, H, W\).*\(3, 64, 64\)'), (torch.zeros(1, 3, 64, 64).byte(), 'uint8'),
    (torch.zeros(0, 3, 64, 64), 'no image'), ([1], 'not list'),
    (torch.zeros(1, 3, 64, 64, device='meta'), 'is on meta'),
])
def test_examples(example, message):
    with pytest.raises(ValueError, match=message):
        quick(timm.create_model('cspnet_nano'), example)


def test_inputs():
    deployed = quick(create('cspnet_nano'), image(), backend='eager')
    for x, message in (
        (image(size=(64, 96)), r'\(2, 3, 64, 96\).*\(B, 3, 64, 64\)'), (image()[:0], 'at least 1'),
        (image()[0], r'\(B, C, H, W\)'), (image().to('meta'), 'is on meta'),
    ):
        with pytest.raises(ValueError, match=message):
            deployed(x)


def test_calibration_data():
    needs('openvino')
    if 'int8' not in native_precisions(CPU):
        pytest.skip('this processor has no int8 arithmetic')
    model = timm.create_model('cspnet_nano')
    for calibration, message in (([], 'calibration is empty'), ([torch.zeros(3)], r'not \(3,\)'), ([1], 'not int')):
        with pytest.raises(ValueError, match=message):
            quick(model, image(), precision='int8', calibration=calibration)


def test_models_that_cannot_be_deployed():
    class Dictionary(nn.Module):
        def forward(self, x):
            return {'y': x}

    with pytest.raises(ValueError, match='dict'):
        quick(Dictionary(), image())
    with pytest.raises(ValueError, match=r'nn\.Module'):
        quick(torch.relu, image())


def test_a_backend_that_is_not_installed(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'openvino' else find(name))
    with pytest.raises(DeployError, match='openvino is not installed: pip install openvino'):
        quick(timm.create_model('cspnet_nano'), image(), backend='openvino')
    _, left_out = search._pairs('auto', 'auto', False, CPU)  # which the report shows
    assert left_out['openvino'] == 'openvino is not installed: pip install openvino'
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CXX', raising=False)
    assert 'no C++ compiler' in search._pairs('auto', 'auto', False, CPU)[1]['inductor']
    with pytest.raises(DeployError, match='compiler'):
        quick(timm.create_model('cspnet_nano'), image(), backend='inductor')


def test_a_backend_that_does_not_take_the_model(monkeypatch):
    def convert(model, example, precision, calibration):
        raise NotImplementedError('aten::strange\nmore')

    monkeypatch.setattr(BACKENDS['openvino'], 'convert', staticmethod(convert))
    monkeypatch.setattr(BACKENDS['openvino'], 'unavailable', classmethod(lambda cls, device: None))
    model = timm.create_model('cspnet_nano')
    with pytest.raises(DeployError, match=r'openvino .*: NotImplementedError: aten::strange$'):
        quick(model, image(), backend='openvino')
    report = quick(model, image(), backend=('openvino', 'eager')).report
    assert report.backend == 'eager' and report.candidates[0]['note'] == 'NotImplementedError: aten::strange'


# Files of strangers


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    needs('onnxruntime')
    path = tmp_path_factory.mktemp('deployed') / 'network.bin'
    quick(create('cspnet_nano'), image(), backend='onnxruntime').save(path)
    return path


def rewritten(source, target, compression=zipfile.ZIP_STORED, **report):
    """A copy of a file with another report."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w', compression) as new:
        for name in old.namelist():
            content = old.read(name)
            if name == 'deploy.json':
                meta = json.loads(content)
                meta['report'].update(report)
                content = json.dumps(meta)
            new.writestr(name, content)
    return target


def test_damaged_files(saved, tmp_path):
    whole = saved.read_bytes()
    bad = tmp_path / 'bad.bin'
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 1
    for content in (whole[:-100], whole[:1000], b'', b'PK', bytes(middle)):
        bad.write_bytes(content)
        with pytest.raises(DeployError, match='damaged'):
            deploy.load(bad)
    with pytest.raises(FileNotFoundError):
        deploy.load(tmp_path / 'none.bin')


@pytest.mark.parametrize('report, message', [
    (dict(backend='shell'), 'shell'), (dict(shape=[1, 3, 1 << 20, 64]), 'shape'), (dict(shape='big'), 'shape'),
    (dict(threads=0), '0 threads'), (dict(arrangement='2'), 'damaged'), (dict(arrangement='0 × 4'), 'damaged'),
    (dict(surprise=1), 'damaged'), (dict(shape=[2, 3, 32, 32, 1]), 'shape'), (dict(precision='int4'), 'int4'),
    (dict(backend='openvino'), 'cannot load it'), (dict(shape=[2, 5, 64, 64]), 'cannot load it'),
    (dict(backend='inductor'), 'allow_code'), (dict(precision='float16'), 'this machine'),
])
def test_descriptions(saved, tmp_path, report, message):
    with pytest.raises(DeployError, match=message):
        Deployed.load(rewritten(saved, tmp_path / 'bad.bin', **report))


def test_a_compressed_file(saved, tmp_path):
    with pytest.raises(DeployError, match='compressed'):
        deploy.load(rewritten(saved, tmp_path / 'bad.bin', compression=zipfile.ZIP_DEFLATED))


def test_saving_loses_nothing(tmp_path, monkeypatch):
    deployed = quick(create('cspnet_nano'), image(), backend='eager')
    path = tmp_path / 'network.bin'
    path.write_bytes(b'before')

    def parts():
        raise OSError('no space left')

    monkeypatch.setattr(deployed._converted, 'parts', parts)
    with pytest.raises(OSError, match='no space'):
        deployed.save(path)
    assert path.read_bytes() == b'before' and [f.name for f in tmp_path.iterdir()] == ['network.bin']


def test_a_backend_without_floating_point(monkeypatch):
    """Where the package's own engine has int8 alone, it competes if there are scales for it, and says so if not."""
    monkeypatch.setattr(BACKENDS['native'], 'unavailable', classmethod(lambda cls, device: None))
    monkeypatch.setattr(BACKENDS['native'], 'precisions', classmethod(lambda cls, device: ('int8',)))
    monkeypatch.setattr(search, 'native_precisions', lambda device: ('float32', 'int8'))
    assert search._pairs('auto', ['native', 'eager'], True, CPU)[0] == [('native', 'int8'), ('eager', 'float32')]
    assert not any(name == 'native' for name, _ in search._pairs('auto', 'auto', False, CPU)[0])
    three = 'float32', 'float16', 'bfloat16'
    monkeypatch.setattr(BACKENDS['eager'], 'precisions', classmethod(lambda cls, device: three))
    monkeypatch.setattr(search, 'native_precisions', lambda device: (*three, 'int8'))
    assert search._pairs('auto', 'eager', True, CPU)[0] == [('eager', 'bfloat16')]
    with pytest.raises(DeployError, match=r"backend='native' computes in int8 alone .*: pass calibration=batches"):
        quick(create('cspnet_nano'), image(), backend='native')


# A GPU


def test_what_is_tried_on_a_gpu(monkeypatch):
    """The compiler as it is, with forms of the network; tuning for minutes when it is asked for."""
    monkeypatch.setattr(search, 'native_precisions', lambda device: ('float32', 'float16', 'bfloat16'))
    for name in ('eager', 'inductor', 'inductor_tuned'):
        monkeypatch.setattr(BACKENDS[name], 'precisions', classmethod(lambda cls, device: ('float32', 'bfloat16')))
        assert BACKENDS[name].forms(GPU) == ('space_to_depth', 'join_partitions', 'split_merges')
        if name != 'eager':
            assert BACKENDS[name].isolated and BACKENDS[name].options['freezing']
            monkeypatch.setattr(BACKENDS[name], 'unavailable', classmethod(lambda cls, device: None))
    pairs, left_out = search._pairs('auto', 'auto', False, GPU)
    assert pairs == [('inductor', 'bfloat16'), ('eager', 'bfloat16')]
    assert "backend='inductor_tuned'" in left_out['inductor_tuned'] and 'computes on the CPU' in left_out['native']
    assert 'max_autotune' not in BACKENDS['inductor'].options and BACKENDS['inductor_tuned'].options['max_autotune']


@pytest.mark.slow
def test_the_compiler_takes_the_forms():
    """What is searched on a GPU computes the same, compiled, here too."""
    needs('inductor')
    model = reparameterize_model(create_short('cspnet_nano', features_only=True, out_indices=(1,)))
    changed = model
    for form in ('space_to_depth', 'join_partitions', 'split_merges'):
        changed = FORMS[form](changed)
    x = image(2)
    compiled = BACKENDS['inductor'].convert(search.TupleOutputs(changed), x, 'float32').runner(Arrangement(1, 2), 1)
    with torch.no_grad():
        for batch in (1, 2, 3):
            x = image(batch)
            assert distance(compiled(x)[0], model(x)[0]) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
@pytest.mark.parametrize('backend', ['inductor', 'eager'])
@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'float16'])
def test_gpu(backend, precision, tmp_path):
    model = create('cspnet_nano').cuda()
    deployed = quick(model, image(4).cuda(), backend=backend, precision=precision, isolate=True)
    for batch in (1, 4, 7):
        x = image(batch).cuda()
        with torch.no_grad():
            assert distance(deployed(x), model(x)) < BOUNDS.get(precision, 0.05)
    deployed(x).add_(1)  # of no use to the next call
    path = tmp_path / 'network.deployed'
    deployed.save(path)
    assert distance(deploy.load(path, allow_code=True)(x), deployed(x)) < 1e-6
