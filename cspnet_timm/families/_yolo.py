"""What the YOLOv5, YOLOv8, YOLO11 and YOLO26 backbones share: stem and level, key names, licence of the weights.

The networks are built from their published structure. Their authors' code and weights are under AGPL-3.0: none of
either is here, and weights are read from a file that the user brings.
"""
import functools
import math
import re
from collections import OrderedDict
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..backbone import Level, LevelArgs, StateDict
from ..layers import ConvNormAct, SpatialPyramidPool
from ..naming import Naming, Rule, register_naming, rename_keys, roll_channels
from ._builder import IN1K, License, by_hand, default_cfg
from ._weights import CLASSIFICATION, DETECTION

__all__ = [
    'NAMING', 'classifier_cfg', 'detector_cfg', 'scale_width', 'yolo_level', 'yolo_levels', 'yolo_pool', 'yolo_stem',
]

LICENSE = License(
    'agpl-3.0', 'LICENSE of the repository that the file is released in, and Ultralytics of all its models',
    'https://github.com/ultralytics/ultralytics/blob/main/LICENSE',
)


def scale_width(chs: int, width: float, max_chs: Optional[int] = None) -> int:
    """Channels of a scaled network: at most ``max_chs`` before scaling, a multiple of 8 after it."""
    return math.ceil(min(chs, max_chs or chs) * width / 8) * 8


def _stem(in_chans: int, args: LevelArgs, out_chs: int, kernel_size: int) -> nn.Module:
    return ConvNormAct(
        in_chans, out_chs, kernel_size, stride=args.stride, padding=(kernel_size - 1) // 2, **args.layers)


def yolo_stem(out_chs: int, kernel_size: int) -> Level:
    """The level ``stem``: one convolution of stride 2."""
    return Level(functools.partial(_stem, out_chs=out_chs, kernel_size=kernel_size), out_chs)


def yolo_level(
        in_chs: int,
        args: LevelArgs,
        down_chs: int,
        parts: Dict[str, Callable[[int, LevelArgs], nn.Module]],
) -> nn.Module:
    """A 3×3 convolution of stride 2, and what follows it.

    Args:
        in_chs: Channels of the input.
        args: What the backbone says of the level.
        down_chs: Channels behind the convolution.
        parts: What follows by name, each called with ``down_chs`` and the level's arguments.

    Returns:
        The modules in a row.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        down=ConvNormAct(in_chs, down_chs, 3, stride=args.stride, dilation=args.first_dilation, **args.layers))
    for name, build in parts.items():
        layers[name] = build(down_chs, args)
    return nn.Sequential(layers)


def yolo_pool(in_chs: int, args: LevelArgs, shortcut: bool = False) -> nn.Module:
    """The SPP of a detector's last level; YOLO26's has a shortcut around it and no activation before its pools."""
    entry_act_layer = None if shortcut else args.layers['act_layer']
    return SpatialPyramidPool(in_chs, in_chs, shortcut=shortcut, entry_act_layer=entry_act_layer, **args.layers)


def _keep_width(chs: int, args: LevelArgs, cross_stage: Callable[..., nn.Module], depth: int) -> nn.Module:
    return cross_stage(chs, chs, args, depth=depth)


def yolo_levels(
        stem_kernel_size: int,
        widths: List[int],
        depths: List[int],
        cross_stage: Callable[..., nn.Module],
        pool: bool,
) -> Tuple[Level, ...]:
    """The levels of YOLOv5 and YOLOv8, whose cross stages keep the channels of the downsampling before them.

    Args:
        stem_kernel_size: Of the first convolution.
        widths: Channels of each level, the stem's first.
        depths: Blocks of each level behind the stem.
        cross_stage: Called with the channels that go in and come out, the level's arguments and ``depth``.
        pool: End with an SPP, as a detector does.

    Returns:
        The levels.
    """
    levels = [yolo_stem(widths[0], stem_kernel_size)]
    for i, (chs, depth) in enumerate(zip(widths[1:], depths)):
        parts: Dict[str, Callable[[int, LevelArgs], nn.Module]] = dict(
            csp=functools.partial(_keep_width, cross_stage=cross_stage, depth=depth))
        if pool and i == len(depths) - 1:
            parts['spp'] = yolo_pool
        levels.append(Level(functools.partial(yolo_level, down_chs=chs, parts=parts), chs, depth=depth))
    return tuple(levels)


def _under(state_dict: StateDict, prefix: str) -> StateDict:
    return {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}


def _split(own: StateDict) -> Tuple[StateDict, int]:
    """Part the convolution ``cv1`` of both branches into ``bypass`` and ``entry``; also returns a branch's channels."""
    out, chs = {}, 0
    for key, value in _under(own, 'cv1.').items():
        if value.ndim:
            chs = max(chs, value.shape[0] // 2)
            out[f'bypass.{key}'], out[f'entry.{key}'] = value[:value.shape[0] // 2], value[value.shape[0] // 2:]
        else:  # num_batches_tracked
            out[f'bypass.{key}'] = out[f'entry.{key}'] = value
    return out, chs


def _cross_stage(own: StateDict) -> StateDict:
    if any(k.startswith('cv3.') for k in own):  # C3: one convolution per branch, in this package's order
        out = {f'entry.{k}': v for k, v in _under(own, 'cv1.').items()}
        out.update({f'bypass.{k}': v for k, v in _under(own, 'cv2.').items()})
        out.update({f'merge.{k}': v for k, v in _under(own, 'cv3.').items()})
        blocks = 'blocks'
    else:  # C2f and its like: one convolution of both branches, and every block's output collected
        out, chs = _split(own)
        out.update({f'merge.{k}': v for k, v in _under(own, 'cv2.').items()})
        roll_channels(out, 'merge.conv.weight', (1,), chs)
        blocks = 'blocks.blocks'
    for index in sorted({k.split('.')[1] for k in own if k.startswith('m.')}):
        block = _under(own, f'm.{index}.')
        if any(k.startswith('cv3.') for k in block):
            block = _cross_stage(block)
        else:
            # One block, or a row of a block and attention.
            block = rename_keys(block, ((r'^(\d+\.)?cv([12])\.', r'\1conv\2.'), *_ATTENTION))
        out.update({f'{blocks}.{index}.{k}': v for k, v in block.items()})
    return out


_ATTENTION: Tuple[Rule, ...] = (
    (r'^(\d+)\.attn\.pe\.', r'\1.pos.'),
    (r'^(\d+)\.attn\.', r'\1.'),
    (r'^(\d+)\.ffn\.', r'\1.mlp.'),
)


def _attention(own: StateDict) -> StateDict:
    out, chs = _split(own)
    out.update({f'merge.{k}': v for k, v in _under(own, 'cv2.').items()})
    roll_channels(out, 'merge.conv.weight', (1,), chs)
    out.update({f'blocks.{k}': v for k, v in rename_keys(_under(own, 'm.'), _ATTENTION).items()})
    return out


def _neck(own: StateDict) -> Tuple[StateDict, StateDict]:
    """Map the layers of a detector's neck, whose numbers follow from what the backbone ends with.

    Args:
        own: Tensors by ``<layer>.<name>``.

    Returns:
        This package's names and tensors, and all that is not the neck's under the names it has.
    """
    if '10.conv.weight' in own:  # YOLOv5, which reduces
        numbers: Sequence[int] = (10, 13, 14, 17, 18, 20, 21, 23)
        nodes: Sequence[str] = ('top', 'top_down.0.stage.csp', 'top_down.0.stage.reduce', 'top_down.1.stage', *_UP)
    else:
        with_attention = any(k.startswith('10.m.') for k in own)
        numbers = (13, 16, 17, 19, 20, 22) if with_attention else (12, 15, 16, 18, 19, 21)
        nodes = ('top_down.0.stage', 'top_down.1.stage', *_UP)
    out: StateDict = {}
    for number, node in zip(numbers, nodes):
        layer = _under(own, f'{number}.')
        if not layer or {k.split('.')[0] for k in layer} - {'conv', 'bn', 'cv1', 'cv2', 'cv3', 'm'}:
            break  # of another network
        layer = layer if 'conv.weight' in layer else _cross_stage(layer)
        out.update({f'neck.{node}.{k}': v for k, v in layer.items()})
        own = {k: v for k, v in own.items() if not k.startswith(f'{number}.')}
    return out, own


_UP = ('bottom_up.0.down', 'bottom_up.0.stage', 'bottom_up.1.down', 'bottom_up.1.stage')


def _rename(own: StateDict, whole: StateDict) -> StateDict:
    """Map a numbered list of layers, as these networks' files have it, to levels.

    Layer 0 is the stem, 1 to 8 are in turn downsampling and cross stage; behind them come, as far as a network has
    them, SPP, attention and the classifier. Everything further belongs to neck and head; the layers that only enlarge
    or concatenate are counted as well.

    Args:
        own: Tensors by ``<layer>.<name>``.
        whole: Not looked at.

    Returns:
        This package's names and tensors.
    """
    out, own = _neck(own)
    for index in range(11):
        layer = _under(own, f'{index}.')
        firsts = {k.split('.')[0] for k in layer}
        if index == 0:
            name = 'stem'
        elif index < 9:
            name = f'layer{(index + 1) // 2}.{"down" if index % 2 else "csp"}'
            layer = layer if index % 2 else _cross_stage(layer)
        elif 'linear' in firsts:
            name = 'head'
            layer = {re.sub(r'^linear\.', 'fc.', k): v for k, v in layer.items() if not k.startswith('drop')}
        elif any('.attn.' in k for k in layer):
            name, layer = 'layer4.attn', _attention(layer)
        elif index == 9 and firsts == {'cv1', 'cv2'}:
            name, layer = 'layer4.spp', {re.sub(r'^cv([12])\.', r'conv\1.', k): v for k, v in layer.items()}
        else:
            break
        out.update({f'{name}.{k}': v for k, v in layer.items()})
        own = {k: v for k, v in own.items() if not k.startswith(f'{index}.')}
    return {**own, **out}


NAMING = register_naming(Naming(
    family='YOLO',
    models=('cspnet_yolov5*', 'cspnet_yolov8*', 'cspnet_yolo11*', 'cspnet_yolo26*'),
    marker=r'2\.cv1\.conv\.weight',
    rename=_rename,
    notice=(
        'These weights have the layout of Ultralytics\' YOLO models. Those that Ultralytics publishes, and what '
        'derives from them, are licensed under AGPL-3.0 (or by an enterprise licence), other than this package.'
    ),
))


def detector_cfg(url: str, ap: float, **kwargs: Any) -> Dict[str, Any]:
    """Config of a detector's backbone, trained on COCO: RGB in 0 to 1, letterboxed to 640 pixels.

    Args:
        url: Where the user gets the file.
        ap: Published AP of the detector on COCO val2017.
        **kwargs: Entries to replace.

    Returns:
        The config, without a source that is downloaded from.
    """
    return default_cfg(**{
        'num_classes': 0, 'input_size': (3, 640, 640), 'pool_size': (20, 20), 'crop_pct': 1.0, 'crop_mode': 'border',
        'interpolation': 'bilinear', 'mean': (0., 0., 0.), 'std': (1., 1., 1.), 'license': LICENSE,
        'sources': [by_hand(url)],
        'info': dict(data='COCO', task=DETECTION, source='Ultralytics', metrics=dict(ap=ap, size=640),
                     metrics_source='Ultralytics, table of released models, for the whole detector'),
        **kwargs,
    })


def classifier_cfg(url: str, top1: float, top5: float, imagenet_norm: bool = False, **kwargs: Any) -> Dict[str, Any]:
    """Config of an ImageNet classifier.

    Args:
        url: Where the user gets the file.
        top1: Published top-1 accuracy in percent.
        top5: Published top-5 accuracy in percent.
        imagenet_norm: Whether the weights expect ImageNet's mean and deviation, or plain 0 to 1.
        **kwargs: Entries to replace.

    Returns:
        The config, without a source that is downloaded from.
    """
    return default_cfg(**{
        'crop_pct': 1.0, 'interpolation': 'bilinear', 'license': LICENSE, 'sources': [by_hand(url)],
        'mean': IMAGENET_DEFAULT_MEAN if imagenet_norm else (0., 0., 0.),
        'std': IMAGENET_DEFAULT_STD if imagenet_norm else (1., 1., 1.),
        'info': dict(data=IN1K, task=CLASSIFICATION, source='Ultralytics',
                     metrics=dict(top1=top1, top5=top5, size=224),
                     metrics_source='Ultralytics, table of released models'),
        **kwargs,
    })
