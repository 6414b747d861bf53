"""What a plan's maps hold when it is given images, from which maps of bytes take their steps."""
from typing import Dict, Iterator, List, Optional, Sequence

import torch
import torch.nn.functional as F

from .plan import MADE, Plan
from .ranges import Observer, channel_ranges

__all__ = ['calibrate', 'compute', 'evaluate', 'readers']

POSITIONS = 1 << 12  # of each map that its channels' ranges are taken from
MOVED = ('slice', 'pool', 'upsample')


def evaluate(plan: Plan, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Run a plan in float32 with PyTorch.

    Args:
        plan: The plan.
        x: Images ``(B, C, H, W)``.

    Yields:
        Every value, the input first; vectors are maps of one pixel.
    """
    last = readers(plan)
    values: Dict[int, torch.Tensor] = {0: x}
    yield x
    for i in range(len(plan.operations)):
        y = compute(plan, i, values)
        yield y
        values[i + 1] = y
        for k in [k for k in values if last.get(k, -1) <= i and k != i + 1]:
            del values[k]


def readers(plan: Plan) -> Dict[int, int]:
    """The last operation that reads each value, after which it may be forgotten; values that none reads are not there.

    Args:
        plan: The plan.
    """
    last: Dict[int, int] = {}
    for i, op in enumerate(plan.operations):
        read = [*op.get('xs', []), *(op[k] for k in ('x', 'y', 'like') if op.get(k) is not None)]
        last.update(dict.fromkeys(read, i))
    return last


def compute(
        plan: Plan,
        i: int,
        values: Dict[int, torch.Tensor],
        weight: Optional[torch.Tensor] = None,
        bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """What one operation of a plan gives, in float32.

    Args:
        plan: The plan.
        i: Which of its operations.
        values: Those that it reads.
        weight: Of a convolution, instead of the plan's.
        bias: The same.
    """
    op = plan.operations[i]
    kind = op['op']
    v = values[op['xs'][0] if kind == 'cat' else op['x']]
    if kind == 'conv':
        weight = plan.tensors[f'{i}.weight'].float() if weight is None else weight
        bias = plan.tensors[f'{i}.bias'] if bias is None else bias
        return F.conv2d(v, weight, bias, op['stride'], op['pad'], op['dilation'], op['groups'])
    if kind == 'act':
        return activation(v, op['kind'], op['slope'])
    if kind == 'add':
        return v + values[op['y']]
    if kind == 'mul':
        return v * values[op['y']]
    if kind == 'cat':
        return torch.cat([values[k] for k in op['xs']], dim=1)
    if kind == 'slice':
        return v[:, op['start']:op['stop']]
    if kind == 'pool':
        window = dict(kernel_size=op['kernel'], stride=op['stride'], padding=op['pad'], ceil_mode=op['ceil'])
        return F.max_pool2d(v, **window) if op['kind'] == 'max' else F.avg_pool2d(
            v, **window, count_include_pad=op['kind'] == 'mean_padded')
    if kind == 'mean':
        return v.mean((2, 3), keepdim=True)
    if kind == 'upsample':
        like = op['like']
        size = (v.shape[2] * op['scale'], v.shape[3] * op['scale']) if like is None else values[like].shape[2:]
        return F.interpolate(v, size=tuple(size))
    return v.new_zeros(len(v), op['channels'], *v.shape[2:])


def activation(x: torch.Tensor, kind: str, slope: float) -> torch.Tensor:
    """One of the plan's activations.

    Args:
        x: Any tensor.
        kind: Its name.
        slope: Of ``'leaky_relu'`` below zero.

    Returns:
        A tensor of the same shape.
    """
    if kind == 'none':
        return x
    if kind == 'sigmoid':
        return x.sigmoid()
    if kind == 'leaky_relu':
        return F.leaky_relu(x, slope)
    return getattr(F, kind)(x)


def calibrate(plan: Plan, batches: Sequence[torch.Tensor]) -> Plan:
    """Look at what every map holds.

    Args:
        plan: The plan.
        batches: Images ``(B, C, H, W)`` as the network will be given, normalised.

    Returns:
        The same plan, with its ``ranges``.
    """
    generator = torch.Generator().manual_seed(0)
    observers = [Observer(generator) for _ in range(len(plan.operations) + 1)]
    each = max(POSITIONS // len(batches), 1)
    seen: List[List[torch.Tensor]] = [[] for _ in observers]  # by batch, of each channel the ends, (2, C)
    counts = [0] * len(observers)
    with torch.no_grad():
        for batch in batches:
            for k, v in enumerate(evaluate(plan, batch.float())):
                observers[k].see(v)
                v = v.flatten(2)
                at = torch.randperm(len(v) * v.shape[2], generator=generator)[:each].to(v.device)
                some = v[at // v.shape[2], :, at % v.shape[2]].nan_to_num(0.)
                seen[k].append(torch.stack(some.aminmax(dim=0)).cpu())
                counts[k] += len(at)
    # What is only moved keeps the steps that it has: a pooling leaves the largest values, and a range for all others
    # would cut them off.
    ends = [(v[:, 0].amin(0), v[:, 1].amax(0)) for v in map(torch.stack, seen)]
    for i, op in reversed(list(enumerate(plan.operations))):
        if op['op'] in MOVED:
            observers[op['x']].samples += observers[i + 1].samples
            part = slice(op.get('start'), op.get('stop'))
            for before, moved, more in zip(ends[op['x']], ends[i + 1], (torch.minimum, torch.maximum)):
                before[part] = more(before[part], moved)
    image = observers[0]  # whose black and white are to be kept
    ranges = [(image.low, image.high, image.largest), *((*o.range(), o.largest) for o in observers[1:])]
    tensors = dict(plan.tensors)
    for i, op in enumerate(plan.operations):
        low, high, _ = ranges[i + 1]
        if op['op'] in MADE and low < high:
            tensors[f'{i}.range'] = channel_ranges(torch.stack(ends[i + 1], 1), counts[i + 1], (low, high))
    return Plan(plan.input_shape, plan.operations, plan.outputs, tensors, ranges, plan.halves, plan.names)
