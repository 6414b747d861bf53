"""Darknet's .weights files: what they give, and every way in which one can be wrong."""
import copy
import logging
import re
import struct

import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.data import ImageNetInfo

from cspnet_timm import cli
from cspnet_timm.checkpoints import CheckpointError, darknet, read_foreign
from tests.parity import load_fixture
from tests.zoo import distance, same_weights

FIXTURES = {
    'csresnet50': 'cspnet_resnet50',
    'csresnext50': 'cspnet_resnext50',
    'csresnext50-elastic': 'cspnet_resnext50_elastic',
    'csdarknet53': 'cspnet_darknet53',
    'csdarknet53-omega': 'cspnet_darknet53_mish',
    'csmobilenet-v2': 'cspnet_mobilenetv2',
}
# Of the facts about the released cfgs: a 20-byte header and four bytes a number.
FILE_BYTES = {
    'cspnet_resnet50': 86_592_180,
    'cspnet_resnet50_mish': 86_592_180,
    'cspnet_resnet50_elastic': 119_600_820,
    'cspnet_resnext50': 82_459_316,
    'cspnet_resnext50_mish': 82_459_316,
    'cspnet_resnext50_elastic': 67_894_964,
    'cspnet_darknet53': 110_710_068,
    'cspnet_darknet53_mish': 110_710_068,
    'cspnet_darknet53_elastic': 76_468_020,
    'cspnet_mobilenetv2': 10_273_812,
    'cspnet_plain_mobilenetv2': 14_160_564,
    'cspnet_plain_resnet50': 91_303_604,
    'cspnet_plain_resnext50': 89_251_508,
    'cspnet_plain_darknet53': 166_582_580,
    # Of detectors, the backbones.
    'cspnet_yolov4': 106_610_068,
    'cspnet_yolov4_tiny': 14_534_548,
    'cspnet_yolov4_csp': 106_524_052,
    'cspnet_yolov4_csp_swish': 106_524_052,
    'cspnet_yolov4_x_mish': 193_265_428,
    'cspnet_yolov4_csp_x_swish': 193_265_428,
    'cspnet_yolov4_p5': 161_217_940,
    'cspnet_yolov4_p6': 281_976_212,
}
HEADERS = [
    struct.pack('<3iQ', 0, 2, 5, 0),
    struct.pack('<3iQ', 0, 2, 0, 102_400_000_000),
    struct.pack('<3iI', 0, 1, 0, 2 ** 32 - 1),
]
MOBILE = 'cspnet_mobilenetv2'


def write(path, tensors, header=HEADERS[0]):
    with path.open('wb') as file:
        file.write(header)
        for tensor in tensors:
            file.write(tensor.numpy().astype('<f4').tobytes())
    return path


def create(name, path, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs).eval()


@pytest.fixture(scope='module')
def mobile():
    return list(load_fixture('darknet_csmobilenet-v2')[1].values())


@pytest.fixture(scope='module')
def mobile_file(mobile, tmp_path_factory):
    return write(tmp_path_factory.mktemp('darknet') / 'csmobilenet-v2_final.weights', mobile)


@pytest.fixture(scope='module')
def empty_mobile():
    return timm.create_model(MOBILE, device='meta')


@pytest.mark.parametrize('fixture', FIXTURES)
def test_parity_with_opencv(fixture, tmp_path):
    info, state_dict, x, outputs = load_fixture(f'darknet_{fixture}')
    path = write(tmp_path / f'{fixture}_final.weights', state_dict.values())
    model = create(FIXTURES[fixture], path)
    assert sum(p.numel() for p in model.parameters()) == info['params']
    with torch.no_grad():
        features = model.forward_features(x)
        logits = model(x)
    assert distance(features, outputs['features']) < 1e-5
    assert distance(logits, outputs['logits'][:, list(darknet.class_order())]) < 1e-5


@pytest.mark.parametrize('header', HEADERS)
def test_headers(header, mobile, mobile_file, tmp_path):
    path = write(tmp_path / 'a.weights', mobile, header)
    a, b = create(MOBILE, path).state_dict(), create(MOBILE, mobile_file).state_dict()
    assert all(torch.equal(a[key], b[key]) for key in b)


def test_recognised_without_its_name(mobile, tmp_path, empty_mobile):
    for i, header in enumerate(HEADERS):
        assert read_foreign(write(tmp_path / f'file{i}', mobile, header), empty_mobile) is not None
    torch.save({'a': torch.zeros(2)}, tmp_path / 'a.pth')
    for other in (tmp_path / 'a.pth', tmp_path / 'a.weights.h5', tmp_path / 'weights'):
        head = other.read_bytes()[:64] if other.exists() else b'\x89HDF' + bytes(60)
        assert not darknet.recognises(other, head)


def test_adapts_to_other_inputs_and_classes(mobile_file):
    full = create(MOBILE, mobile_file)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ten = create(MOBILE, mobile_file, num_classes=10)
        assert ten(x).shape == (1, 10)
        torch.testing.assert_close(ten.forward_features(x), full.forward_features(x))
        grey = create(MOBILE, mobile_file, in_chans=1)
        torch.testing.assert_close(
            grey(x[:, :1]), full(x[:, :1].expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)
        maps = create(MOBILE, mobile_file, features_only=True)(x)
        for a, b in zip(maps, full.forward_intermediates(x, intermediates_only=True)):
            torch.testing.assert_close(a, b)
        overlay = dict(file=str(mobile_file), num_classes=-1)  # as timm's train.py --pretrained-path has it
        for num_classes in (10, 1000):
            tuned = timm.create_model(
                MOBILE, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes).eval()
            assert tuned(x).shape == (1, num_classes)
            torch.testing.assert_close(tuned.forward_features(x), full.forward_features(x))
    eps = {m.eps for m in full.modules() if isinstance(m, nn.BatchNorm2d)}
    assert eps == {1e-6}
    recent = create(MOBILE, mobile_file, bn_eps=1e-5)
    assert {m.eps for m in recent.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}


def test_loaded_model_can_be_saved(mobile_file, tmp_path):
    """The config keeps no tensors: they would stay in memory, and JSON has no word for them."""
    model = create(MOBILE, mobile_file)
    timm.models.save_for_hf(model, tmp_path / 'model', safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True)
    assert same_weights(model, again)
    assert list(again.pretrained_cfg['mean']) == [0., 0., 0.]
    assert list(again.pretrained_cfg['std']) == [1., 1., 1.]
    assert again.pretrained_cfg['interpolation'] == 'bilinear'
    assert again.pretrained_cfg['crop_pct'] == 1.0


def test_file_with_other_classes(mobile, tmp_path):
    """A network that someone has trained in Darknet on ten classes: nobody knows their order but he."""
    bias, weight = mobile[-2:]
    path = write(tmp_path / 'mine.weights', mobile[:-2] + [bias[:10], weight[:10]])
    with pytest.raises(CheckpointError, match='would fit with 10 classes'):
        create(MOBILE, path)
    overlay = dict(file=str(path), num_classes=10)
    for model in (create(MOBILE, path, num_classes=10),
                  timm.create_model(MOBILE, pretrained=True, pretrained_cfg_overlay=overlay)):
        assert torch.equal(model.head.fc.bias, bias[:10])
        assert torch.equal(model.head.fc.weight, weight[:10].flatten(1))
    assert create(MOBILE, path, num_classes=0).num_classes == 0


def test_class_order():
    """What the data says is a permutation, and leads from Darknet's classes to timm's."""
    order = darknet.class_order()
    assert sorted(order) == list(range(1000))
    assert all(i != index for i, index in enumerate(order))
    info = ImageNetInfo()
    # Darknet's first classes, and where it has others.
    darknet_classes = {0: 'kit_fox', 1: 'English_setter', 2: 'Siberian_husky', 448: 'tench'}
    for index, name in darknet_classes.items():
        description = info.index_to_description(order.index(index))
        assert name.replace('_', ' ').lower() in description.lower()
    with (darknet.resources.files('cspnet_timm') / 'data' / 'darknet_imagenet_order.txt').open() as file:
        ids = file.read().split()
    assert [ids[i] for i in order] == info.label_names()


def test_classifier_rows_move(mobile, mobile_file):
    model = create(MOBILE, mobile_file)
    bias, weight = mobile[-2:]
    assert torch.equal(model.head.fc.bias[0], bias[448])
    assert torch.equal(model.head.fc.weight[0], weight[448].flatten())


@pytest.mark.parametrize('name', FILE_BYTES)
def test_file_length(name):
    model = timm.create_model(name, device='meta')
    layers = darknet._layers(model)
    assert 20 + darknet._num_bytes(layers) == FILE_BYTES[name]
    keys = [tensor.key for layer in layers for tensor in layer]
    assert len(keys) == len(set(keys))
    assert set(keys) == {key for key in model.state_dict() if not key.endswith('num_batches_tracked')}


def test_known_networks():
    assert set(darknet.NETWORKS) == set(FILE_BYTES)


# Every way to be wrong.

def refuse(path, match, name=MOBILE, **kwargs):
    with pytest.raises(CheckpointError, match=match) as error:
        create(name, path, **kwargs)
    assert str(path) in str(error.value)
    return str(error.value)


def test_empty_missing_and_folder(tmp_path):
    (tmp_path / 'a.weights').touch()
    refuse(tmp_path / 'a.weights', 'is empty')
    refuse(tmp_path / 'missing.weights', 'cannot be read')
    (tmp_path / 'folder.weights').mkdir()
    refuse(tmp_path / 'folder.weights', 'cannot be read')


@pytest.mark.parametrize('head, match', [
    (b'\0' * 15, 'less than the 16'),
    (HEADERS[0][:18], 'within its header'),
    (b'<!DOCTYPE html><html>', 'is no Darknet file'),
    (struct.pack('<3iQ', -1, 2, 5, 0), 'is no Darknet file'),
    (struct.pack('<3iQ', 0, 1001, 5, 0), 'is no Darknet file'),
    (struct.pack('<3iQ', 0, 2, 2 ** 30, 0), 'is no Darknet file'),
    (HEADERS[0], 'too few'),
    (HEADERS[2], 'too few'),
])
def test_header_nonsense(head, match, tmp_path):
    (tmp_path / 'a.weights').write_bytes(head)
    refuse(tmp_path / 'a.weights', match)


def test_truncated(mobile, tmp_path):
    path = write(tmp_path / 'a.weights', mobile[:-1])
    assert 'truncated' in refuse(path, 'too few')
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert 'truncated' in refuse(path, 'too few')


def test_too_long(mobile, tmp_path):
    refuse(write(tmp_path / 'a.weights', [*mobile, torch.zeros(1)]), r', 4 too many')


def test_header_of_the_other_form(mobile, tmp_path):
    """Four bytes more or less than the version says."""
    refuse(write(tmp_path / 'a.weights', mobile, struct.pack('<3iI', 0, 2, 5, 0)), r', 4 too few')
    refuse(write(tmp_path / 'b.weights', mobile, struct.pack('<3iQ', 0, 1, 0, 0)), r', 4 too many')


def test_other_network(tmp_path, mobile_file):
    """The length tells the network."""
    message = refuse(mobile_file, 'too few', name='cspnet_resnext50')
    assert MOBILE in message
    with (tmp_path / 'a.weights').open('wb') as file:
        file.write(HEADERS[0])
        file.truncate(FILE_BYTES['cspnet_resnext50'])
    assert 'cspnet_resnext50 or cspnet_resnext50_mish' in refuse(tmp_path / 'a.weights', 'too many')


def test_network_without_such_files(mobile_file):
    refuse(mobile_file, 'there are none for this network', name='cspnet_nano')


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_not_finite(value, mobile, tmp_path):
    for index in (0, len(mobile) // 2, len(mobile) - 1):
        tensors = list(mobile)
        tensors[index] = tensors[index].clone()
        tensors[index].view(-1)[-1] = value
        refuse(write(tmp_path / 'a.weights', tensors), 'NaN or infinite')


def test_negative_variance(mobile, tmp_path):
    tensors = list(mobile)
    tensors[3] = -tensors[3]
    refuse(write(tmp_path / 'a.weights', tensors), 'variances below zero')


def test_nothing_is_half_loaded(mobile, tmp_path, empty_mobile):
    tensors = list(mobile)
    tensors[-1] = torch.full_like(tensors[-1], float('nan'))
    path = write(tmp_path / 'a.weights', tensors)
    before = copy.deepcopy(empty_mobile.state_dict())
    with pytest.raises(CheckpointError):
        read_foreign(path, empty_mobile)
    assert before.keys() == empty_mobile.state_dict().keys()


def test_partial_only_on_request(mobile, tmp_path, caplog):
    path = write(tmp_path / 'csmobilenet-v2.conv.78', mobile[:-2])
    assert 'pretrained_strict=False' in refuse(path, 'ends behind convolution 58 of 59')
    assert 'num_classes=0' in refuse(path, 'ends behind convolution 58 of 59')
    with caplog.at_level(logging.WARNING):
        model = create(MOBILE, path, pretrained_strict=False)
    assert 'first 58 of 59 convolutions' in caplog.text
    assert 'head.fc.weight' in caplog.text
    _, _, x, outputs = load_fixture('darknet_csmobilenet-v2')
    with torch.no_grad():
        assert distance(model.forward_features(x), outputs['features']) < 1e-5


@pytest.mark.parametrize('kwargs', [dict(num_classes=0), dict(features_only=True), dict(num_classes=10)])
def test_a_backbone_is_whole_where_no_classifier_of_it_is_needed(kwargs, mobile, mobile_file, tmp_path, caplog):
    """The form in which backbones are published: csdarknet53-omega.conv.105."""
    path = write(tmp_path / 'csmobilenet-v2.conv.78', mobile[:-2])
    with caplog.at_level(logging.WARNING):
        model = create(MOBILE, path, **kwargs)
    assert 'convolutions' not in caplog.text
    expected = create(MOBILE, mobile_file).state_dict()
    for key, value in model.state_dict().items():
        assert key.startswith('head.') or torch.equal(value, expected[key])
    refuse(write(tmp_path / 'a.conv.77', mobile[:-7]), 'ends behind convolution 57 of 59', **kwargs)


def test_a_backbone_is_converted_by_the_command_line(mobile, mobile_file, tmp_path):
    path = write(tmp_path / 'csmobilenet-v2.conv.78', mobile[:-2])
    command = ['convert', str(path), '--out', str(tmp_path / 'out'), '--model', MOBILE, '--num-classes', '0']
    assert cli.main(command) == 0
    again = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert again.num_classes == 0
    assert torch.equal(again.stem.conv1.conv.weight, create(MOBILE, mobile_file).stem.conv1.conv.weight)


def test_partial_in_the_middle(mobile, tmp_path, empty_mobile, caplog):
    path = write(tmp_path / 'a.conv.9', mobile[:5 * 7])
    with caplog.at_level(logging.WARNING):
        state_dict = read_foreign(path, empty_mobile, allow_partial=True)
    assert len(state_dict) == 5 * 7
    assert 'layer4.merge.conv.weight' in caplog.text
    model = create(MOBILE, path, pretrained_strict=False, features_only=True)
    assert torch.equal(model.state_dict()['stem.conv1.conv.weight'], mobile[4])


def test_truncated_is_not_partial(mobile, tmp_path):
    path = write(tmp_path / 'a.conv.9', [*mobile[:34], mobile[34].flatten()[:-1]])
    refuse(path, 'too few', pretrained_strict=False)
    refuse(write(tmp_path / 'b.conv.9', []), 'too few', pretrained_strict=False)


FUZZ = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refuse(path, model, **kwargs):
    """The state dict, or None after a clear error; anything else is a failure of the test."""
    try:
        return read_foreign(path, model, **kwargs)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert len(re.sub(r'\s', '', str(error))) > len(str(path)) + 8
        return None


@FUZZ
@given(data=st.binary(max_size=200), partial=st.booleans())
def test_fuzzed_bytes(data, partial, tmp_path, empty_mobile):
    path = tmp_path / 'fuzz.weights'
    path.write_bytes(data)
    assert read_or_refuse(path, empty_mobile, allow_partial=partial) is None


@FUZZ
@given(share=st.floats(0, 1, exclude_max=True), partial=st.booleans())
def test_fuzzed_length(share, partial, tmp_path, empty_mobile, mobile_file):
    path = tmp_path / 'fuzz.weights'
    data = mobile_file.read_bytes()
    path.write_bytes(data[:int(share * len(data))])
    state_dict = read_or_refuse(path, empty_mobile, allow_partial=partial)
    assert state_dict is None or partial


@FUZZ
@given(offset=st.integers(0, FILE_BYTES[MOBILE] - 1), patch=st.binary(min_size=1, max_size=64))
def test_fuzzed_content(offset, patch, tmp_path, empty_mobile, mobile_file):
    path = tmp_path / 'fuzz.weights'
    data = bytearray(mobile_file.read_bytes())
    data[offset:offset + len(patch)] = patch[:len(data) - offset]
    path.write_bytes(data)
    state_dict = read_or_refuse(path, empty_mobile)
    if state_dict is not None:
        assert all(torch.isfinite(tensor).all() for tensor in state_dict.values())
        assert {k: tuple(v.shape) for k, v in state_dict.items()} == {
            k: tuple(v.shape) for k, v in empty_mobile.state_dict().items() if k in state_dict}


def test_weights_that_cannot_be_downloaded():
    with pytest.raises(RuntimeError) as error:
        timm.create_model('cspnet_resnext50_mish', pretrained=True)
    message = str(error.value)
    assert 'https://drive.google.com/' in message
    assert 'unknown' in message
    assert 'pretrained_cfg_overlay=dict(file=' in message
    assert 'cspnet_resnext50_mish.omega_in1k' in message


def test_other_normalisation(mobile_file):
    """Not of a damaged file, but of weights that the network asked for has no place for."""
    model = timm.create_model('cspnet_resnet50', device='meta', norm_layer='groupnorm')
    with pytest.raises(CheckpointError, match='norm_layer must be a batch norm'):
        read_foreign(mobile_file, model)
