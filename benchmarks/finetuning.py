"""Measures what helps when few images are there: ``python benchmarks/finetuning.py``, some ten minutes of one core.

``cspnet_nano`` first learns the drawn shapes of ``examples/shapes.py``, then handwritten digits (scikit-learn's, 8×8
pixels enlarged to 64) from a few images per class; 797 others are held out. Each line is one way to do the second,
repeated with other seeds and other images. Prints the table of ``docs/finetuning.md``, and writes ``finetuning.json``.
"""
import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.utils import random_seed

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'examples'))

from finetune import create_loaders, train  # noqa: E402
from shapes import SIZE, draw_dataset  # noqa: E402

from cspnet_timm.files import replaced_file  # noqa: E402

STEPS, BATCH = 120, 16
WAYS: Dict[str, Dict[str, Any]] = {
    'from random weights': dict(pretrained=False, lr=2e-3),
    'everything, learning rate 2e-3': dict(lr=2e-3),
    'everything, learning rate 2e-4': dict(lr=2e-4),
    'everything, 2e-3, layer decay 0.7': dict(lr=2e-3, layer_decay=0.7),
    'everything, 2e-3, batch norm kept as it was': dict(lr=2e-3, norm_eval=True),
    'stem and layer1 frozen, 2e-3': dict(lr=2e-3, frozen=('stem', 'layer1')),
    'all but layer4 frozen, 2e-3': dict(lr=2e-3, frozen=('stem', 'layer1', 'layer2', 'layer3')),
    'only the classifier, 2e-3': dict(lr=2e-3, frozen=('stem', 'layer1', 'layer2', 'layer3', 'layer4')),
}


def learn_shapes(images: int, epochs: int) -> nn.Module:
    """Train the network that is fine-tuned.

    Args:
        images: Shapes to draw.
        epochs: How many times it sees each.

    Returns:
        The network.
    """
    random_seed(0)
    model = timm.create_model('cspnet_nano', num_classes=10)
    with tempfile.TemporaryDirectory() as folder:
        draw_dataset(Path(folder), {'train': images, 'validation': 200}, 0)
        loader, held_out, _ = create_loaders(model, Path(folder), SIZE, augment=False)
        curve, average = train(model, loader, held_out, epochs)
    print(f'shapes: {curve[-1]["ema_top1"]:.1f} % of 200 held-out images', file=sys.stderr)
    return average


def digits(seed: int, per_class: int) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw the images to train on from the first 1000, with 797 to test on.

    Args:
        seed: Of the drawing.
        per_class: How many of each digit.

    Returns:
        Images and labels to train on, images and labels that are held out.
    """
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    images = F.interpolate(images, (SIZE, SIZE), mode='bilinear').expand(-1, 3, -1, -1) * 2 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[labels[order] == digit][:per_class] for digit in range(10)])
    return images[chosen], labels[chosen], images[1000:], labels[1000:]


def tune(
        weights: Dict[str, torch.Tensor],
        seed: int,
        per_class: int,
        lr: float,
        pretrained: bool = True,
        layer_decay: Optional[float] = None,
        norm_eval: bool = False,
        frozen: Tuple[str, ...] = (),
) -> float:
    """Learn the digits.

    Args:
        weights: Of the network that knows shapes.
        seed: Of images, order and classifier.
        per_class: Images per digit.
        lr: Learning rate of AdamW, which a cosine leads to zero.
        pretrained: Start from the weights.
        layer_decay: As timm has it.
        norm_eval: Leave batch norm's running statistics as they are, and use them.
        frozen: Levels that keep their weights and statistics.

    Returns:
        Percentage of the held-out images that are named right.
    """
    random_seed(seed)
    model = timm.create_model('cspnet_nano', num_classes=10)
    if pretrained:
        model.load_state_dict({**weights, **{k: v for k, v in model.state_dict().items() if k.startswith('head.')}})
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    images, labels, test_images, test_labels = digits(seed, per_class)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=lr, weight_decay=0.02, layer_decay=layer_decay)
    for group in optimizer.param_groups:
        group['lr'] *= group.get('lr_scale', 1.)  # timm's schedulers do that, torch's do not
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1., (step + 1) / 10) * (1 + math.cos(math.pi * step / STEPS)) / 2)
    for _ in range(STEPS):
        model.train()
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d) and (norm_eval or name.partition('.')[0] in frozen):
                module.eval()
        batch = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in test_images.split(100)])
    return (found == test_labels).float().mean().item() * 100


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description='What helps when few images are there to fine-tune on.')
    parser.add_argument('--images', type=int, default=2000, help='shapes to learn first')
    parser.add_argument('--epochs', type=int, default=6, help='how often')
    parser.add_argument('--per-class', type=int, nargs='+', default=[2, 10], help='digits of each kind to learn from')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--out', type=Path, default=ROOT / 'docs' / 'finetuning.json')
    args = parser.parse_args()
    weights = learn_shapes(args.images, args.epochs).state_dict()
    results: Dict[str, Dict[str, List[float]]] = {}
    print(f'| way | {" | ".join(f"{10 * n} images" for n in args.per_class)} |')
    print('| --- |' + ' --- |' * len(args.per_class))
    for way, options in WAYS.items():
        results[way] = {
            str(10 * n): [tune(weights, seed, n, **options) for seed in range(args.seeds)] for n in args.per_class}
        cells = [f'{statistics.mean(v):.1f} ({min(v):.1f} to {max(v):.1f})' for v in results[way].values()]
        print(f'| {way} | {" | ".join(cells)} |', flush=True)
    with replaced_file(args.out) as temporary:
        versions = dict(torch=torch.__version__, timm=timm.__version__)
        temporary.write_text(json.dumps(dict(versions, results=results), indent=1))


if __name__ == '__main__':
    main()
