"""The backbones of YOLOv8: of its detectors, and of its ImageNet classifiers (``_cls``).

A 3×3 convolution of stride 2, then four times another one and a cross stage of two-times-3×3 blocks whose outputs are
all collected (C2f). A detector's backbone ends with an SPP; a classifier has none, and a 1×1 convolution to 1280
channels before it pools. The large detectors' last level is narrower than the classifiers'.

Built from the published structure; the authors' code and weights are under AGPL-3.0, and none of either is here.
"""
from functools import partial
from typing import Any

import torch.nn as nn

from ..backbone import BackboneCfg, CspBackbone, LevelArgs
from ..blocks import ConcatOutputs, DarkBlock
from ..cross_stage import CrossStage
from ..layers import ConvHead
from ._builder import build_backbone, describe_weights, register_model, register_pan
from ._neck import keeping_neck
from ._weights import with_pan
from ._yolo import NAMING, classifier_cfg, detector_cfg, scale_width, yolo_levels

__all__ = []

SIZES = {  # width, depth, widest channels of a detector before scaling
    'n': (0.25, 0.33, 1024),
    's': (0.5, 0.33, 1024),
    'm': (0.75, 0.67, 768),
    'l': (1., 1., 512),
    'x': (1.25, 1., 512),
}


def _cross_stage(in_chs: int, out_chs: int, args: LevelArgs, depth: int, shortcut: bool = True) -> nn.Module:
    return CrossStage(
        in_chs, out_chs,
        blocks=lambda c: ConcatOutputs(
            [DarkBlock(c, c, kernel_size=(3, 3), shortcut=shortcut, **args.block_kwargs(i)) for i in range(depth)],
            out_chs=(1 + depth) * c,
        ),
        fusion='first',
        **args.layers,
    )


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CspBackbone:
    name, _, form = variant.removeprefix('cspnet_yolov8').partition('_')
    width, depth, max_chs = SIZES[name]
    widths = [scale_width(c, width, 1024 if form == 'cls' else max_chs) for c in (64, 128, 256, 512, 1024)]
    depths = [max(round(n * depth), 1) for n in (3, 6, 6, 3)]
    bn_eps, bn_momentum = (1e-5, 0.1) if form == 'cls' else (1e-3, 0.03)
    cfg = BackboneCfg(
        yolo_levels(3, widths, depths, _cross_stage, pool=form != 'cls'), bn_eps=bn_eps, bn_momentum=bn_momentum,
        head=ConvHead if form == 'cls' else None, convert=NAMING.convert,
        neck=keeping_neck(
            widths[2:], partial(_cross_stage, depth=depths[0], shortcut=False)) if form == 'pan' else None)
    return build_backbone(variant, pretrained, cfg, **kwargs)


_URL = 'https://github.com/ultralytics/assets/releases/download/v8.2.0'

default_cfgs = describe_weights(with_pan({
    'cspnet_yolov8n.coco': detector_cfg(f'{_URL}/yolov8n.pt', 37.3),
    'cspnet_yolov8s.coco': detector_cfg(f'{_URL}/yolov8s.pt', 44.9),
    'cspnet_yolov8m.coco': detector_cfg(f'{_URL}/yolov8m.pt', 50.2),
    'cspnet_yolov8l.coco': detector_cfg(f'{_URL}/yolov8l.pt', 52.9),
    'cspnet_yolov8x.coco': detector_cfg(f'{_URL}/yolov8x.pt', 53.9),
    'cspnet_yolov8n_cls.in1k': classifier_cfg(f'{_URL}/yolov8n-cls.pt', 69.0, 88.3),
    'cspnet_yolov8s_cls.in1k': classifier_cfg(f'{_URL}/yolov8s-cls.pt', 73.8, 91.7),
    'cspnet_yolov8m_cls.in1k': classifier_cfg(f'{_URL}/yolov8m-cls.pt', 76.8, 93.5),
    'cspnet_yolov8l_cls.in1k': classifier_cfg(f'{_URL}/yolov8l-cls.pt', 78.3, 94.2),
    'cspnet_yolov8x_cls.in1k': classifier_cfg(f'{_URL}/yolov8x-cls.pt', 79.0, 94.6),
}, (
    'cspnet_yolov8n_pan.coco', 'cspnet_yolov8s_pan.coco', 'cspnet_yolov8m_pan.coco', 'cspnet_yolov8l_pan.coco',
    'cspnet_yolov8x_pan.coco',
)))


@register_model
def cspnet_yolov8n(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """A quarter of the large network's width, a third of its depth."""
    return _create('cspnet_yolov8n', pretrained, **kwargs)


@register_model
def cspnet_yolov8s(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Half the large network's width, a third of its depth."""
    return _create('cspnet_yolov8s', pretrained, **kwargs)


@register_model
def cspnet_yolov8m(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Three quarters of the large network's width, two thirds of its depth."""
    return _create('cspnet_yolov8m', pretrained, **kwargs)


@register_model
def cspnet_yolov8l(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 64 to 512, 3, 6, 6 and 3 blocks."""
    return _create('cspnet_yolov8l', pretrained, **kwargs)


@register_model
def cspnet_yolov8x(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """1.25 times the large network's width, the same depth."""
    return _create('cspnet_yolov8x', pretrained, **kwargs)


@register_model
def cspnet_yolov8n_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """A quarter of the large network's width, a third of its depth, as a classifier."""
    return _create('cspnet_yolov8n_cls', pretrained, **kwargs)


@register_model
def cspnet_yolov8s_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Half the large network's width, a third of its depth, as a classifier."""
    return _create('cspnet_yolov8s_cls', pretrained, **kwargs)


@register_model
def cspnet_yolov8m_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Three quarters of the large network's width, two thirds of its depth, as a classifier."""
    return _create('cspnet_yolov8m_cls', pretrained, **kwargs)


@register_model
def cspnet_yolov8l_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 64 to 1024, 3, 6, 6 and 3 blocks, as a classifier."""
    return _create('cspnet_yolov8l_cls', pretrained, **kwargs)


@register_model
def cspnet_yolov8x_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """1.25 times the large network's width, the same depth, as a classifier."""
    return _create('cspnet_yolov8x_cls', pretrained, **kwargs)


cspnet_yolov8n_pan = register_pan('cspnet_yolov8n_pan', _create)
cspnet_yolov8s_pan = register_pan('cspnet_yolov8s_pan', _create)
cspnet_yolov8m_pan = register_pan('cspnet_yolov8m_pan', _create)
cspnet_yolov8l_pan = register_pan('cspnet_yolov8l_pan', _create)
cspnet_yolov8x_pan = register_pan('cspnet_yolov8x_pan', _create)
