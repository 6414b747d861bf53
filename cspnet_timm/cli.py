"""The command line: ``cspnet-timm`` or ``python -m cspnet_timm``."""
import argparse
import csv
import difflib
import fnmatch
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from .autoload import register

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

    names = timm.list_models('cspnet_*')
    architecture, tag = split_model_name_tag(name)
    if architecture not in names:
        near = difflib.get_close_matches(architecture, names, n=3, cutoff=0.5)
        hint = f'did you mean {" or ".join(near)}?' if near else '`cspnet-timm list` shows all.'
        raise UserError(f'there is no model {architecture!r}: {hint}')
    tags = [split_model_name_tag(n)[1] for n in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise UserError(f'{architecture} has no weights {tag!r}, only: {", ".join(tags)}.')


_COLUMNS = ('model', 'Mparams', 'GMACs', 'weights', 'top-1', 'licence')


def _entries(pattern: str) -> List[Dict[str, Any]]:
    """What the package knows of every set of weights of the models that match, as JSON has it."""
    import timm
    from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

    from .families import WEIGHTS
    from .sizes import model_sizes

    glob = pattern.lower()
    globs = (glob, f'cspnet_{glob}') if any(c in glob for c in '*?[') else (f'*{glob}*',)
    names = [n for n in timm.list_models('cspnet_*') if any(fnmatch.fnmatchcase(n, glob) for glob in globs)]
    if not names:
        raise UserError(f'no model matches {pattern!r}; `cspnet-timm list` shows all.')
    entries: List[Dict[str, Any]] = []
    for name in names:
        size = model_sizes().get(name) or _measure(name)
        for full_name, cfg in get_arch_pretrained_cfgs(name).items():
            info = WEIGHTS.get(full_name)
            entries.append(dict(
                model=name,
                parameters=size.parameters,
                macs=size.macs,
                input_size=size.side,
                weights=split_model_name_tag(full_name)[1],
                trained_on=info.data if info else None,
                license=info.terms.label if info else None,
                downloads=bool(cfg.has_weights),
                metrics=dict(info.metrics) if info else {},
            ))
    return entries


def _measure(name: str) -> 'ModelSize':
    """Count a model that this version of the package does not know: another package registered it."""
    from .counting import measure

    return measure(name)


def _row(entry: Dict[str, Any]) -> Tuple[str, ...]:
    metrics = entry['metrics']
    at = f' @{metrics["size"]}' if 'size' in metrics else ''
    return (
        entry['model'],
        f'{entry["parameters"] / 1e6:.2f}',
        f'{entry["macs"] / 1e9:.2f} @{entry["input_size"]}',
        entry['weights'],
        f'{metrics["top1"]:.1f}{at}' if 'top1' in metrics else '-',
        entry['license'] or '-',
    )


def _list(args: argparse.Namespace) -> None:
    entries = _entries(args.filter)
    if args.json:
        print(json.dumps(entries, indent=1))
        return
    if args.csv:
        metrics = sorted({name for entry in entries for name in entry['metrics']})
        fields = [name for name in entries[0] if name != 'metrics']
        writer = csv.writer(sys.stdout, lineterminator='\n')
        writer.writerow([*fields, *metrics])
        for entry in entries:
            writer.writerow([*(entry[name] for name in fields), *(entry['metrics'].get(name) for name in metrics)])
        return
    rows = [_COLUMNS, *map(_row, entries)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _features(args: argparse.Namespace) -> None:
    if not args.model.startswith(('local-dir:', 'hf-hub:')):
        check_model_name(args.model)
    from .features import create_extractor, draw_features, find_images, output_paths

    out = Path(args.out) if args.out else None
    try:
        images = find_images(args.images)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.filename is None:
            raise UserError(str(error)) from error
        raise UserError(f'--out {out}: cannot be made ({error.strerror}).') from error
    paths = output_paths(images, out, args.model) if out is not None else []
    pretrained = True if args.pretrained else False if args.random else None
    try:
        model, weights = create_extractor(args.model, args.file, pretrained)
        print(f'{args.model}: {weights}')
        done = draw_features(model, args.model, images, paths)
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f'--out {out}: cannot be written ({error.strerror or error}).') from error
    if not done:
        raise UserError(f'none of the {len(images)} images can be read.' if len(images) > 1 else 'nothing was read.')
    if len(images) > 1 and len(done) < len(images):
        print(f'{len(images) - len(done)} of {len(images)} images passed over', file=sys.stderr)
    if paths and len(images) > 3:
        print(f'{len(done)} images -> {out}')


def _convert(args: argparse.Namespace) -> None:
    from .conversion import convert

    if args.model:
        check_model_name(args.model)
    try:
        done = convert(args.file, args.out, args.model, args.license, args.num_classes, args.push_to_hub)
    except (OSError, ValueError) as error:  # unreadable and foreign files, folders that are there, a Hub that refuses
        raise UserError(' '.join(str(error).split())) from error
    print(f'{args.file}: {done.found}')
    of = ''
    if done.model != done.preprocessing:
        of = f' with the weights of your file, preprocessing of {done.preprocessing}'
    print(f'{done.model}{of}, licence {done.license}: loaded again and compared, relative distance {done.distance:.1e}')
    if done.with_neck:
        print(f'The neck of the file was left out: --model {" or ".join(done.with_neck)} takes it as well.')
    elif done.model.partition('.')[0].endswith('_pan'):
        print('With neck: the maps of the detector\'s pyramid.')
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


def _download(args: argparse.Namespace) -> int:
    from .downloads import download
    from .sources import DownloadError

    try:
        return int(download(args.filter, Path(args.out), args.converted) > 0)
    except (DownloadError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(str(error)) from error


def _verify(args: argparse.Namespace) -> int:
    from .downloads import verify
    from .sources import DownloadError

    try:
        return int(verify(Path(args.folder)) > 0)
    except (DownloadError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(str(error)) from error


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import report

    return report(args.network)


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(prog='cspnet-timm', description='Cross stage partial backbones for timm.')
    parser.add_argument('--version', action='version', version=f'cspnet-timm {__version__}')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    command = commands.add_parser('list', help='the models, their sizes and weights')
    command.add_argument(
        '--filter', default='*', metavar='PATTERN', help='part of the names to show, or a pattern such as "yolo*s"')
    form = command.add_mutually_exclusive_group()
    form.add_argument('--json', action='store_true', help='as JSON, with counts in full and every published figure')
    form.add_argument('--csv', action='store_true', help='the same as comma-separated values')
    command.set_defaults(run=_list)

    command = commands.add_parser(
        'features', help='what each level of a model makes of images',
        description='Print the shape, stride and channels of each level, and draw the channels of each that vary most '
                    'over the image. The released weights are used if they are on this machine or a host that has '
                    'them answers within seconds, else random ones.')
    command.add_argument('images', nargs='+', metavar='IMAGE', help='images that Pillow reads, or folders of them')
    command.add_argument(
        '--model', required=True, metavar='NAME',
        help='a name of `cspnet-timm list`, local-dir:FOLDER or hf-hub:USER/NAME')
    weights = command.add_mutually_exclusive_group()
    weights.add_argument('--pretrained', action='store_true', help='insist on the released weights')
    weights.add_argument('--random', action='store_true', help='use random weights')
    weights.add_argument('--file', metavar='FILE', help='use the weights in this file, also of another framework')
    command.add_argument('--out', metavar='DIR', help='write one PNG per image into this directory')
    command.set_defaults(run=_features)

    files = '.pth, .pt, .pdparams, .weights, .h5, .safetensors, …'
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

    command = commands.add_parser(
        'download', help='released weights into a folder, for machines without a network',
        description='Download released weights into a folder that CSPNET_TIMM_WEIGHTS can name, checked, with '
                    'SHA256SUMS and licenses.csv. What is there is kept. What is under the AGPL is not downloaded.')
    command.add_argument(
        '--filter', default='*', metavar='PATTERN', help='part of the names, or a pattern such as "cspnet_yolox*"')
    command.add_argument('--out', required=True, metavar='DIR', help='the folder, made if it is not there')
    command.add_argument(
        '--converted', action='store_true',
        help='write safetensors of this package\'s networks in place of the released files')
    command.set_defaults(run=_download)

    command = commands.add_parser(
        'verify', help='whether a folder of weights is as it was downloaded',
        description='Compare the files of a folder with its SHA256SUMS and with what is known of the released ones.')
    command.add_argument('folder', metavar='DIR', help='a folder that `download` has filled')
    command.set_defaults(run=_verify)

    command = commands.add_parser(
        'doctor', help='what is installed, what is wrong with it, and the remedy',
        description='Say what is installed and works, for a bug report. It runs where torch or timm are missing or '
                    'broken, and asks no host anything without --network.')
    command.add_argument('--network', action='store_true', help='ask the hosts of the weights whether they answer')
    command.set_defaults(run=_doctor)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, those of the process by default.

    Returns:
        The exit code: 0, 1 if `download`, `verify` or `doctor` find something wrong, 2 if the user has
        something to mend, 130 if the user stopped it, 141 if nobody reads on.
    """
    try:
        args = _parser().parse_args(argv)
        logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr)
        for noisy in ('httpx', 'httpcore', 'urllib3'):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        if args.run is not _doctor:  # which has to work where they cannot be registered
            register()
        status = args.run(args)
        sys.stdout.flush()
    except UserError as error:
        print(f'cspnet-timm: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('cspnet-timm: stopped.', file=sys.stderr)
        return 130
    except BrokenPipeError:  # as of `| head`
        # Python would try once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status or 0
