"""What each form of a network gains, beside the network as it is: which of them are worth a candidate.

    python benchmarks/forms.py --models 'cspnet_*' --backend openvino --out docs

Every form is converted and measured in turn with the network as it is, in processor time. Writes ``forms.json`` and
``forms.md``.
"""
import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import timm
import torch
from paper import write_files
from speed import busy_fraction, create
from timm.models import reparameterize_model

from cspnet_timm.deployment.backends import BACKENDS
from cspnet_timm.deployment.forms import FORMS
from cspnet_timm.deployment.machine import describe, native_precisions
from cspnet_timm.deployment.search import TupleOutputs

WORTH = 0.03  # of the time: what a form has to gain somewhere to stay


def processor_times(calls: Sequence[Callable[[], Any]], seconds: float, rounds: int = 15) -> List[float]:
    """Milliseconds of processor time of each call, in turn: other programs take the clock's time, and less of this."""
    times: List[List[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, row in zip(calls, times):
            start, count = time.process_time(), 0
            while count < 2 or time.process_time() - start < seconds / rounds:
                call()
                count += 1
            row.append((time.process_time() - start) / count * 1e3)
    return [statistics.median(row) for row in times]


def measure(name: str, backend: str, x: torch.Tensor, precision: str, seconds: float) -> Dict[str, Any]:
    """Ratios of the times, form over as it is; a form that changes nothing has none."""
    folded = reparameterize_model(TupleOutputs(create(name, x.device)))
    networks = {'as it is': folded}
    for form, rewrite in FORMS.items():
        changed = rewrite(folded)
        if changed is not None:
            networks[form] = changed
    threads = torch.get_num_threads()
    runners = []
    with torch.no_grad():
        for network in networks.values():
            converted = BACKENDS[backend].convert(network, x, precision)
            runners.append(converted.runner(converted.arrangements(len(x), threads)[0], threads))
        times = processor_times([lambda r=r: r(x) for r in runners], seconds)  # type: ignore[misc]
    return dict(model=name, milliseconds=dict(zip(networks, times)),
                ratios={form: ms / times[0] for form, ms in zip(list(networks)[1:], times[1:])})


def _by_form(rows: List[Dict[str, Any]]) -> Dict[str, List[float]]:
    found = {form: [row['ratios'][form] for row in rows if form in row['ratios']] for form in FORMS}
    return {form: ratios for form, ratios in found.items() if ratios}


def _gains(ratios: List[float]) -> int:
    return sum(ratio < 1 - WORTH for ratio in ratios)


def _conclusion(rows: List[Dict[str, Any]]) -> List[str]:
    gains = [f'`{form}` {_gains(ratios)} of {len(ratios)}' for form, ratios in _by_form(rows).items()]
    return [f'Networks that a form makes faster by 3 % or more: {", ".join(gains)}.', ''] if gains else []


def table(report: Dict[str, Any]) -> List[str]:
    """The results as Markdown."""
    machine, rows = report['machine'], report['rows']
    lines = [
        f'# What other forms of a network gain, {report["date"]}', '', *_conclusion(rows),
        f'{machine["device"]}, {machine["threads"]} threads, {report["backend"]} in {report["precision"]}, batch '
        f'{report["batch"]} at {report["size"]} × {report["size"]}: processor time of each form over that of the '
        f'network as it is. Other programs used {report["busy"]:.0%} of the processors.', '',
        f'| network | as it is (ms) | {" | ".join(FORMS)} |', '| --- | ---: |' + ' ---: |' * len(FORMS)]
    for row in rows:
        ratios = ' | '.join(f'{row["ratios"][f]:.2f}' if f in row['ratios'] else '–' for f in FORMS)
        lines.append(f'| `{row["model"]}` | {row["milliseconds"]["as it is"]:.2f} | {ratios} |')
    lines += ['', '| form | networks | median | best | gains 3 % or more in |', '| --- | ---: | ---: | ---: | ---: |']
    for form, found in _by_form(rows).items():
        lines.append(f'| `{form}` | {len(found)} | {statistics.median(found):.2f} | {min(found):.2f} | '
                     f'{_gains(found)} |')
    return lines


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Measure and write after every network."""
    parser = argparse.ArgumentParser(description='What forms of a network gain.')
    parser.add_argument('--out', type=Path, required=True, help='folder for the results')
    parser.add_argument('--models', nargs='+', default=['cspnet_*'], help='names or patterns')
    parser.add_argument('--backend', default='openvino', choices=[n for n, b in BACKENDS.items() if n != 'native'])
    parser.add_argument('--precision', help='by default bfloat16 where the processor has it')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--seconds', type=float, default=1., help='about how long each is measured')
    args = parser.parse_args(arguments)
    cpu = torch.device('cpu')
    precision = args.precision or ('bfloat16' if 'bfloat16' in native_precisions(cpu) else 'float32')
    x = torch.rand(args.batch, 3, args.size, args.size)
    names = list(dict.fromkeys(name for pattern in args.models for name in timm.list_models(pattern)))
    report: Dict[str, Any] = dict(
        date=time.strftime('%Y-%m-%d'), machine=describe(cpu), backend=args.backend, precision=precision,
        size=args.size, batch=args.batch, busy=busy_fraction() or 0., rows=[])
    for name in names:
        report['rows'].append(measure(name, args.backend, x, precision, args.seconds))
        ratios = report['rows'][-1]['ratios']
        print(name, ', '.join(f'{form} {ratio:.2f}' for form, ratio in ratios.items()), flush=True)
        write_files({
            'forms.json': lambda path: path.write_text(json.dumps(report, indent=1)),
            'forms.md': lambda path: path.write_text('\n'.join(table(report)) + '\n'),
        }, args.out)


if __name__ == '__main__':
    main()
