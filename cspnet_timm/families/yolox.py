"""The backbone of YOLOX: YOLOv5's Darknet in the form of Megvii's YOLOX, and of MMDetection.

A focus stem, then four times a 3×3 convolution of stride 2 and a cross stage of Darknet's blocks. The last level has an
SPP before its cross stage, and blocks without a shortcut. In the smallest network the 3×3 convolutions behind the stem
are separable. Focus, a 3×3 convolution of the four pixels of each 2×2 patch, is one 6×6 convolution of stride 2.

KerasCV has the same network under the name CSPDarkNet, trained on ImageNet, and with TensorFlow's padding: where a 3×3
convolution halves an even map, all of it lies behind the map (:class:`~cspnet_timm.layers.SamePad`). With padding on
both sides the same weights give other numbers, so that ``cspnet_yolox_*_keras`` are networks of their own, whose
tensors have other names: neither's weights load into the other.

Paper: `YOLOX: Exceeding YOLO Series in 2021`, https://arxiv.org/abs/2107.08430
References: https://github.com/Megvii-BaseDetection/YOLOX and https://github.com/keras-team/keras-cv, both Apache-2.0
"""
import re
from collections import OrderedDict
from functools import partial
from typing import Any, Callable, Dict, List, Tuple

import torch.nn as nn

from ..backbone import BackboneCfg, CspBackbone, Level, LevelArgs, StateDict
from ..blocks import DarkBlock
from ..cross_stage import CrossStage
from ..layers import ConvNormAct, SamePad, SeparableConv, SpatialPyramidPool
from ..naming import Naming, focus_to_conv, register_foreign_project, register_naming, rename_keys
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
from ._neck import reducing_neck, rename_reducing_neck
from ._openmmlab import MMDETECTION, MMPOSE
from ._weights import CLASSIFICATION, DETECTION, KEYPOINTS, with_pan

__all__ = []

SIZES = {  # width, depth, separable 3×3 convolutions
    'cspnet_yolox_nano': (0.25, 0.33, True),
    'cspnet_yolox_tiny': (0.375, 0.33, False),
    'cspnet_yolox_s': (0.5, 0.33, False),
    'cspnet_yolox_m': (0.75, 0.67, False),
    'cspnet_yolox_l': (1., 1., False),
    'cspnet_yolox_x': (1.25, 1.33, False),
    'cspnet_yolox_tiny_keras': (0.375, 0.33, False),
    'cspnet_yolox_l_keras': (1., 1., False),
}


def _stem(in_chans: int, args: LevelArgs, out_chs: int) -> nn.Module:
    return ConvNormAct(in_chans, out_chs, 6, stride=args.stride, padding=2, **args.layers)


def _cross_stage(
        in_chs: int,
        out_chs: int,
        args: LevelArgs,
        depth: int,
        conv: Callable[..., nn.Module],
        shortcut: bool,
) -> nn.Module:
    return CrossStage(
        in_chs, out_chs,
        blocks=lambda chs: nn.Sequential(*[
            DarkBlock(chs, chs, conv_layers=(ConvNormAct, conv), shortcut=shortcut, **args.block_kwargs(i))
            for i in range(depth)
        ]),
        fusion='first',
        **args.layers,
    )


def _same_conv(in_chs: int, out_chs: int, kernel_size: int, dilation: int, **kwargs: Any) -> nn.Module:
    """A 3×3 convolution of stride 2 with TensorFlow's padding."""
    return nn.Sequential(OrderedDict(
        pad=SamePad(dilation),
        conv=ConvNormAct(in_chs, out_chs, kernel_size, dilation=dilation, padding=0, **kwargs),
    ))


def _level(
        in_chs: int,
        args: LevelArgs,
        out_chs: int,
        depth: int,
        conv: Callable[..., nn.Module],
        down: Callable[..., nn.Module],
        last: bool,
) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        down=down(in_chs, out_chs, 3, stride=args.stride, dilation=args.first_dilation, **args.layers))
    if last:
        layers['spp'] = SpatialPyramidPool(out_chs, out_chs, entry_act_layer=args.layers['act_layer'], **args.layers)
    layers['csp'] = _cross_stage(out_chs, out_chs, args, depth, conv, shortcut=not last)
    return nn.Sequential(layers)


_NECK = {  # of Megvii's files, beside those of OpenMMLab
    'lateral_conv0': 'top', 'C3_p4': 'top_down.0.stage.csp', 'reduce_conv1': 'top_down.0.stage.reduce',
    'C3_p3': 'top_down.1.stage', 'bu_conv2': 'bottom_up.0.down', 'C3_n3': 'bottom_up.0.stage',
    'bu_conv1': 'bottom_up.1.down', 'C3_n4': 'bottom_up.1.stage',
}
_BESIDE = rf'neck\.|backbone\.({"|".join(_NECK)})\.'


def _rename(own: StateDict, whole: StateDict) -> StateDict:
    own = {**own, **{k: v for k, v in whole.items() if re.match(_BESIDE, k)}}
    # What MMDetection calls the neck's last convolutions is the first of the head in YOLOX.
    own = rename_keys(own, (
        (r'^neck\.out_(convs|layers)\.', 'bbox_head.stems.'),
        (r'^backbone\.(\w+)\.', lambda m: f'neck.{_NECK[m[1]]}.'),
    ))
    own = rename_reducing_neck(own)
    own = rename_keys(own, ((r'^dark(\d)\.', lambda m: f'stage{int(m[1]) - 1}.'), (r'^stem\.conv\.', 'stem.')))
    out = rename_keys(own, (
        (r'^stage(\d)\.0\.', r'layer\1.down.'),
        (r'^stage(?:([123])\.1|(4)\.2)\.', lambda m: f'layer{m[1] or m[2]}.csp.'),
        (r'^stage4\.1\.', 'layer4.spp.'),
        (r'\.(csp|stage)\.(conv1|main_conv)\.', r'.\1.entry.'),
        (r'\.(csp|stage)\.(conv2|short_conv)\.', r'.\1.bypass.'),
        (r'\.(csp|stage)\.(conv3|final_conv)\.', r'.\1.merge.'),
        (r'\.(csp|stage)\.m\.', r'.\1.blocks.'),
        (r'\.(dconv|depthwise_conv)\.', '.depthwise.'),
        (r'\.(pconv|pointwise_conv)\.', '.pointwise.'),
    ))
    weight = out.get('stem.conv.weight')
    if weight is not None and weight.shape[1:] == (12, 3, 3):
        out['stem.conv.weight'] = focus_to_conv(weight).flip(1)  # the files' networks take BGR, this one RGB
    return out


NAMING = register_naming(Naming(
    'YOLOX', ('cspnet_yolox_*',), r'dark2\.1\.conv1\.conv\.weight|stage1\.1\.main_conv\.conv\.weight', _rename))


# KerasCV's CSPDarkNet. Its layers outside of the cross stages, in the order in which they run:
_SINGLE = (
    ('stem_conv', 'stem'), ('dark2_conv', 'layer1.down.conv'), ('dark3_conv', 'layer2.down.conv'),
    ('dark4_conv', 'layer3.down.conv'), ('dark5_conv', 'layer4.down.conv'), ('dark5_spp_conv1', 'layer4.spp.conv1'),
    ('dark5_spp_conv2', 'layer4.spp.conv2'),
)
_KERAS_CSP = re.compile(r'(?:.*\.)?(?:dark(\d)_csp|cross_stage_partial(?:_(\d+))?)\.')
_UNNAMED = 1000  # stages have numbers of Keras' own from here on, with gaps between them
_ALL_STAGES = -1  # those of a backbone that is one layer of a classifier, in Keras 2's files, are in one group
_KERAS_NORM = re.compile(r'(?:\w+_bn|batch_normalization(?:_\d+)?)')
_KERAS_HEAD = re.compile(r'(?:.*\.)?(?:predictions|dense)\.(weight|bias)')


def _keras_order(layer: str) -> Tuple[float, ...]:
    """Where a layer stands among those of its cross stage, or of those outside of all.

    Layers without a name have been numbered as they were made, which is the order in which they run: ``conv2d``,
    ``conv2d_1``, …, or ``sequential_3`` around them. The blocks of a cross stage were made before its last convolution.
    """
    tokens = layer.split('.')
    for i, (name, _) in enumerate(_SINGLE):
        if re.fullmatch(rf'{name}_(conv|bn)', tokens[-1]):
            return (i,)
    numbers = [re.findall(r'\d+', token.replace('conv2d', 'conv')) for token in tokens]
    return tuple(
        2.5 if token == 'bottleneck_convs' else float(found[-1]) if found else 0.
        for token, found in zip(tokens, numbers))


def _keras_layers(own: StateDict) -> Dict[int, List[Dict[str, str]]]:
    """The convolutions of each cross stage, and under 0 the others, as keys by ``conv.weight``, ``bn.weight``, …."""
    parts: Dict[int, Dict[str, Dict[str, Dict[str, str]]]] = {}
    for key in own:
        layer, _, leaf = key.rpartition('.')
        if 'depthwise' in key:
            raise ValueError(f'{key!r} is of a separable convolution (use_depthwise=True)')
        if _KERAS_HEAD.fullmatch(key) or own[key].ndim not in (1, 4):
            continue
        match = _KERAS_CSP.match(key)
        stage = 0 if match is None else int(match[1] or int(match[2] or 0) + _UNNAMED)
        if match is None and re.search(r'\bconv_block\d+_(conv|bn)$', layer):
            stage = _ALL_STAGES
        kind = 'bn' if _KERAS_NORM.fullmatch(layer.rpartition('.')[2]) else 'conv'
        within = layer[match.end():] if match is not None else layer
        parts.setdefault(stage, {'conv': {}, 'bn': {}})[kind].setdefault(within, {})[f'{kind}.{leaf}'] = key
    layers: Dict[int, List[Dict[str, str]]] = {}
    for stage, kinds in parts.items():
        convs, norms = (sorted(kinds[kind].items(), key=lambda item: _keras_order(item[0])) for kind in ('conv', 'bn'))
        if len(convs) != len(norms):
            raise ValueError(f'{len(convs)} convolutions and {len(norms)} batch norms are in stage {stage}')
        layers[stage] = [{**conv, **norm} for (_, conv), (_, norm) in zip(convs, norms)]
    stages: List[List[Dict[str, str]]] = []
    chs = 0
    for keys in layers.pop(_ALL_STAGES, []):  # a stage's last convolution alone has twice the channels of its first
        out_chs = own[keys['conv.weight']].shape[0]
        if not chs:
            stages.append([])
            chs = 2 * out_chs
        stages[-1].append(keys)
        chs = 0 if out_chs == chs else chs
    layers.update(enumerate(stages, 2))
    layers.update(enumerate([layers.pop(stage) for stage in sorted(layers) if stage >= _UNNAMED], 2))
    if sorted(layers) != [0, 2, 3, 4, 5]:
        raise ValueError(f'the cross stages {sorted(layers)[1:]} are not dark2 to dark5')
    return layers


def _rename_keras(own: StateDict, whole: StateDict) -> StateDict:
    layers = _keras_layers(own)
    if len(layers[0]) != len(_SINGLE):
        raise ValueError(f'{len(layers[0])} convolutions are outside of its cross stages')
    names = dict(zip((name for _, name in _SINGLE), layers[0]))
    for stage in range(2, 6):
        if len(layers[stage]) < 5:
            raise ValueError(f'{len(layers[stage])} convolutions are in dark{stage}_csp')
        entry, bypass, *blocks, merge = layers[stage]
        prefix = f'layer{stage - 1}.csp'
        names.update({f'{prefix}.entry': entry, f'{prefix}.bypass': bypass, f'{prefix}.merge': merge})
        if len(blocks) % 2:
            raise ValueError(f'{len(blocks)} convolutions are in the blocks of dark{stage}_csp')
        names.update({f'{prefix}.blocks.{i // 2}.conv{i % 2 + 1}': conv for i, conv in enumerate(blocks)})
    out = {f'{name}.{leaf}': own[key] for name, keys in names.items() for leaf, key in keys.items()}
    out.update({f'head.fc.{m[1]}': own[key] for key in own if (m := _KERAS_HEAD.fullmatch(key))})
    weight = out.get('stem.conv.weight')
    if weight is not None and weight.shape[1:] == (12, 3, 3):
        out['stem.conv.weight'] = focus_to_conv(weight)
    return out


KERAS_NAMING = register_naming(Naming(
    'KerasCV\'s CSPDarkNet', ('cspnet_yolox_*_keras',),
    r'(?:\w+\.)*?(?:dark2_csp\.(?:\w+\.)*(?:conv_block\d+_conv|conv2d(?:_\d+)?)|'
    r'csp_dark_net_backbone(?:_\d+)?\.conv_block\d+_conv|'
    r'cross_stage_partial\.darknet_conv1\.conv2d)\.weight',
    _rename_keras))

register_foreign_project('KerasCV\'s YOLOv8', r'(?:\w+\.)*stem_1_conv\.weight')


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CspBackbone:
    width, depth, separable = SIZES[variant.removesuffix('_pan')]
    conv: Callable[..., nn.Module] = SeparableConv if separable else ConvNormAct
    keras = variant.endswith('_keras')
    stem_chs, depth = int(64 * width), max(round(depth * 3), 1)
    levels = [Level(partial(_stem, out_chs=stem_chs), stem_chs)]
    for i, (scale, repeats) in enumerate(((2, 1), (4, 3), (8, 3), (16, 1))):
        chs, blocks = stem_chs * scale, depth * repeats
        levels.append(Level(
            partial(_level, out_chs=chs, depth=blocks, conv=conv, down=_same_conv if keras else conv, last=i == 3),
            chs, depth=blocks))
    neck = reducing_neck(
        [level.out_chs for level in levels[-3:]], partial(_cross_stage, depth=depth, conv=conv, shortcut=False), conv)
    cfg = BackboneCfg(
        levels=tuple(levels), bn_eps=1e-3, bn_momentum=0.01 if keras else 0.03,
        convert=(KERAS_NAMING if keras else NAMING).convert,
        neck=neck if variant.endswith('_pan') else None)
    return build_backbone(variant, pretrained, cfg, **kwargs)


_MEGVII = License(
    'apache-2.0', 'LICENSE of Megvii-BaseDetection/YOLOX; none is stated for the file (asked in its issue 1865)',
    'https://github.com/Megvii-BaseDetection/YOLOX/blob/main/LICENSE',
)

_KERAS_CV = License(
    'apache-2.0', 'LICENSE of keras-team/keras-cv; none is stated for the file',
    'https://github.com/keras-team/keras-cv/blob/master/LICENSE',
)


def _cfg(
        url: str,
        source: str,
        license: License,
        metrics_source: str = '',
        data: str = 'COCO',
        task: str = DETECTION,
        size: int = 640,
        **metrics: float,
) -> Dict[str, Any]:
    return default_cfg(
        sources=[web(url)], license=license, num_classes=0, input_size=(3, size, size),
        pool_size=(size // 32, size // 32), crop_pct=1.0, crop_mode='border', interpolation='bilinear',
        mean=(0., 0., 0.), std=(1 / 255, 1 / 255, 1 / 255),
        paper_ids='arXiv:2107.08430', paper_name='YOLOX: Exceeding YOLO Series in 2021',
        info=dict(data=data, task=task, source=source, metrics=dict(metrics, size=size) if metrics else {},
                  metrics_source=metrics_source if metrics else ''),
    )


def _megvii(name: str, ap: float, size: int = 640) -> Dict[str, Any]:
    url = f'https://github.com/Megvii-BaseDetection/YOLOX/releases/download/0.1.1rc0/yolox_{name}.pth'
    return _cfg(url, 'Megvii', _MEGVII, 'YOLOX, README, for the whole detector', size=size, ap=ap)


def _mmdet(name: str, stamp: str, ap: float, size: int = 640) -> Dict[str, Any]:
    name = f'yolox_{name}_8x8_300e_coco'
    url = f'https://download.openmmlab.com/mmdetection/v2.0/yolox/{name}/{name}_{stamp}.pth'
    return _cfg(
        url, 'OpenMMLab', MMDETECTION, 'MMDetection, configs/yolox, for the whole detector', size=size, ap=ap)


def _keras(name: str, sha256: str, top1: float) -> Dict[str, Any]:
    """Trained and evaluated on squares of 224 pixels out of the middle; the network's first layer divided by 255."""
    url = f'https://storage.googleapis.com/keras-cv/models/{name}/imagenet/classification-v0.h5'
    return default_cfg(
        sources=[web(url, filename=f'{name}-classification-v0.h5', sha256=sha256)], license=_KERAS_CV, crop_pct=1.0,
        interpolation='bilinear', mean=(0., 0., 0.), std=(1., 1., 1.), paper_ids='arXiv:2107.08430',
        paper_name='YOLOX: Exceeding YOLO Series in 2021',
        info=dict(data=IN1K, task=CLASSIFICATION, source='KerasCV', metrics=dict(top1=top1, size=224),
                  metrics_source='KerasCV, examples/training/classification/imagenet/training_history.json'),
    )


def _pose(file: str, size: int = 640, data: str = 'COCO, human keypoints', **metrics: float) -> Dict[str, Any]:
    url = f'https://download.openmmlab.com/mmpose/v1/projects/rtmo/{file}.pth'
    return _cfg(
        url, 'OpenMMLab', MMPOSE, 'MMPose, projects/rtmo, for the whole network', data, KEYPOINTS, size, **metrics)


def _yolox_pose(name: str, stamp: str, keypoint_ap: float, size: int = 640) -> Dict[str, Any]:
    name = f'yolox-pose_{name}_8xb32-300e-rtmdet-hyp_coco'
    return _cfg(
        f'https://download.openmmlab.com/mmyolo/v0/yolox/pose/{name}/{name}_{stamp}.pth', 'OpenMMLab', MMPOSE,
        'MMPose, projects/yolox_pose, for the whole network', 'COCO, human keypoints', KEYPOINTS, size,
        keypoint_ap=keypoint_ap)


def _humanart(name: str, digest: str, ap: float, size: int = 640) -> Dict[str, Any]:
    url = f'https://download.openmmlab.com/mmpose/v1/projects/rtmposev1/yolox_{name}_8xb8-300e_humanart-{digest}.pth'
    return _cfg(
        url, 'OpenMMLab', MMPOSE, 'Human-Art, README, for the whole detector', 'Human-Art and COCO', size=size, ap=ap)


_BODY7 = 'seven data sets of human keypoints (Body7)'

default_cfgs = describe_weights(with_pan({
    'cspnet_yolox_nano.coco': _megvii('nano', 25.8, 416),
    'cspnet_yolox_tiny.coco': _megvii('tiny', 32.8, 416),
    'cspnet_yolox_s.coco': _megvii('s', 40.5),
    'cspnet_yolox_m.coco': _megvii('m', 46.9),
    'cspnet_yolox_l.coco': _megvii('l', 49.7),
    'cspnet_yolox_x.coco': _megvii('x', 51.1),
    'cspnet_yolox_tiny.mmdet_coco': _mmdet('tiny', '20211124_171234-b4047906', 32.0, 416),
    'cspnet_yolox_s.mmdet_coco': _mmdet('s', '20211121_095711-4592a793', 40.5),
    'cspnet_yolox_l.mmdet_coco': _mmdet('l', '20211126_140236-d3bd2b23', 49.4),
    'cspnet_yolox_x.mmdet_coco': _mmdet('x', '20211126_140254-1ef88d67', 50.9),
    'cspnet_yolox_nano.humanart': _humanart('nano', '40f6f0d0', 38.9, 416),
    'cspnet_yolox_tiny.humanart': _humanart('tiny', '6f3252f9', 47.7, 416),
    'cspnet_yolox_s.humanart': _humanart('s', '3ef259a7', 54.6),
    'cspnet_yolox_m.humanart': _humanart('m', 'c2c7a14a', 59.1),
    'cspnet_yolox_l.humanart': _humanart('l', 'ce1d7a62', 60.2),
    'cspnet_yolox_x.humanart': _humanart('x', 'a39d44ed', 61.3),
    'cspnet_yolox_tiny.pose_coco': _yolox_pose('tiny', '20230427_080351-2117af67', 52.8, 416),
    'cspnet_yolox_s.pose_coco': _yolox_pose('s', '20230427_005150-e87d843a', 63.7),
    'cspnet_yolox_m.pose_coco': _yolox_pose('m', '20230427_094024-bbeacc1c', 69.3),
    'cspnet_yolox_l.pose_coco': _yolox_pose('l', '20230427_041140-82d65ac8', 71.1),
    'cspnet_yolox_s.rtmo_coco': _pose('rtmo-s_8xb32-600e_coco-640x640-8db55a59_20231211', keypoint_ap=67.7),
    'cspnet_yolox_m.rtmo_coco': _pose('rtmo-m_16xb16-600e_coco-640x640-6f4e0306_20231211', keypoint_ap=70.9),
    'cspnet_yolox_l.rtmo_coco': _pose('rtmo-l_16xb16-600e_coco-640x640-516a421f_20231211', keypoint_ap=72.4),
    'cspnet_yolox_tiny.rtmo_body7': _pose(
        'rtmo-t_8xb32-600e_body7-416x416-f48f75cb_20231219', 416, _BODY7, keypoint_ap=57.4),
    'cspnet_yolox_s.rtmo_body7': _pose(
        'rtmo-s_8xb32-600e_body7-640x640-dac2bf74_20231211', 640, _BODY7, keypoint_ap=68.6),
    'cspnet_yolox_m.rtmo_body7': _pose(
        'rtmo-m_16xb16-600e_body7-640x640-39e78cc4_20231211', 640, _BODY7, keypoint_ap=72.6),
    'cspnet_yolox_l.rtmo_body7': _pose(
        'rtmo-l_16xb16-600e_body7-640x640-b37118ce_20231211', 640, _BODY7, keypoint_ap=74.8),
    'cspnet_yolox_s.rtmo_crowdpose': _pose(
        'rtmo-s_8xb32-700e_crowdpose-640x640-79f81c0d_20231211', 640, 'CrowdPose, human keypoints', keypoint_ap=67.3),
    'cspnet_yolox_m.rtmo_crowdpose': _pose(
        'rrtmo-m_16xb16-700e_crowdpose-640x640-0eaf670d_20231211', 640, 'CrowdPose, human keypoints', keypoint_ap=71.1),
    'cspnet_yolox_l.rtmo_crowdpose': _pose(
        'rtmo-l_16xb16-700e_crowdpose-640x640-1008211f_20231211', 640, 'CrowdPose, human keypoints', keypoint_ap=73.2),
    'cspnet_yolox_l.rtmo_body7_crowdpose': _pose(
        'rtmo-l_16xb16-700e_body7-crowdpose-640x640-5bafdc11_20231219', 640, f'{_BODY7}, then CrowdPose',
        keypoint_ap=83.8),
    'cspnet_yolox_tiny_keras.in1k': _keras(
        'cspdarknettiny', 'c17fe6d7b597f2eb25e42fbd97ec58fb1dad753ba18920cc27820953b7947704', 61.69),
    'cspnet_yolox_l_keras.in1k': _keras(
        'cspdarknetl', '8bdc3359222f0d26f77aa42c4e97d67a05a1431fe6c448ceeab9a9c5a34ff804', 77.44),
}, (
    'cspnet_yolox_nano_pan.coco', 'cspnet_yolox_tiny_pan.coco', 'cspnet_yolox_s_pan.coco', 'cspnet_yolox_m_pan.coco',
    'cspnet_yolox_l_pan.coco', 'cspnet_yolox_x_pan.coco', 'cspnet_yolox_tiny_pan.mmdet_coco',
    'cspnet_yolox_s_pan.mmdet_coco', 'cspnet_yolox_l_pan.mmdet_coco', 'cspnet_yolox_x_pan.mmdet_coco',
    'cspnet_yolox_nano_pan.humanart', 'cspnet_yolox_tiny_pan.humanart', 'cspnet_yolox_s_pan.humanart',
    'cspnet_yolox_m_pan.humanart', 'cspnet_yolox_l_pan.humanart', 'cspnet_yolox_x_pan.humanart',
    'cspnet_yolox_tiny_pan.pose_coco', 'cspnet_yolox_s_pan.pose_coco', 'cspnet_yolox_m_pan.pose_coco',
    'cspnet_yolox_l_pan.pose_coco',
)))


@register_model
def cspnet_yolox_nano(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """A quarter of the large network's width, a third of its depth, with separable convolutions."""
    return _create('cspnet_yolox_nano', pretrained, **kwargs)


@register_model
def cspnet_yolox_tiny(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Three eighths of the large network's width, a third of its depth."""
    return _create('cspnet_yolox_tiny', pretrained, **kwargs)


@register_model
def cspnet_yolox_s(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Half the large network's width, a third of its depth."""
    return _create('cspnet_yolox_s', pretrained, **kwargs)


@register_model
def cspnet_yolox_m(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Three quarters of the large network's width, two thirds of its depth."""
    return _create('cspnet_yolox_m', pretrained, **kwargs)


@register_model
def cspnet_yolox_l(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 64 to 1024, 3, 9, 9 and 3 blocks."""
    return _create('cspnet_yolox_l', pretrained, **kwargs)


@register_model
def cspnet_yolox_x(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """1.25 times the large network's width, 1.33 times its depth."""
    return _create('cspnet_yolox_x', pretrained, **kwargs)


@register_model
def cspnet_yolox_tiny_keras(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """``cspnet_yolox_tiny`` with TensorFlow's padding, KerasCV's CSPDarkNetTiny."""
    return _create('cspnet_yolox_tiny_keras', pretrained, **kwargs)


@register_model
def cspnet_yolox_l_keras(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """``cspnet_yolox_l`` with TensorFlow's padding, KerasCV's CSPDarkNetL."""
    return _create('cspnet_yolox_l_keras', pretrained, **kwargs)


cspnet_yolox_nano_pan = register_pan('cspnet_yolox_nano_pan', _create)
cspnet_yolox_tiny_pan = register_pan('cspnet_yolox_tiny_pan', _create)
cspnet_yolox_s_pan = register_pan('cspnet_yolox_s_pan', _create)
cspnet_yolox_m_pan = register_pan('cspnet_yolox_m_pan', _create)
cspnet_yolox_l_pan = register_pan('cspnet_yolox_l_pan', _create)
cspnet_yolox_x_pan = register_pan('cspnet_yolox_x_pan', _create)
