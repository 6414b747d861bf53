"""CSPPeleeNet, after the paper's text, and the PeleeNet beside it, which is exact.

The author of CSPPeleeNet released neither cfg nor weights of it. What the paper says and what is ours is as in
``cspdensenet.py``, but that PeleeNet's transitions keep the number of channels, the added one too; and a layer's
bottleneck is clipped by the channels that enter it here. The paper's figures are of other layers than these.

Both have leaky ReLU of slope 0.1, as PeleeNet has in Darknet; in its own code it is ReLU (``act_layer='relu'``).

Papers: `CSPNet: A New Backbone that can Enhance Learning Capability of CNN`, https://arxiv.org/abs/1911.11929;
`Pelee: A Real-Time Object Detection System on Mobile Devices`, https://arxiv.org/abs/1804.06882
"""
from collections import OrderedDict
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Union

import torch
import torch.nn as nn
from timm.layers import DropPath

from ..backbone import BackboneCfg, CspBackbone, Level, LevelArgs
from ..blocks import DenseBlock
from ..layers import ActLayer, ConvNormAct, NormLayer
from ._builder import build_backbone, default_cfg, describe_weights, register_model
from ._darknet import LEAKY
from .cspdensenet import partial_dense_levels

__all__: List[str] = []

STEM_CHS = 32
GROWTH = 32
STAGES = ((3, 1), (4, 2), (8, 4), (6, 4))  # layers, and their bottleneck's width


class TwoWayLayer(nn.Module):
    """PeleeNet's dense layer: half of the new channels see 3×3 points, the other half 5×5.

    Input ``(B, in_chs, H, W)``, output ``(B, in_chs + growth, H, W)`` in the order [input, 3×3, twice 3×3].
    """

    def __init__(
            self,
            in_chs: int,
            growth: int,
            mid_chs: int,
            dilation: int = 1,
            act_layer: ActLayer = nn.ReLU,
            norm_layer: NormLayer = nn.BatchNorm2d,
            drop_path: float = 0.,
            drop_block: Optional[Callable[[], nn.Module]] = None,
            device: Optional[Union[torch.device, str]] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            growth: New channels, both ways together.
            mid_chs: Channels behind the 1×1 convolution of each way.
            dilation: Dilation of the 3×3 convolutions.
            act_layer: Activation of all convolutions.
            norm_layer: Normalisation of all convolutions.
            drop_path: Probability of leaving the new channels zero, per sample.
            drop_block: Creates the DropBlock behind the last convolution of each way.
            device: Where to create the parameters.
            dtype: Type of the parameters.
        """
        super().__init__()
        kwargs: Dict[str, Any] = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        kwargs3x3 = dict(kwargs, kernel_size=3, dilation=dilation)
        chs = growth // 2
        self.way1 = nn.Sequential(OrderedDict(
            conv1=ConvNormAct(in_chs, mid_chs, **kwargs),
            conv2=ConvNormAct(mid_chs, chs, drop_layer=drop_block, **kwargs3x3),
        ))
        self.way2 = nn.Sequential(OrderedDict(
            conv1=ConvNormAct(in_chs, mid_chs, **kwargs),
            conv2=ConvNormAct(mid_chs, chs, **kwargs3x3),
            conv3=ConvNormAct(chs, chs, drop_layer=drop_block, **kwargs3x3),
        ))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Widen ``(B, in_chs, H, W)``."""
        return torch.cat([x, self.drop_path(torch.cat([self.way1(x), self.way2(x)], dim=1))], dim=1)


class StemPool(nn.Module):
    """PeleeNet's second halving of the map: a convolution that strides beside a pool, and a 1×1 of both.

    Input and output ``(B, chs, H, W)`` and ``(B, chs, ceil(H / 2), ceil(W / 2))``.
    """

    def __init__(self, chs: int, stride: int, **layer_kwargs: Any) -> None:
        """
        Args:
            chs: Channels.
            stride: Stride of both branches.
            **layer_kwargs: ``act_layer``, ``norm_layer``, ``device`` and ``dtype``.
        """
        super().__init__()
        self.conv1 = ConvNormAct(chs, chs // 2, **layer_kwargs)
        self.conv2 = ConvNormAct(chs // 2, chs, 3, stride=stride, **layer_kwargs)
        self.pool = nn.MaxPool2d(2, stride, ceil_mode=True)
        self.conv3 = ConvNormAct(2 * chs, chs, **layer_kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Halve ``(B, chs, H, W)``."""
        return self.conv3(torch.cat([self.conv2(self.conv1(x)), self.pool(x)], dim=1))


def _stem(in_chans: int, args: LevelArgs) -> nn.Module:
    return ConvNormAct(in_chans, STEM_CHS, 3, stride=args.stride, **args.layers)


def _stem_pool(chs: int, args: LevelArgs) -> nn.Module:
    return StemPool(chs, args.stride, **args.layers)


def _dense_block(in_chs: int, args: LevelArgs, depth: int, width: int) -> DenseBlock:
    layers = []
    for i in range(depth):
        chs = in_chs + i * GROWTH
        mid_chs = GROWTH // 2 * width // 4 * 4
        if mid_chs > chs // 2:
            mid_chs = chs // 8 * 4
        layers.append(TwoWayLayer(chs, GROWTH, mid_chs, **args.block_kwargs(i)))
    return DenseBlock(layers, in_chs + depth * GROWTH)


def _plain_layer(
        in_chs: int,
        args: LevelArgs,
        block: Callable[[int, LevelArgs], DenseBlock],
        first: bool,
) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers['pool'] = _stem_pool(in_chs, args) if first else nn.AvgPool2d(args.stride, ceil_mode=True)
    blocks = block(in_chs, args)
    layers['blocks'] = blocks
    layers['transition'] = ConvNormAct(blocks.out_chs, blocks.out_chs, **args.layers)
    return nn.Sequential(layers)


_BLOCKS = [partial(_dense_block, depth=depth, width=width) for depth, width in STAGES]
_DEPTHS = [depth for depth, _ in STAGES]


default_cfgs = describe_weights({
    'cspnet_peleenet.untrained': default_cfg(),
    'cspnet_plain_peleenet.untrained': default_cfg(paper_ids='arXiv:1804.06882', paper_name=(
        'Pelee: A Real-Time Object Detection System on Mobile Devices')),
})


@register_model
def cspnet_peleenet(
        pretrained: bool = False,
        partial_ratio: float = 0.5,
        fusion: str = 'csp',
        **kwargs: Any,
) -> CspBackbone:
    """PeleeNet of partial stages.

    Args:
        pretrained: Not possible without a file: there are no weights.
        partial_ratio: γ, the fraction of a stage's channels that bypasses its dense layers.
        fusion: ``'csp'``, ``'first'`` or ``'last'``.
        **kwargs: timm's.

    Returns:
        The model.
    """
    levels = partial_dense_levels(
        Level(_stem, STEM_CHS), _stem_pool, _BLOCKS, _DEPTHS, GROWTH,
        compression=1., partial_ratio=partial_ratio, fusion=fusion,
    )
    cfg = BackboneCfg(levels=tuple(levels), act_layer=LEAKY)
    return build_backbone('cspnet_peleenet', pretrained, cfg, **kwargs)


@register_model
def cspnet_plain_peleenet(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """PeleeNet."""
    levels, chs = [Level(_stem, STEM_CHS)], STEM_CHS
    for i, (block, depth) in enumerate(zip(_BLOCKS, _DEPTHS)):
        chs += depth * GROWTH
        build = partial(_plain_layer, block=block, first=i == 0)
        levels.append(Level(build, chs, depth=depth))
    cfg = BackboneCfg(levels=tuple(levels), act_layer=LEAKY)
    return build_backbone('cspnet_plain_peleenet', pretrained, cfg, **kwargs)
