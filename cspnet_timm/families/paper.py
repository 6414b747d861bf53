"""The paper's networks as their author's Darknet cfgs define them, for the weights that he released.

timm's ``cspresnet50``, ``cspresnext50`` and ``cspdarknet53`` are other networks: what differs is listed in
``docs/paper.md``. The suffixes are ``_elastic`` for blocks that work on half their channels at half the resolution, and
``_mish`` for Mish in place of the leaky ReLU ("omega"). Both branches of a stage get a 1×1 convolution of the whole
input. CSPMobileNetV2 is in ``mobilenetv2.py``.

Paper: `CSPNet: A New Backbone that can Enhance Learning Capability of CNN`, https://arxiv.org/abs/1911.11929
Cfgs and weights: https://github.com/WongKinYiu/CrossStagePartialNetworks
"""
from collections import OrderedDict
from functools import partial
from typing import Any, Callable, List, Optional, Tuple

import torch.nn as nn

from ..backbone import CspBackbone, Level, LevelArgs
from ..blocks import BottleneckBlock, DarkBlock, ElasticBlock
from ..checkpoints.darknet import Layout
from ..cross_stage import ComposedStage, CrossStage
from ..layers import ConvNormAct, down_pool
from ._builder import by_hand, describe_weights, register_model, register_pan
from ._darknet import (
    build_darknet,
    darknet_cfg,
    detector_cfg,
    drive,
    file_order,
    pan_layout,
    register_darknet,
    spp_pan_neck,
    spp_pan_tail,
    yolov4_cfg,
)
from ._weights import with_pan

__all__: List[str] = []

Block = Callable[[int, int, LevelArgs, int], nn.Module]  # in_chs, out_chs, args and the block's index


def _bottle_block(in_chs: int, chs: int, args: LevelArgs, i: int, bottle_ratio: float, groups: int) -> nn.Module:
    return BottleneckBlock(in_chs, chs, bottle_ratio=bottle_ratio, groups=groups, **args.block_kwargs(i))


def _elastic_bottle_block(in_chs: int, chs: int, args: LevelArgs, i: int, groups: int) -> nn.Module:
    kwargs = {**args.block_kwargs(i), 'drop_path': 0.}
    return ElasticBlock(
        chs,
        block=lambda half: BottleneckBlock(half, half, bottle_ratio=1., groups=groups, shortcut=False, **kwargs),
        act_layer=args.layers['act_layer'],
        drop_path=args.drop_path[i],
    )


def _elastic_dark_block(chs: int, args: LevelArgs, i: int) -> nn.Module:
    kwargs = {**args.block_kwargs(i), 'drop_path': 0.}
    return ElasticBlock(
        chs, block=lambda half: DarkBlock(half, half, shortcut=False, **kwargs), drop_path=args.drop_path[i])


def _res_layer(
        in_chs: int,
        args: LevelArgs,
        chs: int,
        out_chs: int,
        depth: int,
        block: Block,
        groups: int,
        entry_chs: int,
        linear: bool,
        first: bool,
) -> nn.Module:
    act_layer = args.layers['act_layer']
    kwargs = {**args.layers, 'act_layer': None if linear else act_layer}
    down = down_pool(args.stride, args.first_dilation) if first else ConvNormAct(
        in_chs, in_chs, 3, stride=args.stride, dilation=args.first_dilation, groups=groups, **args.layers)
    return nn.Sequential(OrderedDict(
        down=down,
        csp=ComposedStage(
            entry=ConvNormAct(in_chs, entry_chs, **kwargs),
            bypass=ConvNormAct(in_chs, chs, **kwargs),
            blocks=nn.Sequential(*[block(chs if i else entry_chs, chs, args, i) for i in range(depth)]),
            transition=ConvNormAct(chs, chs, **args.layers),
            merge=ConvNormAct(2 * chs, out_chs, **args.layers),
        ),
    ))


def _res_levels(
        out_chs: Tuple[int, ...],
        block: Block,
        groups: int = 1,
        first_entry_chs: int = 64,
) -> Tuple[Level, ...]:
    """CSPResNe(X)t-50: the first stage's entry may be narrower than its blocks, two stages' partitions are linear."""
    levels = [Level(lambda chs, args: ConvNormAct(chs, 64, 7, stride=args.stride, **args.layers), 64)]
    for i, (chs, out, depth) in enumerate(zip((128, 256, 512, 1024), out_chs, (3, 3, 5, 2))):
        levels.append(Level(partial(
            _res_layer, chs=chs, out_chs=out, depth=depth, block=block, groups=groups,
            entry_chs=chs if i else first_entry_chs, linear=i in (1, 2), first=i == 0,
        ), out, depth=depth))
    return tuple(levels)


def _dark_layer(
        in_chs: int,
        args: LevelArgs,
        out_chs: int,
        depth: int,
        elastic: bool,
        stem_chs: Optional[int] = None,
) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if stem_chs is not None:
        layers['conv1'] = ConvNormAct(in_chs, stem_chs, 3, **args.layers)
        in_chs = stem_chs
    layers['down'] = ConvNormAct(
        in_chs, out_chs, 3, stride=args.stride, dilation=args.first_dilation, **args.layers)
    # The first stage does not halve the channels: each branch has all of them, and only its block is a bottleneck.
    full_width = stem_chs is not None
    layers['csp'] = CrossStage(
        out_chs, out_chs,
        blocks=lambda chs: nn.Sequential(*[
            _elastic_dark_block(chs, args, i) if elastic
            else DarkBlock(chs, chs, bottle_ratio=0.5 if full_width else 1., **args.block_kwargs(i))
            for i in range(depth)
        ]),
        hidden_chs=2 * out_chs if full_width else out_chs,
        fusion='csp',
        **args.layers,
    )
    return nn.Sequential(layers)


def _dark_levels(elastic: bool = False) -> Tuple[Level, ...]:
    """CSPDarknet-53, whose first stage is part of the stem."""
    levels = []
    for i, (chs, depth) in enumerate(zip((64, 128, 256, 512, 1024), (1, 2, 8, 8, 4))):
        build = partial(_dark_layer, out_chs=chs, depth=depth, elastic=elastic, stem_chs=None if i else 32)
        levels.append(Level(build, chs, depth=depth))
    return tuple(levels)


def _resnet(variant: str, pretrained: bool, **kwargs: Any) -> CspBackbone:
    block = partial(_bottle_block, bottle_ratio=0.5, groups=1)
    return build_darknet(variant, pretrained, _res_levels((128, 256, 512, 1024), block), **kwargs)


def _resnext(variant: str, pretrained: bool, **kwargs: Any) -> CspBackbone:
    block = partial(_bottle_block, bottle_ratio=1., groups=32)
    return build_darknet(variant, pretrained, _res_levels((256, 512, 1024, 2048), block, groups=32), **kwargs)


_PAN_TAIL = spp_pan_tail('cspnet_resnext50', (512, 1024, 2048))  # of CSResNeXt50-PANet-SPP


def _create_pan(variant: str, pretrained: bool, **kwargs: Any) -> CspBackbone:
    return _resnext(
        variant, pretrained, cfg_eps=1e-5, neck=spp_pan_neck(), layout=pan_layout(_PAN_TAIL), **kwargs)


_dark_cfg = partial(darknet_cfg, first_conv='stem.conv1.conv')

# The tags coco are of detectors, whose batch norms Darknet computes with another epsilon: the variances are converted
# when they load. The default, *, stands behind the tag that timm can download and would make the default otherwise.
default_cfgs = describe_weights(with_pan({
    'cspnet_resnet50.in1k': darknet_cfg(
        [drive('1pNU6DctLlf3mnJI-opZL6kCx_hSNsEKj', 'csresnet50_final.weights')], 76.6, 93.3),
    'cspnet_resnet50.gamma_in1k': darknet_cfg(
        [drive('1odn6LJBCEhu7f3i5O67f6deXefM3GAav', 'csresnet50-gamma_final.weights')], 77.1, 94.1),
    'cspnet_resnet50_mish.omega_in1k': darknet_cfg(
        [drive('1KXl3wD0MSGMOM-PxoZ8fxTw77mO68VMS', 'csresnet50-omega_final.weights')], 78.1, 94.2),
    'cspnet_resnet50_elastic.in1k': darknet_cfg(
        [drive('1IOc96Y-qH-n5hkJ7mEynP5U_aKyE8oke', 'csresnet50-elastic_final.weights')], 76.8, 93.5),
    'cspnet_resnext50.in1k': darknet_cfg(
        [drive('1IxKu5lAYCo4UpzAl5pOBIDAvC843vjn1', 'csresnext50_final.weights')], 77.9, 94.0),
    'cspnet_resnext50.gamma_in1k': darknet_cfg(
        [drive('1pm_zwf4e0kuShiRz9AW2GJV22Jjc1xjW', 'csresnext50-gamma_final.weights')], 78.5, 94.8),
    'cspnet_resnext50_mish.omega_in1k': darknet_cfg(
        [drive('1yb-ZkmzBhO5_wNv-MyQy01jWo_uizLVY', 'csresnext50-omega_final.weights')], 79.8, 95.2),
    'cspnet_resnext50_elastic.in1k': darknet_cfg(
        [drive('134irBbpEnfPGE7NzorRqjukCt59GxeQ2', 'csresnext50-elastic_final.weights')], 77.2, 93.8),
    'cspnet_darknet53.in1k': _dark_cfg(
        [drive('1dZJIxngmFpQJvsa6y7XADfSxkXCjJTzp', 'csdarknet53_final.weights')], 77.2, 93.6),
    'cspnet_darknet53.gamma_in1k': _dark_cfg(
        [drive('1AaOqYpoyZWRre3i64VU6zOMGomek64Qa', 'csdarknet53-gamma_final.weights')], 77.8, 94.4),
    'cspnet_darknet53_mish.coco': yolov4_cfg(),
    'cspnet_darknet53_mish.omega_in1k*': _dark_cfg(
        [drive('1TfEaUO69MhkHJSDUf5Gc2ENK1BA8Qu1B', 'csdarknet53-omega_final.weights')], 78.7, 94.8),
    'cspnet_darknet53_elastic.in1k': _dark_cfg(
        [drive('1XlHOBSvLHj1iCCBTgbwauekN_Kf6N-Qa', 'csdarknet53-elastic_final.weights')], 76.1, 93.3),
    'cspnet_resnext50.coco': detector_cfg(
        [by_hand('https://github.com/AlexeyAB/darknet',
                 filename='csresnext50-panet-spp-original-optimal_final.weights')],
        letterbox=False, size=608, ap=43.2, ap50=65.4, first_conv='stem.conv'),
}, (
    'cspnet_resnext50_pan.coco',
)))  # the neck behind cspnet_darknet53_mish is that of cspnet_yolov4_pan


@register_model
def cspnet_resnet50(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPResNet-50: stages of 3, 3, 5 and 2 bottleneck blocks, the first of them with a partial residual."""
    return _resnet('cspnet_resnet50', pretrained, **kwargs)


@register_model
def cspnet_resnet50_mish(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPResNet-50 with Mish, the "omega" network."""
    return _resnet('cspnet_resnet50_mish', pretrained, cfg_act=nn.Mish, **kwargs)


@register_model
def cspnet_resnet50_elastic(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPResNet-50 whose blocks work on half their channels at half the resolution."""
    block = partial(_elastic_bottle_block, groups=1)
    levels = _res_levels((128, 256, 512, 1024), block, first_entry_chs=128)
    return build_darknet('cspnet_resnet50_elastic', pretrained, levels, **kwargs)


@register_model
def cspnet_resnext50(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPResNeXt-50: 32 groups and no bottleneck, since half the channels enter the blocks."""
    layout = Layout(file_order, tails=(_PAN_TAIL,))
    return _resnext('cspnet_resnext50', pretrained, layout=layout, **kwargs)


@register_model
def cspnet_resnext50_mish(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPResNeXt-50 with Mish, the "omega" network."""
    return _resnext('cspnet_resnext50_mish', pretrained, cfg_act=nn.Mish, **kwargs)


@register_model
def cspnet_resnext50_elastic(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPResNeXt-50 whose blocks work on half their channels at half the resolution."""
    block = partial(_elastic_bottle_block, groups=16)
    levels = _res_levels((256, 512, 1024, 2048), block, groups=32, first_entry_chs=128)
    return build_darknet('cspnet_resnext50_elastic', pretrained, levels, **kwargs)


@register_model
def cspnet_darknet53(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPDarknet-53: stages of 1, 2, 8, 8 and 4 blocks."""
    return build_darknet('cspnet_darknet53', pretrained, _dark_levels(), **kwargs)


@register_model
def cspnet_darknet53_mish(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPDarknet-53 with Mish, the "omega" network."""
    layout = Layout(file_order, tails=(spp_pan_tail('cspnet_yolov4', (256, 512, 1024)),))
    return build_darknet(
        'cspnet_darknet53_mish', pretrained, _dark_levels(), cfg_act=nn.Mish, layout=layout, **kwargs)


@register_model
def cspnet_darknet53_elastic(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPDarknet-53 whose blocks work on half their channels at half the resolution."""
    return build_darknet('cspnet_darknet53_elastic', pretrained, _dark_levels(elastic=True), **kwargs)


cspnet_resnext50_pan = register_pan('cspnet_resnext50_pan', _create_pan)

register_darknet(
    cspnet_resnet50, cspnet_resnet50_mish, cspnet_resnet50_elastic,
    cspnet_resnext50, cspnet_resnext50_mish, cspnet_resnext50_elastic,
    cspnet_darknet53, cspnet_darknet53_mish, cspnet_darknet53_elastic,
)
