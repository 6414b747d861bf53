"""Train a detector of torchvision on drawn shapes, with a backbone of this package, and draw what it finds.

    python examples/detect.py --output found.png

It is FCOS on a feature pyramid over the strides 8, 16 and 32, evaluated by COCO's mAP on images that it has not seen. A
model whose name ends in ``_pan`` brings the pyramid of the detector that it comes from.
"""
import argparse
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from huggingface_hub.utils import tqdm
from shapes import SHAPES, Scenes, write_images
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, random_seed
from torch.utils.data import DataLoader
from torchvision.models.detection import FCOS
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7
from torchvision.utils import draw_bounding_boxes

Boxes = Dict[str, torch.Tensor]

COLOURS = ('yellow', 'cyan', 'magenta')  # of the boxes around SHAPES
ZOOM = 3  # of the images that are drawn


class Pyramid(nn.Module):
    """A backbone as torchvision's detectors take it: a dict of feature maps, all with as many channels.

    Input ``(B, 3, H, W)``, output maps ``(B, out_channels, H / r, W / r)`` with r of 8 to 128.
    """

    def __init__(self, name: str, chs: int, **kwargs: Any) -> None:
        """
        Args:
            name: A model with the strides 8, 16 and 32.
            chs: Channels of the maps.
            **kwargs: For ``timm.create_model``.
        """
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(2, 3, 4), **kwargs)
        channels = self.body.feature_info.channels()
        extra = LastLevelP6P7(chs, chs)
        self.fpn: nn.Module = FeaturePyramidNetwork(channels, chs, extra)
        if name.endswith('_pan'):  # the levels have met already
            self.fpn = Projections(channels, chs, extra)
        self.out_channels = chs

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Compute the maps."""
        return self.fpn({str(i): y for i, y in enumerate(self.body(x))})


class Projections(nn.Module):
    """1×1 convolutions in place of a pyramid: every map to as many channels."""

    def __init__(self, channels: Sequence[int], chs: int, extra: nn.Module) -> None:
        """
        Args:
            channels: Of the maps.
            chs: Channels of the result.
            extra: Adds coarser maps, as torchvision's pyramid has it.
        """
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, chs, 1) for c in channels)
        self.extra = extra

    def forward(self, maps: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Project each map."""
        projected = [conv(y) for conv, y in zip(self.convs, maps.values())]
        projected, names = self.extra(projected, list(maps.values()), list(maps))
        return dict(zip(names, projected))


def create_detector(name: str, size: int, chs: int = 64, **kwargs: Any) -> nn.Module:
    """Put FCOS on a backbone.

    Args:
        name: A model with the strides 8, 16 and 32.
        size: Of the images, on each side.
        chs: Channels of the pyramid and the head; torchvision's own detectors have 256.
        **kwargs: For ``timm.create_model``.

    Returns:
        The detector, for the shapes and the ground.
    """
    pyramid = Pyramid(name, chs, **kwargs)
    mean, std = (pyramid.body.pretrained_cfg[key] for key in ('mean', 'std'))
    return FCOS(pyramid, len(SHAPES) + 1, min_size=size, max_size=size, image_mean=mean, image_std=std)


def average_precision(found: Sequence[Boxes], targets: Sequence[Boxes], threshold: float) -> float:
    """Mean over the classes of the average precision, as COCO defines it.

    Args:
        found: Per image the ``boxes``, ``labels`` and ``scores``, the best first.
        targets: Per image the true ``boxes`` and ``labels``.
        threshold: Intersection over union from which a true box is found.

    Returns:
        The mean over the classes that there are, from 0 to 1.
    """
    precisions = []
    for label in torch.cat([target['labels'] for target in targets]).unique():
        scores, hits, positives = [], [], 0
        for boxes, target in zip(found, targets):
            mine, true = boxes['labels'] == label, target['boxes'][target['labels'] == label]
            positives += len(true)
            overlaps = box_iou(boxes['boxes'][mine], true)
            for overlap in overlaps:
                hits.append(len(true) > 0 and bool(overlap.max() >= threshold))
                if hits[-1]:
                    overlaps[:, overlap.argmax()] = -1  # a true box is found once
            scores += boxes['scores'][mine].tolist()
        hit = torch.tensor(hits, dtype=torch.float64)[torch.tensor(scores).argsort(descending=True)].cumsum(0)
        precision, recall = hit / torch.arange(1, len(hit) + 1), hit / positives
        # At each of 101 recalls, the best precision that comes with it or with more.
        best = [precision[recall >= r / 100].max().item() if (recall >= r / 100).any() else 0. for r in range(101)]
        precisions.append(sum(best) / len(best))
    return sum(precisions) / len(precisions)


def collate(items: List[Tuple[torch.Tensor, Boxes]]) -> Tuple[List[torch.Tensor], List[Boxes]]:
    """Leave images and targets in lists, as torchvision's detectors take them."""
    images, targets = zip(*items)
    return list(images), list(targets)


def train(model: nn.Module, loader: Any, epochs: int, lr: float) -> None:
    """Train a detector with timm's optimizer and schedule.

    Args:
        model: The detector, which is trained in place.
        loader: Gives lists of images and of targets.
        epochs: How many times it sees every image.
        lr: Largest learning rate, of AdamW.
    """
    device = next(model.parameters()).device
    optimizer = create_optimizer_v2(model, opt='adamw', lr=lr, weight_decay=0.02)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=epochs, warmup_epochs=1, warmup_lr=lr / 10, min_lr=lr / 100,
        step_on_epochs=False, updates_per_epoch=len(loader))
    step = 0
    with tqdm(total=epochs * len(loader), desc='Training') as bar:
        for _ in range(epochs):
            model.train()
            losses = AverageMeter()
            for images, targets in loader:
                loss = sum(model(
                    [image.to(device) for image in images],
                    [{k: v.to(device) for k, v in target.items()} for target in targets],
                ).values())
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 10.)
                optimizer.step()
                step += 1
                scheduler.step_update(step)
                losses.update(loss.item(), len(images))
                bar.update()
            bar.set_postfix(loss=f'{losses.avg:.3f}')


@torch.no_grad()
def detect(model: nn.Module, loader: Any) -> Tuple[List[torch.Tensor], List[Boxes], List[Boxes]]:
    """Find the shapes in every image.

    Args:
        model: The detector.
        loader: Gives lists of images and of targets.

    Returns:
        The images, what was found in each, and the targets.
    """
    model.eval()
    device = next(model.parameters()).device
    images: List[torch.Tensor] = []
    found: List[Boxes] = []
    targets: List[Boxes] = []
    for batch, truth in loader:
        found += [{k: v.cpu() for k, v in boxes.items()} for boxes in model([p.to(device) for p in batch])]
        images += batch
        targets += truth
    return images, found, targets


def draw_boxes(image: torch.Tensor, boxes: Boxes, least: float = 0.5) -> torch.Tensor:
    """Draw what was found.

    Args:
        image: ``(3, H, W)`` from 0 to 1.
        boxes: Its ``boxes``, ``labels`` and ``scores``.
        least: Score of a box that is drawn.

    Returns:
        The image, enlarged, of bytes.
    """
    large = (image * 255).byte().repeat_interleave(ZOOM, 1).repeat_interleave(ZOOM, 2)
    sure = boxes['scores'] >= least
    colours = [COLOURS[label - 1] for label in boxes['labels'][sure].tolist()]
    return draw_bounding_boxes(large, boxes['boxes'][sure] * ZOOM, colors=colours, width=2)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Train, evaluate and draw.

    Args:
        argv: The command line's arguments, by default those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', default='cspnet_nano', help='a model with the strides 8, 16 and 32')
    parser.add_argument('--pretrained', action='store_true', help='start from the backbone\'s released weights')
    parser.add_argument('--weights', type=Path, help='file of weights to start from, where none are downloaded')
    parser.add_argument('--freeze-bn', action='store_true', help='for pretrained weights and few images per step')
    parser.add_argument('--epochs', type=int, default=12)
    parser.add_argument('--images', type=int, default=600, help='to train on; a quarter as many are held out')
    parser.add_argument('--size', type=int, default=96, help='of the images, on each side')
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--lr', type=float, default=5e-3)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', type=Path, default=Path('detect.png'), help='some held-out images with the boxes')
    args = parser.parse_args(argv)

    random_seed(args.seed)
    loader = DataLoader(
        Scenes(args.images, args.size, args.seed), args.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    held_out = DataLoader(
        Scenes(args.images // 4, args.size, args.seed + 1), args.batch_size, collate_fn=collate)
    model = create_detector(
        args.model, args.size, pretrained=args.pretrained or args.weights is not None,
        pretrained_cfg_overlay=dict(file=str(args.weights)) if args.weights else None,
        norm_layer='frozenbatchnorm2d' if args.freeze_bn else None).to(args.device)
    train(model, loader, args.epochs, args.lr)
    images, found, targets = detect(model, held_out)
    precisions = [average_precision(found, targets, threshold / 100) for threshold in range(50, 100, 5)]
    mean = sum(precisions) / len(precisions)
    print(f'{args.model}: mAP {mean:.3f}, at IoU 0.5 {precisions[0]:.3f}, on {len(images)} held-out images')
    write_images([draw_boxes(*pair) for pair in zip(images[:8], found)], args.output, columns=4)
    print(args.output)


if __name__ == '__main__':
    main()
