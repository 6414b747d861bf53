"""YOLOv4's backbones: equal to Darknet's, read from the files of whole detectors, and no other file taken for one."""
import functools
import json
import logging
import os
import struct
import zlib

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from cspnet_timm import CspBackbone, cli
from cspnet_timm.checkpoints import CheckpointError, darknet, read_foreign
from tests.parity import FOLDER, fill, load_fixture
from tests.zoo import distance

HEADER = struct.pack('<3iQ', 0, 2, 5, 0)
TINY = 'cspnet_yolov4_tiny'

# Of the facts about the released cfgs: parameters of the backbone; bytes of the backbone alone, of the file of
# `darknet partial` that was released, of the detector of 80 classes; floats of a detector of n classes, K + A (5 + n).
FILES = {
    'cspnet_yolov4': (26_617_184, 106_610_068, 170_038_676, 257_717_640, 63_971_680, 3 * 1795),
    TINY: (3_629_728, 14_534_548, 19_789_716, 24_251_276, 5_866_464, 3 * 770),
    'cspnet_yolov4_csp': (26_596_192, 106_524_052, 146_548_116, 211_944_840, 52_528_480, 3 * 1795),
    'cspnet_yolov4_csp_swish': (26_596_192, 106_524_052, 185_312_660, 211_944_840, 52_528_480, 3 * 1795),
    'cspnet_yolov4_x_mish': (48_266_128, 193_265_428, 277_307_668, 399_388_168, 99_275_072, 3 * 2243),
    'cspnet_yolov4_csp_x_swish': (48_266_128, 193_265_428, 358_357_268, 399_388_168, 99_275_072, 3 * 2243),
    'cspnet_yolov4_p5': (40_252_256, 161_217_940, 256_427_412, 283_669_892, 70_307_168, 4 * 1795),
    'cspnet_yolov4_p6': (70_420_320, 281_976_212, 463_340_948, 510_868_180, 126_758_240, 4 * 2820),
    'cspnet_resnext50': (18_508_480, 74_263_316, 140_311_316, 228_123_400, 56_573_120, 3 * 1795),
    'cspnet_darknet53_mish': (26_617_184, 106_610_068, 170_038_676, 257_717_640, 63_971_680, 3 * 1795),
}
FIXTURES = [
    ('yolov4-tiny', TINY),
    ('yolov4', 'cspnet_yolov4'),
    pytest.param('yolov4', 'cspnet_darknet53_mish.coco', marks=pytest.mark.slow),
    pytest.param('yolov4-csp', 'cspnet_yolov4_csp', marks=pytest.mark.slow),
    pytest.param('yolov4x-mish', 'cspnet_yolov4_x_mish', marks=pytest.mark.slow),
    pytest.param('yolov4-p6', 'cspnet_yolov4_p6', marks=pytest.mark.slow),
]


@functools.cache
def empty(name, num_classes=0):
    return timm.create_model(name, device='meta', num_classes=num_classes)


def sparse(path, num_bytes, numbers=()):
    """A file of zeros, without the bytes behind it, but for (index of a float, values)."""
    with path.open('wb') as file:
        file.write(HEADER)
        file.truncate(num_bytes)
        for index, values in numbers:
            file.seek(len(HEADER) + 4 * index)
            file.write(np.asarray(values, dtype='<f4').tobytes())
    return path


def refuse(path, name, match, **kwargs):
    with pytest.raises(CheckpointError, match=match) as error:
        read_foreign(path, empty(name), **kwargs)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('fixture, name', FIXTURES)
def test_a_whole_detectors_file_gives_the_references_maps(fixture, name, tmp_path):
    """What stands behind the backbone is zeros here: a reader that took any of it for the backbone's would show."""
    with safe_open(FOLDER / f'darknet_{fixture}.safetensors', 'pt') as file:
        info = json.loads(file.metadata()['info'])
        outputs = {key: file.get_tensor(key) for key in file.keys()}
    num_convs = len(darknet._layers(empty(name)))
    path = tmp_path / f'{fixture}.weights'
    with path.open('wb') as file:
        file.write(HEADER)
        backbone = {k: s for k, s in info['keys'].items() if int(k.split('.')[0][4:]) < num_convs}
        for value in fill(backbone).values():
            file.write(value.numpy().astype('<f4').tobytes())
        file.truncate(len(HEADER) + 4 * sum(int(np.prod(shape)) for shape in info['keys'].values()))
    assert path.stat().st_size == FILES[name.split('.')[0]][3]
    model = timm.create_model(
        name, pretrained=True, features_only=True, pretrained_cfg_overlay=dict(file=str(path))).eval()
    x = np.random.RandomState(zlib.crc32(b'input')).standard_normal(info['input']).astype(np.float32)
    with torch.no_grad():
        maps = {f'stride{r}': y for r, y in zip(model.feature_info.reduction(), model(torch.from_numpy(x)))}
    compared = {key: distance(maps[key], output) for key, output in outputs.items() if key.startswith('stride')}
    assert len(compared) >= 4 and max(compared.values()) < 1e-5, compared


NECK_PARAMS = {  # the convolutions that detect read not among them
    'cspnet_yolov4_pan': 31_091_456 + 6_196_736, f'{TINY}_pan': 1_049_856 + 1_180_672,
    'cspnet_yolov4_csp_pan': 19_670_784 + 6_196_736, 'cspnet_yolov4_csp_swish_pan': 19_670_784 + 6_196_736,
    'cspnet_yolov4_x_mish_pan': 41_231_680 + 9_681_280, 'cspnet_yolov4_csp_x_swish_pan': 41_231_680 + 9_681_280,
    'cspnet_yolov4_p5_pan': 23_771_392 + 6_196_736, 'cspnet_yolov4_p6_pan': 45_288_704 + 10_917_376,
    'cspnet_resnext50_pan': 31_779_584 + 6_196_736,
}


@pytest.mark.parametrize('fixture, name', [
    ('yolov4-tiny', f'{TINY}_pan'),
    pytest.param('yolov4_neck', 'cspnet_yolov4_pan', marks=pytest.mark.slow),
    pytest.param('yolov4-csp_neck', 'cspnet_yolov4_csp_pan', marks=pytest.mark.slow),
    pytest.param('yolov4-p6_wide', 'cspnet_yolov4_p6_pan', marks=pytest.mark.slow),
])
def test_a_whole_detectors_file_gives_the_references_necks(fixture, name, tmp_path):
    info, state_dict, x, outputs = load_fixture(f'darknet_{fixture}')
    path = tmp_path / 'a.weights'
    with path.open('wb') as file:
        file.write(HEADER)
        for value in state_dict.values():
            file.write(value.numpy().astype('<f4').tobytes())
    model = timm.create_model(
        name, pretrained=True, features_only=True, pretrained_cfg_overlay=dict(file=str(path))).eval()
    maps = {}
    neck = model.model.neck
    for module in (neck.top, *neck.top_down, *neck.bottom_up):  # the last of a size is what the next level reads
        module.register_forward_hook(lambda _, args, y: maps.update({f'pan{x.shape[-1] // y.shape[-1]}': y}))
    with torch.no_grad():
        for reduction, y in zip(model.feature_info.reduction(), model(x)):
            maps[f'neck{reduction}'] = y
    distances = {key: distance(maps[key], y) for key, y in outputs.items() if not key.startswith('stride')}
    assert distances and max(distances.values()) < 1e-5, distances
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {info['bn_eps']}


@pytest.mark.parametrize('name', NECK_PARAMS)
def test_necks_are_what_follows_the_backbone_in_the_file(name):
    model, plain = empty(name), empty(name.removesuffix('_pan'))
    assert sum(p.numel() for p in model.neck.parameters()) == NECK_PARAMS[name]
    layers = [layer for layer in darknet._layers(plain) if len(layer) > 2]
    assert darknet._layers(model) == layers
    convs = [darknet.FileConv(*(t[-1].shape[i] for i in (1, 0, 2))) for t in darknet._neck(model)]
    for tail in darknet._tails(model):
        listed = [layer for layer in tail.layers if isinstance(layer, darknet.FileConv)]
        assert convs == listed[:len(convs)] and tail.with_neck == name
    of_neck = {key for key in model.state_dict() if key.startswith('neck.') and not key.endswith('num_batches_tracked')}
    assert {tensor.key for layer in darknet._neck(model) for tensor in layer} == of_neck
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}


@pytest.mark.parametrize('num_classes', [1, 7])
def test_a_neck_is_found_behind_heads_of_any_number_of_classes(num_classes, tmp_path, caplog):
    """Every float of the file is its own number, those of what detects are below zero."""
    numbers, start, expected = [], 0, {}
    neck = iter(darknet._neck(empty(f'{TINY}_pan')))
    backbone = sum(tensor.size for layer in darknet._layers(empty(TINY)) for tensor in layer)
    for layer in darknet._tails(empty(TINY))[0].layers:
        if isinstance(layer, darknet.DetectionConv):
            numbers.append(np.full(layer.count(num_classes), -1.))
        else:
            for key, shape in next(neck):
                expected[key] = torch.arange(start, start + int(np.prod(shape)), dtype=torch.float32).reshape(shape)
                numbers.append(expected[key].flatten().numpy())
        start = sum(map(len, numbers))
    path = sparse(tmp_path / 'a.weights', 20 + 4 * (backbone + start), [(backbone, np.concatenate(numbers))])
    with caplog.at_level(logging.INFO):
        state_dict = read_foreign(path, empty(f'{TINY}_pan'))
    assert all(torch.equal(state_dict[key], value) for key, value in expected.items())
    assert 'and 4 behind them the neck\'s; 2 others, of neck and head, were left out' in caplog.text
    assert state_dict.keys() == {k for k in empty(f'{TINY}_pan').state_dict() if not k.endswith('num_batches_tracked')}


@pytest.mark.parametrize('end, match', [(15, 'none: load it into'), (16, 'only 1: load it into'), (20, None)])
def test_files_that_end_before_the_neck_does(end, match, tmp_path, caplog):
    layers, tail = darknet._layers(empty(TINY)), darknet._tails(empty(TINY))[0]
    path = sparse(tmp_path / 'a.weights', 20 + darknet._num_bytes(layers) + 4 * sum(
        layer.count(80) for layer in tail.layers[:end - 15]))
    name = f'{TINY}_pan'
    if match:
        message = refuse(path, name, match)
        assert f'load it into {TINY}, or pass pretrained_strict=False' in message
    overlay = dict(pretrained_cfg_overlay=dict(file=str(path)), num_classes=0)
    if match:
        with pytest.raises(CheckpointError, match=match):
            timm.create_model(name, pretrained=True, **overlay)
    model = timm.create_model(name, pretrained=True, pretrained_strict=match is None, **overlay)
    assert (f'{end - 15} of the 4 convolutions of the neck' in caplog.text) == (match is not None)
    assert not model.layer1.conv.conv.weight.any() and bool(model.neck.top.conv.weight.any()) == (end == 15)


@pytest.mark.parametrize('name', FILES)
def test_sizes_are_those_of_the_facts(name):
    model = empty(name)
    params, backbone, partial, whole, constant, per_class = FILES[name]
    assert sum(p.numel() for p in model.parameters()) == params
    layers, tails = darknet._layers(model), darknet._tails(model)
    assert len(HEADER) + darknet._num_bytes(layers) == backbone
    held = len(layers)
    for num_classes in (1, 3, 80, 365):
        extents = darknet._extents(layers, tails, 4 * (constant + per_class * (5 + num_classes)))
        assert (held, num_classes) in [(e.held, e.num_classes) for e in extents]
    nothing = darknet._extents(layers, tails, 4 * (constant + per_class * 5))
    assert not any(e.held_behind == len(e.tail.layers) for e in nothing)  # a detector of no classes
    assert len(HEADER) + 4 * (constant + per_class * 85) == whole
    assert [e.held for e in darknet._extents(layers, tails, partial - len(HEADER))][:1] == [held]
    eps = {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert eps == {1e-5 if 'yolov4' in name else 1e-6}


def test_a_file_with_a_third_level_has_the_neck_of_two(tmp_path, caplog):
    """Nothing of the third level leads back to the others."""
    with caplog.at_level(logging.INFO):
        state_dict = read_foreign(sparse(tmp_path / 'a.weights', 25_336_200), empty(f'{TINY}_pan'))
    assert state_dict.keys() == {k for k in empty(f'{TINY}_pan').state_dict() if not k.endswith('num_batches_tracked')}
    assert 'and 4 behind them the neck\'s; 5 others, of neck and head, were left out' in caplog.text


def test_the_lengths_of_the_third_level():
    layers, tails = darknet._layers(empty(TINY)), darknet._tails(empty(TINY))
    assert darknet._extents(layers, tails, 25_336_200 - 20)[0].num_classes == 80
    assert darknet._extents(layers, tails, 4 * (6_104_800 + 3 * 899 * (5 + 7)))[0].num_classes == 7


@pytest.mark.parametrize('num_bytes, names', [
    (257_717_640, ['cspnet_yolov4']), (24_251_276, [TINY]), (25_336_200, [TINY]),
    (211_944_840, ['cspnet_yolov4_csp', 'cspnet_yolov4_csp_swish']),
    (399_388_168, ['cspnet_yolov4_x_mish', 'cspnet_yolov4_csp_x_swish']),
    (283_669_892, ['cspnet_yolov4_p5']), (510_868_180, ['cspnet_yolov4_p6']), (228_123_400, ['cspnet_resnext50']),
    (20 + 4 * (70_307_168 + 4 * 1795 * (5 + 7)), ['cspnet_yolov4_p5']),  # fine-tuned on seven classes
    (170_038_676, ['cspnet_yolov4']), (185_312_660, ['cspnet_yolov4_csp_swish']),
    (106_610_068, ['cspnet_darknet53', 'cspnet_darknet53_mish', 'cspnet_yolov4']),
    (110_710_068, ['cspnet_darknet53', 'cspnet_darknet53_mish']), (10_273_812, ['cspnet_mobilenetv2']),
    (10_273_812 - 4 * 641 * 990, ['cspnet_mobilenetv2']),  # a classifier of ten classes
    (24_251_272, []), (24_251_280, []), (200_000_000, []),
])
def test_the_length_names_the_network(num_bytes, names, tmp_path):
    path = sparse(tmp_path / 'a.weights', num_bytes)
    assert list(dict.fromkeys(match.network for match in darknet.candidates(path))) == names


def test_inspect_and_convert(tmp_path, capsys):
    path = sparse(tmp_path / 'mine.weights', 20 + 4 * (5_866_464 + 3 * 770 * (5 + 2)))
    assert cli.main(['inspect', str(path)]) == 0
    out = capsys.readouterr().out
    assert 'holds: a detector of 2 classes' in out and f'model: {TINY}\nwith neck: {TINY}_pan\n' in out
    assert cli.main(['convert', str(path), '--out', str(tmp_path / 'out'), '--license', 'mit']) == 0
    assert f'{TINY}.coco' in capsys.readouterr().out
    assert timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).num_classes == 0
    assert cli.main(['convert', str(path), '--out', str(tmp_path / 'neck'), '--model', f'{TINY}_pan']) == 0
    assert 'neck.top.conv.weight' in timm.create_model(f'local-dir:{tmp_path / "neck"}', pretrained=True).state_dict()

    both = sparse(tmp_path / 'both.weights', 211_944_840)
    assert cli.main(['inspect', str(both)]) == 0
    assert 'model: cspnet_yolov4_csp or cspnet_yolov4_csp_swish\n' in capsys.readouterr().out
    assert cli.main(['convert', str(both), '--out', str(tmp_path / 'both')]) == 2
    assert 'choose one with --model' in capsys.readouterr().err and not (tmp_path / 'both').exists()


@pytest.mark.parametrize('right, wrong', [
    ('cspnet_yolov4_csp', 'cspnet_yolov4_csp_swish'), ('cspnet_yolov4_x_mish', 'cspnet_yolov4_csp_x_swish')])
def test_the_order_behind_the_backbone_tells_networks_of_one_length_apart(right, wrong, tmp_path):
    """Weights below zero, as a convolution that detects has, where the other network would have variances."""
    tail = darknet._tails(empty(right))[0]
    first = next(i for i, layer in enumerate(tail.layers) if isinstance(layer, darknet.DetectionConv))
    offset = (FILES[right][1] - 20) // 4 + sum(layer.count(80) for layer in tail.layers[:first])
    head = tail.layers[first]
    path = sparse(tmp_path / 'a.weights', FILES[right][3], [(offset, -np.ones(head.count(80)))])
    assert [match.network for match in darknet.candidates(path)] == [right]
    message = refuse(path, wrong, 'variances below zero')
    assert message.endswith(f'Of this length is {right}.')
    model = empty(right)
    extents = darknet._check_size(path, darknet._layers(model), (tail,), FILES[right][3] - 20, False, False)
    with path.open('rb') as file:
        assert darknet._choose_order(path, file, 20, darknet._layers(model), extents).tail is tail


@functools.cache
def _noise(count):
    return np.random.RandomState(0).standard_normal(count).astype('<f4')


def detector(path, name, num_classes, held):
    """A file that begins with ``name`` and holds ``held`` convolutions behind it: noise, and variances above zero."""
    layers, tail = darknet._known()[name][0], darknet._known()[name][1][0]
    rows = [(layer[0].size, sum(t.size for t in layer)) for layer in layers]
    rows += [(getattr(layer, 'out_chs', 0), layer.count(num_classes)) for layer in tail.layers[:held]]
    with path.open('wb') as file:
        file.write(HEADER)
        for chs, count in rows:
            values = _noise(count).copy()
            values[3 * chs:4 * chs] = abs(values[3 * chs:4 * chs])
            file.write(values.tobytes())
    return path


def check_detector(path, num_classes, held, cut):
    detector(path, TINY, num_classes, held)
    assert [match.network for match in darknet.candidates(path)] == [TINY]
    assert len(read_foreign(path, empty(TINY))) == 5 * 15
    if cut:
        with path.open('ab') as file:
            file.truncate(path.stat().st_size + 4 * cut)
        assert not darknet.candidates(path)
        refuse(path, TINY, 'too (few|many)', allow_partial=True)


@pytest.mark.parametrize('num_classes, held, cut', [(1, 6, 1), (7, 3, -1), (20, 4, 2), (365, 5, 0)])
def test_a_detector_of_any_number_of_classes_and_its_beginning(num_classes, held, cut, tmp_path):
    """Behind whichever of its convolutions ``darknet partial`` ends."""
    check_detector(tmp_path / 'a.weights', num_classes, held, cut)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_classes=st.integers(1, 600), held=st.integers(0, 6), cut=st.integers(-3, 3))
def test_fuzzed_beginnings_of_detectors(num_classes, held, cut, tmp_path):
    check_detector(tmp_path / 'a.weights', num_classes, held, cut)


def test_recognition_and_conversion_build_no_more_networks_than_they_load(tmp_path, monkeypatch, capsys):
    built, init = [], CspBackbone.__init__
    monkeypatch.setattr(CspBackbone, '__init__', lambda *args, **kwargs: built.append(1) or init(*args, **kwargs))
    darknet._known.cache_clear()
    path = detector(tmp_path / 'yolov4-tiny.conv.31', TINY, 7, 4)
    assert cli.main(['inspect', str(path)]) == 0 and not built
    assert f'model: {TINY}\n' in capsys.readouterr().out
    assert cli.main(['convert', str(path), '--out', str(tmp_path / 'out')]) == 0 and len(built) <= 3
    empty(TINY)
    built.clear()
    refuse(sparse(tmp_path / 'a.weights', 200_000_000), TINY, 'too many')
    assert not built


def test_a_network_without_a_row_in_the_data_is_built(tmp_path, monkeypatch):
    path = detector(tmp_path / 'a.weights', TINY, 7, 6)
    monkeypatch.setattr(darknet, 'NETWORKS', {'cspnet_mine': darknet.NETWORKS[TINY]})
    darknet._known.cache_clear()
    try:
        assert [match.content for match in darknet.candidates(path)] == ['a detector of 7 classes']
    finally:
        darknet._known.cache_clear()


def test_what_is_left_out_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        state_dict = read_foreign(sparse(tmp_path / 'a.weights', FILES[TINY][3]), empty(TINY))
    assert 'detector of 80 classes. 15 convolutions are the backbone\'s; 6 behind them' in caplog.text
    assert state_dict.keys() == {k for k in empty(TINY).state_dict() if not k.endswith('num_batches_tracked')}
    with caplog.at_level(logging.INFO):
        read_foreign(sparse(tmp_path / 'yolov4-tiny.conv.29', FILES[TINY][2]), empty(TINY))
    assert 'the beginning of a detector. 15 convolutions are the backbone\'s; 2 behind them' in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        read_foreign(sparse(tmp_path / 'yolov4-tiny.conv.27', FILES[TINY][1]), empty(TINY))
    assert 'convolutions' not in caplog.text  # nothing is


def test_the_channels_of_tiny_are_put_in_order(tmp_path):
    layers = darknet._layers(empty(TINY))
    index = next(i for i, layer in enumerate(layers) if layer[-1].key == 'layer1.csp.transition.conv.weight')
    start = darknet._num_bytes(layers[:index + 1]) // 4 - layers[index][-1].size
    weight = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    state_dict = read_foreign(sparse(tmp_path / 'a.weights', FILES[TINY][3], [(start, weight)]), empty(TINY))
    taken = state_dict['layer1.csp.transition.conv.weight'][:, :, 0, 0].numpy()
    assert np.array_equal(taken, np.concatenate([weight[:, 32:], weight[:, :32]], axis=1))


def test_a_backbone_alone_does_not_tell_its_epsilon(tmp_path, caplog):
    path = sparse(tmp_path / 'yolov4.conv.105', FILES['cspnet_yolov4'][1])
    taken = darknet.read(path, empty('cspnet_darknet53_mish', 1000), classifier=False)
    assert 'batch norm eps of 1e-06' in caplog.text and 'pass bn_eps=1e-05' in caplog.text
    assert not taken['layer4.csp.merge.bn.running_var'].any()
    caplog.clear()
    read_foreign(path, empty('cspnet_yolov4'))
    read_foreign(path, timm.create_model('cspnet_darknet53_mish', device='meta', num_classes=0, bn_eps=1e-5))
    assert 'eps' not in caplog.text


def test_a_detectors_epsilon_becomes_the_networks(tmp_path):
    path = sparse(tmp_path / 'yolov4.weights', FILES['cspnet_yolov4'][3])
    converted = darknet.read(path, empty('cspnet_darknet53_mish', 1000), classifier=False)
    same = read_foreign(path, empty('cspnet_yolov4'))
    key = 'layer4.csp.merge.bn.running_var'
    assert converted.keys() == same.keys()
    assert not same[key].any() and torch.equal(converted[key], torch.full((1024,), 9e-6))
    with pytest.raises(CheckpointError, match='a detector of 80 classes, and no classifier: num_classes=0'):
        darknet.read(path, empty('cspnet_darknet53_mish', 1000))
    wide = timm.create_model('cspnet_yolov4', device='meta', num_classes=0, bn_eps=1e-3)
    with pytest.raises(CheckpointError, match='pass bn_eps=1e-05'):
        read_foreign(path, wide)


@pytest.mark.parametrize('num_bytes, name, match', [
    (14_534_544, TINY, '4 too few.*is it truncated'), (14_534_552, TINY, '4 too many.*of 80 classes that has'),
    (20_000_000, TINY, 'Nor is it a detector with this backbone'), (24_251_275, TINY, 'Nor is it a detector'),
    (211_944_840, 'cspnet_yolov4', 'Of this length is cspnet_yolov4_csp or cspnet_yolov4_csp_swish'),
    (257_717_640, TINY, 'Of this length is cspnet_yolov4'), (24_251_276, 'cspnet_yolov4', f'Of this length is {TINY}'),
    (110_710_068, 'cspnet_yolov4', 'Of this length is cspnet_darknet53 or cspnet_darknet53_mish'),
])
def test_other_files_are_refused(num_bytes, name, match, tmp_path):
    path = sparse(tmp_path / 'a.weights', num_bytes)
    refuse(path, name, match)
    refuse(path, name, match, allow_partial=True)


@pytest.mark.parametrize('value', [float('nan'), -1.])
def test_impossible_numbers_are_refused(value, tmp_path):
    num_backbone = (FILES[TINY][1] - 20) // 4
    for index, match in ((3 * 32, 'NaN or infinite|below zero'), (num_backbone + 3 * 256, 'below zero')):
        refuse(sparse(tmp_path / 'a.weights', FILES[TINY][3], [(index, [value])]), TINY, match)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_bytes=st.integers(0, 26_000_000), steps=st.integers(0, 40), partial=st.booleans())
def test_fuzzed_length(num_bytes, steps, partial, tmp_path):
    layers, tail = darknet._layers(empty(TINY)), darknet._tails(empty(TINY))[0]
    if steps < 21:  # behind a whole convolution
        num_bytes = 20 + darknet._num_bytes(layers[:steps]) + 4 * sum(
            layer.count(80) for layer in tail.layers[:max(steps - 15, 0)])
    path = sparse(tmp_path / 'a.weights', max(num_bytes, 20))
    os.truncate(path, num_bytes)
    try:
        state_dict = read_foreign(path, empty(TINY), allow_partial=partial)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert not 15 <= steps < 21
    else:
        assert partial or len(state_dict) == 5 * 15


def test_pooled_levels_dilate_as_convolutions_do():
    """With dilation in place of the strides, every fourth pixel is what the strides give."""
    torch.manual_seed(0)
    strided = timm.create_model(TINY, features_only=True).eval()
    x = torch.randn(1, 3, 128, 96)
    for output_stride in (8, 16):
        dilated = timm.create_model(TINY, features_only=True, output_stride=output_stride).eval()
        dilated.load_state_dict(strided.state_dict())
        with torch.no_grad():
            for a, b, r in zip(strided(x), dilated(x), strided.feature_info.reduction()):
                step = max(r // output_stride, 1)
                torch.testing.assert_close(b[:, :, ::step, ::step], a, rtol=1e-4, atol=1e-5)


def test_p6_has_a_level_more_and_its_own_stride():
    model = timm.create_model('cspnet_yolov4_p6', features_only=True, device='meta')
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32, 64]
    assert [o.shape[-1] for o in model(torch.empty(1, 3, 128, 128, device='meta'))] == [64, 32, 16, 8, 4, 2]
    again = timm.create_model('cspnet_yolov4_p6', features_only=True, device='meta', output_stride=64)
    assert again.feature_info.reduction()[-1] == 64
    with pytest.raises(ValueError, match='choose one of 8, 16, 32 and 64'):
        timm.create_model('cspnet_yolov4_p6', device='meta', output_stride=128)
