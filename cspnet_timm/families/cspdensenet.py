"""CSPDenseNet, after the paper's text: its author released neither cfg nor weights of it.

From the paper: a stage's input is split along its channels, one part passes through the dense layers, a transition
follows them, the other part joins, and a second transition follows the concatenation (section 3.1, partial dense block
and partial transition layer); the partial ratio and the three fusions of its Fig. 3. From its author's answers:
convolution, batch norm and leaky ReLU in this order, as in his cfgs. From DenseNet: depths, growth of 32, bottlenecks
of four times the growth, stem, pools, and the transitions between the stages, which halve the channels.

Ours, because nobody says: every stage is partial; the first transition halves its channels as DenseNet's does, the
second gives as many as DenseNet has there, behind the last stage too; the pool stands between the two, which is
cheaper, so that pool and second transition open the next layer here; for fusion ``'last'`` the first transition, then
the only one, fills up what bypasses to DenseNet's number. The parameters, operations and accuracies that the paper
gives are of other layers than these.

Papers: `CSPNet: A New Backbone that can Enhance Learning Capability of CNN`, https://arxiv.org/abs/1911.11929;
`Densely Connected Convolutional Networks`, https://arxiv.org/abs/1608.06993
"""
from collections import OrderedDict
from functools import partial
from typing import Any, Callable, List, Optional, Sequence

import torch.nn as nn

from ..backbone import BackboneCfg, CspBackbone, Level, LevelArgs
from ..blocks import DenseBlock, DenseLayer
from ..cross_stage import CrossStage
from ..layers import ConvNormAct
from ._builder import build_backbone, default_cfg, describe_weights, register_model
from ._darknet import LEAKY

__all__ = ['partial_dense_levels']

SIZES = {  # layers of each stage
    'cspnet_densenet121': (6, 12, 24, 16),
    'cspnet_densenet169': (6, 12, 32, 32),
    'cspnet_densenet201': (6, 12, 48, 32),
    'cspnet_densenet264': (6, 12, 64, 48),
}
STEM_CHS = 64
GROWTH = 32


def _partial_dense_layer(
        in_chs: int,
        args: LevelArgs,
        stage_chs: int,
        out_chs: int,
        transition_chs: Optional[int],
        block: Callable[..., nn.Module],
        pool: Optional[Callable[[int, LevelArgs], nn.Module]],
        merge: bool,
        partial_ratio: float,
        fusion: str,
) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers['pool'] = nn.AvgPool2d(args.stride, ceil_mode=True) if pool is None else pool(in_chs, args)
    if pool is None and fusion != 'last':
        layers['transition'] = ConvNormAct(in_chs, stage_chs, **args.layers)
    layers['csp'] = CrossStage(
        stage_chs, out_chs,
        blocks=partial(block, args=args),
        partial_ratio=partial_ratio,
        fusion=fusion,
        partition='split',
        transition_chs=transition_chs,
        merge=merge,
        **args.layers,
    )
    return nn.Sequential(layers)


def partial_dense_levels(
        stem: Level,
        pool: Callable[[int, LevelArgs], nn.Module],
        blocks: Sequence[Callable[..., nn.Module]],
        depths: Sequence[int],
        growth: int,
        compression: float,
        partial_ratio: float,
        fusion: str,
) -> List[Level]:
    """Stages of dense layers, each partial, with a pool and a transition between every two.

    Args:
        stem: The first level.
        pool: Called with the channels, returns what halves the stem's map.
        blocks: For each stage, called with the channels that enter its dense layers and ``args``, the level's.
        depths: Layers of each stage.
        growth: Channels that each layer adds.
        compression: Channels behind the first transition, as a fraction of those before it, and between two stages.
        partial_ratio: Fraction of a stage's channels that bypasses its dense layers.
        fusion: ``'csp'``, ``'first'`` or ``'last'``.

    Returns:
        The levels of a backbone.
    """
    levels = [stem]
    stage_chs = stem.out_chs
    for i, (block, depth) in enumerate(zip(blocks, depths)):
        last = i == len(depths) - 1
        dense_chs = stage_chs + depth * growth
        next_chs = dense_chs if last else int(dense_chs * compression)
        transition_chs = None
        out_chs = dense_chs if fusion == 'first' else next_chs
        if fusion == 'csp':
            bypass_chs = round(partial_ratio * stage_chs)
            transition_chs = int((dense_chs - bypass_chs) * compression)
            out_chs = next_chs if last else transition_chs + bypass_chs
        levels.append(Level(partial(
            _partial_dense_layer, stage_chs=stage_chs, transition_chs=transition_chs, out_chs=out_chs, block=block,
            pool=None if i else pool, merge=last, partial_ratio=partial_ratio, fusion=fusion,
        ), out_chs, depth=depth))
        stage_chs = next_chs
    return levels


def _dense_block(in_chs: int, args: LevelArgs, depth: int) -> nn.Module:
    layers = [
        DenseLayer(in_chs + i * GROWTH, GROWTH, 4 * GROWTH, **args.block_kwargs(i)) for i in range(depth)]
    return DenseBlock(layers, in_chs + depth * GROWTH)


def _create(
        variant: str,
        pretrained: bool,
        partial_ratio: float = 0.5,
        fusion: str = 'csp',
        **kwargs: Any,
) -> CspBackbone:
    depths = SIZES[variant]
    levels = partial_dense_levels(
        Level(lambda chs, args: ConvNormAct(chs, STEM_CHS, 7, stride=args.stride, **args.layers), STEM_CHS),
        pool=lambda chs, args: nn.MaxPool2d(3, args.stride, padding=1),
        blocks=[partial(_dense_block, depth=depth) for depth in depths],
        depths=depths,
        growth=GROWTH,
        compression=0.5,
        partial_ratio=partial_ratio,
        fusion=fusion,
    )
    return build_backbone(variant, pretrained, BackboneCfg(levels=tuple(levels), act_layer=LEAKY), **kwargs)


default_cfgs = describe_weights({
    'cspnet_densenet121.untrained': default_cfg(),
    'cspnet_densenet169.untrained': default_cfg(),
    'cspnet_densenet201.untrained': default_cfg(),
    'cspnet_densenet264.untrained': default_cfg(),
})


@register_model
def cspnet_densenet121(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """DenseNet-121 of partial stages; ``partial_ratio`` and ``fusion`` are arguments."""
    return _create('cspnet_densenet121', pretrained, **kwargs)


@register_model
def cspnet_densenet169(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """DenseNet-169 of partial stages; ``partial_ratio`` and ``fusion`` are arguments."""
    return _create('cspnet_densenet169', pretrained, **kwargs)


@register_model
def cspnet_densenet201(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """DenseNet-201 of partial stages; ``partial_ratio`` and ``fusion`` are arguments."""
    return _create('cspnet_densenet201', pretrained, **kwargs)


@register_model
def cspnet_densenet264(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """DenseNet-264 of partial stages; ``partial_ratio`` and ``fusion`` are arguments."""
    return _create('cspnet_densenet264', pretrained, **kwargs)
