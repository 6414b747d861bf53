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
from ..cross_stage import ComposedStage, CrossStage
from ..layers import ConvNormAct, SeparableConv, SpatialPyramidPool
from ..naming import Naming, register_naming, rename_keys
from ._builder import (
    IN1K,
    License,
    build_backbone,
    default_cfg,
    describe_weights,
    hub,
    register_model,
    register_pan,
    web,
)
from ._neck import reducing_neck, rename_reducing_neck
from ._openmmlab import MMDETECTION, MMPOSE, MMROTATE
from ._weights import CLASSIFICATION, DETECTION, KEYPOINTS, ROTATED, SEGMENTATION, with_pan

__all__ = []

SIZES = {  # width, depth, separable 3×3 convolutions
    'cspnet_rtmdet_nano': (0.25, 0.33, True),
    'cspnet_rtmdet_tiny': (0.375, 0.167, False),
    'cspnet_rtmdet_s': (0.5, 0.33, False),
    'cspnet_rtmdet_m': (0.75, 0.67, False),
    'cspnet_rtmdet_l': (1., 1., False),
    'cspnet_rtmdet_x': (1.25, 1.33, False),
    'cspnet_rtmdet_x_p6': (1.25, 1.33, False),
}


def _stem(in_chans: int, args: LevelArgs, out_chs: int) -> nn.Module:
    mid_chs = out_chs // 2
    return nn.Sequential(OrderedDict(
        conv1=ConvNormAct(in_chans, mid_chs, 3, stride=args.stride, **args.layers),
        conv2=ConvNormAct(mid_chs, mid_chs, 3, **args.layers),
        conv3=ConvNormAct(mid_chs, out_chs, 3, **args.layers),
    ))


def _blocks(chs: int, args: LevelArgs, depth: int, conv: Callable[..., nn.Module], shortcut: bool) -> nn.Module:
    return nn.Sequential(*[
        DarkBlock(
            chs, chs, kernel_size=(3, 5), conv_layers=(conv, SeparableConv), shortcut=shortcut, **args.block_kwargs(i))
        for i in range(depth)
    ])


def _level(
        in_chs: int,
        args: LevelArgs,
        out_chs: int,
        depth: int,
        conv: Callable[..., nn.Module],
        last: bool,
) -> nn.Module:
    mid_chs = out_chs // 2
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        down=conv(in_chs, out_chs, 3, stride=args.stride, dilation=args.first_dilation, **args.layers))
    if last:
        layers['spp'] = SpatialPyramidPool(out_chs, out_chs, entry_act_layer=args.layers['act_layer'], **args.layers)
    layers['csp'] = ComposedStage(
        _blocks(mid_chs, args, depth, conv, shortcut=not last),
        entry=ConvNormAct(out_chs, mid_chs, **args.layers),
        bypass=ConvNormAct(out_chs, mid_chs, **args.layers),
        merge=nn.Sequential(OrderedDict(
            attn=EffectiveSEModule(2 * mid_chs, device=args.layers['device'], dtype=args.layers['dtype']),
            conv=ConvNormAct(2 * mid_chs, out_chs, **args.layers),
        )),
    )
    return nn.Sequential(layers)


def _neck_stage(
        in_chs: int,
        out_chs: int,
        args: LevelArgs,
        depth: int,
        conv: Callable[..., nn.Module],
) -> nn.Module:
    # Without the attention of the backbone's stages.
    return CrossStage(
        in_chs, out_chs, blocks=lambda chs: _blocks(chs, args, depth, conv, shortcut=False), fusion='first',
        **args.layers)


def _rename(own: StateDict, whole: StateDict) -> StateDict:
    own = {**own, **{k: v for k, v in whole.items() if k.startswith('neck.')}}
    # timm's own cspnext has the framework's names but for its stages, which count from zero.
    own = rename_keys(own, ((r'^stages\.(\d)\.', lambda m: f'stage{int(m[1]) + 1}.'),))
    own = rename_reducing_neck(own)
    out = rename_keys(own, (
        (r'^stem\.(\d)\.', lambda m: f'stem.conv{int(m[1]) + 1}.'),
        (r'^stage(\d)\.0\.', r'layer\1.down.'),
        (r'^stage(\d)\.1\.(?=conv[12]\.)', r'layer\1.spp.'),
        (r'^stage(\d)\.\d\.', r'layer\1.csp.'),
        (r'\.main_conv\.', '.entry.'),
        (r'\.short_conv\.', '.bypass.'),
        (r'^(layer.*)\.final_conv\.', r'\1.merge.conv.'),
        (r'\.final_conv\.', '.merge.'),
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
    width, depth, separable = SIZES[variant.removesuffix('_pan')]
    conv: Callable[..., nn.Module] = SeparableConv if separable else ConvNormAct
    widths, repeats = ((128, 256, 512, 768, 1024), (3, 6, 6, 3, 3)) if '_p6' in variant else (
        (128, 256, 512, 1024), (3, 6, 6, 3))
    chs = [int(c * width) for c in widths]
    depths = [max(round(d * depth), 1) for d in repeats]
    stem_chs = int(64 * width)
    cfg = BackboneCfg(
        levels=(Level(partial(_stem, out_chs=stem_chs), stem_chs),) + tuple(
            Level(partial(_level, out_chs=c, depth=d, conv=conv, last=i == len(chs) - 1), c, depth=d)
            for i, (c, d) in enumerate(zip(chs, depths))
        ),
        convert=NAMING.convert,
        neck=reducing_neck(
            chs[1:], partial(_neck_stage, depth=depths[0], conv=conv), conv, out_chs=chs[1],
        ) if variant.endswith('_pan') else None,
    )
    return build_backbone(variant, pretrained, cfg, **kwargs)


_DET = 'https://download.openmmlab.com/mmdetection/v3.0/rtmdet'
_POSE_V1 = 'https://download.openmmlab.com/mmpose/v1'
_POSE = f'{_POSE_V1}/projects'

_ORANGE = License(
    'unknown', 'nobody: a release of a third person, which MMDetection\'s page of RTMDet links',
    'https://github.com/orange0-jp/orange-weights',
)


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
        source: str = 'OpenMMLab',
        stride: int = 32,
        metrics_source: str = 'MMDetection, configs/rtmdet, for the whole detector',
        **metrics: float,
) -> Dict[str, Any]:
    return _cfg(
        sources=[web(url)], license=license, num_classes=0, input_size=(3, size, size),
        pool_size=(size // stride, size // stride), crop_pct=1.0, crop_mode='border', interpolation='bilinear',
        info=dict(data=data, task=task, source=source, metrics=dict(metrics, size=size) if metrics else {},
                  metrics_source=metrics_source if metrics else ''),
    )


def _coco(size: str, stamp: str, ap: float) -> Dict[str, Any]:
    name = f'rtmdet_{size}_8xb32-300e_coco'
    return _detector(f'{_DET}/{name}/{name}_{stamp}.pth', ap=ap)


def _coco_ins(size: str, stamp: str, ap: float, mask_ap: float, batch: str = '8xb32') -> Dict[str, Any]:
    name = f'rtmdet-ins_{size}_{batch}-300e_coco'
    return _detector(
        f'{_DET}/{name}/{name}_{stamp}.pth', data='COCO, instance masks', task=SEGMENTATION, ap=ap, mask_ap=mask_ap)


def _rotated(name: str, digest: str, data: str = 'DOTA-v1.0', size: int = 1024, **metrics: Any) -> Dict[str, Any]:
    return _detector(
        f'https://download.openmmlab.com/mmrotate/v1.0/rotated_rtmdet/rotated_rtmdet_{name}/'
        f'rotated_rtmdet_{name}-{digest}.pth',
        data=data, task=ROTATED, license=MMROTATE, size=size,
        metrics_source='MMRotate 1.x, configs/rotated_rtmdet, for the whole detector', **metrics)


def _person(file: str, data: str, size: int, ap: float) -> Dict[str, Any]:
    return _detector(
        f'{_POSE}/{file}.pth', data=data, license=MMPOSE, size=size, ap=ap,
        metrics_source='MMPose, projects/rtmpose, for the whole detector')


def _pose(
        file: str,
        data: str,
        size: Tuple[int, int] = (256, 192),
        on: str = 'COCO val2017',
        root: str = _POSE,
        **metrics: float,
) -> Dict[str, Any]:
    return _cfg(
        sources=[web(f'{root}/{file}.pth')], license=MMPOSE, num_classes=0, input_size=(3, *size),
        pool_size=(size[0] // 32, size[1] // 32), crop_pct=1.0, interpolation='bilinear',
        info=dict(data=data, task=KEYPOINTS, source='OpenMMLab', metrics=dict(metrics, size=size[0]) if metrics else {},
                  metrics_source=f'MMPose, projects/rtmpose, for the whole network on {on}' if metrics else ''))


_AIC = 'AI Challenger and COCO, human keypoints'
_BODY7 = 'seven data sets of human keypoints (Body7)'
_HALPE26 = 'eight data sets of human keypoints (Body8), 26 keypoints'
_WHOLE = 'COCO-WholeBody, 133 keypoints'
_UCOCO = 'UBody and COCO-WholeBody, 133 keypoints, distilled (DWPose)'
_COCKTAIL14 = 'fourteen data sets of human keypoints (Cocktail14)'
_FACE6 = 'six data sets of faces, 106 keypoints (Face6)'
_HUMANART = 'Human-Art and COCO'

default_cfgs = describe_weights(with_pan({
    # The first of a model's tags is its default.
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
    'cspnet_rtmdet_nano.coco_obj365_person': _person(
        'rtmpose/rtmdet_nano_8xb32-100e_coco-obj365-person-05d8511e', 'COCO and Objects365, persons', 320, 40.3),
    'cspnet_rtmdet_nano.hand': _person(
        'rtmposev1/rtmdet_nano_8xb32-300e_hand-267f9c8f', 'hands of five data sets', 320, 76.0),
    'cspnet_rtmdet_m.coco_obj365_person': _person(
        'rtmpose/rtmdet_m_8xb32-100e_coco-obj365-person-235e8209', 'COCO and Objects365, persons', 640, 62.5),
    'cspnet_rtmdet_tiny.humanart': _person('rtmposev1/rtmdet_tiny_8xb32-300e_humanart-7da5554e', _HUMANART, 640, 46.6),
    'cspnet_rtmdet_s.humanart': _person('rtmposev1/rtmdet_s_8xb32-300e_humanart-af5bd52d', _HUMANART, 640, 50.6),
    'cspnet_rtmdet_tiny.coco': _coco('tiny', '20220902_112414-78e30dcc', 41.1),
    'cspnet_rtmdet_s.coco': _coco('s', '20220905_161602-387a891e', 44.6),
    'cspnet_rtmdet_m.coco': _coco('m', '20220719_112220-229f527c', 49.4),
    'cspnet_rtmdet_l.coco': _coco('l', '20220719_112030-5a0be7c4', 51.5),
    'cspnet_rtmdet_x.coco': _coco('x', '20220715_230555-cc79b9ae', 52.8),
    'cspnet_rtmdet_tiny.coco_ins': _coco_ins('tiny', '20221130_151727-ec670f7e', 40.5, 35.4),
    'cspnet_rtmdet_s.coco_ins': _coco_ins('s', '20221121_212604-fdc5d7ec', 44.0, 38.7),
    'cspnet_rtmdet_m.coco_ins': _coco_ins('m', '20221123_001039-6eba602e', 48.8, 42.1),
    'cspnet_rtmdet_l.coco_ins': _coco_ins('l', '20221124_103237-78d1d652', 51.2, 43.7),
    'cspnet_rtmdet_x.coco_ins': _coco_ins('x', '20221124_111313-33d4595b', 52.4, 44.6, '8xb16'),
    'cspnet_rtmdet_tiny.dota': _rotated('tiny-3x-dota', '9d821076', ap=47.37, ap50=75.36),
    'cspnet_rtmdet_s.dota': _rotated('s-3x-dota', '11f6ccf5', ap=48.16, ap50=76.93),
    'cspnet_rtmdet_m.dota': _rotated('m-3x-dota', 'beeadda6', ap=50.56, ap50=78.24),
    'cspnet_rtmdet_l.dota': _rotated('l-3x-dota', '23992372', ap=51.01, ap50=78.85),
    'cspnet_rtmdet_l.dota_100e': _rotated('l-100e-aug-dota', 'bc59fd88', ap=54.59, ap50=80.16),
    'cspnet_rtmdet_tiny.dota_ms': _rotated('tiny-3x-dota_ms', 'f12286ff', ap=53.59, ap50=79.82),
    'cspnet_rtmdet_s.dota_ms': _rotated('s-3x-dota_ms', '20ead048', ap=54.43, ap50=79.98),
    'cspnet_rtmdet_m.dota_ms': _rotated('m-3x-dota_ms', 'c71eb375', ap=55.0, ap50=80.26),
    'cspnet_rtmdet_l.dota_ms': _rotated('l-3x-dota_ms', '2738da34', ap=55.52, ap50=80.54),
    'cspnet_rtmdet_l.coco_dota_ms': _rotated(
        'l-coco_pretrain-3x-dota_ms', '06d248a2', 'COCO, then DOTA-v1.0', ap=56.74, ap50=81.33),
    'cspnet_rtmdet_tiny.hrsc': _rotated('tiny-9x-hrsc', '9f2e3ca6', 'HRSC2016', 800, ap50=97.1),
    'cspnet_rtmdet_tiny.udp_aic_coco': _pose(
        'rtmpose/cspnext-tiny_udp-aic-coco_210e-256x192-cbed682d_20230130',
        _AIC, keypoint_ap=65.5),
    'cspnet_rtmdet_s.udp_aic_coco': _pose(
        'rtmpose/cspnext-s_udp-aic-coco_210e-256x192-92f5a029_20230130',
        _AIC, keypoint_ap=70.0),
    'cspnet_rtmdet_m.udp_aic_coco': _pose(
        'rtmpose/cspnext-m_udp-aic-coco_210e-256x192-f2f7d6f6_20230130',
        _AIC, keypoint_ap=74.8),
    'cspnet_rtmdet_l.udp_aic_coco': _pose(
        'rtmpose/cspnext-l_udp-aic-coco_210e-256x192-273b7631_20230130',
        _AIC, keypoint_ap=77.2),
    'cspnet_rtmdet_tiny.udp_body7': _pose(
        'rtmposev1/cspnext-tiny_udp-body7_210e-256x192-a3775292_20230504',
        _BODY7, keypoint_ap=65.9),
    'cspnet_rtmdet_s.udp_body7': _pose(
        'rtmposev1/cspnext-s_udp-body7_210e-256x192-8c9ccbdb_20230504',
        _BODY7, keypoint_ap=68.7),
    'cspnet_rtmdet_m.udp_body7': _pose(
        'rtmposev1/cspnext-m_udp-body7_210e-256x192-e0c9327b_20230504',
        _BODY7, keypoint_ap=73.7),
    'cspnet_rtmdet_l.udp_body7': _pose(
        'rtmposev1/cspnext-l_udp-body7_210e-256x192-5e9558ef_20230504',
        _BODY7, keypoint_ap=75.7),
    'cspnet_rtmdet_m.udp_body7_384': _pose(
        'rtmposev1/cspnext-m_udp-body7_210e-384x288-b9bc2b57_20230504',
        _BODY7, (384, 288), keypoint_ap=75.8),
    'cspnet_rtmdet_l.udp_body7_384': _pose(
        'rtmposev1/cspnext-l_udp-body7_210e-384x288-b15bc30d_20230504',
        _BODY7, (384, 288), keypoint_ap=77.2),
    'cspnet_rtmdet_x.udp_body7_384': _pose(
        'rtmposev1/cspnext-x_udp-body7_210e-384x288-d28b58e6_20230529',
        _BODY7, (384, 288), keypoint_ap=78.1),
    'cspnet_rtmdet_tiny.udp_coco': _pose(
        'rtmposev1/cspnext-tiny_udp-coco_pt-in1k_210e-256x192-0908dd2d_20230123',
        'COCO, human keypoints'),
    'cspnet_rtmdet_s.udp_coco': _pose(
        'rtmposev1/cspnext-s_udp-coco_pt-in1k_210e-256x192-92dbfc1d_20230123',
        'COCO, human keypoints'),
    'cspnet_rtmdet_m.udp_coco': _pose(
        'rtmposev1/cspnext-m_udp-coco_pt-in1k_210e-256x192-95f5967e_20230123',
        'COCO, human keypoints'),
    'cspnet_rtmdet_l.udp_coco': _pose(
        'rtmposev1/cspnext-l_udp-coco_pt-in1k_210e-256x192-661cdd8c_20230123',
        'COCO, human keypoints'),
    'cspnet_rtmdet_m.udp_ap10k': _pose(
        'rtmposev1/cspnext-m_udp-ap10k_pt-in1k_210e-256x256-1f2d947a_20230123',
        'AP-10K, keypoints of animals', (256, 256), on='AP-10K', keypoint_ap=70.3),
    'cspnet_rtmdet_m.udp_wholebody': _pose(
        'rtmposev1/cspnext-m_udp-coco-wholebody_pt-in1k_210e-256x192-320fa258_20230123',
        _WHOLE),
    'cspnet_rtmdet_m.udp_crowdpose': _pose(
        'rtmposev1/cspnext-m_udp-crowdpose_pt-in1k_210e-256x192-f591079f_20230123',
        'CrowdPose, human keypoints'),
    'cspnet_rtmdet_m.udp_mpii': _pose(
        'rtmposev1/cspnext-m_udp-mpii_pt-in1k_210e-256x256-68d0402f_20230208',
        'MPII, human keypoints', (256, 256)),
    'cspnet_rtmdet_tiny.rtmpose_aic_coco': _pose(
        'rtmposev1/rtmpose-tiny_simcc-aic-coco_pt-aic-coco_420e-256x192-cfc8f33d_20230126',
        _AIC, keypoint_ap=68.5),
    'cspnet_rtmdet_s.rtmpose_aic_coco': _pose(
        'rtmpose/rtmpose-s_simcc-aic-coco_pt-aic-coco_420e-256x192-fcb2599b_20230126',
        _AIC, keypoint_ap=72.2),
    'cspnet_rtmdet_m.rtmpose_aic_coco': _pose(
        'rtmposev1/rtmpose-m_simcc-aic-coco_pt-aic-coco_420e-256x192-63eb25f7_20230126',
        _AIC, keypoint_ap=75.8),
    'cspnet_rtmdet_l.rtmpose_aic_coco': _pose(
        'rtmposev1/rtmpose-l_simcc-aic-coco_pt-aic-coco_420e-256x192-f016ffe0_20230126',
        _AIC, keypoint_ap=76.5),
    'cspnet_rtmdet_m.rtmpose_aic_coco_384': _pose(
        'rtmposev1/rtmpose-m_simcc-aic-coco_pt-aic-coco_420e-384x288-a62a0b32_20230228',
        _AIC, (384, 288), keypoint_ap=77.0),
    'cspnet_rtmdet_l.rtmpose_aic_coco_384': _pose(
        'rtmposev1/rtmpose-l_simcc-aic-coco_pt-aic-coco_420e-384x288-97d6cb0f_20230228',
        _AIC, (384, 288), keypoint_ap=77.3),
    'cspnet_rtmdet_tiny.rtmpose_coco': _pose(
        'rtmposev1/rtmpose-tiny_simcc-coco_pt-aic-coco_420e-256x192-e613ba3f_20230127',
        'COCO, human keypoints'),
    'cspnet_rtmdet_s.rtmpose_coco': _pose(
        'rtmpose/rtmpose-s_simcc-coco_pt-aic-coco_420e-256x192-8edcf0d7_20230127',
        'COCO, human keypoints'),
    'cspnet_rtmdet_m.rtmpose_coco': _pose(
        'rtmposev1/rtmpose-m_simcc-coco_pt-aic-coco_420e-256x192-d8dd5ca4_20230127',
        'COCO, human keypoints'),
    'cspnet_rtmdet_l.rtmpose_coco': _pose(
        'rtmposev1/rtmpose-l_simcc-coco_pt-aic-coco_420e-256x192-1352a4d2_20230127',
        'COCO, human keypoints'),
    'cspnet_rtmdet_tiny.rtmpose_body7': _pose(
        'rtmposev1/rtmpose-t_simcc-body7_pt-body7_420e-256x192-026a1439_20230504',
        _BODY7, keypoint_ap=65.9),
    'cspnet_rtmdet_s.rtmpose_body7': _pose(
        'rtmposev1/rtmpose-s_simcc-body7_pt-body7_420e-256x192-acd4a1ef_20230504',
        _BODY7, keypoint_ap=69.7),
    'cspnet_rtmdet_m.rtmpose_body7': _pose(
        'rtmposev1/rtmpose-m_simcc-body7_pt-body7_420e-256x192-e48f03d0_20230504',
        _BODY7, keypoint_ap=74.9),
    'cspnet_rtmdet_l.rtmpose_body7': _pose(
        'rtmposev1/rtmpose-l_simcc-body7_pt-body7_420e-256x192-4dba18fc_20230504',
        _BODY7, keypoint_ap=76.7),
    'cspnet_rtmdet_m.rtmpose_body7_384': _pose(
        'rtmposev1/rtmpose-m_simcc-body7_pt-body7_420e-384x288-65e718c4_20230504',
        _BODY7, (384, 288), keypoint_ap=76.6),
    'cspnet_rtmdet_l.rtmpose_body7_384': _pose(
        'rtmposev1/rtmpose-l_simcc-body7_pt-body7_420e-384x288-3f5a1437_20230504',
        _BODY7, (384, 288), keypoint_ap=78.3),
    'cspnet_rtmdet_x.rtmpose_body7_384': _pose(
        'rtmposev1/rtmpose-x_simcc-body7_pt-body7_700e-384x288-71d7b7e9_20230629',
        _BODY7, (384, 288), keypoint_ap=78.8),
    'cspnet_rtmdet_tiny.rtmpose_halpe26': _pose(
        'rtmposev1/rtmpose-t_simcc-body7_pt-body7-halpe26_700e-256x192-6020f8a6_20230605',
        _HALPE26, on='Body8, at a threshold of 0.1', pck=91.89),
    'cspnet_rtmdet_s.rtmpose_halpe26': _pose(
        'rtmposev1/rtmpose-s_simcc-body7_pt-body7-halpe26_700e-256x192-7f134165_20230605',
        _HALPE26, on='Body8, at a threshold of 0.1', pck=93.01),
    'cspnet_rtmdet_m.rtmpose_halpe26': _pose(
        'rtmposev1/rtmpose-m_simcc-body7_pt-body7-halpe26_700e-256x192-4d3e73dd_20230605',
        _HALPE26, on='Body8, at a threshold of 0.1', pck=94.75),
    'cspnet_rtmdet_l.rtmpose_halpe26': _pose(
        'rtmposev1/rtmpose-l_simcc-body7_pt-body7-halpe26_700e-256x192-2abb7558_20230605',
        _HALPE26, on='Body8, at a threshold of 0.1', pck=95.37),
    'cspnet_rtmdet_m.rtmpose_halpe26_384': _pose(
        'rtmposev1/rtmpose-m_simcc-body7_pt-body7-halpe26_700e-384x288-89e6428b_20230605',
        _HALPE26, (384, 288), on='Body8, at a threshold of 0.1', pck=95.15),
    'cspnet_rtmdet_l.rtmpose_halpe26_384': _pose(
        'rtmposev1/rtmpose-l_simcc-body7_pt-body7-halpe26_700e-384x288-734182ce_20230605',
        _HALPE26, (384, 288), on='Body8, at a threshold of 0.1', pck=95.56),
    'cspnet_rtmdet_x.rtmpose_halpe26_384': _pose(
        'rtmposev1/rtmpose-x_simcc-body7_pt-body7-halpe26_700e-384x288-7fb6e239_20230606',
        _HALPE26, (384, 288), on='Body8, at a threshold of 0.1', pck=95.74),
    'cspnet_rtmdet_tiny.rtmpose_humanart': _pose(
        'rtmposev1/rtmpose-t_8xb256-420e_humanart-256x192-60b68c98_20230612',
        _HUMANART),
    'cspnet_rtmdet_s.rtmpose_humanart': _pose(
        'rtmposev1/rtmpose-s_8xb256-420e_humanart-256x192-5a3ac943_20230611',
        _HUMANART),
    'cspnet_rtmdet_m.rtmpose_humanart': _pose(
        'rtmposev1/rtmpose-m_8xb256-420e_humanart-256x192-8430627b_20230611',
        _HUMANART),
    'cspnet_rtmdet_l.rtmpose_humanart': _pose(
        'rtmposev1/rtmpose-l_8xb256-420e_humanart-256x192-389f2cb0_20230611',
        _HUMANART),
    'cspnet_rtmdet_m.rtmpose_wholebody': _pose(
        'rtmposev1/rtmpose-m_simcc-coco-wholebody_pt-aic-coco_270e-256x192-cd5e845c_20230123',
        _WHOLE, on='COCO-WholeBody', wholebody_ap=58.2),
    'cspnet_rtmdet_l.rtmpose_wholebody': _pose(
        'rtmposev1/rtmpose-l_simcc-coco-wholebody_pt-aic-coco_270e-256x192-6f206314_20230124',
        _WHOLE, on='COCO-WholeBody', wholebody_ap=61.1),
    'cspnet_rtmdet_l.rtmpose_wholebody_384': _pose(
        'rtmposev1/rtmpose-l_simcc-coco-wholebody_pt-aic-coco_270e-384x288-eaeb96c8_20230125',
        _WHOLE, (384, 288), on='COCO-WholeBody', wholebody_ap=64.8),
    'cspnet_rtmdet_x.rtmpose_wholebody_384': _pose(
        'rtmposev1/rtmpose-x_simcc-coco-wholebody_pt-body7_270e-384x288-401dfc90_20230629',
        _WHOLE, (384, 288), on='COCO-WholeBody', wholebody_ap=65.3),
    'cspnet_rtmdet_tiny.dwpose': _pose(
        'rtmposev1/rtmpose-t_simcc-ucoco_dw-ucoco_270e-256x192-dcf277bf_20230728',
        _UCOCO, on='COCO-WholeBody', wholebody_ap=48.5),
    'cspnet_rtmdet_s.dwpose': _pose(
        'rtmposev1/rtmpose-s_simcc-ucoco_dw-ucoco_270e-256x192-3fd922c8_20230728',
        _UCOCO, on='COCO-WholeBody', wholebody_ap=53.8),
    'cspnet_rtmdet_m.dwpose': _pose(
        'rtmposev1/rtmpose-m_simcc-ucoco_dw-ucoco_270e-256x192-c8b76419_20230728',
        _UCOCO, on='COCO-WholeBody', wholebody_ap=60.6),
    'cspnet_rtmdet_l.dwpose': _pose(
        'rtmposev1/rtmpose-l_simcc-ucoco_dw-ucoco_270e-256x192-4d6dfc62_20230728',
        _UCOCO, on='COCO-WholeBody', wholebody_ap=63.1),
    'cspnet_rtmdet_l.dwpose_384': _pose(
        'rtmposev1/rtmpose-l_simcc-ucoco_dw-ucoco_270e-384x288-2438fd99_20230728',
        _UCOCO, (384, 288), on='COCO-WholeBody', wholebody_ap=66.5),
    'cspnet_rtmdet_m.rtmw': _pose(
        'rtmw/rtmw-dw-l-m_simcc-cocktail14_270e-256x192-20231122',
        _COCKTAIL14, on='COCO-WholeBody', wholebody_ap=58.2),
    'cspnet_rtmdet_l.rtmw': _pose(
        'rtmw/rtmw-dw-x-l_simcc-cocktail14_270e-256x192-20231122',
        _COCKTAIL14, on='COCO-WholeBody', wholebody_ap=66.0),
    'cspnet_rtmdet_x.rtmw': _pose(
        'rtmw/rtmw-x_simcc-cocktail14_pt-ucoco_270e-256x192-13a2546d_20231208',
        _COCKTAIL14, on='COCO-WholeBody', wholebody_ap=67.2),
    'cspnet_rtmdet_l.rtmw_384': _pose(
        'rtmw/rtmw-dw-x-l_simcc-cocktail14_270e-384x288-20231122',
        _COCKTAIL14, (384, 288), on='COCO-WholeBody', wholebody_ap=70.1),
    'cspnet_rtmdet_x.rtmw_384': _pose(
        'rtmw/rtmw-x_simcc-cocktail14_pt-ucoco_270e-384x288-f840f204_20231122',
        _COCKTAIL14, (384, 288), on='COCO-WholeBody', wholebody_ap=70.2),
    'cspnet_rtmdet_m.rtmpose_ap10k': _pose(
        'rtmposev1/rtmpose-m_simcc-ap10k_pt-aic-coco_210e-256x256-7a041aa1_20230206',
        'AP-10K, keypoints of animals', (256, 256), on='AP-10K', keypoint_ap=72.2),
    'cspnet_rtmdet_tiny.rtmpose_face6': _pose(
        'rtmposev1/rtmpose-t_simcc-face6_pt-in1k_120e-256x256-df79d9a5_20230529',
        _FACE6, (256, 256), on='LaPa', nme=1.67),
    'cspnet_rtmdet_s.rtmpose_face6': _pose(
        'rtmposev1/rtmpose-s_simcc-face6_pt-in1k_120e-256x256-d779fdef_20230529',
        _FACE6, (256, 256), on='LaPa', nme=1.59),
    'cspnet_rtmdet_m.rtmpose_face6': _pose(
        'rtmposev1/rtmpose-m_simcc-face6_pt-in1k_120e-256x256-72a37400_20230529',
        _FACE6, (256, 256), on='LaPa', nme=1.44),
    'cspnet_rtmdet_m.rtmpose_wholebody_face': _pose(
        'rtmposev1/rtmpose-m_simcc-coco-wholebody-face_pt-aic-coco_60e-256x256-62026ef2_20230228',
        'COCO-WholeBody, faces', (256, 256)),
    'cspnet_rtmdet_m.rtmpose_lapa': _pose(
        'rtmposev1/rtmpose-m_simcc-lapa_pt-aic-coco_120e-256x256-762b1ae2_20230422',
        'LaPa, faces', (256, 256)),
    'cspnet_rtmdet_m.rtmpose_wflw': _pose(
        'rtmposev1/rtmpose-m_simcc-wflw_pt-aic-coco_60e-256x256-dc1dcdcf_20230228',
        'WFLW, faces', (256, 256)),
    'cspnet_rtmdet_m.rtmpose_hand5': _pose(
        'rtmposev1/rtmpose-m_simcc-hand5_pt-aic-coco_210e-256x256-74fb594_20230320',
        'five data sets of hands, 21 keypoints (Hand5)', (256, 256), on='Hand5, at a threshold of 0.2', pck=96.4),
    'cspnet_rtmdet_m.rtmpose_wholebody_hand': _pose(
        'rtmposev1/rtmpose-m_simcc-coco-wholebody-hand_pt-aic-coco_210e-256x256-99477206_20230228',
        'COCO-WholeBody, hands', (256, 256)),
    'cspnet_rtmdet_m.rtmpose_crowdpose': _pose(
        'rtmposev1/rtmpose-m_simcc-crowdpose_pt-aic-coco_210e-256x192-e6192cac_20230224',
        'CrowdPose, human keypoints'),
    'cspnet_rtmdet_m.rtmpose_mpii': _pose(
        'rtmposev1/rtmpose-m_simcc-mpii_pt-aic-coco_210e-256x256-ec4dbec8_20230206',
        'MPII, human keypoints', (256, 256)),
    'cspnet_rtmdet_x.rtmpose_ucoco_384': _pose(
        'wholebody_2d_keypoint/rtmpose/ubody/rtmpose-x_simcc-ucoco_pt-aic-coco_270e-384x288-f5b50679_20230822',
        'UBody and COCO-WholeBody, 133 keypoints', (384, 288), root=_POSE_V1),
    'cspnet_rtmdet_l.rtmw3d_384': _pose(
        'wholebody_3d_keypoint/rtmw3d/rtmw3d-l_8xb64_cocktail14-384x288-794dbc78_20240626',
        f'{_COCKTAIL14}, in three dimensions', (384, 288), root=_POSE_V1),
    'cspnet_rtmdet_x.rtmw3d_384': _pose(
        'wholebody_3d_keypoint/rtmw3d/rtmw3d-x_8xb64_cocktail14-384x288-b0a0eab7_20240626',
        f'{_COCKTAIL14}, in three dimensions', (384, 288), root=_POSE_V1),
    'cspnet_rtmdet_x_p6.coco': _detector(
        'https://github.com/orange0-jp/orange-weights/releases/download/v0.1.0rtmdet-p6/'
        'rtmdet_x_p6_4xb8-300e_coco-bf32be58.pth',
        license=_ORANGE, source='orange0-jp', size=1280, stride=64, ap=54.9),
}, (
    'cspnet_rtmdet_nano_pan.coco_obj365_person', 'cspnet_rtmdet_nano_pan.hand',
    'cspnet_rtmdet_m_pan.coco_obj365_person', 'cspnet_rtmdet_tiny_pan.humanart', 'cspnet_rtmdet_s_pan.humanart',
    'cspnet_rtmdet_tiny_pan.coco', 'cspnet_rtmdet_s_pan.coco', 'cspnet_rtmdet_m_pan.coco', 'cspnet_rtmdet_l_pan.coco',
    'cspnet_rtmdet_x_pan.coco', 'cspnet_rtmdet_tiny_pan.coco_ins', 'cspnet_rtmdet_s_pan.coco_ins',
    'cspnet_rtmdet_m_pan.coco_ins', 'cspnet_rtmdet_l_pan.coco_ins', 'cspnet_rtmdet_x_pan.coco_ins',
    'cspnet_rtmdet_tiny_pan.dota', 'cspnet_rtmdet_s_pan.dota', 'cspnet_rtmdet_m_pan.dota', 'cspnet_rtmdet_l_pan.dota',
    'cspnet_rtmdet_l_pan.dota_100e', 'cspnet_rtmdet_tiny_pan.dota_ms', 'cspnet_rtmdet_s_pan.dota_ms',
    'cspnet_rtmdet_m_pan.dota_ms', 'cspnet_rtmdet_l_pan.dota_ms', 'cspnet_rtmdet_l_pan.coco_dota_ms',
    'cspnet_rtmdet_tiny_pan.hrsc', 'cspnet_rtmdet_x_p6_pan.coco',
)))


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


@register_model
def cspnet_rtmdet_x_p6(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """CSPNeXt-x with a fifth level, at stride 64, for large images."""
    return _create('cspnet_rtmdet_x_p6', pretrained, **kwargs)


cspnet_rtmdet_nano_pan = register_pan('cspnet_rtmdet_nano_pan', _create)
cspnet_rtmdet_tiny_pan = register_pan('cspnet_rtmdet_tiny_pan', _create)
cspnet_rtmdet_s_pan = register_pan('cspnet_rtmdet_s_pan', _create)
cspnet_rtmdet_m_pan = register_pan('cspnet_rtmdet_m_pan', _create)
cspnet_rtmdet_l_pan = register_pan('cspnet_rtmdet_l_pan', _create)
cspnet_rtmdet_x_pan = register_pan('cspnet_rtmdet_x_pan', _create)
cspnet_rtmdet_x_p6_pan = register_pan('cspnet_rtmdet_x_p6_pan', _create)
