"""KerasCV's weights: HDF5 in Keras' own layouts, equal to the reference, with TensorFlow's padding; hostile files."""
import re
import sys
import zlib

import h5py
import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.data import resolve_model_data_config
from timm.layers import Conv2dSame
from timm.utils import reparameterize_model

from cspnet_timm import sources
from cspnet_timm.checkpoints import CheckpointError, open_checkpoint, read_foreign
from cspnet_timm.families.yolox import KERAS_NAMING
from cspnet_timm.fitting import recognise
from cspnet_timm.layers import SamePad
from tests.parity import load_fixture
from tests.zoo import create, distance

TINY = 'cspnet_yolox_tiny_keras'


@pytest.fixture(scope='module')
def tiny():
    return load_fixture('yolox_tiny_keras')


def places(layouts, layout):
    """Where each array lies: as Keras was seen to write it, or as it does from what was seen."""
    if layout == 'nested':  # the backbone is one layer of a classifier
        return [re.sub(r'^(sequential\w*|dark\d_csp)/', 'csp_dark_net_backbone/', place) for place in layouts['named']]
    if layout == 'windows':  # a name with the separator of its paths in it
        return [place.rpartition('/vars/')[0].replace('/', '\\') + place[place.index('/vars/'):]
                for place in layouts['keras2.12']]
    return layouts[layout]


def write(path, fixture, layout='released', classifier=True, prefix=''):
    """The fixture's weights in a file as Keras lays it out."""
    info, state_dict, _, _ = fixture
    with h5py.File(path, 'w') as file:
        if layout in ('released', 'named', 'nested'):
            group = file.require_group(prefix) if prefix else file
            group.attrs['keras_version'] = '2.11.0'
            group.attrs['layer_names'] = np.array([b'sequential', b'dark2_csp'])
        for place, value in zip(places(info['layouts'], layout), state_dict.values()):
            if classifier or ('predictions' not in place and 'dense' not in place):
                order = (2, 3, 1, 0) if value.ndim == 4 else tuple(reversed(range(value.ndim)))
                file[prefix + place] = value.permute(order).numpy()
    return path


@pytest.fixture(scope='module')
def released(tiny, tmp_path_factory):
    return write(tmp_path_factory.mktemp('keras') / 'classification-v0.h5', tiny)


def read(name, path, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs).eval()


def largest_distance(model, fixture):
    info, _, x, outputs = fixture
    wide = np.random.RandomState(zlib.crc32(b'input')).standard_normal(info['input_wide']).astype(np.float32)
    found = {}
    with torch.no_grad():
        for prefix, images in (('', x), ('wide_', torch.from_numpy(wide))):
            features, maps = model.forward_intermediates(images)
            found.update({f'{prefix}stride{2 << i}': y for i, y in enumerate(maps)})
            found[f'{prefix}logits'] = model.forward_head(features)
    assert set(outputs) == set(found) - {'wide_stride2'}
    return max(distance(found[key], outputs[key]) for key in outputs)


def test_the_released_layout_gives_the_references_maps(tiny, released):
    info = tiny[0]
    model = read(TINY, released)
    assert largest_distance(model, tiny) < 1e-5
    assert sum(p.numel() for p in model.parameters()) == info['params']
    norms = {(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {(info['bn_eps'], info['bn_momentum'])}
    merged = reparameterize_model(model).eval()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert largest_distance(merged, tiny) < 1e-5


@pytest.mark.parametrize('layout, prefix', [
    ('named', 'model_weights/'), ('nested', ''), ('keras2.12', ''), ('windows', ''),
    ('keras3', ''), ('keras3', 'layers/functional/')])
def test_other_layouts_are_the_same_weights(layout, prefix, tiny, released, tmp_path):
    path = write(tmp_path / 'a.weights.h5', tiny, layout, prefix=prefix)
    with open_checkpoint(path) as a, open_checkpoint(released) as b:
        assert recognise(a) == recognise(b) == TINY and a.num_classes == b.num_classes == 1000
        assert a.part == prefix.rstrip('/') * (layout == 'named')
        assert a.framework == b.framework == 'Keras'
        found, expected = (KERAS_NAMING.convert(c.state_dict()) for c in (a, b))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_the_config_is_the_training_scripts():
    cfg = resolve_model_data_config(timm.create_model(TINY, device='meta'))
    assert cfg == dict(input_size=(3, 224, 224), interpolation='bilinear', mean=(0., 0., 0.), std=(1., 1., 1.),
                       crop_pct=1.0, crop_mode='center')


# A wrong combination is refused


def test_a_file_without_a_classifier(tiny, tmp_path):
    path = write(tmp_path / 'notop.h5', tiny, classifier=False)
    with pytest.raises(CheckpointError, match=f'has no classifier, and {TINY} has one of 1000 classes'):
        read(TINY, path)
    maps = read(TINY, path, features_only=True)(tiny[2])
    assert distance(maps[-1], tiny[3]['stride32']) < 1e-5


def test_neither_padding_takes_the_others_weights(tiny, released, tmp_path):
    with pytest.raises(CheckpointError, match=f'holds {TINY}, not cspnet_yolox_tiny'):
        read('cspnet_yolox_tiny', released)
    with pytest.raises(CheckpointError, match=f'holds {TINY}, not cspnet_yolox_l_keras'):
        read('cspnet_yolox_l_keras', released)
    same, symmetric = create(TINY), create('cspnet_yolox_tiny', num_classes=1000)
    for a, b in ((same, symmetric), (symmetric, same)):  # also between networks of this package, by PyTorch's road
        with pytest.raises(RuntimeError, match='layer1'):
            b.load_state_dict(a.state_dict())
        torch.save(a.state_dict(), tmp_path / 'own.pt')
        with pytest.raises(CheckpointError, match='not '):
            read(b.pretrained_cfg['architecture'], tmp_path / 'own.pt')


def renamed(tiny, change):
    return {change(key): value for key, value in tiny[1].items()}


@pytest.mark.parametrize('change, message', [
    (lambda key: key.replace('dark5_csp.conv2d_31', 'dark5_csp.depthwise_conv2d'), 'separable convolution'),
    (lambda key: key.replace('dark3_csp', 'dark6_csp'), 'are not dark2 to dark5'),
    (lambda key: key.replace('dark3_csp.conv2d_9.', 'dark3_csp.batch_normalization_99.'), 'batch norms are in stage 3'),
    (lambda key: key.replace('sequential_1.', 'dark2_csp.'), 'outside of its cross stages'),
    (lambda key: key.replace('sequential.conv2d.', 'stem_1.stem_1_conv.'), 'has the names of KerasCV\'s YOLOv8'),
])
def test_other_networks_of_the_project(change, message, tiny):
    changed = renamed(tiny, change)
    assert changed.keys() != tiny[1].keys()
    model = timm.create_model(TINY, device='meta')
    with pytest.raises(CheckpointError, match=message):
        model.load_state_dict(changed)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_state_dicts(data, tiny):
    """Whatever is missing, of another name or of another shape: one clear error."""
    changed = {key: torch.empty_like(value, device='meta') for key, value in tiny[1].items()}
    for key in data.draw(st.lists(st.sampled_from(sorted(changed)), min_size=1, max_size=12, unique=True)):
        value, kind = changed.pop(key), data.draw(st.sampled_from(['drop', 'rename', 'shape']))
        if kind == 'rename':
            changed[data.draw(st.sampled_from(['a.weight', 'dark2_csp.a.bias', 'conv_block3_conv.weight']))] = value
        elif kind == 'shape':
            changed[key] = torch.empty(data.draw(st.sampled_from([(), (3,), (5, 2), (1, 1, 2, 7)])), device='meta')
    with pytest.raises(CheckpointError):
        timm.create_model(TINY, device='meta').load_state_dict(changed)


# Without h5py


def test_the_error_names_the_extra(released, monkeypatch):
    monkeypatch.setitem(sys.modules, 'h5py', None)
    with pytest.raises(CheckpointError, match=r"classification-v0\.h5: .*pip install '\.\[keras\]'"):
        open_checkpoint(released)
    monkeypatch.setattr(sources, '_download', lambda *args: pytest.fail('downloaded what cannot be read'))
    with pytest.raises(CheckpointError, match=r"pip install '\.\[keras\]'"):
        timm.create_model(TINY, pretrained=True)


# Hostile and damaged files


def weights(file, name='a/kernel:0'):
    file[name] = np.ones((3, 3, 4, 4), np.float32)


def soft_link(file):
    file['b'] = h5py.SoftLink('/a')


def external_link(file):
    file['b'] = h5py.ExternalLink('other.h5', '/')


def linked_part(file):
    file['model_weights'] = h5py.ExternalLink('other.h5', '/')


def cycle(file):
    file['a/b'] = file['a']


def twice(file):
    file['b'] = file['a/kernel:0']


def external_array(file):
    file.create_dataset('b/kernel:0', (64,), 'f4', external=[('other.bin', 0, 256)])


def virtual_array(file):
    layout = h5py.VirtualLayout((4,), 'f4')
    layout[:] = h5py.VirtualSource('other.h5', 'a', (4,))
    file.create_virtual_dataset('b/kernel:0', layout)


def never_written(file):
    file.create_dataset('b/kernel:0', (1 << 40,), 'f4')


def never_written_chunks(file):
    file.create_dataset('b/kernel:0', (1 << 40,), 'f4', chunks=(1 << 10,))


def packed_zeros(file):
    file.create_dataset('b/kernel:0', data=np.zeros(1 << 20, np.float32), compression='gzip')


def with_sums(file):
    file.create_dataset('b/kernel:0', data=np.zeros(1 << 10, np.float32), fletcher32=True)


def deep(file):
    file['/'.join('g' * 40) + '/kernel:0'] = np.ones(3, np.float32)


def one_name(file):
    file['a/gamma:0'] = np.ones(4, np.float32)


def text(file):
    del file['a']
    file['b/kernel:0'] = 'text'


@pytest.mark.parametrize('spoil, message', [
    (soft_link, 'link to another place'), (external_link, 'link to another place'),
    (linked_part, 'link to another place'), (cycle, 'is there twice'), (twice, 'is there twice'),
    (external_array, 'lies in another file'), (virtual_array, 'lies in another file'),
    (never_written, 'has 0 bytes in the file'), (never_written_chunks, 'has 0 bytes in the file'),
    (packed_zeros, 'compressed.*h5repack'), (with_sums, 'compressed.*h5repack'),
    (deep, 'deeper than'), (one_name, 'have one name'), (text, 'holds no weights'),
])
def test_hostile_files(spoil, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with h5py.File('other.h5', 'w') as file:
        weights(file)
    with h5py.File('a.h5', 'w') as file:
        weights(file)
        spoil(file)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(tmp_path / 'a.h5')
    assert str(error.value).startswith(f'{tmp_path / "a.h5"}: ')


def test_what_stands_beside_the_weights_is_left(tmp_path):
    with h5py.File(tmp_path / 'a.h5', 'w') as file:
        weights(file, 'model_weights/a/kernel:0')
        weights(file, 'optimizer_weights/SGD/kernel:0')
        file['model_weights/a/half:0'] = np.ones(2, np.float16)
        file['model_weights/a/text:0'] = 'text'
    with open_checkpoint(tmp_path / 'a.h5') as checkpoint:
        assert checkpoint.part == 'model_weights' and checkpoint.others == ('a/text:0',)
    assert {k: v.dtype for k, v in read_foreign(tmp_path / 'a.h5', nn.Identity()).items()} == {
        'a.weight': torch.float32, 'a.half': torch.float32}


@settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files(data, tmp_path):
    """Cut off or changed anywhere: it is read, or there is one error."""
    path = tmp_path / 'a.h5'
    with h5py.File(path, 'w') as file:
        for i in range(3):
            weights(file, f'dark2_csp/conv2d_{i}/kernel:0')
            file[f'dark2_csp/batch_normalization_{i}/gamma:0'] = np.ones(4, np.float32)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(8, len(content) - 1)):]
    for at in data.draw(st.lists(st.integers(8, min(len(content) - 1, 4000)), max_size=4)) if len(content) > 8 else ():
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        with open_checkpoint(path) as checkpoint:
            checkpoint.state_dict()
    except CheckpointError as error:
        assert str(path) in str(error)


# The padding


@pytest.mark.parametrize('size', [(8, 12), (7, 9), (6, 5), (1, 2)])
def test_the_padding_is_tensorflows(size):
    torch.manual_seed(0)
    reference, x = Conv2dSame(3, 4, 3, stride=2), torch.randn(2, 3, *size)
    y = nn.functional.conv2d(SamePad()(x), reference.weight, reference.bias, stride=2)
    torch.testing.assert_close(y, reference(x))


@pytest.mark.parametrize('size', [(64, 64), (70, 102), (90, 86)])
def test_dilation_reads_what_the_stride_would_have_read(size):
    """In front of the pools, which look at neighbours whatever lies between them."""
    model = create(TINY, num_classes=0)
    dilated = timm.create_model(TINY, num_classes=0, output_stride=8).eval()
    dilated.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        x = model.layer2(model.layer1(model.stem(x)))
        y, z = model.layer3(x), dilated.layer3(x)
        assert z.shape[2:] == x.shape[2:] and distance(z[..., ::2, ::2], y) < 1e-5
        assert distance(dilated.layer4.down(z)[..., ::4, ::4], model.layer4.down(y)) < 1e-5


def test_no_compiler_keeps_the_padding_of_its_example():
    torch.manual_seed(0)
    model = nn.Sequential(SamePad(), nn.Conv2d(3, 4, 3, stride=2)).eval()
    x, dynamic = torch.randn(1, 3, 8, 8), torch.export.Dim.DYNAMIC
    compiled = {
        'fx': torch.fx.symbolic_trace(model), 'script': torch.jit.script(model), 'trace': torch.jit.trace(model, x),
        'export': torch.export.export(model, (x,), dynamic_shapes=({2: dynamic, 3: dynamic},)).module(),
    }
    for size in ((8, 8), (7, 9), (10, 7)):
        x = torch.randn(1, 3, *size)
        for name, function in compiled.items():
            assert torch.equal(function(x), model(x)), (name, size)
