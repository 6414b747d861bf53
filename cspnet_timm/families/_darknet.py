"""What the networks trained in Darknet have in common: activation, batch norm, files and preprocessing."""
import functools
import re
from collections import OrderedDict
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from ..backbone import BackboneCfg, CspBackbone, Level, LevelArgs, Neck
from ..blocks import DarkBlock
from ..checkpoints import darknet
from ..checkpoints.darknet import DetectionConv, FileConv, Layout, Tail
from ..cross_stage import ComposedStage
from ..layers import ActLayer, ConvNormAct, SpatialPyramidPool
from ..naming import roll_channels
from ._builder import IN1K, License, build_backbone, default_cfg
from ._neck import lateral_neck
from ._weights import CLASSIFICATION, DETECTION, Source, by_hand, web

__all__ = ['ALEXEYAB', 'LEAKY', 'PJREDDIE', 'WONGKINYIU', 'backbone_order', 'build_darknet',
           'darknet_cfg', 'detector_cfg', 'drive', 'file_order', 'neck_order', 'pan_layout',
           'register_darknet', 'spp_pan_neck', 'spp_pan_tail', 'yolov4_cfg']

LEAKY = functools.partial(nn.LeakyReLU, negative_slope=0.1)

PJREDDIE = License(
    'other', 'LICENSE of pjreddie/darknet, public domain in style; none is stated for the file',
    'https://github.com/pjreddie/darknet/blob/master/LICENSE', name='darknet',
)
ALEXEYAB = License(
    'other', 'LICENSE of AlexeyAB/darknet, public domain; of the weights a maintainer, 2024: "Everything that is in '
    'this repo is under YOLO license if not explicitly said"',
    'https://github.com/AlexeyAB/darknet/issues/8881', name='darknet',
)
WONGKINYIU = License(
    'unknown', 'nobody: the repository has no licence file',
    'https://github.com/WongKinYiu/CrossStagePartialNetworks',
)


def _file_order(module: nn.Module, prefix: str = '') -> Iterator[str]:
    if isinstance(module, (ConvNormAct, nn.Linear)):
        yield prefix
        return
    children = dict(module.named_children())
    if isinstance(module, ComposedStage):  # the bypass is written first, then the way through the blocks
        children = {'bypass': children.pop('bypass'), **children}
    for name, child in children.items():
        yield from _file_order(child, f'{prefix}.{name}' if prefix else name)


def file_order(model: nn.Module) -> List[str]:
    """Names of the convolutions and of the classifier, in the order in which the networks' cfg files list them.

    Args:
        model: The network.

    Returns:
        Names of modules.
    """
    return list(_file_order(model))


def backbone_order(model: nn.Module) -> List[str]:
    """As :func:`file_order`, of a detector's backbone, which has no classifier in any file."""
    return [name for name in file_order(model) if not name.startswith(('neck.', 'head.'))]


def neck_order(model: nn.Module, nodes: Sequence[str]) -> List[str]:
    """As :func:`file_order`, of a detector's neck.

    Args:
        model: The network.
        nodes: The neck's nodes in the order of the file, ``'top_down'`` for all of that walk or ``'top_down.0'``.

    Returns:
        Names of modules.
    """
    names = [name for name in file_order(model) if name.startswith('neck.')]
    return [name for node in nodes for name in names if f'{name}.'.startswith(f'neck.{node}.')]


def _arrange_neck(state_dict: Dict[str, torch.Tensor]) -> None:
    """Put a neck's channels into this package's order, in place.

    The cfgs concatenate [level, coarser one] on the way down, and an SPP's widest pool comes first.

    Args:
        state_dict: The tensors.
    """
    for key, value in state_dict.items():
        if re.fullmatch(r'neck\.top_down\.\d+\.stage\.conv\.conv\.weight', key):
            roll_channels(state_dict, key, (1,))
        elif re.fullmatch(r'neck\.top\..*spp\.conv2\.conv\.weight', key):
            state_dict[key] = value.unflatten(1, (4, -1)).flip(1).flatten(1, 2)


def _five(in_chs: int, chs: int) -> List[FileConv]:
    return [FileConv(in_chs, chs), *[FileConv(chs, 2 * chs, 3), FileConv(2 * chs, chs)] * 2]


def spp_pan_tail(network: str, chs: Tuple[int, int, int]) -> Tail:
    """What follows the backbone in the files of YOLOv4 and its like: an SPP, a pyramid of plain convolutions, heads.

    Args:
        network: Name of the model that the files are for; the one with the neck is called so, and ``_pan``.
        chs: Channels of the backbone's maps at the strides 8, 16 and 32.

    Returns:
        The tail, each head behind its level.
    """
    c8, c16, c32 = chs
    layers: List[Union[FileConv, DetectionConv]] = [
        FileConv(c32, 512), FileConv(512, 1024, 3), FileConv(1024, 512),
        FileConv(2048, 512), FileConv(512, 1024, 3), FileConv(1024, 512),
    ]
    for lateral_chs, h in ((c16, 256), (c8, 128)):
        layers += [FileConv(2 * h, h), FileConv(lateral_chs, h), *_five(2 * h, h)]
    for h in (128, 256, 512):
        if h > 128:
            layers += [FileConv(h // 2, h, 3), *_five(2 * h, h)]
        layers += [FileConv(h, 2 * h, 3), DetectionConv(2 * h, 3)]
    return Tail(network, tuple(layers), with_neck=f'{network}_pan')


def _wide_block(chs: int, args: LevelArgs) -> nn.Module:
    return DarkBlock(chs, chs, bottle_ratio=2., kernel_size=(3, 1), shortcut=False, **args.layers)


def _spp_pan_stage(in_chs: int, chs: int, args: LevelArgs) -> nn.Module:
    """Five convolutions, 1×1 and 3×3 in turn."""
    return nn.Sequential(OrderedDict(
        conv=ConvNormAct(in_chs, chs, **args.layers),
        blocks=nn.Sequential(_wide_block(chs, args), _wide_block(chs, args)),
    ))


def _spp_pan_top(in_chs: int, chs: int, args: LevelArgs) -> nn.Module:
    return nn.Sequential(OrderedDict(
        conv=ConvNormAct(in_chs, chs, **args.layers),
        block1=_wide_block(chs, args),
        spp=SpatialPyramidPool(chs, chs, reduce=False, **args.layers),
        block2=_wide_block(chs, args),
    ))


def spp_pan_neck() -> Neck:
    """The neck of YOLOv4 and its like, whose stages are plain rows of convolutions, with LeakyReLU."""
    return lateral_neck((128, 256, 512), _spp_pan_stage, _spp_pan_top, act_layer=LEAKY)


def pan_layout(tail: Tail, heads_last: bool = False) -> Layout:
    """How the files list a network with such a neck, whichever its stages are.

    Args:
        tail: What follows the backbone.
        heads_last: Whether the maps' last convolutions, with those that detect, are at the end, or each behind its
            level.

    Returns:
        The layout.
    """
    nodes: Sequence[str]
    if heads_last:
        nodes = ('top', 'top_down', 'bottom_up', 'outputs')
    else:
        nodes = ('top', 'top_down', 'outputs.0', 'bottom_up.0', 'outputs.1', 'bottom_up.1', 'outputs.2')
    return Layout(backbone_order, _arrange_neck, (tail,), functools.partial(neck_order, nodes=nodes))


def register_darknet(*builders: Callable[..., nn.Module]) -> None:
    """Announce networks that Darknet's files are for, so that a file is recognised by its length.

    Args:
        builders: Their entrypoints.
    """
    darknet.NETWORKS.update({builder.__name__: builder for builder in builders})


def build_darknet(
        variant: str,
        pretrained: bool,
        levels: Tuple[Level, ...],
        cfg_act: ActLayer = LEAKY,
        cfg_eps: float = 1e-6,
        layout: Optional[Layout] = None,
        neck: Optional[Neck] = None,
        **kwargs: Any,
) -> CspBackbone:
    """Build a network whose weights were trained in Darknet.

    Args:
        variant: Name of the entrypoint.
        pretrained: Load the weights of the pretrained config.
        levels: The stem and the layers behind it.
        cfg_act: Activation of the cfg.
        cfg_eps: What Darknet adds to the variances. `darknet classifier valid` of the paper's time folded the batch
            norms with sqrt(var + 1e-6), and what it printed is what is published; since February 2020 it is 1e-5.
        layout: How files list the network; by default as a classifier.
        neck: What stands behind the last levels.
        **kwargs: What ``timm.create_model`` passes on.

    Returns:
        The model.
    """
    cfg = BackboneCfg(
        levels=levels, act_layer=cfg_act, bn_eps=cfg_eps, bn_momentum=0.01, file_layout=layout or Layout(file_order),
        neck=neck)
    return build_backbone(variant, pretrained, cfg, **kwargs)


def detector_cfg(
        sources: Sequence[Source],
        letterbox: bool,
        size: int,
        stride: int = 32,
        license: License = ALEXEYAB,
        **kwargs: Any,
) -> Dict[str, Any]:
    """Config of a detector's ``.weights`` file, trained on COCO: RGB between 0 and 1 as it is.

    Args:
        sources: Where to get the file.
        letterbox: Whether Darknet keeps the images' proportions for this network, or stretches them.
        size: Side of the input that the figures hold for.
        stride: The network's last.
        license: Their licence.
        **kwargs: Published figures of the whole detector, ``ap`` and ``ap50``, and further entries of timm's config.

    Returns:
        The config.
    """
    metrics: Dict[str, float] = {name: kwargs.pop(name) for name in ('ap', 'ap50') if name in kwargs}
    metrics['size'] = size
    return default_cfg(**{
        'sources': sources, 'license': license, 'num_classes': 0,
        'input_size': (3, size, size), 'pool_size': (size // stride, size // stride),
        'crop_pct': 1.0, 'crop_mode': 'border' if letterbox else 'squash', 'interpolation': 'bilinear',
        'mean': (0., 0., 0.), 'std': (1., 1., 1.), 'first_conv': 'stem.conv1.conv',
        'info': dict(
            data='COCO',
            task=DETECTION,
            source='Alexey Bochkovskiy, https://github.com/AlexeyAB/darknet',
            metrics=metrics,
            metrics_source='https://github.com/AlexeyAB/darknet, README.md, for the whole detector',
        ),
        **kwargs,
    })


def yolov4_cfg() -> Dict[str, Any]:
    """Config of YOLOv4's own file, which two models take."""
    url = 'https://github.com/AlexeyAB/darknet/releases/download/darknet_yolo_v3_optimal/yolov4.weights'
    return detector_cfg(
        [web(url, size=257_717_640)], letterbox=False, size=608, ap=43.5, ap50=65.7,
        paper_ids='arXiv:2004.10934', paper_name='YOLOv4: Optimal Speed and Accuracy of Object Detection')


def drive(file_id: str, filename: str) -> Source:
    """A file on Google Drive, which a browser has to fetch."""
    return by_hand(f'https://drive.google.com/open?id={file_id}', filename=filename)


def darknet_cfg(
        sources: Sequence[Source],
        top1: float,
        top5: float,
        size: int = 256,
        license: License = WONGKINYIU,
        source: str = 'Chien-Yao Wang, https://github.com/WongKinYiu/CrossStagePartialNetworks',
        **kwargs: Any,
) -> Dict[str, Any]:
    """Config of a ``.weights`` file: where it is, and Darknet's preprocessing, RGB between 0 and 1 as it is.

    Args:
        sources: Where to get the file.
        top1: Published top-1 accuracy on ImageNet, in percent.
        top5: Published top-5 accuracy.
        size: Side of the input that both were measured at.
        license: Their licence.
        source: Who trained and published them.
        **kwargs: Further entries of timm's config.

    Returns:
        The config.
    """
    return default_cfg(**{
        'sources': sources, 'license': license,
        'input_size': (3, size, size), 'pool_size': (size // 32, size // 32),
        'crop_pct': 1.0, 'interpolation': 'bilinear', 'mean': (0., 0., 0.), 'std': (1., 1., 1.),
        'info': dict(
            data=IN1K,
            task=CLASSIFICATION,
            source=source,
            metrics=dict(top1=top1, top5=top5, size=size),
            metrics_source='https://github.com/WongKinYiu/CrossStagePartialNetworks, README.md and imagenet/results.md',
        ),
        **kwargs,
    })
