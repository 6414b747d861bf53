"""The package's own networks, which load the ImageNet weights of timm's ``cs3darknet`` models.

A focus stem (one 6×6 convolution of stride 2), then four times a 3×3 convolution of stride 2 and a cross stage of
Darknet's residual blocks: one 1×1 convolution per branch, half the channels through the blocks, one 1×1 to merge. timm
computes the two branches by one convolution and a split; here they are two convolutions, and loading parts the weights.

Paper: `CSPNet: A New Backbone that can Enhance Learning Capability of CNN`, https://arxiv.org/abs/1911.11929
"""
import re
from collections import OrderedDict
from functools import partial
from typing import Any, Dict, Sequence, Tuple

import torch.nn as nn
from timm.layers import make_divisible

from ..backbone import BackboneCfg, CspBackbone, Level, LevelArgs, StateDict
from ..blocks import DarkBlock
from ..cross_stage import CrossStage
from ..layers import ConvNormAct
from ..naming import Naming, register_naming
from ._builder import IN1K, License, build_backbone, default_cfg, describe_weights, hub, register_model, web
from ._weights import CLASSIFICATION, Source

__all__ = ['cspnet_stage']

SIZES = {  # width and depth as fractions of the large network, kernels of the stem
    'cspnet_nano': (0.25, 0.34, (6,)),
    'cspnet_tiny': (0.375, 0.5, (6,)),
    'cspnet_small': (0.5, 0.5, (6,)),
    'cspnet_medium': (0.75, 0.67, (6,)),
    'cspnet_large': (1., 1., (6,)),
    'cspnet_xlarge': (1.25, 1.33, (3, 3)),
}


def _stem(in_chans: int, args: LevelArgs, widths: Tuple[int, ...], kernels: Tuple[int, ...]) -> nn.Module:
    convs: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (width, kernel) in enumerate(zip(widths, kernels)):
        convs[f'conv{i + 1}'] = ConvNormAct(
            in_chans, width, kernel, stride=1 if i else args.stride, padding=(kernel - 1) // 2, **args.layers)
        in_chans = width
    return nn.Sequential(convs)


def cspnet_stage(
        in_chs: int,
        args: LevelArgs,
        out_chs: int,
        depth: int,
        partial_ratio: float,
        fusion: str,
) -> nn.Module:
    """A 3×3 convolution that halves the map, and a cross stage of Darknet's blocks.

    Args:
        in_chs: Channels of the input, which the convolution keeps.
        args: What the backbone says of the level.
        out_chs: Channels of the output.
        depth: Number of blocks.
        partial_ratio: Fraction of the channels that bypasses the blocks.
        fusion: The cross stage's fusion.

    Returns:
        A module from ``(B, in_chs, H, W)`` to ``(B, out_chs, H / 2, W / 2)``.
    """
    return nn.Sequential(OrderedDict(
        down=ConvNormAct(in_chs, in_chs, 3, stride=args.stride, dilation=args.first_dilation, **args.layers),
        csp=CrossStage(
            in_chs, out_chs,
            blocks=lambda chs: nn.Sequential(*[DarkBlock(chs, chs, **args.block_kwargs(i)) for i in range(depth)]),
            partial_ratio=partial_ratio,
            fusion=fusion,
            **args.layers,
        ),
    ))


def _rename(own: StateDict, whole: StateDict) -> StateDict:
    """timm's ``cs3darknet`` keys to this package's; the convolution of both branches is parted in two."""
    out = {}
    for key, value in own.items():
        match = re.fullmatch(r'stages\.(\d+)\.(conv_down|conv_exp|conv_transition|blocks)\.(.+)', key)
        if match is None:
            out[key] = value
            continue
        layer, part, rest = f'layer{int(match[1]) + 1}', match[2], match[3]
        if part == 'conv_exp' and value.ndim:
            out[f'{layer}.csp.entry.{rest}'], out[f'{layer}.csp.bypass.{rest}'] = value.chunk(2)
        elif part == 'conv_exp':  # num_batches_tracked
            out[f'{layer}.csp.entry.{rest}'] = out[f'{layer}.csp.bypass.{rest}'] = value
        else:
            name = {'conv_down': 'down', 'conv_transition': 'csp.merge', 'blocks': 'csp.blocks'}[part]
            out[f'{layer}.{name}.{rest}'] = value
    return out


NAMING = register_naming(Naming(
    'cs3darknet', tuple(SIZES), r'stages\.0\.conv_exp\.conv\.weight', _rename))


def _create(
        variant: str,
        pretrained: bool,
        partial_ratio: float = 0.5,
        fusion: str = 'first',
        **kwargs: Any,
) -> CspBackbone:
    width, depth, kernels = SIZES[variant]
    chs = [make_divisible(c * width) for c in (64, 128, 256, 512, 1024)]
    depths = [max(int(d * depth), 1) for d in (3, 6, 9, 3)]
    stem_widths = tuple(make_divisible(c * width) for c in (32, 64)[-len(kernels):])
    cfg = BackboneCfg(
        levels=(Level(partial(_stem, widths=stem_widths, kernels=kernels), chs[0]),) + tuple(
            Level(partial(cspnet_stage, out_chs=c, depth=d, partial_ratio=partial_ratio, fusion=fusion), c, depth=d)
            for c, d in zip(chs[1:], depths)
        ),
        convert=NAMING.convert,
    )
    return build_backbone(variant, pretrained, cfg, **kwargs)


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return default_cfg(**{
        'input_size': (3, 256, 256), 'pool_size': (8, 8), 'crop_pct': 0.887, 'first_conv': 'stem.conv1.conv', **kwargs})


_TIMM = License(
    'apache-2.0', 'timm, of its own weights in timm/models/cspnet.py and on their card on the Hub',
    'https://github.com/huggingface/pytorch-image-models/blob/main/timm/models/cspnet.py',
)
_RELEASE = 'https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-tpu-weights'


def _timm_weights(
        timm_name: str,
        top1: float,
        top5: float,
        size: int,
        others: Sequence[Source] = (),
        **kwargs: Any,
) -> Dict[str, Any]:
    return _cfg(
        sources=[hub(f'timm/{timm_name}'), *others],
        license=_TIMM,
        test_input_size=(3, size, size),
        info=dict(
            data=IN1K,
            task=CLASSIFICATION,
            source=f'Ross Wightman, https://huggingface.co/timm/{timm_name}',
            metrics=dict(top1=top1, top5=top5, size=size),
            metrics_source='timm, results/results-imagenet.csv',
        ),
        **kwargs,
    )


default_cfgs = describe_weights({
    'cspnet_nano.untrained': _cfg(),
    'cspnet_tiny.untrained': _cfg(),
    'cspnet_small.ra4_e3600_r256_in1k': _timm_weights(
        'cs3darknet_focus_s.ra4_e3600_r256_in1k', 73.158, 91.458, 320,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), test_crop_pct=1.0),
    'cspnet_medium.c2ns_in1k': _timm_weights(
        'cs3darknet_focus_m.c2ns_in1k', 77.286, 93.966, 288, [web(f'{_RELEASE}/cs3darknet_focus_m_c2ns-e23bed41.pth')],
        test_crop_pct=0.95),
    'cspnet_large.c2ns_in1k': _timm_weights(
        'cs3darknet_focus_l.c2ns_in1k', 80.894, 95.674, 288, [web(f'{_RELEASE}/cs3darknet_focus_l_c2ns-65ef8888.pth')],
        test_crop_pct=0.95),
    'cspnet_xlarge.c2ns_in1k': _timm_weights(
        'cs3darknet_x.c2ns_in1k', 82.234, 96.234, 288, [web(f'{_RELEASE}/cs3darknet_x_c2ns-4e4490aa.pth')],
        crop_pct=0.95, test_crop_pct=1.0),
})


@register_model
def cspnet_nano(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """A quarter of the large network's width, a third of its depth."""
    return _create('cspnet_nano', pretrained, **kwargs)


@register_model
def cspnet_tiny(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Three eighths of the large network's width, half its depth."""
    return _create('cspnet_tiny', pretrained, **kwargs)


@register_model
def cspnet_small(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """timm's ``cs3darknet_focus_s``: half the large network's width and depth."""
    return _create('cspnet_small', pretrained, **kwargs)


@register_model
def cspnet_medium(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """timm's ``cs3darknet_focus_m``: three quarters of the large network's width, two thirds of its depth."""
    return _create('cspnet_medium', pretrained, **kwargs)


@register_model
def cspnet_large(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """timm's ``cs3darknet_focus_l``: widths 64 to 1024, 3, 6, 9 and 3 blocks."""
    return _create('cspnet_large', pretrained, **kwargs)


@register_model
def cspnet_xlarge(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """timm's ``cs3darknet_x``: 1.25 times the large network's width, 1.33 times its depth, a stem of two 3×3."""
    return _create('cspnet_xlarge', pretrained, **kwargs)
