"""DAMO-YOLO's backbones: equal to the reference, from files with the branches of training and from deployed ones."""
import zlib

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.utils import reparameterize_model

from cspnet_timm.checkpoints import CheckpointError
from cspnet_timm.layers import RepConv
from tests.parity import load_fixture
from tests.zoo import distance

PARAMS = {'m': (10_217_920, 9_836_096), 'l': (17_774_656, 16_993_600)}  # as trained, and with the branches merged
NECK_PARAMS = {'m': (17_829_888, 17_148_160), 'l': (24_893_184, 23_870_592)}


@pytest.fixture(scope='module')
def medium():
    return load_fixture('damo_m')


def read(name, path, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs).eval()


def compare(model, fixture):
    info, _, x, outputs = fixture
    wide = np.random.RandomState(zlib.crc32(b'input')).standard_normal(info['input_wide']).astype(np.float32)
    kinds = ['neck' if i['module'].startswith('neck.') else 'stride' for i in model.feature_info]
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        found = {f'{kind}{i["reduction"]}': y for kind, i, y in zip(kinds, model.feature_info, maps)}
        found[f'wide_{kinds[-1]}32'] = model.forward_features(torch.from_numpy(wide))
        if kinds[-1] == 'neck':  # by itself: behind the backbone numbers are so large that mistakes would not show
            alone = [
                0.1 * np.random.RandomState(zlib.crc32(b'input')).standard_normal(shape).astype(np.float32)
                for shape in info['input_alone']['shapes']]
            maps = model.neck([torch.from_numpy(a) for a in alone])
            found.update({f'alone_neck{8 << i}': y for i, y in enumerate(maps)})
    distances = {key: distance(y, outputs[key]) for key, y in found.items()}
    assert len(distances) == (9 if kinds[-1] == 'neck' else 6) and max(distances.values()) < 1e-5, distances


def deployed(state_dict, eps=1e-3):
    """What the reference's ``switch_to_deploy`` leaves: one convolution with a bias for both branches."""
    out = {k: v for k, v in state_dict.items() if '.rbr_' not in k}
    for name in sorted({k.partition('.rbr_')[0] for k in state_dict if '.rbr_' in k}):
        weight, bias = 0., 0.
        for branch, pad in (('rbr_dense', 0), ('rbr_1x1', 1)):
            bn = {k: state_dict[f'{name}.{branch}.bn.{k}'].double() for k in (
                'weight', 'bias', 'running_mean', 'running_var')}
            scale = bn['weight'] / (bn['running_var'] + eps).sqrt()
            kernel = state_dict[f'{name}.{branch}.conv.weight'].double() * scale[:, None, None, None]
            weight = weight + nn.functional.pad(kernel, (pad,) * 4)
            bias = bias + bn['bias'] - bn['running_mean'] * scale
        out[f'{name}.rbr_reparam.weight'], out[f'{name}.rbr_reparam.bias'] = weight.float(), bias.float()
    return out


def test_a_released_file_gives_the_references_maps(medium, tmp_path):
    info, state_dict, _, _ = medium
    head = {'head.gfl_cls.0.weight': torch.zeros(81, 128, 3, 3)}
    torch.save({'model': {**state_dict, **head}}, tmp_path / 'damoyolo_tinynasL35_M_492.pth')
    compare(read('cspnet_damo_m', tmp_path / 'damoyolo_tinynasL35_M_492.pth'), medium)
    model = read('cspnet_damo_m_pan', tmp_path / 'damoyolo_tinynasL35_M_492.pth')
    compare(model, medium)
    assert sum(p.numel() for p in model.parameters()) == info['params'] + info['params_neck']
    norms = {(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {(info['bn_eps'], info['bn_momentum'])}
    merged = reparameterize_model(model).eval()
    assert not any(isinstance(m, (RepConv, nn.BatchNorm2d)) for m in merged.modules())
    compare(merged, medium)


def test_a_deployed_file_gives_the_same(medium, tmp_path):
    torch.save({'model': deployed(medium[1])}, tmp_path / 'deployed.pth')
    model = read('cspnet_damo_m_pan', tmp_path / 'deployed.pth')
    compare(model, medium)
    compare(reparameterize_model(model).eval(), medium)


@pytest.mark.parametrize('size', PARAMS)
def test_parameters(size):
    model = timm.create_model(f'cspnet_damo_{size}_pan', device='meta')
    for params, parts in ((NECK_PARAMS, [model.neck]), (PARAMS, model.levels())):
        whole = sum(p.numel() for part in parts for p in part.parameters())
        merged = whole - sum(
            layer.conv1x1.conv.weight.numel() + 3 * layer.conv3x3.conv.out_channels
            for part in parts for layer in part.modules() if isinstance(layer, RepConv))
        assert (whole, merged) == params[size]


def test_two_activations_and_one_that_is_asked_for():
    kinds = [type(m) for m in timm.create_model('cspnet_damo_m', device='meta').modules()]
    assert kinds.count(nn.ReLU) == 16 and kinds.count(nn.SiLU) == 1 + 2 + 2 * 13
    asked = {type(m) for m in timm.create_model('cspnet_damo_m', device='meta', act_layer='gelu').modules()}
    assert not asked & {nn.ReLU, nn.SiLU}


def test_another_network_of_the_project_is_refused(medium, tmp_path):
    torch.save({'model': medium[1]}, tmp_path / 'm.pth')
    with pytest.raises(CheckpointError, match='holds cspnet_damo_m, not cspnet_damo_l'):
        read('cspnet_damo_l', tmp_path / 'm.pth')
    torch.save({'model': {'backbone.block_list.0.conv.weight': torch.zeros(24, 12, 3, 3)}}, tmp_path / 't.pth')
    with pytest.raises(CheckpointError, match='DAMO-YOLO T, S'):
        read('cspnet_damo_m', tmp_path / 't.pth')


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_state_dicts(data, medium):
    """Whatever is missing or of another shape, in either form: one clear error."""
    state_dict = dict(medium[1])
    if data.draw(st.booleans()):
        state_dict = deployed({k: v for k, v in state_dict.items() if k.startswith('backbone.')})
    names = [k for k in state_dict if k.startswith('backbone.') and not k.endswith('num_batches_tracked')]
    name = data.draw(st.sampled_from(names))
    value = state_dict.pop(name)
    if data.draw(st.booleans()):
        state_dict[name] = value.flatten()[:data.draw(st.integers(0, 7))]
    model = timm.create_model('cspnet_damo_m', device='meta', num_classes=0)
    with pytest.raises(CheckpointError) as error:
        model.load_state_dict(state_dict, assign=True)
    assert len(str(error.value)) > 30


def test_there_is_no_address_of_what_is_gone():
    for size in PARAMS:
        cfg = timm.get_pretrained_cfg(f'cspnet_damo_{size}')
        assert cfg.tag == 'untrained' and not cfg.url and not cfg.origin_url
