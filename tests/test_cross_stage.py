"""The stage as a user builds it, of any block."""
import itertools

import pytest
import torch
import torch.nn as nn
from timm.layers import GELU

import cspnet_timm
from cspnet_timm import BackboneCfg, ComposedStage, CrossStage, CspBackbone, Level
from cspnet_timm.blocks import ConcatOutputs, DarkBlock
from cspnet_timm.deployment.forms import join_partitions, split_merges
from cspnet_timm.layers import ChannelSlice, ConvNormAct
from tests import parity


class Record(nn.Module):
    """A block that notes what it was given."""

    def __init__(self, chs):
        super().__init__()
        self.chs = chs
        self.conv = nn.Conv2d(chs, chs, 3, padding=1)

    def forward(self, x):
        self.seen = x
        return self.conv(x)


@pytest.mark.parametrize('fusion, partition, bypass, ratio', list(itertools.product(
    ('csp', 'first', 'last'), ('conv', 'split'), (None, 'conv', 'identity'), (0.25, 0.5, 0.75))))
def test_every_choice(fusion, partition, bypass, ratio):
    stage = CrossStage(
        32, 48, blocks=Record, fusion=fusion, partition=partition, bypass=bypass, partial_ratio=ratio)
    x = torch.randn(2, 32, 8, 6, requires_grad=True)
    y = stage(x)
    assert y.shape == (2, 48, 8, 6)
    y.mean().backward()
    assert all(p.grad is not None for p in stage.parameters()) and x.grad.abs().sum() > 0
    hidden = 32 if partition == 'split' else 48
    assert stage.blocks.seen.shape[1] == hidden - round(ratio * hidden)


def test_half_the_channels_go_through_the_blocks():
    stage = CrossStage(64, 64, blocks=Record)
    assert stage.blocks.chs == 32
    full = sum(p.numel() for p in Record(64).parameters())
    assert sum(p.numel() for p in stage.blocks.parameters()) < full / 3.9


def test_fusions_have_the_transitions_of_the_paper():
    kinds = {}
    for fusion in ('csp', 'first', 'last'):
        stage = CrossStage(16, 16, blocks=Record, fusion=fusion)
        kinds[fusion] = tuple(not isinstance(m, nn.Identity) for m in (stage.transition, stage.merge))
    assert kinds == {'csp': (True, True), 'first': (False, True), 'last': (True, False)}


def test_the_sentence():
    stage = CrossStage(16, 24, blocks=Record).eval()
    x = torch.randn(1, 16, 5, 5)
    with torch.no_grad():
        part = stage.transition(stage.blocks(stage.entry(x)))
        assert torch.equal(stage(x), stage.merge(torch.cat([part, stage.bypass(x)], dim=1)))


def test_split_gives_the_first_channels_to_the_bypass():
    stage = CrossStage(8, 8, blocks=lambda chs: nn.Identity(), partition='split', partial_ratio=0.25, fusion='last')
    assert isinstance(stage.bypass, ChannelSlice)
    x = torch.randn(1, 8, 2, 2)
    assert torch.equal(stage(x)[:, 6:], x[:, :2]) and torch.equal(stage.entry(x), x[:, 2:])


def test_blocks_may_change_the_width():
    stage = CrossStage(
        16, 32, blocks=lambda chs: ConcatOutputs([DarkBlock(chs, chs) for _ in range(3)], out_chs=4 * chs))
    assert stage(torch.randn(1, 16, 4, 4)).shape == (1, 32, 4, 4)


def test_composed_of_identities():
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(ComposedStage(nn.ReLU())(x), torch.cat([x.relu(), x], dim=1))


@pytest.mark.parametrize('kwargs, message', [
    (dict(fusion='middle'), "fusion='middle' is unknown, choose one of 'csp', 'first', 'last'"),
    (dict(partition='slice'), "partition='slice' is unknown, choose one of 'conv', 'split'"),
    (dict(bypass='pool'), "bypass='pool' is unknown, choose one of 'conv', 'identity'"),
    (dict(partial_ratio=0.), r'partial_ratio=0.0 is outside \(0, 1\)'),
    (dict(partial_ratio=1.), r'partial_ratio=1.0 is outside \(0, 1\)'),
    (dict(partial_ratio=-0.5), 'partial_ratio=-0.5 is outside'),
    (dict(partial_ratio=float('nan')), 'partial_ratio=nan is outside'),
    (dict(hidden_chs=1), '1 channels cannot be split at partial_ratio=0.5'),
    (dict(partial_ratio=0.01), '16 channels cannot be split at partial_ratio=0.01'),
    (dict(partition='split', hidden_chs=64), 'hidden_chs=64 cannot be: a split has the 16 channels'),
    (dict(fusion='last', hidden_chs=64), "out_chs=16 leaves nothing for the blocks at fusion='last'"),
    (dict(fusion='first', transition_chs=8), 'transition_chs=8 is for'),
])
def test_bad_choices(kwargs, message):
    def blocks(chs):
        raise AssertionError('work has begun')

    if 'last' in kwargs.values():
        blocks = nn.Identity
    with pytest.raises(ValueError, match=message):
        CrossStage(16, 16, blocks=blocks, **kwargs)


@pytest.mark.parametrize('blocks, message', [
    (nn.Conv2d(8, 8, 3, padding=1), r'blocks=Conv2d is no function: .* such as lambda chs: nn.Conv2d'),
    (3, 'blocks=int is no function'),
    (lambda chs: [nn.Identity()], r'blocks\(8\) returned list, and not a module'),
])
def test_blocks_is_a_function_that_makes_a_module(blocks, message):
    with pytest.raises(TypeError, match=message):
        CrossStage(16, 16, blocks=blocks)


def test_public_names():
    assert set(cspnet_timm.__all__) <= set(dir(cspnet_timm))
    for name in cspnet_timm.__all__:
        assert getattr(cspnet_timm, name).__doc__
    with pytest.raises(AttributeError, match='no_such_name'):
        cspnet_timm.no_such_name  # noqa: B018


# What is said of a level, and what it builds.


def _levels(**wrong):
    def build(in_chs, args):
        return nn.Sequential(
            ConvNormAct(in_chs, 8, 3, stride=args.stride, dilation=args.first_dilation, **args.layers),
            *[DarkBlock(8, 8, **args.block_kwargs(i)) for i in range(2)])

    right = Level(build, 8, depth=2)
    return BackboneCfg(levels=(right, Level(build, **{'out_chs': 8, 'depth': 2, **wrong}), right))


@pytest.mark.parametrize('wrong, match', [
    (dict(out_chs=16), r'layer1: .*out_chs=16, stride=2\) makes \(1, 16, .*makes \(1, 8,'),
    (dict(depth=1), r'depth=1\) has no residual block 1'), (dict(depth=0), r'depth=0\) has no residual block 0'),
    (dict(depth=3), r'layer1: .*depth=3\).*does not build: \[2\]'),
])
def test_a_level_is_what_is_said_of_it(wrong, match):
    assert CspBackbone(_levels(), num_classes=0).feature_info[1] == dict(num_chs=8, reduction=4, module='layer1')
    with pytest.raises(ValueError, match=match):
        CspBackbone(_levels(**wrong), num_classes=0)


def test_a_stride_that_is_not_said():
    def still(in_chs, args):
        return ConvNormAct(in_chs, 8, 3, **args.layers)

    with pytest.raises(ValueError, match=r'stem: .*stride=2\) makes'):
        CspBackbone(BackboneCfg(levels=(Level(still, 8), Level(still, 8))), num_classes=0)
    model = CspBackbone(BackboneCfg(levels=(Level(still, 8, stride=1), Level(still, 8, stride=1))), num_classes=0)
    assert [info['reduction'] for info in model.feature_info] == [1, 1]


def test_a_second_activation_gives_way_to_the_callers():
    def build(in_chs, args):
        return nn.Sequential(
            ConvNormAct(in_chs, 8, 3, stride=args.stride, **args.layers),
            ConvNormAct(8, 8, **args.layers_with('relu')), ConvNormAct(8, 8, **args.layers_with(None)))

    cfg = BackboneCfg(levels=(Level(build, 8), Level(build, 8)))
    for act_layer, kinds in ((None, [nn.SiLU, nn.ReLU]), ('gelu', [GELU, GELU])):
        model = CspBackbone(cfg, num_classes=0, act_layer=act_layer)
        assert [type(m) for n, m in model.stem.named_modules() if n.endswith('act')] == kinds


def test_a_map_may_have_the_bypass_first():
    x = torch.randn(1, 4, 3, 3)
    stage = ComposedStage(nn.ReLU(), bypass_first=True)
    assert torch.equal(stage(x), torch.cat([x, x.relu()], dim=1))
    stage.grad_checkpointing = True
    assert torch.equal(stage(x.requires_grad_()), torch.cat([x, x.relu()], dim=1))
    assert join_partitions(nn.Sequential(stage)) is None and split_merges(nn.Sequential(stage)) is None


def test_a_fixture_is_written(tmp_path, monkeypatch):
    reference = nn.Sequential(ConvNormAct(3, 4, 3, stride=2), ConvNormAct(4, 6, 3, stride=2))
    parity.write_fixture(
        'small', reference, {'stride2': '0', 'stride4': ''}, (1, 3, 16, 24), folder=tmp_path, source='here')
    monkeypatch.setattr(parity, 'FOLDER', tmp_path)
    info, state_dict, x, outputs = parity.load_fixture('small')
    again = nn.Sequential(ConvNormAct(3, 4, 3, stride=2), ConvNormAct(4, 6, 3, stride=2)).eval()
    again.load_state_dict(state_dict)
    with torch.no_grad():
        assert torch.equal(again[0](x), outputs['stride2']) and torch.equal(again(x), outputs['stride4'])
    assert info['params'] == sum(p.numel() for p in again.parameters()) and info['bn_eps'] == 1e-5
    with pytest.raises(ValueError, match="no modules \\['7'\\]"):
        parity.write_fixture('other', reference, {'stride2': '7'}, (1, 3, 16, 24), folder=tmp_path)
