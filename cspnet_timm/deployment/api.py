"""One call from a model to the fastest callable on this machine, and from a file to the same callable."""
import copy
import json
import math
import os
import sys
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.models import reparameterize_model

from .backends import BACKENDS, Arrangement, Backend, Runner
from .forms import FORMS
from .machine import PRECISIONS, describe, interleave, native_precisions
from .quantize import check_batches

__all__ = ['DeployError', 'Deployed', 'Report', 'deploy']

FORMAT = 1
# Relative difference above which a candidate is taken for a failure and not for rounding.
BOUNDS = {'float32': 1e-3, 'bfloat16': 0.1, 'float16': 0.1, 'int8': 0.5}
GAIN = 0.97  # what a form or an arrangement must reach of the time of the best one so far, to replace it
CLOSE, FINALISTS = 1.1, 4  # who comes this close to the best one is measured beside it once more, so many at most


class DeployError(RuntimeError):
    """What was asked for cannot be had: no hardware for it, no library, or a file that is damaged."""


@dataclass
class Report:
    """What :data:`deploy` chose, and what it measured.

    Attributes:
        backend: What runs the network.
        precision: What it computes in.
        arrangement: Streams × images in each.
        forms: How the network was rewritten.
        shape: Shape of the example.
        threads: Threads that compute.
        milliseconds: Of the example's batch, the median.
        original_milliseconds: The same of the model as it was given, interleaved with the chosen one.
        differences: ``|a - b| / |b|`` of every output to the model as it was given, on the example.
        candidates: Everything that was tried, a dictionary each, with its milliseconds or what was wrong with it.
        machine: Where this was measured.
    """

    backend: str
    precision: str
    arrangement: str
    forms: List[str]
    shape: List[int]
    threads: int
    milliseconds: float
    original_milliseconds: float
    differences: List[float]
    candidates: List[Dict[str, Any]] = field(default_factory=list)
    machine: Dict[str, Any] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """How many times faster than the model as it was given."""
        return self.original_milliseconds / self.milliseconds

    def __str__(self) -> str:
        lines = [
            f'{self.backend}, {self.precision}, {self.arrangement} images on {self.threads} threads: '
            f'{self.milliseconds:.2f} ms for {tuple(self.shape)}, {self.speedup:.2f} times as fast as the model as '
            f'given ({self.original_milliseconds:.2f} ms)',
            f'relative difference to it: {max(self.differences):.1e}; forms: {", ".join(self.forms) or "none"}',
        ]
        lines += [f'  {_describe_candidate(c)}' for c in self.candidates]
        return '\n'.join(lines)


def _describe_candidate(candidate: Dict[str, Any]) -> str:
    what = f'{candidate["backend"]} {candidate["precision"]}'
    if candidate.get('arrangement'):
        what += f' {candidate["arrangement"]}'
    if candidate.get('forms'):
        what += f' {"+".join(candidate["forms"])}'
    if candidate.get('note'):
        return f'{what}: {candidate["note"]}'
    return f'{what}: {candidate["milliseconds"]:.2f} ms, difference {candidate["difference"]:.1e}'


class Deployed:
    """A network made ready to run; called like the model that it was made from.

    Input ``(B, C, H, W)`` of any B, with C, H and W of the example; the output is the model's, a tensor or a list of
    tensors, in float32. It is for inference: nothing has a gradient.

    Attributes:
        report: What was chosen, and what was measured.
    """

    def __init__(self, converted: Backend, runner: Runner, report: Report, single: bool, device: torch.device) -> None:
        """
        Args:
            converted: The network as its backend has it.
            runner: What runs it.
            report: What was measured.
            single: The model returns a tensor, not a list.
            device: Where the input has to be.
        """
        self.report = report
        self.device = device
        self._converted = converted
        self._runner = runner
        self._single = single

    def __call__(self, x: torch.Tensor) -> Union[torch.Tensor, List[torch.Tensor]]:
        """Run the network.

        Args:
            x: Images ``(B, C, H, W)``, in floating point.

        Returns:
            What the model returns.

        Raises:
            ValueError: If the input has another shape than the example but for its batch, or is elsewhere.
        """
        _check_input('The input', x)
        expected = tuple(self.report.shape[1:])
        if tuple(x.shape[1:]) != expected or not len(x):
            raise ValueError(
                f'The input has the shape {tuple(x.shape)}, but this network was deployed for (B, '
                f'{", ".join(map(str, expected))}) with any B of at least 1; deploy it again for another size.')
        if x.device.type != self.device.type:
            raise ValueError(f'The input is on {x.device}, but this network was deployed for {self.device}.')
        outputs = self._runner(x.float())
        return outputs[0] if self._single else outputs

    def __repr__(self) -> str:
        """The report."""
        return f'Deployed({self.report})'

    def save(self, path: Union[str, Path]) -> None:
        """Write everything into one file, from which :meth:`load` starts without a model and without tracing.

        Args:
            path: The file; one that exists is replaced when the new one is whole.
        """
        path = Path(path)
        meta = dict(format=FORMAT, single=self._single, device=self.device.type, report=asdict(self.report))
        temporary = path.with_name(f'.{path.name}.{os.getpid()}')
        try:
            with zipfile.ZipFile(temporary, 'w', zipfile.ZIP_STORED) as archive:
                archive.writestr('deploy.json', json.dumps(meta, indent=1))
                for name, content in self._converted.parts().items():
                    archive.writestr(name, content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def load(
            path: Union[str, Path],
            *,
            threads: Optional[int] = None,
            allow_code: bool = False,
    ) -> 'Deployed':
        """Load what :meth:`save` wrote.

        Args:
            path: The file.
            threads: Threads that compute, by default as many as it was deployed for, but no more than there are.
            allow_code: Also load a file that holds machine code or a program of PyTorch's, which runs as you. Only for
                files that you made yourself; those of the other backends hold none.

        Returns:
            The network; its ``report`` tells of the machine that it was measured on.

        Raises:
            DeployError: If the file is damaged, holds code that is not allowed, or needs a library or an arithmetic
                that is not there.
            FileNotFoundError: If there is no such file.
        """
        meta, parts = _read(Path(path))
        report = meta['report']
        backend = BACKENDS[report.backend]
        device = torch.device(meta['device'])
        if backend.runs_code and not allow_code:
            raise DeployError(
                f'{path}: holds a program of the backend {report.backend!r}, which runs as you. If you made the file '
                'yourself, pass allow_code=True; files of the backends '
                f'{" and ".join(repr(n) for n, b in BACKENDS.items() if not b.runs_code)} are data alone.')
        _require(report.backend, report.precision, device)
        threads = threads or min(report.threads, torch.get_num_threads())
        try:
            converted = backend.from_parts(parts, report.precision, report.shape)
            runner = converted.runner(_arrangement(report.arrangement), threads)
            deployed = Deployed(converted, runner, report, meta['single'], device)
            deployed(torch.zeros(report.shape, device=device))
        except Exception as error:  # each library has its own
            raise DeployError(f'{path}: {report.backend} cannot load it: {_first_line(error)}') from error
        return deployed


def _read(path: Path) -> Tuple[Dict[str, Any], Dict[str, bytes]]:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            for info in infos:
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
                    raise DeployError(f'{path}: the entry {info.filename!r} is compressed or larger than the file.')
            if sum(info.file_size for info in infos) > size:
                raise DeployError(f'{path}: its entries are larger together than the file of {size} bytes.')
            parts = {info.filename: archive.read(info) for info in infos}  # read whole, and its checksum compared
        meta = json.loads(parts.pop('deploy.json'))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError) as error:
        raise DeployError(f'{path}: is no file that Deployed.save wrote, or is damaged: {error}') from error
    version = meta.get('format') if isinstance(meta, dict) else None
    if version != FORMAT:
        raise DeployError(f'{path}: has the format {version!r}, this version of cspnet_timm reads {FORMAT}.')
    try:
        report = Report(**meta['report'])
        valid = (
            report.backend in BACKENDS and report.precision in PRECISIONS and meta['device'] in ('cpu', 'cuda')
            and isinstance(meta['single'], bool) and isinstance(report.threads, int) and 0 < report.threads < 1 << 16
            and len(report.shape) == 4 and all(isinstance(n, int) and 0 < n < 1 << 16 for n in report.shape)
            and math.prod(report.shape) < 1 << 31
        )
        _arrangement(report.arrangement)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeployError(f'{path}: its description is damaged: {error!r}') from error
    if not valid:
        raise DeployError(
            f'{path}: its description is not valid: backend {report.backend!r}, precision {report.precision!r}, shape '
            f'{report.shape!r}, {report.threads!r} threads, device {meta["device"]!r}.')
    return {**meta, 'report': report}, parts


def _arrangement(text: str) -> Arrangement:
    streams, chunk = (int(n) for n in text.split('×'))
    if not 0 < streams < 1 << 16 or not 0 < chunk < 1 << 16:
        raise ValueError(f'{text!r} is no arrangement of streams and images')
    return Arrangement(streams, chunk)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0][:300]}' if lines else type(error).__name__


class TupleOutputs(nn.Module):
    """The model with its outputs as a tuple, which every exporter takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        y = self.model(x)
        return (y,) if isinstance(y, torch.Tensor) else tuple(y)


def _check_input(name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise ValueError(f'{name} must be a tensor (B, C, H, W), not {type(x).__name__}.')
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f'{name} must be a float tensor (B, C, H, W), not {x.dtype} of shape {tuple(x.shape)}.')


def _require(backend: str, precision: str, device: torch.device) -> None:
    """Raise a DeployError unless the backend is there, and the device has the precision (any for ``'auto'``)."""
    reason = BACKENDS[backend].unavailable(device)
    if reason is not None:
        raise DeployError(f'backend={backend!r} cannot be used: {reason.rstrip(".")}.')
    if precision == 'auto':
        return
    if precision not in native_precisions(device):
        raise DeployError(
            f'precision={precision!r} cannot be had: this machine ({describe(device)["device"]}) computes in '
            f'{", ".join(native_precisions(device))}.')
    allowed = BACKENDS[backend].precisions(device)
    if precision not in allowed:
        raise DeployError(
            f'precision={precision!r} cannot be had of backend={backend!r}, which computes in {", ".join(allowed)}; '
            f'{", ".join(n for n, b in BACKENDS.items() if precision in b.precisions(device)) or "none"} can.')


def _pairs(
        precision: str,
        backend: Union[str, Sequence[str]],
        calibrated: bool,
        device: torch.device,
) -> List[Tuple[str, str]]:
    """The backends and precisions to try.

    Raises:
        ValueError: If a name is unknown, or int8 is asked for without calibration.
        DeployError: If what was asked for by name cannot be had.
    """
    names = list(BACKENDS) if backend == 'auto' else [backend] if isinstance(backend, str) else list(backend)
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f'backend={name!r} is unknown, choose \'auto\' or of {", ".join(map(repr, BACKENDS))}.')
    if not names:
        raise ValueError(f'backend={backend!r} names none, choose \'auto\' or of {", ".join(map(repr, BACKENDS))}.')
    if precision not in ('auto', *PRECISIONS):
        raise ValueError(
            f'precision={precision!r} is unknown, choose \'auto\' or of {", ".join(map(repr, PRECISIONS))}.')
    if precision == 'int8' and not calibrated:
        raise ValueError('precision=\'int8\' takes the scales of the maps from images: pass calibration=batches.')
    if calibrated and precision not in ('auto', 'int8'):
        raise ValueError(f'calibration is for precision=\'int8\' or \'auto\', not for precision={precision!r}.')

    pairs = []
    for name in names:
        if backend != 'auto':
            _require(name, precision, device)
        elif BACKENDS[name].unavailable(device) is not None:
            continue
        found = [p for p in BACKENDS[name].precisions(device) if p in native_precisions(device)]
        if precision != 'auto':
            pairs += [(name, precision)] if precision in found else []
            continue
        # The narrowest floating point that the hardware has, and int8 where there are scales for it.
        wanted = sorted((p for p in found if p != 'int8'), key=('bfloat16', 'float16', 'float32').index)[:1]
        if calibrated and 'int8' in found:
            wanted.append('int8')
        if not wanted and backend != 'auto':
            raise DeployError(
                f'backend={name!r} computes in {", ".join(found)} alone on this machine '
                f'({describe(device)["device"]}): pass calibration=batches.')
        pairs += [(name, p) for p in wanted]
    if not pairs:
        _require('openvino' if precision == 'int8' else 'eager', precision, device)
        raise DeployError(f'precision={precision!r} cannot be had of any backend that is installed.')
    return pairs


@dataclass
class _Candidate:
    backend: str
    precision: str
    forms: List[str]
    arrangement: Arrangement
    converted: Backend
    runner: Runner
    difference: List[float]
    milliseconds: float = math.nan

    def as_dict(self) -> Dict[str, Any]:
        return dict(
            backend=self.backend, precision=self.precision, forms=self.forms, arrangement=str(self.arrangement),
            milliseconds=self.milliseconds, difference=max(self.difference))


class _Search:
    """Everything that is tried, and the best of it."""

    def __init__(
            self,
            example: torch.Tensor,
            calibration: List[torch.Tensor],
            reference: List[torch.Tensor],
            bounds: Dict[str, float],
            threads: int,
            seconds: float,
            progress: bool,
    ) -> None:
        self.example = example
        self.calibration = calibration
        self.reference = reference
        self.bounds = bounds
        self.threads = threads
        self.seconds = seconds
        self.progress = progress
        self.tried: List[Dict[str, Any]] = []
        self.errors: List[Exception] = []
        self.best: Optional[_Candidate] = None
        self.others: List[Tuple[float, _Candidate]] = []  # and how many times the best one's time they take

    def _say(self, entry: Dict[str, Any]) -> None:
        self.tried.append(entry)
        if self.progress:
            print(f'deploy: {_describe_candidate(entry)}', file=sys.stderr, flush=True)

    def convert(self, backend: str, precision: str, model: nn.Module, forms: List[str]) -> Optional[Backend]:
        """The converted network, or None if the backend does not take it."""
        try:
            with torch.no_grad():
                return BACKENDS[backend].convert(model, self.example, precision, self.calibration)
        except Exception as error:  # whatever a converter has to say of a network that it does not know
            self._fail(backend, precision, forms, error)
            return None

    def _fail(self, backend: str, precision: str, forms: List[str], error: Exception) -> None:
        self.errors.append(error)
        self._say(dict(backend=backend, precision=precision, forms=forms, note=_first_line(error)))

    def challenge(
            self,
            backend: str,
            precision: str,
            converted: Backend,
            forms: List[str],
            arrangement: Arrangement,
    ) -> None:
        """Compare with the model as given, measure beside the best so far, and take the better one."""
        try:
            runner = converted.runner(arrangement, self.threads)
            difference = _differences(runner(self.example), self.reference)
            if not max(difference) <= self.bounds[precision]:
                raise DeployError(
                    f'differs from the model by {max(difference):.2g}, more than {self.bounds[precision]:.2g} allows')
            candidate = _Candidate(backend, precision, forms, arrangement, converted, runner, difference)
            rivals = [candidate] if self.best is None else [self.best, candidate]
            times = interleave(
                [lambda r=r: r.runner(self.example) for r in rivals],  # type: ignore[misc]
                self.example.device, self.seconds)
        except Exception as error:
            self._fail(backend, precision, forms, error)
            return
        for rival, milliseconds in zip(rivals, times):
            rival.milliseconds = milliseconds
        self._say(candidate.as_dict())
        before, self.best = self.best, self.best or candidate
        if before is None:
            return
        ratio = candidate.milliseconds / before.milliseconds
        if ratio < GAIN:
            self.best = candidate
            self.others = [(r / ratio, other) for r, other in [(1., before), *self.others]]
        else:
            self.others.append((ratio, candidate))
        # The runners of those that are left behind hold memory.
        self.others = sorted((o for o in self.others if o[0] < CLOSE), key=lambda o: o[0])[:FINALISTS - 1]

    def decide(self) -> _Candidate:
        """The best one of all, by turns of all that came close: what a duel shows, a noisy moment may have made."""
        assert self.best is not None
        finalists = [self.best, *(other for _, other in self.others)]
        if len(finalists) > 1:
            times = interleave(
                [lambda c=c: c.runner(self.example) for c in finalists],  # type: ignore[misc]
                self.example.device, self.seconds)
            self.best = finalists[times.index(min(times))]
        return self.best


def _differences(outputs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> List[float]:
    if [tuple(y.shape) for y in outputs] != [tuple(y.shape) for y in reference]:
        raise DeployError(
            f'gives {[tuple(y.shape) for y in outputs]}, the model {[tuple(y.shape) for y in reference]}')
    return [
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
        for a, b in zip(outputs, reference)
    ]


class _Deploy:
    """``deploy(model, example_input)`` makes the fastest callable of a model, ``deploy.load(path)`` loads one.

    Example:
        >>> import timm, torch
        >>> from cspnet_timm import deploy
        >>> model = timm.create_model('cspnet_nano')
        >>> fast = deploy(model, torch.randn(8, 3, 64, 64), backend='eager', progress=False)
        >>> fast(torch.randn(3, 3, 64, 64)).shape
        torch.Size([3, 1000])
    """

    load = staticmethod(Deployed.load)

    def __call__(
            self,
            model: nn.Module,
            example_input: torch.Tensor,
            *,
            precision: str = 'auto',
            backend: Union[str, Sequence[str]] = 'auto',
            calibration: Optional[Iterable[torch.Tensor]] = None,
            threads: Optional[int] = None,
            max_difference: Optional[float] = None,
            seconds: float = 0.5,
            progress: bool = True,
    ) -> Deployed:
        """Fold, rewrite, convert, measure, and return the fastest.

        The model is not changed. It is deployed in eval mode. Its batch norms are folded and its re-parameterised
        branches merged; then every backend converts it, and the fastest one's other forms of the network and other
        arrangements of the batch are tried, each measured beside the best one so far on the example, and those that
        came close once more beside one another.

        Args:
            model: Any model of this package or of timm that returns a tensor or a list of tensors.
            example_input: Images ``(B, C, H, W)`` in float32, of the batch and size that it shall be fast at.
            precision: ``'float32'``, ``'bfloat16'``, ``'float16'``, ``'int8'``, or ``'auto'`` for the narrowest
                floating point that the hardware has, and int8 too if there is ``calibration``.
            backend: ``'native'``, ``'openvino'``, ``'onnxruntime'``, ``'inductor'``, ``'eager'``, several of them, or
                ``'auto'`` for all that are installed.
            calibration: Batches of images, normalised as the model's input, that int8 takes its scales from.
            threads: Threads that compute, ``torch.get_num_threads()`` by default.
            max_difference: Refuse what differs more from the model than this, ``|a - b| / |b|`` on the example; by
                default 0.001 in float32, 0.1 in half precision and 0.5 in int8, which only finds failures.
            seconds: About how long each candidate is measured.
            progress: Print a line to the standard error for everything that is tried.

        Returns:
            The fastest callable.

        Raises:
            ValueError: If an argument is unknown or of the wrong kind.
            DeployError: If the precision or a backend asked for cannot be had, or no backend takes the model.
        """
        if not isinstance(model, nn.Module):
            raise ValueError(f'model must be an nn.Module, not {type(model).__name__}.')
        _check_input('example_input', example_input)
        example = example_input.detach().float()
        device = example.device
        places = {p.device for p in model.parameters()}
        if places - {device}:
            raise ValueError(f'example_input is on {device}, but the model is on {", ".join(map(str, places))}.')
        if not len(example):
            raise ValueError('example_input holds no image.')
        if threads is not None and threads < 1:
            raise ValueError(f'threads={threads} cannot be, at least 1 has to compute.')
        threads = threads or torch.get_num_threads()
        pairs = _pairs(precision, backend, calibration is not None, device)
        batches = check_batches(calibration) if calibration is not None else []
        bounds = BOUNDS if max_difference is None else dict.fromkeys(PRECISIONS, max_difference)

        original = copy.deepcopy(model).eval().float()
        with torch.no_grad():
            given = original(example)
            single = isinstance(given, torch.Tensor)
            if not single and not (
                    isinstance(given, (list, tuple)) and given and all(isinstance(y, torch.Tensor) for y in given)):
                raise ValueError(
                    f'The model must return a tensor or a list of tensors, not {type(given).__name__}: '
                    'deploy the part of it that does.')
            original = TupleOutputs(original)
            folded = reparameterize_model(original)
            reference = list(original(example))
        search = _Search(example, batches, reference, bounds, threads, seconds, progress)
        for name, wanted in pairs:
            self._try(search, name, wanted, folded, [])
        best = search.best
        if best is None:
            reasons = '; '.join(_describe_candidate(c) for c in search.tried)
            reason = search.errors[-1] if search.errors else None
            raise DeployError(f'No backend takes this model: {reasons}') from reason
        if BACKENDS[best.backend].searches:
            network, forms = folded, []  # type: Tuple[nn.Module, List[str]]
            for form, rewrite in FORMS.items():
                rewritten = rewrite(network)
                if rewritten is None:
                    continue
                self._try(search, best.backend, best.precision, rewritten, [*forms, form])
                if search.best is not None and search.best.forms == [*forms, form]:
                    network, forms = rewritten, [*forms, form]
        best = search.best or best
        for arrangement in best.converted.arrangements(len(example), threads)[1:]:
            search.challenge(best.backend, best.precision, best.converted, best.forms, arrangement)
        best = search.decide()

        with torch.inference_mode():
            times = interleave(
                [lambda: best.runner(example), lambda: original(example)], device, seconds)
        report = Report(
            backend=best.backend, precision=best.precision, arrangement=str(best.arrangement), forms=best.forms,
            shape=list(example.shape), threads=threads, milliseconds=times[0], original_milliseconds=times[1],
            differences=best.difference, candidates=search.tried, machine=describe(device),
        )
        deployed = Deployed(best.converted, best.runner, report, single, device)
        if progress:
            print(f'deploy: {str(report).splitlines()[0]}', file=sys.stderr, flush=True)
        return deployed

    @staticmethod
    def _try(search: _Search, backend: str, precision: str, model: nn.Module, forms: List[str]) -> None:
        converted = search.convert(backend, precision, model, forms)
        if converted is not None:
            arrangement = converted.arrangements(len(search.example), search.threads)[0]
            search.challenge(backend, precision, converted, forms, arrangement)


deploy = _Deploy()
