"""What a plan's maps hold when it is given images, from which maps of bytes take their steps."""
from typing import Dict, Iterator, Sequence

import torch
import torch.nn.functional as F

from .plan import Plan
from .ranges import Observer

__all__ = ['calibrate', 'evaluate']


def evaluate(plan: Plan, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Run a plan in float32 with PyTorch.

    Args:
        plan: The plan.
        x: Images ``(B, C, H, W)``.

    Yields:
        Every value, the input first; vectors are maps of one pixel.
    """
    uses: Dict[int, int] = {}  # the last operation that reads a value, after which it is forgotten
    for i, op in enumerate(plan.operations):
        read = [*op.get('xs', []), *(op[k] for k in ('x', 'y', 'like') if op.get(k) is not None)]
        uses.update(dict.fromkeys(read, i))
    values: Dict[int, torch.Tensor] = {0: x}
    yield x
    for i, op in enumerate(plan.operations):
        kind = op['op']
        v = values[op['xs'][0] if kind == 'cat' else op['x']]
        if kind == 'conv':
            y = F.conv2d(v, plan.tensors[f'{i}.weight'].float(), plan.tensors[f'{i}.bias'], op['stride'], op['pad'],
                         op['dilation'], op['groups'])
        elif kind == 'act':
            y = activation(v, op['kind'], op['slope'])
        elif kind == 'add':
            y = v + values[op['y']]
        elif kind == 'mul':
            y = v * values[op['y']]
        elif kind == 'cat':
            y = torch.cat([values[k] for k in op['xs']], dim=1)
        elif kind == 'slice':
            y = v[:, op['start']:op['stop']]
        elif kind == 'pool':
            window = dict(kernel_size=op['kernel'], stride=op['stride'], padding=op['pad'], ceil_mode=op['ceil'])
            y = F.max_pool2d(v, **window) if op['kind'] == 'max' else F.avg_pool2d(
                v, **window, count_include_pad=op['kind'] == 'mean_padded')
        elif kind == 'mean':
            y = v.mean((2, 3), keepdim=True)
        elif kind == 'upsample':
            like = op['like']
            size = (v.shape[2] * op['scale'], v.shape[3] * op['scale']) if like is None else values[like].shape[2:]
            y = F.interpolate(v, size=tuple(size))
        else:
            y = v.new_zeros(len(v), op['channels'], *v.shape[2:])
        yield y
        values[i + 1] = y
        for k in [k for k in values if uses.get(k, -1) <= i and k != i + 1]:
            del values[k]


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
    with torch.no_grad():
        for batch in batches:
            for observer, v in zip(observers, evaluate(plan, batch.float())):
                observer.see(v)
    image = observers[0]  # whose black and white are to be kept
    ranges = [(image.low, image.high, image.largest), *((*o.range(), o.largest) for o in observers[1:])]
    return Plan(plan.input_shape, plan.operations, plan.outputs, plan.tensors, ranges)
