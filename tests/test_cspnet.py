"""The package's own networks against timm's, whose weights they hold, and the tutorial's against its own outputs."""
import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from torch.utils.flop_counter import FlopCounterMode

from cspnet_timm.families import WEIGHTS
from tests.parity import load_fixture
from tests.zoo import create, distance

PAIRS = {
    'cspnet_small': 'cs3darknet_focus_s',
    'cspnet_medium': 'cs3darknet_focus_m',
    'cspnet_large': 'cs3darknet_focus_l',
    'cspnet_xlarge': 'cs3darknet_x',
}


@pytest.mark.parametrize('ours, theirs', [
    pytest.param(*pair, marks=pytest.mark.slow) if pair[0].endswith('large') else pair for pair in PAIRS.items()])
def test_holds_timms_weights(ours, theirs, tmp_path):
    reference = create(theirs)
    path = tmp_path / 'timm.pth'
    torch.save(reference.state_dict(), path)
    x = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        expected_maps = reference.forward_intermediates(x, intermediates_only=True)
        for kwargs in (
            dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path))),  # as from the Hub
            dict(checkpoint_path=str(path)),
        ):
            model = timm.create_model(ours, **kwargs).eval()
            _, maps = model.forward_intermediates(x)
            assert len(maps) == len(expected_maps)
            for a, b in zip(maps, expected_maps):
                assert distance(a, b) < 1e-5
            assert distance(model(x), reference(x)) < 1e-5
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize('ours, theirs', PAIRS.items())
def test_preprocessing_and_source_are_timms(ours, theirs):
    cfg, reference = get_pretrained_cfg(ours), get_pretrained_cfg(theirs)
    for field in (
        'input_size', 'test_input_size', 'interpolation', 'crop_pct', 'test_crop_pct', 'mean', 'std', 'num_classes',
        'pool_size', 'license',
    ):
        assert getattr(cfg, field) == getattr(reference, field), field
    assert cfg.tag == reference.tag
    assert cfg.hf_hub_id == f'timm/{theirs}.{cfg.tag}' == reference.hf_hub_id


def test_weights_are_described():
    for name, info in WEIGHTS.items():
        architecture, tag = name.split('.', 1)
        cfg = get_pretrained_cfg(name)
        assert cfg.architecture == architecture and cfg.tag == tag
        assert info.license and info.license == cfg.license
        assert info.data and info.source.strip()
        assert all(value > 0 for value in info.metrics.values())
        assert bool(info.metrics) == bool(info.metrics_source), name


@pytest.mark.parametrize(
    'kwargs', [dict(partial_ratio=0.25), dict(partial_ratio=0.75), dict(fusion='csp'), dict(fusion='last')])
def test_partial_ratio_and_fusion_are_arguments(kwargs):
    x = torch.empty(1, 3, 64, 64, device='meta')
    flops = []
    for extra in ({}, kwargs):
        model = timm.create_model('cspnet_nano', num_classes=5, device='meta', **extra)
        with FlopCounterMode(display=False) as counter:
            assert model(x).shape == (1, 5)
        flops.append(counter.get_total_flops())
    assert (flops[1] < flops[0]) == (kwargs.get('partial_ratio', 0) > 0.5 or kwargs.get('fusion') == 'last')


def test_bad_fusion_from_the_outside():
    with pytest.raises(ValueError, match="fusion='both' is unknown"):
        timm.create_model('cspnet_nano', fusion='both')


@pytest.mark.parametrize('name', ['tutorial_default', 'tutorial_small'])
@pytest.mark.parametrize('route', ['checkpoint_path', 'load_state_dict', 'overlay'])
def test_tutorial(name, route, tmp_path):
    info, state_dict, x, outputs = load_fixture(name)
    path = tmp_path / 'tutorial.pth'
    torch.save(state_dict, path)
    kwargs = dict(
        checkpoint_path=dict(checkpoint_path=str(path)),
        load_state_dict={},
        overlay=dict(pretrained=True, pretrained_cfg_overlay=dict(
            file=str(path), num_classes=info['args'].get('num_classes', 1000))),
    )[route]
    model = timm.create_model('cspnet_tutorial', **info['args'], **kwargs).eval()
    if route == 'load_state_dict':
        model.load_state_dict(state_dict)
    assert sum(p.numel() for p in model.parameters()) == info['params']
    with torch.no_grad():
        for tap, level in zip(model.forward_intermediates(x, intermediates_only=True), model.feature_info):
            assert distance(tap, outputs[f'stride{level["reduction"]}']) < 1e-5
        assert distance(model(x), outputs['logits']) < 1e-5


def test_tutorial_arguments():
    model = timm.create_model(
        'cspnet_tutorial', stem_channels=8, stage_channels=[16, 32], num_bottlenecks_per_stage=[1, 1], shortcut=False,
        expansion=0.25, activation='relu', num_classes=3)
    assert [info['num_chs'] for info in model.feature_info] == [16, 32]
    kinds = {type(m).__name__ for m in model.modules()}
    assert 'ReLU' in kinds and 'SiLU' not in kinds
    assert not model.layer1.csp.blocks[0].shortcut and model.layer1.csp.blocks[0].conv1.conv.out_channels == 8
    with pytest.raises(ValueError, match='must be equally long'):
        timm.create_model('cspnet_tutorial', stage_channels=[16, 32])
    with pytest.raises(ValueError, match='7 levels cannot be built'):
        timm.create_model('cspnet_tutorial', stage_channels=[8] * 7, num_bottlenecks_per_stage=[1] * 7)


def test_only_networks_of_timms_are_filed_beside_them():
    entrypoints = map(timm.models.model_entrypoint, timm.list_models('cspnet_*'))
    modules = {entrypoint.__module__.rpartition('.')[2] for entrypoint in entrypoints}
    shared = {module for module in modules if any(
        not name.startswith('cspnet_') for name in timm.list_models(module=module))}
    assert shared == {'cspnet', 'cspnext'}
    assert timm.list_models('cspnet_*', module='densenet') == []
