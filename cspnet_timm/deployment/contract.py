"""What a converted network has to do to be taken: what the model does, on every batch, and nothing beside it.

Right on the example is not right: a map that is scaled by the mean of another image, or a product that reads into its
neighbour, shows only where images differ and batches too. So every candidate is compared on :func:`make_trials`.
"""
import math
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Sequence

import torch

from .report import DeployError, first_line

__all__ = ['BOUNDS', 'Trials', 'check', 'differences', 'errors', 'make_trials']

Outputs = List[torch.Tensor]
# Relative difference above which a candidate is taken for a failure and not for rounding.
BOUNDS = {'float32': 1e-3, 'bfloat16': 0.1, 'float16': 0.1, 'int8': 0.5}
# The same between two runs of one candidate, an image alone and in a batch: what rounding explains is no more than
# so many times the difference to the model, or than the smallest that is looked at.
OWN_SHARE, OWN_LEAST = 1.5, {'float32': 1e-3, 'bfloat16': 0.02, 'float16': 0.02, 'int8': 0.02}
GAINS = (1., 0.5, 0.75)  # of neighbouring images, so that what one takes of another is seen
FLOOR = 0.5  # of the outputs' size in the mean, below which an image's own is no measure


@dataclass
class Trials:
    """Inputs, and what the model as given makes of them.

    Attributes:
        example: The example.
        reference: The model's outputs of it.
        larger: Other images, one more than the example has; None if the model does not take them.
        larger_reference: The model's outputs of them.
        alone: The model's outputs of some images of ``larger`` by themselves, by their places.
        independent: The model treats each image by itself.
        notes: What could not be compared, and why.
        held: Batches of images that were held back from calibration, by which int8 is judged instead of the example.
        held_reference: The model's outputs of each.
    """

    example: torch.Tensor
    reference: Outputs
    larger: Optional[torch.Tensor] = None
    larger_reference: Outputs = field(default_factory=list)
    alone: Dict[int, Outputs] = field(default_factory=dict)
    independent: bool = False
    notes: Dict[str, str] = field(default_factory=dict)
    held: List[torch.Tensor] = field(default_factory=list)
    held_reference: List[Outputs] = field(default_factory=list)


def make_trials(
        original: Callable[[torch.Tensor], Sequence[torch.Tensor]],
        example: torch.Tensor,
        reference: Sequence[torch.Tensor],
) -> Trials:
    """Make the inputs, and run the model as given on them.

    Args:
        original: The model as given, which returns its outputs in a row.
        example: ``(B, C, H, W)``.
        reference: Its outputs of the example.

    Returns:
        The trials: the example, B + 1 other images, and the first and the last of these by themselves.
    """
    trials = Trials(example, list(reference))
    with torch.no_grad():
        larger = _others(example)
        try:
            others = [y.clone() for y in original(larger)]
            alone = {i: [y.clone() for y in original(larger[i:i + 1])] for i in (0, len(example))}
        except Exception as error:  # whatever a model says that takes no other batch
            trials.notes['other batches'] = (
                f'the model itself does not take batches of 1 and {len(larger)}, so it was compared on the example '
                f'alone: {first_line(error)}')
            return trials
    trials.larger, trials.larger_reference, trials.alone = larger, others, alone
    trials.independent = all(
        a.shape[:1] == (1,) and b.shape[:1] == (len(larger),) and _distance(a, b[i:i + 1]) < BOUNDS['float32']
        for i, outputs in alone.items() for a, b in zip(outputs, others))
    if not trials.independent:
        trials.notes['images by themselves'] = (
            'the model itself gives an image other outputs in a batch than alone, so it was compared on whole '
            'batches')
    return trials


def _others(example: torch.Tensor) -> torch.Tensor:
    """One more image than the example has, of the same kind, unlike it and unlike one another."""
    images = example.flip(0).flip(3)
    images = torch.cat([images, example[:1].flip(2)])
    gains = torch.tensor(GAINS, device=example.device).repeat(-(-len(images) // len(GAINS)))[:len(images)]
    images = images * gains.view(-1, 1, 1, 1)
    if float((images[:-1] - example).norm()) < 0.1 * float(example.norm()) or not bool(example.any()):
        generator = torch.Generator().manual_seed(0)  # a constant image, whose mirror image is the same
        noise = torch.rand(images.shape, generator=generator).to(images.device)
        images = images + 0.5 * noise * max(float(example.abs().max()), 0.1)
    return images.contiguous()


def check(run: Callable[[torch.Tensor], Outputs], trials: Trials, precision: str, bound: float) -> List[float]:
    """Compare a candidate with the model as given.

    Args:
        run: The candidate.
        trials: What to compare on.
        precision: What it computes in.
        bound: The largest relative difference, of :func:`errors`.

    Returns:
        ``|a - b| / |b|`` of every output, of :func:`errors`.

    Raises:
        DeployError: If it differs by more, if an image by itself is not what it is in a batch, if a NaN in one image
            reaches another or the next call, or if outputs are changed by a later call.
    """
    first = run(trials.example)
    found = differences(first, trials.reference)
    where = ''
    if precision == 'int8' and trials.held:
        if not max(found) <= max(bound, BOUNDS[precision]):
            raise DeployError(f'differs from the model on the example by {max(found):.2g}')
        found = errors(run, trials, precision)
        where = ' on images held back from calibration'
    if not max(found) <= bound:
        raise DeployError(f'differs from the model{where} by {max(found):.2g}, more than {bound:.2g} allows')
    kept = [y.clone() for y in first]
    bound = max(bound, BOUNDS[precision])  # the user's bound is for what was compared so far
    own = max(OWN_LEAST[precision], OWN_SHARE * max(found))
    if trials.larger is not None:
        larger = trials.larger
        batch = run(larger)
        what = f'on a batch of {len(larger)} other images'
        _compare(batch, trials.larger_reference, bound, f'the model {what}', per_image=trials.independent)
        for i, reference in trials.alone.items():
            alone = run(larger[i:i + 1])
            _compare(alone, reference, bound, 'the model on a batch of 1', per_image=False)
            if trials.independent:
                place = [y[i:i + 1] for y in batch]
                _compare(alone, place, own, 'itself, an image alone and in a batch', per_image=False)
        another = run(larger[1:])
        if trials.independent:
            _compare(another, [y[1:] for y in batch], own, 'itself, images in two batches', per_image=True)
            _spoil(run, larger, batch, own)
    if any(not torch.equal(a, b) and bool(b.isfinite().all()) for a, b in zip(first, kept)):
        raise DeployError('changes outputs that it gave before')
    _compare(run(trials.example), kept, own, 'itself, on the example once more', per_image=False)
    return found


def _spoil(run: Callable[[torch.Tensor], Outputs], images: torch.Tensor, batch: Outputs, bound: float) -> None:
    """Put NaN into one image and compare the others with what they were without."""
    bad = len(images) // 2
    spoiled = images.clone()
    spoiled[bad] = math.nan
    others = [i for i in range(len(images)) if i != bad]
    outputs = run(spoiled)
    _compare(
        [y[others] for y in outputs], [y[others] for y in batch], bound,
        'itself: what is NaN in one image of a batch reaches another', per_image=True)


def _compare(outputs: Outputs, reference: Outputs, bound: float, what: str, per_image: bool) -> None:
    worst = max(differences(outputs, reference))
    if per_image and worst <= bound:
        worst = max(_distance(a, b) for a, b in zip(outputs, reference))
    if not worst <= bound:
        raise DeployError(f'differs from {what}, by {worst:.2g}, more than {bound:.2g} allows')


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest relative difference of an image, where outputs of an image are no smaller than most."""
    if a.shape != b.shape:
        return math.inf
    if not a.numel():
        return 0.
    a, b = a.flatten(1).double(), b.flatten(1).double()
    size = b.norm(dim=1)
    floor = FLOOR * size.square().mean().sqrt()
    worst = ((a - b).norm(dim=1) / size.maximum(floor).clamp(min=1e-30)).max()  # NaN is the largest
    return float(worst)


def errors(run: Callable[[torch.Tensor], Outputs], trials: Trials, precision: str) -> List[float]:
    """The relative difference that a candidate is judged and reported by.

    Args:
        run: The candidate.
        trials: What to compare on.
        precision: What it computes in.

    Returns:
        ``|a - b| / |b|`` of every output: in int8 on all images together that were held back from calibration, if there
        are any, else on the example.

    Raises:
        DeployError: If there are others, or of other shapes.
    """
    if precision != 'int8' or not trials.held:
        return differences(run(trials.example), trials.reference)
    squares = [[0., 0.] for _ in trials.reference]
    for x, reference in zip(trials.held, trials.held_reference):
        for square, d, b in zip(squares, differences(run(x), reference), reference):
            size = float(b.double().square().sum())
            square[0] += d ** 2 * size
            square[1] += size
    return [math.sqrt(a / max(b, 1e-60)) for a, b in squares]


def differences(outputs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> List[float]:
    """The relative difference of every output, ``|a - b| / |b|``.

    Args:
        outputs: A candidate's.
        reference: The model's.

    Returns:
        A number for each.

    Raises:
        DeployError: If there are others, or of other shapes.
    """
    if [tuple(y.shape) for y in outputs] != [tuple(y.shape) for y in reference]:
        raise DeployError(
            f'gives {[tuple(y.shape) for y in outputs]}, the model {[tuple(y.shape) for y in reference]}')
    return [
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
        for a, b in zip(outputs, reference)
    ]
