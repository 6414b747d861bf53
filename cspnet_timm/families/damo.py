"""The backbones of DAMO-YOLO M and L (TinyNAS with cross stages), also with their necks (Efficient RepGFPN).

A focus stem, then four times a 3×3 convolution of stride 2 and a cross stage whose blocks are a 3×3 and a
re-parameterisable convolution, their input added and an activation behind the sum. What surrounds the blocks has ReLU,
all else SiLU. The last level has an SPP before its cross stage. In the necks, whose walks cross, the outputs of all
blocks are collected. DAMO-YOLO's T, S and nano forms are other networks.

Focus, a 3×3 convolution of the four pixels of each 2×2 patch, is one 6×6 convolution of stride 2.

Paper: `DAMO-YOLO: A Report on Real-Time Object Detection Design`, https://arxiv.org/abs/2211.15444
Reference: https://github.com/tinyvision/DAMO-YOLO, Apache-2.0
"""
import re
from collections import OrderedDict
from functools import partial
from typing import Any, Dict, List, Tuple

import torch
import torch.nn as nn

from ..backbone import BackboneCfg, CspBackbone, Level, LevelArgs, Neck
from ..blocks import BasicBlock, ConcatOutputs, DarkBlock
from ..cross_stage import ComposedStage
from ..layers import ConvNormAct, RepConv, SpatialPyramidPool
from ..naming import (
    Naming,
    StateDict,
    focus_to_conv,
    register_foreign_project,
    register_naming,
    rename_keys,
    roll_channels,
)
from ..neck import CrossingDown, CrossingPaths, CrossingUp
from ._builder import build_backbone, default_cfg, describe_weights, register_model, register_pan
from ._weights import with_pan

__all__: List[str] = []

BN_EPS = 1e-3
STEM_CHS = 32
CHS = (128, 128, 256, 512)
SIZES = {  # channels between the two convolutions of a block, and blocks, of each level; blocks of the neck's stages
    'm': ((64, 64, 256, 256), (1, 3, 7, 2), 4),
    'l': ((96, 96, 384, 384), (2, 4, 9, 3), 6),
}


def _stem(in_chans: int, args: LevelArgs) -> nn.Module:
    return ConvNormAct(in_chans, STEM_CHS, 6, stride=args.stride, padding=2, **args.layers)


def _level(in_chs: int, args: LevelArgs, out_chs: int, mid_chs: int, depth: int, last: bool) -> nn.Module:
    outer, chs = args.layers_with('relu'), out_chs // 2
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        down=ConvNormAct(in_chs, out_chs, 3, stride=args.stride, dilation=args.first_dilation, **outer))
    if last:
        layers['spp'] = SpatialPyramidPool(out_chs, out_chs, entry_act_layer=args.layers['act_layer'], **args.layers)
    layers['csp'] = ComposedStage(
        entry=ConvNormAct(out_chs, chs, **outer),
        bypass=ConvNormAct(out_chs, chs, **outer),
        blocks=nn.Sequential(*[
            BasicBlock(chs, chs, mid_chs=mid_chs, conv_layers=(ConvNormAct, RepConv), **args.block_kwargs(i))
            for i in range(depth)
        ]),
        merge=ConvNormAct(out_chs, out_chs, **outer),
    )
    return nn.Sequential(layers)


def _levels(mid_chs: Tuple[int, ...], depths: Tuple[int, ...]) -> Tuple[Level, ...]:
    return (Level(_stem, STEM_CHS),) + tuple(
        Level(partial(_level, out_chs=chs, mid_chs=mid, depth=depth, last=i == 3), chs, depth=depth)
        for i, (chs, mid, depth) in enumerate(zip(CHS, mid_chs, depths))
    )


def _neck_stage(in_chs: int, out_chs: int, args: LevelArgs, depth: int) -> nn.Module:
    """A cross stage that collects every block's output, and not what enters the first."""
    chs = out_chs // 2
    first, *others = [
        DarkBlock(chs, chs, kernel_size=(3, 3), conv_layers=(RepConv, ConvNormAct), **args.block_kwargs(i))
        for i in range(depth)
    ]
    return ComposedStage(
        entry=nn.Sequential(OrderedDict(conv=ConvNormAct(in_chs, chs, **args.layers), block=first)),
        bypass=ConvNormAct(in_chs, chs, **args.layers),
        blocks=ConcatOutputs(others, out_chs=depth * chs),
        merge=ConvNormAct((depth + 1) * chs, out_chs, **args.layers),
    )


def _neck(chs: List[int], args: LevelArgs, depth: int) -> nn.Module:
    """Every level has the backbone's channels, and is halved and enlarged with all of them."""
    c8, c16, c32 = chs
    stage = partial(_neck_stage, args=args, depth=depth)

    def halve(chs: int) -> nn.Module:
        return ConvNormAct(chs, chs, 3, stride=2, **args.layers)

    return CrossingPaths(
        top=CrossingDown(stage(c32 + c16, c32), halve(c16)),
        top_down=[CrossingDown(stage(c16 + c8 + c32, c16), halve(c8)), CrossingDown(stage(c8 + c16, c8))],
        bottom_up=[
            CrossingUp(stage(c16 + c8, c16), halve(c8)),
            CrossingUp(stage(c32 + c16 + c16, c32), halve(c16), across=halve(c16)),
        ],
    )


def _unfuse(state_dict: StateDict) -> StateDict:
    """Take the one convolution of a deployed file for the 3×3 branch, so that batch norms change nothing."""
    out: StateDict = {}
    for key, value in state_dict.items():
        match = re.fullmatch(r'(.*)\.rbr_reparam\.(weight|bias)', key)
        if match is None:
            out[key] = value
        elif match[2] == 'bias':
            for branch, beta in (('conv3x3', value), ('conv1x1', torch.zeros_like(value))):
                out.update({
                    f'{match[1]}.{branch}.bn.weight': torch.ones_like(value),
                    f'{match[1]}.{branch}.bn.bias': beta,
                    f'{match[1]}.{branch}.bn.running_mean': torch.zeros_like(value),
                    f'{match[1]}.{branch}.bn.running_var': torch.full_like(value, 1 - BN_EPS),
                })
        else:
            out[f'{match[1]}.conv3x3.conv.weight'] = value
            out[f'{match[1]}.conv1x1.conv.weight'] = torch.zeros_like(value[:, :, :1, :1])
    return out


_NODES: Dict[str, str] = {
    'bu_conv13': 'top.down', 'merge_3': 'top.stage',
    'bu_conv24': 'top_down.0.down', 'merge_4': 'top_down.0.stage', 'merge_5': 'top_down.1.stage',
    'bu_conv57': 'bottom_up.0.down', 'merge_7': 'bottom_up.0.stage',
    'bu_conv46': 'bottom_up.1.across', 'bu_conv76': 'bottom_up.1.down', 'merge_6': 'bottom_up.1.stage',
}


def _rename_neck(own: StateDict) -> StateDict:
    out = rename_keys(own, (
        (r'^neck\.(\w+)\.', lambda m: f'neck.{_NODES.get(m[1], m[1])}.'),
        (r'\.stage\.conv1\.', '.stage.bypass.'),
        (r'\.stage\.conv2\.', '.stage.entry.conv.'),
        (r'\.stage\.conv3\.', '.stage.merge.'),
        # Of a block the convolution of two branches runs first.
        (r'\.stage\.convs\.(\d+)\.conv([12])\.', lambda m: f'.stage.convs.{m[1]}.conv{3 - int(m[2])}.'),
        (r'\.stage\.convs\.0\.', '.stage.entry.block.'),
        (r'\.stage\.convs\.(\d+)\.', lambda m: f'.stage.blocks.blocks.{int(m[1]) - 1}.'),
    ))
    for key, value in out.items():
        if key.endswith('.stage.merge.conv.weight'):  # the reference concatenates [bypass, blocks]
            roll_channels(out, key, (1,), value.shape[0] // 2)
    return out


def _rename(own: StateDict, whole: StateDict) -> StateDict:
    neck = {k: v for k, v in whole.items() if k.startswith('neck.')}
    out = rename_keys(_unfuse({**own, **_rename_neck(neck)}), (
        (r'^csp_stage\.0\.conv\.', 'stem.'),
        (r'^csp_stage\.([1-4])\.downsampler\.', r'layer\1.down.'),
        (r'^csp_stage\.(4)\.spp\.', r'layer\1.spp.'),
        (r'^csp_stage\.([1-4])\.conv_start\.', r'layer\1.csp.entry.'),
        (r'^csp_stage\.([1-4])\.conv_shortcut\.', r'layer\1.csp.bypass.'),
        (r'^csp_stage\.([1-4])\.conv_fuse\.', r'layer\1.csp.merge.'),
        (r'^csp_stage\.([1-4])\.convstem\.', r'layer\1.csp.blocks.'),
        (r'(layer\d\.(?:down|csp\.(?:entry|bypass|merge))\.)conv\.(conv|bn)1\.', r'\1\2.'),
        (r'(\.blocks\.\d+\.conv1\.)(conv|bn)1\.', r'\1\2.'),
        (r'\.rbr_dense\.', '.conv3x3.'),
        (r'\.rbr_1x1\.', '.conv1x1.'),
    ))
    weight = out.get('stem.conv.weight')
    if weight is not None and weight.ndim == 4 and weight.shape[1] % 4 == 0 and weight.shape[2:] == (3, 3):
        out['stem.conv.weight'] = focus_to_conv(weight)
    return out


NAMING = register_naming(Naming('DAMO-YOLO', ('cspnet_damo_*',), r'csp_stage\.0\.conv\.conv\.weight', _rename))


register_foreign_project('DAMO-YOLO T, S and nano', r'(?:backbone\.)?block_list\.\d+\..*')


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CspBackbone:
    mid_chs, depths, neck_depth = SIZES[variant.removesuffix('_pan')[-1]]
    cfg = BackboneCfg(
        levels=_levels(mid_chs, depths), bn_eps=BN_EPS, bn_momentum=0.03, convert=NAMING.convert,
        neck=Neck(partial(_neck, depth=neck_depth), CHS[1:]) if variant.endswith('_pan') else None)
    return build_backbone(variant, pretrained, cfg, **kwargs)


# The vendor's host is gone, so that there is no tag with weights; what a user has loads from the file.
_CFG = default_cfg(
    num_classes=0, input_size=(3, 640, 640), pool_size=(20, 20), crop_pct=1.0, crop_mode='squash',
    interpolation='bilinear', mean=(0., 0., 0.), std=(1 / 255, 1 / 255, 1 / 255), paper_ids='arXiv:2211.15444',
    paper_name='DAMO-YOLO: A Report on Real-Time Object Detection Design',
)

default_cfgs = describe_weights(with_pan({
    'cspnet_damo_m.untrained': _CFG,
    'cspnet_damo_l.untrained': _CFG,
}, (
    'cspnet_damo_m_pan.untrained', 'cspnet_damo_l_pan.untrained',
)))


@register_model
def cspnet_damo_m(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """1, 3, 7 and 2 blocks."""
    return _create('cspnet_damo_m', pretrained, **kwargs)


@register_model
def cspnet_damo_l(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """2, 4, 9 and 3 blocks, half as wide again inside."""
    return _create('cspnet_damo_l', pretrained, **kwargs)


cspnet_damo_m_pan = register_pan('cspnet_damo_m_pan', _create)
cspnet_damo_l_pan = register_pan('cspnet_damo_l_pan', _create)
