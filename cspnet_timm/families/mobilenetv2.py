"""CSPMobileNetV2 and the MobileNetV2 beside it, as the Darknet cfgs of the paper's author define them.

Papers: `CSPNet: A New Backbone that can Enhance Learning Capability of CNN`, https://arxiv.org/abs/1911.11929;
`MobileNetV2: Inverted Residuals and Linear Bottlenecks`, https://arxiv.org/abs/1801.04381
Cfgs and weights: https://github.com/WongKinYiu/CrossStagePartialNetworks
"""
from collections import OrderedDict
from functools import partial
from itertools import pairwise
from typing import Any, List, Optional, Tuple

import torch.nn as nn

from ..backbone import CspBackbone, Level, LevelArgs
from ..blocks import InvertedResidual
from ..cross_stage import ComposedStage
from ..layers import ConvNormAct
from ._builder import by_hand, describe_weights, register_model
from ._darknet import build_darknet, darknet_cfg, drive, register_darknet

__all__: List[str] = []


def _mobile_layer(in_chs: int, args: LevelArgs, block_chs: Tuple[int, ...], out_chs: int) -> nn.Module:
    # No 1×1 in front of the branches: each begins with a depthwise convolution that strides. Where a MobileNetV2 block
    # widens its channels six times by the 1×1, these do it three times there and twice by the depthwise convolution.
    first: Any = dict(dilation=args.first_dilation, stride=args.stride)
    blocks = [InvertedResidual(in_chs, block_chs[0], depth_multiplier=2, **{**args.block_kwargs(0), **first})]
    for i, (before, after) in enumerate(pairwise(block_chs)):
        blocks.append(InvertedResidual(before, after, 3 * before, depth_multiplier=2, **args.block_kwargs(i + 1)))
    return ComposedStage(
        blocks=nn.Sequential(*blocks),
        bypass=ConvNormAct(in_chs, in_chs, 3, groups=in_chs, **first, **args.layers),
        merge=ConvNormAct(block_chs[-1] + in_chs, out_chs, **args.layers),
    )


def _mobile_stem(in_chans: int, args: LevelArgs) -> nn.Module:
    return nn.Sequential(OrderedDict(
        conv1=ConvNormAct(in_chans, 32, 3, stride=args.stride, **args.layers),
        csp=ComposedStage(
            blocks=nn.Sequential(InvertedResidual(32, 16, 32, **args.block_kwargs(0))),
            bypass=ConvNormAct(32, 16, 3, groups=16, **args.layers),
            merge=ConvNormAct(32, 48, **args.layers),
        ),
    ))


def _mobile_levels() -> Tuple[Level, ...]:
    table = (
        ((24, 24), 72),
        ((32, 32, 32, 64, 64, 64, 64), 192),
        ((96, 96, 96), 288),
        ((160, 160, 160, 320), 640),
    )
    return (Level(_mobile_stem, 48, depth=1),) + tuple(
        Level(partial(_mobile_layer, block_chs=chs, out_chs=out), out, depth=len(chs)) for chs, out in table)


def _plain_layer(
        in_chs: int,
        args: LevelArgs,
        block_chs: Tuple[int, ...],
        expansion: int = 6,
        last_chs: Optional[int] = None,
) -> nn.Module:
    first: Any = dict(dilation=args.first_dilation, stride=args.stride)
    chs = (in_chs,) + block_chs
    blocks = nn.Sequential(*[
        InvertedResidual(
            before, after, expansion * before, **{**args.block_kwargs(i), **({} if i else first)})
        for i, (before, after) in enumerate(pairwise(chs))
    ])
    layers: OrderedDict[str, nn.Module] = OrderedDict(blocks=blocks)
    if last_chs is not None:
        layers['conv'] = ConvNormAct(block_chs[-1], last_chs, **args.layers)
    return nn.Sequential(layers)


def _plain_stem(in_chans: int, args: LevelArgs) -> nn.Module:
    return nn.Sequential(OrderedDict(
        conv1=ConvNormAct(in_chans, 32, 3, stride=args.stride, **args.layers),
        blocks=nn.Sequential(InvertedResidual(32, 16, 32, **args.block_kwargs(0))),
    ))


def _plain_levels() -> Tuple[Level, ...]:
    table = (((24, 24), None), ((32, 32, 32, 64, 64, 64, 64), None), ((96, 96, 96), None), ((160, 160, 160, 320), 1280))
    return (Level(_plain_stem, 16, depth=1),) + tuple(
        Level(partial(_plain_layer, block_chs=chs, last_chs=last), last or chs[-1], depth=len(chs))
        for chs, last in table
    )


_cfg = partial(darknet_cfg, size=224, first_conv='stem.conv1.conv')

default_cfgs = describe_weights({
    'cspnet_mobilenetv2.in1k': _cfg(
        [by_hand(
            'https://github.com/WongKinYiu/CrossStagePartialNetworks/blob/master/weight/csmobilenet-v2_final.weights',
            filename='csmobilenet-v2_final.weights')],
        67.7, 88.3),
    'cspnet_plain_mobilenetv2.in1k': _cfg(
        [drive('1lW87XQtZIYKIqu8DHvJwBUupJBh4Zpdl', 'mobilenet-v2_final.weights')], 67.0, 87.7),
})


@register_model
def cspnet_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPMobileNetV2: the bypass of each stage is a depthwise convolution that strides, and nothing precedes it."""
    return build_darknet('cspnet_mobilenetv2', pretrained, _mobile_levels(), cfg_act=nn.ReLU, **kwargs)


@register_model
def cspnet_plain_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """The MobileNetV2 that CSPMobileNetV2 is compared with: ReLU, an expansion in the first block, a late stride."""
    return build_darknet('cspnet_plain_mobilenetv2', pretrained, _plain_levels(), cfg_act=nn.ReLU, **kwargs)


register_darknet(cspnet_mobilenetv2, cspnet_plain_mobilenetv2)
