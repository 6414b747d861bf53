"""The command line: ``cspnet-timm`` or ``python -m cspnet_timm``."""
import argparse
import difflib
import fnmatch
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional, Sequence

if TYPE_CHECKING:
    from .sizes import ModelSize

__all__ = ['main']


class UserError(Exception):
    """Something the user can mend; shown as one line, and the exit code is 2."""


def check_model_name(name: str) -> None:
    """Accept the models of this package, with or without a tag.

    Args:
        name: What the user typed.

    Raises:
        UserError: If there is no such model, with the nearest names.
    """
    import timm
    from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

    from . import register

    register()
    names = timm.list_models('cspnet_*')
    architecture, tag = split_model_name_tag(name)
    if architecture not in names:
        near = difflib.get_close_matches(architecture, names, n=3, cutoff=0.5)
        hint = f'did you mean {" or ".join(near)}?' if near else '`cspnet-timm list` shows all.'
        raise UserError(f'there is no model {architecture!r}: {hint}')
    tags = [split_model_name_tag(n)[1] for n in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise UserError(f'{architecture} has no weights {tag!r}, only: {", ".join(tags)}.')


def _list(args: argparse.Namespace) -> None:
    import timm
    from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

    from . import register
    from .families import WEIGHTS
    from .sizes import model_sizes

    register()
    glob = args.filter if any(c in args.filter for c in '*?[') else f'*{args.filter}*'
    names = [n for n in timm.list_models('cspnet_*') if fnmatch.fnmatch(n, glob)]
    if not names:
        raise UserError(f'no model matches {args.filter!r}; `cspnet-timm list` shows all.')
    cfgs = {name: get_arch_pretrained_cfgs(name) for name in names}
    tags = [split_model_name_tag(full_name)[1] for name in names for full_name in cfgs[name]]
    widths = (max(map(len, names)), 7, 11, max(map(len, (*tags, 'weights'))), 9, 0)
    _print_row(('model', 'Mparams', 'GMACs', 'weights', 'top-1', 'licence'), widths)
    for name in names:
        size = model_sizes().get(name) or _measure(name)
        for full_name, cfg in cfgs[name].items():
            info = WEIGHTS.get(full_name)
            metrics = dict(info.metrics) if info else {}
            at = f' @{metrics.pop("size")}' if 'size' in metrics else ''
            row = (
                name,
                f'{size.parameters / 1e6:.2f}',
                f'{size.macs / 1e9:.2f} @{size.side}',
                split_model_name_tag(full_name)[1],
                f'{metrics["top1"]:.1f}{at}' if 'top1' in metrics else '-',
                (cfg.license or '-') if info else '-',
            )
            _print_row(row, widths)


def _measure(name: str) -> 'ModelSize':
    """Count a model that this version of the package does not know: another package registered it."""
    from .counting import measure

    return measure(name)


def _print_row(row: Sequence[str], widths: Sequence[int]) -> None:
    print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip(), flush=True)


def _open_images(paths: Sequence[str]) -> List[Path]:
    from PIL import Image

    images = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f'{path}: there is no such image.')
        try:
            with Image.open(path) as image:
                image.verify()
        except Exception as error:  # Pillow raises almost anything on damaged files
            raise UserError(f'{path}: cannot be read as an image ({error}).') from error
        images.append(path)
    return images


def _output_paths(images: Sequence[Path], out: Path, model: str) -> List[Path]:
    if out.exists() and not out.is_dir():
        raise UserError(f'--out {out}: is a file, not a directory.')
    paths = [out / f'{image.stem}.{model}.png' for image in images]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UserError(f'{images[i]}: {path} is already the result of {images[paths.index(path)]}.')
    return paths


def _features(args: argparse.Namespace) -> None:
    check_model_name(args.model)
    images = _open_images(args.images)
    paths = _output_paths(images, Path(args.out), args.model) if args.out else []

    import timm
    import torch
    from huggingface_hub.utils import tqdm
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    from .feature_image import feature_image, save_image

    torch.manual_seed(0)  # the same random weights every time, where there are no others
    try:
        model = timm.create_model(args.model, pretrained=args.pretrained, features_only=True).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f'{args.model} cannot be created: {error}') from error
    infos = model.feature_info.get_dicts()
    config = resolve_data_config({}, model=model)
    transform = create_transform(**config)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    if paths:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    many = len(images) > 3
    if not args.pretrained:
        print('The weights are random: --pretrained takes the released ones.')
    for i, file in enumerate(tqdm(images, unit='image', disable=not many)):
        with Image.open(file) as image:
            x = transform(image.convert('RGB'))
        with torch.no_grad():
            features = [level[0] for level in model(x[None])]
        if not many or not paths:
            print(f'{file}: {args.model}, input {tuple(x.shape)}')
            for info, level in zip(infos, features):
                print(
                    f'  {info["module"]:<8} stride {info["reduction"]:>2}  channels {info["num_chs"]:>4}  '
                    f'shape {tuple(level.shape)}'
                )
        if paths:
            pixels = ((x * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
            seen = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            save_image(feature_image(seen, features, infos), paths[i])
            if not many:
                print(f'  -> {paths[i]}')
    if many and paths:
        print(f'{len(paths)} images -> {args.out}')


def _convert(args: argparse.Namespace) -> None:
    from .conversion import convert

    if args.model:
        check_model_name(args.model)
    try:
        done = convert(args.file, args.out, args.model, args.license, args.num_classes, args.push_to_hub)
    except (OSError, ValueError) as error:  # unreadable and foreign files, folders that are there, a Hub that refuses
        raise UserError(' '.join(str(error).split())) from error
    print(f'{args.file}: {done.found}')
    print(f'{done.model}, licence {done.license}: loaded again and compared, relative distance {done.distance:.1e}')
    print(f'{done.directory}: timm.create_model(\'local-dir:{done.directory}\', pretrained=True)')
    if done.url:
        print(done.url)


def _inspect(args: argparse.Namespace) -> None:
    from .conversion import inspect

    try:
        lines = inspect(args.file, args.tensors)
    except (OSError, ValueError) as error:
        raise UserError(' '.join(str(error).split())) from error
    for line in lines:
        print(line)


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(prog='cspnet-timm', description='Cross stage partial backbones for timm.')
    parser.add_argument('--version', action='version', version=f'cspnet-timm {__version__}')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    command = commands.add_parser('list', help='the models, their sizes and weights')
    command.add_argument(
        '--filter', default='*', metavar='PATTERN', help='part of the names to show, or a pattern such as "cspnet_*_s"')
    command.set_defaults(run=_list)

    command = commands.add_parser(
        'features', help='what each level of a model makes of images',
        description='Print the shape, stride and channels of each level, and draw the strongest channels of each.')
    command.add_argument('images', nargs='+', metavar='IMAGE', help='images of any format that Pillow reads')
    command.add_argument('--model', required=True, metavar='NAME', help='a name of `cspnet-timm list`')
    command.add_argument('--pretrained', action='store_true', help='download and use the released weights')
    command.add_argument('--out', metavar='DIR', help='write one PNG per image into this directory')
    command.set_defaults(run=_features)

    files = '.pth, .pt, .pdparams, .weights, .safetensors, …'
    command = commands.add_parser(
        'convert', help='checkpoint files of other frameworks for timm',
        description='Convert a checkpoint file of another framework to a folder that timm.create_model loads by '
                    '"local-dir:DIR". The kind of file and its network are recognised; nothing in it is executed.')
    command.add_argument('file', metavar='FILE', help=files)
    command.add_argument('--out', required=True, metavar='DIR', help='write the model into this new directory')
    command.add_argument('--model', metavar='NAME', help='a name of `cspnet-timm list`, if it cannot be recognised')
    command.add_argument('--license', metavar='NAME', help='licence of the weights, by its name on the Hub')
    command.add_argument('--num-classes', type=int, metavar='N', help='number of classes, if the file does not tell')
    command.add_argument('--push-to-hub', metavar='USER/REPO', help='push it to the Hugging Face Hub as well')
    command.set_defaults(run=_convert)

    command = commands.add_parser(
        'inspect', help='what a checkpoint file holds',
        description='Say what a checkpoint file holds, without executing or loading any of it.')
    command.add_argument('file', metavar='FILE', help=files)
    command.add_argument('--tensors', action='store_true', help='list every tensor')
    command.set_defaults(run=_inspect)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, those of the process by default.

    Returns:
        The exit code: 0, or 2 if the user has something to mend.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr)
    for noisy in ('httpx', 'httpcore', 'urllib3'):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        args.run(args)
    except UserError as error:
        print(f'cspnet-timm: {error}', file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough; what Python would flush at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
