"""What rounding to bytes does to a network, made good layer after layer in the numbers that cost no time.

A layer reads maps that the layers before have rounded, and its weights are rounded too. Weights and bias are fitted
anew, so that of the rounded maps the layer gives what it gave of the exact ones. Each weight that is then rounded
leaves an error, which those not yet rounded take over as far as they can (Frantar and Alistarh, *Optimal Brain
Compression*, 2022; Frantar et al., *GPTQ*, 2022), in the order of how much of them is read.
"""
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from .build import library
from .calibrate import compute, readers
from .fusing import fuse
from .graph import Value
from .plan import Plan

__all__ = ['PARTS', 'correct', 'kept', 'nearest_bytes']

PARTS = ('means', 'weights', 'rounding')  # of the correction, which are measured by themselves too
ROWS = 4, 1 << 11, 1 << 13  # positions of a map that weights are fitted to: for each weight; at least, and at most
COLUMNS = 1 << 10  # weights of an output channel that are fitted at a time
MEMORY = 1 << 29  # bytes of the maps that are looked at, in float32
RIDGES = (0.01, 0.1, 1.)  # of the mean square of what is read, that a fitted weight is held to its old value by
DAMPING = 0.01  # the same, for the rounding
ENOUGH = 4  # weights of an output channel to a position, above which there is nothing to fit them to
HELD_BACK = 4  # one image of so many is not fitted to, but decides by which ridge

Rounding = Callable[[torch.Tensor, int], torch.Tensor]


def correct(
        plan: Plan,
        batches: Sequence[torch.Tensor],
        tiles: Optional[bool] = None,
        parts: Sequence[str] = PARTS,
) -> Plan:
    """Fit weights and biases to what the layers before leave of the maps in bytes.

    Args:
        plan: With the ranges of its maps, its weights as exact as there are.
        batches: Images ``(B, C, H, W)`` as the network will be given, normalised.
        tiles: Whether the engine multiplies in tiles, which have bfloat16 for images; by default as it does here.
        parts: What is done: ``'means'`` of the sums are corrected, ``'weights'`` fitted, and in ``'rounding'`` errors
            taken over by the weights that follow.

    Returns:
        The same plan with other weights and biases, and for weights in bytes what their steps stand for.
    """
    tiles = bool(library().csp_tiles()) if tiles is None else tiles
    height, width = batches[0].shape[2:]
    shapes = plan.shapes(height, width)
    layers, maps = fuse(plan, height, width, 'int8', tiles)
    stored = {id(v) for layer in layers for v in layer.outs}
    live = 4 * sum(sorted((c * h * w for c, h, w in shapes), reverse=True)[:4])  # about what lives at a time
    batches = _some(batches, max(MEMORY // live, 1))
    exact = [{0: batch} for batch in batches]
    rounded = [{0: kept(batch, maps[0])} for batch in batches]
    tensors = dict(plan.tensors)
    last = readers(plan)
    with torch.no_grad():
        for i, op in enumerate(plan.operations):
            weight = bias = None
            wanted = [compute(plan, i, values) for values in exact]
            if op['op'] == 'conv':
                read = [values[op['x']] for values in rounded]
                for name, tensor in _fit(plan, i, maps[op['x']], read, wanted, parts).items():
                    tensors[f'{i}.{name}'] = tensor
                weight, bias = tensors[f'{i}.weight'].float(), tensors[f'{i}.bias']
            for values, others, y in zip(exact, rounded, wanted):
                result = compute(plan, i, others, weight, bias)
                others[i + 1] = kept(result, maps[i + 1]) if id(maps[i + 1]) in stored else result
                values[i + 1] = y
                for k in [k for k in values if last.get(k, -1) <= i]:
                    del values[k], others[k]
    return Plan(plan.input_shape, plan.operations, plan.outputs, tensors, plan.ranges, plan.halves, plan.names)


def _some(batches: Sequence[torch.Tensor], most: int) -> List[torch.Tensor]:
    """Of all batches the same share of images, so many at most together; and one of each at least."""
    total = sum(map(len, batches))
    chosen = list(batches)[:most]
    if total > most:
        chosen = [b[:max(most * len(b) // total, 1)] for b in chosen]
    return [b.detach().float().cpu() for b in chosen]


def kept(x: torch.Tensor, value: Value) -> torch.Tensor:
    """A map as the engine keeps it.

    Args:
        x: What it is exactly.
        value: How it lies in memory.
    """
    if not value.is8:
        return x.bfloat16().float()
    scale, zero = (v.view(-1, 1, 1) for v in (value.scale, value.zero))  # type: ignore[union-attr]
    return (x / scale + zero).round_().clamp_(0, 255).sub_(zero).mul_(scale)


def nearest_bytes(weight: torch.Tensor, read: Value, groups: int) -> torch.Tensor:
    """Weights as the nearest bytes would have them.

    Args:
        weight: ``(O, C, kh, kw)``.
        read: The map in bytes that they are multiplied by.
        groups: Of the convolution.
    """
    assert read.scale is not None
    steps = read.scale.view(groups, 1, -1).expand(-1, len(weight) // groups, -1)
    steps = steps.reshape(len(weight), -1)[..., None, None]
    unit = (weight * steps).flatten(1).abs().amax(1).clamp(min=1e-30)[:, None, None, None] / 127
    return (weight * steps / unit).round() * unit / steps


def _fit(plan: Plan, i: int, read: Value, inputs: List[torch.Tensor], wanted: List[torch.Tensor],
         parts: Sequence[str]) -> Dict[str, torch.Tensor]:
    """Weights and bias of a convolution by which it gives what is wanted, and the steps of weights in bytes.

    Args:
        plan: The plan.
        i: Which of its operations.
        read: The map that it reads.
        inputs: That map, as it has been rounded.
        wanted: What the convolution gives of the exact one.
        parts: What is done.
    """
    op, weight, bias = plan.operations[i], plan.tensors[f'{i}.weight'].float(), plan.tensors[f'{i}.bias']
    groups, (out, per_group, *kernel) = op['groups'], weight.shape
    x, y, image = _sample(inputs, wanted, op, per_group * kernel[0] * kernel[1], kernel)
    if not bool(x.isfinite().all() and y.isfinite().all()):
        return {}
    # Few positions say nothing of many weights, which are then rounded to the nearest.
    enough = len(x) * ENOUGH >= per_group * kernel[0] * kernel[1] and int(image.max()) > 0
    held = (image % HELD_BACK == 1) & enough
    rows, fitted, found = out // groups, weight.flatten(1).clone(), {}
    if per_group == 1 and groups == out > 1:  # depthwise, whose weights are not rounded
        given = torch.einsum('nct,ct->nc', x, fitted)
    else:
        units, sums = torch.zeros(out), []
        for g in range(groups):
            mine, channels = slice(g * rows, (g + 1) * rows), slice(g * per_group, (g + 1) * per_group)
            part = x[:, channels].flatten(1)
            steps = None if read.scale is None else read.scale[channels].repeat_interleave(kernel[0] * kernel[1])
            fitted[mine], units[mine] = _fit_group(fitted[mine], part, y[:, mine], held, steps, parts)
            sums.append(part @ fitted[mine].T)
        given = torch.cat(sums, 1)
        found['weight'] = fitted.view_as(weight).bfloat16()  # of which the byte follows from the step
        if read.is8:
            found['unit'] = units
    if 'means' not in parts:
        return found
    error = y - given - bias
    mean = error.mean(0)
    if int(image.max()) > 0:  # what is in one image goes together
        error = torch.stack([error[image == k].mean(0) for k in range(int(image.max()) + 1)])
    # No more of the mean than stands out of the noise, of few positions or images.
    noise = error.var(0) / len(error) if len(error) > 1 else mean.square()
    found['bias'] = bias + mean * mean.square() / (mean.square() + noise).clamp(min=1e-30)
    return found


def _sample(inputs: List[torch.Tensor], wanted: List[torch.Tensor], op: Dict[str, Any], weights: int,
            kernel: Sequence[int]) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of some positions what is read ``(N, C, taps)``, what is to be given ``(N, O)``, and of which image they are."""
    generator = torch.Generator().manual_seed(0)
    images = sum(map(len, inputs))
    enough = min(max(ROWS[0] * weights, ROWS[1]), ROWS[2], MEMORY // (16 * weights))
    each = max(enough // images, 1)
    read, given, image = [], [], []
    number = 0
    for x, y in zip(inputs, wanted):
        height, width = y.shape[2:]
        around = F.pad(x, (op['pad'][1],) * 2 + (op['pad'][0],) * 2)
        for n in range(len(x)):
            count = min(each, height * width)
            at = torch.randperm(height * width, generator=generator)[:count]
            rows, columns = at // width * op['stride'], at % width * op['stride']
            taps = [around[n][:, rows + ky * op['dilation'], columns + kx * op['dilation']]
                    for ky in range(kernel[0]) for kx in range(kernel[1])]
            read.append(torch.stack(taps).permute(2, 1, 0))
            given.append(y[n].flatten(1)[:, at].T)
            image.append(torch.full((count,), number))
            number += 1
    return torch.cat(read), torch.cat(given), torch.cat(image)


def _fit_group(weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor, held: torch.Tensor,
               steps: Optional[torch.Tensor], parts: Sequence[str]) -> Tuple[torch.Tensor, torch.Tensor]:
    """Weights ``(O, K)`` and what their steps stand for.

    Args:
        weight: As they are.
        x: What is read, ``(N, K)``.
        y: What is to be given, ``(N, O)``.
        held: Which of N decide how far the weights may go.
        steps: Of each weight what a step of what it is multiplied by stands for; None if that is not in bytes.
        parts: What is done.
    """
    weight = weight.clone()
    x = x - x.mean(0)
    left = y - y.mean(0) - x @ weight.T
    unit = torch.zeros(len(weight))
    for start in range(0, weight.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        old, columns = weight[:, part], x[:, part]
        square = columns.T @ columns / len(columns)
        new = old + _step(columns, left, held, square) if 'weights' in parts else old
        if start == 0 and steps is not None:  # of all columns, of which the others will change little
            unit = (torch.cat([new, weight[:, COLUMNS:]], 1) * steps).abs().amax(1).clamp(min=1e-30) / 127
        rounding = _to_bytes(steps[part], unit) if steps is not None else _to_bfloat16
        new = _rounded(new, columns, held if 'rounding' in parts else torch.zeros_like(held), rounding)
        left = left - columns @ (new - old).T
        weight[:, part] = new
    return weight, unit


def _rounded(weight: torch.Tensor, x: torch.Tensor, held: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Weights ``(O, K)`` rounded, each output channel so as is better on what was held back."""
    nearest = torch.stack([rounding(weight[:, k], k) for k in range(weight.shape[1])], 1)
    if not bool(held.any()):
        return nearest
    fit = x[~held]
    ordered = _round(weight, fit.T @ fit / len(fit), rounding)
    lost = [(x[held] @ (found - weight).T).square().sum(0) for found in (ordered, nearest)]
    return torch.where((lost[0] < lost[1])[:, None], ordered, nearest)


def _step(x: torch.Tensor, left: torch.Tensor, held: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """How the weights of some columns have to change so that least is left; not at all if that does not carry over."""
    if not bool(held.any()):
        return x.new_zeros(left.shape[1], x.shape[1])
    fit, check = ~held, held
    best, least = None, float(left[check].square().sum())
    part = x[fit].T @ x[fit] / int(fit.sum())
    towards = x[fit].T @ left[fit] / int(fit.sum())
    for ridge in RIDGES:
        change = _solve(part, towards, ridge)
        error = float((left[check] - x[check] @ change).square().sum())
        if error < least:
            best, least = ridge, error
    if best is None:
        return x.new_zeros(left.shape[1], x.shape[1])
    return _solve(square, x.T @ left / len(x), best).T


def _solve(square: torch.Tensor, towards: torch.Tensor, ridge: float) -> torch.Tensor:
    factor = torch.linalg.cholesky(_damped(square, ridge))
    return torch.cholesky_solve(towards.double(), factor).float()


def _damped(square: torch.Tensor, share: float) -> torch.Tensor:
    """With so much of the mean of its diagonal added to that."""
    square = square.double()
    return square + torch.eye(len(square), dtype=torch.double) * (share * float(square.diagonal().mean()) + 1e-20)


def _round(weight: torch.Tensor, square: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Round column after column; those that follow make good what they can of its error.

    Args:
        weight: ``(O, K)``.
        square: ``(K, K)``, the mean products of what the columns are multiplied by.
        rounding: Of numbers, and which column they are.
    """
    order = square.diagonal().argsort(descending=True)
    damped = _damped(square[order][:, order], DAMPING)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    upper = (upper / upper.diagonal()[:, None]).float()
    weight = weight[:, order].T.contiguous()  # (K, O)
    result = torch.empty_like(weight)
    for start in range(0, len(weight), 64):
        stop = min(start + 64, len(weight))
        errors = []
        for k in range(start, stop):
            column = rounding(weight[k], int(order[k]))
            error = weight[k] - column
            result[order[k]] = column
            weight[k + 1:stop] -= upper[k, k + 1:stop, None] * error
            errors.append(error)
        weight[stop:] -= upper[start:stop, stop:].T @ torch.stack(errors)
    return result.T.contiguous()


def _to_bytes(steps: torch.Tensor, unit: torch.Tensor) -> Rounding:
    return lambda column, k: (column * steps[k] / unit).round().clamp(-127, 127) * unit / steps[k]


def _to_bfloat16(column: torch.Tensor, k: int) -> torch.Tensor:
    return column.bfloat16().float()
