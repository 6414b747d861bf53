"""How fast the networks are: this package's deployed beside timm's by every road that users take.

    python benchmarks/speed.py --out docs

Everything that is compared runs in turn in one process, and the medians are reported. The machine has to be quiet: if
something else computes, nothing is reported. Five sections, of which ``--sections`` takes some:

- ``routes``: a network of this package, deployed, and timm's (``PAIRS``): eager, compiled (frozen weights), ONNX
  Runtime and OpenVINO, in every precision that the hardware has (in int8 OpenVINO, rounded as ``deploy`` would round
  it); the logits and, of the largest batch, the maps of ``features_only``.
- ``promise``: the paper's networks and the plain ones beside them, both deployed: the ratio of the times beside the
  ratio of the operations.
- ``resolution``: one image of 224 to 640 pixels.
- ``throughput``: the package's own networks from small to large.
- ``training``: a step of SGD and the memory that it takes at most, of this package's network and of timm's.

Rates are given as fractions of what the machine reaches in a product of matrices, measured here too, and the roofline
is drawn with the measured bandwidth of its memory. Writes ``speed.json``, ``speed.md`` and three plots (``pip install
'.[bench,deploy]'``).
"""
import argparse
import contextlib
import json
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from paper import PAIRS as PAPER_PAIRS
from paper import Subject, count, peak_memory, write_files
from timm.models import reparameterize_model

import cspnet_timm
from cspnet_timm import deploy
from cspnet_timm.deployment.backends import BACKENDS, TORCH_TYPES, Arrangement, Runner
from cspnet_timm.deployment.machine import describe, interleave, native_precisions
from cspnet_timm.deployment.search import TupleOutputs

# This package's network, and timm's: the same, but for darknet53, where slope and order of the stages differ.
PAIRS = {
    'medium': ('cspnet_medium', 'cs3darknet_focus_m'),
    'darknet53': ('cspnet_darknet53', 'cspdarknet53'),
    'rtmdet_s': ('cspnet_rtmdet_s', 'cspnext_s'),
}
PROMISES = ('resnext50', 'resnet50', 'darknet53')
SIZES = (224, 320, 416, 512, 640)
OWN = ('cspnet_nano', 'cspnet_tiny', 'cspnet_small', 'cspnet_medium', 'cspnet_large', 'cspnet_xlarge')
SECTIONS = ('routes', 'promise', 'resolution', 'throughput', 'training')
BUSY = 0.08  # fraction of the processors that others may use


def busy_fraction(seconds: float = 1.) -> Optional[float]:
    """How much of the processors is in use while this process sleeps; None where the system does not tell."""
    try:
        before, after = _ticks(), (time.sleep(seconds), _ticks())[1]
    except OSError:
        return None
    total = sum(after) - sum(before)
    idle = after[3] + after[4] - before[3] - before[4]
    return 1. - idle / max(total, 1)


def _ticks() -> List[int]:
    with open('/proc/stat') as file:
        return [int(n) for n in file.readline().split()[1:9]]


@dataclass
class Settings:
    """How to measure.

    Attributes:
        device: Where.
        seconds: About how long each candidate is measured, in ``rounds`` turns.
        rounds: Turns.
        allow_busy: Report although the machine is busy, and say so in the report.
    """

    device: torch.device
    seconds: float = 2.
    rounds: int = 7
    allow_busy: bool = False
    was_busy: bool = False

    def check(self) -> None:
        """Raise unless the machine is quiet.

        Raises:
            SystemExit: If something else computes.
        """
        for _ in range(5):
            busy = busy_fraction()
            if busy is None or busy <= BUSY:
                return
        if not self.allow_busy:
            raise SystemExit(
                f'The machine is busy: {busy:.0%} of its processors are in use by others, {BUSY:.0%} are allowed. '
                'Figures measured now would mean nothing, and none are written.')
        self.was_busy = True

    def time(self, calls: Dict[str, Callable[[], Any]]) -> Dict[str, float]:
        """Median milliseconds of calls that have their turn one behind the other."""
        self.check()
        with torch.inference_mode():
            times = interleave(list(calls.values()), self.device, self.seconds, self.rounds)
        self.check()
        return dict(zip(calls, times))


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def create(name: str, device: torch.device, features: bool = False) -> nn.Module:
    """A model in eval mode, its statistics away from those of a fresh one.

    Args:
        name: The model.
        device: Where.
        features: Its maps, not its logits.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True) if features else timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.8, 1.2)  # type: ignore[arg-type]
    return model.to(device).eval()


def eager_route(model: nn.Module, x: torch.Tensor, precision: str) -> Callable[[], Any]:
    """PyTorch as a user calls it who knows of channels last and of half precision."""
    dtype = TORCH_TYPES[precision]
    model = model.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.to(dtype=dtype, memory_format=torch.channels_last)
    return lambda: model(x)


def compiled_route(model: nn.Module, x: torch.Tensor, precision: str) -> Callable[[], Any]:
    """``torch.compile`` with frozen weights, on a GPU tuned and with CUDA graphs."""
    torch._dynamo.reset()
    call = eager_route(model, x, precision)
    mode = 'max-autotune' if x.is_cuda else None
    compiled = torch.compile(call, mode=mode)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        compiled()
    return compiled


def backend_route(name: str) -> Callable[[nn.Module, torch.Tensor, str], Callable[[], Any]]:
    """An inference engine given the model as it is, in one stream; in int8 with its batch norms folded."""

    def route(model: nn.Module, x: torch.Tensor, precision: str) -> Callable[[], Any]:
        if precision == 'int8':  # rounds what convolutions read, so nothing may stand between them and their norms
            model = reparameterize_model(model)
        converted = BACKENDS[name].convert(TupleOutputs(model), x, precision, [x] if precision == 'int8' else [])
        runner: Runner = converted.runner(Arrangement(1, len(x)), torch.get_num_threads())
        return lambda: runner(x)

    return route


def routes(device: torch.device, precision: str, compiled: bool) -> Dict[str, Callable[..., Callable[[], Any]]]:
    """The roads to a running network, but for this package's own."""
    found: Dict[str, Callable[..., Callable[[], Any]]] = {}
    if precision in TORCH_TYPES:
        found['eager'] = eager_route
        if compiled:
            found['compile'] = compiled_route
    for name in ('onnxruntime', 'openvino'):
        backend = BACKENDS[name]
        if backend.unavailable(device) is None and precision in backend.precisions(device):
            found[name] = backend_route(name)
    return found


def deployed(
        name: str,
        x: torch.Tensor,
        precision: str,
        features: bool = False,
) -> Tuple[Callable[[], Any], Dict[str, Any]]:
    """A network made ready by this package, and what was chosen.

    ``torch.compile`` is left out on a CPU, where it takes most of the time and has never been the fastest.
    """
    backends = [
        n for n, b in BACKENDS.items()
        if b.unavailable(x.device) is None and precision in b.precisions(x.device) and not b.on_request
        and (x.is_cuda or n != 'inductor')
    ]
    calibration = [x] if precision == 'int8' else None
    network = deploy(
        create(name, x.device, features), x, precision=precision, backend=backends, calibration=calibration,
        progress=False, seconds=0.3, isolate=False)
    report = network.report
    chosen = dict(
        backend=report.backend, arrangement=report.arrangement, forms=report.forms, difference=max(report.differences))
    return lambda: network(x), chosen


def measure_routes(
        pairs: Sequence[str],
        batches: Sequence[int],
        sizes: Sequence[int],
        settings: Settings,
        compiled: Sequence[str] = (),
) -> List[Dict[str, Any]]:
    """This package's networks, deployed, beside timm's by every road.

    Args:
        pairs: Names of :data:`PAIRS`.
        batches: Images in the input.
        sizes: Sides of the input.
        settings: How to measure.
        compiled: The pairs for which ``torch.compile`` is measured too, which takes the longest.

    Returns:
        A case for each network, size, batch, task and precision.
    """
    cases = []
    tasks = [(p, s, b, f) for p in pairs for s in sizes for b in batches for f in (False, True)]
    for pair, size, batch, features in tasks:
        if features and batch < max(batches):
            continue
        own, other = PAIRS[pair]
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(settings.device)
        calls: Dict[str, Dict[str, Callable[[], Any]]] = {}
        chosen = {}
        for precision in native_precisions(settings.device):
            row: Dict[str, Callable[[], Any]] = {}
            for route, build in routes(settings.device, precision, pair in compiled and not features).items():
                say(f'{other} {size} {batch} {precision} {route}')
                row[f'timm {route}'] = build(create(other, settings.device, features), x, precision)
            if precision in TORCH_TYPES:
                row['ours eager'] = eager_route(create(own, settings.device, features), x, precision)
            say(f'{own} {size} {batch} {precision} deploy')
            row['ours deploy'], chosen[precision] = deployed(own, x, precision, features)
            calls[precision] = row
        times = settings.time({f'{p} {r}': call for p, row in calls.items() for r, call in row.items()})
        cost = count(own, size)
        for precision, row in calls.items():
            cases.append(dict(
                section='routes', task='features' if features else 'forward', pair=pair, name=own, other=other,
                size=size, batch=batch, precision=precision, flops=cost['flops'] * batch, chosen=chosen[precision],
                bytes=_bytes(cost, batch, precision), milliseconds={r: times[f'{precision} {r}'] for r in row}))
            say(json.dumps(cases[-1]['milliseconds']))
    return cases


def _bytes(cost: Dict[str, int], batch: int, precision: str) -> int:
    width = {'float32': 4, 'int8': 1}.get(precision, 2)
    return width * (cost['traffic'] * batch + cost['weights'])


def measure_promise(batch: int, size: int, settings: Settings) -> List[Dict[str, Any]]:
    """Each CSP network and its plain counterpart, both deployed, in every precision."""
    cases = []
    for pair in PROMISES:
        names = PAPER_PAIRS[pair].csp, PAPER_PAIRS[pair].plain
        costs = [count(name, size) for name in names]
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(settings.device)
        for precision in native_precisions(settings.device):
            ready = []
            for name in names:
                say(f'{name} {size} {batch} {precision} deploy')
                ready.append(deployed(name, x, precision))
            times = settings.time({name: call for name, (call, _) in zip(names, ready)})
            cases.append(dict(
                section='promise', task='forward', pair=pair, name=names[0], other=names[1], size=size, batch=batch,
                precision=precision, flops=costs[0]['flops'] * batch, bytes=_bytes(costs[0], batch, precision),
                chosen=ready[0][1], chosen_plain=ready[1][1],
                milliseconds={'csp': times[names[0]], 'plain': times[names[1]]},
                time_ratio=times[names[0]] / times[names[1]],
                operations_ratio=costs[0]['operations'] / costs[1]['operations']))
            say(f'{pair} {precision}: time {cases[-1]["time_ratio"]:.3f}, '
                f'operations {cases[-1]["operations_ratio"]:.3f}')
    return cases


def measure_training(pairs: Sequence[str], batch: int, size: int, settings: Settings) -> List[Dict[str, Any]]:
    """A step of SGD in float32, the memory of one, and the memory with gradient checkpointing."""
    cases = []
    for pair in pairs:
        say(f'{pair} training')
        subjects = {name: Subject(name, size, batch, settings.device) for name in PAIRS[pair]}
        peaks = {name: peak_memory(name, size, batch, settings.device) for name in PAIRS[pair]}
        settings.check()
        times: Dict[str, List[float]] = {name: [] for name in subjects}
        for _ in range(settings.rounds):
            for name, subject in subjects.items():
                times[name].append(subject.milliseconds(subject.train, 1))
        settings.check()
        own, other = PAIRS[pair]
        cases.append(dict(
            section='training', task='training', pair=pair, name=own, other=other, size=size, batch=batch,
            precision='float32', milliseconds={name: statistics.median(row) for name, row in times.items()},
            mib={name: peak['train_mib'] for name, peak in peaks.items()}))
    return cases


def machine_rates(settings: Settings) -> Dict[str, Any]:
    """What the machine reaches: operations per second in a product of matrices, bytes per second in a copy."""
    n = 4096 if settings.device.type == 'cuda' else 2048
    rates = {}
    for precision, dtype in TORCH_TYPES.items():
        if precision not in native_precisions(settings.device):
            continue
        a = torch.randn(n, n, device=settings.device, dtype=dtype)
        milliseconds = settings.time({'product': lambda a=a: a @ a})['product']  # type: ignore[misc]
        rates[precision] = 2 * n ** 3 / milliseconds * 1e3
    a = torch.empty(1 << 26, device=settings.device)  # 256 MiB, more than caches hold
    b = torch.empty_like(a)
    milliseconds = settings.time({'copy': lambda: b.copy_(a)})['copy']
    return dict(operations_per_second=rates, bytes_per_second=2 * a.numel() * 4 / milliseconds * 1e3)


def best_time(case: Dict[str, Any]) -> float:
    """Milliseconds of this package's network in a case."""
    times = case['milliseconds']
    return times.get('ours deploy', times.get('csp', 0.))


def conclusion(report: Dict[str, Any]) -> str:
    """One sentence: in how many of the rows this package's network is ahead, and by how much."""
    ratios = []
    for case in report['cases']:
        others = [v for k, v in case['milliseconds'].items() if k.startswith('timm')]
        if case['section'] in ('routes', 'resolution') and others:
            ratios.append(min(others) / best_time(case))
    if not ratios:
        return 'Nothing was measured beside timm.'
    ahead = sum(ratio > 1 for ratio in ratios)
    return (
        f'deploy is ahead of the best that timm\'s network reaches by any road in {ahead} of {len(ratios)} rows; the '
        f'ratio is {min(ratios):.2f} to {max(ratios):.2f}, {statistics.median(ratios):.2f} in the median.')


def markdown(report: Dict[str, Any]) -> str:
    """The report as tables.

    Args:
        report: What :func:`run` returned.

    Returns:
        Markdown.
    """
    machine, rates = report['machine'], report['rates']
    products = ', '.join(f'{v / 1e12:.2f} TFLOP/s in {k}' for k, v in rates['operations_per_second'].items())
    lines = [
        f'# Speed on {machine["device"]}, {report.get("date", "no date")}', '', f'**{conclusion(report)}**', '',
        'What `benchmarks/speed.py` has written: each network, precision and road, as [Deployment](../../deploy.md) '
        'sums up.', '',
        f'{machine["device"]}, {machine["threads"]} threads, torch {machine["torch"]}, timm {machine["timm"]}'
        f'{"".join(f", {k} {v}" for k, v in machine["libraries"].items())}; medians of {report["rounds"]} '
        'turns, all that stands in one row measured side by side.',
        f'A product of matrices reaches {products}; a copy {rates["bytes_per_second"] / 1e9:.1f} GB/s.', '']
    if report['busy']:
        lines += ['**The machine was busy: these figures mean nothing.**', '']
    cases = report['cases']
    columns = ('eager', 'compile', 'onnxruntime', 'openvino')
    rows = [c for c in cases if c['section'] in ('routes', 'resolution')]
    if rows:
        lines += [
            'Milliseconds for a batch. The ratio is the best of timm\'s network by any road over this package\'s, '
            'deployed; the rate is the fraction of the product\'s.', '',
            '| network | task | pixels | batch | precision | timm eager | compile | ONNX Runtime | OpenVINO '
            '| ours eager | deploy | ratio | rate | difference | chosen |',
            '| --- | --- | ---: | ---: | --- |' + ' ---: |' * 9 + ' --- |']
    for c in rows:
        times = c['milliseconds']
        others = [v for k, v in times.items() if k.startswith('timm')]
        rate = rates['operations_per_second'].get(c['precision'])
        share = c['flops'] / best_time(c) * 1e3 / rate if rate else None
        lines.append(
            f'| `{c["name"]}` | {c["task"]} | {c["size"]} | {c["batch"]} | {c["precision"]} | '
            + ' | '.join(_number(times.get(f'timm {r}')) for r in columns)
            + f' | {_number(times.get("ours eager"))} | **{_number(best_time(c))}** '
            f'| {_number(min(others) / best_time(c) if others else None)} | {_number(share)} '
            f'| {c["chosen"]["difference"]:.0e} | {_chosen(c["chosen"])} |')
    rows = [c for c in cases if c['section'] == 'promise']
    if rows:
        lines += ['', 'The paper\'s networks over the plain ones, both deployed.', '',
                  '| pair | precision | CSP (ms) | plain (ms) | time | operations | chosen |',
                  '| --- | --- | ---: | ---: | ---: | ---: | --- |']
    for c in rows:
        times = c['milliseconds']
        lines.append(
            f'| `{c["name"]}` / `{c["other"]}` | {c["precision"]} | {times["csp"]:.1f} | {times["plain"]:.1f} '
            f'| {c["time_ratio"]:.2f} | {c["operations_ratio"]:.2f} | {_chosen(c["chosen"])} |')
    rows = [c for c in cases if c['section'] == 'throughput']
    if rows:
        lines += ['', '| network | pixels | batch | precision | GFLOP an image | images a second | chosen |',
                  '| --- | ---: | ---: | --- | ---: | ---: | --- |']
    for c in rows:
        lines.append(
            f'| `{c["name"]}` | {c["size"]} | {c["batch"]} | {c["precision"]} | {c["flops"] / c["batch"] / 1e9:.2f} '
            f'| {c["batch"] / best_time(c) * 1e3:.0f} | {_chosen(c["chosen"])} |')
    rows = [c for c in cases if c['section'] == 'training']
    if rows:
        lines += ['', 'A training step in float32: milliseconds, and the memory that it takes at most.', '',
                  '| network | pixels | batch | ours (ms) | timm (ms) | ours (MiB) | timm (MiB) |',
                  '| --- | ---: | ---: | ---: | ---: | ---: | ---: |']
    for c in rows:
        own, other = c['name'], c['other']
        lines.append(
            f'| `{own}` | {c["size"]} | {c["batch"]} | {c["milliseconds"][own]:.0f} | {c["milliseconds"][other]:.0f} '
            f'| {c["mib"][own]:.0f} | {c["mib"][other]:.0f} |')
    return '\n'.join(lines) + '\n'


def _number(value: Optional[float]) -> str:
    return '–' if value is None else f'{value:.2f}' if value < 10 else f'{value:.1f}'


def _chosen(chosen: Dict[str, Any]) -> str:
    return ', '.join([f'{chosen["backend"]} {chosen["arrangement"]}', *chosen['forms']])


def plots(report: Dict[str, Any]) -> Dict[str, Callable[[Path], Any]]:
    """What draws each image, by file name; those for which nothing was measured are left out.

    Args:
        report: What :func:`run` returned.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The plots need matplotlib: pip install matplotlib.') from error
    cases, device = report['cases'], report['machine']['device']

    def save(draw: Callable[[Any], None], path: Path) -> None:
        figure = Figure(figsize=(6.4, 4.4), layout='constrained')
        axes = figure.subplots()
        draw(axes)
        axes.set_title(device, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=130, format='png')

    def throughput(axes: Any) -> None:
        for precision in native_precisions(torch.device(report['machine']['type'])):
            rows = [c for c in cases if c['section'] == 'throughput' and c['precision'] == precision]
            if rows:
                axes.plot([c['flops'] / c['batch'] / 1e9 for c in rows],
                          [c['batch'] / best_time(c) * 1e3 for c in rows], 'o-', label=precision)
            for c in rows if precision == 'float32' else []:
                axes.annotate(c['name'].removeprefix('cspnet_'), (c['flops'] / c['batch'] / 1e9,
                              c['batch'] / best_time(c) * 1e3), fontsize=7, xytext=(3, 3), textcoords='offset points')
        axes.set(xscale='log', yscale='log', xlabel='GFLOP an image', ylabel='images a second')

    def latency(axes: Any) -> None:
        rows = [c for c in cases if c['section'] == 'resolution']
        for precision in dict.fromkeys(c['precision'] for c in rows):
            chosen = [c for c in rows if c['precision'] == precision]
            for route in chosen[0]['milliseconds']:
                axes.plot([c['size'] for c in chosen], [c['milliseconds'][route] for c in chosen],
                          'o-' if route == 'ours deploy' else 'x--', label=f'{route} {precision}')
        axes.set(yscale='log', xlabel=f'pixels ({rows[0]["name"]}, one image)', ylabel='milliseconds')

    def roofline(axes: Any) -> None:
        rates = report['rates']
        grid = [2 ** (i / 4) for i in range(0, 48)]
        for color, (precision, rate) in zip(('tab:blue', 'tab:orange', 'tab:green'),
                                            rates['operations_per_second'].items()):
            roof = [min(rate, rates['bytes_per_second'] * i) / 1e9 for i in grid]
            axes.plot(grid, roof, color=color, label=f'{precision} roof')
            rows = [c for c in cases if c['precision'] == precision and 'bytes' in c and c['section'] != 'resolution']
            axes.plot([c['flops'] / c['bytes'] for c in rows], [c['flops'] / best_time(c) / 1e6 for c in rows], '.',
                      color=color, label=f'{precision} deployed')
        axes.set(xscale='log', yscale='log', xlabel='operations per byte of maps and weights', ylabel='GFLOP/s')

    wanted = {'speed_throughput.png': ('throughput', throughput), 'speed_latency.png': ('resolution', latency)}
    found = {name: draw for name, (section, draw) in wanted.items() if any(c['section'] == section for c in cases)}
    if any(c['section'] in ('routes', 'promise', 'throughput') for c in cases):
        found['speed_roofline.png'] = roofline
    return {name: lambda path, draw=draw: save(draw, path) for name, draw in found.items()}  # type: ignore[misc]


def measure_resolution(name: str, sizes: Sequence[int], settings: Settings) -> List[Dict[str, Any]]:
    """One image of several sizes, in the exact and in the narrowest floating point."""
    own, other = PAIRS[name]
    precisions = [p for p in native_precisions(settings.device) if p in TORCH_TYPES]
    cases = []
    for size in sizes:
        x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(settings.device)
        for precision in dict.fromkeys((precisions[0], precisions[-1])):
            say(f'{own} {size} 1 {precision}')
            calls = {
                f'timm {route}': build(create(other, settings.device), x, precision)
                for route, build in routes(settings.device, precision, compiled=False).items()
            }
            calls['ours deploy'], chosen = deployed(own, x, precision)
            cost = count(own, size)
            cases.append(dict(
                section='resolution', task='forward', pair=name, name=own, other=other, size=size, batch=1,
                precision=precision, flops=cost['flops'], bytes=_bytes(cost, 1, precision), chosen=chosen,
                milliseconds=settings.time(calls)))
    return cases


def measure_throughput(names: Sequence[str], batch: int, size: int, settings: Settings) -> List[Dict[str, Any]]:
    """Networks from small to large, deployed."""
    cases = []
    for name in names:
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(settings.device)
        cost = count(name, size)
        ready = {}
        for precision in native_precisions(settings.device):
            say(f'{name} {size} {batch} {precision} deploy')
            ready[precision] = deployed(name, x, precision)
        times = settings.time({precision: call for precision, (call, _) in ready.items()})
        cases += [dict(
            section='throughput', task='forward', name=name, size=size, batch=batch, precision=precision,
            flops=cost['flops'] * batch, bytes=_bytes(cost, batch, precision), chosen=chosen,
            milliseconds={'ours deploy': times[precision]}) for precision, (_, chosen) in ready.items()]
    return cases


def machine_of(device: torch.device) -> Dict[str, Any]:
    """The machine and the versions of what runs on it."""
    libraries = {}
    for name in ('openvino', 'onnxruntime', 'triton'):
        with contextlib.suppress(PackageNotFoundError):
            libraries[name] = version(name)
    return dict(describe(device), type=device.type, timm=timm.__version__, cspnet_timm=cspnet_timm.__version__,
                libraries=libraries)


def run(args: argparse.Namespace) -> Iterator[Dict[str, Any]]:
    """Measure the sections that are asked for.

    Args:
        args: The command line's.

    Yields:
        The report, after each section.

    Raises:
        SystemExit: If the machine is busy.
    """
    settings = Settings(torch.device(args.device), args.seconds, args.rounds, args.allow_busy)
    settings.check()
    rates = machine_rates(settings)
    machine = machine_of(settings.device)
    batch, size = args.batches[-1], args.sizes[0]
    sections: Dict[str, Callable[[], List[Dict[str, Any]]]] = {
        'routes': lambda: measure_routes(args.pairs, args.batches, args.sizes, settings, args.compile),
        'promise': lambda: measure_promise(batch, size, settings),
        'resolution': lambda: measure_resolution(args.pairs[0], args.resolutions, settings),
        'throughput': lambda: measure_throughput(args.own, batch, size, settings),
        'training': lambda: measure_training(args.pairs, batch, size, settings),
    }
    cases: List[Dict[str, Any]] = []
    for name in (s for s in SECTIONS if s in args.sections):
        cases += sections[name]()
        yield dict(machine=machine, date=time.strftime('%Y-%m-%d'), rates=rates, rounds=args.rounds,
                   busy=settings.was_busy, cases=cases)


def joined(report: Dict[str, Any], path: Path) -> Dict[str, Any]:
    """A report with the cases of an earlier one that it has not measured again.

    Args:
        report: The new one.
        path: The earlier one's ``speed.json``; nothing happens if there is none.

    Returns:
        A report of both.

    Raises:
        SystemExit: If the earlier one is of another machine, or of other versions.
    """
    if not path.exists():
        return report
    earlier = json.loads(path.read_text())
    if earlier['machine'] != report['machine']:
        raise SystemExit(f'{path} is of another machine or of other versions: give another --out, or leave out --keep.')
    measured = {_key(case) for case in report['cases']}
    cases = [case for case in earlier['cases'] if _key(case) not in measured] + report['cases']
    order = {_key(case): i for i, case in enumerate(earlier['cases'])}
    cases.sort(key=lambda case: (SECTIONS.index(case['section']), order.get(_key(case), len(order))))
    return dict(report, busy=report['busy'] or earlier['busy'], cases=cases)


def _key(case: Dict[str, Any]) -> Tuple[Any, ...]:
    return tuple(case[k] for k in ('section', 'task', 'name', 'size', 'batch', 'precision'))


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description='Speed of deployed networks beside every other road.')
    parser.add_argument('--sections', nargs='+', choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument('--pairs', nargs='+', choices=list(PAIRS), default=list(PAIRS), metavar='NAME',
                        help=f'which of {", ".join(PAIRS)} (all)')
    parser.add_argument('--own', nargs='+', default=list(OWN), metavar='MODEL', help='networks of the throughput')
    parser.add_argument('--batches', nargs='+', type=int, default=[1, 8], metavar='N', help='(1 8)')
    parser.add_argument('--sizes', nargs='+', type=int, default=[256], metavar='PIXELS', help='(256)')
    parser.add_argument('--resolutions', nargs='+', type=int, default=list(SIZES), metavar='PIXELS',
                        help=f'of the latency ({" ".join(map(str, SIZES))})')
    parser.add_argument('--compile', nargs='*', choices=list(PAIRS), default=list(PAIRS), metavar='NAME',
                        help='of which pairs torch.compile is measured too, which takes the longest (all)')
    parser.add_argument('--seconds', type=float, default=2., help='about how long each is measured')
    parser.add_argument('--rounds', type=int, default=7, help='turns of each')
    parser.add_argument('--threads', type=int, help='threads that compute (as many as cores)')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--allow-busy', action='store_true', help='report on a busy machine, and say so in the report')
    parser.add_argument('--keep', action='store_true',
                        help='keep what --out holds of this machine, but for what is measured again')
    parser.add_argument('--out', type=Path, default=Path('results'), help='folder for the results')
    args = parser.parse_args(argv)
    for name in ('batches', 'sizes', 'resolutions', 'rounds', 'threads'):
        values = getattr(args, name)
        if values is not None and min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f'--{name} {values} must be at least 1')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: there is no CUDA device here')
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.keep:  # found out before anything is measured
        joined(dict(machine=machine_of(torch.device(args.device)), busy=False, cases=[]), args.out / 'speed.json')
    for measured in run(args):  # written after each section, so that what is measured is not lost
        report = joined(measured, args.out / 'speed.json') if args.keep else measured
        files = write_files({
            'speed.json': lambda path, report=report: path.write_text(json.dumps(report, indent=1) + '\n'),
            'speed.md': lambda path, report=report: path.write_text(markdown(report)),
            **plots(report),
        }, args.out)
    print(markdown(report))
    print('Wrote', ', '.join(map(str, files)))


if __name__ == '__main__':
    main()
