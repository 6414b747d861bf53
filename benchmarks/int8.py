"""What int8 does to trained weights: this package's engine, step by step, beside OpenVINO and its own tool, NNCF.

    python benchmarks/int8.py --out docs/speed/amx

A YOLOv8n that somebody trained on microscope images, and such an image, are in the wheel ``tau-fibrils-yolo`` 0.2.0
(46 MB), which is downloaded from the package index by name. Its weights are licensed under AGPL-3.0: they are read as
data, no code of the wheel is run, and nothing of it is kept. The image is cut into tiles; some calibrate, others are
compared. The figures are relative differences to the network in float32, ``|a - b| / |b|`` of its maps at strides 2 to
32, and the milliseconds of the compared tiles: everything has its turn, one behind the other, and the ratios are those
within a round.

Writes ``int8.json`` and ``int8.md`` (``pip install '.[deploy,bench-int8]'``; without NNCF its rows are left out).
"""
import argparse
import contextlib
import importlib.util
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from paper import write_files
from timm.models import reparameterize_model

from cspnet_timm.deployment import native
from cspnet_timm.deployment.backends import BACKENDS, Arrangement, Runner
from cspnet_timm.deployment.contract import differences
from cspnet_timm.deployment.machine import describe, elapsed, native_precisions
from cspnet_timm.deployment.native.correcting import PARTS
from cspnet_timm.deployment.search import TupleOutputs

WHEEL = 'tau-fibrils-yolo', '0.2.0'
WEIGHTS, IMAGE = 'tau_fibrils_yolo/model/100ep.pt', 'tau_fibrils_yolo/sample/sample.tif'
MODEL = 'cspnet_yolov8n'
STRIDES = (2, 4, 8, 16, 32)
BEFORE = 'own engine, int8, ranges alone'
OWN = 'own engine, int8'
CPU = torch.device('cpu')


class Row(NamedTuple):
    """A way to run the network.

    Attributes:
        name: What the table calls it.
        call: Runs the compared tiles.
        difference: Of each map.
    """

    name: str
    call: Callable[[], Any]
    difference: List[float]


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def fetch(folder: Path, wheel: Optional[Path] = None) -> Tuple[Path, Path]:
    """The trained weights and the image.

    Args:
        folder: Where they are put.
        wheel: The wheel, if it is there; else it is downloaded.

    Returns:
        The two files.

    Raises:
        OSError: If the package index cannot be reached, or does not have it.
    """
    if wheel is None:
        name = '=='.join(WHEEL)
        done = subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary', ':all:', '--dest',
             str(folder), name], capture_output=True, text=True)
        found = sorted(folder.glob('*.whl'))
        if done.returncode or not found:
            lines = done.stderr.strip().splitlines() or ['pip says nothing']
            raise OSError(f'{name} could not be downloaded: {lines[-1]}')
        wheel = found[0]
    with zipfile.ZipFile(wheel) as archive:
        for member in (WEIGHTS, IMAGE):
            archive.extract(member, folder)
    return folder / WEIGHTS, folder / IMAGE


def read_tiles(path: Path, size: int, contrast: Tuple[float, float]) -> torch.Tensor:
    """An image of one channel, cut into tiles in random order.

    Args:
        path: The image.
        size: Sides of a tile.
        contrast: The percentiles of the whole image that become 0 and 1.

    Returns:
        ``(B, 3, size, size)`` in float32, three times the same channel.
    """
    import numpy as np
    from PIL import Image

    with warnings.catch_warnings(), Image.open(path) as image:
        pixels = np.asarray(image).astype(np.float32)
    low, high = np.percentile(pixels, contrast)
    whole = torch.from_numpy(((pixels - low) / (high - low)).clip(0, 1)).float()
    rows, columns = (n // size for n in whole.shape)
    whole = whole[:rows * size, :columns * size].reshape(rows, size, columns, size)
    tiles = whole.transpose(1, 2).reshape(-1, 1, size, size)
    order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(0))
    return tiles[order].expand(-1, 3, -1, -1).contiguous()


def load(weights: Path) -> nn.Module:
    """The trained network, whose outputs are its maps at strides 2 to 32, with batch norms folded."""
    model = timm.create_model(
        MODEL, pretrained=True, features_only=True, pretrained_cfg_overlay=dict(file=str(weights)))
    return TupleOutputs(reparameterize_model(model.eval()))


def own_rows(model: nn.Module, seen: List[torch.Tensor], threads: int) -> Dict[str, Callable[[], Runner]]:
    """This package's engine: in bfloat16, in int8, and in int8 with each part of the correction by itself."""
    example = seen[0][:1]

    def in_bytes(parts: Sequence[str]) -> Runner:
        plan = native.calibrate(native.lower(model, example, torch.float32), seen)
        return native.NativeEngine(native.correct(plan, seen, parts=parts) if parts else plan, threads, 'int8')

    rows: Dict[str, Callable[[], Runner]] = {}
    if native.has_bfloat16():
        rows['own engine, bfloat16'] = lambda: native.NativeEngine(native.lower(model, example), threads)
    rows[BEFORE] = lambda: in_bytes(())
    for part, what in (('means', 'and mean errors'), ('rounding', 'and the order of rounding'),
                       ('weights', 'and fitted weights')):
        rows[f'{BEFORE.removesuffix(" alone")} {what}'] = lambda part=part: in_bytes((part,))  # type: ignore[misc]
    rows[OWN] = lambda: in_bytes(PARTS)
    return rows


def openvino_rows(model: nn.Module, seen: List[torch.Tensor], count: int, threads: int
                  ) -> Dict[str, Callable[[], Runner]]:
    """OpenVINO, rounded as ``deploy`` rounds it, and by its own tool."""
    backend = BACKENDS['openvino']
    arrangement = Arrangement(1, count)

    def tool(**options: Any) -> Runner:
        import nncf
        import openvino

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter('ignore')
            traced = torch.jit.trace(model, seen[0][:1], check_trace=False, strict=False)
            converted = openvino.convert_model(traced, example_input=torch.zeros(1, *seen[0].shape[1:]))
        images = [image[None].numpy() for batch in seen for image in batch]
        with contextlib.redirect_stdout(io.StringIO()):  # bars of progress
            done = nncf.quantize(converted, nncf.Dataset(images), subset_size=len(images), **options)
        return backend(done, 'int8').runner(arrangement, threads)  # type: ignore[call-arg]

    def full() -> Runner:
        import nncf
        return tool(preset=nncf.QuantizationPreset.MIXED, fast_bias_correction=False)

    rows = {'OpenVINO, int8, our ranges': lambda: backend.convert(model, seen[0], 'int8', seen).runner(
        arrangement, threads)}
    if importlib.util.find_spec('nncf') is not None:
        rows['OpenVINO, NNCF, mixed preset, full bias correction'] = full
        rows['OpenVINO, NNCF\'s defaults'] = tool
    return rows


def measure(args: argparse.Namespace) -> Dict[str, Any]:
    """Everything.

    Args:
        args: The command line's.

    Returns:
        The report.

    Raises:
        OSError: If the wheel cannot be had.
        SystemExit: If there are fewer tiles than asked for.
    """
    with tempfile.TemporaryDirectory(prefix='cspnet-timm-') as folder:
        weights, image = fetch(Path(folder), args.wheel)
        tiles = read_tiles(image, args.size, tuple(args.contrast))
        model = load(weights)
    if args.seen + args.compared > len(tiles):
        raise SystemExit(f'The image has {len(tiles)} tiles of {args.size}, not {args.seen + args.compared}.')
    seen = list(tiles[:args.seen].split(8))
    x = tiles[args.seen:args.seen + args.compared]
    threads = torch.get_num_threads()
    with torch.no_grad():
        reference = model(x)
    wanted: Dict[str, Callable[[], Runner]] = {}
    left_out = []
    if (reason := native.unavailable()) is None:
        wanted.update(own_rows(model, seen, threads))
    else:
        left_out.append(f'Without the package\'s own engine: {reason}')
    if (reason := BACKENDS['openvino'].unavailable(CPU)) is None and 'int8' in native_precisions(CPU):
        wanted.update(openvino_rows(model, seen, len(x), threads))
        if importlib.util.find_spec('nncf') is None:
            left_out.append('Without NNCF\'s rows: nncf is not installed: pip install nncf')
    else:
        left_out.append(f'Without OpenVINO\'s rows: {reason or "this processor has no int8 arithmetic"}')
    rows = []
    for name, build in wanted.items():
        say(name)
        runner = build()
        rows.append(Row(name, lambda runner=runner: runner(x), differences(runner(x), reference)))  # type: ignore[misc]
        say(' '.join(f'{d:.3f}' for d in rows[-1].difference))
    base = BEFORE if BEFORE in wanted else next(iter(wanted), None)
    if base is None:
        raise SystemExit(f'There is nothing to measure. {" ".join(left_out)}')
    times: List[Dict[str, float]] = []
    for _ in range(args.rounds + 1):  # the first one, in which memory is had, does not count
        times.append({row.name: elapsed(row.call, 1, CPU) for row in rows})
    times = times[1:]
    libraries = {name: version(name) for name in ('openvino', 'nncf') if importlib.util.find_spec(name) is not None}
    return dict(
        machine=dict(describe(CPU), libraries=libraries, timm=timm.__version__), date=time.strftime('%Y-%m-%d'),
        command=args.command, size=args.size,
        contrast=args.contrast, seen=args.seen, compared=args.compared, rounds=args.rounds, left_out=left_out,
        base=base, rows=[dict(
            name=row.name, difference=row.difference, milliseconds=statistics.median(t[row.name] for t in times),
            share=statistics.median(t[row.name] / t[base] for t in times)) for row in rows])


def conclusion(report: Dict[str, Any]) -> str:
    """One sentence: how far the own engine's maps are off, before and after, and beside NNCF's best row."""
    rows = {row['name']: row for row in report['rows']}
    if OWN not in rows:
        return 'The package\'s own engine does not run on this machine.'
    own, before = rows[OWN]['difference'], rows[BEFORE]['difference']
    text = (f'The own engine\'s map at stride 32 is {own[-1]:.3f} off in int8, {before[-1]:.3f} with ranges alone, in '
            f'{rows[OWN]["share"]:.2f} of the time')
    tool = [row['difference'] for name, row in rows.items() if 'NNCF' in name]
    if tool:
        best = min(tool, key=lambda difference: difference[-1])
        shares = [a / b for a, b in zip(own, best)]
        text += f'; at every stride it is {min(shares):.2f} to {max(shares):.2f} of the error of NNCF\'s best row'
    return text + '.'


def markdown(report: Dict[str, Any]) -> str:
    """The report as a page."""
    machine = report['machine']
    versions = ', '.join(f'{k} {v}' for k, v in (('torch', machine['torch']), *machine['libraries'].items()))
    base = report['base'].removeprefix('own engine, int8, ')
    lines = [
        f'# Int8 on trained weights, {machine["device"]}, {report["date"]}', '',
        f'**{conclusion(report)}**', '',
        'A YOLOv8n trained on microscope images, the weights of `tau-fibrils-yolo` 0.2.0: relative difference of its '
        f'maps at strides 2 to 32 on {report["compared"]} tiles of {report["size"]} pixels, calibrated on '
        f'{report["seen"]} others; percentiles {report["contrast"][0]:g} and {report["contrast"][1]:g} of the image '
        'are 0 and 1.', '',
        f'{machine["device"]}, threads: {machine["threads"]}, {versions}; medians of {report["rounds"]} turns.', '',
        f'    {report["command"]}', '',
        '| | ' + ' | '.join(map(str, STRIDES)) + f' | ms | of the time of {base} |',
        '| --- |' + ' ---: |' * (len(STRIDES) + 2)]
    for row in report['rows']:
        numbers = [*(f'{d:.3f}' for d in row['difference']), f'{row["milliseconds"]:.1f}', f'{row["share"]:.2f}']
        lines.append(f'| {row["name"]} | ' + ' | '.join(numbers) + ' |')
    lines += [line for reason in report['left_out'] for line in ('', f'{reason.rstrip(".")}.')]
    return '\n'.join(lines) + '\n'


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description='What int8 does to trained weights.')
    parser.add_argument('--wheel', type=Path, help='the wheel of tau-fibrils-yolo 0.2.0, if it is there already')
    parser.add_argument('--size', type=int, default=320, metavar='PIXELS', help='sides of a tile (320)')
    parser.add_argument('--seen', type=int, default=64, metavar='N', help='tiles that calibrate (64)')
    parser.add_argument('--compared', type=int, default=16, metavar='N', help='tiles that are compared (16)')
    parser.add_argument('--contrast', type=float, nargs=2, default=[1., 99.], metavar=('LOW', 'HIGH'),
                        help='percentiles of the image that become 0 and 1 (1 99)')
    parser.add_argument('--rounds', type=int, default=31, help='turns of each (31)')
    parser.add_argument('--threads', type=int, help='threads that compute (as many as cores)')
    parser.add_argument('--out', type=Path, default=Path('results'), help='folder for the results')
    args = parser.parse_args(argv)
    given = list(sys.argv[1:] if argv is None else argv)
    for name in ('--out', '--wheel'):  # which change no figure
        if name in given:
            del given[given.index(name):given.index(name) + 2]
    args.command = ' '.join(['python benchmarks/int8.py', *given])
    if min(args.size, args.seen, args.compared, args.rounds, args.threads or 1) < 1:
        parser.error('--size, --seen, --compared, --rounds and --threads must be at least 1')
    if args.size % 32:
        parser.error(f'--size {args.size} must be a multiple of 32')
    if not 0 <= args.contrast[0] < args.contrast[1] <= 100:
        parser.error(f'--contrast {args.contrast} must be two percentiles from 0 to 100, the lower one first')
    if args.wheel is not None and not args.wheel.is_file():
        parser.error(f'--wheel {args.wheel} is no file')
    if args.threads:
        torch.set_num_threads(args.threads)
    report = measure(args)
    files = write_files({
        'int8.json': lambda path: path.write_text(json.dumps(report, indent=1) + '\n'),
        'int8.md': lambda path: path.write_text(markdown(report)),
    }, args.out)
    print(markdown(report))
    print('Wrote', ', '.join(map(str, files)))


if __name__ == '__main__':
    main()
