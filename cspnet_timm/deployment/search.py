"""From a model to the fastest callable here: everything is tried, compared and measured, and the best one taken."""
import contextlib
import copy
import math
import sys
import threading
from dataclasses import dataclass
from typing import (
    Any,
    Callable,
    Dict,
    Generic,
    Iterable,
    List,
    Optional,
    ParamSpec,
    Protocol,
    Sequence,
    Tuple,
    TypeVar,
    Union,
    cast,
)

import torch
import torch.nn as nn
from timm.models import reparameterize_model

from .archive import Deployed
from .backends import BACKENDS, Arrangement, Backend, Runner
from .checks import check_input, require
from .contract import BOUNDS, Trials, check, errors, make_trials
from .forms import FORMS
from .isolation import Isolation, Lost
from .machine import PRECISIONS, describe, interleave, native_precisions
from .quantize import check_batches
from .report import DeployError, Report, describe_candidate, first_line

__all__ = ['TupleOutputs', 'deploy']

HELD_BACK = 4  # one batch of so many that are given for calibration is not fitted to, but compared
GAIN = 0.97  # what a form or an arrangement must reach of the time of the best one so far, to replace it
_ONE_AT_A_TIME = threading.RLock()  # two would disturb each other's measurements, and torch.export takes one thread
CLOSE, FINALISTS = 1.1, 4  # who comes this close to the best one is measured beside it once more, so many at most


class TupleOutputs(nn.Module):
    """The model with its outputs as a tuple, which every exporter takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """What the model returns, in a row."""
        y = self.model(x)
        return (y,) if isinstance(y, torch.Tensor) else tuple(y)


def _pairs(
        precision: str,
        backend: Union[str, Sequence[str]],
        calibrated: bool,
        device: torch.device,
) -> Tuple[List[Tuple[str, str]], Dict[str, str]]:
    """The backends and precisions to try, and what is left out and why.

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

    pairs: List[Tuple[str, str]] = []
    left_out: Dict[str, str] = {}
    for name in names:
        if backend != 'auto':
            require(name, precision, device)
        else:
            reason = BACKENDS[name].unavailable(device)
            if reason is None and BACKENDS[name].on_request:
                reason = f'it takes its time, and is tried when it is asked for by backend={name!r}'
            if reason is not None:
                left_out[name] = reason.rstrip('.')
                continue
        found = [p for p in BACKENDS[name].precisions(device) if p in native_precisions(device)]
        if precision != 'auto':
            if precision in found:
                pairs.append((name, precision))
            else:
                left_out[name] = f'it has no {precision} on this machine, but {", ".join(found) or "nothing"}'
            continue
        # The narrowest floating point that the hardware has, and int8 where there are scales for it.
        wanted = sorted((p for p in found if p != 'int8'), key=('bfloat16', 'float16', 'float32').index)[:1]
        if calibrated and 'int8' in found:
            wanted.append('int8')
        if not wanted and backend != 'auto':
            raise DeployError(
                f'backend={name!r} computes in {", ".join(found)} alone on this machine '
                f'({describe(device)["device"]}): pass calibration=batches.')
        if not wanted:
            left_out[name] = f'it computes in {", ".join(found) or "nothing"} alone on this machine' + (
                ', which takes calibration=batches' if 'int8' in found else '')
        pairs += [(name, p) for p in wanted]
    if not pairs:
        require('openvino' if precision == 'int8' else 'eager', precision, device)
        raise DeployError(f'precision={precision!r} cannot be had of any backend that is installed.')
    return pairs, left_out


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
        entry = dict(
            backend=self.backend, precision=self.precision, forms=self.forms, arrangement=str(self.arrangement),
            milliseconds=self.milliseconds, difference=max(self.difference))
        if self.converted.higher:
            entry['higher'] = self.converted.higher
        return entry


class _Search:
    """Everything that is tried, and the best of it."""

    def __init__(
            self,
            example: torch.Tensor,
            calibration: List[torch.Tensor],
            trials: Trials,
            bounds: Dict[str, float],
            threads: int,
            seconds: float,
            progress: bool,
            isolation: Optional[Isolation],
    ) -> None:
        self.isolation = isolation
        self.example = example
        self.calibration = calibration
        self.trials = trials
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
            print(f'deploy: {describe_candidate(entry)}', file=sys.stderr, flush=True)

    def convert(self, backend: str, precision: str, model: nn.Module, forms: List[str]) -> Optional[Backend]:
        """The converted network, compared by then if its backend is isolated; None if it does not take the model."""
        kind = BACKENDS[backend]
        try:
            with torch.no_grad():
                if precision == 'int8' and kind.mixes and self.bounds[precision] < BOUNDS[precision]:
                    return kind.convert_within(
                        model, self.example, precision, self.calibration, self._error, self.bounds[precision])
                if self.isolation is None or not kind.isolated:
                    return kind.convert(model, self.example, precision, self.calibration)
                prepared = kind.prepare(model, self.example, precision, self.calibration)
                parts = self._alone(backend, precision, forms, prepared, None)
                return kind.from_parts(parts, precision, self.example.shape)
        except Exception as error:  # whatever a converter has to say of a network that it does not know
            self._fail(backend, precision, forms, error)
            return None

    def _error(self, converted: Backend) -> float:
        """Of a network in int8."""
        runner = converted.runner(converted.arrangements(len(self.example), self.threads)[0], self.threads)
        return max(errors(runner, self.trials, 'int8'))

    def _alone(
            self,
            backend: str,
            precision: str,
            forms: List[str],
            files: Dict[str, bytes],
            arrangement: Optional[Arrangement],
    ) -> Dict[str, bytes]:
        """Try a candidate in a process of its own; in the most promising arrangement, files are yet to convert."""
        assert self.isolation is not None
        what = '+'.join([f'{backend} {precision}', *forms])
        _, parts = self.isolation.attempt(
            BACKENDS[backend], files, prepared=arrangement is None, precision=precision, arrangement=arrangement,
            bound=self.bounds[precision], what=what)
        return parts

    def _fail(
            self,
            backend: str,
            precision: str,
            forms: List[str],
            error: Exception,
            higher: Sequence[str] = (),
    ) -> None:
        self.errors.append(error)
        note = str(error) if isinstance(error, Lost) else first_line(error)
        entry = dict(backend=backend, precision=precision, forms=forms, note=note)
        self._say(dict(entry, higher=list(higher)) if higher else entry)

    def challenge(
            self,
            backend: str,
            precision: str,
            converted: Backend,
            forms: List[str],
            arrangement: Arrangement,
            survived: bool = False,
    ) -> None:
        """Compare with the model as given, measure beside the best so far, and take the better one.

        Args:
            backend: Name of the backend.
            precision: What it computes in.
            converted: The converted network.
            forms: How it was rewritten.
            arrangement: How the batch is laid out.
            survived: It was compared in a process of its own, if it needs one.
        """
        try:
            isolated = self.isolation is not None and BACKENDS[backend].isolated
            if isolated and not survived:
                self._alone(backend, precision, forms, converted.parts(), arrangement)
            runner = converted.runner(arrangement, self.threads)
            if isolated:
                difference = errors(runner, self.trials, precision)
            else:
                difference = check(runner, self.trials, precision, self.bounds[precision])
            candidate = _Candidate(backend, precision, forms, arrangement, converted, runner, difference)
            if self.isolation is not None:
                self.isolation.settle()
            rivals = [candidate] if self.best is None else [self.best, candidate]
            times = interleave(
                [lambda r=r: r.runner(self.example) for r in rivals],  # type: ignore[misc]
                self.example.device, self.seconds)
        except Exception as error:
            self._fail(backend, precision, forms, error, converted.higher)
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

    def attempt(self, backend: str, precision: str, model: nn.Module, forms: List[str]) -> None:
        """Convert, and challenge in the most promising arrangement."""
        converted = self.convert(backend, precision, model, forms)
        if converted is not None:
            arrangement = converted.arrangements(len(self.example), self.threads)[0]
            self.challenge(backend, precision, converted, forms, arrangement, survived=True)

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


P = ParamSpec('P')
R_co = TypeVar('R_co', covariant=True)


class _WithLoad(Protocol, Generic[P, R_co]):
    """How a type checker sees :func:`deploy`: a function with an attribute."""

    load: Callable[..., Deployed]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


def _with_load(function: Callable[P, R_co]) -> _WithLoad[P, R_co]:
    found = cast('_WithLoad[P, R_co]', function)
    found.load = Deployed.load
    return found


@_with_load
def deploy(
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
        isolate: bool = True,
        limit: float = 300.,
) -> Deployed:
    """Make the fastest callable of a model: fold, rewrite, convert, compare, measure.

    The model is not changed. It is deployed in eval mode. Its batch norms are folded and its re-parameterised
    branches merged; then every backend converts it, and the fastest one's other forms of the network and other
    arrangements of the batch are tried, each measured beside the best one so far on the example, and those that
    came close once more beside one another. Each is compared with the model on the example, on one image and on one
    more than the example has; what differs is not taken.

    ``deploy.load(path)`` loads what :meth:`Deployed.save` wrote: ``deploy.load(path, *, threads=None,
    allow_code=False)``, see :meth:`Deployed.load`.

    Args:
        model: Any model of this package or of timm that returns a tensor or a list of tensors.
        example_input: Images ``(B, C, H, W)`` in float32, of the batch and size that it shall be fast at.
        precision: ``'float32'``, ``'bfloat16'``, ``'float16'``, ``'int8'``, or ``'auto'`` for the narrowest
            floating point that the hardware has, and int8 too if there is ``calibration``.
        backend: ``'native'``, ``'openvino'``, ``'onnxruntime'``, ``'inductor'``, ``'eager'``, several of them, or
            ``'auto'`` for all that are installed; ``'inductor_tuned'`` takes minutes, and is tried by name alone.
        calibration: Batches of images, normalised as the model's input, that int8 takes its scales from and is fitted
            to. Of two batches and more, a quarter is held back, at least one: by these images int8 is judged.
        threads: Threads that compute, ``torch.get_num_threads()`` by default.
        max_difference: Refuse what differs more from the model than this, ``|a - b| / |b|`` on the example, or in int8
            on what of the calibration is held back; by default 0.001 in float32, 0.1 in half precision and 0.5 in
            int8, which only finds failures. In int8 it is a budget: the package's own engine leaves as many maps in
            bfloat16 as it takes, which the report names.
        seconds: About how long each candidate is measured.
        progress: Print to the standard error about how long it will take, and a line for everything that is tried.
        isolate: Convert, run for the first time and compare in a process of its own what makes machine code that this
            package has not tested, so that nothing can end this one: OpenVINO, ONNX Runtime and PyTorch's compiler.
            False does it here, which spares a second or two.
        limit: Seconds that one candidate may take in that process.

    Returns:
        The fastest callable.

    Raises:
        ValueError: If an argument is unknown or of the wrong kind.
        DeployError: If the precision or a backend asked for cannot be had, or no backend takes the model.

    Example:
        >>> import timm, torch
        >>> from cspnet_timm import deploy
        >>> model = timm.create_model('cspnet_nano')
        >>> fast = deploy(model, torch.randn(8, 3, 64, 64), backend='eager', progress=False)
        >>> fast(torch.randn(3, 3, 64, 64)).shape
        torch.Size([3, 1000])
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f'model must be an nn.Module, not {type(model).__name__}.')
    check_input('example_input', example_input)
    example = example_input.detach().float()
    device = example.device
    places = {p.device for p in model.parameters()}
    if places - {device}:
        raise ValueError(f'example_input is on {device}, but the model is on {", ".join(map(str, places))}.')
    if not len(example):
        raise ValueError('example_input holds no image.')
    if threads is not None and threads < 1:
        raise ValueError(f'threads={threads} cannot be, at least 1 has to compute.')
    if not limit > 0:
        raise ValueError(f'limit={limit} cannot be, a candidate needs more than 0 seconds.')
    threads = threads or torch.get_num_threads()
    pairs, left_out = _pairs(precision, backend, calibration is not None, device)
    batches = check_batches(calibration) if calibration is not None else []
    kept = max(len(batches) // HELD_BACK, 1) if len(batches) > 1 else 0
    batches, held = batches[:len(batches) - kept], batches[len(batches) - kept:]
    bounds = BOUNDS if max_difference is None else dict.fromkeys(PRECISIONS, max_difference)

    def say(text: str) -> None:
        if progress:
            print(f'deploy: {text}', file=sys.stderr, flush=True)

    original = copy.deepcopy(model).eval().float()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        isolation = None
        if isolate and any(BACKENDS[name].isolated for name, _ in pairs):
            isolation = stack.enter_context(Isolation(threads, limit, say))
            with contextlib.suppress(Lost):  # which whoever needs it will say
                isolation.start()  # it imports while the model runs for the first time here
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        given = original(example)
        single = isinstance(given, torch.Tensor)
        if not single and not (
                isinstance(given, (list, tuple)) and given and all(isinstance(y, torch.Tensor) for y in given)):
            raise ValueError(
                f'The model must return a tensor or a list of tensors, not {type(given).__name__}: '
                'deploy the part of it that does.')
        original = TupleOutputs(original)
        folded = reparameterize_model(original)
        trials = make_trials(original, example, [given] if single else list(given))
        trials.held = [batch.detach().float().to(device) for batch in held]
        trials.held_reference = [list(original(batch)) for batch in trials.held]
        left_out.update(trials.notes)
        if isolation is not None:
            isolation.trials = trials
        say(_how_long(pairs, folded, seconds, limit))
        search = _Search(example, batches, trials, bounds, threads, seconds, progress, isolation)
        best = _find(search, pairs, folded)
    with torch.inference_mode(False), torch.no_grad():
        times = interleave([lambda: best.runner(example), lambda: original(example)], device, seconds)
    report = Report(
        backend=best.backend, precision=best.precision, arrangement=str(best.arrangement), forms=best.forms,
        shape=list(example.shape), threads=threads, milliseconds=times[0], original_milliseconds=times[1],
        differences=best.difference, candidates=search.tried, machine=describe(device), left_out=left_out,
        higher=best.converted.higher, held_back=sum(map(len, held)) if best.precision == 'int8' else 0,
    )
    say(str(report).splitlines()[0])
    return Deployed(best.converted, best.runner, report, single, device)


def _how_long(pairs: Sequence[Tuple[str, str]], model: nn.Module, seconds: float, limit: float) -> str:
    """What is said before the search begins: what is tried, and about how long it will take."""
    hundreds = max(sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) / 100, 0.1)
    each = {
        (name, precision): 2 * seconds + BACKENDS[name].cost_of(precision) * hundreds for name, precision in pairs}
    longest = max(each, key=each.__getitem__)
    rest = 4 * min(each.values())  # the best one's forms and arrangements
    text = f'{", ".join(f"{name} {precision}" for name, precision in pairs)} to try'
    text += f', about {_round(sum(each.values()) + rest)} in all'
    if len(pairs) > 1:
        text += f', {_round(each[longest])} of them {" ".join(longest)}'
    return text + (f'; what takes over {limit:g} s is given up' if any(BACKENDS[n].isolated for n, _ in each) else '')


def _round(seconds: float) -> str:
    return f'{max(5 * round(seconds / 5), 5)} s' if seconds < 90 else f'{round(seconds / 60)} min'


def _find(search: _Search, pairs: List[Tuple[str, str]], folded: nn.Module) -> _Candidate:
    """Try every backend, then the best one's forms and arrangements."""
    for name, wanted in pairs:
        search.attempt(name, wanted, folded, [])
    best = search.best
    if best is None:
        reasons = '; '.join(describe_candidate(c) for c in search.tried)
        reason = search.errors[-1] if search.errors else None
        raise DeployError(f'No backend takes this model: {reasons}') from reason
    network, forms = folded, []  # type: Tuple[nn.Module, List[str]]
    for form in BACKENDS[best.backend].forms(search.example.device):
        rewritten = FORMS[form](network) if form in FORMS else None
        if rewritten is None:
            continue
        search.attempt(best.backend, best.precision, rewritten, [*forms, form])
        if search.best is not None and search.best.forms == [*forms, form]:
            network, forms = rewritten, [*forms, form]
    best = search.best or best
    for arrangement in best.converted.arrangements(len(search.example), search.threads)[1:]:
        search.challenge(best.backend, best.precision, best.converted, best.forms, arrangement)
    return search.decide()
