"""What a plan's maps hold when it is given images, from which maps of bytes take their steps."""
from typing import Dict, Iterator, Sequence, Tuple

import torch
import torch.nn.functional as F

from .plan import Plan

__all__ = ['calibrate', 'evaluate']

SAMPLES = 1 << 12  # values kept of each map of each batch
MOST = 1 << 14  # of all batches together
SHARES = torch.linspace(1., 0.3, 29)  # of a map's largest value that are tried for the last step


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
    count = len(plan.operations) + 1
    low, high, samples = [0.] * count, [0.] * count, [[] for _ in range(count)]  # type: ignore[var-annotated]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for batch in batches:
            for i, v in enumerate(evaluate(plan, batch.float())):
                low[i], high[i] = min(low[i], float(v.min())), max(high[i], float(v.max()))
                v = v.flatten()
                if len(v) > SAMPLES:
                    v = v[torch.randint(len(v), (SAMPLES,), generator=generator)]
                samples[i].append(v)
    ranges = [(low[0], high[0], max(-low[0], high[0]))]  # of images black and white are to be kept
    for a, b, s in zip(low[1:], high[1:], samples[1:]):
        values = torch.cat(s)
        if len(values) > MOST:
            values = values[torch.randperm(len(values), generator=generator)[:MOST]]
        ranges.append((*best_range(values, a, b), max(-a, b)))
    return Plan(plan.input_shape, plan.operations, plan.outputs, plan.tensors, ranges)


def best_range(values: torch.Tensor, low: float, high: float) -> Tuple[float, float]:
    """The range whose 256 steps leave the least squared error, which may clip a few values.

    Args:
        values: A sample.
        low: The least value there is, not above zero.
        high: The greatest, not below.

    Returns:
        The range's ends.
    """
    def least(lows: torch.Tensor, highs: torch.Tensor) -> Tuple[float, float]:
        steps = ((highs - lows) / 255).clamp(min=1e-30)[:, None]
        zeros = (-lows[:, None] / steps).round()
        rounded = (values / steps + zeros).round().clamp(0, 255)
        k = int(((rounded - zeros) * steps - values).square().mean(dim=1).argmin())
        return float(lows[k]), float(highs[k])

    ones = torch.ones_like(SHARES)
    _, high = least(low * ones, high * SHARES)
    low, _ = least(low * SHARES, high * ones)
    return low, high
