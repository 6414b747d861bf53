"""CSPNeXt, the backbone of RTMDet and RTMPose.

A stem of three 3×3 convolutions, then four times a 3×3 convolution of stride 2 and a cross stage whose blocks are a 3×3
and a large-kernel depthwise 5×5 convolution; channel attention before the merge. The last level has an SPP before its
cross stage, and blocks without a shortcut. In the smallest network every 3×3 convolution behind the stem is separable.

Paper: `RTMDet: An Empirical Study of Designing Real-Time Object Detectors`, https://arxiv.org/abs/2212.07784
Reference: https://github.com/open-mmlab/mmdetection/tree/main/configs/rtmdet, Apache-2.0
"""
from collections import OrderedDict
from functools import partial
from typing import Any, Callable, Dict, Tuple

import torch.nn as nn
from timm.layers import EffectiveSEModule

from ..backbone import BackboneCfg, CspBackbone, Level, LevelArgs, StateDict
from ..blocks import DarkBlock
from ..cross_stage import ComposedStage
from ..layers import ConvNormAct, SeparableConv, SpatialPyramidPool
from ..naming import Naming, register_naming, rename_keys
from ._builder import IN1K, License, build_backbone, default_cfg, describe_weights, hub, register_model, web
from ._openmmlab import MMDETECTION, MMPOSE
from ._weights import CLASSIFICATION, DETECTION, KEYPOINTS, SEGMENTATION

__all__ = []

SIZES = {  # width, depth, separable 3×3 convolutions
    'cspnet_rtmdet_nano': (0.25, 0.33, True),
    'cspnet_rtmdet_tiny': (0.375, 0.167, False),
    'cspnet_rtmdet_s': (0.5, 0.33, False),
    'cspnet_rtmdet_m': (0.75, 0.67, False),
    'cspnet_rtmdet_l': (1., 1., False),
    'cspnet_rtmdet_x': (1.25, 1.33, False),
}


def _stem(in_chans: int, args: LevelArgs, out_chs: int) -> nn.Module:
    mid_chs = out_chs // 2
    return nn.Sequential(OrderedDict(
        conv1=ConvNormAct(in_chans, mid_chs, 3, stride=args.stride, **args.layers),
        conv2=ConvNormAct(mid_chs, mid_chs, 3, **args.layers),
        conv3=ConvNormAct(mid_chs, out_chs, 3, **args.layers),
    ))


def _level(in_chs: int, args: LevelArgs, out_chs: int, depth: int, separable: bool, last: bool) -> nn.Module:
    conv: Callable[..., nn.Module] = SeparableConv if separable else ConvNormAct
    mid_chs = out_chs // 2
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        down=conv(in_chs, out_chs, 3, stride=args.stride, dilation=args.first_dilation, **args.layers))
    if last:
        layers['spp'] = SpatialPyramidPool(out_chs, out_chs, entry_act_layer=args.layers['act_layer'], **args.layers)
    layers['csp'] = ComposedStage(
        nn.Sequential(*[
            DarkBlock(
                mid_chs, mid_chs, kernel_size=(3, 5), conv_layers=(conv, SeparableConv), shortcut=not last,
                **args.block_kwargs(i))
            for i in range(depth)
        ]),
        entry=ConvNormAct(out_chs, mid_chs, **args.layers),
        bypass=ConvNormAct(out_chs, mid_chs, **args.layers),
        merge=nn.Sequential(OrderedDict(
            attn=EffectiveSEModule(2 * mid_chs, device=args.layers['device'], dtype=args.layers['dtype']),
            conv=ConvNormAct(2 * mid_chs, out_chs, **args.layers),
        )),
    )
    return nn.Sequential(layers)


def _rename(own: StateDict, whole: StateDict) -> StateDict:
    # timm's own cspnext has the framework's names but for its stages, which count from zero.
    own = rename_keys(own, ((r'^stages\.(\d)\.', lambda m: f'stage{int(m[1]) + 1}.'),))
    out = rename_keys(own, (
        (r'^stem\.(\d)\.', lambda m: f'stem.conv{int(m[1]) + 1}.'),
        (r'^stage(\d)\.0\.', r'layer\1.down.'),
        (r'^stage(\d)\.1\.(?=conv[12]\.)', r'layer\1.spp.'),
        (r'^stage(\d)\.\d\.', r'layer\1.csp.'),
        (r'\.main_conv\.', '.entry.'),
        (r'\.short_conv\.', '.bypass.'),
        (r'\.final_conv\.', '.merge.conv.'),
        (r'\.attention\.', '.merge.attn.'),
        (r'\.(depth|point)wise_conv\.', r'.\1wise.'),
    ))
    weight = out.get('stem.conv1.conv.weight')
    is_timms = any('stages.0.1.attention.' in key for key in whole)
    if weight is not None and weight.ndim == 4 and not is_timms and any('bbox_head.' in key for key in whole):
        out['stem.conv1.conv.weight'] = weight.flip(1)  # detectors are trained on BGR, classifiers and pose on RGB
    return out


NAMING = register_naming(Naming(
    'RTMDet', ('cspnet_rtmdet_*',), r'(?:stage1|stages\.0)\.1\.attention\.fc\.weight', _rename))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CspBackbone:
    width, depth, separable = SIZES[variant]
    chs = [int(c * width) for c in (128, 256, 512, 1024)]
    depths = [max(round(d * depth), 1) for d in (3, 6, 6, 3)]
    stem_chs = int(64 * width)
    cfg = BackboneCfg(
        levels=(Level(partial(_stem, out_chs=stem_chs), stem_chs),) + tuple(
            Level(partial(_level, out_chs=c, depth=d, separable=separable, last=i == 3), c, depth=d)
            for i, (c, d) in enumerate(zip(chs, depths))
        ),
        convert=NAMING.convert,
    )
    return build_backbone(variant, pretrained, cfg, **kwargs)


_DET = 'https://download.openmmlab.com/mmdetection/v3.0/rtmdet'
_POSE = 'https://download.openmmlab.com/mmpose/v1/projects'


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return default_cfg(**{
        'first_conv': 'stem.conv1.conv', 'paper_ids': 'arXiv:2212.07784',
        'paper_name': 'RTMDet: An Empirical Study of Designing Real-Time Object Detectors', **kwargs})


def _in1k(timm_name: str, file: str, top1: float, top5: float) -> Dict[str, Any]:
    return _cfg(
        # The files that timm's own models are loaded from, converted from those of the release, which come second.
        sources=[hub(f'munehiro-k/{timm_name}'), web(f'{_DET}/cspnext_rsb_pretrain/{file}')],
        license=MMDETECTION, crop_pct=224 / 236,
        info=dict(data=IN1K, task=CLASSIFICATION, source='OpenMMLab', metrics=dict(top1=top1, top5=top5, size=224),
                  metrics_source='MMDetection, configs/rtmdet'))


def _detector(
        url: str,
        data: str = 'COCO',
        task: str = DETECTION,
        license: License = MMDETECTION,
        size: int = 640,
        **metrics: float,
) -> Dict[str, Any]:
    return _cfg(
        sources=[web(url)], license=license, num_classes=0, input_size=(3, size, size),
        pool_size=(size // 32, size // 32), crop_pct=1.0, crop_mode='border', interpolation='bilinear',
        info=dict(data=data, task=task, source='OpenMMLab', metrics=dict(metrics, size=size) if metrics else {},
                  metrics_source='MMDetection, configs/rtmdet, for the whole detector' if metrics else ''),
    )


def _coco(size: str, stamp: str, ap: float) -> Dict[str, Any]:
    name = f'rtmdet_{size}_8xb32-300e_coco'
    return _detector(f'{_DET}/{name}/{name}_{stamp}.pth', ap=ap)


def _coco_ins(size: str, stamp: str, batch: str = '8xb32') -> Dict[str, Any]:
    name = f'rtmdet-ins_{size}_{batch}-300e_coco'
    return _detector(f'{_DET}/{name}/{name}_{stamp}.pth', data='COCO, instance masks', task=SEGMENTATION)


def _pose(file: str, data: str, size: Tuple[int, int] = (256, 192)) -> Dict[str, Any]:
    return _cfg(
        sources=[web(f'{_POSE}/{file}.pth')], license=MMPOSE, num_classes=0, input_size=(3, *size),
        pool_size=(size[0] // 32, size[1] // 32), crop_pct=1.0, interpolation='bilinear',
        info=dict(data=data, task=KEYPOINTS, source='OpenMMLab', metrics={}))


_AIC = 'AI Challenger and COCO, human keypoints'
_BODY7 = 'seven data sets of human keypoints (Body7)'

default_cfgs = describe_weights({
    'cspnet_rtmdet_nano.coco_obj365_person': _detector(
        f'{_POSE}/rtmpose/rtmdet_nano_8xb32-100e_coco-obj365-person-05d8511e.pth',
        data='COCO and Objects365, persons', license=MMPOSE, size=320),
    'cspnet_rtmdet_tiny.rsb_a1_in1k': _in1k(
        'cspnext_tiny.rsb_a1_in1k', 'cspnext-tiny_imagenet_600e-3a2dd350.pth', 69.44, 89.45),
    'cspnet_rtmdet_s.rsb_a1_in1k': _in1k(
        'cspnext_s.rsb_a1_in1k', 'cspnext-s_imagenet_600e-ea671761.pth', 74.41, 92.23),
    'cspnet_rtmdet_m.rsb_a1_in1k': _in1k(
        'cspnext_m.rsb_a1_in1k', 'cspnext-m_8xb256-rsb-a1-600e_in1k-ecb3bbd9.pth', 79.27, 94.79),
    'cspnet_rtmdet_l.rsb_a1_in1k': _in1k(
        'cspnext_l.rsb_a1_in1k', 'cspnext-l_8xb256-rsb-a1-600e_in1k-6a760974.pth', 81.3, 95.62),
    'cspnet_rtmdet_x.rsb_a1_in1k': _in1k(
        'cspnext_x.rsb_a1_in1k', 'cspnext-x_8xb256-rsb-a1-600e_in1k-b3f78edd.pth', 82.1, 95.69),
    'cspnet_rtmdet_tiny.coco': _coco('tiny', '20220902_112414-78e30dcc', 41.1),
    'cspnet_rtmdet_s.coco': _coco('s', '20220905_161602-387a891e', 44.6),
    'cspnet_rtmdet_m.coco': _coco('m', '20220719_112220-229f527c', 49.4),
    'cspnet_rtmdet_l.coco': _coco('l', '20220719_112030-5a0be7c4', 51.5),
    'cspnet_rtmdet_x.coco': _coco('x', '20220715_230555-cc79b9ae', 52.8),
    'cspnet_rtmdet_tiny.coco_ins': _coco_ins('tiny', '20221130_151727-ec670f7e'),
    'cspnet_rtmdet_s.coco_ins': _coco_ins('s', '20221121_212604-fdc5d7ec'),
    'cspnet_rtmdet_m.coco_ins': _coco_ins('m', '20221123_001039-6eba602e'),
    'cspnet_rtmdet_l.coco_ins': _coco_ins('l', '20221124_103237-78d1d652'),
    'cspnet_rtmdet_x.coco_ins': _coco_ins('x', '20221124_111313-33d4595b', '8xb16'),
    'cspnet_rtmdet_tiny.udp_aic_coco': _pose(
        'rtmpose/cspnext-tiny_udp-aic-coco_210e-256x192-cbed682d_20230130', _AIC),
    'cspnet_rtmdet_s.udp_aic_coco': _pose(
        'rtmpose/cspnext-s_udp-aic-coco_210e-256x192-92f5a029_20230130', _AIC),
    'cspnet_rtmdet_m.udp_aic_coco': _pose(
        'rtmpose/cspnext-m_udp-aic-coco_210e-256x192-f2f7d6f6_20230130', _AIC),
    'cspnet_rtmdet_l.udp_aic_coco': _pose(
        'rtmpose/cspnext-l_udp-aic-coco_210e-256x192-273b7631_20230130', _AIC),
    'cspnet_rtmdet_tiny.udp_body7': _pose(
        'rtmposev1/cspnext-tiny_udp-body7_210e-256x192-a3775292_20230504', _BODY7),
    'cspnet_rtmdet_s.udp_body7': _pose(
        'rtmposev1/cspnext-s_udp-body7_210e-256x192-8c9ccbdb_20230504', _BODY7),
    'cspnet_rtmdet_m.udp_body7': _pose(
        'rtmposev1/cspnext-m_udp-body7_210e-256x192-e0c9327b_20230504', _BODY7),
    'cspnet_rtmdet_l.udp_body7': _pose(
        'rtmposev1/cspnext-l_udp-body7_210e-256x192-5e9558ef_20230504', _BODY7),
    'cspnet_rtmdet_m.udp_body7_384': _pose(
        'rtmposev1/cspnext-m_udp-body7_210e-384x288-b9bc2b57_20230504', _BODY7, (384, 288)),
    'cspnet_rtmdet_l.udp_body7_384': _pose(
        'rtmposev1/cspnext-l_udp-body7_210e-384x288-b15bc30d_20230504', _BODY7, (384, 288)),
    'cspnet_rtmdet_x.udp_body7_384': _pose(
        'rtmposev1/cspnext-x_udp-body7_210e-384x288-d28b58e6_20230529', _BODY7, (384, 288)),
    'cspnet_rtmdet_tiny.rtmpose_aic_coco': _pose(
        'rtmposev1/rtmpose-tiny_simcc-aic-coco_pt-aic-coco_420e-256x192-cfc8f33d_20230126', _AIC),
    'cspnet_rtmdet_s.rtmpose_aic_coco': _pose(
        'rtmposev1/rtmpose-s_simcc-aic-coco_pt-aic-coco_420e-256x192-fcb2599b_20230126', _AIC),
    'cspnet_rtmdet_m.rtmpose_aic_coco': _pose(
        'rtmposev1/rtmpose-m_simcc-aic-coco_pt-aic-coco_420e-256x192-63eb25f7_20230126', _AIC),
    'cspnet_rtmdet_l.rtmpose_aic_coco': _pose(
        'rtmposev1/rtmpose-l_simcc-aic-coco_pt-aic-coco_420e-256x192-f016ffe0_20230126', _AIC),
})


@register_model
def cspnet_rtmdet_nano(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """A quarter of the large network's width, with separable convolutions."""
    return _create('cspnet_rtmdet_nano', pretrained, **kwargs)


@register_model
def cspnet_rtmdet_tiny(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPNeXt-tiny: three eighths of the large network's width, one block per level."""
    return _create('cspnet_rtmdet_tiny', pretrained, **kwargs)


@register_model
def cspnet_rtmdet_s(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPNeXt-s: half the large network's width, a third of its depth."""
    return _create('cspnet_rtmdet_s', pretrained, **kwargs)


@register_model
def cspnet_rtmdet_m(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPNeXt-m: three quarters of the large network's width, two thirds of its depth."""
    return _create('cspnet_rtmdet_m', pretrained, **kwargs)


@register_model
def cspnet_rtmdet_l(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPNeXt-l: widths 64 to 1024, 3, 6, 6 and 3 blocks."""
    return _create('cspnet_rtmdet_l', pretrained, **kwargs)


@register_model
def cspnet_rtmdet_x(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPNeXt-x: 1.25 times the large network's width, 1.33 times its depth."""
    return _create('cspnet_rtmdet_x', pretrained, **kwargs)
