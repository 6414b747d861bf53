"""Every operation of a plan, slow and obvious, in float64: what the native engine is held to.

Nothing here is shared with the engine but the plan's own words. A map is an array ``(B, C, H, W)``.
"""
import math
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch

Range = Tuple[float, float, float]


def taps(x: np.ndarray, kernel: Tuple[int, int], stride: int, pad: Any, dilation: int, out: Tuple[int, int],
         outside: float) -> Iterator[Tuple[int, int, np.ndarray]]:
    """Of each tap of a window its row and column, and what it reads for every position of the result."""
    reach = [(n - 1) * stride + (k - 1) * dilation + 1 for n, k in zip(out, kernel)]
    more = [max(0, r - size - p) for r, size, p in zip(reach, x.shape[2:], pad)]
    around = np.pad(x, ((0, 0), (0, 0), (pad[0], more[0]), (pad[1], more[1])), constant_values=outside)
    for ky in range(kernel[0]):
        for kx in range(kernel[1]):
            y0, x0 = ky * dilation, kx * dilation
            y1, x1 = y0 + (out[0] - 1) * stride + 1, x0 + (out[1] - 1) * stride + 1
            yield ky, kx, around[:, :, y0:y1:stride, x0:x1:stride]


def convolution(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, op: Dict[str, Any]) -> np.ndarray:
    """A convolution: its taps one after the other."""
    n, per_group, kh, kw = weight.shape
    stride, pad, d, groups = op['stride'], op['pad'], op['dilation'], op['groups']
    out_h, out_w = ((size + 2 * p - d * (k - 1) - 1) // stride + 1 for size, p, k in zip(x.shape[2:], pad, (kh, kw)))
    y = np.zeros((len(x), n, out_h, out_w)) + bias[:, None, None]
    for ky, kx, pixels in taps(x, (kh, kw), stride, pad, d, (out_h, out_w), 0.):
        for g in range(groups):
            mine = slice(g * n // groups, (g + 1) * n // groups)
            read = pixels[:, g * per_group:(g + 1) * per_group]
            y[:, mine] += np.einsum('bchw,nc->bnhw', read, weight[mine, :, ky, kx])
    return y


def pooling(x: np.ndarray, op: Dict[str, Any], out_h: int, out_w: int) -> np.ndarray:
    """A pooling; what hangs over the padded map counts for nothing."""
    kernel, pad = op['kernel'], op['pad']

    def all_taps(v: np.ndarray, pad: Any, outside: float) -> np.ndarray:
        return np.stack([t for *_, t in taps(v, kernel, op['stride'], pad, 1, (out_h, out_w), outside)])

    if op['kind'] == 'max':
        return all_taps(x, pad, -np.inf).max(0)
    there = np.ones((1, 1, *x.shape[2:]))
    if op['kind'] == 'mean_padded':
        there = np.pad(there, ((0, 0), (0, 0), (pad[0], pad[0]), (pad[1], pad[1])), constant_values=1.)
        pad_of_count = (0, 0)
    else:
        pad_of_count = pad
    return all_taps(x, pad, 0.).sum(0) / all_taps(there, pad_of_count, 0.).sum(0)


def activation(x: np.ndarray, kind: str, slope: float) -> np.ndarray:
    """One of the plan's activations."""
    with np.errstate(over='ignore'):
        sigmoid = 1 / (1 + np.exp(-x))
        return {
            'none': lambda: x,
            'relu': lambda: np.maximum(x, 0),
            'relu6': lambda: np.clip(x, 0, 6),
            'leaky_relu': lambda: np.where(x < 0, x * slope, x),
            'sigmoid': lambda: sigmoid,
            'silu': lambda: x * sigmoid,
            'hardsigmoid': lambda: np.clip(x / 6 + 0.5, 0, 1),
            'hardswish': lambda: x * np.clip(x / 6 + 0.5, 0, 1),
            'mish': lambda: x * np.tanh(np.log1p(np.exp(np.minimum(x, 700.)))),
        }[kind]()


def nearest(size: int, out: int) -> List[int]:
    """The rows that PyTorch's nearest neighbour takes: it multiplies in float32."""
    scale = np.float32(size) / np.float32(out)
    return [min(size - 1, math.floor(np.float32(i) * scale)) for i in range(out)]


def operation(plan: Any, i: int, values: List[Optional[np.ndarray]], shape: Tuple[int, int, int],
              weight: Optional[np.ndarray] = None, bias: Optional[np.ndarray] = None) -> np.ndarray:
    """What an operation gives, of the values that it reads.

    Args:
        plan: The plan.
        i: Which of its operations.
        values: The plan's values, those that the operation reads being there.
        shape: Of the result.
        weight: Of a convolution, instead of the plan's.
        bias: The same.
    """
    op = plan.operations[i]
    kind = op['op']
    xs = [values[v] for v in (op['xs'] if kind == 'cat' else [op[k] for k in ('x', 'y') if k in op])]
    x: Any = xs[0]
    if kind == 'conv':
        weight = plan.tensors[f'{i}.weight'].double().numpy() if weight is None else weight
        return convolution(x, weight, plan.tensors[f'{i}.bias'].double().numpy() if bias is None else bias, op)
    if kind == 'act':
        return activation(x, op['kind'], op['slope'])
    if kind == 'add':
        return x + xs[1]
    if kind == 'mul':
        return x * xs[1]
    if kind == 'cat':
        return np.concatenate(xs, axis=1)  # type: ignore[arg-type]
    if kind == 'slice':
        return x[:, op['start']:op['stop']]
    if kind == 'pool':
        return pooling(x, op, *shape[1:])
    if kind == 'mean':
        return x.mean((2, 3), keepdims=True)
    if kind == 'upsample':
        return x[:, :, nearest(x.shape[2], shape[1])][:, :, :, nearest(x.shape[3], shape[2])]
    assert kind == 'zeros'
    return np.zeros((len(x), *shape))


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded as maps in bfloat16 are."""
    return torch.from_numpy(x).float().bfloat16().double().numpy()


def step_and_zero(numbers: Range, smallest: float) -> Tuple[float, float]:
    """What a step of a map in bytes stands for, and which byte stands for zero."""
    low, high, _ = numbers
    step = (high - low) / 255
    step = step if step > smallest else 2. ** -14 if low == high else smallest
    return float(np.float32(step)), float(round(-low / step))


def steps_and_zeros(plan: Any, k: int, smallest: float, alone: bool = True) -> Tuple[np.ndarray, np.ndarray]:
    """The same for each channel of a plan's value ``k``, ``(C, 1, 1)``; of all that has one range ``(1, 1, 1)``.

    Args:
        plan: The plan.
        k: The value.
        smallest: A step at least.
        alone: Whether channels have the ranges of their own, where the plan has such.
    """
    each = plan.tensors.get(f'{k - 1}.range') if alone else None
    ranges = [plan.ranges[k]] if each is None else [(low, high, 0.) for low, high in each.tolist()]
    found = np.array([step_and_zero(numbers, smallest) for numbers in ranges])
    return found[:, :1, None], found[:, 1:, None]


def to_bytes(x: np.ndarray, step: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Rounded as maps in bytes are, and what does not fit cut off."""
    return (np.clip(np.rint(x / step + zero), 0, 255) - zero) * step


def weights_in_bytes(weight: np.ndarray, scales: np.ndarray, groups: int, peak: float, clamp: bool,
                     units: Optional[np.ndarray] = None) -> np.ndarray:
    """A convolution's weights as bytes: a unit for each output channel, of weight times the steps of what is read.

    Args:
        weight: As it is.
        scales: What a step of each of the input's channels stands for.
        groups: Of the convolution.
        peak: The largest magnitude that its sums have shown.
        clamp: Whether what follows needs room for sums up to two.
        units: The units, where the plan has them; what is beyond 127 of them is cut off.
    """
    n, per_group = weight.shape[:2]
    limit = max(2 * peak, 2.) if clamp else 2 * peak
    result = np.empty_like(weight)
    for k in range(n):
        first = k * groups // n * per_group
        scaled = weight[k] * scales[first:first + per_group, None, None]
        unit = max(np.abs(scaled).max() / 127 if units is None else units[k], limit / 2 ** 30, 1e-30)
        result[k] = np.clip(np.rint(scaled / unit), -127, 127) * unit / scales[first:first + per_group, None, None]
    return result


def run(plan: Any, x: np.ndarray, rounded: str = 'no', smallest: float = 1e-20) -> List[np.ndarray]:
    """All values of a plan.

    Args:
        plan: The plan.
        x: Images.
        rounded: ``'no'``, or every value as a map in ``'bfloat16'`` or ``'int8'``, whether the engine keeps it or not.
        smallest: A step of bytes at least.
    """
    def kept(v: np.ndarray, k: int) -> np.ndarray:
        if rounded == 'no':
            return v
        v = to_bfloat16(v)
        return v if rounded == 'bfloat16' else to_bytes(v, *steps_and_zeros(plan, k, smallest))

    shapes = plan.shapes(*x.shape[2:])
    values: List[Any] = [kept(x, 0)]
    for i in range(len(plan.operations)):
        value = operation(plan, i, values, shapes[i + 1])
        # What is only moved keeps the steps that it has.
        moved = plan.operations[i]['op'] in ('slice', 'pool', 'upsample') and rounded == 'int8'
        values.append(value if moved else kept(value, i + 1))
    return values
