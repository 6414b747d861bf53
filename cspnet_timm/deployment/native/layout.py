"""From a plan to work: operations fused, maps laid out in memory, weights packed.

An operation of a plan becomes a :class:`Layer` unless it is no work at all. Activations and sums go into the
convolution before them, convolutions that read the same map become one, and what a concatenation joins is written where
the concatenation will be read.
"""
import functools
import itertools
import struct
from typing import Any, Dict, Iterable, List, Optional, Tuple

import torch
import torch.nn.functional as F

from .plan import ACTIVATIONS, Plan, Range, UnsupportedNetwork

__all__ = ['Layer', 'Layout', 'Value', 'arrange']

DIRECT, BAND, PATCH = range(3)
HALF, BYTES, FROM_HALF, FROM_BYTES = range(4)

SMALLEST_STEP = 2. ** -14  # of a map in bytes beside tiles, whose inverse float16 can hold
SHIFTED = 32767  # what sums in int32 are shifted to fit into
WORD_TAPS = 256  # of a depthwise convolution, whose sums of bytes by words int32 holds
LANES = [8 * (i % 16 // 4) + 4 * (i // 16) + i % 4 for i in range(32)]  # where _mm512_packs_epi32 leaves each channel


class Value:
    """A map, and the range of a buffer's channels where it lies."""

    def __init__(self, shape: Tuple[int, int, int]) -> None:
        self.c, self.h, self.w = shape
        self.buffer: Optional[Buffer] = None
        self.offset = 0
        self.layer: Optional[Layer] = None  # what writes it
        self.users: List[Layer] = []
        self.is_output = False
        self.base: Optional[Value] = None  # of a slice
        self.start = 0
        # Of a map in bytes, by channel: what a step stands for, and which byte stands for zero.
        self.scale: Optional[torch.Tensor] = None
        self.zero: Optional[torch.Tensor] = None

    @property
    def step(self) -> float:
        """Of a map in bytes with one scale, what a step stands for."""
        assert self.scale is not None
        return float(self.scale[0])

    @property
    def is8(self) -> bool:
        """Whether it lies in bytes, and not in bfloat16."""
        return self.scale is not None

    @property
    def item(self) -> int:
        """Bytes of one channel."""
        return 1 if self.is8 else 2

    @functools.cached_property
    def tables(self) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of a map in bytes the scales, the zeros, and the zeros in bytes, with room behind them."""
        assert self.scale is not None and self.zero is not None
        scale, zero = (F.pad(v, (0, -self.c % 64 + 64)) for v in (self.scale, self.zero))
        return scale, zero, zero.to(torch.uint8)


class Buffer:
    """Memory of one or several maps side by side in channels; ``stride`` bytes from pixel to pixel."""

    def __init__(self, c: int, h: int, w: int, is8: bool) -> None:
        self.c, self.h, self.w, self.rows = c, h, w, h
        if is8:
            self.stride = (c + 15) // 16 * 16
        else:
            self.stride = 2 * (c if c < 16 else (c + 31) // 32 * 32)
        self.first, self.last = 1 << 60, -1
        self.address = 0
        self.alone = False
        self.own = 0  # bytes of each thread's own memory, if it lies there
        self.local = False  # whether a single segment uses it

    def bytes(self, images: int) -> int:
        return images * self.rows * self.w * self.stride


class Layer:
    """One piece of work: reads ``ins``, writes ``outs``."""

    def __init__(self, op: str, ins: List[Value], outs: List[Value], fields: Optional[Dict[str, Any]] = None) -> None:
        self.op, self.ins, self.outs, self.fields = op, ins, outs, dict(fields or {})
        self.act, self.slope, self.res, self.res_mode = 'none', 0., None, 0  # type: str, float, Optional[Value], int
        self.weights: List[torch.Tensor] = []  # of each output of a convolution
        self.biases: List[torch.Tensor] = []
        self.peaks: List[float] = []  # the largest magnitude of each output's sums, where maps lie in bytes
        self.depthwise = False
        self.is_f32 = False

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    @property
    def reads(self) -> List[Value]:
        """All maps that the layer reads."""
        return self.ins + ([self.res] if self.res is not None else [])


class Layout:
    """The layers in order, and where everything lies for a number of images."""

    def __init__(self, layers: List[Layer], values: List[Value], buffers: List[Buffer]) -> None:
        self.layers, self.values, self.buffers = layers, values, buffers
        self._readers: Dict[Value, List[Layer]] = {}
        for layer in layers:
            for v in layer.outs:
                self._readers[v] = [other for other in layers if any(
                    v.buffer is r.buffer and v.offset < r.offset + r.c and r.offset < v.offset + v.c
                    for r in other.reads)]

    def readers(self, value: Value) -> List[Layer]:
        """The layers that read a part of a map, be it through a concatenation or a slice."""
        return self._readers[value]


def arrange(plan: Plan, height: int, width: int, precision: str = 'bfloat16', tiles: bool = True) -> Layout:
    """Fuse a plan's operations and give every map its place.

    Args:
        plan: The plan.
        height: Height of the images.
        width: Width of the images.
        precision: ``'bfloat16'``, or ``'int8'`` for maps in bytes. Means and what becomes of them are in bfloat16
            always.
        tiles: Whether the engine multiplies in tiles, which have bfloat16 for images; else they are in bytes too.

    Returns:
        The layers and buffers.

    Raises:
        UnsupportedNetwork: If maps in bytes would have to be concatenated with others.
    """
    shapes = plan.shapes(height, width)
    values = [Value(s) for s in shapes]
    if precision == 'int8':
        _quantize(plan, values, tiles)
    layers = [Layer('input', [], [values[0]])]
    for i, op in _simplified(plan):
        kind, out = op['op'], values[i + 1]
        fields = {k: field for k, field in op.items() if k not in ('op', 'x', 'y', 'xs')}
        ins = [values[v] for v in (op['xs'] if kind == 'cat' else [op[k] for k in ('x', 'y') if k in op])]
        if kind == 'slice':
            out.base, out.start = ins[0], op['start']
        if kind == 'zeros':
            ins = []
        layer = Layer(kind, ins, [out], fields)
        if kind == 'conv':
            weight = plan.tensors[f'{i}.weight'].float()
            layer.depthwise = weight.shape[1] == 1 and op['groups'] == weight.shape[0] > 1
            layer.fields['kernel'] = tuple(weight.shape[2:])
            if not layer.depthwise:
                weight, layer.fields['groups'] = _regroup(weight, op['groups'])
            layer.weights, layer.biases = [weight], [plan.tensors[f'{i}.bias']]
            layer.peaks = [plan.ranges[i + 1][2] if plan.ranges is not None else 0.]
        layers.append(layer)
    outputs = []
    for index, (v, vector) in enumerate(plan.outputs):
        values[v].is_output = True
        outputs.append(Layer('output', [values[v]], [], {'index': index, 'vector': vector}))
    layers = _split_by_slices(layers)
    layers = _fuse(layers + outputs)
    layers = _merge_parallel(layers)
    for layer in layers:  # the classifier's numbers stay float32
        if layer.op == 'output' and layer.ins[0].layer is not None:
            source = layer.ins[0].layer
            if (source.op == 'conv' and not source.depthwise and len(source.outs) == 1 and source.res is None
                    and not source.outs[0].is8
                    and len(source.outs[0].users) == 1 and source.outs[0].h * source.outs[0].w == 1):
                source.is_f32 = layer.is_f32 = True
    layers = _place(layers)
    buffers: List[Buffer] = []
    for layer in layers:
        for value in layer.reads + layer.outs:
            if value.buffer is not None and value.buffer not in buffers:
                buffers.append(value.buffer)
    return Layout(layers, values, buffers)


def _simplified(plan: Plan) -> List[Tuple[int, Dict[str, Any]]]:
    """The operations that the outputs take, with their numbers: no slice reads a slice."""
    operations: List[Dict[str, Any]] = []
    for op in plan.operations:
        if op['op'] == 'slice' and op['x'] and operations[op['x'] - 1]['op'] == 'slice':
            base = operations[op['x'] - 1]
            op = {**op, 'x': base['x'], 'start': base['start'] + op['start'], 'stop': base['start'] + op['stop']}
        operations.append(op)
    read = {v for v, _ in plan.outputs}
    live = []
    for i, op in reversed(list(enumerate(operations))):
        if i + 1 in read:
            live.append((i, op))
            if op['op'] != 'zeros':  # which takes the shape alone
                read.update(op['xs'] if op['op'] == 'cat' else [op[k] for k in ('x', 'y') if k in op])
    return live[::-1]


def _quantize(plan: Plan, values: List[Value], tiles: bool) -> None:
    """Say which maps lie in bytes, and how: a map has one scale, a concatenation those of its parts."""
    assert plan.ranges is not None
    vectors = {v for v, vector in plan.outputs if vector}
    means = set()
    if not tiles and 0 not in vectors:
        _put_in_bytes(values[0], plan.ranges[0], tiles)
    for i, op in enumerate(plan.operations):
        kind, out = op['op'], values[i + 1]
        first = op['xs'][0] if kind == 'cat' else op['x']
        source = values[first]
        if kind == 'mean' or first in means:
            means.add(i + 1)  # and what becomes of it
        elif kind in ('conv', 'act', 'add', 'mul'):
            if i + 1 not in vectors:
                _put_in_bytes(out, plan.ranges[i + 1], tiles)
        elif kind == 'cat':
            parts = [values[v] for v in op['xs']]
            if len({v.is8 for v in parts}) > 1:
                raise UnsupportedNetwork(
                    f'The native engine cannot concatenate maps in bytes with others in int8, as operation {i} does.')
            if source.is8:
                out.scale, out.zero = (torch.cat([getattr(v, name) for v in parts]) for name in ('scale', 'zero'))
        elif source.is8 and kind == 'zeros':
            out.scale, out.zero = torch.ones(out.c), torch.zeros(out.c)
        elif source.is8:
            part = slice(op.get('start'), op.get('stop'))
            out.scale, out.zero = source.scale[part], source.zero[part]  # type: ignore[index]


def _put_in_bytes(value: Value, numbers: Range, tiles: bool) -> None:
    low, high, _ = numbers
    step, smallest = (high - low) / 255, SMALLEST_STEP if tiles else 1e-20
    step = step if step > smallest else 1. if low == high else smallest
    value.scale, value.zero = torch.full((value.c,), step), torch.full((value.c,), float(round(-low / step)))


def _regroup(weight: torch.Tensor, groups: int) -> Tuple[torch.Tensor, int]:
    """Grouped kernels as block-diagonal ones of groups that are multiples of 32 wide, or one group."""
    if groups == 1:
        return weight, 1
    out, inner = weight.shape[0] // groups, weight.shape[1]
    if out % 32 == 0 and inner % 32 == 0:
        return weight, groups
    join = next((j for j in range(1, groups + 1)
                 if groups % j == 0 and (out * j) % 32 == 0 and (inner * j) % 32 == 0), groups)
    new = weight.new_zeros(weight.shape[0], inner * join, *weight.shape[2:])
    for g in range(groups):
        at = g % join * inner
        new[g * out:(g + 1) * out, at:at + inner] = weight[g * out:(g + 1) * out]
    return new, groups // join


def _link(layers: List[Layer]) -> None:
    for layer in layers:
        for v in layer.reads + layer.outs:
            v.users = []
    for layer in layers:
        for v in layer.outs:
            v.layer = layer
        for v in layer.reads:
            v.users.append(layer)


def _split_by_slices(layers: List[Layer]) -> List[Layer]:
    """A convolution of which only ranges are used becomes one per range."""
    _link(layers)
    result: List[Layer] = []
    dropped = set()
    for layer in layers:
        if layer in dropped:
            continue
        act = None
        if layer.op == 'conv' and not layer.depthwise and layer['groups'] == 1:
            out = layer.outs[0]
            if len(out.users) == 1 and out.users[0].op == 'act' and not out.is_output:
                act, out = out.users[0], out.users[0].outs[0]
            slices = [u for u in out.users if u.op == 'slice']
            spans = sorted((s['start'], s['stop']) for s in slices)
            apart = all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
            if slices and len(slices) == len(out.users) and apart and not out.is_output:
                for s in slices:
                    target = s.outs[0]
                    target.base, target.start = None, 0
                    part = Layer('conv', layer.ins, [target], layer.fields)
                    part.weights = [layer.weights[0][s['start']:s['stop']]]
                    part.biases = [layer.biases[0][s['start']:s['stop']]]
                    part.peaks = layer.peaks
                    if act is not None:
                        part.act, part.slope = act['kind'], act['slope']
                    result.append(part)
                    dropped.add(s)
                if act is not None:
                    dropped.add(act)
                continue
        result.append(layer)
    return result


def _fuse(layers: List[Layer]) -> List[Layer]:
    """Activations and sums become part of the convolution, or of the sum, before them."""
    _link(layers)
    order = {layer: i for i, layer in enumerate(layers)}
    for i, layer in enumerate(layers):
        if layer.op == 'act':
            v = layer.ins[0]
            source = v.layer
            if (source is not None and source.op in ('conv', 'add', 'mul') and len(source.outs) == 1
                    and len(v.users) == 1 and not v.is_output and source.act == 'none' and source.res_mode != 2):
                source.act, source.slope = layer['kind'], layer['slope']
                source.outs = layer.outs
                layer.outs[0].layer = source
                layer.op = 'gone'
        elif layer.op == 'add' and layer.ins[0] is not layer.ins[1]:
            best = None
            for k in (0, 1):
                v = layer.ins[k]
                s = v.layer
                if (s is not None and s.op == 'conv' and v.base is None and len(v.users) == 1 and not v.is_output
                        and s.res is None and len(s.outs) == 1 and (best is None or order[s] > order[best[0]])):
                    best = s, layer.ins[1 - k]
            if best is not None:
                s, other = best
                s.res, s.res_mode = other, 1 if s.act == 'none' else 2
                s.outs = layer.outs
                layer.outs[0].layer = s
                layer.op = 'gone'
                layers[order[s]] = Layer('gone', [], [])
                layers[i] = s
                order[s] = i
                other.users = [s if u is layer else u for u in other.users]
    layers = [layer for layer in layers if layer.op != 'gone']
    _link(layers)
    return layers


def _merge_parallel(layers: List[Layer]) -> List[Layer]:
    """Convolutions of the same map and form become one that writes to several places."""
    found: Dict[Any, Layer] = {}
    result = []
    for layer in layers:
        if layer.op == 'conv' and not layer.depthwise and layer['groups'] == 1 and layer.res is None:
            key = (id(layer.ins[0]), layer['kernel'], layer['stride'], tuple(layer['pad']), layer['dilation'],
                   layer.act, layer.slope, layer.outs[0].is8)
            if key in found:
                first = found[key]
                first.outs = first.outs + layer.outs
                first.weights = first.weights + layer.weights
                first.biases = first.biases + layer.biases
                first.peaks = first.peaks + layer.peaks
                continue
            found[key] = layer
        result.append(layer)
    _link(result)
    return result


def _place(layers: List[Layer]) -> List[Layer]:
    """Give every value a buffer, so that what a concatenation joins lies side by side."""
    copies: Dict[Layer, List[Layer]] = {}
    for layer in reversed([x for x in layers if x.op == 'cat']):
        out = layer.outs[0]
        if out.buffer is None and _side_by_side(layer.ins):
            out.buffer, out.offset = layer.ins[0].buffer, layer.ins[0].offset
            continue
        if out.buffer is None:
            out.buffer = Buffer(out.c, out.h, out.w, out.is8)
        at = out.offset
        for k, v in enumerate(layer.ins):
            root = v.base if v.base is not None else v
            start = at - v.start if v.base is not None else at
            if not (v.buffer is out.buffer and v.offset == at):
                if (root.buffer is None and root.layer is not None and root.layer.op != 'input'
                        and _covers(layer.ins, k, root, v.start if v.base is not None else 0)):
                    root.buffer, root.offset = out.buffer, start
                elif not (v.base is not None and root.buffer is out.buffer and root.offset + v.start == at):
                    copy = Value((v.c, v.h, v.w))
                    copy.scale, copy.zero = v.scale, v.zero
                    copy.buffer, copy.offset = out.buffer, at
                    copies.setdefault(layer, []).append(Layer(
                        'pool', [v], [copy], {'kind': 'max', 'kernel': [1, 1], 'stride': 1, 'pad': [0, 0]}))
            at += v.c
    result = []
    for layer in layers:
        result.extend(copies.get(layer, []))
        if layer.op not in ('cat', 'slice'):
            result.append(layer)
        for v in layer.outs:
            if v.base is not None:
                v.buffer, v.offset = v.base.buffer, v.base.offset + v.start
            elif v.buffer is None:
                v.buffer = Buffer(v.c, v.h, v.w, v.is8)
                if layer.op == 'input' and v.is8:
                    v.buffer.stride = v.c
                if layer.is_f32:
                    v.buffer.stride, v.buffer.alone = (v.c + 31) // 32 * 32 * 4, True
    _link(result)
    return result


def _side_by_side(ins: List[Value]) -> bool:
    at, buffer = ins[0].offset, ins[0].buffer
    for v in ins:
        if v.buffer is None or v.buffer is not buffer or v.offset != at:
            return False
        at += v.c
    return True


def _covers(ins: List[Value], k: int, root: Value, start: int) -> bool:
    """Whether the whole of ``root`` has its place in the concatenation if its part ``start`` is input ``k``."""
    if root.c == ins[k].c:
        return True
    at = -sum(v.c for v in ins[:k])  # of the concatenation's beginning, seen from the part
    for v in ins:
        if v.base is root and at == v.start - start:
            pass
        elif at + v.c > -start and at < root.c - start:  # something else lies where the root would
            return False
        at += v.c
    low, high = -sum(v.c for v in ins[:k]), sum(v.c for v in ins[k:])
    return low <= -start and root.c - start <= high


def flow(layer: Layer) -> int:
    """Which of the engine's ways from sums to maps a convolution takes."""
    x, out, res = layer.ins[0].is8, layer.outs[0].is8, layer.res is None or layer.res.is8
    if x and out and res:
        return BYTES
    if x:
        return FROM_BYTES
    return FROM_HALF if out or (layer.res is not None and res) else HALF


def _fills_its_room(value: Value) -> bool:
    """Whether what lies behind a map's channels, up to a multiple of 32, is made of numbers of the same pixel.

    A product reads it and multiplies it by zero, which leaves a zero of numbers alone: a pixel's neighbour may be of
    another image, and what is left from an earlier layer or call may be no number.
    """
    layer, buffer = value.layer, value.buffer
    if (layer is None or buffer is None or layer.op != 'conv' or layer.depthwise or value.base is not None
            or buffer.c != value.c or buffer.stride < 2 * _up(value.c, 32)):
        return False
    res = layer.res
    return res is None or res.is8 or (res.c == value.c and (res.c % 32 == 0 or _fills_its_room(res)))


def pack_weights(layer: Layer, tiles: bool) -> Dict[str, Any]:
    """Blocks of 32 output channels in the order the tiles want, and what the engine must know of them.

    Args:
        layer: A dense convolution.
        tiles: Whether the engine multiplies in tiles, which have float16 beside them to go from sums of bytes to bytes.

    Returns:
        ``mode``, ``tap_c``, ``ksteps``, ``koff`` and ``channel_blocks`` as the engine has them; ``kcount``, of each
        step how many times four bytes are there, and the others are not multiplied, of which tiles know nothing; the
        tensors ``weights`` and ``bias``, and of maps in bytes ``epilogue``; ``dense`` if a step takes what lies side by
        side in a row of the kernel, over the borders of its taps; and ``blocks``: the output each belongs to, its first
        channel there, how many, and where in the input its channels begin, in bytes.
    """
    x = layer.ins[0]
    kh, kw = layer['kernel']
    groups, stride = layer['groups'], layer['stride']
    point = kh == kw == 1
    step = 64 // x.item  # channels of a step of the product
    # What lies behind a number of channels that is no multiple of a step is multiplied by zero, and must be a number.
    clean = x.is8 or x.c % 32 == 0 or _fills_its_room(x)
    if point and stride == 1 and tuple(layer['pad']) == (0, 0) and clean:
        mode = DIRECT
    elif groups == 1 and (x.c < 16 if x.is8 and not tiles else x.c % 32 and (x.c <= 48 or point) and not x.is8):
        mode = PATCH
    elif not point:
        mode = BAND
    else:
        mode = PATCH
    per_group = x.c // groups
    tight = mode == PATCH and groups == 1 and x.c % step != 0
    dense = mode == BAND and x.is8 and groups == 1 and x.c % step != 0 and layer['dilation'] == 1
    tap_c = x.c if tight else _up(x.c, 16 if dense else step)

    def in_steps(w: torch.Tensor) -> torch.Tensor:
        """Kernels ``(N, C, kh, kw)`` as ``(N, K)``, with zeros up to whole steps."""
        if tight:
            flat = w.permute(0, 2, 3, 1)
        elif dense:
            rows = F.pad(w, (0, 0, 0, 0, 0, tap_c - x.c)).permute(0, 2, 3, 1).flatten(2)
            flat = F.pad(rows, (0, -(kw * tap_c) % step))
        else:  # K runs over blocks of channels, within them over the taps; without tiles the other way round
            w = F.pad(w, (0, 0, 0, 0, 0, -per_group % step))
            flat = w.reshape(len(w), -1, step, kh * kw).permute((0, 1, 3, 2) if tiles else (0, 3, 1, 2))
        flat = flat.flatten(1)
        return F.pad(flat, (0, -flat.shape[1] % step))

    there = in_steps(torch.ones(1, per_group, kh, kw)).view(-1, 16, step // 16).any(2)
    ksteps = len(there)
    kcount = (there * torch.arange(1, 17)).amax(1).tolist()
    kept = torch.arange(16) < torch.tensor(kcount)[:, None]
    panels, biases, blocks, epilogues = [], [], [], []
    for index, (weight, bias) in enumerate(zip(layer.weights, layer.biases)):
        out_c = weight.shape[0]
        out_per_group = out_c // groups
        numbers: Dict[str, torch.Tensor] = {}
        if flow(layer) != HALF:
            weight, bias, numbers = _in_bytes(layer, index, tiles)
        for g in range(groups):
            for first in range(g * out_per_group, (g + 1) * out_per_group, 32):
                count = min(32, (g + 1) * out_per_group - first)
                w = weight[first:first + count]
                w = F.pad(w, (0, 0, 0, 0, 0, 0, 0, 32 - count))
                panel = in_steps(w).view(2, 16, ksteps, 16, step // 16)
                panel = panel.permute(2, 0, 3, 1, 4) if tiles else panel[:, :, kept].permute(2, 0, 1, 3)
                panels.append(panel.contiguous())
                biases.append(F.pad(bias[first:first + count], (0, 32 - count)))
                blocks.append((index, first, count, g * per_group * x.item))
                if numbers:
                    epilogues.append(_epilogue(
                        {k: F.pad(v[first:first + count], (0, 32 - count)) for k, v in numbers.items()}))
    koff: List[int] = []  # of a band it depends on the number of rows
    if tight or mode == DIRECT:
        koff = [k * 64 for k in range(ksteps)]
    elif mode == PATCH:
        koff = [tap * tap_c * x.item + cb * 64
                for cb, tap in in_order(_up(per_group, step) // step, range(kh * kw), tiles)]
    packed = dict(
        mode=mode, tap_c=tap_c, ksteps=ksteps, koff=koff, kcount=kcount, channel_blocks=_up(per_group, step) // step,
        blocks=blocks, dense=dense,
        weights=torch.stack(panels).to(torch.int8 if x.is8 else torch.bfloat16).contiguous(),
        bias=torch.cat(biases).to(torch.int32 if x.is8 else torch.float32).contiguous())
    packed['panel'] = panels[0].numel() * x.item
    if epilogues:
        packed['epilogue'] = torch.stack(epilogues)
    return packed


def pack_depthwise(layer: Layer, tiles: bool) -> Dict[str, Any]:
    """Weights and bias of a depthwise convolution, of maps in bytes with their scales and zeros in them.

    Args:
        layer: The convolution.
        tiles: Whether the engine multiplies in tiles; it has not been measured to be faster by words then.

    Returns:
        The tensors ``weights`` and ``bias``, and ``flow``: :data:`BYTES` if the weights are words, else :data:`HALF`.
    """
    weight, bias, x = layer.weights[0], layer.biases[0], layer.ins[0]
    if x.is8:
        scale, zero, _ = x.tables
        weight = weight * scale[:x.c, None, None, None]
        bias = bias - weight.sum((1, 2, 3)) * zero[:x.c]
    pad = -len(bias) % 32
    bias = F.pad(bias, (0, pad))
    weight = F.pad(weight[:, 0].permute(1, 2, 0), (0, pad)).float()  # (kh, kw, C)
    kh, kw, c = weight.shape
    if tiles or not x.is8 or layer['dilation'] > 1 or kh * kw > WORD_TAPS:
        return dict(weights=weight.contiguous(), bias=bias.contiguous(), flow=HALF)
    unit = weight.abs().amax((0, 1)).clamp(min=1e-30) / 32767
    # Two rows side by side, and the channels as unpacking leaves them: of each eight the first four, then the others.
    pairs = F.pad((weight / unit).round(), (0, 0, 0, 0, 0, kh % 2)).view(-1, 2, kw, c // 32, 4, 2, 4)
    words = pairs.permute(0, 2, 3, 5, 4, 6, 1).to(torch.int16).contiguous()
    return dict(weights=words, bias=torch.cat([bias, unit]).contiguous(), flow=BYTES)


def in_order(channel_blocks: int, taps: Iterable[Any], tiles: bool) -> Iterable[Tuple[int, Any]]:
    """The order in which a product goes through blocks of channels and taps, where a step has one of each."""
    if tiles:
        return itertools.product(range(channel_blocks), taps)
    return ((cb, tap) for tap in taps for cb in range(channel_blocks))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _in_bytes(layer: Layer, index: int, tiles: bool) -> Tuple[torch.Tensor, torch.Tensor, Dict[str, torch.Tensor]]:
    """Weights and bias of one output for maps in bytes, and by channel the numbers of what follows the sums.

    A sum of products of bytes stands for ``unit`` times itself. Beside tiles, it is shifted into sixteen bits with the
    bias, and everything from there to the bytes of the result is float16; without them, or where one of the two maps is
    not in bytes, everything is float32 and there is no shift.
    """
    x, out, res, groups = layer.ins[0], layer.outs[index], layer.res, layer['groups']
    weight, bias = layer.weights[index].double(), layer.biases[index].double()
    ones = torch.ones_like(bias)
    inverse, zero = (1 / out.scale.double(), out.zero.double()) if out.is8 else (ones, 0 * ones)  # type: ignore[union-attr]
    res_mul, res_add = ones, 0 * ones
    if res is not None and res.is8:
        res_mul = res.scale.double()  # type: ignore[union-attr]
        res_add = -res.zero.double() * res_mul  # type: ignore[union-attr]
    kind = flow(layer)
    if not x.is8:
        return weight.float(), bias.float(), dict(
            mul=ones, res_mul=res_mul, res_add=res_add, inv=inverse, add=zero)
    # Each group has the scales of its own channels.
    scales, zeros = (
        v.double().view(groups, 1, -1).expand(-1, len(bias) // groups, -1).reshape(len(bias), -1)[..., None, None]
        for v in (x.scale, x.zero))  # type: ignore[union-attr]
    weight = weight * scales
    limit = 2 * layer.peaks[index] * ones  # of a sum, twice of what there was
    linear = layer.act in ('none', 'relu', 'leaky_relu')
    if layer.res_mode == 1:
        limit = limit + res_add.abs()
    if not linear:
        limit = limit.clamp(min=2.)
    unit = torch.maximum(weight.flatten(1).abs().amax(dim=1) / 127, limit / 2 ** 30).clamp(min=1e-30)
    weight = (weight / unit[:, None, None, None]).round()
    if kind == BYTES and layer.res_mode == 1:
        bias = bias + res_add
    bias = (bias / unit - (weight * zeros).sum((1, 2, 3))).round().clamp(-2 ** 30, 2 ** 30)
    if kind == FROM_BYTES:
        return weight.float(), bias, dict(mul=unit, res_mul=res_mul, res_add=res_add, inv=inverse, add=zero)
    numbers = {}
    mul = unit
    if tiles:
        numbers['shift'] = shift = (limit / unit / SHIFTED).clamp(min=1.).log2().ceil()
        bias = bias + (2 ** shift / 2).floor()  # what is shifted out is rounded
        mul = unit * 2 ** shift
    if layer.res_mode == 2:
        zero = zero + res_add * inverse
        res_mul = res_mul * inverse
    if linear:  # in steps of the result throughout
        mul = mul * inverse
        res_mul = res_mul * inverse if layer.res_mode == 1 else res_mul
        inverse = ones
    return weight.float(), bias, dict(numbers, mul=mul, res_mul=res_mul, res_add=0 * ones, inv=inverse, add=zero)


def _epilogue(numbers: Dict[str, torch.Tensor]) -> torch.Tensor:
    """The numbers of 32 channels as the engine's structures have them, in bytes."""
    if 'shift' not in numbers:
        return torch.cat([numbers[k].float() for k in ('mul', 'res_mul', 'res_add', 'inv', 'add')]).view(torch.uint8)
    lanes = torch.empty(32, dtype=torch.long)
    lanes[torch.tensor(LANES)] = torch.arange(32)
    halves = torch.cat([numbers[k][lanes].half() for k in ('mul', 'res_mul', 'inv', 'add')])
    return torch.cat([numbers['shift'].int().view(torch.uint8), halves.view(torch.uint8)])


def act_fields(layer: Layer) -> Tuple[int, int]:
    """Number and parameter of a layer's activation, as the engine reads them."""
    return ACTIVATIONS.index(layer.act), float_bits(layer.slope)


def float_bits(value: float) -> int:
    """A float32 as the integer of the same bits."""
    return struct.unpack('<i', struct.pack('<f', value))[0]
