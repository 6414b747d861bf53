"""The network of the CSPNet tutorial that this project began with, parameter for parameter.

Its cross stages run the blocks at the full width, on as many channels as enter the stage, so that nothing is saved: it
is kept so that checkpoints of it load, and as the example of what the paper does not mean. The package's own networks
are in ``cspnet.py``.
"""
import re
from collections import OrderedDict
from functools import partial
from typing import Any, List, Optional, Sequence

import torch.nn as nn

from ..backbone import BackboneCfg, CspBackbone, Level, LevelArgs, StateDict
from ..blocks import DarkBlock
from ..cross_stage import CrossStage
from ..layers import ActLayer, ConvNormAct
from ..naming import Naming, register_naming
from ._builder import build_backbone, default_cfg, describe_weights, register_model

__all__: List[str] = []


def _stage(
        in_chs: int,
        args: LevelArgs,
        out_chs: int,
        depth: int,
        shortcut: bool,
        expansion: float,
) -> nn.Module:
    return CrossStage(
        in_chs, out_chs,
        blocks=lambda chs: nn.Sequential(*[
            DarkBlock(chs, chs, bottle_ratio=expansion, shortcut=shortcut, **args.block_kwargs(i))
            for i in range(depth)
        ]),
        hidden_chs=2 * out_chs,  # the tutorial's mistake: each branch has all the channels
        fusion='csp',
        **args.layers,
    )


def _first_level(in_chans: int, args: LevelArgs, stem_chs: int, out_chs: int, **stage_kwargs: Any) -> nn.Module:
    return nn.Sequential(OrderedDict(
        conv1=ConvNormAct(in_chans, stem_chs, 3, stride=args.stride, **args.layers),
        conv2=ConvNormAct(stem_chs, out_chs, 3, **args.layers),
        conv3=ConvNormAct(out_chs, out_chs, 3, **args.layers),
        csp=_stage(out_chs, args, out_chs=out_chs, **stage_kwargs),
    ))


def _level(in_chs: int, args: LevelArgs, out_chs: int, **stage_kwargs: Any) -> nn.Module:
    return nn.Sequential(OrderedDict(
        down=ConvNormAct(in_chs, out_chs, 3, stride=args.stride, dilation=args.first_dilation, **args.layers),
        csp=_stage(out_chs, args, out_chs=out_chs, **stage_kwargs),
    ))


_PARTS = {
    'conv1': 'entry', 'bottlenecks': 'blocks', 'conv2': 'transition', 'conv3': 'bypass', 'conv_out': 'merge'}


def _rename(own: StateDict, whole: StateDict) -> StateDict:
    """The tutorial's keys to this package's: it lists downsampling and stages in one row, ``stages.{0, 1, 2, …}``."""
    out = {}
    for key, value in own.items():
        if match := re.fullmatch(r'stem\.(\d)\.(.+)', key):
            key = f'stem.conv{int(match[1]) + 1}.{match[2]}'
        elif match := re.fullmatch(r'stages\.(\d+)\.((?:conv|bn)\..+)', key):
            key = f'layer{(int(match[1]) + 1) // 2}.down.{match[2]}'
        elif match := re.fullmatch(r'stages\.(\d+)\.([a-z_0-9]+)\.(.+)', key):
            index = int(match[1]) // 2
            key = f'{f"layer{index}" if index else "stem"}.csp.{_PARTS[match[2]]}.{match[3]}'
        elif key.startswith('fc.'):
            key = f'head.{key}'
        out[key] = value
    return out


NAMING = register_naming(Naming(
    'tutorial', ('cspnet_tutorial',), r'stages\.0\.conv_out\.conv\.weight', _rename))


default_cfgs = describe_weights({
    'cspnet_tutorial.untrained': default_cfg(pool_size=(14, 14), first_conv='stem.conv1.conv'),
})


@register_model
def cspnet_tutorial(
        pretrained: bool = False,
        stem_channels: int = 32,
        stage_channels: Sequence[int] = (64, 128, 256, 512),
        num_bottlenecks_per_stage: Sequence[int] = (2, 4, 4, 2),
        shortcut: bool = True,
        expansion: float = 0.5,
        activation: Optional[ActLayer] = None,
        **kwargs: Any,
) -> CspBackbone:
    """The tutorial's network, under its own arguments beside timm's.

    Args:
        pretrained: Not possible without a file: there are no weights to download.
        stem_channels: Channels behind the first convolution.
        stage_channels: Channels of the stages, 2 to 6 of them; the first is at stride 2, each other halves the map.
        num_bottlenecks_per_stage: Blocks of each stage.
        shortcut: Add the input of each block.
        expansion: Channels within a block, as a fraction of those around it.
        activation: Activation, a class or timm's name; SiLU by default.
        **kwargs: timm's.

    Returns:
        The model.

    Raises:
        ValueError: If the stages' channels and numbers of blocks are not equally many.
    """
    if len(stage_channels) != len(num_bottlenecks_per_stage):
        raise ValueError(
            f'stage_channels={tuple(stage_channels)} and num_bottlenecks_per_stage={tuple(num_bottlenecks_per_stage)} '
            'must be equally long.'
        )
    levels = []
    for i, (chs, depth) in enumerate(zip(stage_channels, num_bottlenecks_per_stage)):
        build = partial(_level if i else partial(_first_level, stem_chs=stem_channels), out_chs=chs, depth=depth)
        levels.append(Level(partial(build, shortcut=shortcut, expansion=expansion), chs, depth=depth))
    if activation is not None:
        kwargs.setdefault('act_layer', activation)
    cfg = BackboneCfg(levels=tuple(levels), convert=NAMING.convert)
    return build_backbone('cspnet_tutorial', pretrained, cfg, **kwargs)
