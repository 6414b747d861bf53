"""YOLOv9's backbones: equal to the MIT reference, read from its files and its users', and no other taken for it."""
import copy
import zlib

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.utils import reparameterize_model

from cspnet_timm import cli
from cspnet_timm.checkpoints import CheckpointError
from cspnet_timm.layers import RepConv
from cspnet_timm.naming import naming_of
from tests.parity import load_fixture
from tests.zoo import distance

# Parameters of the backbone, as trained and with the branches merged.
PARAMS = {
    't': (667_376, 654_944), 's': (2_655_968, 2_608_832), 'm': (7_358_016, 7_301_956), 'c': (8_328_384, 8_250_496)}
# Of the neck, the SPP included.
NECK_PARAMS = {
    't': (41_344 + 729_696, 41_344 + 713_376), 's': (164_608 + 2_903_744, 164_608 + 2_841_920),
    'm': (577_440 + 7_586_048, 577_440 + 7_515_488), 'c': (656_896 + 10_961_152, 656_896 + 10_851_968)}


@pytest.fixture(scope='module')
def tiny():
    return load_fixture('yolov9_t')


def read(name, path, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs).eval()


def compare(model, fixture):
    info, _, x, outputs = fixture
    found = {}
    kinds = ['neck' if i['module'].startswith('neck.') else 'stride' for i in model.feature_info]
    with torch.no_grad():
        if with_neck := hasattr(model, 'neck'):
            handle = model.neck.top.register_forward_hook(lambda *args: found.update(spp=args[-1]))
        features, maps = model.forward_intermediates(x)
        if with_neck:
            handle.remove()
        found.update({f'{kind}{i["reduction"]}': y for kind, i, y in zip(kinds, model.feature_info, maps)})
        if model.num_classes:
            found['logits'] = model.forward_head(features)
        if 'input_wide' in info:  # where a map is wide enough to show a wrong pool
            wide = np.random.RandomState(zlib.crc32(b'input')).standard_normal(info['input_wide']).astype(np.float32)
            found[f'wide_{"neck" if with_neck else "stride"}32'] = model.forward_features(torch.from_numpy(wide))
    distances = {key: distance(found[key], y) for key, y in outputs.items() if key in found}
    assert len(distances) >= 2 and max(distances.values()) < 1e-5, distances
    of_neck = {key for key in outputs if 'neck' in key or key == 'spp'}
    of_levels = {'stride8', 'stride16', 'stride32', 'wide_stride32'}
    assert set(outputs) - set(distances) == (of_levels if with_neck else of_neck)
    norms = {(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {(info['bn_eps'], info['bn_momentum'])}


@pytest.mark.parametrize('fixture, name', [
    ('yolov9_t', 'cspnet_yolov9t'), ('yolov9_c', 'cspnet_yolov9c'), ('yolov9_c_cls', 'cspnet_yolov9c_cls')])
def test_the_files_give_the_references_maps(fixture, name, tmp_path):
    loaded = load_fixture(fixture)
    torch.save(loaded[1], tmp_path / 'v9.pt')
    model = read(name, tmp_path / 'v9.pt')
    assert sum(p.numel() for p in model.parameters()) == loaded[0]['params']
    compare(model, loaded)
    if fixture.endswith('_cls'):
        with pytest.raises(CheckpointError, match='not cspnet_yolov9c_pan'):
            read(f'{name[:-4]}_pan', tmp_path / 'v9.pt')
    else:
        model = read(f'{name}_pan', tmp_path / 'v9.pt')
        assert sum(p.numel() for p in model.neck.parameters()) == NECK_PARAMS[fixture[-1]][0]
        compare(model, loaded)


@pytest.mark.parametrize('size', PARAMS)
def test_parameters(size):
    model = timm.create_model(f'cspnet_yolov9{size}', device='meta')
    params, merged = PARAMS[size]
    assert sum(p.numel() for p in model.parameters()) == params
    neck = timm.create_model(f'cspnet_yolov9{size}_pan', device='meta').neck
    assert sum(p.numel() for p in neck.parameters()) == NECK_PARAMS[size][0]
    if size == 't':
        model = timm.create_model('cspnet_yolov9t_pan')
        merged += NECK_PARAMS[size][1]
        for name, layer in list(model.named_modules()):
            if isinstance(layer, RepConv):
                parent, _, child = name.rpartition('.')
                setattr(model.get_submodule(parent), child, layer.fuse())
        assert sum(p.numel() for p in model.parameters()) == merged
        assert not any(isinstance(m, RepConv) for m in model.modules())


def test_branches_are_merged(tiny):
    model = timm.create_model('cspnet_yolov9t_pan', num_classes=0).eval()
    model.load_state_dict(tiny[1])
    merged = reparameterize_model(copy.deepcopy(model)).eval()
    assert not any(isinstance(m, (RepConv, nn.BatchNorm2d)) for m in merged.modules())
    with torch.no_grad():
        assert distance(merged(tiny[2]), model(tiny[2])) < 1e-5


def test_a_lightning_checkpoint_gives_its_average(tiny, tmp_path, capsys):
    raw = {f'model.model.{k}': v + 1 if v.is_floating_point() else v for k, v in tiny[1].items()}
    average = {f'ema.model.{k}': v for k, v in tiny[1].items()}
    for i, state_dict in enumerate(({**raw, **average}, {**average, **raw})):
        path = tmp_path / f'{i}.ckpt'
        torch.save({'state_dict': state_dict, 'epoch': 3, 'pytorch-lightning_version': '2.4.0'}, path)
        compare(read('cspnet_yolov9t_pan', path), tiny)
    assert cli.main(['inspect', str(path)]) == 0
    out = capsys.readouterr().out
    assert 'model: cspnet_yolov9t\n' in out and 'with neck: cspnet_yolov9t_pan\n' in out and 'average' in out
    torch.save({'state_dict': {f'model.model.{k}': v for k, v in tiny[1].items()}}, path)
    compare(read('cspnet_yolov9t', path), tiny)


def test_the_branch_for_training_is_left_out(tiny):
    head = {'22.heads.0.anchor_conv.0.conv.weight': torch.zeros(4, 4, 3, 3), '23.conv.weight': torch.zeros(8, 8, 1, 1),
            '23.conv.bias': torch.zeros(8), '26.conv1.conv.weight': torch.zeros(8, 8, 1, 1)}
    model = timm.create_model('cspnet_yolov9t', num_classes=0).eval()
    model.load_state_dict({**tiny[1], **head})
    compare(model, tiny)


def under_other_names(state_dict):
    """As the converter of the reference finds them: `cv` for `conv`, `m` for `bottleneck`."""
    out = {}
    for key, value in state_dict.items():
        number, _, rest = key.partition('.')
        for i in range(1, 6):
            rest = rest.replace(f'conv{i}.', f'cv{i}.')
        out[f'model.{number}.{rest.replace("bottleneck.", "m.")}'] = value
    return out


@pytest.mark.parametrize('names, project', [
    (None, 'YOLOv9 in the GPL repository'),
    (['model.0.conv.weight', 'model.4.conv.weight', 'model.5.conv.weight'], 'YOLOv7'),
    (['model.3.cv1.conv.weight', 'model.3.cv2.weight', 'model.3.cv4.conv.weight'], 'ScaledYOLOv4'),
    (['module_list.0.Conv2d.weight', 'module_list.0.BatchNorm2d.weight'], 'ScaledYOLOv4'),
])
def test_files_of_other_projects_are_refused_by_name(names, project, tiny, tmp_path, capsys):
    state_dict = under_other_names(tiny[1]) if names is None else {k: torch.zeros(8, 3, 3, 3) for k in names}
    path = tmp_path / 'a.pt'
    torch.save({'model': state_dict}, path)
    for name in ('cspnet_yolov9t', 'cspnet_yolov8n', 'cspnet_yolov4_csp'):
        with pytest.raises(CheckpointError, match=project) as error:
            read(name, path)
        assert str(path) in str(error.value) and len(str(error.value)) < 400
    assert cli.main(['inspect', str(path)]) == 0
    assert f'names: those of {project}' in capsys.readouterr().out
    assert cli.main(['convert', str(path), '--out', str(tmp_path / 'out')]) == 2
    assert project in capsys.readouterr().err


def test_another_size_is_named(tiny, tmp_path):
    torch.save(tiny[1], tmp_path / 'v9-t.pt')
    for name in ('cspnet_yolov9s', 'cspnet_yolov9c', 'cspnet_yolov8n'):
        with pytest.raises(CheckpointError, match=f'holds cspnet_yolov9t, not {name}'):
            read(name, tmp_path / 'v9-t.pt')
    other = {**tiny[1], '4.dconv.weight': torch.zeros(4, 4, 3, 3)}  # YOLO-RD is YOLOv9-c and a layer more
    with pytest.raises(CheckpointError, match=r'4\.dconv|layer2\.csp\.dconv'):
        timm.create_model('cspnet_yolov9t').load_state_dict(other)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_state_dicts(data, tiny):
    """Whatever is missing, of another shape or too many: one clear error, or the network."""
    names = [k for k in tiny[1] if int(k.split('.')[0]) < 9 and not k.endswith('num_batches_tracked')]
    state_dict = dict(tiny[1])
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=4)):
        change = data.draw(st.sampled_from(['drop', 'reshape', 'rename']))
        value = state_dict.pop(name, None)
        if value is not None and change == 'reshape':
            state_dict[name] = value.flatten()[:data.draw(st.integers(0, 7))]
        elif value is not None and change == 'rename':
            state_dict[f'{name}x'] = value
    model = timm.create_model('cspnet_yolov9t', device='meta', num_classes=0)
    with pytest.raises(CheckpointError) as error:
        model.load_state_dict(state_dict, assign=True)
    assert len(str(error.value)) > 30


def test_names_change_and_numbers_do_not(tiny):
    native = naming_of('YOLOv9').convert(tiny[1])
    both = tiny[1]['4.conv1.conv.weight']
    assert torch.equal(native['layer2.csp.bypass.conv.weight'], both[:32])
    assert torch.equal(native['layer2.csp.entry.conv.weight'], both[32:])
    merge = tiny[1]['4.conv4.conv.weight']
    assert torch.equal(native['layer2.csp.merge.conv.weight'], torch.cat([merge[:, 32:], merge[:, :32]], dim=1))


@pytest.mark.parametrize('name', ['cspnet_yolov9t', 'cspnet_yolov9c'])
def test_averaged_levels_dilate_as_convolutions_do(name):
    """With dilation in place of the strides, every fourth pixel is what the strides give."""
    strided = timm.create_model(name, features_only=True).eval()
    x = torch.randn(1, 3, 64, 96)
    for output_stride in (8, 16):
        dilated = timm.create_model(name, features_only=True, output_stride=output_stride).eval()
        dilated.load_state_dict(strided.state_dict())
        with torch.no_grad():
            for a, b, r in zip(strided(x), dilated(x), strided.feature_info.reduction()):
                step = max(r // output_stride, 1)
                torch.testing.assert_close(b[:, :, ::step, ::step], a, rtol=1e-3, atol=1e-4)


def test_odd_maps_are_halved_downwards():
    model = timm.create_model('cspnet_yolov9t', features_only=True, device='meta')
    shapes = [tuple(y.shape[2:]) for y in model(torch.empty(1, 3, 65, 97, device='meta'))]
    assert shapes == [(33, 49), (17, 25), (8, 12), (4, 6), (2, 3)]
