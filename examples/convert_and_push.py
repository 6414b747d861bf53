"""Weights of another framework: convert them, fine-tune them, push the result to the Hub, and pull it back.

    python examples/convert_and_push.py yolox_nano.pth user/shapes

The file is one that ``cspnet-timm convert`` reads; the repository is created if it does not exist, by the token of ``hf
auth login``. The data are those of ``finetune.py``.
"""
import argparse
import tempfile
from pathlib import Path
from typing import Optional, Sequence

import timm
import torch
from finetune import class_names, create_loaders, train
from shapes import SIZE, draw_dataset
from timm.utils import random_seed

import cspnet_timm
from cspnet_timm.conversion import convert


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Convert, fine-tune, push, pull and compare.

    Args:
        argv: The command line's arguments, by default those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('file', type=Path, help='weights of another framework')
    parser.add_argument('repo', help='repository of the Hub, USER/NAME')
    parser.add_argument('--data', type=Path, help='folder with train/ and validation/; shapes if left out')
    parser.add_argument('--model', help='a name of `cspnet-timm list`, if the file does not tell')
    parser.add_argument('--img-size', type=int, default=SIZE)
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--lr', type=float, default=2e-3)
    parser.add_argument('--layer-decay', type=float, default=0.8)
    parser.add_argument('--images', type=int, default=2000, help='shapes to draw; a quarter as many are held out')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--license', help='of the file, by its name on the Hub, if it does not tell')
    parser.add_argument('--private', action='store_true', help='create a private repository')
    parser.add_argument('--output', type=Path, default=Path('converted'), help='new folder for what is converted')
    args = parser.parse_args(argv)

    done = convert(args.file, args.output, args.model, args.license)
    print(f'{args.file}: {done.found}, converted to {done.model}, licence {done.license}')

    random_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = args.data or Path(folder)
        if args.data is None:
            draw_dataset(root, {'train': args.images, 'validation': args.images // 4}, args.seed)
        names = class_names(root)
        model = timm.create_model(f'local-dir:{args.output}', pretrained=True, num_classes=len(names))
        loader, held_out, config = create_loaders(
            model, root, args.img_size, args.batch_size, augment=args.data is not None)
        curve, average = train(model, loader, held_out, args.epochs, args.lr, args.layer_decay, done.model)
    print(f'{done.model}: {curve[-1]["ema_top1"]:.1f} % of {len(held_out.dataset)} held-out images, '
          f'{len(names)} classes')

    commit = cspnet_timm.hub.push(
        average, args.repo, label_names=names, data=args.data.name if args.data else 'drawn shapes',
        source=f'fine-tuned from `{args.file.name}`', data_config=config, private=args.private)
    print(f'pushed: {commit.commit_url}')
    pulled = timm.create_model(f'hf-hub:{args.repo}@{commit.oid}', pretrained=True)
    ours, theirs = average.state_dict(), pulled.state_dict()
    if ours.keys() != theirs.keys() or not all(torch.equal(theirs[key], value) for key, value in ours.items()):
        raise SystemExit(f'{args.repo}: what was pulled is not what was pushed')
    print(f'pulled: all {len(theirs)} tensors are equal; timm.create_model(\'hf-hub:{args.repo}\', pretrained=True)')


if __name__ == '__main__':
    main()
