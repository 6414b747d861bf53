"""The backbones of YOLO11: of its detectors, and of its ImageNet classifiers (``_cls``).

A 3×3 convolution of stride 2, then four times another one and a cross stage that collects all outputs of its blocks,
which are residual blocks or, behind stride 8 and everywhere in the larger networks, small cross stages themselves
(C3k2). The last level has a cross stage of attention blocks at its end (C2PSA), and a detector's an SPP before that. A
classifier has a 1×1 convolution to 1280 channels before it pools.

YOLO26 differs in its SPP, see ``yolo26.py``.

Built from the published structure; the authors' code and weights are under AGPL-3.0, and none of either is here.
"""
from functools import partial
from typing import Any, Callable, Dict, List, Optional

import torch.nn as nn

from ..backbone import BackboneCfg, CspBackbone, Level, LevelArgs, Neck
from ..blocks import AttentionBlock, ConcatOutputs, DarkBlock
from ..cross_stage import CrossStage
from ..layers import ConvHead
from ._builder import build_backbone, describe_weights, register_model, register_pan
from ._neck import keeping_neck
from ._weights import with_pan
from ._yolo import NAMING, classifier_cfg, detector_cfg, scale_width, yolo_level, yolo_pool, yolo_stem

__all__ = ['yolo11_cfg', 'yolo11_stage']

SIZES = {  # width, repeats, widest channels before scaling, cross stages as blocks everywhere
    'n': (0.25, 1, 1024, False),
    's': (0.5, 1, 1024, False),
    'm': (1., 1, 512, True),
    'l': (1., 2, 512, True),
    'x': (1.5, 2, 512, True),
}
LEVELS = (  # channels behind the downsampling and behind the level, those of a branch as a fraction of the latter
    (128, 256, 0.25),
    (256, 512, 0.25),
    (512, 512, 0.5),
    (1024, 1024, 0.5),
)


def _block(chs: int, args: LevelArgs, index: int, nested: bool) -> nn.Module:
    if not nested:
        return DarkBlock(chs, chs, bottle_ratio=0.5, kernel_size=(3, 3), **args.block_kwargs(index))
    return CrossStage(
        chs, chs,
        blocks=lambda c: nn.Sequential(*[
            DarkBlock(c, c, kernel_size=(3, 3), **args.block_kwargs(index)) for _ in range(2)]),
        fusion='first',
        **args.layers,
    )


def yolo11_stage(
        in_chs: int,
        out_chs: int,
        args: LevelArgs,
        depth: int,
        nested: bool,
        branch_ratio: float = 0.5,
) -> nn.Module:
    """A cross stage that collects what its blocks give.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        args: What the backbone says of the level.
        depth: Blocks.
        nested: Whether the blocks are small cross stages themselves.
        branch_ratio: Channels of a branch, as a fraction of ``out_chs``.

    Returns:
        The stage.
    """
    return CrossStage(
        in_chs, out_chs,
        blocks=lambda chs: ConcatOutputs(
            [_block(chs, args, i, nested) for i in range(depth)], out_chs=(1 + depth) * chs),
        hidden_chs=2 * int(out_chs * branch_ratio),
        fusion='first',
        **args.layers,
    )


def _level_stage(in_chs: int, args: LevelArgs, out_chs: int, **kwargs: Any) -> nn.Module:
    return yolo11_stage(in_chs, out_chs, args, **kwargs)


def _attention(_: int, args: LevelArgs, chs: int, depth: int) -> nn.Module:
    return CrossStage(
        chs, chs,
        blocks=lambda c: nn.Sequential(*[
            AttentionBlock(c, drop_path=args.drop_path[depth + i], **args.layers) for i in range(depth)]),
        fusion='first',
        **args.layers,
    )


def yolo11_cfg(
        name: str,
        classifier: bool,
        linear_pool: bool = False,
        neck: Optional[Callable[[List[int], int, bool], Neck]] = None,
) -> BackboneCfg:
    """The network of one size.

    Args:
        name: ``'n'``, ``'s'``, ``'m'``, ``'l'`` or ``'x'``.
        classifier: The classifying form: no SPP, a convolution before the classifier.
        linear_pool: The SPP of YOLO26: a shortcut around it, no activation before its pools.
        neck: Called with the channels of the neck's maps, the repeats, and whether the blocks are cross stages
            everywhere, gives the neck; none if None.

    Returns:
        The network as numbers and builders.
    """
    width, repeats, max_chs, nested = SIZES[name]
    stem_chs = scale_width(64, width)
    levels = [yolo_stem(stem_chs, 3)]
    for i, (down, out, branch_ratio) in enumerate(LEVELS):
        chs, depth = scale_width(out, width, max_chs), repeats
        parts: Dict[str, Callable[[int, LevelArgs], nn.Module]] = dict(csp=partial(
            _level_stage, out_chs=chs, branch_ratio=branch_ratio, depth=repeats, nested=nested or i >= 2))
        if i == 3:
            if not classifier:
                parts['spp'] = partial(yolo_pool, shortcut=linear_pool)
            parts['attn'] = partial(_attention, chs=chs, depth=repeats)
            depth += repeats
        down_chs = scale_width(down, width, max_chs)
        levels.append(Level(partial(yolo_level, down_chs=down_chs, parts=parts), chs, depth=depth))
    bn_eps, bn_momentum = (1e-5, 0.1) if classifier else (1e-3, 0.03)
    return BackboneCfg(
        tuple(levels), bn_eps=bn_eps, bn_momentum=bn_momentum, head=ConvHead if classifier else None,
        convert=NAMING.convert,
        neck=neck and neck([scale_width(c, width, max_chs) for c in (256, 512, 1024)], repeats, nested),
    )


def _neck(out_chs: List[int], depth: int, nested: bool) -> Neck:
    return keeping_neck(
        out_chs, partial(yolo11_stage, depth=depth, nested=nested),
        last=partial(yolo11_stage, depth=depth, nested=True))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CspBackbone:
    name, _, form = variant.removeprefix('cspnet_yolo11').partition('_')
    cfg = yolo11_cfg(name, classifier=form == 'cls', neck=_neck if form == 'pan' else None)
    return build_backbone(variant, pretrained, cfg, **kwargs)


_URL = 'https://github.com/ultralytics/assets/releases/download/v8.3.0'

default_cfgs = describe_weights(with_pan({
    'cspnet_yolo11n.coco': detector_cfg(f'{_URL}/yolo11n.pt', 39.5),
    'cspnet_yolo11s.coco': detector_cfg(f'{_URL}/yolo11s.pt', 47.0),
    'cspnet_yolo11m.coco': detector_cfg(f'{_URL}/yolo11m.pt', 51.5),
    'cspnet_yolo11l.coco': detector_cfg(f'{_URL}/yolo11l.pt', 53.4),
    'cspnet_yolo11x.coco': detector_cfg(f'{_URL}/yolo11x.pt', 54.7),
    'cspnet_yolo11n_cls.in1k': classifier_cfg(f'{_URL}/yolo11n-cls.pt', 70.0, 89.4),
    'cspnet_yolo11s_cls.in1k': classifier_cfg(f'{_URL}/yolo11s-cls.pt', 75.4, 92.7),
    'cspnet_yolo11m_cls.in1k': classifier_cfg(f'{_URL}/yolo11m-cls.pt', 77.3, 93.9),
    'cspnet_yolo11l_cls.in1k': classifier_cfg(f'{_URL}/yolo11l-cls.pt', 78.3, 94.3),
    'cspnet_yolo11x_cls.in1k': classifier_cfg(f'{_URL}/yolo11x-cls.pt', 79.5, 94.9),
}, (
    'cspnet_yolo11n_pan.coco', 'cspnet_yolo11s_pan.coco', 'cspnet_yolo11m_pan.coco', 'cspnet_yolo11l_pan.coco',
    'cspnet_yolo11x_pan.coco',
)))


@register_model
def cspnet_yolo11n(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 16 to 256, one block per level."""
    return _create('cspnet_yolo11n', pretrained, **kwargs)


@register_model
def cspnet_yolo11s(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Twice the width of the smallest network, one block per level."""
    return _create('cspnet_yolo11s', pretrained, **kwargs)


@register_model
def cspnet_yolo11m(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 64 to 512, one block per level, each a cross stage."""
    return _create('cspnet_yolo11m', pretrained, **kwargs)


@register_model
def cspnet_yolo11l(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """The medium network with two blocks per level."""
    return _create('cspnet_yolo11l', pretrained, **kwargs)


@register_model
def cspnet_yolo11x(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """One and a half times the width of the large network."""
    return _create('cspnet_yolo11x', pretrained, **kwargs)


@register_model
def cspnet_yolo11n_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 16 to 256, one block per level, as a classifier."""
    return _create('cspnet_yolo11n_cls', pretrained, **kwargs)


@register_model
def cspnet_yolo11s_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Twice the width of the smallest network, one block per level, as a classifier."""
    return _create('cspnet_yolo11s_cls', pretrained, **kwargs)


@register_model
def cspnet_yolo11m_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 64 to 512, one block per level, each a cross stage, as a classifier."""
    return _create('cspnet_yolo11m_cls', pretrained, **kwargs)


@register_model
def cspnet_yolo11l_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """The medium network with two blocks per level, as a classifier."""
    return _create('cspnet_yolo11l_cls', pretrained, **kwargs)


@register_model
def cspnet_yolo11x_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """One and a half times the width of the large network, as a classifier."""
    return _create('cspnet_yolo11x_cls', pretrained, **kwargs)


cspnet_yolo11n_pan = register_pan('cspnet_yolo11n_pan', _create)
cspnet_yolo11s_pan = register_pan('cspnet_yolo11s_pan', _create)
cspnet_yolo11m_pan = register_pan('cspnet_yolo11m_pan', _create)
cspnet_yolo11l_pan = register_pan('cspnet_yolo11l_pan', _create)
cspnet_yolo11x_pan = register_pan('cspnet_yolo11x_pan', _create)
