"""Train a segmentation network on drawn shapes, with a backbone of this package, and draw its masks.

    python examples/segment.py --output masks.png

It is the U-Net of segmentation-models-pytorch, which takes the backbone by its name, evaluated by the mean intersection
over union on images that it has not seen. Of a model whose name ends in ``_pan`` it takes the maps from behind the neck
from stride 8 on.
"""
import argparse
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from huggingface_hub.utils import tqdm
from shapes import SHAPES, Scenes, write_images
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, random_seed
from torch.utils.data import DataLoader, default_collate
from torchvision.utils import draw_segmentation_masks

try:
    import segmentation_models_pytorch as smp
except ImportError:  # main says so, but for --help
    smp = None

CLASSES = ('ground', *SHAPES)
COLOURS = ['yellow', 'cyan', 'magenta']  # of the shapes
ZOOM = 3  # of the images that are drawn


def collate(items: List[Any]) -> List[torch.Tensor]:
    """Keep of each target its mask, as a batch of images and one of masks."""
    return default_collate([(image, target['mask']) for image, target in items])


def train(model: nn.Module, loader: Any, epochs: int, lr: float) -> None:
    """Train a segmentation network with timm's optimizer and schedule.

    Args:
        model: The network, which is trained in place.
        loader: Gives batches of images and of masks.
        epochs: How many times it sees every image.
        lr: Largest learning rate, of AdamW.
    """
    device = next(model.parameters()).device
    dice, cross_entropy = smp.losses.DiceLoss('multiclass'), nn.CrossEntropyLoss()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=lr, weight_decay=0.02)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=epochs, warmup_epochs=1, warmup_lr=lr / 10, min_lr=lr / 100,
        step_on_epochs=False, updates_per_epoch=len(loader))
    step = 0
    with tqdm(total=epochs * len(loader), desc='Training') as bar:
        for _ in range(epochs):
            model.train()
            losses = AverageMeter()
            for images, masks in loader:
                logits, masks = model(images.to(device)), masks.to(device)
                loss = cross_entropy(logits, masks) + dice(logits, masks)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                scheduler.step_update(step)
                losses.update(loss.item(), len(images))
                bar.update()
            bar.set_postfix(loss=f'{losses.avg:.3f}')


@torch.no_grad()
def segment(model: nn.Module, loader: Any) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Segment every image.

    Args:
        model: The network.
        loader: Gives batches of images and of masks.

    Returns:
        The images ``(N, 3, H, W)``, the masks that were found and the true ones, ``(N, H, W)``.
    """
    model.eval()
    device = next(model.parameters()).device
    batches = [(images, model(images.to(device)).argmax(1).cpu(), masks) for images, masks in loader]
    images, found, truth = (torch.cat(parts) for parts in zip(*batches))
    return images, found, truth


def draw_masks(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Lay the shapes' masks over the image.

    Args:
        image: ``(3, H, W)`` from 0 to 1.
        mask: ``(H, W)`` of labels.

    Returns:
        The image, enlarged, of bytes.
    """
    shapes = torch.stack([mask == label for label in range(1, len(CLASSES))])
    drawn = draw_segmentation_masks((image * 255).byte(), shapes, alpha=0.6, colors=COLOURS)
    return drawn.repeat_interleave(ZOOM, 1).repeat_interleave(ZOOM, 2)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Train, evaluate and draw.

    Args:
        argv: The command line's arguments, by default those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', default='cspnet_nano', help='a model with strides from 2 to 32')
    parser.add_argument('--pretrained', action='store_true', help='start from the backbone\'s released weights')
    parser.add_argument('--weights', type=Path, help='file of weights to start from, where none are downloaded')
    parser.add_argument('--epochs', type=int, default=12)
    parser.add_argument('--images', type=int, default=600, help='to train on; a quarter as many are held out')
    parser.add_argument('--size', type=int, default=96, help='of the images, on each side, a multiple of 32')
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--lr', type=float, default=5e-3)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', type=Path, default=Path('segment.png'),
                        help='some held-out images, above the masks that were found in them')
    args = parser.parse_args(argv)
    if smp is None:
        parser.exit(1, 'this example needs segmentation-models-pytorch: pip install segmentation-models-pytorch\n')

    random_seed(args.seed)
    loader = DataLoader(
        Scenes(args.images, args.size, args.seed), args.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    held_out = DataLoader(Scenes(args.images // 4, args.size, args.seed + 1), args.batch_size, collate_fn=collate)
    model = smp.Unet(
        f'tu-{args.model}', encoder_weights='imagenet' if args.pretrained else None, classes=len(CLASSES),
        decoder_channels=(128, 64, 32, 16, 16)).to(args.device)
    if args.weights:
        load_checkpoint(model.encoder.model, str(args.weights))
    train(model, loader, args.epochs, args.lr)
    images, found, truth = segment(model, held_out)
    counts = smp.metrics.get_stats(found, truth, mode='multiclass', num_classes=len(CLASSES))
    ious = smp.metrics.iou_score(*(count.sum(0) for count in counts)).tolist()
    print(f'{args.model}: mean IoU {sum(ious) / len(ious):.3f} on {len(images)} held-out images '
          f'({", ".join(f"{name} {iou:.3f}" for name, iou in zip(CLASSES, ious))})')
    enlarged = (images[:4] * 255).byte().repeat_interleave(ZOOM, 2).repeat_interleave(ZOOM, 3)
    write_images([*enlarged, *(draw_masks(*pair) for pair in zip(images[:4], found))], args.output, columns=4)
    print(args.output)


if __name__ == '__main__':
    main()
