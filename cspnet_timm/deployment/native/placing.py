"""A place for every map: what a concatenation joins is written where the concatenation will be read."""
from typing import Dict, List, Tuple

from .fusing import fuse
from .graph import Buffer, Layer, Value, link
from .plan import Plan

__all__ = ['Layout', 'arrange']


class Layout:
    """The layers in order, and in which buffer every map lies."""

    def __init__(self, layers: List[Layer], values: List[Value]) -> None:
        self.layers, self.values = layers, values
        reads: Dict[Buffer, List[Tuple[Value, Layer]]] = {}
        found: Dict[Buffer, None] = {}
        for layer in layers:
            for value in layer.reads + layer.outs:
                assert value.buffer is not None
                found[value.buffer] = None
            for value in layer.reads:
                reads.setdefault(value.buffer, []).append((value, layer))  # type: ignore[arg-type]
        self.buffers = list(found)
        self._readers: Dict[Value, List[Layer]] = {}
        for layer in layers:
            for v in layer.outs:
                self._readers[v] = list(dict.fromkeys(
                    other for r, other in reads.get(v.buffer, ())  # type: ignore[arg-type]
                    if v.offset < r.offset + r.c and r.offset < v.offset + v.c))

    def readers(self, value: Value) -> List[Layer]:
        """The layers that read a part of a map, be it through a concatenation or a slice."""
        return self._readers[value]


def arrange(plan: Plan, height: int, width: int, precision: str = 'bfloat16', tiles: bool = True) -> Layout:
    """Fuse a plan's operations and give every map its place.

    Args:
        plan: The plan.
        height: Height of the images.
        width: Width of the images.
        precision: As of :func:`~cspnet_timm.deployment.native.fusing.fuse`.
        tiles: The same.

    Returns:
        The layers and buffers.
    """
    layers, values = fuse(plan, height, width, precision, tiles)
    return Layout(_place(layers), values)


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
    link(result)
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
    low, high = -sum(v.c for v in ins[:k]), sum(v.c for v in ins[k:])  # its ends, seen from the part
    if not (low <= -start and root.c - start <= high):
        return False
    at = low
    for v in ins:
        if v.base is root and at == v.start - start:
            pass
        elif at + v.c > -start and at < root.c - start:  # something else lies where the root would
            return False
        at += v.c
    return True
