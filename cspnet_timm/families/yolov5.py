"""The backbones of YOLOv5 v6: of its detectors, and of its ImageNet classifiers (``_cls``).

A 6×6 convolution of stride 2, then four times a 3×3 convolution of stride 2 and a cross stage of Darknet's blocks, one
1×1 convolution per branch and one to merge (C3). A detector's backbone ends with an SPP; a classifier has none, and a
1×1 convolution to 1280 channels before it pools.

Built from the published structure; the authors' code and weights are under AGPL-3.0, and none of either is here.
"""
from functools import partial
from typing import Any

import torch.nn as nn

from ..backbone import BackboneCfg, CspBackbone, LevelArgs
from ..blocks import DarkBlock
from ..cross_stage import CrossStage
from ..layers import ConvHead
from ._builder import build_backbone, describe_weights, register_model, register_pan
from ._neck import reducing_neck
from ._weights import with_pan
from ._yolo import NAMING, classifier_cfg, detector_cfg, scale_width, yolo_levels

__all__ = []

SIZES = {  # width, depth
    'n': (0.25, 0.33),
    's': (0.5, 0.33),
    'm': (0.75, 0.67),
    'l': (1., 1.),
    'x': (1.25, 1.33),
}


def _cross_stage(in_chs: int, out_chs: int, args: LevelArgs, depth: int, shortcut: bool = True) -> nn.Module:
    return CrossStage(
        in_chs, out_chs,
        blocks=lambda c: nn.Sequential(*[
            DarkBlock(c, c, shortcut=shortcut, **args.block_kwargs(i)) for i in range(depth)]),
        fusion='first',
        **args.layers,
    )


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CspBackbone:
    name, _, form = variant.removeprefix('cspnet_yolov5').partition('_')
    width, depth = SIZES[name]
    widths = [scale_width(c, width) for c in (64, 128, 256, 512, 1024)]
    depths = [max(round(n * depth), 1) for n in (3, 6, 9, 3)]
    cfg = BackboneCfg(
        yolo_levels(6, widths, depths, _cross_stage, pool=form != 'cls'), bn_eps=1e-3, bn_momentum=0.03,
        head=ConvHead if form == 'cls' else None, convert=NAMING.convert,
        neck=reducing_neck(
            widths[2:], partial(_cross_stage, depth=depths[0], shortcut=False)) if form == 'pan' else None)
    return build_backbone(variant, pretrained, cfg, **kwargs)


_URL = 'https://github.com/ultralytics/yolov5/releases/download/v7.0'

default_cfgs = describe_weights(with_pan({
    'cspnet_yolov5n.coco': detector_cfg(f'{_URL}/yolov5n.pt', 28.0),
    'cspnet_yolov5s.coco': detector_cfg(f'{_URL}/yolov5s.pt', 37.4),
    'cspnet_yolov5m.coco': detector_cfg(f'{_URL}/yolov5m.pt', 45.4),
    'cspnet_yolov5l.coco': detector_cfg(f'{_URL}/yolov5l.pt', 49.0),
    'cspnet_yolov5x.coco': detector_cfg(f'{_URL}/yolov5x.pt', 50.7),
    'cspnet_yolov5n_cls.in1k': classifier_cfg(f'{_URL}/yolov5n-cls.pt', 64.6, 85.4, imagenet_norm=True),
    'cspnet_yolov5s_cls.in1k': classifier_cfg(f'{_URL}/yolov5s-cls.pt', 71.5, 90.2, imagenet_norm=True),
    'cspnet_yolov5m_cls.in1k': classifier_cfg(f'{_URL}/yolov5m-cls.pt', 75.9, 92.9, imagenet_norm=True),
    'cspnet_yolov5l_cls.in1k': classifier_cfg(f'{_URL}/yolov5l-cls.pt', 78.0, 94.0, imagenet_norm=True),
    'cspnet_yolov5x_cls.in1k': classifier_cfg(f'{_URL}/yolov5x-cls.pt', 79.0, 94.4, imagenet_norm=True),
}, (
    'cspnet_yolov5n_pan.coco', 'cspnet_yolov5s_pan.coco', 'cspnet_yolov5m_pan.coco', 'cspnet_yolov5l_pan.coco',
    'cspnet_yolov5x_pan.coco',
)))


@register_model
def cspnet_yolov5n(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """A quarter of the large network's width, a third of its depth."""
    return _create('cspnet_yolov5n', pretrained, **kwargs)


@register_model
def cspnet_yolov5s(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Half the large network's width, a third of its depth."""
    return _create('cspnet_yolov5s', pretrained, **kwargs)


@register_model
def cspnet_yolov5m(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Three quarters of the large network's width, two thirds of its depth."""
    return _create('cspnet_yolov5m', pretrained, **kwargs)


@register_model
def cspnet_yolov5l(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 64 to 1024, 3, 6, 9 and 3 blocks."""
    return _create('cspnet_yolov5l', pretrained, **kwargs)


@register_model
def cspnet_yolov5x(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """1.25 times the large network's width, 1.33 times its depth."""
    return _create('cspnet_yolov5x', pretrained, **kwargs)


@register_model
def cspnet_yolov5n_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """A quarter of the large network's width, a third of its depth, as a classifier."""
    return _create('cspnet_yolov5n_cls', pretrained, **kwargs)


@register_model
def cspnet_yolov5s_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Half the large network's width, a third of its depth, as a classifier."""
    return _create('cspnet_yolov5s_cls', pretrained, **kwargs)


@register_model
def cspnet_yolov5m_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Three quarters of the large network's width, two thirds of its depth, as a classifier."""
    return _create('cspnet_yolov5m_cls', pretrained, **kwargs)


@register_model
def cspnet_yolov5l_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 64 to 1024, 3, 6, 9 and 3 blocks, as a classifier."""
    return _create('cspnet_yolov5l_cls', pretrained, **kwargs)


@register_model
def cspnet_yolov5x_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """1.25 times the large network's width, 1.33 times its depth, as a classifier."""
    return _create('cspnet_yolov5x_cls', pretrained, **kwargs)


cspnet_yolov5n_pan = register_pan('cspnet_yolov5n_pan', _create)
cspnet_yolov5s_pan = register_pan('cspnet_yolov5s_pan', _create)
cspnet_yolov5m_pan = register_pan('cspnet_yolov5m_pan', _create)
cspnet_yolov5l_pan = register_pan('cspnet_yolov5l_pan', _create)
cspnet_yolov5x_pan = register_pan('cspnet_yolov5x_pan', _create)
