"""The backbones of YOLO26: of its detectors, and of its ImageNet classifiers (``_cls``).

YOLO11's, but for the SPP of the detectors: no activation before the pools, and a shortcut around it. The classifiers,
which have no SPP, are YOLO11's networks with weights of their own.

Built from the published structure; the authors' code and weights are under AGPL-3.0, and none of either is here.
"""
from functools import partial
from typing import Any, List

import torch.nn as nn

from ..backbone import CspBackbone, LevelArgs, Neck
from ..blocks import AttentionBlock, ConcatOutputs, DarkBlock
from ..cross_stage import CrossStage
from ._builder import build_backbone, describe_weights, register_model, register_pan
from ._neck import keeping_neck
from ._weights import with_pan
from ._yolo import classifier_cfg, detector_cfg
from .yolo11 import yolo11_cfg, yolo11_stage

__all__ = []


def _attention_stage(in_chs: int, out_chs: int, args: LevelArgs) -> nn.Module:
    return CrossStage(
        in_chs, out_chs,
        blocks=lambda chs: ConcatOutputs([nn.Sequential(
            DarkBlock(chs, chs, bottle_ratio=0.5, kernel_size=(3, 3), **args.block_kwargs(0)),
            AttentionBlock(chs, **args.layers),
        )], out_chs=2 * chs),
        fusion='first',
        **args.layers,
    )


def _neck(out_chs: List[int], depth: int, _: bool) -> Neck:
    return keeping_neck(out_chs, partial(yolo11_stage, depth=depth, nested=True), last=_attention_stage)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CspBackbone:
    name, _, form = variant.removeprefix('cspnet_yolo26').partition('_')
    cfg = yolo11_cfg(name, classifier=form == 'cls', linear_pool=True, neck=_neck if form == 'pan' else None)
    return build_backbone(variant, pretrained, cfg, **kwargs)


_URL = 'https://github.com/ultralytics/assets/releases/download/v8.4.0'

default_cfgs = describe_weights(with_pan({
    'cspnet_yolo26n.coco': detector_cfg(f'{_URL}/yolo26n.pt', 40.9),
    'cspnet_yolo26s.coco': detector_cfg(f'{_URL}/yolo26s.pt', 48.6),
    'cspnet_yolo26m.coco': detector_cfg(f'{_URL}/yolo26m.pt', 53.1),
    'cspnet_yolo26l.coco': detector_cfg(f'{_URL}/yolo26l.pt', 55.0),
    'cspnet_yolo26x.coco': detector_cfg(f'{_URL}/yolo26x.pt', 57.5),
    'cspnet_yolo26n_cls.in1k': classifier_cfg(f'{_URL}/yolo26n-cls.pt', 71.4, 90.1),
    'cspnet_yolo26s_cls.in1k': classifier_cfg(f'{_URL}/yolo26s-cls.pt', 76.0, 92.9),
    'cspnet_yolo26m_cls.in1k': classifier_cfg(f'{_URL}/yolo26m-cls.pt', 78.1, 94.2),
    'cspnet_yolo26l_cls.in1k': classifier_cfg(f'{_URL}/yolo26l-cls.pt', 79.0, 94.6),
    'cspnet_yolo26x_cls.in1k': classifier_cfg(f'{_URL}/yolo26x-cls.pt', 79.9, 95.0),
}, (
    'cspnet_yolo26n_pan.coco', 'cspnet_yolo26s_pan.coco', 'cspnet_yolo26m_pan.coco', 'cspnet_yolo26l_pan.coco',
    'cspnet_yolo26x_pan.coco',
)))


@register_model
def cspnet_yolo26n(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 16 to 256, one block per level."""
    return _create('cspnet_yolo26n', pretrained, **kwargs)


@register_model
def cspnet_yolo26s(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Twice the width of the smallest network, one block per level."""
    return _create('cspnet_yolo26s', pretrained, **kwargs)


@register_model
def cspnet_yolo26m(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 64 to 512, one block per level, each a cross stage."""
    return _create('cspnet_yolo26m', pretrained, **kwargs)


@register_model
def cspnet_yolo26l(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """The medium network with two blocks per level."""
    return _create('cspnet_yolo26l', pretrained, **kwargs)


@register_model
def cspnet_yolo26x(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """One and a half times the width of the large network."""
    return _create('cspnet_yolo26x', pretrained, **kwargs)


@register_model
def cspnet_yolo26n_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 16 to 256, one block per level, as a classifier."""
    return _create('cspnet_yolo26n_cls', pretrained, **kwargs)


@register_model
def cspnet_yolo26s_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Twice the width of the smallest network, one block per level, as a classifier."""
    return _create('cspnet_yolo26s_cls', pretrained, **kwargs)


@register_model
def cspnet_yolo26m_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 64 to 512, one block per level, each a cross stage, as a classifier."""
    return _create('cspnet_yolo26m_cls', pretrained, **kwargs)


@register_model
def cspnet_yolo26l_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """The medium network with two blocks per level, as a classifier."""
    return _create('cspnet_yolo26l_cls', pretrained, **kwargs)


@register_model
def cspnet_yolo26x_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """One and a half times the width of the large network, as a classifier."""
    return _create('cspnet_yolo26x_cls', pretrained, **kwargs)


cspnet_yolo26n_pan = register_pan('cspnet_yolo26n_pan', _create)
cspnet_yolo26s_pan = register_pan('cspnet_yolo26s_pan', _create)
cspnet_yolo26m_pan = register_pan('cspnet_yolo26m_pan', _create)
cspnet_yolo26l_pan = register_pan('cspnet_yolo26l_pan', _create)
cspnet_yolo26x_pan = register_pan('cspnet_yolo26x_pan', _create)
