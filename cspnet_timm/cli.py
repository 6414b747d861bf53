"""The command line: ``cspnet-timm`` or ``python -m cspnet_timm``."""
import argparse
import difflib
import fnmatch
import logging
import sys
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

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


def _rows(pattern: str) -> List[Tuple[str, ...]]:
    import timm
    from huggingface_hub.utils import tqdm
    from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

    from . import register
    from .counting import describe_size
    from .families import WEIGHTS

    register()
    names = [n for n in timm.list_models('cspnet_*') if fnmatch.fnmatch(n, pattern)]
    if not names:
        raise UserError(f'no model matches {pattern!r}; the pattern has the form cspnet_yolo*.')
    rows: List[Tuple[str, ...]] = []
    for name in tqdm(names, desc='counting', unit='model', leave=False, disable=not sys.stderr.isatty()):
        parameters, macs, input_size = describe_size(name)
        for full_name, cfg in get_arch_pretrained_cfgs(name).items():
            info = WEIGHTS.get(full_name)
            metrics = dict(info.metrics) if info else {}
            at = f' @{metrics.pop("size")}' if 'size' in metrics else ''
            rows.append((
                name,
                f'{parameters / 1e6:.2f}',
                f'{macs / 1e9:.2f} @{input_size[-1]}',
                split_model_name_tag(full_name)[1],
                f'{metrics["top1"]:.1f}{at}' if 'top1' in metrics else '-',
                (cfg.license or '-') if info else '-',
            ))
    return rows


def _list(args: argparse.Namespace) -> None:
    rows = [('model', 'Mparams', 'GMACs', 'weights', 'top-1', 'licence'), *_rows(args.filter)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _open_pictures(paths: Sequence[str]) -> List[Path]:
    from PIL import Image

    pictures = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f'{path}: there is no such picture.')
        try:
            with Image.open(path) as image:
                image.verify()
        except Exception as error:  # Pillow raises almost anything on damaged files
            raise UserError(f'{path}: cannot be read as a picture ({error}).') from error
        pictures.append(path)
    return pictures


def _output_paths(pictures: Sequence[Path], out: Path, model: str) -> List[Path]:
    if out.exists() and not out.is_dir():
        raise UserError(f'--out {out}: is a file, not a directory.')
    paths = [out / f'{picture.stem}.{model}.png' for picture in pictures]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UserError(f'{pictures[i]}: {path} is already the result of {pictures[paths.index(path)]}.')
    return paths


def _features(args: argparse.Namespace) -> None:
    check_model_name(args.model)
    pictures = _open_pictures(args.images)
    paths = _output_paths(pictures, Path(args.out), args.model) if args.out else []

    import timm
    import torch
    from huggingface_hub.utils import tqdm
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    from .feature_picture import feature_picture, save_picture

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
    many = len(pictures) > 3
    if not args.pretrained:
        print('The weights are random: --pretrained takes the released ones.')
    for i, picture in enumerate(tqdm(pictures, unit='picture', disable=not many)):
        with Image.open(picture) as image:
            x = transform(image.convert('RGB'))
        with torch.no_grad():
            features = [level[0] for level in model(x[None])]
        if not many or not paths:
            print(f'{picture}: {args.model}, input {tuple(x.shape)}')
            for info, level in zip(infos, features):
                print(
                    f'  {info["module"]:<8} stride {info["reduction"]:>2}  channels {info["num_chs"]:>4}  '
                    f'shape {tuple(level.shape)}'
                )
        if paths:
            pixels = ((x * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
            seen = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            save_picture(feature_picture(seen, features, infos), paths[i])
            if not many:
                print(f'  -> {paths[i]}')
    if many and paths:
        print(f'{len(paths)} pictures -> {args.out}')


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(prog='cspnet-timm', description='Cross stage partial backbones for timm.')
    parser.add_argument('--version', action='version', version=f'cspnet-timm {__version__}')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    command = commands.add_parser('list', help='the models, their sizes and weights')
    command.add_argument('--filter', default='*', metavar='PATTERN', help='names to show, e.g. "cspnet_yolo*"')
    command.set_defaults(run=_list)

    command = commands.add_parser(
        'features', help='what each level of a model makes of pictures',
        description='Print the shape, stride and channels of each level, and draw the strongest channels of each.')
    command.add_argument('images', nargs='+', metavar='IMAGE', help='pictures of any format that Pillow reads')
    command.add_argument('--model', required=True, metavar='NAME', help='a name of `cspnet-timm list`')
    command.add_argument('--pretrained', action='store_true', help='download and use the released weights')
    command.add_argument('--out', metavar='DIR', help='write one PNG per picture into this directory')
    command.set_defaults(run=_features)
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
    return 0
