"""What the networks trained in Darknet have in common: activation, batch norm, file order and preprocessing."""
import functools
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch.nn as nn

from ..backbone import BackboneCfg, CspBackbone, Level
from ..cross_stage import ComposedStage
from ..layers import ActLayer, ConvNormAct
from ._builder import IN1K, License, build_backbone, default_cfg
from ._weights import CLASSIFICATION, Source, by_hand

__all__ = ['LEAKY', 'PJREDDIE', 'WONGKINYIU', 'build_darknet', 'darknet_cfg', 'drive']

LEAKY = functools.partial(nn.LeakyReLU, negative_slope=0.1)

PJREDDIE = License(
    'other', 'LICENSE of pjreddie/darknet, public domain in style; none is stated for the file',
    'https://github.com/pjreddie/darknet/blob/master/LICENSE', name='darknet',
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


def build_darknet(
        variant: str,
        pretrained: bool,
        levels: Tuple[Level, ...],
        cfg_act: ActLayer = LEAKY,
        **kwargs: Any,
) -> CspBackbone:
    """Build a network whose weights were trained in Darknet.

    Args:
        variant: Name of the entrypoint.
        pretrained: Load the weights of the pretrained config.
        levels: The stem and the layers behind it.
        cfg_act: Activation of the cfg.
        **kwargs: What ``timm.create_model`` passes on.

    Returns:
        The model.
    """
    # `darknet classifier valid` folds the batch norms with sqrt(var + 1e-6), and what it printed is what is published.
    cfg = BackboneCfg(levels=levels, act_layer=cfg_act, bn_eps=1e-6, bn_momentum=0.01, file_order=file_order)
    return build_backbone(variant, pretrained, cfg, **kwargs)


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
