"""Layers as the engine reads them: a program for a size of image, and any number of them that it has room for."""
import ctypes
import itertools
from typing import Any, Dict, List, Optional, Tuple

import torch

from .build import library
from .checking import Memories, check
from .graph import Layer, Value
from .memory import Arena, Pool, allocate
from .packing import flow, in_order
from .placing import Layout
from .plan import ACTIVATIONS
from .records import BINARY, BLOCK, KIND, LAYER, MODE, POOL, float_bits
from .schedule import Step, cut, reads_in_place, steps_of, weight_bytes
from .tuning import Tuning

__all__ = ['Program', 'Record']

KINDS = {'conv': KIND.CONV, 'depthwise': KIND.DEPTHWISE, 'pool': KIND.POOL, 'mean': KIND.MEAN, 'act': KIND.BINARY,
         'add': KIND.BINARY, 'mul': KIND.BINARY, 'upsample': KIND.UPSAMPLE, 'zeros': KIND.ZEROS, 'input': KIND.INPUT,
         'output': KIND.OUTPUT}
POOLS = {'max': POOL.MAXIMUM, 'mean': POOL.AVERAGE, 'mean_padded': POOL.AVERAGE_PADDED}
BINARIES = {'act': BINARY.ACTIVATION, 'add': BINARY.SUM, 'mul': BINARY.PRODUCT}


class Record:
    """A layer's numbers: its structure's members by name, its blocks, and where its product's steps begin."""

    def __init__(self) -> None:
        self.fields: Dict[str, int] = dict.fromkeys(LAYER, 0)
        self.fields.update(stride=1, dil=1, kh=1, kw=1, in_rows=1, in2_rows=1, out_rows=1, planes=1)
        self.blocks: List[Dict[str, int]] = []
        self.koff: List[int] = []  # offsets, or of a product without tiles the members of its runs
        self.tiles, self.scratch = 0, 0

    def put(self, **fields: Any) -> None:
        """Set some members."""
        for name, value in fields.items():
            if name not in self.fields:
                raise KeyError(name)
            self.fields[name] = int(value)


class Program:
    """The work of a team of threads for up to a number of images."""

    def __init__(
            self,
            layout: Layout,
            packed: Dict[Layer, Dict[str, Any]],
            pool: Pool,
            share: int,
            team: int,
            tiles: bool,
            tuning: Tuning,
    ) -> None:
        """
        Args:
            layout: The layers and buffers.
            packed: The packed convolutions.
            pool: Where weights and tables are kept.
            share: Images that each thread has for itself at most; 0 if there are fewer images than threads.
            team: How many threads there are.
            tiles: Whether the engine multiplies in tiles.
            tuning: What the order of work goes by.

        Raises:
            ValueError: If something would be read or written outside its memory, or the images are too many.
        """
        self.images = team * share if share else team - 1
        if any(self.images * v.h * v.w >= 1 << 31 for v in layout.values):
            raise ValueError(f'{self.images} images of this size are too many for the native engine.')
        segments = cut(layout, share, team, packed, tuning)
        self.arena: Arena = allocate(layout, segments, self.images, share, team)
        images_of = {k: segment.images for segment in segments for k in segment.layers}
        self.records = [
            _record(layer, packed.get(layer), pool, images_of[i], tiles, tuning)
            for i, layer in enumerate(layout.layers)]
        self.scratch = max(r.scratch for r in self.records)
        self.tiles = max(r.tiles for r in self.records)
        self.steps: List[List[Step]] = [[] for _ in range(team)]
        for rank, step in steps_of(layout, segments, self.images, share, team, packed):
            self.steps[rank].append(step)
        self.memories = Memories(
            arena=self.arena, images=self.images, share=share, scratch=self.scratch, tiles=self.tiles, sizes=pool.sizes,
            input=_shape(layout.values[0]), in_tiles=tiles,
            outputs=[_shape(layer.ins[0]) for layer in layout.layers if layer.op == 'output'])
        check(self.records, self.steps, self.memories)
        self.handle: Optional[int] = None

    def compile(self) -> int:
        """Hand the program to the engine, which has copies of everything.

        Returns:
            Its handle.
        """
        if self.handle is None:
            lib = self._lib = library()
            layers: List[int] = []
            keep = []
            for record in self.records:
                blocks = _array([block[name] for block in record.blocks for name in BLOCK])
                koff = _array(record.koff)
                keep += [blocks, koff]
                record.put(blocks=ctypes.addressof(blocks), koff=ctypes.addressof(koff))
                layers += [record.fields[name] for name in LAYER]
            self.handle = lib.csp_program(_array(layers), len(self.records), self.scratch, self.tiles, self.arena.own)
            for steps in self.steps:
                lib.csp_steps(self.handle, _array([int(v) for step in steps for v in step]), len(steps))
        assert self.handle is not None
        return self.handle

    def __del__(self) -> None:
        if getattr(self, 'handle', None):
            self._lib.csp_program_free(self.handle)


def _shape(value: Value) -> Tuple[int, int, int]:
    return value.c, value.h, value.w


def _array(numbers: List[int]) -> Any:
    return (ctypes.c_int64 * max(len(numbers), 1))(*numbers)


def _place(value: Value) -> Tuple[int, int, int, int]:
    """Offset, bytes from pixel to pixel, rows that there is room for, and place."""
    buffer = value.buffer
    assert buffer is not None
    return buffer.address + value.offset * value.item, buffer.stride, buffer.rows, buffer.place


def _record(
        layer: Layer, packed: Optional[Dict[str, Any]], pool: Pool, images: int, tiles: bool, tuning: Tuning) -> Record:
    """A layer as the engine reads it; a step of it has up to ``images`` images."""
    r = Record()
    r.put(kind=KINDS[layer.op], is_f32=layer.is_f32, act=ACTIVATIONS.index(layer.act),
          act_param=float_bits(layer.slope))
    if layer.ins:
        x = layer.ins[0]
        offset, stride, rows, place = _place(x)
        r.put(in_off=offset, in_ps=stride, in_rows=rows, in_place=place, in_h=x.h, in_w=x.w, in_c=x.c, in8=x.is8,
              in_turns=reads_in_place(layer, packed))
        if x.is8:
            r.put(**dict(zip(('in_scale', 'in_zero', 'fill'), map(pool.keep, x.tables))))
    other = layer.res if layer.res is not None else layer.ins[1] if len(layer.ins) > 1 else None
    if other is not None:
        offset, stride, rows, place = _place(other)
        r.put(in2_off=offset, in2_ps=stride, in2_rows=rows, in2_place=place, in2_8=other.is8,
              in2_small=(other.h, other.w) != (layer.ins[0].h, layer.ins[0].w) if layer.op != 'conv' else False)
        if other.is8:
            r.put(in2_scale=pool.keep(other.tables[0]), in2_zero=pool.keep(other.tables[1]))
    if layer.outs:
        y = layer.outs[0]
        offset, stride, rows, place = _place(y)
        r.put(out_off=offset, out_ps=stride, out_rows=rows, out_place=place, out_h=y.h, out_w=y.w, out_c=y.c,
              out8=y.is8)
        if y.is8 and (layer.op == 'input' or layer.op in BINARIES or layer.depthwise):
            r.put(out_inv=pool.keep(y.inverse), out_zero=pool.keep(y.tables[1]))
    if layer.op in ('conv', 'pool'):
        r.put(kh=layer['kernel'][0], kw=layer['kernel'][1], stride=layer['stride'], pad_h=layer['pad'][0],
              pad_w=layer['pad'][1], dil=layer.fields.get('dilation', 1))
    if layer.op == 'conv':
        assert packed is not None
        r.put(res_mode=layer.res_mode, weights=packed['weights'], bias=packed['bias'])
        if layer.depthwise:
            r.put(kind=KIND.DEPTHWISE, nblocks=(layer.ins[0].c + 31) // 32, flow=packed['flow'])
        else:
            _convolution(r, layer, packed, images, tiles, tuning)
    elif layer.op == 'pool':
        r.put(flavour=POOLS[layer['kind']])
    elif layer.op in BINARIES:
        r.put(flavour=BINARIES[layer.op])
        if layer.op == 'act':
            r.put(act=ACTIVATIONS.index(layer['kind']), act_param=float_bits(layer['slope']))
    elif layer.op == 'upsample':
        for name in ('row_table', 'column_table'):
            r.put(**{name: pool.keep(torch.tensor(layer[name], dtype=torch.int32))})
    elif layer.op == 'output':
        r.put(index=layer['index'], out_h=layer.ins[0].h, out_w=layer.ins[0].w)
    return r


def _convolution(r: Record, layer: Layer, packed: Dict[str, Any], images: int, tiles: bool, tuning: Tuning) -> None:
    """What the record of a dense convolution has beyond others."""
    f = r.fields
    size, item = layer.ins[0].item, 4 if layer.is_f32 else layer.outs[0].item
    for number, (index, first, count, a_off) in enumerate(packed['blocks']):
        v, res = layer.outs[index], layer.res
        assert v.buffer is not None
        offset, stride, rows, place = _place(v)
        # The last block of a buffer also fills the room behind it, unless the residual has none.
        whole = v.offset + v.c == v.buffer.c and first + count == v.c and (
            layer.is_f32 or (v.offset + first + 32) * item <= stride) and (
            res is None or 32 * res.item <= _place(res)[1])
        block = dict.fromkeys(BLOCK, 0)
        block.update(out_off=offset + first * item, out_ps=stride, out_rows=rows, out_place=place,
                     nstore=32 if whole else count, a_off=a_off)
        if res is not None:
            offset, stride, *_ = _place(res)
            block.update(res_off=offset + first * res.item, res_ps=stride)
        if 'epilogue' in packed:
            block['epilogue'] = packed['epilogue'] + number * packed['epilogue_bytes']
        r.blocks.append(block)
    mode, tap_c = packed['mode'], packed['tap_c']
    width, s, d, kh, kw = layer.outs[0].w, layer['stride'], layer['dilation'], f['kh'], f['kw']
    span = width + (kw - 1) * d // s
    # Rows whose ends leave tiles half empty are taken as one, with the zeros between them.
    tile = 16 if tiles else 8
    flat = mode == MODE.BAND and span < -(-width // tile) * tile and not (packed['dense'] and s > 1)
    planes = s if flat else 1
    if not flat:
        span = (width - 1) * s + (kw - 1) * d + 1
    patch = (kh * kw * tap_c * size + 63) // 64 * 64
    px = tap_c * size
    if mode == MODE.BAND and px % 256 == 0 and not packed['dense']:
        px += 64  # or the pixels of a tile would share a few sets of the first-level cache
    per_row = {MODE.DIRECT: width * f['in_ps'], MODE.PATCH: width * patch, MODE.BAND: span * px * s * planes}[mode]
    everything = images * f['out_h']
    # Weights that the second-level cache cannot hold are fetched for as many positions as it can hold.
    large = weight_bytes(packed) > tuning.large_weights
    rows = min(max(1, (tuning.large_block if large else tuning.block) // per_row), everything)
    rows = -(-everything // -(-everything // rows))
    plane = (min(rows, f['out_h']) - 1) * (s // planes) + (kh - 1) * d // planes + 1
    koff = packed['koff']
    if packed['dense']:
        koff = [ky * span * px + k * 64 for ky in range(kh) for k in range((kw * px + 63) // 64)]
    elif mode == MODE.BAND:
        koff = [(((ky * d % planes * planes + kx * d % planes) * plane + ky * d // planes) * span
                 + kx * d // planes) * px + cb * 64
                for cb, (ky, kx) in in_order(
                    packed['channel_blocks'], list(itertools.product(range(kh), range(kw))), tiles)]
    steps = len(koff)
    if not tiles:
        runs = _runs(koff, packed['kcount'], tuning.longest_run)
        koff, steps = [v for run in runs for v in run], len(runs)
    r.koff = list(koff)
    r.put(nblocks=len(packed['blocks']), mode=mode, tap_c=tap_c, ksteps=steps, flat=flat, rows_at_once=rows,
          planes=planes, plane=plane, width=span, band_ps=px, flow=flow(layer), dense=packed['dense'],
          **_order(mode, packed, steps, tuning))
    r.tiles = rows * ((span + 15) // 16 + 1) + 2 * images + 2
    slack = 32 * max(px * s, patch) + 4096
    if mode == MODE.PATCH:
        r.scratch = rows * width * patch + slack
    elif mode == MODE.BAND:
        bands = min(rows, images)  # of different images
        r.scratch = bands * planes * planes * plane * span * px + slack


def _order(mode: int, packed: Dict[str, Any], steps: int, tuning: Tuning) -> Dict[str, int]:
    """Whether positions or output channels are outside, and how many steps of the product are done at a time."""
    large = weight_bytes(packed) > tuning.streamed_weights
    if not large and mode != MODE.BAND:
        return dict(by_position=True, steps_at_once=steps)
    at_once = max(1, tuning.steps_at_once * 2048 * steps * len(packed['blocks']) // weight_bytes(packed))
    return dict(fetch=large, steps_at_once=-(-steps // -(-steps // at_once)))


def _runs(offsets: List[int], counts: List[int], longest: int) -> List[Tuple[int, int, int]]:
    """Steps that read on where the one before ended are one: its offset, how many times four bytes, its weights."""
    runs: List[Tuple[int, int, int]] = []
    weights = 0
    for offset, count in zip(offsets, counts):
        if runs and runs[-1][0] + 4 * runs[-1][1] == offset and runs[-1][1] + count <= longest:
            runs[-1] = runs[-1][0], runs[-1][1] + count, runs[-1][2]
        else:
            runs.append((offset, count, weights))
        weights += 128 * count
    return runs
