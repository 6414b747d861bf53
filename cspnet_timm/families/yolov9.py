"""YOLOv9 (GELAN) in its authors' MIT code: its backbones, also with their necks, and the classifier of its large form.

Two 3×3 convolutions of stride 2, then cross stages whose two chained parts are cross stages themselves, of blocks with
a re-parameterisable convolution; every part's output is collected. What halves a map averages 2×2 pixels at stride 1
first. In t and s the first cross stage collects plain convolutions. The SPP belongs to the detectors' necks, whose
stages, and what halves their maps, are the backbones'.

Papers: `YOLOv9: Learning What You Want to Learn Using Programmable Gradient Information`,
https://arxiv.org/abs/2402.13616
Reference: https://github.com/MultimediaTechLab/YOLO, MIT
"""
import re
from collections import OrderedDict
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..backbone import BackboneCfg, CspBackbone, Level, LevelArgs, Neck
from ..blocks import ConcatOutputs, DarkBlock
from ..cross_stage import ComposedStage, CrossStage
from ..layers import ConvHead, ConvNormAct, RepConv, SpatialPyramidPool
from ..naming import (
    Naming,
    StateDict,
    register_foreign_project,
    register_naming,
    rename_keys,
    roll_channels,
)
from ._builder import License, build_backbone, default_cfg, describe_weights, register_model, register_pan, web
from ._neck import keeping_neck
from ._weights import DETECTION, with_pan

__all__: List[str] = []


class Size(NamedTuple):
    """One network."""

    stem_chs: int
    down_chs: Tuple[int, ...]  # behind what halves the map, of each level
    part_chs: Tuple[int, ...]  # behind the stage's first convolution: half of them bypass
    out_chs: Tuple[int, ...]
    depth: int  # blocks of each inner cross stage
    neck_chs: Tuple[int, int, int]  # of the neck's maps
    neck_down_chs: Tuple[int, int]  # behind what halves them
    plain_first: bool = False  # whether the first stage has convolutions for its inner cross stages
    split_down: bool = False


SIZES = {
    't': Size(
        16, (32, 64, 96, 128), (32, 64, 96, 128), (32, 64, 96, 128), 3, (64, 96, 128), (48, 64), plain_first=True),
    's': Size(
        32, (64, 128, 192, 256), (64, 128, 192, 256), (64, 128, 192, 256), 3, (128, 192, 256), (96, 128),
        plain_first=True),
    'm': Size(32, (64, 240, 360, 480), (128, 240, 360, 480), (128, 240, 360, 480), 1, (240, 360, 480), (184, 240)),
    'c': Size(
        64, (128, 256, 512, 512), (128, 256, 512, 512), (256, 512, 512, 512), 1, (256, 512, 512), (256, 512),
        split_down=True),
}
HEAD_CHS = 1024


class AveragePool(nn.Module):
    """The mean of 2×2 pixels, ``dilation`` apart, at every position: ``(B, C, H, W)`` to ``(B, C, H - d, W - d)``."""

    def __init__(self, dilation: int = 1) -> None:
        """
        Args:
            dilation: Distance of the pixels.
        """
        super().__init__()
        self.dilation = dilation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Average."""
        d = self.dilation
        if d == 1:
            return F.avg_pool2d(x, 2, 1)
        x = x[:, :, :-d] + x[:, :, d:]
        return (x[:, :, :, :-d] + x[:, :, :, d:]) / 4

    def extra_repr(self) -> str:
        """Show the distance in the printed model."""
        return f'dilation={self.dilation}'


class AverageDown(nn.Module):
    """The mean of 2×2 pixels, and a 3×3 convolution of stride 2: an odd map is halved downwards.

    Where dilation replaces the stride, zeros are appended that the stride would not have read behind its last position.

    Input ``(B, in_chs, H, W)``, output ``(B, out_chs, floor(H / stride), floor(W / stride))``.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, dilation: int, **layer_kwargs: Any) -> None:
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            stride: Stride of the convolution.
            dilation: Distance of what is averaged and convolved.
            **layer_kwargs: ``act_layer``, ``norm_layer``, ``device`` and ``dtype``.
        """
        super().__init__()
        self.pool = AveragePool(dilation)
        self.pad = nn.ZeroPad2d((0, dilation, 0, dilation)) if stride == 1 else nn.Identity()
        self.conv = ConvNormAct(in_chs, out_chs, 3, stride=stride, dilation=dilation, **layer_kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Halve ``(B, in_chs, H, W)``."""
        return self.conv(self.pad(self.pool(x)))


class SplitDown(nn.Module):
    """As :class:`AverageDown`, with the convolution on half of the channels, and a 3×3 max pool and a 1×1 on the other.

    Input ``(B, in_chs, H, W)``, output ``(B, out_chs, floor(H / stride), floor(W / stride))``.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, dilation: int, **layer_kwargs: Any) -> None:
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            stride: Stride of the convolution and of the max pool.
            dilation: Distance of what is averaged, convolved and compared.
            **layer_kwargs: ``act_layer``, ``norm_layer``, ``device`` and ``dtype``.
        """
        super().__init__()
        self.half_chs = in_chs // 2
        self.pool = AveragePool(dilation)
        self.pad = nn.ZeroPad2d((0, dilation, 0, dilation)) if stride == 1 else nn.Identity()
        self.conv1 = ConvNormAct(self.half_chs, out_chs // 2, 3, stride=stride, dilation=dilation, **layer_kwargs)
        if stride == 1:
            d = dilation
            self.max_pool: nn.Module = nn.Sequential(OrderedDict(
                pad=nn.ConstantPad2d((d, 2 * d, d, 2 * d), float('-inf')), pool=nn.MaxPool2d(3, 1, dilation=d)))
        else:
            self.max_pool = nn.MaxPool2d(3, stride, padding=1)
        self.conv2 = ConvNormAct(in_chs - self.half_chs, out_chs // 2, **layer_kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Halve ``(B, in_chs, H, W)``."""
        x = self.pool(x)
        y = self.conv1(self.pad(x[:, :self.half_chs]))
        return torch.cat([y, self.conv2(self.max_pool(x[:, self.half_chs:]))], dim=1)


def _part(chs: int, args: LevelArgs, depth: int, first: int) -> nn.Module:
    """An inner cross stage and a 3×3 convolution."""
    return nn.Sequential(OrderedDict(
        csp=CrossStage(
            chs, chs,
            blocks=lambda c: nn.Sequential(*[
                DarkBlock(
                    c, c, kernel_size=(3, 3), conv_layers=(RepConv, ConvNormAct), **args.block_kwargs(first + i))
                for i in range(depth)
            ]),
            fusion='first',
            **args.layers,
        ),
        conv=ConvNormAct(chs, chs, 3, dilation=args.dilation, **args.layers),
    ))


def _stage(in_chs: int, args: LevelArgs, part_chs: int, out_chs: int, depth: int) -> nn.Module:
    """The stage; ``depth`` 0 makes its parts plain convolutions."""
    chs = part_chs // 2
    parts = [
        _part(chs, args, depth, i * depth) if depth
        else ConvNormAct(chs, chs, 3, dilation=args.dilation, drop_layer=args.drop_block, **args.layers)
        for i in range(2)
    ]
    return ComposedStage(
        entry=ConvNormAct(in_chs, chs, **args.layers),
        bypass=ConvNormAct(in_chs, chs, **args.layers),
        blocks=ConcatOutputs(parts, out_chs=3 * chs),
        merge=ConvNormAct(4 * chs, out_chs, **args.layers),
    )


def _level(
        in_chs: int,
        args: LevelArgs,
        down_chs: int,
        part_chs: int,
        out_chs: int,
        depth: int,
        down: Any,
) -> nn.Module:
    return nn.Sequential(OrderedDict(
        down=down(in_chs, down_chs, stride=args.stride, dilation=args.first_dilation, **args.layers),
        csp=_stage(down_chs, args, part_chs, out_chs, depth),
    ))


def _levels(size: Size) -> Tuple[Level, ...]:
    stem = Level(
        lambda chs, args: ConvNormAct(chs, size.stem_chs, 3, stride=args.stride, **args.layers), size.stem_chs)
    levels = [stem]
    for i, (down_chs, part_chs, out_chs) in enumerate(zip(size.down_chs, size.part_chs, size.out_chs)):
        depth = 0 if size.plain_first and not i else size.depth
        down = SplitDown if size.split_down else AverageDown
        build = partial(
            _level, down_chs=down_chs, part_chs=part_chs, out_chs=out_chs, depth=depth,
            down=down if i else partial(ConvNormAct, kernel_size=3))
        levels.append(Level(build, out_chs, depth=2 * depth))
    return tuple(levels)


def _neck_stage(in_chs: int, out_chs: int, args: LevelArgs, depth: int) -> nn.Module:
    return _stage(in_chs, args, out_chs, out_chs, depth)


def _neck_pool(chs: int, args: LevelArgs) -> nn.Module:
    return SpatialPyramidPool(chs, chs, entry_act_layer=args.layers['act_layer'], **args.layers)


def _neck(size: Size) -> Neck:
    down = SplitDown if size.split_down else AverageDown
    return keeping_neck(
        size.neck_chs,
        partial(_neck_stage, depth=size.depth),
        top=_neck_pool,
        down=lambda in_chs, out_chs, args: down(in_chs, out_chs, stride=2, dilation=1, **args.layers),
        down_chs=size.neck_down_chs,
    )


def _rename_stage(own: StateDict) -> StateDict:
    out: StateDict = {}
    for key, value in own.items():
        if key.startswith('conv1.'):  # of both branches: the first half bypasses
            first, last = (value, value) if value.ndim == 0 else value.chunk(2)
            out[f'bypass.{key[6:]}'], out[f'entry.{key[6:]}'] = first, last
        else:
            out[key] = value
    out = rename_keys(out, (
        (r'^conv([23])\.', lambda m: f'blocks.blocks.{int(m[1]) - 2}.'),
        (r'^conv4\.', 'merge.'),
        (r'^(blocks\.blocks\.\d)\.0\.conv1\.', r'\1.csp.entry.'),
        (r'^(blocks\.blocks\.\d)\.0\.conv2\.', r'\1.csp.bypass.'),
        (r'^(blocks\.blocks\.\d)\.0\.conv3\.', r'\1.csp.merge.'),
        (r'^(blocks\.blocks\.\d)\.0\.bottleneck\.', r'\1.csp.blocks.'),
        (r'^(blocks\.blocks\.\d)\.1\.', r'\1.conv.'),
        (r'\.csp\.blocks\.(\d+)\.conv1\.conv1\.', r'.csp.blocks.\1.conv1.conv3x3.'),
        (r'\.csp\.blocks\.(\d+)\.conv1\.conv2\.', r'.csp.blocks.\1.conv1.conv1x1.'),
    ))
    merge = out.get('merge.conv.weight')
    if merge is not None:
        roll_channels(out, 'merge.conv.weight', (1,), merge.shape[1] // 4)
    return out


def _rename(own: StateDict, whole: StateDict) -> StateDict:
    """Map a numbered list of layers: 0 is the stem, 1 to 8 are in turn what halves the map and a cross stage.

    Layer 9 is the classifier's head, or the SPP of a detector's neck, whose layers that only enlarge or concatenate are
    counted as well; the detector's head and a branch for training follow.
    """
    out: StateDict = {}
    stages: Dict[str, StateDict] = {}
    is_classifier = any(re.match(r'9\.conv\.', key) for key in own)
    for key, value in own.items():
        number, _, name = key.partition('.')
        index = int(number) if number.isdigit() else -1
        if index == 0:
            out[f'stem.{name}'] = value
        elif 0 < index < 9 and index % 2:
            out[f'layer{(index + 1) // 2}.down.{name}'] = value
        elif 0 < index < 9:
            stages.setdefault(f'layer{index // 2}.csp', {})[name] = value
        elif index == 9 and is_classifier:
            out[f'head.{name.replace("head.", "fc.")}'] = value
        elif index == 9:
            out[f'neck.top.{name.replace("conv5.", "conv2.")}'] = value
        elif index in _NECK and _NECK[index].endswith('.down'):
            out[f'neck.{_NECK[index]}.{name}'] = value
        elif index in _NECK:
            stages.setdefault(f'neck.{_NECK[index]}', {})[name] = value
        else:
            out[key] = value
    for node, stage in stages.items():
        out.update({f'{node}.{k}': v for k, v in _rename_stage(stage).items()})
    return out


_NECK = {
    12: 'top_down.0.stage', 15: 'top_down.1.stage',
    16: 'bottom_up.0.down', 18: 'bottom_up.0.stage', 19: 'bottom_up.1.down', 21: 'bottom_up.1.stage',
}


NAMING = register_naming(Naming(
    'YOLOv9', ('cspnet_yolov9*',), r'4\.conv2\.0\.bottleneck\.0\.conv1\.conv1\.conv\.weight', _rename))


# Layers under other names, of which some also have other numbers.
register_foreign_project(
    'YOLOv9 in the GPL repository and in Ultralytics\' (the MIT files, v9-*.pt of MultimediaTechLab/YOLO, have others)',
    r'\d+\.cv2\.0\.cv1\.conv\.weight')


def _create(variant: str, pretrained: bool, head: Optional[Any] = None, **kwargs: Any) -> CspBackbone:
    size = SIZES[variant.removeprefix('cspnet_yolov9')[0]]
    cfg = BackboneCfg(
        levels=_levels(size), bn_eps=1e-3, bn_momentum=0.03, head=head, convert=NAMING.convert,
        neck=_neck(size) if variant.endswith('_pan') else None)
    return build_backbone(variant, pretrained, cfg, **kwargs)


_MIT = License(
    'mit', 'LICENSE of MultimediaTechLab/YOLO, for the repository; none is stated for the files, and where the weights '
    'come from is not documented (asked in its issues 51 and 202)',
    'https://github.com/MultimediaTechLab/YOLO/blob/main/LICENSE',
)
_PAPER: Dict[str, Any] = dict(
    paper_ids='arXiv:2402.13616',
    paper_name='YOLOv9: Learning What You Want to Learn Using Programmable Gradient Information',
)


def _cfg(name: str, ap: float, metrics_source: str, num_bytes: int = 0) -> Dict[str, Any]:
    url = f'https://github.com/MultimediaTechLab/YOLO/releases/download/v1.0-alpha/{name}.pt'
    return default_cfg(
        sources=[web(url, size=num_bytes)], license=_MIT, num_classes=0, input_size=(3, 640, 640), pool_size=(20, 20),
        crop_pct=1.0, crop_mode='border', interpolation='lanczos', mean=(0., 0., 0.), std=(1., 1., 1.),
        info=dict(data='COCO', task=DETECTION, source='MultimediaTechLab/YOLO', metrics=dict(ap=ap, size=640),
                  metrics_source=f'{metrics_source}, for the whole detector'),
        **_PAPER,
    )


default_cfgs = describe_weights(with_pan({
    'cspnet_yolov9t.coco': _cfg('v9-t', 38.3, 'the paper'),
    'cspnet_yolov9s.coco': _cfg('v9-s', 46.8, 'MultimediaTechLab/YOLO, docs'),
    'cspnet_yolov9m.coco': _cfg('v9-m', 51.4, 'MultimediaTechLab/YOLO, docs'),
    'cspnet_yolov9c.coco': _cfg('v9-c', 53.0, 'MultimediaTechLab/YOLO, docs', 102_895_262),
    'cspnet_yolov9c_cls.untrained': default_cfg(
        mean=(0., 0., 0.), std=(1., 1., 1.), interpolation='lanczos', license='mit', **_PAPER),
}, (
    'cspnet_yolov9t_pan.coco', 'cspnet_yolov9s_pan.coco', 'cspnet_yolov9m_pan.coco', 'cspnet_yolov9c_pan.coco',
)))


@register_model
def cspnet_yolov9t(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 32 to 128, inner cross stages of three blocks."""
    return _create('cspnet_yolov9t', pretrained, **kwargs)


@register_model
def cspnet_yolov9s(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 64 to 256, inner cross stages of three blocks."""
    return _create('cspnet_yolov9s', pretrained, **kwargs)


@register_model
def cspnet_yolov9m(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 128 to 480, inner cross stages of one block."""
    return _create('cspnet_yolov9m', pretrained, **kwargs)


@register_model
def cspnet_yolov9c(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """Widths 256 to 512, inner cross stages of one block, and a max pool beside the convolution that halves a map."""
    return _create('cspnet_yolov9c', pretrained, **kwargs)


@register_model
def cspnet_yolov9c_cls(pretrained: bool = False, **kwargs: Any) -> CspBackbone:
    """The large form as a classifier."""
    return _create('cspnet_yolov9c_cls', pretrained, head=partial(ConvHead, hidden_size=HEAD_CHS), **kwargs)


cspnet_yolov9t_pan = register_pan('cspnet_yolov9t_pan', _create)
cspnet_yolov9s_pan = register_pan('cspnet_yolov9s_pan', _create)
cspnet_yolov9m_pan = register_pan('cspnet_yolov9m_pan', _create)
cspnet_yolov9c_pan = register_pan('cspnet_yolov9c_pan', _create)
