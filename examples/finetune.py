"""Fine-tune a classifier on a folder of images, with timm's own training pieces.

    python examples/finetune.py images --model cspnet_small --pretrained --layer-decay 0.7

The folder has ``train`` and ``validation``, each with a folder per class. Without one, shapes are drawn (see
``shapes.py``), and a small network learns them from nothing. What is written, ``timm.create_model('local-dir:…',
pretrained=True)`` loads.
"""
import argparse
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from huggingface_hub.utils import tqdm
from shapes import SIZE, draw_dataset
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, random_seed

import cspnet_timm


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any) -> float:
    """Percentage of the images that the model names right.

    Args:
        model: The model.
        loader: timm's loader of the held-out images.

    Returns:
        The top-1 accuracy in percent.
    """
    model.eval()
    device = next(model.parameters()).device
    meter = AverageMeter()
    for images, labels in loader:
        meter.update(accuracy(model(images.to(device)), labels.to(device))[0].item(), len(labels))
    return meter.avg


def train(
        model: nn.Module,
        loader: Any,
        held_out: Any,
        epochs: int,
        lr: float = 2e-3,
        layer_decay: Optional[float] = None,
        description: str = '',
) -> Tuple[List[Dict[str, float]], nn.Module]:
    """Train a classifier, in the order of timm's train.py.

    Args:
        model: The model, which is trained in place.
        loader: timm's loader of the images to train on.
        held_out: That of the images to evaluate on.
        epochs: How many times it sees every image.
        lr: Largest learning rate, of AdamW.
        layer_decay: What the learning rate is multiplied with from each block to the one before it.
        description: In front of the progress bar.

    Returns:
        Per epoch the mean ``loss``, the ``top1`` accuracy on the held-out images and that of the moving average,
        ``ema_top1``; and the moving average of the model.
    """
    device = next(model.parameters()).device
    criterion = LabelSmoothingCrossEntropy(0.1)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=lr, weight_decay=0.02, layer_decay=layer_decay)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=epochs, warmup_epochs=1, warmup_lr=lr / 10, min_lr=lr / 100,
        step_on_epochs=False, updates_per_epoch=len(loader))
    average = ModelEmaV3(model, decay=0.99, use_warmup=True)

    curve, step = [], 0
    with tqdm(total=epochs * len(loader), desc=description) as bar:
        for epoch in range(epochs):
            model.train()
            losses = AverageMeter()
            for images, labels in loader:
                loss = criterion(model(images.to(device)), labels.to(device))
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
    return curve, average.module


def class_names(root: Path) -> List[str]:
    """The classes of a folder with ``train``, in the order in which timm numbers them."""
    return list(create_dataset('', root=str(root), split='train').reader.class_to_idx)


def create_loaders(
        model: nn.Module,
        root: Path,
        size: Optional[int] = None,
        batch_size: int = 64,
        augment: bool = True,
        workers: int = 0,
) -> Tuple[Any, Any, Dict[str, Any]]:
    """Create timm's loaders of a folder's images, prepared as the model wants them.

    Args:
        model: The model.
        root: A folder with ``train`` and ``validation``, each with a folder per class.
        size: Of the images on each side, by default the model's own.
        batch_size: Images per step, at most; fewer where there are not four batches of them.
        augment: Crop, flip and colour the images to train on at random; without, they are seen whole.
        workers: Processes that read images.

    Returns:
        The loader to train with, that of the held-out images, and the preprocessing.

    Raises:
        ValueError: If both have not the same classes, or there are less than two images to train on.
    """
    images, held_out = (create_dataset('', root=str(root), split=split) for split in ('train', 'validation'))
    if images.reader.class_to_idx != held_out.reader.class_to_idx:
        raise ValueError(f'{root}: train and validation have different classes')
    if len(images) < 2:
        raise ValueError(f'{root}: {len(images)} image to train on is too few, batch norm needs two at least')
    # The loader leaves out a last batch that is not full, which of few images would be all of them.
    batch_size = max(2, min(batch_size, len(images) // 4))
    config = resolve_model_data_config(model)
    config['input_size'] = (config['input_size'][0], *([size] * 2 if size else config['input_size'][1:]))
    if not augment:
        config['crop_pct'] = 1.
    options = dict(batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0, use_prefetcher=False,
                   **config)
    loader = create_loader(images, is_training=True, no_aug=not augment, **options)
    return loader, create_loader(held_out, **options), config


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Fine-tune, and save what came out.

    Args:
        argv: The command line's arguments, by default those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('data', nargs='?', type=Path, help='folder with train/ and validation/; shapes if left out')
    parser.add_argument('--model', default='cspnet_nano', help='also local-dir:FOLDER or hf-hub:USER/NAME')
    parser.add_argument('--pretrained', action='store_true', help='start from the model\'s weights')
    parser.add_argument('--img-size', type=int, help=f'by default the model\'s own, {SIZE} for shapes')
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--lr', type=float, default=2e-3)
    parser.add_argument('--layer-decay', type=float, help='0.7 keeps most of what pretrained first levels know')
    parser.add_argument('--images', type=int, default=4000, help='shapes to draw; a quarter as many are held out')
    parser.add_argument('--workers', type=int, default=0, help='processes that read images')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--license', help='of the result, by its name on the Hub; by default that of the weights')
    parser.add_argument('--output', type=Path, default=Path('finetuned'), help='new folder for the model')
    args = parser.parse_args(argv)
    if args.output.exists():
        parser.error(f'{args.output} is there already: choose another --output')

    random_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = args.data or Path(folder)
        if args.data is None:
            draw_dataset(root, {'train': args.images, 'validation': args.images // 4}, args.seed)
        names = class_names(root)
        model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=len(names)).to(args.device)
        about = dict(
            label_names=names, data=args.data.name if args.data else 'drawn shapes',
            license=args.license or (None if args.pretrained else 'other'))
        cspnet_timm.hub.model_card(model, **about)  # if it could not be saved, that is said now
        # Shapes are seen as they are: a flip would change their class.
        try:
            loader, held_out, config = create_loaders(
                model, root, args.img_size or (None if args.data else SIZE), args.batch_size,
                augment=args.data is not None, workers=args.workers)
        except ValueError as error:
            parser.error(str(error))
        curve, average = train(model, loader, held_out, args.epochs, args.lr, args.layer_decay, args.model)
    cspnet_timm.hub.save(average, args.output, data_config=config, **about)
    print(f'{args.model}: {curve[-1]["ema_top1"]:.1f} % of {len(held_out.dataset)} held-out images, '
          f'{len(names)} classes')
    print(f'{args.output}: timm.create_model(\'local-dir:{args.output}\', pretrained=True)')


if __name__ == '__main__':
    main()
