"""The backbones of YOLOv4 and Scaled-YOLOv4, also with their necks, as the Darknet cfgs of the detectors define them.

CSPDarknet in several widths and depths: a 3×3 convolution of stride 2, then a cross stage of Darknet's blocks with a
1×1 convolution behind them and one behind the concatenation. CSP and x begin with a plain residual block in place of
the first cross stage; P5 and P6 are deeper, and P6 goes on to stride 64. The SPP belongs to the detectors' necks.

``cspnet_yolov4`` is ``cspnet_darknet53_mish`` of ``paper.py``, convolution for convolution, with the epsilon that
Darknet has had since. YOLOv4-tiny is another network: its cross stages split the channels, the whole map bypasses
them, and nothing merges; 2×2 pools halve its maps.

A detector's ``.weights`` file begins with its backbone. The convolutions that detect, whose length depends on the
number of classes, stand between those of the neck that follow, or behind them; all is described here, so that a file is
known by its length.

Papers: `YOLOv4: Optimal Speed and Accuracy of Object Detection`, https://arxiv.org/abs/2004.10934;
`Scaled-YOLOv4: Scaling Cross Stage Partial Network`, https://arxiv.org/abs/2011.08036
Cfgs and weights: https://github.com/AlexeyAB/darknet
"""
from collections import OrderedDict
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn as nn

from ..backbone import CspBackbone, Level, LevelArgs, Neck
from ..blocks import ConcatOutputs, DarkBlock
from ..checkpoints.darknet import DetectionConv, FileConv, Layout, Tail
from ..cross_stage import ComposedStage, CrossStage
from ..layers import ChannelSlice, ConvNormAct, SpatialPyramidPool, down_pool
from ..naming import register_foreign_project, roll_channels
from ..neck import PathAggregation, TopDown
from ._builder import License, describe_weights, register_model, register_pan, web
from ._darknet import (
    ALEXEYAB,
    LEAKY,
    backbone_order,
    build_darknet,
    detector_cfg,
    neck_order,
    pan_layout,
    register_darknet,
    spp_pan_neck,
    spp_pan_tail,
    yolov4_cfg,
)
from ._neck import lateral_neck
from ._weights import with_pan

__all__: List[str] = []

BN_EPS = 1e-5
STEM_CHS = 32


class Size(NamedTuple):
    """One network of the CSPDarknet form, and the neck behind it in its detector's file."""

    act_layer: Any
    chs: Tuple[int, ...]  # at the strides 2, 4, 8 …
    depths: Tuple[int, ...]
    first_chs: Optional[int]  # of each branch of the first cross stage; None for a plain residual block in its place
    neck_depth: int = 0  # blocks of each stage of the neck, which has cross stages too
    neck_chs: Tuple[int, ...] = (128, 256, 512)
    anchors: int = 3
    heads_last: bool = False  # whether all heads stand at the file's end, or each behind its level


SIZES = {
    'cspnet_yolov4': Size(nn.Mish, (64, 128, 256, 512, 1024), (1, 2, 8, 8, 4), 64),
    'cspnet_yolov4_csp': Size(nn.Mish, (64, 128, 256, 512, 1024), (1, 2, 8, 8, 4), None, 2),
    'cspnet_yolov4_csp_swish': Size(nn.SiLU, (64, 128, 256, 512, 1024), (1, 2, 8, 8, 4), None, 2, heads_last=True),
    'cspnet_yolov4_x_mish': Size(nn.Mish, (80, 160, 320, 640, 1280), (1, 3, 10, 10, 5), None, 3, (160, 320, 640)),
    'cspnet_yolov4_csp_x_swish': Size(
        nn.SiLU, (80, 160, 320, 640, 1280), (1, 3, 10, 10, 5), None, 3, (160, 320, 640), heads_last=True),
    'cspnet_yolov4_p5': Size(
        nn.Mish, (64, 128, 256, 512, 1024), (1, 3, 15, 15, 7), 32, 3, anchors=4, heads_last=True),
    'cspnet_yolov4_p6': Size(
        nn.Mish, (64, 128, 256, 512, 1024, 1024), (1, 3, 15, 15, 7, 7), 32, 3, (128, 256, 512, 512), 4,
        heads_last=True),
}
TINY_CHS = (64, 128, 256)  # of the convolutions of each cross stage
TINY_NECK_CHS = (256, 512)


def _level(
        in_chs: int,
        args: LevelArgs,
        out_chs: int,
        depth: int,
        branch_chs: Optional[int],
        stem_chs: Optional[int] = None,
) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if stem_chs is not None:
        layers['conv1'] = ConvNormAct(in_chs, stem_chs, 3, **args.layers)
        in_chs = stem_chs
    layers['down'] = ConvNormAct(in_chs, out_chs, 3, stride=args.stride, dilation=args.first_dilation, **args.layers)
    if branch_chs is None:
        layers['blocks'] = nn.Sequential(*[
            DarkBlock(out_chs, out_chs, bottle_ratio=0.5, **args.block_kwargs(i)) for i in range(depth)])
    else:
        # Only in the first stage is a block's first convolution narrower than its branch, and half a map wide.
        bottle_ratio = 0.5 if branch_chs == out_chs else 1.
        layers['csp'] = CrossStage(
            out_chs, out_chs,
            blocks=lambda chs: nn.Sequential(*[
                DarkBlock(chs, chs, bottle_ratio=bottle_ratio, **args.block_kwargs(i)) for i in range(depth)]),
            hidden_chs=2 * branch_chs,
            fusion='csp',
            **args.layers,
        )
    return nn.Sequential(layers)


def _levels(size: Size) -> Tuple[Level, ...]:
    levels = []
    for i, (chs, depth) in enumerate(zip(size.chs, size.depths)):
        build = partial(
            _level, out_chs=chs, depth=depth, branch_chs=chs // 2 if i else size.first_chs,
            stem_chs=None if i else STEM_CHS)
        levels.append(Level(build, chs, depth=depth))
    return tuple(levels)


def _tiny_stage(chs: int, args: LevelArgs) -> nn.Module:
    """A true split: the blocks get the second half of the channels, and the whole map bypasses them."""
    half = chs // 2
    conv = partial(ConvNormAct, half, half, 3, dilation=args.dilation, drop_layer=args.drop_block, **args.layers)
    return ComposedStage(
        entry=nn.Sequential(OrderedDict(split=ChannelSlice(half, chs), conv=conv())),
        blocks=ConcatOutputs([conv()], out_chs=chs),
        transition=ConvNormAct(chs, chs, **args.layers),
        bypass_first=True,
    )


def _tiny_level(in_chs: int, args: LevelArgs, chs: int, first: bool) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if first:
        layers['down'] = ConvNormAct(
            in_chs, chs, 3, stride=args.stride, dilation=args.first_dilation, **args.layers)
        in_chs = chs
    else:
        layers['down'] = down_pool(args.stride, args.first_dilation)
    layers['conv'] = ConvNormAct(in_chs, chs, 3, dilation=args.dilation, **args.layers)
    layers['csp'] = _tiny_stage(chs, args)
    return nn.Sequential(layers)


def _tiny_last(in_chs: int, args: LevelArgs) -> nn.Module:
    return nn.Sequential(OrderedDict(
        down=down_pool(args.stride, args.first_dilation),
        conv=ConvNormAct(in_chs, in_chs, 3, dilation=args.dilation, drop_layer=args.drop_block, **args.layers),
    ))


def _tiny_levels() -> Tuple[Level, ...]:
    levels = [Level(lambda chs, args: ConvNormAct(chs, STEM_CHS, 3, stride=args.stride, **args.layers), STEM_CHS)]
    levels += [Level(partial(_tiny_level, chs=chs, first=i == 0), 2 * chs) for i, chs in enumerate(TINY_CHS)]
    return (*levels, Level(_tiny_last, 2 * TINY_CHS[-1]))


def _arrange_tiny(state_dict: Dict[str, torch.Tensor]) -> None:
    """The cfg concatenates [second convolution, first] before the transition."""
    for i, chs in enumerate(TINY_CHS, start=1):
        roll_channels(state_dict, f'layer{i}.csp.transition.conv.weight', (1,), chs // 2)


# What follows the backbones in their detectors, and in the detectors' files.


def _neck_stage(in_chs: int, chs: int, args: LevelArgs, depth: int) -> nn.Module:
    """A cross stage whose branches both read a 1×1 convolution, one of them as it is, of blocks without shortcuts."""
    return nn.Sequential(OrderedDict(
        conv=ConvNormAct(in_chs, chs, **args.layers),
        csp=ComposedStage(
            blocks=nn.Sequential(*[DarkBlock(chs, chs, shortcut=False, **args.block_kwargs(i)) for i in range(depth)]),
            bypass=ConvNormAct(chs, chs, **args.layers),
            merge=ConvNormAct(2 * chs, chs, **args.layers),
        ),
    ))


def _neck_top(in_chs: int, chs: int, args: LevelArgs, wide: bool) -> nn.Module:
    """An SPP within a cross stage."""
    blocks: OrderedDict[str, nn.Module] = OrderedDict(
        block1=DarkBlock(chs, chs, kernel_size=(3, 1), shortcut=False, **args.layers),
        spp=SpatialPyramidPool(chs, chs, reduce=False, **args.layers),
        conv=ConvNormAct(chs, chs, 3, **args.layers),
    )
    if wide:
        blocks['block2'] = DarkBlock(chs, chs, shortcut=False, **args.layers)
    return ComposedStage(
        entry=ConvNormAct(in_chs, chs, **args.layers),
        bypass=ConvNormAct(in_chs, chs, **args.layers),
        blocks=nn.Sequential(blocks),
        merge=ConvNormAct(2 * chs, chs, **args.layers),
    )


def _neck(size: Size) -> Neck:
    if not size.neck_depth:
        return spp_pan_neck()
    return lateral_neck(
        size.neck_chs, partial(_neck_stage, depth=size.neck_depth), partial(_neck_top, wide=size.neck_chs[0] > 128))


def _tiny_walk(chs: List[int], args: LevelArgs) -> nn.Module:
    """A way down of one step, which reads the half of a level that its blocks have not concatenated yet."""
    layers = args.layers
    half, fine, coarse = chs[0] // 2, TINY_NECK_CHS[0] // 2, TINY_NECK_CHS[1] // 2
    return PathAggregation(
        [TopDown(
            ConvNormAct(half + fine, 2 * fine, 3, **layers),
            reduce=ConvNormAct(coarse, fine, **layers), lateral=ChannelSlice(half, chs[0]))],
        top=ConvNormAct(chs[-1], coarse, **layers),
        outputs=[nn.Identity(), ConvNormAct(coarse, 2 * coarse, 3, **layers)],
    )


def _csp_neck_stage(in_chs: int, chs: int, depth: int) -> List[FileConv]:
    blocks = [FileConv(chs, chs), FileConv(chs, chs, 3)] * depth
    return [FileConv(in_chs, chs), FileConv(chs, chs), *blocks, FileConv(2 * chs, chs)]


def _csp_pan_tail(network: str, size: Size) -> Tail:
    """An SPP within a cross stage, a pyramid of cross stages without shortcuts, and a 3×3 convolution for each head."""
    h, n = size.neck_chs, size.neck_depth
    deep = h[-1]
    layers: List[Union[FileConv, DetectionConv]] = [
        FileConv(size.chs[-1], deep), FileConv(size.chs[-1], deep), FileConv(deep, deep, 3), FileConv(deep, deep),
        FileConv(4 * deep, deep), FileConv(deep, deep, 3),
    ]
    if size.neck_chs[0] > 128:
        layers += [FileConv(deep, deep), FileConv(deep, deep, 3)]
    layers.append(FileConv(2 * deep, deep))
    laterals = size.chs[2:]
    for i in reversed(range(len(h) - 1)):
        layers += [FileConv(h[i + 1], h[i]), FileConv(laterals[i], h[i]), *_csp_neck_stage(2 * h[i], h[i], n)]
    heads: List[Union[FileConv, DetectionConv]] = []
    for i, chs in enumerate(h):
        if i:
            layers += [FileConv(h[i - 1], chs, 3), *_csp_neck_stage(2 * chs, chs, n)]
        head: List[Union[FileConv, DetectionConv]] = [
            FileConv(chs, 2 * chs, 3), DetectionConv(2 * chs, size.anchors)]
        if size.heads_last:
            heads += head
        else:
            layers += head
    return Tail(network, (*layers, *heads), with_neck=f'{network}_pan')


def _tiny_tails() -> Tuple[Tail, Tail]:
    """Of YOLOv4-tiny, and of its form with a third level."""
    deep = 2 * TINY_CHS[-1]
    tiny = (
        FileConv(deep, 256), FileConv(256, 512, 3), DetectionConv(512, 3),
        FileConv(256, 128), FileConv(128 + 256, 256, 3), DetectionConv(256, 3),
    )
    third = (FileConv(256, 64), FileConv(64 + 128, 128, 3), DetectionConv(128, 3))
    name = 'cspnet_yolov4_tiny'
    return Tail(name, tiny, with_neck=f'{name}_pan'), Tail(name, tiny + third, with_neck=f'{name}_pan')


# Of their authors' networks in PyTorch; the Darknet files are what is read here.
register_foreign_project(
    'ScaledYOLOv4 and PyTorch_YOLOv4 (GPL)', r'module_list\.\d+\.Conv2d\.weight|\d+\.cv[23]\.weight')
register_foreign_project('YOLOv7 (GPL)', r'4\.conv\.weight')


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CspBackbone:
    plain = variant.removesuffix('_pan')
    size = SIZES[plain]
    if size.neck_depth:
        tail = _csp_pan_tail(plain, size)
    else:
        tail = spp_pan_tail(plain, (size.chs[2], size.chs[3], size.chs[4]))
    neck, layout = None, Layout(backbone_order, tails=(tail,))
    if variant != plain:
        neck, layout = _neck(size), pan_layout(tail, size.heads_last)
    return build_darknet(
        variant, pretrained, _levels(size), cfg_act=size.act_layer, cfg_eps=BN_EPS, layout=layout, neck=neck, **kwargs)


def _create_tiny(variant: str, pretrained: bool, **kwargs: Any) -> CspBackbone:
    neck, order = None, None
    if variant.endswith('_pan'):
        neck, order = Neck(_tiny_walk, TINY_NECK_CHS), partial(neck_order, nodes=('top', 'outputs.1', 'top_down'))
    layout = Layout(backbone_order, arrange=_arrange_tiny, tails=_tiny_tails(), neck_order=order)
    return build_darknet(
        variant, pretrained, _tiny_levels(), cfg_act=LEAKY, cfg_eps=BN_EPS, layout=layout, neck=neck, **kwargs)


_RELEASE = 'https://github.com/AlexeyAB/darknet/releases/download/darknet_yolo_v4_pre'
_SCALED = License(
    ALEXEYAB.id, f'{ALEXEYAB.stated_by}; trained, or most likely so, in PyTorch with code under GPL-3.0',
    ALEXEYAB.link, name=ALEXEYAB.name,
)


def _cfg(name: str, num_bytes: int, **kwargs: Any) -> Dict[str, Any]:
    return detector_cfg([web(f'{_RELEASE}/{name}.weights', size=num_bytes)], **{
        'letterbox': True, 'license': _SCALED,
        'paper_ids': 'arXiv:2011.08036', 'paper_name': 'Scaled-YOLOv4: Scaling Cross Stage Partial Network', **kwargs,
    })


default_cfgs = describe_weights(with_pan({
    'cspnet_yolov4.coco': yolov4_cfg(),
    'cspnet_yolov4_tiny.coco': _cfg(
        'yolov4-tiny', 24_251_276, size=416, ap50=40.2, letterbox=False, license=ALEXEYAB, first_conv='stem.conv'),
    'cspnet_yolov4_csp.coco': _cfg('yolov4-csp', 211_944_840, size=640, ap=48.7, ap50=67.4),
    'cspnet_yolov4_csp_swish.coco': _cfg('yolov4-csp-swish', 211_944_840, size=640, ap=50.0, ap50=68.7),
    'cspnet_yolov4_x_mish.coco': _cfg('yolov4x-mish', 399_388_168, size=640, ap=50.1, ap50=68.5),
    'cspnet_yolov4_csp_x_swish.coco': _cfg('yolov4-csp-x-swish', 399_388_168, size=640, ap=51.5, ap50=69.9),
    'cspnet_yolov4_p5.coco': _cfg('yolov4-p5', 283_669_892, size=896, ap=51.6, ap50=70.0),
    'cspnet_yolov4_p6.coco': _cfg('yolov4-p6', 510_868_180, size=1280, stride=64, ap=54.0, ap50=72.1),
}, (
    'cspnet_yolov4_pan.coco', 'cspnet_yolov4_tiny_pan.coco', 'cspnet_yolov4_csp_pan.coco',
    'cspnet_yolov4_csp_swish_pan.coco', 'cspnet_yolov4_x_mish_pan.coco', 'cspnet_yolov4_csp_x_swish_pan.coco',
    'cspnet_yolov4_p5_pan.coco', 'cspnet_yolov4_p6_pan.coco',
)))


@register_model
def cspnet_yolov4(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPDarknet-53 with Mish, the backbone of YOLOv4."""
    return _create('cspnet_yolov4', pretrained, **kwargs)


@register_model
def cspnet_yolov4_tiny(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """The backbone of YOLOv4-tiny: three cross stages that split their channels."""
    return _create_tiny('cspnet_yolov4_tiny', pretrained, **kwargs)


@register_model
def cspnet_yolov4_csp(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """The backbone of YOLOv4-CSP: CSPDarknet-53 whose first stage is a plain residual block, with Mish."""
    return _create('cspnet_yolov4_csp', pretrained, **kwargs)


@register_model
def cspnet_yolov4_csp_swish(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """The backbone of YOLOv4-CSP, with SiLU."""
    return _create('cspnet_yolov4_csp_swish', pretrained, **kwargs)


@register_model
def cspnet_yolov4_x_mish(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """The backbone of YOLOv4x: a quarter wider and deeper than YOLOv4-CSP's, with Mish."""
    return _create('cspnet_yolov4_x_mish', pretrained, **kwargs)


@register_model
def cspnet_yolov4_csp_x_swish(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """The backbone of YOLOv4x, with SiLU."""
    return _create('cspnet_yolov4_csp_x_swish', pretrained, **kwargs)


@register_model
def cspnet_yolov4_p5(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """The backbone of YOLOv4-P5: stages of 1, 3, 15, 15 and 7 blocks, with Mish."""
    return _create('cspnet_yolov4_p5', pretrained, **kwargs)


@register_model
def cspnet_yolov4_p6(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """The backbone of YOLOv4-P6: P5's, and a level at stride 64."""
    return _create('cspnet_yolov4_p6', pretrained, **kwargs)


cspnet_yolov4_pan = register_pan('cspnet_yolov4_pan', _create)
cspnet_yolov4_tiny_pan = register_pan('cspnet_yolov4_tiny_pan', _create_tiny)
cspnet_yolov4_csp_pan = register_pan('cspnet_yolov4_csp_pan', _create)
cspnet_yolov4_csp_swish_pan = register_pan('cspnet_yolov4_csp_swish_pan', _create)
cspnet_yolov4_x_mish_pan = register_pan('cspnet_yolov4_x_mish_pan', _create)
cspnet_yolov4_csp_x_swish_pan = register_pan('cspnet_yolov4_csp_x_swish_pan', _create)
cspnet_yolov4_p5_pan = register_pan('cspnet_yolov4_p5_pan', _create)
cspnet_yolov4_p6_pan = register_pan('cspnet_yolov4_p6_pan', _create)

register_darknet(
    cspnet_yolov4, cspnet_yolov4_tiny, cspnet_yolov4_csp, cspnet_yolov4_csp_swish, cspnet_yolov4_x_mish,
    cspnet_yolov4_csp_x_swish, cspnet_yolov4_p5, cspnet_yolov4_p6,
)
