"""The paper's claim, measured: each CSP network beside its plain counterpart.

    python benchmarks/paper.py --device cuda --batch-size 32 --out results

Counted: parameters and operations as the README of the paper's repository counts them (weights of convolutions and
classifier; two operations per multiplication) and as PyTorch does (every parameter; ``FlopCounterMode``), and the
activation traffic (elements that every convolution, pool and classifier reads and writes). Measured, all networks in
turn in each repeat of one run, medians: a forward pass, a training step, and the memory that each takes at most.

Writes ``paper.json``, ``paper.md`` and ``paper.png`` (the plot needs ``pip install '.[bench]'``).
"""
import argparse
import json
import multiprocessing
import platform
import re
import resource
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from torch.utils.flop_counter import FlopCounterMode

import cspnet_timm
from cspnet_timm.deployment.machine import elapsed
from cspnet_timm.files import replaced_file


@dataclass(frozen=True)
class Pair:
    """A CSP network, what it is compared with, and the resolution of their cfgs."""

    csp: str
    plain: str
    size: int = 256


PAIRS = {
    'resnet50': Pair('cspnet_resnet50', 'cspnet_plain_resnet50'),
    'resnet50_elastic': Pair('cspnet_resnet50_elastic', 'cspnet_plain_resnet50'),
    'resnext50': Pair('cspnet_resnext50', 'cspnet_plain_resnext50'),
    'resnext50_elastic': Pair('cspnet_resnext50_elastic', 'cspnet_plain_resnext50'),
    'darknet53': Pair('cspnet_darknet53', 'cspnet_plain_darknet53'),
    'darknet53_elastic': Pair('cspnet_darknet53_elastic', 'cspnet_plain_darknet53'),
    'mobilenetv2': Pair('cspnet_mobilenetv2', 'cspnet_plain_mobilenetv2', 224),
    # After the paper's text: their CSP forms are not those that the paper reports on. timm's DenseNet normalises and
    # activates before it convolves, and is otherwise the plain one.
    'peleenet': Pair('cspnet_peleenet', 'cspnet_plain_peleenet', 224),
    'densenet121': Pair('cspnet_densenet121', 'densenet121', 224),
    'densenet169': Pair('cspnet_densenet169', 'densenet169', 224),
    'densenet201': Pair('cspnet_densenet201', 'densenet201', 224),
}
COUNTS = ('weights', 'params', 'operations', 'flops', 'traffic')
MEASURES = ('forward_ms', 'train_ms', 'forward_mib', 'train_mib')


def count(name: str, size: int) -> Dict[str, int]:
    """Count what one image costs, without computing it.

    Args:
        name: The model.
        size: Side of the image.

    Returns:
        ``weights`` and ``operations`` as the paper's repository counts them, ``params`` and ``flops`` as PyTorch does,
        and the activation ``traffic`` in elements.
    """
    model = timm.create_model(name, device='meta').eval()
    counts = dict(
        weights=sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))),
        params=sum(p.numel() for p in model.parameters()),
        operations=0, flops=0, traffic=0,
    )

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        counts['traffic'] += inputs[0].numel() + output.numel()
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight: Any = module.weight
            counts['operations'] += 2 * output.numel() * weight[0].numel()

    layers = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, SelectAdaptivePool2d)
    for module in model.modules():
        if isinstance(module, layers):
            module.register_forward_hook(hook)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device='meta'))
    counts['flops'] = counter.get_total_flops()
    return counts


class Subject:
    """A network with what it needs to be measured: an input, targets and an optimiser."""

    def __init__(self, name: str, size: int, batch_size: int, device: torch.device) -> None:
        """
        Args:
            name: The model.
            size: Side of the input.
            batch_size: Images in the input.
            device: Where to measure.
        """
        self.device = device
        torch.manual_seed(0)
        self.model = timm.create_model(name).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.x = torch.randn(batch_size, 3, size, size, device=device)
        self.target = torch.zeros(batch_size, dtype=torch.long, device=device)

    def forward(self) -> None:
        """Classify."""
        self.model.eval()
        with torch.inference_mode():
            self.model(self.x)

    def train(self) -> None:
        """Take one step of SGD."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.model(self.x), self.target).backward()
        self.optimizer.step()

    def milliseconds(self, step: Callable[[], None], iterations: int) -> float:
        """Time a step, behind one that is not timed.

        Args:
            step: :meth:`forward` or :meth:`train`.
            iterations: How often, for the mean.

        Returns:
            Milliseconds of one.
        """
        elapsed(step, 1, self.device)
        milliseconds = elapsed(step, iterations, self.device) / iterations
        self.optimizer.zero_grad(set_to_none=True)  # the other networks' turns shall have the memory
        return milliseconds


def _most_resident() -> int:
    """Bytes that this process has held at most."""
    try:  # getrusage tells of what the process that started this one held, where that is more
        status = Path('/proc/self/status').read_text()
        return int(re.search(r'VmHWM:\s*(\d+) kB', status)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def _peak_cpu(name: str, size: int, batch_size: int, queue: Any) -> None:
    # Runs in a process of its own: what a process has taken at most cannot be reset.
    torch.set_num_threads(1)
    before = _most_resident()
    subject = Subject(name, size, batch_size, torch.device('cpu'))
    peaks = []
    for step in (subject.forward, subject.train):
        step()
        peaks.append((_most_resident() - before) / 2 ** 20)
    queue.put(peaks)


def peak_memory(name: str, size: int, batch_size: int, device: torch.device) -> Dict[str, float]:
    """Measure the memory that a forward pass and a training step take at most, weights and optimiser included.

    Args:
        name: The model.
        size: Side of the input.
        batch_size: Images in the input.
        device: Where to measure. On a CPU it is the resident memory of a process of its own, beyond what the imports
            have taken.

    Returns:
        MiB by ``forward_mib`` and ``train_mib``.
    """
    if device.type != 'cuda':
        context = multiprocessing.get_context('spawn')
        queue = context.Queue()
        process = context.Process(target=_peak_cpu, args=(name, size, batch_size, queue))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f'Measuring the memory of {name} failed with exit code {process.exitcode}.')
        forward, train = queue.get()
        return dict(forward_mib=forward, train_mib=train)
    subject = Subject(name, size, batch_size, device)
    peaks = {}
    for key, step in (('forward_mib', subject.forward), ('train_mib', subject.train)):
        step()  # the optimiser's state and cuDNN's choice
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        peaks[key] = torch.cuda.max_memory_allocated(device) / 2 ** 20
    return peaks


def measure(
        sizes: Dict[str, int],
        batch_size: int,
        repeats: int,
        iterations: int,
        device: torch.device,
) -> Dict[str, Dict[str, float]]:
    """Measure networks in turn, so that whatever slows the machine down slows all of them.

    Args:
        sizes: Side of the input by model.
        batch_size: Images in the input.
        repeats: Times that every network has its turn.
        iterations: Steps of a turn.
        device: Where to measure.

    Returns:
        The :data:`MEASURES` by model, medians of the repeats.
    """
    peaks = {name: peak_memory(name, size, batch_size, device) for name, size in sizes.items()}
    subjects = {name: Subject(name, size, batch_size, device) for name, size in sizes.items()}
    times: Dict[str, Dict[str, List[float]]] = {name: dict(forward_ms=[], train_ms=[]) for name in sizes}
    for _ in range(repeats):
        for name, subject in subjects.items():
            times[name]['forward_ms'].append(subject.milliseconds(subject.forward, iterations))
            times[name]['train_ms'].append(subject.milliseconds(subject.train, iterations))
    return {
        name: {**{key: statistics.median(values) for key, values in times[name].items()}, **peaks[name]}
        for name in sizes
    }


def compare(
        pairs: Sequence[str],
        size: Optional[int] = None,
        batch_size: int = 8,
        repeats: int = 5,
        iterations: int = 3,
        device: str = 'cpu',
) -> Dict[str, Any]:
    """Count and measure pairs of networks.

    Args:
        pairs: Names of :data:`PAIRS`.
        size: Side of the input, that of the cfgs if None.
        batch_size: Images in the input of what is measured.
        repeats: Times that every network has its turn.
        iterations: Steps of a turn.
        device: Where to measure.

    Returns:
        What was measured where (``environment``), and by pair the figures of both networks and their ``ratio``.
    """
    target = torch.device(device)
    sizes = {
        name: size or PAIRS[pair].size for pair in pairs for name in (PAIRS[pair].plain, PAIRS[pair].csp)}
    counts = {name: count(name, side) for name, side in sizes.items()}
    measures = measure(sizes, batch_size, repeats, iterations, target)
    results: Dict[str, Any] = {}
    for pair in pairs:
        figures = {
            role: dict(name=name, size=sizes[name], **counts[name], **measures[name])
            for role, name in (('plain', PAIRS[pair].plain), ('csp', PAIRS[pair].csp))
        }
        ratio = {key: figures['csp'][key] / figures['plain'][key] for key in COUNTS + MEASURES}
        results[pair] = dict(**figures, ratio=ratio)
    is_cuda = target.type == 'cuda'
    environment = dict(
        device=torch.cuda.get_device_name(target) if is_cuda else platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__, timm=timm.__version__, cspnet_timm=cspnet_timm.__version__,
        batch_size=batch_size, repeats=repeats, iterations=iterations, dtype='float32',
        tf32=is_cuda and torch.backends.cudnn.allow_tf32,
    )
    return dict(environment=environment, pairs=results)


def markdown(report: Dict[str, Any]) -> str:
    """The report as a table.

    Args:
        report: What :func:`compare` returned.

    Returns:
        Markdown.
    """
    env = report['environment']
    lines = [
        f'{env["device"]}, {env["threads"]} threads, torch {env["torch"]}, batch of {env["batch_size"]}, '
        f'{env["dtype"]}{", TF32 convolutions" if env["tf32"] else ""}; medians of {env["repeats"]} repeats.',
        '',
        '| network | pixels | weights (M) | parameters (M) | operations (G) | FLOPs (G) | traffic (M) | forward (ms) '
        '| training step (ms) | forward (MiB) | training (MiB) |',
        '| --- |' + ' ---: |' * 10,
    ]
    for result in report['pairs'].values():
        for role in ('plain', 'csp'):
            f = result[role]
            lines.append(
                f'| `{f["name"]}` | {f["size"]} | {f["weights"] / 1e6:.2f} | {f["params"] / 1e6:.2f} '
                f'| {f["operations"] / 1e9:.3f} | {f["flops"] / 1e9:.3f} | {f["traffic"] / 1e6:.1f} '
                f'| {f["forward_ms"]:.1f} | {f["train_ms"]:.1f} | {f["forward_mib"]:.0f} | {f["train_mib"]:.0f} |'
            )
        lines.append('| ratio | | ' + ' | '.join(f'{result["ratio"][key]:.2f}' for key in COUNTS + MEASURES) + ' |')
    return '\n'.join(lines) + '\n'


def plot(report: Dict[str, Any], path: Path) -> None:
    """Draw what each CSP network takes of its plain counterpart's work, time and memory.

    Args:
        report: What :func:`compare` returned.
        path: The image.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The plot needs matplotlib: pip install matplotlib.') from error
    series = dict(operations='operations', traffic='activation traffic', forward_ms='forward pass',
                  train_ms='training step', train_mib='training memory')
    figure = Figure(figsize=(3.5 + 0.9 * len(report['pairs']), 4.5), layout='constrained')
    axes = figure.subplots()
    width = 0.8 / len(series)
    for i, (key, label) in enumerate(series.items()):
        axes.bar(
            [j + (i - (len(series) - 1) / 2) * width for j in range(len(report['pairs']))],
            [result['ratio'][key] for result in report['pairs'].values()],
            width, label=label,
        )
    axes.axhline(1., color='black', linewidth=0.8)
    axes.set_xticks(range(len(report['pairs'])), list(report['pairs']), rotation=20, ha='right')
    axes.set_ylabel('CSP network / plain network')
    axes.set_title(f'{report["environment"]["device"]}, batch of {report["environment"]["batch_size"]}', fontsize=9)
    figure.legend(fontsize=8, ncols=3, loc='outside lower center')
    figure.savefig(path, dpi=150, format=path.suffix.lstrip('.'))


def write_files(writers: Dict[str, Callable[[Path], Any]], folder: Path) -> List[Path]:
    """Write files, each whole or not at all.

    Args:
        writers: By file name, what writes the file at a path.
        folder: Where to; it is created.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, writer in writers.items():
        with replaced_file(folder / name) as temporary:
            writer(temporary)
    return [folder / name for name in writers]


def write(report: Dict[str, Any], folder: Path) -> List[Path]:
    """Write the report's three files.

    Args:
        report: What :func:`compare` returned.
        folder: Where to; it is created.

    Returns:
        The files.
    """
    return write_files({
        'paper.json': lambda path: path.write_text(json.dumps(report, indent=2) + '\n'),
        'paper.md': lambda path: path.write_text(markdown(report)),
        'paper.png': lambda path: plot(report, path),
    }, folder)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description='CSP networks beside their plain counterparts.')
    parser.add_argument('--networks', nargs='+', choices=list(PAIRS), default=list(PAIRS), metavar='NAME',
                        help=f'which of {", ".join(PAIRS)} (all)')
    parser.add_argument('--size', type=int, help='side of the input (256 or 224, as in the cfgs)')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--repeats', type=int, default=5, help='times that every network has its turn')
    parser.add_argument('--iterations', type=int, default=3, help='steps of a turn')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--out', type=Path, default=Path('results'), help='folder for the results')
    args = parser.parse_args(argv)
    for name in ('size', 'batch_size', 'repeats', 'iterations'):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f'--{name.replace("_", "-")} {value} must be at least 1')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: there is no CUDA device here')
    report = compare(
        args.networks, size=args.size, batch_size=args.batch_size, repeats=args.repeats,
        iterations=args.iterations, device=args.device,
    )
    files = write(report, args.out)
    print(markdown(report))
    print('Wrote', ', '.join(map(str, files)))


if __name__ == '__main__':
    main()
