"""Which maps stay in bfloat16, where a network in bytes may be off by so much and no more."""
from typing import Callable, Dict, List, Optional, Sequence

import torch

from .build import library
from .calibrate import compute
from .correcting import correct, kept, nearest_bytes
from .fusing import fuse
from .graph import Value
from .plan import Plan

__all__ = ['within']

IMAGES = 4  # by which it is judged what a map costs
DRAWS = 8  # directions of the outputs in which an error is followed back
MORE = 1.5  # as many maps, where those before were not enough


def within(
        plan: Plan,
        batches: Sequence[torch.Tensor],
        error: Callable[[Plan], float],
        bound: float,
        tiles: Optional[bool] = None,
) -> Plan:
    """Correct a plan, and leave as many maps in bfloat16 as it takes.

    What costs most goes first. How much that is, is followed back from the outputs: what a map's rounding, and that of
    the weights that read it, moves them by, to first order. Maps of one concatenation stay together, for they lie side
    by side.

    Args:
        plan: With the ranges of its maps, its weights as exact as there are.
        batches: Images ``(B, C, H, W)`` as the network will be given, normalised.
        error: Of a corrected plan.
        bound: What the error shall not exceed.
        tiles: Whether the engine multiplies in tiles; by default as it does here.

    Returns:
        The first corrected plan that keeps the bound; if none does, the one with the least error.
    """
    tiles = bool(library().csp_tiles()) if tiles is None else tiles
    best = correct(plan, batches, tiles)
    least = first = error(best)
    if least <= bound:
        return best
    costs = _costs(plan, batches[0][:IMAGES].detach().float().cpu(), tiles)
    order = sorted(costs, key=lambda group: -costs[group])
    total, left, count = sum(costs.values()), sum(costs.values()), 0
    while count < len(order) and first ** 2 * left > bound ** 2 * total:  # as if errors were independent
        left -= costs[order[count]]
        count += 1
    count = max(count, 1)
    while order:
        halves = sorted(v for group in order[:count] for v in group)
        found = correct(Plan(plan.input_shape, plan.operations, plan.outputs, plan.tensors, plan.ranges, halves,
                             plan.names), batches, tiles)
        now = error(found)
        if now < least:
            best, least = found, now
        if now <= bound or count == len(order):
            break
        count = min(max(int(count * MORE), count + 1), len(order))
    return best


def _groups(plan: Plan, stored: Dict[int, Value]) -> List[tuple]:
    """The maps in bytes that are better left so together, each once."""
    root = list(range(len(plan.operations) + 1))

    def find(v: int) -> int:
        while root[v] != v:
            v = root[v]
        return v

    for i, op in enumerate(plan.operations):
        for v in op['xs'] if op['op'] == 'cat' else [op['x']] if op['op'] in ('slice', 'pool', 'upsample') else []:
            root[find(v)] = find(i + 1)
    groups: Dict[int, List[int]] = {}
    for v, value in stored.items():
        if value.is8:
            groups.setdefault(find(v), []).append(v)
    return [tuple(group) for group in groups.values()]


def _costs(plan: Plan, x: torch.Tensor, tiles: bool) -> Dict[tuple, float]:
    """Of each group of maps about the square of the error that its rounding brings to the outputs."""
    height, width = x.shape[2:]
    layers, maps = fuse(plan, height, width, 'int8', tiles)
    written = {id(v) for layer in layers for v in layer.outs}
    stored = {i: v for i, v in enumerate(maps) if id(v) in written and i}
    groups = _groups(plan, stored)
    place = {v: group for group in groups for v in group}
    costs = dict.fromkeys(groups, 0.)
    with torch.enable_grad():
        values: Dict[int, torch.Tensor] = {0: x.requires_grad_()}
        for i in range(len(plan.operations)):
            values[i + 1] = compute(plan, i, values)
        outputs = [values[v] for v, _ in plan.outputs]
        errors: List[tuple] = []  # whose cost, where it is, and what it is
        for v in place:
            errors.append((place[v], v, _centred(kept(values[v], maps[v]) - values[v])))
        for i, op in enumerate(plan.operations):
            source = op.get('x')
            while source and source not in place and plan.operations[source - 1]['op'] == 'slice':
                source = plan.operations[source - 1]['x']
            if op['op'] == 'conv' and source in place:
                weight = plan.tensors[f'{i}.weight'].float()
                if not (weight.shape[1] == 1 and op['groups'] > 1):
                    change = nearest_bytes(weight, maps[op['x']], op['groups']) - weight
                    moved = compute(plan, i, values, change, torch.zeros(len(weight)))
                    errors.append((place[source], i + 1, _centred(moved)))
        generator = torch.Generator().manual_seed(0)
        for draw in range(DRAWS):
            signs = [torch.randint(0, 2, y.shape, generator=generator) * 2 - 1 for y in outputs]
            loss = torch.stack([
                (y * sign).sum() / y.detach().norm().clamp(min=1e-30) for y, sign in zip(outputs, signs)]).sum()
            grads = torch.autograd.grad(
                loss, [values[v] for _, v, _ in errors], retain_graph=draw < DRAWS - 1, allow_unused=True)
            for (group, _, moved), grad in zip(errors, grads):
                if grad is not None:
                    costs[group] += float((grad * moved).flatten(1).sum(1).square().sum())
    return costs


def _centred(error: torch.Tensor) -> torch.Tensor:
    """Without the mean of each channel, which biases make good."""
    error = error.detach()
    return error - error.mean((0, 2, 3), keepdim=True)
