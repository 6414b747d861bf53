"""What the minutes of a GPU are for: the tests, this package beside timm by every road, the paper's pairs, training.

    python benchmarks/gpu_check.py --out gpu              # on a GPU, under ten minutes
    python benchmarks/gpu_check.py --small --out small    # every step in a small form, also on a CPU

Each step is a process of its own with a time limit and Python's fault handler, so that what dies or hangs costs one
step; what it prints goes to ``logs/``. What was measured is written after every figure to ``gpu_check.json`` and
``gpu_check.md``. Networks are compiled in parallel first, with one cache, and timed afterwards, one at a time.
"""
import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from paper import PAIRS as PAPER_PAIRS
from paper import count, write_files
from speed import PAIRS, PROMISES, create
from timm.models import reparameterize_model

from cspnet_timm import deploy
from cspnet_timm.deployment import search
from cspnet_timm.deployment.machine import describe, elapsed, native_precisions

HERE = Path(__file__).resolve()
FORMS = ('as_is', 'space_to_depth', 'space_to_depth+join_partitions')
REPEATS = 40  # timings of each, of which the median counts


class Settings:
    """What is measured, and how: in full, or in a form that only shows that it works."""

    def __init__(self, small: bool) -> None:
        """
        Args:
            small: Small networks and images, and no code is generated.
        """
        self.small = small
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.precision = 'bfloat16' if 'bfloat16' in native_precisions(self.device) else 'float32'
        self.dtype = {'bfloat16': torch.bfloat16, 'float32': torch.float32}[self.precision]
        self.compiler = 'aot_eager' if small else 'inductor'
        self.backends = ('eager',) if small else 'auto'
        self.size = 64 if small else 256
        self.batches = (2,) if small else (1, 64)
        self.networks = (('cspnet_nano', 'cs3darknet_focus_s'),) if small else tuple(PAIRS.values())
        self.promises = (('cspnet_mobilenetv2', 'cspnet_plain_mobilenetv2'),) if small else tuple(
            (PAPER_PAIRS[name].csp, PAPER_PAIRS[name].plain) for name in PROMISES)
        self.forms = FORMS[::2] if small else FORMS
        self.repeats = 3 if small else REPEATS
        self.product = 512 if small else 8192
        self.copy = 1 << (20 if small else 30)


def median(call: Callable[[], Any], settings: Settings) -> float:
    """Median milliseconds of a call, on a GPU by its own events."""
    for _ in range(3):
        call()
    return statistics.median(elapsed(call, 1, settings.device) for _ in range(settings.repeats))


# Steps: each gives its results one by one, a dictionary each.


def ceilings(settings: Settings) -> Any:
    """What the device can do at most."""
    n = settings.product
    a, b = (torch.randn(n, n, device=settings.device, dtype=settings.dtype) for _ in range(2))
    yield dict(step='ceiling', what='product, TFLOP/s', value=2 * n ** 3 / median(lambda: a @ b, settings) / 1e9)
    x = torch.empty(settings.copy, dtype=torch.uint8, device=settings.device)
    y = torch.empty_like(x)
    yield dict(step='ceiling', what='copy, TB/s', value=2 * len(x) / median(lambda: y.copy_(x), settings) / 1e9)


def forward(settings: Settings, own: str, theirs: str, batch: int, warm: bool = False) -> Any:
    """A network by every road; to ``warm`` is to compile, into the cache."""
    x = torch.randn(batch, 3, settings.size, settings.size, device=settings.device)
    half = x.to(settings.dtype, memory_format=torch.channels_last)

    def plain(name: str) -> Callable[[torch.Tensor], Any]:
        return create(name, settings.device).to(settings.dtype, memory_format=torch.channels_last)

    def compiled(name: str) -> Callable[[torch.Tensor], Any]:
        torch._dynamo.reset()
        return torch.compile(plain(name), backend=settings.compiler)

    roads: Dict[str, Tuple[Callable[[str], Callable[[torch.Tensor], Any]], str]] = {
        'timm compile': (compiled, theirs), 'ours compile': (compiled, own)}
    if not warm:
        roads = {'timm eager': (plain, theirs), 'ours eager': (plain, own), **roads}
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        for road, (make, name) in roads.items():
            network = make(name)
            network(half)
            if not warm:
                yield dict(step='forward', network=own, batch=batch, road=road,
                           value=median(lambda: network(half), settings))  # noqa: B023  (called at once)
    for path in [] if warm else sorted(Path('networks').glob(f'{own}.{batch}.*')):
        fast = deploy.load(path, allow_code=True)
        yield dict(step='forward', network=own, batch=batch, value=median(lambda f=fast: f(x), settings),
                   road=f'deployed {path.name.split(".")[2]}', difference=max(fast.report.differences))


def deployed(settings: Settings, own: str, batch: int, forms: str) -> Any:
    """Deploy a form of a network and save it, beside others that do the same; it is timed afterwards, by itself."""
    x = torch.randn(batch, 3, settings.size, settings.size, device=settings.device)
    network = reparameterize_model(create(own, settings.device))
    for form in forms.split('+'):
        network = (search.FORMS[form](network) if form != 'as_is' else None) or network
    search.FORMS.clear()
    fast = deploy(network, x, precision=settings.precision, seconds=0.05, limit=200, progress=False,
                  backend='eager' if settings.small else 'inductor')
    Path('networks').mkdir(exist_ok=True)
    fast.save(f'networks/{own}.{batch}.{forms}.deployed')
    yield dict(step='deployed', network=own, batch=batch, road=forms, value=max(*fast.report.differences, 1e-30))


def default(settings: Settings, own: str, batch: int) -> Any:
    """The call as a user makes it."""
    x = torch.randn(batch, 3, settings.size, settings.size, device=settings.device)
    start = time.monotonic()
    fast = deploy(create(own, settings.device), x, backend=settings.backends, precision=settings.precision, seconds=0.2)
    seconds = time.monotonic() - start
    yield dict(step='forward', network=own, batch=batch, road='deploy()', value=median(lambda: fast(x), settings),
               seconds=seconds, report=str(fast.report))


def promise(settings: Settings, csp: str, plain: str) -> Any:
    """The paper's network over the plain one, both deployed, beside the ratio of their operations."""
    batch = settings.batches[-1]
    x = torch.randn(batch, 3, settings.size, settings.size, device=settings.device)
    times = []
    for name in (csp, plain):
        ready = [deploy.load(path, allow_code=True) for path in Path('networks').glob(f'{name}.{batch}.*')]
        if not ready:
            raise FileNotFoundError(f'{name} at batch {batch} was not deployed.')
        times.append(min(median(lambda f=fast: f(x), settings) for fast in ready))
    operations = [count(name, settings.size)['operations'] for name in (csp, plain)]
    yield dict(step='promise', network=csp, batch=batch, value=times[0] / times[1],
               milliseconds=times, operations=operations[0] / operations[1])


def training(settings: Settings, own: str, theirs: str) -> Any:
    """A step of training under autocast, eager and compiled."""
    batch = settings.batches[-1]
    x = torch.randn(batch, 3, settings.size, settings.size, device=settings.device)
    x = x.contiguous(memory_format=torch.channels_last)
    target = torch.randint(1000, (batch,), device=settings.device)
    for compile_it in (False, True):
        for whose, name in (('timm', theirs), ('ours', own)):
            torch._dynamo.reset()
            model = create(name, settings.device).train().to(memory_format=torch.channels_last)
            run = torch.compile(model, backend=settings.compiler) if compile_it else model
            optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

            def step() -> None:
                with torch.autocast(settings.device.type, torch.bfloat16):
                    loss = F.cross_entropy(run(x).float(), target)  # noqa: B023  (called at once)
                optimizer.zero_grad()  # noqa: B023
                loss.backward()
                optimizer.step()  # noqa: B023

            yield dict(step='training', network=own, batch=batch,
                       road=f'{whose} {"compile" if compile_it else "eager"}', value=median(step, settings))


STEPS: Dict[str, Callable[..., Any]] = dict(
    ceilings=ceilings, forward=forward, deployed=deployed, default=default, promise=promise, training=training)


class Run:
    """All steps, what came of them, and the time that is left."""

    def __init__(self, settings: Settings, out: Path, minutes: float) -> None:
        """
        Args:
            settings: What is measured.
            out: Where the results go.
            minutes: After which nothing more is started.
        """
        self.settings = settings
        self.out = out
        self.end = time.monotonic() + 60 * minutes
        self.results: List[Dict[str, Any]] = []
        self.faults: List[Dict[str, str]] = []
        self.lock = threading.Lock()
        (out / 'logs').mkdir(parents=True, exist_ok=True)

    def process(self, title: str, command: Sequence[str], limit: float) -> Optional[str]:
        """Run a command up to a limit; what it wrote lies in a log. Returns what went wrong."""
        limit = min(limit, self.end - time.monotonic())
        if limit < 5:
            return 'not started: no time is left'
        log = self.out / 'logs' / f'{title}.txt'
        environment = {**os.environ, 'TORCHINDUCTOR_CACHE_DIR': str(self.out.resolve() / 'cache')}
        with log.open('w') as file:
            started = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
            try:
                code = started.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
                return f'ended after {limit:.0f} s'
        if not code:
            return None
        last = (log.read_text(errors='replace').strip().splitlines() or [''])[-1][:200]
        return f'{signal.Signals(-code).name if code < 0 else f"exit code {code}"}: {last}'

    def step(self, name: str, limit: float, **arguments: Any) -> None:
        """A step in a process of its own."""
        title = '_'.join([name, *(str(v) for v in arguments.values())])
        results = self.out / 'logs' / f'{title}.jsonl'
        results.unlink(missing_ok=True)
        command = [sys.executable, '-X', 'faulthandler', str(HERE), '--step', name, '--arguments',
                   json.dumps(arguments), '--out', str(results), *(['--small'] if self.settings.small else [])]
        fault = self.process(title, command, limit)
        if fault is not None:
            self.faults.append(dict(step=title, fault=fault))
        with self.lock:
            if results.exists():
                self.results += [json.loads(line) for line in results.read_text().splitlines()]
            self.write()
        print(f'{title}: {fault or "done"}, {max(self.end - time.monotonic(), 0):.0f} s left', flush=True)

    def tests(self) -> None:
        """The tests that need a GPU; on a CPU they say that there is none."""
        tests = HERE.parents[1] / 'tests' / 'test_deploy.py'
        if not tests.exists():
            return
        fault = self.process('tests', [
            sys.executable, '-X', 'faulthandler', '-m', 'pytest', '-n', '0', '-q', '-m', '', '-k', 'test_gpu',
            '-p', 'no:cacheprovider', str(tests)], 240)
        log = (self.out / 'logs' / 'tests.txt').read_text().strip().splitlines()
        self.results.append(dict(step='tests', road=log[-1].strip('= ') if log else '', value=float(fault is None)))
        if fault is not None:
            self.faults.append(dict(step='tests', fault=fault))
        self.write()
        print(f'tests: {self.results[-1]["road"]}', flush=True)

    def all(self) -> None:
        """Everything, what matters most first."""
        s = self.settings
        cases = [(own, theirs, batch) for batch in reversed(s.batches) for own, theirs in s.networks]
        self.step('ceilings', 60)
        jobs: List[Tuple[str, Dict[str, Any]]] = [
            ('deployed', dict(own=own, batch=batch, forms=forms)) for own, _, batch in cases for forms in s.forms]
        jobs += [('deployed', dict(own=name, batch=s.batches[-1], forms='as_is'))
                 for pair in s.promises for name in pair]
        jobs = list({json.dumps(job): job for job in jobs}.values())
        if not s.small:
            jobs += [('forward', dict(own=own, theirs=theirs, batch=batch, warm=True)) for own, theirs, batch in cases]
        workers = 1 if s.small else max(min((os.cpu_count() or 2) // 2, 8), 1)
        with ThreadPoolExecutor(workers) as pool:  # compiles, into files and the cache
            list(pool.map(lambda job: self.step(job[0], 200, **job[1]), jobs))
        for own, theirs, batch in cases:
            self.step('forward', 90, own=own, theirs=theirs, batch=batch)
        for csp, plain in s.promises:
            self.step('promise', 60, csp=csp, plain=plain)
        self.step('training', 120, own=s.networks[0][0], theirs=s.networks[0][1])
        self.step('default', 200, own=s.networks[0][0], batch=s.batches[-1])
        self.tests()

    def write(self) -> None:
        """Write what there is."""
        report = dict(machine=describe(self.settings.device), small=self.settings.small,
                      precision=self.settings.precision, size=self.settings.size,
                      date=time.strftime('%Y-%m-%d'), results=self.results, faults=self.faults)
        write_files({
            'gpu_check.json': lambda path: path.write_text(json.dumps(report, indent=1)),
            'gpu_check.md': lambda path: path.write_text('\n'.join(table(report)) + '\n'),
        }, self.out)


def table(report: Dict[str, Any]) -> List[str]:
    """The results as Markdown."""
    lines = [f'# {report["machine"]["device"]}, {report["date"]}', '',
             f'{report["precision"]}, {report["size"]} × {report["size"]}, torch {report["machine"]["torch"]}'
             + ('; a small form that shows that the script works, and no more' if report['small'] else ''), '']
    of = {step: [r for r in report['results'] if r['step'] == step]
          for step in ('ceiling', 'forward', 'training', 'promise', 'tests')}
    lines += [f'- {r["what"]}: {r["value"]:.3g}' for r in of['ceiling']]
    for step in ('forward', 'training'):
        roads = list(dict.fromkeys(r['road'] for r in of[step]))
        rows: Dict[Tuple[str, int], Dict[str, Dict[str, Any]]] = {}
        for r in of[step]:
            rows.setdefault((r['network'], r['batch']), {})[r['road']] = r
        if rows:
            lines += ['', f'{step.capitalize()}, milliseconds:', '', f'| network | batch | {" | ".join(roads)} |',
                      '| --- | ---: |' + ' ---: |' * len(roads)]
        for (network, batch), cells in rows.items():
            figures = ' | '.join(f'{cells[road]["value"]:.2f}' if road in cells else '–' for road in roads)
            lines.append(f'| `{network}` | {batch} | {figures} |')
    if of['promise']:
        lines += ['', 'The paper\'s networks over the plain ones, deployed:', '', '| network | time | operations |',
                  '| --- | ---: | ---: |']
        lines += [f'| `{r["network"]}` | {r["value"]:.2f} | {r["operations"]:.2f} |' for r in of['promise']]
    lines += ['', *(f'- tests: {r["road"]}' for r in of['tests'])]
    lines += [f'- **{f["step"]}**: {f["fault"]}' for f in report['faults']]
    return lines


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Run everything, or one step."""
    parser = argparse.ArgumentParser(description='Everything that needs a GPU, in under ten minutes.')
    parser.add_argument('--out', type=Path, required=True, help='folder for the results')
    parser.add_argument('--small', action='store_true', help='small networks and images, for a CPU')
    parser.add_argument('--minutes', type=float, default=9.5, help='start nothing after so many')
    parser.add_argument('--step', choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument('--arguments', type=json.loads, default={}, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    settings = Settings(args.small)
    if args.step is None:
        if settings.device.type != 'cuda' and not args.small:
            parser.error('there is no GPU; --small shows on a CPU that everything works')
        Run(settings, args.out, args.minutes).all()
        return
    out = args.out.resolve()
    os.chdir(out.parents[1])  # where the networks are
    with out.open('w') as file:
        for result in STEPS[args.step](settings, **args.arguments):
            file.write(json.dumps(result) + '\n')
            file.flush()


if __name__ == '__main__':
    main()
