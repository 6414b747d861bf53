"""What a network computes, as data: a list of operations that is checked before anything believes it."""
import json
import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch

__all__ = ['ACTIVATIONS', 'Plan', 'UnsupportedNetwork']

ACTIVATIONS = ('none', 'relu', 'leaky_relu', 'silu', 'hardswish', 'hardsigmoid', 'sigmoid', 'mish', 'relu6')
MADE = ('conv', 'act', 'add', 'mul')  # operations that give numbers of their own, and do not move others'
POOLS = ('max', 'mean', 'mean_padded')

# What a plan may ask for at most; far above any network, far below what overflows.
MAX_SIDE, MAX_CHANNELS, MAX_OPERATIONS, MAX_KERNEL, MAX_ELEMENTS = 1 << 14, 1 << 16, 1 << 12, 64, 1 << 28
MAX_JOINED, MAX_OUTPUTS = 1 << 10, 1 << 8
MAX_WORK = 1 << 44  # multiplications of an image: seconds, and thousands of times what a network has

Shape = Tuple[int, int, int]
Range = Tuple[float, float, float]


class UnsupportedNetwork(ValueError):
    """A network with an operation that the native engine does not know; the message names it."""


_FIELDS: Dict[str, Tuple[str, ...]] = {
    'conv': ('x', 'stride', 'pad', 'dilation', 'groups'),
    'act': ('x', 'kind', 'slope'),
    'add': ('x', 'y'),
    'mul': ('x', 'y'),
    'cat': ('xs',),
    'slice': ('x', 'start', 'stop'),
    'pool': ('x', 'kind', 'kernel', 'stride', 'pad', 'ceil'),
    'mean': ('x',),
    'upsample': ('x', 'scale', 'like'),
    'zeros': ('x', 'channels'),
}


class Plan:
    """A network as a list of operations over maps of ``(channels, height, width)``.

    Value 0 is the input, value ``i + 1`` what operation ``i`` gives; an operation names the earlier values it reads.
    """

    def __init__(
            self,
            input_shape: Shape,
            operations: List[Dict[str, Any]],
            outputs: List[Tuple[int, bool]],
            tensors: Dict[str, torch.Tensor],
            ranges: Optional[List[Range]] = None,
            halves: Sequence[int] = (),
            names: Sequence[str] = (),
    ) -> None:
        """
        Args:
            input_shape: Channels, height and width of the image the network was read at.
            operations: What is computed, each a dictionary with ``op`` and the fields of that operation.
            outputs: Values that are returned, each with True if it is a vector and not a map.
            tensors: ``'<i>.weight'`` and ``'<i>.bias'`` of each convolution ``i``; and, where its weights in bytes have
                been chosen, ``'<i>.unit'``, of each output channel what a step of them stands for, times a step of what
                is read. For maps of bytes, ``'<i>.range'``, ``(C, 2)``: for each channel of what operation ``i`` gives,
                a range of its own instead of that of ``ranges``.
            ranges: For maps of bytes, of the input and of what each operation gives, the ends of the range that 256
                steps shall cover, with zero between them, and the largest magnitude that is expected at all.
            halves: Of a plan with ranges, the values that stay in bfloat16.
            names: Of each operation what the network calls the module that it comes from; for people, and not kept.

        Raises:
            ValueError: If anything of it is not as it must be; the message names the field.
        """
        self.input_shape = input_shape
        self.operations = operations
        self.outputs = outputs
        self.tensors = tensors
        self.ranges = ranges
        self.halves = list(halves) if isinstance(halves, (list, tuple)) else halves
        self.names = list(names)
        self._check()
        self.shapes(*input_shape[1:])

    def to_bytes(self) -> Tuple[str, Dict[str, torch.Tensor]]:
        """The plan as JSON, and its tensors."""
        text = json.dumps({'format': 1, 'input': self.input_shape, 'operations': self.operations,
                           'outputs': self.outputs, 'ranges': self.ranges, 'halves': self.halves})
        return text, dict(self.tensors)

    @classmethod
    def from_bytes(cls, text: str, tensors: Dict[str, torch.Tensor]) -> 'Plan':
        """Read what :meth:`to_bytes` gave, from a stranger for all one knows.

        Args:
            text: The JSON.
            tensors: The tensors.

        Returns:
            The plan, every field of it checked.

        Raises:
            ValueError: If anything of it is not as it must be; the message names the field.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'The plan is no JSON: {error}') from None
        if not isinstance(data, dict) or data.get('format') != 1:
            raise ValueError('The plan\'s field \'format\' is not 1.')
        for key in ('input', 'operations', 'outputs'):
            if not isinstance(data.get(key), list):
                raise ValueError(f'The plan\'s field {key!r} is no list.')
        shape = tuple(_integer(v, f'input[{i}]', 1, MAX_CHANNELS) for i, v in enumerate(data['input']))
        if len(shape) != 3:
            raise ValueError(f'The plan\'s field \'input\' has {len(shape)} numbers, not 3.')
        outputs = []
        for i, item in enumerate(data['outputs']):
            if not isinstance(item, list) or len(item) != 2 or not isinstance(item[1], bool):
                raise ValueError(f'The plan\'s field outputs[{i}] is no pair of a number and a truth value.')
            outputs.append((_integer(item[0], f'outputs[{i}]', 0, MAX_OPERATIONS), item[1]))
        return cls((shape[0], shape[1], shape[2]), data['operations'], outputs, tensors, data.get('ranges'),
                   data.get('halves', ()))

    def _check(self) -> None:
        """Types and ranges of all that does not depend on the size of the image."""
        _integer(self.input_shape[0], 'input[0]', 1, MAX_CHANNELS)
        if not self.outputs:
            raise ValueError('The plan\'s field \'outputs\' is empty.')
        if len(self.outputs) > MAX_OUTPUTS:
            raise ValueError(f'The plan\'s field \'outputs\' has over {MAX_OUTPUTS} entries.')
        if len(self.operations) > MAX_OPERATIONS:
            raise ValueError(f'The plan\'s field \'operations\' has over {MAX_OPERATIONS} entries.')
        for value, _ in self.outputs:
            _integer(value, 'outputs', 0, len(self.operations))
        if self.ranges is not None and (
                not isinstance(self.ranges, list) or len(self.ranges) != len(self.operations) + 1):
            raise ValueError('The plan\'s field \'ranges\' is no list of one range for each value.')
        for i, numbers in enumerate(self.ranges or []):
            if not isinstance(numbers, (list, tuple)) or len(numbers) != 3 or not all(
                    isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e30 for v in numbers):
                raise ValueError(f'The plan\'s field ranges[{i}] is no three numbers below 1e30.')
            if not numbers[0] <= 0 <= min(numbers[1:]):
                raise ValueError(f'The plan\'s field ranges[{i}] is {numbers}, and has no zero between its ends.')
        if not isinstance(self.halves, list) or len(self.halves) > len(self.operations):
            raise ValueError('The plan\'s field \'halves\' is no list of values.')
        for value in self.halves:
            _integer(value, 'halves', 1, len(self.operations))
        names: set = set()
        for i, op in enumerate(self.operations):
            where = f'operations[{i}]'
            if not isinstance(op, dict) or not isinstance(op.get('op'), str) or op['op'] not in _FIELDS:
                raise ValueError(f'The plan\'s field {where}.op is none of {", ".join(_FIELDS)}.')
            if set(op) != {'op', *_FIELDS[op['op']]}:
                raise ValueError(f'The plan\'s field {where} has other fields than {", ".join(_FIELDS[op["op"]])}.')
            for key in ('x', 'y'):
                if key in op:
                    _integer(op[key], f'{where}.{key}', 0, i)
            if 'xs' in op:
                if not isinstance(op['xs'], list) or not op['xs']:
                    raise ValueError(f'The plan\'s field {where}.xs is no list of values.')
                if len(op['xs']) > MAX_JOINED:
                    raise ValueError(f'The plan\'s field {where}.xs joins more than {MAX_JOINED} maps.')
                for v in op['xs']:
                    _integer(v, f'{where}.xs', 0, i)
            if op['op'] == 'act':
                _choice(op['kind'], f'{where}.kind', ACTIVATIONS)
                if isinstance(op['slope'], bool) or not isinstance(op['slope'], (int, float)) or abs(op['slope']) > 1e6:
                    raise ValueError(f'The plan\'s field {where}.slope is no number.')
            elif op['op'] == 'pool':
                _choice(op['kind'], f'{where}.kind', POOLS)
                _pair(op['kernel'], f'{where}.kernel', 1, MAX_KERNEL)
                _pair(op['pad'], f'{where}.pad', 0, MAX_KERNEL)
                _integer(op['stride'], f'{where}.stride', 1, MAX_KERNEL)
                if not isinstance(op['ceil'], bool):
                    raise ValueError(f'The plan\'s field {where}.ceil is no truth value.')
                if any(p > k // 2 for p, k in zip(op['pad'], op['kernel'])):
                    raise ValueError(f'The plan\'s field {where}.pad is more than half the kernel.')
            elif op['op'] == 'slice':
                _integer(op['start'], f'{where}.start', 0, MAX_CHANNELS)
                _integer(op['stop'], f'{where}.stop', op['start'] + 1, MAX_CHANNELS)
            elif op['op'] == 'upsample':
                _integer(op['scale'], f'{where}.scale', 1, MAX_KERNEL)
                if op['like'] is not None:
                    _integer(op['like'], f'{where}.like', 0, i)
            elif op['op'] == 'zeros':
                _integer(op['channels'], f'{where}.channels', 1, MAX_CHANNELS)
            if f'{i}.range' in self.tensors:
                names.add(f'{i}.range')
                ends = self._tensor(f'{i}.range')
                if op['op'] not in MADE or ends.dtype != torch.float32 or ends.ndim != 2 or ends.shape[1] != 2 or not (
                        bool(((ends[:, 0] <= 0) & (ends[:, 1] >= 0) & (ends.abs() < 1e30).all(1)).all())):
                    raise ValueError(f'The plan\'s tensor {i}.range is no ranges of float32 with zero between their '
                                     f'ends, of what {where} makes.')
            if op['op'] == 'conv':
                _pair(op['pad'], f'{where}.pad', 0, MAX_KERNEL)
                for key in ('stride', 'dilation'):
                    _integer(op[key], f'{where}.{key}', 1, MAX_KERNEL)
                weight, bias = self._tensor(f'{i}.weight'), self._tensor(f'{i}.bias')
                names.update((f'{i}.weight', f'{i}.bias'))
                if weight.ndim != 4 or not weight.is_floating_point() or weight.numel() == 0:
                    raise ValueError(f'The plan\'s tensor {i}.weight is no kernel of four dimensions.')
                if max(weight.shape[2:]) > MAX_KERNEL or max(weight.shape[:2]) > MAX_CHANNELS:
                    raise ValueError(f'The plan\'s tensor {i}.weight is too large: {tuple(weight.shape)}.')
                if bias.dtype != torch.float32 or tuple(bias.shape) != (weight.shape[0],):
                    raise ValueError(f'The plan\'s tensor {i}.bias is no vector of {weight.shape[0]} float32.')
                if f'{i}.unit' in self.tensors:
                    names.add(f'{i}.unit')
                    unit = self._tensor(f'{i}.unit')
                    if unit.dtype != torch.float32 or unit.shape != bias.shape or not bool(
                            ((unit > 0) & (unit < 1e30)).all()):
                        raise ValueError(f'The plan\'s tensor {i}.unit is no vector of {weight.shape[0]} positive '
                                         'float32.')
                groups = _integer(op['groups'], f'{where}.groups', 1, MAX_CHANNELS)
                if not _depthwise(weight, groups) and (
                        weight.numel() * groups > max(MAX_ELEMENTS >> 2, 32 * weight.numel())):
                    raise ValueError(f'The plan\'s tensor {i}.weight is too large for {groups} groups.')
                if weight.shape[0] % groups:
                    raise ValueError(f'The plan\'s field {where}.groups does not divide {weight.shape[0]} channels.')
        if names != set(self.tensors):
            raise ValueError(f'The plan\'s tensors have strangers: {sorted(set(self.tensors) - names)[:3]}.')

    def _tensor(self, name: str) -> torch.Tensor:
        tensor = self.tensors.get(name)
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != 'cpu':
            raise ValueError(f'The plan\'s tensor {name} is missing.')
        return tensor

    def shapes(self, height: int, width: int) -> List[Shape]:
        """The shape of every value for an image of another size.

        Args:
            height: Height of the image.
            width: Width of the image.

        Returns:
            Channels, height and width of each value, the input first.

        Raises:
            ValueError: If an operation cannot be at this size; the message names the field.
        """
        _integer(height, 'input[1]', 1, MAX_SIDE)
        _integer(width, 'input[2]', 1, MAX_SIDE)
        shapes: List[Shape] = [(self.input_shape[0], height, width)]
        work = 0
        for i, op in enumerate(self.operations):
            where, kind = f'operations[{i}]', op['op']
            c, h, w = shapes[op['x'] if 'x' in op else op['xs'][0]]
            if kind == 'conv':
                weight = self.tensors[f'{i}.weight']
                if weight.shape[1] * op['groups'] != c:
                    raise ValueError(f'The plan\'s tensor {i}.weight reads {weight.shape[1] * op["groups"]} channels, '
                                     f'and {where}.x has {c}.')
                c = weight.shape[0]
                h, w = ((n + 2 * p - op['dilation'] * (k - 1) - 1) // op['stride'] + 1
                        for n, p, k in zip((h, w), op['pad'], weight.shape[2:]))
            elif kind == 'pool':
                h, w = (pooled(n, k, op['stride'], p, op['ceil']) for n, k, p in zip((h, w), op['kernel'], op['pad']))
            elif kind in ('add', 'mul'):
                other = shapes[op['y']]
                if other != (c, h, w) and not (kind == 'mul' and other == (c, 1, 1)):
                    raise ValueError(f'The plan\'s field {where}.y has the shape {other}, and x {(c, h, w)}.')
            elif kind == 'cat':
                for v in op['xs']:
                    if shapes[v][1:] != (h, w):
                        raise ValueError(f'The plan\'s field {where}.xs joins maps of {shapes[v][1:]} and {(h, w)}.')
                c = sum(shapes[v][0] for v in op['xs'])
            elif kind == 'slice':
                if op['stop'] > c:
                    raise ValueError(f'The plan\'s field {where}.stop is beyond {c} channels.')
                c = op['stop'] - op['start']
            elif kind == 'mean':
                h = w = 1
            elif kind == 'upsample':
                before = h, w
                h, w = (h * op['scale'], w * op['scale']) if op['like'] is None else shapes[op['like']][1:]
                if h < before[0] or w < before[1]:
                    raise ValueError(f'The plan\'s field {where}.like makes a map smaller.')
            elif kind == 'zeros':
                c = op['channels']
            count = len(self.tensors.get(f'{i}.range', range(c)))
            if count != c:
                raise ValueError(f'The plan\'s tensor {i}.range has {count} ranges, and {where} gives {c} channels.')
            if h < 1 or w < 1:
                raise ValueError(f'The plan\'s field {where} leaves a map of {h} x {w} at {height} x {width}.')
            if c > MAX_CHANNELS or max(h, w) > MAX_SIDE or c * h * w > MAX_ELEMENTS:
                raise ValueError(f'The plan\'s field {where} makes a map too large: {(c, h, w)}.')
            shapes.append((c, h, w))
            taps = self.tensors[f'{i}.weight'][0].numel() if kind == 'conv' else math.prod(op.get('kernel', ()))
            work += c * h * w * taps
            if work > MAX_WORK:
                raise ValueError(f'The plan\'s field {where} brings the work for an image of {height} x {width} to '
                                 f'over {MAX_WORK} multiplications.')
        if sum(math.prod(shapes[value]) for value, _ in self.outputs) > MAX_ELEMENTS:
            raise ValueError(f'The plan\'s field \'outputs\' has more than {MAX_ELEMENTS} numbers for an image.')
        for value, vector in self.outputs:
            if vector and shapes[value][1:] != (1, 1):
                raise ValueError('The plan\'s field \'outputs\' calls a map a vector.')
        return shapes


def _depthwise(weight: torch.Tensor, groups: int) -> bool:
    return weight.shape[1] == 1 and groups == weight.shape[0]


def pooled(size: int, kernel: int, stride: int, pad: int, ceil: bool) -> int:
    """Length of what a pooling leaves of a row, by PyTorch's rule."""
    out = (size + 2 * pad - kernel + (stride - 1 if ceil else 0)) // stride + 1
    return out - 1 if ceil and (out - 1) * stride >= size + pad else out


def nearest(size: int, out: int) -> List[int]:
    """The row that each row of an enlarged map takes, by PyTorch's rule, which multiplies in float32.

    Args:
        size: Rows of the map.
        out: Rows of the enlarged one.
    """
    rows = torch.arange(size, dtype=torch.float32).view(1, 1, size, 1)
    return torch.nn.functional.interpolate(rows, size=(out, 1)).flatten().int().tolist()


def _integer(value: Any, where: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f'The plan\'s field {where} is {str(value)[:40]!r}, not a whole number from {low} to {high}.')
    return value


def _pair(value: Any, where: str, low: int, high: int) -> None:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f'The plan\'s field {where} is no pair.')
    for v in value:
        _integer(v, where, low, high)


def _choice(value: Any, where: str, allowed: Sequence[Optional[str]]) -> None:
    if value not in allowed:
        raise ValueError(f'The plan\'s field {where} is none of {allowed}.')
