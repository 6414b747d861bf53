"""Train a cross stage partial network, and its plain counterpart, until they can tell drawn shapes apart.

    python benchmarks/train_shapes.py --output docs/train_shapes

It draws its own images: ten classes that differ in shape, in texture or in position alone, so that none of the three
can be left out. Everything else is timm's, in the order of timm's train.py: data set, loader, optimizer, schedule,
moving average of the weights. Both come from ``examples``, ``shapes.py`` and ``finetune.py``. It writes the curves as
``.json`` and ``.png``, and takes a few minutes on two cores.
"""
import argparse
import io
import json
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import numpy as np
import timm
import torch.nn as nn
from PIL import Image
from timm.utils import random_seed

from cspnet_timm import CspBackbone
from cspnet_timm.backbone import BackboneCfg, Level, LevelArgs
from cspnet_timm.blocks import DarkBlock
from cspnet_timm.layers import ConvNormAct

sys.path.append(str(Path(__file__).parents[1] / 'examples'))
from finetune import create_loaders, train
from shapes import CLASSES, SIZE, draw, draw_dataset


def plain_counterpart(name: str, **kwargs: Any) -> CspBackbone:
    """The same network without the partition: Darknet's residual blocks on all the channels of each stage.

    Args:
        name: A model of this package with Darknet's blocks, whose widths and depths are taken.
        **kwargs: For :class:`~cspnet_timm.CspBackbone`.

    Returns:
        The model.
    """
    csp = timm.create_model(name, device='meta')

    def stem(in_chs: int, args: LevelArgs, out_chs: int) -> nn.Module:
        return ConvNormAct(in_chs, out_chs, 6, stride=args.stride, padding=2, **args.layers)

    def stage(in_chs: int, args: LevelArgs, out_chs: int, depth: int) -> nn.Module:
        down = ConvNormAct(in_chs, out_chs, 3, stride=args.stride, dilation=args.first_dilation, **args.layers)
        blocks = [DarkBlock(out_chs, out_chs, bottle_ratio=0.5, **args.block_kwargs(i)) for i in range(depth)]
        return nn.Sequential(OrderedDict(down=down, blocks=nn.Sequential(*blocks)))

    levels = []
    for level, info in zip(csp.levels(), csp.feature_info):
        chs, depth = info['num_chs'], sum(isinstance(m, DarkBlock) for m in level.modules())
        levels.append(
            Level(lambda i, a, c=chs, d=depth: stage(i, a, c, d), chs, depth=depth) if levels else
            Level(lambda i, a, c=chs: stem(i, a, c), chs)
        )
    return CspBackbone(BackboneCfg(levels=tuple(levels)), **kwargs)


def plot(results: Dict[str, Dict[str, Any]], path: Path) -> None:
    """Draw the classes and the curves.

    Args:
        results: By model, as :func:`main` writes them.
        path: The image's file.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('the plot needs matplotlib: pip install matplotlib') from error
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(9, 5), layout='constrained')
    shapes, curves = figure.subfigures(2, 1, height_ratios=(1, 3))
    rng = np.random.default_rng(0)
    for axis, spec in zip(shapes.subplots(1, len(CLASSES)), CLASSES):
        axis.imshow(draw(*spec, rng))
        axis.set_title('\n'.join(filter(None, spec)), fontsize=7)
        axis.axis('off')
    left, right = curves.subplots(1, 2)
    for name, result in results.items():
        curve = result['curve']
        epochs = [point['epoch'] for point in curve]
        label = f'{name}, {result["parameters"] / 1e6:.2f} M parameters'
        left.plot(epochs, [point['loss'] for point in curve], marker='.', label=label)
        right.plot(epochs, [point['top1'] for point in curve], marker='.', label=label)
    left.set(xlabel='epoch', ylabel='training loss')
    right.set(xlabel='epoch', ylabel='accuracy on held-out images, %', ylim=(0, 100))
    right.legend(loc='lower right')
    image = io.BytesIO()
    figure.savefig(image, format='png', dpi=110)
    Image.open(image).convert('RGB').quantize(64).save(path, optimize=True)  # a quarter of the size


def main(argv: Optional[Sequence[str]] = None) -> Dict[str, Dict[str, Any]]:
    """Train both models and write the results.

    Args:
        argv: The command line's arguments, by default those of the process.

    Returns:
        By model, what has been written to the ``.json``.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', default='cspnet_nano', help='a model of the package that has Darknet\'s blocks')
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--images', type=int, default=4000, help='to train on; a quarter as many are held out')
    parser.add_argument('--lr', type=float, default=2e-3)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', type=Path, default=Path('train_shapes'), help='path without extension')
    args = parser.parse_args(argv)

    random_seed(args.seed)
    builders = {
        args.model: lambda: timm.create_model(args.model, num_classes=len(CLASSES)),
        'plain counterpart': lambda: plain_counterpart(args.model, num_classes=len(CLASSES)),
    }
    results: Dict[str, Dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as root:
        draw_dataset(Path(root), {'train': args.images, 'validation': args.images // 4}, args.seed)
        for name, build in builders.items():
            model = build()
            # No augmentation: a flip would change the class.
            loader, held_out, _ = create_loaders(model, Path(root), SIZE, augment=False)
            curve, _ = train(model, loader, held_out, args.epochs, args.lr, description=name)
            results[name] = dict(
                parameters=sum(p.numel() for p in model.parameters()), top1=curve[-1]['top1'], curve=curve,
                images=args.images, held_out=args.images // 4, size=SIZE, seed=args.seed, lr=args.lr,
            )
            print(f'{name}: {curve[-1]["top1"]:.1f} % of {args.images // 4} held-out images')
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix('.json').write_text(json.dumps(results, indent=1) + '\n')
    plot(results, args.output.with_suffix('.png'))
    return results


if __name__ == '__main__':
    main()
