"""Random networks for the native engine: plans, and modules that are lowered to plans."""
import random
from typing import Any, Dict, List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from cspnet_timm.deployment.native import Plan
from cspnet_timm.deployment.native.plan import ACTIVATIONS, POOLS, pooled

CHANNELS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65, 96)
SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 23)

Shape = Tuple[int, int, int]


class Source:
    """Where decisions come from: here from a seed; a test takes them from hypothesis."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def pick(self, options: Any) -> Any:
        return self.random.choice(options)

    def numbers(self, *shape: int) -> torch.Tensor:
        """Normal numbers that bfloat16 has."""
        generator = torch.Generator().manual_seed(self.random.randrange(1 << 30))
        return torch.randn(*shape, generator=generator).bfloat16().float()


class Drawn(Source):
    """Decisions of hypothesis, which then finds the smallest network that fails."""

    def __init__(self, data: Any) -> None:
        from hypothesis import strategies
        self.draw, self.strategies = data.draw, strategies
        self.random = random.Random(0)

    def pick(self, options: Any) -> Any:
        return self.draw(self.strategies.sampled_from(list(options)))


def _conv_fields(source: Source, c: int) -> Tuple[int, int, Dict[str, Any], Tuple[int, int]]:
    depthwise, grouped = source.pick([False] * 4 + [True]), source.pick([False] * 4 + [True])
    groups = c if depthwise else source.pick([g for g in (1, 2, 3, 4, 8) if c % g == 0]) if grouped else 1
    out = c if depthwise else source.pick(CHANNELS[:-2]) * groups
    kernel = source.pick([(1, 1)] * 3 + [(3, 3)] * 3 + [(5, 5), (1, 3), (3, 1), (2, 2), (6, 6), (4, 3), (7, 7)])
    pad = [source.pick([k // 2, k // 2, k // 2, 0, k]) for k in kernel]
    stride, dilation = source.pick([1] * 4 + [2, 2, 3]), source.pick([1] * 5 + [2, 3])
    return out, groups, dict(stride=stride, pad=pad, dilation=dilation, groups=groups), kernel


def random_plan(source: Source, most: int = 12) -> Plan:
    """A plan of up to ``most`` operations, of every kind and in any order."""
    shapes: List[Shape] = [(source.pick(CHANNELS[:12]), source.pick(SIDES), source.pick(SIDES))]
    operations: List[Dict[str, Any]] = []
    tensors: Dict[str, torch.Tensor] = {}

    for _ in range(source.pick(range(1, most + 1))):
        kind = source.pick(['conv'] * 5 + ['act', 'act', 'add', 'add', 'mul', 'mul', 'cat', 'cat', 'slice', 'slice',
                                           'pool', 'mean', 'upsample', 'zeros'])
        i = len(operations)
        x = source.pick([i, i, max(i - 1, 0), *range(i + 1)])
        if kind == 'mul':  # the scaling of a map by one pixel, of which there are few
            gated = [v for v, (c, h, w) in enumerate(shapes) if h * w > 1 and (c, 1, 1) in shapes]
            x = source.pick(gated or [x])
        elif kind == 'slice':
            x = source.pick([x, *(v + 1 for v, op in enumerate(operations) if op['op'] in ('slice', 'cat'))])
        c, h, w = shapes[x]
        op: Dict[str, Any] = dict(op=kind, x=x)
        if kind == 'conv':
            out, groups, fields, kernel = _conv_fields(source, c)
            op.update(fields)
            size = [(n + 2 * p - op['dilation'] * (k - 1) - 1) // op['stride'] + 1
                    for n, p, k in zip((h, w), op['pad'], kernel)]
            if min(size) < 1:
                continue
            weight = source.numbers(out, c // groups, *kernel)
            weight *= 2. ** -round((torch.tensor(float(weight[0].numel())).log2() / 2).item())
            tensors[f'{i}.weight'] = weight if groups == c == out and groups > 1 else weight.bfloat16()
            tensors[f'{i}.bias'] = source.numbers(out) / 4
            c, h, w = out, *size
        elif kind == 'act':
            op.update(kind=source.pick(ACTIVATIONS), slope=0.)
            if op['kind'] == 'leaky_relu':
                op['slope'] = source.pick([0.1, 0.01, 0.5])
        elif kind in ('add', 'mul'):
            alike = [v for v, s in enumerate(shapes) if s == (c, h, w)]
            pixels = [v for v, s in enumerate(shapes) if s == (c, 1, 1) and kind == 'mul']
            op['y'] = source.pick(source.pick([alike, pixels or alike]))
        elif kind == 'cat':
            del op['x']
            others = [v for v, s in enumerate(shapes) if s[1:] == (h, w)]
            op['xs'] = [x, *(source.pick(others) for _ in range(source.pick([0, 1, 1, 2, 2, 3])))]
            op['xs'].sort(key=lambda _: source.pick(range(8)))
            c = sum(shapes[v][0] for v in op['xs'])
        elif kind == 'slice':
            start = source.pick(sorted({0, c // 4, c // 3, c // 2, c - 1}))
            stop = source.pick(sorted({start + 1, (start + c + 1) // 2, c}))
            op.update(start=start, stop=stop)
            c = stop - start
        elif kind == 'pool':
            kernel = source.pick([[1, 1], [2, 2], [3, 3], [3, 3], [5, 5], [2, 3], [4, 4], [7, 1]])
            op.update(kind=source.pick(POOLS), kernel=kernel, stride=source.pick([1, 1, 2, 2, 3, 5]),
                      pad=[source.pick([0, k // 2]) for k in kernel], ceil=source.pick([False, True]))
            h, w = (pooled(n, k, op['stride'], p, op['ceil']) for n, k, p in zip((h, w), kernel, op['pad']))
        elif kind == 'mean':
            h = w = 1
        elif kind == 'upsample':
            likes = [v for v, s in enumerate(shapes) if s[1] >= h and s[2] >= w]
            op.update(scale=source.pick([1, 2, 2, 3]), like=source.pick([None, None, *likes]))
            h, w = shapes[op['like']][1:] if op['like'] is not None else (h * op['scale'], w * op['scale'])
        else:
            op['channels'] = c = source.pick(CHANNELS[:10])
        if min(h, w) < 1 or max(h, w) > 64 or c > 300 or c * h * w > 1 << 16:
            tensors = {k: v for k, v in tensors.items() if not k.startswith(f'{i}.')}
            continue
        operations.append(op)
        shapes.append((c, h, w))
    last = len(operations)
    found = {last, *(source.pick(range(last + 1)) for _ in range(source.pick([0, 0, 1, 2])))}
    outputs = [(v, shapes[v][1:] == (1, 1) and source.pick([True, False])) for v in sorted(found)]
    return Plan(shapes[0], operations, outputs, tensors)


class Step(nn.Module):
    """One operation of a :class:`RandomNetwork`, on some of the values before it."""

    def __init__(self, inputs: List[int], what: Any, name: str) -> None:
        super().__init__()
        self.inputs, self.name = inputs, name
        self.what = what

    def forward(self, values: List[Any]) -> Any:
        return self.what(*(values[i] for i in self.inputs))

    def extra_repr(self) -> str:
        return f'{self.name} of {self.inputs}'


class RandomNetwork(nn.Module):
    """A network as PyTorch's users write them, of what ``lower`` says that it takes."""

    def __init__(self, source: Source, most: int = 10) -> None:
        super().__init__()
        self.shape = source.pick([1, 3, 3, 4, 5, 16, 32]), source.pick(SIDES), source.pick(SIDES)
        self.steps = nn.ModuleList()
        shapes: List[Tuple[int, ...]] = [self.shape]
        with torch.no_grad():
            values: List[Any] = [source.numbers(2, *self.shape)]
            for _ in range(source.pick(range(1, most + 1))):
                for step in self._steps(source, shapes):
                    self.steps.append(step.eval())
                    values.append(step(values))
                    shapes.append(tuple(values[-1].shape[1:]))
                if values[-1][0].numel() > 1 << 15:
                    break
        last = len(values) - 1
        self.outputs = sorted({last, *(source.pick(range(last + 1)) for _ in range(source.pick([0, 0, 1, 2])))})
        self.eval()

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        values: List[Any] = [x]
        for step in self.steps:
            values.append(step(values))
        return tuple(values[i] for i in self.outputs)

    def _steps(self, source: Source, shapes: List[Tuple[int, ...]]) -> List[Step]:
        n = len(shapes)
        i = source.pick([n - 1, n - 1, *range(n)])
        if len(shapes[i]) == 1:
            linear = nn.Linear(shapes[i][0], source.pick(CHANNELS[:12]))
            act = source.pick([nn.ReLU(), nn.SiLU(), nn.Identity(), nn.Sigmoid()])
            return [Step([i], nn.Sequential(nn.Dropout(), linear, act), 'linear')]
        c, h, w = shapes[i]
        same = [k for k in range(n) if shapes[k] == (c, h, w)]
        beside = [k for k in range(n) if len(shapes[k]) == 3 and shapes[k][1:] == (h, w)]
        scales = [k for k in range(n) if shapes[k] == (c, 1, 1)]
        larger = [k for k in range(n) if len(shapes[k]) == 3 and shapes[k][1] >= h and shapes[k][2] >= w]
        inplace = source.pick([False, False, True])
        act = source.pick([
            nn.ReLU(inplace), nn.SiLU(inplace), nn.Mish(inplace), nn.Hardswish(inplace), nn.Hardsigmoid(inplace),
            nn.LeakyReLU(0.1, inplace), nn.ReLU6(inplace), nn.Sigmoid(), nn.Identity()])
        kind = source.pick(['conv'] * 5 + [
            'act', 'add', 'mul', 'gate', 'own_mean', 'cat', 'cat', 'slice', 'slices', 'split', 'chunk', 'pad', 'max',
            'avg', 'mean', 'flat', 'sample', 'up', 'up_like', 'bn'])

        def one(inputs: List[int], what: Any, name: str = kind) -> List[Step]:
            return [Step(inputs, what, name)]

        if kind == 'conv':
            k = source.pick([1, 1, 3, 3, 3, 5, 2, 6, (1, 3), (3, 1)])
            groups = source.pick([1, 1, 1, c, *(g for g in (2, 3, 4) if c % g == 0)])
            out = c if groups == c else source.pick(CHANNELS[:14]) * groups
            kernel = (k, k) if isinstance(k, int) else k
            same_size = all(v % 2 for v in kernel)
            stride = source.pick([1, 1, 2, 3])
            pad: Any = [v // 2 for v in kernel]
            if same_size and stride == 1:
                pad = source.pick(['same', pad])
            conv = nn.Conv2d(c, out, k, stride, pad, groups=groups, bias=source.pick([True, False]))
            parts = [conv, *([nn.BatchNorm2d(out)] if source.pick([True, False]) else []), act]
            return one([i], nn.Sequential(*parts))
        if kind == 'bn':
            return one([i], nn.BatchNorm2d(c))
        if kind == 'act':
            return one([i], act if not inplace else nn.Sequential(nn.Conv2d(c, c, 1), act))
        if kind == 'add':
            return one([i, source.pick(same)], lambda a, b: a + b)
        if kind == 'mul':
            return one([i, source.pick([*same, *scales])], lambda a, b: a * b)
        if kind == 'own_mean':
            return one([i], lambda a: a * a.mean((2, 3), keepdim=True))
        if kind == 'gate':
            layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1), nn.Hardsigmoid())
            return [Step([i], layers, 'gate'), Step([i, n], lambda a, b: a * b, 'gated')]
        if kind == 'cat':
            inputs = [i, *(source.pick(beside) for _ in range(source.pick([1, 1, 2, 3])))]
            return one(inputs, lambda *xs: torch.cat(xs, 1))
        if kind in ('slice', 'slices'):
            a, b = sorted((source.pick(range(c + 1)), source.pick(range(c + 1))))
            a, b = (a, b) if a < b else (0, c)
            if kind == 'slices' and b - a > 1:
                return one([i], lambda x: x[:, a:b][:, 1:])
            return one([i], lambda x: x[:, a:b])
        if kind in ('split', 'chunk') and c > 1:
            half = source.pick(range(1, c))
            which = source.pick([0, -1])
            if kind == 'chunk':
                return one([i], lambda x: x.chunk(2, 1)[which])
            return one([i], lambda x: x.split((half, c - half), 1)[which])
        if kind == 'pad':
            more = source.pick([(0, 3), (2, 0), (1, 1)])
            return one([i], lambda x: F.pad(x, (0, 0, 0, 0, *more)))
        if kind in ('max', 'avg'):
            k = source.pick([1, 2, 3, 5])
            if min(h, w) < k:
                k = 1
            stride, pad, ceil = source.pick([1, 2, 3]), source.pick([0, k // 2]), source.pick([True, False])
            if kind == 'max':
                return one([i], nn.MaxPool2d(k, stride, pad, ceil_mode=ceil))
            return one([i], nn.AvgPool2d(k, stride, pad, ceil_mode=ceil, count_include_pad=source.pick([True, False])))
        if kind == 'mean':
            return one([i], source.pick([lambda x: x.mean((2, 3), keepdim=True), nn.AdaptiveAvgPool2d(1)]))
        if kind == 'flat':
            return one([i], source.pick([
                lambda x: x.mean((2, 3)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())]))
        if kind == 'sample':
            return one([i], lambda x: x[:, :, ::2, ::2])
        if kind == 'up':
            return one([i], nn.Upsample(scale_factor=source.pick([2, 2, 3])))
        if kind == 'up_like':
            return one([i, source.pick(larger)], lambda a, b: F.interpolate(a, size=b.shape[2:]))
        return one([i], act if not inplace else nn.Identity())
