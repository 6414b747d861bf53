"""The stage as a user builds it, of any block."""
import itertools

import pytest
import torch
import torch.nn as nn

import cspnet_timm
from cspnet_timm import ComposedStage, CrossStage
from cspnet_timm.blocks import ConcatOutputs, DarkBlock
from cspnet_timm.layers import ChannelSlice


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
