"""The plain networks that the paper's are compared with, as Darknet cfgs define them.

ResNet-50 and ResNeXt-50 have no projection shortcuts (a strided block's input is sampled and added to the first
channels), a 2×2 pool and leaky ReLU of slope 0.1; timm and torchvision have other ones. MobileNetV2 is in
``mobilenetv2.py``.

Paper: `CSPNet: A New Backbone that can Enhance Learning Capability of CNN`, https://arxiv.org/abs/1911.11929
Cfgs: https://github.com/WongKinYiu/CrossStagePartialNetworks
Weights: https://pjreddie.com/darknet/imagenet
"""
from collections import OrderedDict
from functools import partial
from typing import Any, List, Optional, Tuple

import torch.nn as nn

from ..backbone import CspBackbone, Level, LevelArgs
from ..blocks import BottleneckBlock, DarkBlock
from ..layers import ConvNormAct, down_pool
from ._builder import describe_weights, register_model, web
from ._darknet import PJREDDIE, build_darknet, darknet_cfg, register_darknet

__all__: List[str] = []


def _res_stem(in_chans: int, args: LevelArgs) -> nn.Module:
    return ConvNormAct(in_chans, 64, 7, stride=args.stride, **args.layers)


def _res_layer(
        in_chs: int,
        args: LevelArgs,
        out_chs: int,
        depth: int,
        bottle_ratio: float,
        groups: int,
        first: bool,
) -> nn.Module:
    stride, dilation = (1, args.dilation) if first else (args.stride, args.first_dilation)
    blocks = [BottleneckBlock(
        in_chs, out_chs, bottle_ratio=bottle_ratio, groups=groups, stride=stride,
        **{**args.block_kwargs(0), 'dilation': dilation},
    )]
    for i in range(1, depth):
        blocks.append(BottleneckBlock(
            out_chs, out_chs, bottle_ratio=bottle_ratio, groups=groups, **args.block_kwargs(i)))
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if first:
        layers['pool'] = down_pool(args.stride, args.first_dilation)
    layers['blocks'] = nn.Sequential(*blocks)
    return nn.Sequential(layers)


def _res_levels(bottle_ratio: float, groups: int) -> Tuple[Level, ...]:
    levels = [Level(_res_stem, 64)]
    for i, (chs, depth) in enumerate(zip((256, 512, 1024, 2048), (3, 4, 6, 3))):
        levels.append(Level(partial(
            _res_layer, out_chs=chs, depth=depth, bottle_ratio=bottle_ratio, groups=groups, first=i == 0,
        ), chs, depth=depth))
    return tuple(levels)


def _dark_layer(in_chs: int, args: LevelArgs, out_chs: int, depth: int, stem_chs: Optional[int]) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if stem_chs is not None:
        layers['conv1'] = ConvNormAct(in_chs, stem_chs, 3, **args.layers)
        in_chs = stem_chs
    layers['down'] = ConvNormAct(
        in_chs, out_chs, 3, stride=args.stride, dilation=args.first_dilation, **args.layers)
    layers['blocks'] = nn.Sequential(*[
        DarkBlock(out_chs, out_chs, bottle_ratio=0.5, **args.block_kwargs(i)) for i in range(depth)])
    return nn.Sequential(layers)


def _dark_levels() -> Tuple[Level, ...]:
    levels = []
    for i, (chs, depth) in enumerate(zip((64, 128, 256, 512, 1024), (1, 2, 8, 8, 4))):
        build = partial(_dark_layer, out_chs=chs, depth=depth, stem_chs=None if i else 32)
        levels.append(Level(build, chs, depth=depth))
    return tuple(levels)


def _cfg(name: str, top1: float, top5: float, **kwargs: Any) -> Any:
    return darknet_cfg(
        [web(f'https://data.pjreddie.com/files/{name}.weights'),  # where the address below redirects to since 2025
         web(f'https://pjreddie.com/media/files/{name}.weights')],
        top1, top5, license=PJREDDIE, source='Joseph Redmon, https://pjreddie.com/darknet/imagenet',
        paper_ids=None, paper_name=None, **kwargs,
    )


default_cfgs = describe_weights({
    'cspnet_plain_resnet50.in1k': _cfg('resnet50', 75.8, 92.9),
    'cspnet_plain_resnext50.in1k': _cfg('resnext50', 77.8, 94.2),
    'cspnet_plain_darknet53.in1k': _cfg('darknet53', 77.2, 93.8, first_conv='stem.conv1.conv'),
})


@register_model
def cspnet_plain_resnet50(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Darknet's ResNet-50, without projection shortcuts."""
    return build_darknet('cspnet_plain_resnet50', pretrained, _res_levels(0.25, groups=1), **kwargs)


@register_model
def cspnet_plain_resnext50(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Darknet's ResNeXt-50 of 32 groups, without projection shortcuts."""
    return build_darknet('cspnet_plain_resnext50', pretrained, _res_levels(0.5, groups=32), **kwargs)


@register_model
def cspnet_plain_darknet53(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Darknet-53."""
    return build_darknet('cspnet_plain_darknet53', pretrained, _dark_levels(), **kwargs)


register_darknet(cspnet_plain_resnet50, cspnet_plain_resnext50, cspnet_plain_darknet53)
