"""What was chosen and measured, and what was left out."""
from dataclasses import dataclass, field
from typing import Any, Dict, List

__all__ = ['DeployError', 'Report', 'describe_candidate', 'first_line']


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
        differences: ``|a - b| / |b|`` of every output to the model as it was given: on the example, and in int8 on the
            images that were held back from calibration, if there are any.
        candidates: Everything that was tried, a dictionary each, with its milliseconds or what was wrong with it.
        machine: Where this was measured.
        left_out: What was not tried, and why: backends by their names with what each would need, and checks that this
            model does not allow.
        higher: In int8, the modules whose results stay in bfloat16, so that ``max_difference`` is kept.
        held_back: In int8, how many images of the calibration the differences were measured on, which nothing was
            fitted to; 0 if it was the example.
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
    left_out: Dict[str, str] = field(default_factory=dict)
    higher: List[str] = field(default_factory=list)
    held_back: int = 0

    @property
    def speedup(self) -> float:
        """How many times faster than the model as it was given."""
        return self.original_milliseconds / self.milliseconds

    def __str__(self) -> str:
        where = f', on {self.held_back} images held back from calibration' if self.held_back else ''
        lines = [
            f'{self.backend}, {self.precision}, {self.arrangement} images on {self.threads} threads: '
            f'{self.milliseconds:.2f} ms for {tuple(self.shape)}, {self.speedup:.2f} times as fast as the model as '
            f'given ({self.original_milliseconds:.2f} ms)',
            f'relative difference to it: {max(self.differences):.1e}{where}; forms: {", ".join(self.forms) or "none"}',
        ]
        if self.higher:
            lines.append(f'in bfloat16 and not in int8: {", ".join(self.higher)}')
        lines += [f'  {describe_candidate(c)}' for c in self.candidates]
        lines += [f'  without {name}: {reason}' for name, reason in self.left_out.items()]
        return '\n'.join(lines)


def describe_candidate(candidate: Dict[str, Any]) -> str:
    """A line of the report: what was tried, and its milliseconds or what was wrong with it."""
    what = f'{candidate["backend"]} {candidate["precision"]}'
    if candidate.get('arrangement'):
        what += f' {candidate["arrangement"]}'
    if candidate.get('forms'):
        what += f' {"+".join(candidate["forms"])}'
    if candidate.get('higher'):
        what += f' but for {len(candidate["higher"])} in bfloat16'
    if candidate.get('note'):
        return f'{what}: {candidate["note"]}'
    return f'{what}: {candidate["milliseconds"]:.2f} ms, difference {candidate["difference"]:.1e}'


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0][:300]}' if lines else type(error).__name__
