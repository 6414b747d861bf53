"""From a plan's operations to layers: what computes nothing goes, and what follows a convolution becomes part of it.

Activations and sums go into the convolution before them, and convolutions that read the same map become one.
"""
import itertools
from typing import Any, Dict, List, Optional, Tuple

import torch

from .graph import Layer, Value, link
from .plan import MADE, Plan, Range, nearest

__all__ = ['fuse']

SMALLEST_STEP = 2. ** -14  # of a map in bytes beside tiles, whose inverse float16 can hold


def fuse(
        plan: Plan,
        height: int,
        width: int,
        precision: str = 'bfloat16',
        tiles: bool = True,
) -> Tuple[List[Layer], List[Value]]:
    """Make layers of a plan's operations.

    Args:
        plan: The plan.
        height: Height of the images.
        width: Width of the images.
        precision: ``'bfloat16'``, or ``'int8'`` for maps in bytes. Means and what becomes of them are in bfloat16
            always.
        tiles: Whether the engine multiplies in tiles, which have bfloat16 for images; else they are in bytes too.

    Returns:
        The layers in order, concatenations and slices among them, and all maps.
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
        if kind == 'cat' and out.is8:  # what is not in bytes becomes it
            for k, v in enumerate(ins):
                if not v.is8:
                    ins[k] = Value((v.c, v.h, v.w))
                    _put_in_bytes(ins[k], plan.ranges[op['xs'][k]], tiles)  # type: ignore[index]
                    layers.append(Layer('act', [v], [ins[k]], {'kind': 'none', 'slope': 0.}))
        layer = Layer(kind, ins, [out], fields)
        if kind == 'upsample':
            layer.fields.update(row_table=nearest(ins[0].h, out.h), column_table=nearest(ins[0].w, out.w))
        if kind == 'conv':
            weight = plan.tensors[f'{i}.weight'].float()
            layer.depthwise = weight.shape[1] == 1 and op['groups'] == weight.shape[0] > 1
            layer.fields['kernel'] = tuple(weight.shape[2:])
            if not layer.depthwise:
                weight, layer.fields['groups'] = _regroup(weight, op['groups'])
            layer.weights, layer.biases = [weight], [plan.tensors[f'{i}.bias']]
            layer.units = [plan.tensors.get(f'{i}.unit')]
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
    return layers, values


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
    """Say which maps lie in bytes, and how: channels have scales of their own if the plan has their ranges."""
    assert plan.ranges is not None
    vectors = {v for v, vector in plan.outputs if vector}
    means = set()  # and what becomes of them
    if not tiles and 0 not in vectors:
        _put_in_bytes(values[0], plan.ranges[0], tiles)
    for i, op in enumerate(plan.operations):
        kind, out = op['op'], values[i + 1]
        parts = op['xs'] if kind == 'cat' else [op['x']]
        source = values[parts[0]]
        if kind == 'mean' or (any(v in means for v in parts) and not any(values[v].is8 for v in parts)):
            means.add(i + 1)
        elif kind in MADE:
            if i + 1 not in vectors and i + 1 not in plan.halves:
                _put_in_bytes(out, plan.ranges[i + 1], tiles, plan.tensors.get(f'{i}.range'))
        elif kind == 'cat':
            if any(values[v].is8 for v in parts):
                scales = [_scale_and_zero(plan.ranges[v], tiles) if not values[v].is8 else None for v in parts]
                out.scale, out.zero = (torch.cat([
                    getattr(values[v], name) if numbers is None else torch.full((values[v].c,), numbers[k])
                    for v, numbers in zip(parts, scales)]) for k, name in enumerate(('scale', 'zero')))
        elif source.is8 and kind == 'zeros':
            # A step of any size stands for them; a large one would cost the weights beside them their precision.
            out.scale, out.zero = torch.full((out.c,), SMALLEST_STEP), torch.zeros(out.c)
        elif source.is8:
            part = slice(op.get('start'), op.get('stop'))
            out.scale, out.zero = source.scale[part], source.zero[part]  # type: ignore[index]


def _scale_and_zero(numbers: Range, tiles: bool) -> Tuple[float, float]:
    low, high, _ = numbers
    step, smallest = (high - low) / 255, SMALLEST_STEP if tiles else 1e-20
    step = step if step > smallest else SMALLEST_STEP if low == high else smallest
    return step, float(round(-low / step))


def _put_in_bytes(value: Value, numbers: Range, tiles: bool, each: Optional[torch.Tensor] = None) -> None:
    ranges = [numbers] * value.c if each is None else [(low, high, 0.) for low, high in each.tolist()]
    value.scale, value.zero = torch.tensor([_scale_and_zero(r, tiles) for r in ranges]).unbind(1)


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


def _split_by_slices(layers: List[Layer]) -> List[Layer]:
    """A convolution of which only ranges are used becomes one per range."""
    link(layers)
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
                    part.units = [None if u is None else u[s['start']:s['stop']] for u in layer.units]
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
    link(layers)
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
    link(layers)
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
                first.units = first.units + layer.units
                first.peaks = first.peaks + layer.peaks
                continue
            found[key] = layer
        result.append(layer)
    link(result)
    return result
