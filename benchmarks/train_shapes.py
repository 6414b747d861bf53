"""Train a cross stage partial network, and its plain counterpart, until they can tell drawn shapes apart.

    python benchmarks/train_shapes.py --output docs/train_shapes

It draws its own pictures: ten classes that differ in shape, in texture or in position alone, so that none of the three
can be left out. Everything else is timm's, in the order of timm's train.py: data set, loader, optimizer, schedule,
moving average of the weights. It writes the curves as ``.json`` and ``.png``, and takes a few minutes on two cores.
"""
import argparse
import io
import json
import math
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import timm
import torch
import torch.nn as nn
from huggingface_hub.utils import tqdm
from PIL import Image, ImageDraw
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, random_seed

from cspnet_timm import CspBackbone
from cspnet_timm.backbone import BackboneCfg, Level, LevelArgs
from cspnet_timm.blocks import DarkBlock
from cspnet_timm.layers import ConvNormAct

SIZE = 64
CLASSES = (  # shape, texture, half of the picture
    ('disc', 'rows', 'left'), ('disc', 'rows', 'right'), ('disc', 'columns', 'left'), ('disc', 'columns', 'right'),
    ('square', 'rows', 'left'), ('square', 'rows', 'right'), ('square', 'columns', 'left'),
    ('square', 'columns', 'right'), ('triangle', 'rows', None), ('triangle', 'columns', None),
)
OUTLINES = {  # corners on the unit circle around the shape's centre; None for the circle itself
    'disc': None,
    'square': (45, 135, 225, 315),
    'triangle': (270, 30, 150),
}


def draw(shape: str, texture: str, half: Optional[str], rng: np.random.Generator) -> Image.Image:
    """Draw one picture: a striped shape, turned by up to ten degrees, before a noisy ground.

    Args:
        shape: A key of :data:`OUTLINES`.
        texture: ``'rows'`` or ``'columns'``, the direction of the stripes.
        half: ``'left'`` or ``'right'``, where the centre is; None for anywhere.
        rng: What decides on size, place, angle and colours.

    Returns:
        The picture, :data:`SIZE` pixels on each side.
    """
    radius = rng.uniform(9, 14)
    low, high = {'left': (radius, SIZE / 2 - 4), 'right': (SIZE / 2 + 4, SIZE - radius)}.get(
        half or '', (radius, SIZE - radius))
    x, y = rng.uniform(low, high), rng.uniform(radius, SIZE - radius)
    mask = Image.new('L', (SIZE, SIZE))
    corners = OUTLINES[shape]
    if corners is None:
        ImageDraw.Draw(mask).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        turn = rng.uniform(-10, 10)
        points = [
            (x + radius * 1.2 * math.cos(math.radians(a + turn)), y + radius * 1.2 * math.sin(math.radians(a + turn)))
            for a in corners
        ]
        ImageDraw.Draw(mask).polygon(points, fill=255)
    period = rng.integers(4, 7)
    along = np.arange(SIZE)[:, None] if texture == 'rows' else np.arange(SIZE)[None]
    stripes = np.broadcast_to((along + rng.integers(period)) % period < period / 2, (SIZE, SIZE))
    light, dark, ground = rng.uniform((130, 0, 40), (255, 100, 200), (3, 3)).T
    figure = np.where(stripes[..., None], light, dark)
    picture = np.where(np.asarray(mask)[..., None] > 0, figure, ground) + rng.normal(0, 15, (SIZE, SIZE, 3))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def draw_dataset(root: Path, counts: Dict[str, int], seed: int = 0) -> None:
    """Draw a folder of pictures as timm reads it: ``root/split/class/number.png``.

    Args:
        root: The folder.
        counts: Pictures per split, the classes in turn.
        seed: Of the drawing; no picture of one split is in another.
    """
    for i, (split, count) in enumerate(counts.items()):
        rng = np.random.default_rng([seed, i])
        for n in tqdm(range(count), desc=f'Drawing {split}'):
            label = n % len(CLASSES)
            folder = root / split / f'{label}_{"_".join(filter(None, CLASSES[label]))}'
            folder.mkdir(parents=True, exist_ok=True)
            draw(*CLASSES[label], rng).save(folder / f'{n}.png')


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


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any) -> float:
    """Percentage of the pictures that the model names right.

    Args:
        model: The model.
        loader: timm's loader of the held-out pictures.

    Returns:
        The top-1 accuracy in percent.
    """
    model.eval()
    meter = AverageMeter()
    for pictures, labels in loader:
        meter.update(accuracy(model(pictures), labels)[0].item(), len(labels))
    return meter.avg


def train(
        model: nn.Module,
        root: Path,
        epochs: int,
        batch_size: int = 64,
        lr: float = 2e-3,
        description: str = '',
) -> List[Dict[str, float]]:
    """Train a classifier with timm's pieces.

    Args:
        model: The model, which is trained in place.
        root: A folder with ``train`` and ``validation``, see :func:`draw_dataset`.
        epochs: How many times it sees every picture.
        batch_size: Pictures per step.
        lr: Largest learning rate, of AdamW.
        description: In front of the progress bar.

    Returns:
        Per epoch the mean ``loss``, the ``top1`` accuracy on the held-out pictures and that of the moving average,
        ``ema_top1``.
    """
    # No augmentation: a flip would change the class.
    data = dict(input_size=(3, SIZE, SIZE), use_prefetcher=False, num_workers=0, persistent_workers=False, crop_pct=1.)
    loader = create_loader(create_dataset('', root=str(root), split='train'), batch_size=batch_size, is_training=True,
                           no_aug=True, **data)
    held_out = create_loader(create_dataset('', root=str(root), split='validation'), batch_size=batch_size, **data)
    criterion = LabelSmoothingCrossEntropy(0.1)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=lr, weight_decay=0.02)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=epochs, warmup_epochs=1, warmup_lr=lr / 10, min_lr=lr / 100,
        step_on_epochs=False, updates_per_epoch=len(loader))
    average = ModelEmaV3(model, decay=0.99, use_warmup=True)

    curve, step = [], 0
    with tqdm(total=epochs * len(loader), desc=description) as bar:
        for epoch in range(epochs):
            model.train()
            losses = AverageMeter()
            for pictures, labels in loader:
                loss = criterion(model(pictures), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                average.update(model, step=step)
                scheduler.step_update(step)
                losses.update(loss.item(), len(labels))
                bar.update()
            curve.append(dict(
                epoch=epoch + 1, loss=losses.avg, top1=evaluate(model, held_out),
                ema_top1=evaluate(average.module, held_out)))
            bar.set_postfix(loss=f'{losses.avg:.3f}', top1=f'{curve[-1]["top1"]:.1f}')
    return curve


def plot(results: Dict[str, Dict[str, Any]], path: Path) -> None:
    """Draw the classes and the curves.

    Args:
        results: By model, as :func:`main` writes them.
        path: The picture's file.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('the plot needs matplotlib: pip install "cspnet-timm[bench]"') from error
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
    right.set(xlabel='epoch', ylabel='accuracy on held-out pictures, %', ylim=(0, 100))
    right.legend(loc='lower right')
    picture = io.BytesIO()
    figure.savefig(picture, format='png', dpi=110)
    Image.open(picture).convert('RGB').quantize(64).save(path, optimize=True)  # a quarter of the size


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
    parser.add_argument('--pictures', type=int, default=4000, help='to train on; a quarter as many are held out')
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
        draw_dataset(Path(root), {'train': args.pictures, 'validation': args.pictures // 4}, args.seed)
        for name, build in builders.items():
            model = build()
            curve = train(model, Path(root), args.epochs, lr=args.lr, description=name)
            results[name] = dict(
                parameters=sum(p.numel() for p in model.parameters()), top1=curve[-1]['top1'], curve=curve,
                pictures=args.pictures, held_out=args.pictures // 4, size=SIZE, seed=args.seed, lr=args.lr,
            )
            print(f'{name}: {curve[-1]["top1"]:.1f} % of {args.pictures // 4} held-out pictures')
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix('.json').write_text(json.dumps(results, indent=1) + '\n')
    plot(results, args.output.with_suffix('.png'))
    return results


if __name__ == '__main__':
    main()
