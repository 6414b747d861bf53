"""Running a plan: memory, order of work, threads."""
import ctypes
import itertools
import os
import threading
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch

from .build import library
from .layout import (
    BAND,
    DIRECT,
    PATCH,
    Buffer,
    Layer,
    Layout,
    Value,
    act_fields,
    arrange,
    float_bits,
    flow,
    in_order,
    pack_depthwise,
    pack_weights,
)
from .plan import Plan

__all__ = ['NativeEngine']

KINDS = {'conv': 0, 'depthwise': 1, 'pool': 2, 'mean': 3, 'act': 4, 'add': 4, 'mul': 4, 'upsample': 5, 'zeros': 6,
         'input': 7, 'output': 8}
FIELDS = (
    'kind', 'in_off', 'in_ps', 'in_h', 'in_w', 'in_c', 'out_h', 'out_w', 'kh', 'kw', 'stride', 'pad_h', 'pad_w', 'dil',
    'act', 'act_param', 'res_mode', 'nblocks', 'table', 'weights', 'bias', 'mode', 'tap_c', 'ksteps', 'flavour',
    'in2_off', 'in2_ps', 'in2_small', 'out_off', 'out_ps', 'out_c', 'index', 'is_f32', 'flat', 'rows_at_once', 'koff',
    'planes', 'plane', 'width', 'band_ps', 'by_position', 'in_mod', 'in8', 'out8', 'in2_8', 'flow', 'fill', 'in_scale',
    'in_zero', 'in2_scale', 'in2_zero', 'out_inv', 'out_zero', 'steps_at_once', 'fetch', 'dense')
CHUNK = 4  # images that one thread takes through the network together
BLOCK_BYTES = 256 << 10  # of a convolution's input that are taken through all its output channels together
LARGE_WEIGHTS, LARGE_BLOCK_BYTES = 1 << 20, 700 << 10  # the same, for weights above this size
STREAMED_WEIGHTS = 1200 << 10  # of a layer up to which they stream past each position, unless it reads these again
LONGEST_RUN = 256  # of a product without tiles, times four bytes
STEPS_AT_ONCE = 16  # of the product, whose weights for a block of channels half fill the first-level cache
SEGMENT_WEIGHTS = 600 << 10  # of layers that are worked through together
TOGETHER_WEIGHTS = 1500 << 10  # of a layer above which the threads share it, each with some of the output channels
BAND_BYTES = 800 << 10  # of all maps of such layers, for the rows that are worked on
MAX_SIZES = 4  # sizes of images whose memory is kept


class _Memory:
    """Bytes of the engine's own allocator: aligned, zeroed, in large pages."""

    def __init__(self, size: int) -> None:
        self.lib = library()
        self.address = self.lib.csp_alloc(size)
        if not self.address:
            raise MemoryError(f'{size} bytes for the native engine.')

    def __del__(self) -> None:
        if getattr(self, 'address', None):
            self.lib.csp_free(self.address)


class NativeEngine:
    """A plan, ready to run.

    Called with images ``(B, C, H, W)`` in float32, it returns the list of the network's outputs in float32. Any batch
    size and any size of image will do; memory for a new one is laid out at its first call.
    """

    def __init__(self, plan: Plan, threads: int, precision: str = 'bfloat16') -> None:
        """
        Args:
            plan: The network.
            threads: Threads that compute.
            precision: What the maps and weights are kept in: ``'bfloat16'``, or ``'int8'``.

        Raises:
            ValueError: If the precision is unknown, the plan has no ranges for int8, or there are no threads.
            RuntimeError: If the engine cannot run on this machine.
        """
        if precision not in ('bfloat16', 'int8'):
            raise ValueError(
                f'precision={precision!r} is not known to the native engine, choose \'bfloat16\' or \'int8\'.')
        if precision == 'int8' and plan.ranges is None:
            raise ValueError('precision=\'int8\' takes a plan with the ranges of its maps: calibrate it.')
        if threads < 1:
            raise ValueError(f'threads={threads}: at least one thread must compute.')
        self.plan = plan
        self.threads = threads
        self.precision = precision
        self._lib = library()
        assert self._lib.csp_record() == len(FIELDS)
        self.tiles = bool(self._lib.csp_tiles())
        self._lock = threading.Lock()
        self._team: Optional[int] = None
        self._sizes: Dict[Tuple[int, int], _Size] = {}
        self._weights: Dict[Tuple[Any, ...], Dict[str, Any]] = {}
        self._size(*plan.input_shape[1:])

    def _size(self, height: int, width: int) -> '_Size':
        size = self._sizes.pop((height, width), None) or _Size(self, height, width)
        self._sizes[height, width] = size
        while len(self._sizes) > MAX_SIZES:
            del self._sizes[next(iter(self._sizes))]
        return size

    def _threads(self) -> int:
        # A forked process has no threads but the one that forked.
        if self._team is None or self._lib.csp_team_pid(self._team) != os.getpid():
            self._team = self._lib.csp_team(self.threads)
        assert self._team is not None
        return self._team

    def __call__(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Run the network.

        Args:
            x: Images ``(B, C, H, W)``, float32, on the CPU, contiguous or channels-last.

        Returns:
            The outputs, ``(B, C', H', W')`` in channels-last memory or ``(B, C')``.

        Raises:
            ValueError: If the images are not as said, or the network cannot take their size.
        """
        if x.ndim != 4 or x.shape[1] != self.plan.input_shape[0] or x.dtype != torch.float32 or x.device.type != 'cpu':
            raise ValueError(f'The native engine takes float32 images (B, {self.plan.input_shape[0]}, H, W) on the '
                             f'CPU, not {x.dtype} {tuple(x.shape)} on {x.device}.')
        x = x.detach()
        with self._lock:
            return self._size(*x.shape[2:]).run(x)

    def __del__(self) -> None:
        if getattr(self, '_team', None) is not None:
            self._lib.csp_team_free(self._team)


class _Size:
    """A network at one size of image."""

    def __init__(self, engine: NativeEngine, height: int, width: int) -> None:
        self.engine = engine
        self.layout = arrange(engine.plan, height, width, engine.precision, engine.tiles)
        self.programs: Dict[int, _Program] = {}
        self.outputs = [(layer.ins[0].c, layer.ins[0].h, layer.ins[0].w, layer['vector'])
                        for layer in self.layout.layers if layer.op == 'output']
        self.packed = {}
        for i, layer in enumerate(self.layout.layers):
            if layer.op == 'conv':
                # The same at every size of image, as the layers are; their shapes say so.
                key = (i, layer['kernel'], *(v.is8 for v in layer.reads + layer.outs),
                       *(tuple(w.shape) for w in layer.weights))
                if key not in engine._weights:
                    engine._weights[key] = _pack(layer, engine.tiles)
                self.packed[layer] = engine._weights[key]
            layer.weights, layer.biases = [], []

    def program(self, images: int) -> '_Program':
        if images not in self.programs:
            self.programs[images] = _Program(self, images, self.engine.threads)
        return self.programs[images]

    def run(self, x: torch.Tensor) -> List[torch.Tensor]:
        batch, threads = len(x), self.engine.threads
        results = [torch.empty(batch, h, w, c) for c, h, w, _ in self.outputs]
        jobs, keep = [], []
        for start in range(0, batch, threads * CHUNK):
            program = self.program(min(batch - start, threads * CHUNK))
            pointers = (ctypes.c_int64 * len(results))(*(r[start:].data_ptr() for r in results))
            keep.append(pointers)
            jobs += [program.handle, program.arena.address, x[start:].data_ptr(), *x.stride(),
                     ctypes.addressof(pointers)]
        array = (ctypes.c_int64 * len(jobs))(*jobs)
        self.engine._lib.csp_run(self.engine._threads(), array, len(keep))
        return [r.flatten(1) if vector else r.permute(0, 3, 1, 2) for r, (*_, vector) in zip(results, self.outputs)]


def _pack(layer: Layer, tiles: bool) -> Dict[str, Any]:
    if layer.depthwise:
        return pack_depthwise(layer, tiles)
    packed = pack_weights(layer, tiles)
    for key in ('weights', 'bias', *(['epilogue'] if 'epilogue' in packed else [])):
        tensor = packed[key]
        memory = _Memory(tensor.numel() * tensor.element_size() + 64)
        if key == 'epilogue':
            packed['epilogue_bytes'] = tensor.shape[1]
        ctypes.memmove(memory.address, tensor.data_ptr(), tensor.numel() * tensor.element_size())
        packed[key] = memory
    return packed


def _address(memory: Any) -> int:
    return memory.data_ptr() if isinstance(memory, torch.Tensor) else memory.address


def _order(mode: int, packed: Dict[str, Any], steps: int) -> Dict[str, int]:
    """Whether positions or output channels are outside, and how many steps of the product are done at a time."""
    large = _weight_bytes_of(packed) > STREAMED_WEIGHTS
    if not large and mode != BAND:
        return dict(by_position=True, steps_at_once=steps)
    at_once = max(1, STEPS_AT_ONCE * 2048 * steps * len(packed['blocks']) // _weight_bytes_of(packed))
    return dict(fetch=large, steps_at_once=-(-steps // -(-steps // at_once)))


def _runs(offsets: List[int], counts: List[int]) -> List[Tuple[int, int, int]]:
    """Steps that read on where the one before ended are one: its offset, how many times four bytes, its weights."""
    runs: List[Tuple[int, int, int]] = []
    weights = 0
    for offset, count in zip(offsets, counts):
        if runs and runs[-1][0] + 4 * runs[-1][1] == offset and runs[-1][1] + count <= LONGEST_RUN:
            runs[-1] = runs[-1][0], runs[-1][1] + count, runs[-1][2]
        else:
            runs.append((offset, count, weights))
        weights += 128 * count
    return runs


def _epilogue_address(packed: Dict[str, Any], block: int) -> int:
    memory = packed.get('epilogue')
    return 0 if memory is None else memory.address + block * packed['epilogue_bytes']


class _Program:
    """The work of one or several threads for a number of images."""

    def __init__(self, size: _Size, images: int, team: int) -> None:
        self.lib = size.engine._lib
        layout = size.layout
        self.images, self.team, self.in_tiles = images, team, size.engine.tiles
        if any(images * v.h * v.w >= 1 << 31 for v in layout.values):
            raise ValueError(f'{images} images of this size are too many for the native engine.')
        segments = _segments(layout, images, team, size.packed)
        self.arena_bytes = _allocate(layout, images, segments, team)
        self.keep: List[Any] = []
        records: List[int] = []
        self.scratch, self.tiles = 0, 0
        self.steps: List[List[Tuple[int, ...]]] = [[] for _ in range(team)]
        self.layer_of: List[int] = []  # of each record
        known: Dict[Tuple[int, ...], int] = {}
        for i, start, stop, y0, y1, n0, n1, rank, apart in _schedule(layout, segments, images, team, size.packed):
            if i < 0:
                for steps in self.steps:
                    steps.append((0, 0, 0, 0, 0, 0, 0, 1))
                continue
            layer = layout.layers[i]
            turns = tuple(y0 // v.buffer.rows for v in _in_place(layer, size.packed))  # of buffers that roll
            key = (i, start, rank if apart else -1, *turns)
            if key not in known:
                known[key] = len(self.layer_of)
                self.layer_of.append(i)
                record = self._record(layer, size.packed.get(layer), start, y0, rank if apart else 0)
                records += [int(record.get(name, 0)) for name in FIELDS]
            self.steps[rank].append((known[key], start, stop, y0, y1, n0, n1, 0))
        array = (ctypes.c_int64 * len(records))(*records)
        self.handle = self.lib.csp_program(array, len(self.layer_of), self.scratch, self.tiles)
        for steps in self.steps:
            flat = [v for step in steps for v in step]
            self.lib.csp_steps(self.handle, (ctypes.c_int64 * len(flat))(*flat), len(steps))
        self.arena = _Memory(self.arena_bytes)

    def __del__(self) -> None:
        if getattr(self, 'handle', None):
            self.lib.csp_program_free(self.handle)

    def _record(
            self, layer: Layer, packed: Optional[Dict[str, Any]], start: int, row: int, rank: int) -> Dict[str, int]:
        """A layer as the engine reads it, for images from ``start`` on, rows from ``row`` on, and a thread."""
        r: Dict[str, int] = {'kind': KINDS[layer.op], 'stride': 1, 'dil': 1, 'kh': 1, 'kw': 1, 'is_f32': layer.is_f32}
        own = self.images * rank // self.team  # the first image of this thread
        if layer.ins:
            x = layer.ins[0]
            direct = _reads_in_place(layer, packed)
            r.update(in_off=_at(x, start, row if direct else 0, rank, own), in_ps=x.buffer.stride, in_h=x.h, in_w=x.w,
                     in_c=x.c, in_mod=x.buffer.rows, in8=x.is8)
            if x.is8:
                scale, zero, fill = x.tables
                r.update(in_scale=scale.data_ptr(), in_zero=zero.data_ptr(), fill=fill.data_ptr())
        other = layer.res if layer.res is not None else layer.ins[1] if len(layer.ins) > 1 else None
        if other is not None:
            r['in2_8'] = other.is8
            if other.is8:
                r.update(in2_scale=other.tables[0].data_ptr(), in2_zero=other.tables[1].data_ptr())
        if layer.outs:
            y = layer.outs[0]
            r.update(out_off=_at(y, start, row, rank, own), out_ps=y.buffer.stride, out_h=y.h, out_w=y.w, out_c=y.c,
                     out8=y.is8)
            if y.is8:
                r.update(out_inv=float_bits(1 / y.step), out_zero=float_bits(float(y.tables[1][0])))
        r['act'], r['act_param'] = act_fields(layer)
        if layer.op in ('conv', 'pool'):
            r.update(kh=layer['kernel'][0], kw=layer['kernel'][1], stride=layer['stride'], pad_h=layer['pad'][0],
                     pad_w=layer['pad'][1], dil=layer.fields.get('dilation', 1))
        if layer.op == 'conv':
            assert packed is not None
            r.update(res_mode=layer.res_mode, weights=_address(packed['weights']), bias=_address(packed['bias']))
            if layer.depthwise:
                r.update(kind=KINDS['depthwise'], nblocks=(layer.ins[0].c + 31) // 32, flow=packed['flow'])
                if layer.res is not None:
                    r.update(in2_off=_at(layer.res, start, row, rank, own), in2_ps=layer.res.buffer.stride)
                return r
            table: List[int] = []
            r.update(flow=flow(layer), dense=packed['dense'])
            size, item = layer.ins[0].item, 4 if layer.is_f32 else layer.outs[0].item
            for number, (index, first, count, a_off) in enumerate(packed['blocks']):
                v, res = layer.outs[index], layer.res
                # The last block of a buffer also fills the room behind it.
                whole = v.offset + v.c == v.buffer.c and first + count == v.c and (
                    layer.is_f32 or (v.offset + first + 32) * item <= v.buffer.stride)
                table += [_at(v, start, row, rank, own) + first * item, v.buffer.stride, 32 if whole else count]
                table += [0, 0] if res is None else [
                    _at(res, start, row, rank, own) + first * res.item, res.buffer.stride]
                table += [a_off, _epilogue_address(packed, number)]
            mode, tap_c, tiles = packed['mode'], packed['tap_c'], self.in_tiles
            width, s, d = layer.outs[0].w, layer['stride'], layer['dilation']
            span = width + (r['kw'] - 1) * d // s
            # Rows whose ends leave tiles half empty are taken as one, with the zeros between them.
            tile = 16 if tiles else 8
            flat = mode == BAND and span < -(-width // tile) * tile and not (packed['dense'] and s > 1)
            planes = s if flat else 1
            if not flat:
                span = (width - 1) * s + (r['kw'] - 1) * d + 1
            patch = (r['kh'] * r['kw'] * tap_c * size + 63) // 64 * 64
            px = tap_c * size
            if mode == BAND and px % 256 == 0:
                px += 64  # or the pixels of a tile would share a few sets of the first-level cache
            per_row = {DIRECT: width * r['in_ps'], PATCH: width * patch, BAND: span * px * s * planes}[mode]
            everything = self.images * r['out_h']
            # Weights that the second-level cache cannot hold are fetched for as many positions as it can hold.
            large = _weight_bytes_of(packed) > LARGE_WEIGHTS
            rows = min(max(1, (LARGE_BLOCK_BYTES if large else BLOCK_BYTES) // per_row), everything)
            rows = -(-everything // -(-everything // rows))
            plane = (min(rows, r['out_h']) - 1) * (s // planes) + (r['kh'] - 1) * d // planes + 1
            koff = packed['koff']
            if packed['dense']:
                koff = [ky * span * px + k * 64 for ky in range(r['kh']) for k in range((r['kw'] * px + 63) // 64)]
            elif mode == BAND:
                koff = [(((ky * d % planes * planes + kx * d % planes) * plane + ky * d // planes) * span
                         + kx * d // planes) * px + cb * 64
                        for cb, (ky, kx) in in_order(
                            packed['channel_blocks'], list(itertools.product(range(r['kh']), range(r['kw']))), tiles)]
            steps = len(koff)
            if not tiles:
                runs = _runs(koff, packed['kcount'])
                koff, steps = [v for run in runs for v in run], len(runs)
            tables = (ctypes.c_int64 * len(table))(*table), (ctypes.c_int64 * len(koff))(*koff)
            self.keep += tables
            r.update(nblocks=len(packed['blocks']), table=ctypes.addressof(tables[0]), koff=ctypes.addressof(tables[1]),
                     mode=mode, tap_c=tap_c, ksteps=steps, flat=flat, rows_at_once=rows,
                     planes=planes, plane=plane, width=span, band_ps=px,
                     **_order(mode, packed, steps))
            self.tiles = max(self.tiles, rows * ((span + 15) // 16 + 1) + 2 * self.images + 2)
            slack = 32 * max(px * s, patch) + 4096
            if mode == PATCH:
                self.scratch = max(self.scratch, rows * width * patch + slack)
            elif mode == BAND:
                bands = min(rows, self.images)  # of different images
                self.scratch = max(self.scratch, bands * planes * planes * plane * span * px + slack)
        elif layer.op == 'pool':
            r['flavour'] = ('max', 'mean', 'mean_padded').index(layer['kind'])
        elif layer.op in ('add', 'mul', 'act'):
            r['flavour'] = ('act', 'add', 'mul').index(layer.op)
            if layer.op == 'act':
                layer.act, layer.slope = layer['kind'], layer['slope']
                r['act'], r['act_param'] = act_fields(layer)
            else:
                y = layer.ins[1]
                small = (y.h, y.w) != (layer.ins[0].h, layer.ins[0].w)
                r.update(in2_off=_at(y, start, 0 if small else row, rank, own), in2_ps=y.buffer.stride, in2_small=small)
        elif layer.op == 'output':
            r['index'] = layer['index']
            r.update(out_h=layer.ins[0].h, out_w=layer.ins[0].w)
        return r


def _at(value: Value, start: int, row: int, rank: int, first: int) -> int:
    """Where a map would begin such that a row of image ``start`` lies where it does.

    A buffer that each thread has for itself may have room for a few images only, of which ``start`` is the first, or
    for a few rows only, in turns; else for those of the thread, of which ``first`` is the first.
    """
    buffer = value.buffer
    assert buffer is not None
    at = buffer.address + value.offset * value.item - row // buffer.rows * buffer.rows * buffer.w * buffer.stride
    if buffer.own:
        at += rank * buffer.own - (start if buffer.local else first) * buffer.h * buffer.w * buffer.stride
    return at


def _reads_in_place(layer: Layer, packed: Optional[Dict[str, Any]]) -> bool:
    """Whether a layer reads its input at the very rows of its output, as one stretch of memory."""
    if layer.op == 'conv':
        return not layer.depthwise and packed is not None and packed['mode'] == DIRECT
    return layer.op in ('add', 'mul', 'act', 'output')


def _in_place(layer: Layer, packed: Dict[Layer, Any]) -> List[Value]:
    """The maps that a layer reads or writes at the very rows of its output."""
    values = layer.outs + ([layer.res] if layer.res is not None else [])
    if layer.ins and _reads_in_place(layer, packed.get(layer)):
        values = values + layer.ins
    return [v for v in values if v.buffer is not None and v.buffer.rows < v.buffer.h]


class _Segment:
    """Layers that are worked through together for some of the images, by bands of rows if ``bands`` is over 1.

    Where ``apart``, every thread has images of its own; else the threads share each layer.
    """

    def __init__(self, layers: List[int], images: int, bands: int, apart: bool) -> None:
        self.layers, self.images, self.bands, self.apart = layers, images, bands, apart
        self.steps: List[Tuple[int, int, int]] = []  # layer and rows, where there are bands


def _weight_bytes(layer: Layer, packed: Dict[Layer, Any]) -> int:
    p = packed.get(layer)
    return 0 if p is None or layer.depthwise else _weight_bytes_of(p)


def _weight_bytes_of(packed: Dict[str, Any]) -> int:
    return len(packed['blocks']) * packed['panel']


def _segments(layout: Layout, images: int, team: int, packed: Dict[Layer, Any]) -> List[_Segment]:
    """Cut the network into runs of layers whose weights and bands of maps stay in the second-level cache."""
    n = len(layout.layers)
    if images < team:
        return [_Segment([i], images, 1, team == 1) for i in range(n)]
    share = -(-images // team)
    runs: List[List[int]] = []
    weights = 0
    for i, layer in enumerate(layout.layers):
        own = _weight_bytes(layer, packed)
        if not runs or weights + own > SEGMENT_WEIGHTS or layout.layers[i - 1].op == 'mean':
            runs.append([])
            weights = 0
        runs[-1].append(i)
        weights += own
    segments = []
    for run in runs:
        layers = [layout.layers[i] for i in run]
        if team > 1 and len(run) == 1 and _weight_bytes(layers[0], packed) > TOGETHER_WEIGHTS:
            segments.append(_Segment(run, images, 1, False))
            continue
        one = sum({id(v.buffer): v.buffer.bytes(1) for x in layers for v in x.reads + x.outs if v.buffer}.values())
        together = share
        while len(run) > 1 and together > 1 and one * together > BAND_BYTES:
            together = (together + 1) // 2
        bands = 1
        height = min((x.outs or x.ins)[0].h for x in layers)
        if together == 1 and len(run) > 1 and not any(x.op == 'mean' for x in layers):
            bands = max(1, min(-(-one // BAND_BYTES), height // 2))
        segments.append(_Segment(run, together, bands, True))
    return segments


def _allocate(layout: Layout, images: int, segments: List[_Segment], team: int) -> int:
    """Give each buffer an address, such that those alive together do not overlap; returns the bytes in all."""
    for b in layout.buffers:
        b.first, b.last, b.rows = 1 << 60, -1, b.h
    for i, segment in enumerate(segments):
        for k in segment.layers:
            for v in layout.layers[k].reads + layout.layers[k].outs:
                assert v.buffer is not None
                v.buffer.first, v.buffer.last = min(v.buffer.first, i), max(v.buffer.last, i)
        if segment.bands > 1:
            segment.steps = _band_steps(layout, segment)
    for i, segment in enumerate(segments):
        if segment.bands > 1:
            _roll(layout, segment, i)
    # Threads that work apart do not wait for one another: what only they use, each has in memory of its own.
    epochs: List[int] = []
    for i, segment in enumerate(segments):
        epochs.append(epochs[-1] + (not (segment.apart and segments[i - 1].apart)) if i else 0)
    shared, own = [], []
    share = -(-images // team)
    for b in layout.buffers:
        b.own = 0
        if segments[b.first].apart and epochs[b.first] == epochs[b.last] and not b.alone:
            b.own, b.local = 1, b.first == b.last
            own.append((b, b.first, b.last, b.bytes(segments[b.first].images if b.local else share)))
        else:
            shared.append((b, epochs[b.first], epochs[b.last], b.bytes(images)))
    # A tile reads 16 pixels whether they are there or not.
    slack = 32 * max(b.stride for b in layout.buffers) + 4096
    total = _pack_buffers(shared)
    size = _pack_buffers(own) + slack
    for b, *_ in own:
        b.address += total
        b.own = size
    return total + size * team + slack


def _pack_buffers(wanted: List[Tuple[Buffer, int, int, int]]) -> int:
    """Addresses for buffers of a first and a last use and a size; returns the bytes in all."""
    placed: List[Tuple[int, int, Buffer, int, int]] = []
    total = 0
    for b, first, last, size in sorted(wanted, key=lambda w: (not w[0].alone, -w[3])):
        size = (size + 64 + 4095) // 4096 * 4096
        at = 0
        for start, end, other, begin, stop in sorted(placed, key=lambda p: p[0]):
            if b.alone or other.alone or (begin <= last and first <= stop):
                if at + size <= start:
                    break
                at = max(at, end)
        b.address = at
        placed.append((at, at + size, b, first, last))
        total = max(total, at + size)
    return total


def _rows_read(layer: Layer, rows: int) -> int:
    """How many rows of its input a layer must have for the first ``rows`` of its output."""
    height = layer.ins[0].h
    if layer.op in ('conv', 'pool'):
        reach = (rows - 1) * layer['stride'] - layer['pad'][0]
        reach += (layer['kernel'][0] - 1) * layer.fields.get('dilation', 1)
        return max(0, min(height, reach + 1))
    if layer.op == 'upsample':
        return min(height, (rows - 1) * height // layer.outs[0].h + 1) if rows else 0
    return height if layer.op == 'mean' else rows


def _band_steps(layout: Layout, segment: _Segment) -> List[Tuple[int, int, int]]:
    steps = []
    done = {i: 0 for i in segment.layers}
    for band in range(1, segment.bands + 1):
        for i, need in _needed(layout, segment, band).items():
            if need > done[i]:
                steps.append((i, done[i], need))
                done[i] = need
    return steps


def _roll(layout: Layout, segment: _Segment, number: int) -> None:
    """Leave each buffer that only this segment sees as many rows as are needed at once."""
    written: Dict[Buffer, int] = {}
    highest: List[Tuple[Buffer, int, int]] = []  # after which step how many rows are written
    reads: Dict[Buffer, List[Tuple[int, int]]] = {}  # at which step from which row on
    for t, (i, y0, y1) in enumerate(segment.steps):
        layer = layout.layers[i]
        for v in layer.reads:
            first = y0
            if layer.op in ('conv', 'pool') and v is layer.ins[0]:
                first = max(0, y0 * layer['stride'] - layer['pad'][0])
            elif layer.op == 'upsample':
                first = y0 * v.h // layer.outs[0].h
            assert v.buffer is not None
            reads.setdefault(v.buffer, []).append((t, first))
        for v in layer.outs:
            assert v.buffer is not None
            written[v.buffer] = max(written.get(v.buffer, 0), y1)
            highest.append((v.buffer, t, written[v.buffer]))
    rows: Dict[Buffer, int] = {}
    for b, t, high in highest:
        low = min((first for s, first in reads.get(b, []) if s >= t), default=high)
        rows[b] = max(rows.get(b, 1), high - low)
    for b, n in rows.items():
        if b.first == b.last == number and not b.alone:
            b.rows = min(b.h, n)


def _schedule(
        layout: Layout,
        segments: List[_Segment],
        images: int,
        team: int,
        packed: Dict[Layer, Any],
) -> Iterator[Tuple[int, ...]]:
    """All steps in order.

    Each is a layer (-1: wait for one another), images, rows, blocks of output channels, thread, and
    whether the thread has these images for itself.
    """
    before = True  # whether the segment before was one for each thread apart
    for segment in segments:
        if not (before and segment.apart):
            yield (-1,) * 9
        before = segment.apart
        for rank in range(team):
            if segment.apart:
                edge = images * (rank + 1) // team
                for start in range(images * rank // team, edge, segment.images):
                    stop = min(edge, start + segment.images)
                    for i in segment.layers if segment.bands == 1 else ():
                        layer = layout.layers[i]
                        yield i, start, stop, 0, (layer.outs or layer.ins)[0].h, 0, _blocks(layer, packed), rank, True
                    for i, y0, y1 in segment.steps:
                        layer = layout.layers[i]
                        cuts = {y0, y1}
                        for v in _in_place(layer, packed):
                            assert v.buffer is not None
                            cuts.update(range(-(-y0 // v.buffer.rows) * v.buffer.rows, y1, v.buffer.rows))
                        edges = sorted(cuts)
                        for a, b in itertools.pairwise(edges):
                            yield i, start, stop, a, b, 0, _blocks(layer, packed), rank, True
                continue
            i, = segment.layers
            layer = layout.layers[i]
            height, blocks = (layer.outs or layer.ins)[0].h, _blocks(layer, packed)
            rows, part = (0, height), (0, blocks)
            if height >= team and not (blocks >= 2 * team and height < 16):
                rows = height * rank // team, height * (rank + 1) // team
            elif blocks >= team:
                part = blocks * rank // team, blocks * (rank + 1) // team
            elif rank:
                continue
            if rows[0] < rows[1]:
                yield (i, 0, images, *rows, *part, rank, False)


def _blocks(layer: Layer, packed: Dict[Layer, Any]) -> int:
    return len(packed[layer]['blocks']) if layer.op == 'conv' and not layer.depthwise else 0


def _needed(layout: Layout, segment: _Segment, band: int) -> Dict[int, int]:
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
