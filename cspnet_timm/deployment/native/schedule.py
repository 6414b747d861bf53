"""The order of work: which layers are worked through together, by which rows, and by whom."""
import itertools
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from .graph import Buffer, Layer, Value
from .placing import Layout
from .records import MODE
from .tuning import Tuning

__all__ = ['Segment', 'Step', 'cut', 'in_place', 'reads_in_place', 'steps_of', 'weight_bytes']

Packed = Dict[Layer, Dict[str, Any]]


class Segment:
    """Layers that are worked through together for some of the images, by bands of rows if ``bands`` is over 1.

    Where ``apart``, every thread has images of its own; else the threads share each layer.
    """

    def __init__(self, layers: List[int], images: int, bands: int, apart: bool) -> None:
        self.layers, self.images, self.bands, self.apart = layers, images, bands, apart
        self.steps: List[Tuple[int, int, int]] = []  # layer and rows, where there are bands


class Step(NamedTuple):
    """Of a layer some images (of the thread's own where ``apart``), rows and blocks of output channels."""

    layer: int
    b0: int
    b1: int
    y0: int
    y1: int
    n0: int
    n1: int
    apart: bool
    barrier: bool


BARRIER = Step(0, 0, 0, 0, 0, 0, 0, False, True)  # where the threads wait for one another


def weight_bytes(packed: Optional[Dict[str, Any]]) -> int:
    """Of a dense convolution's weights; zero of another layer."""
    return 0 if packed is None or 'blocks' not in packed else len(packed['blocks']) * packed['panel']


def reads_in_place(layer: Layer, packed: Optional[Dict[str, Any]]) -> bool:
    """Whether a layer reads its input at the very rows of its output, as one stretch of memory."""
    if layer.op == 'conv':
        return not layer.depthwise and packed is not None and packed['mode'] == MODE.DIRECT
    return layer.op in ('add', 'mul', 'act', 'output')


def in_place(layer: Layer, packed: Optional[Dict[str, Any]]) -> List[Value]:
    """The maps that a layer reads or writes at the very rows of its output, in buffers that have not room for all."""
    values = layer.outs + ([layer.res] if layer.res is not None else [])
    if layer.ins and reads_in_place(layer, packed):
        values = values + layer.ins
    return [v for v in values if v.buffer is not None and v.buffer.rows < v.buffer.h]


def cut(layout: Layout, share: int, team: int, packed: Packed, tuning: Tuning) -> List[Segment]:
    """Cut the network into runs of layers whose weights and bands of maps stay in the second-level cache.

    Args:
        layout: The layers and buffers; each buffer is told which segments use it, and how many rows it needs.
        share: Images that each thread has for itself; 0 if there are fewer than threads, which then share each layer.
        team: How many threads there are.
        packed: The packed convolutions.
        tuning: The sizes to cut to.

    Returns:
        The segments in order.
    """
    layers = layout.layers
    if share:
        segments = _runs_of_layers(layout, share, team, packed, tuning)
    else:
        segments = [Segment([i], team - 1, 1, False) for i in range(len(layers))]
    for b in layout.buffers:
        b.first, b.last, b.rows = 1 << 60, -1, b.h
    for i, segment in enumerate(segments):
        for k in segment.layers:
            for v in layers[k].reads + layers[k].outs:
                assert v.buffer is not None
                v.buffer.first, v.buffer.last = min(v.buffer.first, i), max(v.buffer.last, i)
        if segment.bands > 1:
            segment.steps = _band_steps(layout, segment)
    for i, segment in enumerate(segments):
        if segment.bands > 1:
            _roll(layout, segment, i)
    return segments


def _runs_of_layers(layout: Layout, share: int, team: int, packed: Packed, tuning: Tuning) -> List[Segment]:
    runs: List[List[int]] = []
    weights = 0
    for i, layer in enumerate(layout.layers):
        own = weight_bytes(packed.get(layer))
        if not runs or weights + own > tuning.segment_weights or layout.layers[i - 1].op == 'mean':
            runs.append([])
            weights = 0
        runs[-1].append(i)
        weights += own
    segments = []
    for run in runs:
        layers = [layout.layers[i] for i in run]
        if team > 1 and len(run) == 1 and weight_bytes(packed.get(layers[0])) > tuning.together_weights:
            segments.append(Segment(run, team * share, 1, False))
            continue
        one = sum({id(v.buffer): v.buffer.bytes(1) for x in layers for v in x.reads + x.outs if v.buffer}.values())
        together = share
        while len(run) > 1 and together > 1 and one * together > tuning.band:
            together = (together + 1) // 2
        bands = 1
        height = min((x.outs or x.ins)[0].h for x in layers)
        if together == 1 and len(run) > 1 and not any(x.op == 'mean' for x in layers):
            bands = max(1, min(-(-one // tuning.band), height // 2, tuning.most_bands))
        segments.append(Segment(run, together, bands, True))
    return segments


def _first_row_read(layer: Layer, value: Value, row: int) -> int:
    """The first row of an input that a row of a layer's output takes."""
    if value.h == 1:
        return 0
    if value is layer.ins[0]:
        if layer.op in ('conv', 'pool'):
            return max(0, row * layer['stride'] - layer['pad'][0])
        if layer.op == 'upsample':
            return layer['row_table'][row]
    return row


def _rows_read(layer: Layer, rows: int) -> int:
    """How many rows of its input a layer must have for the first ``rows`` of its output."""
    height = layer.ins[0].h
    if layer.op in ('conv', 'pool'):
        reach = (rows - 1) * layer['stride'] - layer['pad'][0]
        reach += (layer['kernel'][0] - 1) * layer.fields.get('dilation', 1)
        return max(0, min(height, reach + 1))
    if layer.op == 'upsample':
        return layer['row_table'][rows - 1] + 1 if rows else 0
    return height if layer.op == 'mean' else rows


def _band_steps(layout: Layout, segment: Segment) -> List[Tuple[int, int, int]]:
    steps = []
    done = {i: 0 for i in segment.layers}
    for band in range(1, segment.bands + 1):
        for i, need in _needed(layout, segment, band).items():
            if need > done[i]:
                steps.append((i, done[i], need))
                done[i] = need
    return steps


def _needed(layout: Layout, segment: Segment, band: int) -> Dict[int, int]:
    """The rows of each layer that must be done after a band, so that the segment's results have their part."""
    need: Dict[int, int] = {}
    inside = {layout.layers[i]: i for i in segment.layers}
    for i in reversed(segment.layers):
        layer = layout.layers[i]
        height = (layer.outs or layer.ins)[0].h
        rows = 0
        outside = not layer.outs
        for v in layer.outs:
            for user in layout.readers(v):
                if user not in inside:
                    outside = True
                    continue
                same = (user.res is not None and user.res.buffer is v.buffer) or v is not user.ins[0]
                rows = max(rows, need[inside[user]] if same else 0,
                           _rows_read(user, need[inside[user]]) if any(_overlap(v, x) for x in user.ins) else 0)
            outside = outside or not layout.readers(v)
        if outside or band == segment.bands:
            rows = max(rows, -(-height * band // segment.bands))
        need[i] = min(height, rows)
    return {i: need[i] for i in segment.layers}


def _overlap(a: Value, b: Value) -> bool:
    return a.buffer is b.buffer and a.offset < b.offset + b.c and b.offset < a.offset + a.c


def _roll(layout: Layout, segment: Segment, number: int) -> None:
    """Leave each buffer that only this segment sees as many rows as are needed at once."""
    written: Dict[Buffer, int] = {}
    highest: List[Tuple[Buffer, int, int]] = []  # after which step how many rows are written
    reads: Dict[Buffer, List[Tuple[int, int]]] = {}  # at which step from which row on
    for t, (i, y0, y1) in enumerate(segment.steps):
        layer = layout.layers[i]
        for v in layer.reads:
            assert v.buffer is not None
            reads.setdefault(v.buffer, []).append((t, _first_row_read(layer, v, y0)))
        for v in layer.outs:
            assert v.buffer is not None
            written[v.buffer] = max(written.get(v.buffer, 0), y1)
            highest.append((v.buffer, t, written[v.buffer]))
    lowest: Dict[Buffer, Dict[int, int]] = {}  # from a step on, the first row that will be read
    for b, found in reads.items():
        low, ends = 1 << 60, {}
        for t, first in reversed(found):
            low = min(low, first)
            ends[t] = low
        lowest[b] = ends
    rows: Dict[Buffer, int] = {}
    for b, t, high in highest:
        low = min((low for s, low in lowest.get(b, {}).items() if s >= t), default=high)
        rows[b] = max(rows.get(b, 1), high - low)
    for b, n in rows.items():
        if b.first == b.last == number and not b.alone:
            b.rows = min(b.h, n)


def steps_of(layout: Layout, segments: List[Segment], images: int, share: int, team: int, packed: Packed
             ) -> Iterator[Tuple[int, Step]]:
    """All steps in order, each with the thread that takes it.

    Args:
        layout: The layers and buffers.
        segments: The order of work.
        images: How many there are at most; a step goes over those that there are.
        share: The same for each thread, where they work apart.
        team: How many threads there are.
        packed: The packed convolutions.

    Yields:
        A thread's number, and a step.
    """
    def blocks_of(layer: Layer) -> int:
        return len(packed[layer]['blocks']) if layer.op == 'conv' and not layer.depthwise else 0

    before = True  # whether the segment before was one for each thread apart
    for segment in segments:
        if not (before and segment.apart):
            yield from ((rank, BARRIER) for rank in range(team))
        before = segment.apart
        if segment.apart:
            for start in range(0, share, segment.images):
                stop = min(share, start + segment.images)
                for i, y0, y1 in segment.steps if segment.bands > 1 else _whole(layout, segment):
                    layer = layout.layers[i]
                    cuts = {y0, y1}
                    for v in in_place(layer, packed.get(layer)):
                        assert v.buffer is not None
                        cuts.update(range(-(-y0 // v.buffer.rows) * v.buffer.rows, y1, v.buffer.rows))
                    for a, b in itertools.pairwise(sorted(cuts)):
                        step = Step(i, start, stop, a, b, 0, blocks_of(layer), True, False)
                        yield from ((rank, step) for rank in range(team))
            continue
        i, = segment.layers
        layer = layout.layers[i]
        height, blocks = (layer.outs or layer.ins)[0].h, blocks_of(layer)
        for rank in range(team):
            rows, part = (0, height), (0, blocks)
            if height >= team and not (blocks >= 2 * team and height < 16):
                rows = height * rank // team, height * (rank + 1) // team
            elif blocks >= team:
                part = blocks * rank // team, blocks * (rank + 1) // team
            elif rank:
                continue
            if rows[0] < rows[1]:
                yield rank, Step(i, 0, images, *rows, *part, False, False)


def _whole(layout: Layout, segment: Segment) -> List[Tuple[int, int, int]]:
    return [(i, 0, (layout.layers[i].outs or layout.layers[i].ins)[0].h) for i in segment.layers]
