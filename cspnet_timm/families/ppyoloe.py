"""CSPRepResNet, the backbone of PP-YOLOE and PP-YOLOE+.

A stem of three 3×3 convolutions, then four times a 3×3 convolution of stride 2 and a cross stage whose blocks are a 3×3
and a re-parameterisable convolution, plain in deployment: ``timm.utils.reparameterize_model``. Channel attention before
the merge. The + networks learn the weight, alpha, of each 1×1 branch.

Paper: `PP-YOLOE: An evolved version of YOLO`, https://arxiv.org/abs/2203.16250
Reference: https://github.com/PaddlePaddle/PaddleDetection, Apache-2.0
"""
import itertools
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from typing import Any, Dict, List, Sequence

import torch
import torch.nn as nn
from timm.layers import EffectiveSEModule

from ..backbone import BackboneCfg, CspBackbone, Level, LevelArgs, Neck, StateDict
from ..blocks import DarkBlock
from ..cross_stage import ComposedStage, CrossStage
from ..layers import ConvNormAct, RepConv, SpatialPyramidPool
from ..naming import Naming, register_naming, rename_keys, roll_channels
from ..neck import BottomUp, PathAggregation, TopDown
from ._builder import (
    IN1K,
    License,
    build_backbone,
    default_cfg,
    describe_weights,
    register_model,
    register_pan,
    web,
)
from ._weights import CLASSIFICATION, DETECTION, with_pan

__all__ = []

SIZES = {  # width, depth
    't': (0.375, 0.33),
    's': (0.5, 0.33),
    'm': (0.75, 0.67),
    'l': (1., 1.),
    'x': (1.25, 1.33),
}
NECK_CHS = (192, 384, 768)  # at strides 8, 16 and 32, of the large network
NECK_CHS_T = (384, 384, 384)  # of the smallest one, before it is scaled


def _stem(in_chans: int, args: LevelArgs, out_chs: int) -> nn.Module:
    mid_chs = out_chs // 2
    return nn.Sequential(OrderedDict(
        conv1=ConvNormAct(in_chans, mid_chs, 3, stride=args.stride, **args.layers),
        conv2=ConvNormAct(mid_chs, mid_chs, 3, **args.layers),
        conv3=ConvNormAct(mid_chs, out_chs, 3, **args.layers),
    ))


def _level(in_chs: int, args: LevelArgs, out_chs: int, depth: int, alpha: bool) -> nn.Module:
    mid_chs = (in_chs + out_chs) // 2
    branch_chs = mid_chs // 2
    return nn.Sequential(OrderedDict(
        down=ConvNormAct(in_chs, mid_chs, 3, stride=args.stride, dilation=args.first_dilation, **args.layers),
        csp=ComposedStage(
            nn.Sequential(*[
                DarkBlock(
                    branch_chs, branch_chs, kernel_size=(3, 3),
                    conv_layers=(ConvNormAct, partial(RepConv, alpha=alpha)), **args.block_kwargs(i))
                for i in range(depth)
            ]),
            entry=ConvNormAct(mid_chs, branch_chs, **args.layers),
            bypass=ConvNormAct(mid_chs, branch_chs, **args.layers),
            merge=nn.Sequential(OrderedDict(
                attn=EffectiveSEModule(2 * branch_chs, device=args.layers['device'], dtype=args.layers['dtype']),
                conv=ConvNormAct(2 * branch_chs, out_chs, **args.layers),
            )),
        ),
    ))


def _neck_stage(in_chs: int, out_chs: int, args: LevelArgs, depth: int, pool: bool = False) -> nn.Module:
    def blocks(chs: int) -> nn.Module:
        row: List[Any] = [(str(i), DarkBlock(
            chs, chs, kernel_size=(3, 3), conv_layers=(ConvNormAct, RepConv), shortcut=False, **args.block_kwargs(i),
        )) for i in range(depth)]
        if pool:
            row.insert((depth + 1) // 2, ('spp', SpatialPyramidPool(chs, chs, reduce=False, **args.layers)))
        return nn.Sequential(OrderedDict(row))

    return CrossStage(in_chs, out_chs, blocks=blocks, fusion='first', **args.layers)


def _neck(chs: List[int], args: LevelArgs, out_chs: Sequence[int], depth: int) -> nn.Module:
    pairs = list(itertools.pairwise(out_chs))  # of a level and the coarser one
    return PathAggregation(
        [TopDown(_neck_stage(coarse // 2 + own, fine, args, depth), ConvNormAct(coarse, coarse // 2, **args.layers))
         for own, (fine, coarse) in reversed(list(zip(chs, pairs)))],
        [BottomUp(_neck_stage(fine + coarse, coarse, args, depth),
                  ConvNormAct(fine, fine, 3, stride=2, **args.layers)) for fine, coarse in pairs],
        top=_neck_stage(chs[-1], out_chs[-1], args, depth, pool=True),
    )


def _rename_neck(own: StateDict) -> StateDict:
    out = rename_keys(own, (  # PaddleDetection counts some of its lists from stride 32
        (r'^neck\.(fpn_stages\.0|reduce_layers\.2)\.0\.', 'neck.top.'),
        (r'^neck\.(fpn_stages\.1|top_down_layers\.0)\.0\.', 'neck.top_down.0.stage.'),
        (r'^neck\.(fpn_stages\.2|top_down_layers\.1)\.0\.', 'neck.top_down.1.stage.'),
        (r'^neck\.(fpn_routes\.(\d)|upsample_layers\.(\d)\.0)\.',
         lambda m: f'neck.top_down.{m[2] or m[3]}.reduce.'),
        (r'^neck\.(pan_routes\.1|downsample_layers\.0)\.', 'neck.bottom_up.0.down.'),
        (r'^neck\.(pan_routes\.0|downsample_layers\.1)\.', 'neck.bottom_up.1.down.'),
        (r'^neck\.(pan_stages\.1|bottom_up_layers\.0)\.0\.', 'neck.bottom_up.0.stage.'),
        (r'^neck\.(pan_stages\.0|bottom_up_layers\.1)\.0\.', 'neck.bottom_up.1.stage.'),
        (r'\.(top|stage)\.conv1\.', r'.\1.bypass.'),
        (r'\.(top|stage)\.conv2\.', r'.\1.entry.'),
        (r'\.(top|stage)\.conv3\.', r'.\1.merge.'),
        (r'\.(convs|blocks)\.spp\.(conv|conv2)\.(?=conv|bn)', '.blocks.spp.conv2.'),
        (r'\.convs\.', '.blocks.'),
    ))
    for key in [k for k in out if k.endswith('.alpha')]:  # of PP-YOLOE-R: it scales what a batch norm gives
        alpha, conv = out.pop(key), key.removesuffix('.alpha')
        for name in ('weight', 'bias'):
            branch = next((k for k in (f'{conv}.conv2.bn.{name}', f'{conv}.rbr_1x1.bn.{name}') if k in out), None)
            if branch is not None and (alpha.is_meta or alpha.any()):
                out[branch] = out[branch] * alpha
    for key, value in out.items():
        if key.endswith('.merge.conv.weight') and value.ndim == 4:  # the reference concatenates [bypass, blocks]
            roll_channels(out, key, (1,))
    return out


def _rename(own: StateDict, whole: StateDict) -> StateDict:
    neck = {k: v for k, v in whole.items() if k.startswith('neck.')}
    if not any(k.startswith('neck.encoder.') for k in neck):  # of the networks for small objects: another neck
        own = {**own, **_rename_neck(neck)}
    out = rename_keys(own, (
        (r'^stem\.(\d)\.', lambda m: f'stem.conv{int(m[1]) + 1}.'),
        (r'^stages\.(\d)\.', lambda m: f'layer{int(m[1]) + 1}.csp.'),
        (r'^stage(\d)\.0\.', r'layer\1.csp.'),
        (r'\.csp\.conv_down\.', '.down.'),
        (r'\.csp\.conv1\.', '.csp.bypass.'),
        (r'\.csp\.conv2\.', '.csp.entry.'),
        (r'\.csp\.conv3\.', '.csp.merge.conv.'),
        (r'\.csp\.attn\.fc\.(conv\.)?', '.csp.merge.attn.fc.'),
        (r'\.conv2\.(conv1|rbr_dense)\.', '.conv2.conv3x3.'),
        (r'\.conv2\.(conv2|rbr_1x1)\.', '.conv2.conv1x1.'),
        (r'\._mean$', '.running_mean'),
        (r'\._variance$', '.running_var'),
    ))
    for key, value in out.items():
        if key.endswith('.alpha') and not value.is_meta and not value.any():
            out[key] = torch.ones_like(value)  # the reference takes an alpha of exactly zero for none at all
    for layer in ('layer1', 'layer2', 'layer3', 'layer4'):  # the reference concatenates [bypass, blocks]
        merge = f'{layer}.csp.merge'
        roll_channels(out, f'{merge}.conv.conv.weight', (1,))
        roll_channels(out, f'{merge}.attn.fc.weight', (0, 1))
        roll_channels(out, f'{merge}.attn.fc.bias', (0,))
    return out


NAMING = register_naming(Naming(
    'PP-YOLOE', ('cspnet_ppyoloe_*',), r'(stages\.0|stage1\.0)\.conv_down\.conv\.weight', _rename))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CspBackbone:
    size = variant.removesuffix('_pan')[-1]
    width, depth = SIZES[size]
    stem_chs, *chs = [max(round(c * width), 1) for c in (64, 128, 256, 512, 1024)]
    depths = [max(round(d * depth), 1) for d in (3, 6, 6, 3)]
    cfg = BackboneCfg(
        levels=(Level(partial(_stem, out_chs=stem_chs), stem_chs),) + tuple(
            Level(partial(_level, out_chs=c, depth=d, alpha='_plus_' in variant), c, depth=d)
            for c, d in zip(chs, depths)
        ),
        convert=NAMING.convert,
    )
    if variant.endswith('_pan'):
        neck_chs = [max(round(c * width), 1) for c in (NECK_CHS_T if size == 't' else NECK_CHS)]
        cfg = replace(cfg, neck=Neck(partial(_neck, out_chs=neck_chs, depth=depths[0]), tuple(neck_chs)))
    return build_backbone(variant, pretrained, cfg, **kwargs)


_MODELS = 'https://paddledet.bj.bcebos.com/models'
_SLICED = 'https://bj.bcebos.com/v1/paddledet/models'


_PADDLE = License(
    'apache-2.0', 'LICENSE of PaddlePaddle/PaddleDetection; none is stated for the file (asked in its issue 9500)',
    'https://github.com/PaddlePaddle/PaddleDetection/blob/develop/LICENSE',
)


def _cfg(
        url: str,
        data: str,
        task: str = DETECTION,
        metrics_source: str = 'PaddleDetection, configs/ppyoloe, for the whole detector',
        **kwargs: Any,
) -> Dict[str, Any]:
    metrics = kwargs.pop('metrics', {})
    return default_cfg(
        sources=[web(url)], license=_PADDLE, num_classes=0, first_conv='stem.conv1.conv', paper_ids='arXiv:2203.16250',
        paper_name='PP-YOLOE: An evolved version of YOLO',
        info=dict(data=data, task=task, source='PaddleDetection', metrics=metrics,
                  metrics_source=metrics_source if metrics else ''),
        **kwargs,
    )


def _in1k(size: str) -> Dict[str, Any]:
    return _cfg(f'{_MODELS}/pretrained/CSPResNetb_{size}_pretrained.pdparams', IN1K, task=CLASSIFICATION)


def _detector(url: str, data: str, plus: bool, metrics: Dict[str, float], **kwargs: Any) -> Dict[str, Any]:
    side = int(metrics['size'])
    scale: Dict[str, Any] = dict(mean=(0., 0., 0.), std=(1., 1., 1.)) if plus else {}
    return _cfg(url, data, metrics=metrics, input_size=(3, side, side), pool_size=(side // 32, side // 32),
                crop_pct=1.0, crop_mode='squash', **scale, **kwargs)


def _small(
        file: str,
        ap: float,
        plus: bool,
        data: str = 'VisDrone-DET',
        size: int = 640,
        root: str = _MODELS,
) -> Dict[str, Any]:
    return _detector(
        f'{root}/{file}.pdparams', data, plus, dict(ap=ap, size=size),
        metrics_source='PaddleDetection, configs/smalldet, for the whole detector')


def _application(file: str, ap: float, plus: bool, data: str) -> Dict[str, Any]:
    return _detector(
        f'{_MODELS}/{file}.pdparams', data, plus, dict(ap=ap, size=640),
        metrics_source='PaddleDetection, configs/ppyoloe/application, for the whole detector')


def _coco(file: str, ap: float, plus: bool) -> Dict[str, Any]:
    return _detector(f'{_MODELS}/{file}.pdparams', 'COCO', plus, dict(ap=ap, size=640))


def _obj365(size: str, ap50: float) -> Dict[str, Any]:
    url = f'https://bj.bcebos.com/v1/paddledet/models/pretrained/ppyoloe_crn_{size}_obj365_pretrained.pdparams'
    return _detector(url, 'Objects365', True, dict(ap50=ap50, size=640))


default_cfgs = describe_weights(with_pan({
    'cspnet_ppyoloe_t.in1k': _in1k('t'),
    'cspnet_ppyoloe_s.in1k': _in1k('s'),
    'cspnet_ppyoloe_m.in1k': _in1k('m'),
    'cspnet_ppyoloe_l.in1k': _in1k('l'),
    'cspnet_ppyoloe_x.in1k': _in1k('x'),
    'cspnet_ppyoloe_s.coco': _coco('ppyoloe_crn_s_300e_coco', 43.0, False),
    'cspnet_ppyoloe_m.coco': _coco('ppyoloe_crn_m_300e_coco', 49.0, False),
    'cspnet_ppyoloe_l.coco': _coco('ppyoloe_crn_l_300e_coco', 51.4, False),
    'cspnet_ppyoloe_x.coco': _coco('ppyoloe_crn_x_300e_coco', 52.3, False),
    'cspnet_ppyoloe_s.coco_400e': _coco('ppyoloe_crn_s_400e_coco', 43.4, False),
    'cspnet_ppyoloe_plus_s.obj365': _obj365('s', 18.1),
    'cspnet_ppyoloe_plus_m.obj365': _obj365('m', 25.0),
    'cspnet_ppyoloe_plus_l.obj365': _obj365('l', 30.8),
    'cspnet_ppyoloe_plus_x.obj365': _obj365('x', 32.7),
    'cspnet_ppyoloe_plus_t.coco': _coco('ppyoloe_plus_crn_t_auxhead_300e_coco', 39.9, True),
    'cspnet_ppyoloe_plus_s.coco': _coco('ppyoloe_plus_crn_s_80e_coco', 43.7, True),
    'cspnet_ppyoloe_plus_m.coco': _coco('ppyoloe_plus_crn_m_80e_coco', 49.8, True),
    'cspnet_ppyoloe_plus_l.coco': _coco('ppyoloe_plus_crn_l_80e_coco', 52.9, True),
    'cspnet_ppyoloe_plus_x.coco': _coco('ppyoloe_plus_crn_x_80e_coco', 54.7, True),
    'cspnet_ppyoloe_plus_m.coco_distill': _coco('ppyoloe_plus_crn_m_80e_coco_distill', 51.0, True),
    'cspnet_ppyoloe_plus_l.coco_distill': _coco('ppyoloe_plus_crn_l_80e_coco_distill', 54.0, True),
    'cspnet_ppyoloe_plus_l.coco_sod': _small('ppyoloe_plus_sod_crn_l_80e_coco', 53.0, True, 'COCO'),
    'cspnet_ppyoloe_s.visdrone': _small('ppyoloe_crn_s_80e_visdrone', 23.5, False),
    'cspnet_ppyoloe_l.visdrone': _small('ppyoloe_crn_l_80e_visdrone', 29.2, False),
    # These have the + networks' alphas, and the images of the others.
    'cspnet_ppyoloe_plus_s.visdrone_p2': _small('ppyoloe_crn_s_p2_alpha_80e_visdrone', 24.4, False),
    'cspnet_ppyoloe_plus_l.visdrone_p2': _small('ppyoloe_crn_l_p2_alpha_80e_visdrone', 30.1, False),
    'cspnet_ppyoloe_plus_l.visdrone_alpha_1920': _small(
        'ppyoloe_crn_l_alpha_largesize_80e_visdrone', 41.9, False, size=1920),
    'cspnet_ppyoloe_plus_l.visdrone_p2_1920': _small(
        'ppyoloe_crn_l_p2_alpha_largesize_80e_visdrone', 41.3, False, size=1920),
    'cspnet_ppyoloe_plus_l.visdrone_1920': _small('ppyoloe_plus_crn_l_largesize_80e_visdrone', 43.3, True, size=1920),
    'cspnet_ppyoloe_plus_s.visdrone_sod': _small('ppyoloe_plus_sod_crn_s_80e_visdrone', 25.1, True),
    'cspnet_ppyoloe_plus_l.visdrone_sod': _small('ppyoloe_plus_sod_crn_l_80e_visdrone', 31.9, True),
    'cspnet_ppyoloe_plus_l.visdrone_sod_1920': _small(
        'ppyoloe_plus_sod_crn_l_largesize_80e_visdrone', 42.7, True, size=1920),
    'cspnet_ppyoloe_l.visdrone_sliced': _small(
        'ppyoloe_crn_l_80e_sliced_visdrone_640_025', 38.5, False, 'VisDrone-DET, in tiles', root=_SLICED),
    'cspnet_ppyoloe_l.dota_p2_sliced': _small(
        'ppyoloe_p2_crn_l_80e_sliced_DOTA_500_025', 53.9, False, 'DOTA, in tiles', root=_SLICED),
    'cspnet_ppyoloe_l.xview_p2_sliced': _small(
        'ppyoloe_p2_crn_l_80e_sliced_xview_400_025', 14.9, False, 'xView, in tiles', root=_SLICED),
    'cspnet_ppyoloe_m.wgisd': _application('ppyoloe_crn_m_80e_wgisd', 52.7, False, 'Embrapa WGISD, grapes'),
    'cspnet_ppyoloe_m.exdark': _application('ppyoloe_crn_m_80e_exdark', 56.4, False, 'ExDark, low light'),
    'cspnet_ppyoloe_m.pcb': _application('ppyoloe_crn_m_80e_pcb', 50.8, False, 'PKU-Market-PCB, circuit boards'),
    'cspnet_ppyoloe_plus_m.obj365_wgisd': _application(
        'ppyoloe_plus_crn_m_80e_obj365_pretrained_wgisd', 60.8, True, 'Objects365, then Embrapa WGISD, grapes'),
    'cspnet_ppyoloe_plus_m.coco_wgisd': _application(
        'ppyoloe_plus_crn_m_80e_coco_pretrained_wgisd', 59.7, True, 'COCO, then Embrapa WGISD, grapes'),
    'cspnet_ppyoloe_plus_m.obj365_exdark': _application(
        'ppyoloe_plus_crn_m_80e_obj365_pretrained_exdark', 57.7, True, 'Objects365, then ExDark, low light'),
    'cspnet_ppyoloe_plus_m.coco_exdark': _application(
        'ppyoloe_plus_crn_m_80e_coco_pretrained_exdark', 58.1, True, 'COCO, then ExDark, low light'),
    'cspnet_ppyoloe_plus_m.obj365_pcb': _application(
        'ppyoloe_plus_crn_m_80e_obj365_pretrained_pcb', 52.7, True, 'Objects365, then PKU-Market-PCB, circuit boards'),
    'cspnet_ppyoloe_plus_m.coco_pcb': _application(
        'ppyoloe_plus_crn_m_80e_coco_pretrained_pcb', 52.4, True, 'COCO, then PKU-Market-PCB, circuit boards'),
}, (
    'cspnet_ppyoloe_s_pan.coco', 'cspnet_ppyoloe_m_pan.coco', 'cspnet_ppyoloe_l_pan.coco', 'cspnet_ppyoloe_x_pan.coco',
    'cspnet_ppyoloe_s_pan.coco_400e', 'cspnet_ppyoloe_plus_s_pan.obj365', 'cspnet_ppyoloe_plus_m_pan.obj365',
    'cspnet_ppyoloe_plus_l_pan.obj365', 'cspnet_ppyoloe_plus_x_pan.obj365', 'cspnet_ppyoloe_plus_t_pan.coco',
    'cspnet_ppyoloe_plus_s_pan.coco', 'cspnet_ppyoloe_plus_m_pan.coco', 'cspnet_ppyoloe_plus_l_pan.coco',
    'cspnet_ppyoloe_plus_x_pan.coco', 'cspnet_ppyoloe_plus_m_pan.coco_distill',
    'cspnet_ppyoloe_plus_l_pan.coco_distill', 'cspnet_ppyoloe_s_pan.visdrone', 'cspnet_ppyoloe_l_pan.visdrone',
    'cspnet_ppyoloe_plus_l_pan.visdrone_alpha_1920', 'cspnet_ppyoloe_plus_l_pan.visdrone_1920',
    'cspnet_ppyoloe_l_pan.visdrone_sliced', 'cspnet_ppyoloe_m_pan.wgisd', 'cspnet_ppyoloe_m_pan.exdark',
    'cspnet_ppyoloe_m_pan.pcb', 'cspnet_ppyoloe_plus_m_pan.obj365_wgisd', 'cspnet_ppyoloe_plus_m_pan.coco_wgisd',
    'cspnet_ppyoloe_plus_m_pan.obj365_exdark', 'cspnet_ppyoloe_plus_m_pan.coco_exdark',
    'cspnet_ppyoloe_plus_m_pan.obj365_pcb', 'cspnet_ppyoloe_plus_m_pan.coco_pcb',
)))


@register_model
def cspnet_ppyoloe_t(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Three eighths of the large network's width, a third of its depth."""
    return _create('cspnet_ppyoloe_t', pretrained, **kwargs)


@register_model
def cspnet_ppyoloe_s(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Half the large network's width, a third of its depth."""
    return _create('cspnet_ppyoloe_s', pretrained, **kwargs)


@register_model
def cspnet_ppyoloe_m(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Three quarters of the large network's width, two thirds of its depth."""
    return _create('cspnet_ppyoloe_m', pretrained, **kwargs)


@register_model
def cspnet_ppyoloe_l(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 64 to 1024, 3, 6, 6 and 3 blocks."""
    return _create('cspnet_ppyoloe_l', pretrained, **kwargs)


@register_model
def cspnet_ppyoloe_x(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """1.25 times the large network's width, 1.33 times its depth."""
    return _create('cspnet_ppyoloe_x', pretrained, **kwargs)


@register_model
def cspnet_ppyoloe_plus_t(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Three eighths of the large network's width, a third of its depth, with learnt alphas."""
    return _create('cspnet_ppyoloe_plus_t', pretrained, **kwargs)


@register_model
def cspnet_ppyoloe_plus_s(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Half the large network's width, a third of its depth, with learnt alphas."""
    return _create('cspnet_ppyoloe_plus_s', pretrained, **kwargs)


@register_model
def cspnet_ppyoloe_plus_m(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Three quarters of the large network's width, two thirds of its depth, with learnt alphas."""
    return _create('cspnet_ppyoloe_plus_m', pretrained, **kwargs)


@register_model
def cspnet_ppyoloe_plus_l(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 64 to 1024, 3, 6, 6 and 3 blocks, with learnt alphas."""
    return _create('cspnet_ppyoloe_plus_l', pretrained, **kwargs)


@register_model
def cspnet_ppyoloe_plus_x(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """1.25 times the large network's width, 1.33 times its depth, with learnt alphas."""
    return _create('cspnet_ppyoloe_plus_x', pretrained, **kwargs)


cspnet_ppyoloe_s_pan = register_pan('cspnet_ppyoloe_s_pan', _create)
cspnet_ppyoloe_m_pan = register_pan('cspnet_ppyoloe_m_pan', _create)
cspnet_ppyoloe_l_pan = register_pan('cspnet_ppyoloe_l_pan', _create)
cspnet_ppyoloe_x_pan = register_pan('cspnet_ppyoloe_x_pan', _create)
cspnet_ppyoloe_plus_t_pan = register_pan('cspnet_ppyoloe_plus_t_pan', _create)
cspnet_ppyoloe_plus_s_pan = register_pan('cspnet_ppyoloe_plus_s_pan', _create)
cspnet_ppyoloe_plus_m_pan = register_pan('cspnet_ppyoloe_plus_m_pan', _create)
cspnet_ppyoloe_plus_l_pan = register_pan('cspnet_ppyoloe_plus_l_pan', _create)
cspnet_ppyoloe_plus_x_pan = register_pan('cspnet_ppyoloe_plus_x_pan', _create)
