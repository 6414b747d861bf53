"""Every record of a program, before it runs: what it reads and writes lies inside its memory.

The records are looked at as the engine reads them, and nothing is believed of where they come from. What a plan out of
a stranger's file leads to is refused here, if it is not where it was read.
"""
import ctypes
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from .memory import Arena
from .records import BINARY, FLOW, KIND, MODE, PLACE, POOL

__all__ = ['Memories', 'check']

LARGEST = 1 << 40  # of any number that is no address


class Memories(NamedTuple):
    """What there is.

    Attributes:
        arena: Its parts.
        images: How many there are at most.
        share: How many a thread has at most where threads work apart.
        scratch: Bytes of each thread's own memory for a layer.
        tiles: Tiles of 16 positions that each thread has room for.
        sizes: How many bytes lie at the address of each weight and table.
        input: Channels, height and width of an image.
        outputs: The same of each output.
        in_tiles: Whether the engine multiplies in tiles.
    """

    arena: Arena
    images: int
    share: int
    scratch: int
    tiles: int
    sizes: Dict[int, int]
    input: Tuple[int, int, int]
    outputs: Sequence[Tuple[int, int, int]]
    in_tiles: bool


def check(records: Sequence[Any], steps: Sequence[Sequence[Any]], memories: Memories) -> None:
    """Check a program.

    Args:
        records: The layers.
        steps: Of each thread.
        memories: What there is.

    Raises:
        ValueError: If something would be read or written outside its memory; the message has layer and number.
    """
    found = [_Check(i, record, memories) for i, record in enumerate(records)]
    mine: List[set] = [set() for _ in records]
    waits = []
    for order in steps:
        waits.append([step.barrier for step in order].count(True))
        for step in order:
            if not step.barrier:
                if not 0 <= step.layer < len(records):
                    raise ValueError(f'A step of the program is of layer {step.layer}, and there are {len(records)}.')
                mine[step.layer].add(step)
    if len(set(waits)) > 1:
        raise ValueError(f'The program\'s threads wait for one another {waits} times.')
    for one, its in zip(found, mine):
        one.check(its)


class _Check:
    """One layer."""

    def __init__(self, number: int, record: Any, memories: Memories) -> None:
        self.number, self.record, self.f, self.m = number, record, record.fields, memories
        self.images = 1  # of a step at most

    def fail(self, what: str) -> ValueError:
        kind = self.f['kind']
        name = KIND(kind).name if 0 <= kind < len(KIND) else kind
        return ValueError(f'The program\'s layer {self.number} ({name}) has {what}.')

    def between(self, low: int, value: int, high: int, what: str) -> None:
        if not low <= value <= high:
            raise self.fail(f'{what} {value}, which is not from {low} to {high}')

    def same(self, one: Tuple[int, ...], other: Tuple[int, ...], what: str) -> None:
        if tuple(one) != tuple(other):
            raise self.fail(f'{what} of {one}, which should be {other}')

    def known(self, address: int, size: int, what: str) -> None:
        """Whether there are so many bytes at an address that is a tensor's."""
        there = self.m.sizes.get(address)
        if there is None:
            for start, length in self.m.sizes.items():
                if start <= address < start + length:
                    there = start + length - address
        if there is None or size > there:
            raise self.fail(f'{size} bytes of {what}, where there are {there or 0}')

    def check(self, steps: set) -> None:
        f = self.f
        if not steps:
            return
        for name, value in f.items():
            if not name.startswith(('in_scale', 'in_zero', 'in2_scale', 'in2_zero', 'fill', 'weights', 'bias', 'blocks',
                                    'koff', 'row_table', 'column_table', 'act_param', 'out_inv', 'out_zero')):
                self.between(0, value, LARGEST, name)
        self.between(0, f['kind'], max(KIND), 'kind')
        for name in ('in_place', 'in2_place', 'out_place'):
            self.between(0, f[name], max(PLACE), name)
        for name in ('in_rows', 'in2_rows', 'out_rows', 'stride', 'dil', 'kh', 'kw'):
            self.between(1, f[name], LARGEST, name)
        kind = f['kind']
        if kind not in (KIND.INPUT, KIND.ZEROS):
            for name in ('in_h', 'in_w', 'in_c', 'in_ps'):
                self.between(1, f[name], LARGEST, name)
        height, blocks = f['out_h'], f['nblocks'] if kind == KIND.CONV else 0
        self.between(1, height, LARGEST, 'out_h')
        for step in steps:
            limit = self.m.share if step.apart else self.m.images
            if not (0 <= step.b0 < step.b1 <= limit and 0 <= step.y0 < step.y1 <= height
                    and 0 <= step.n0 <= step.n1 <= blocks and (step.n0 < step.n1) == bool(blocks)):
                raise self.fail(f'a step of images {step.b0} to {step.b1}, rows {step.y0} to {step.y1} and blocks '
                                f'{step.n0} to {step.n1}')
            self.images = max(self.images, step.b1 - step.b0)
        apart = {step.apart for step in steps}
        places = {f[name] for name, there in (
            ('in_place', kind not in (KIND.INPUT, KIND.ZEROS)), ('in2_place', self.has_second()),
            ('out_place', kind not in (KIND.OUTPUT, KIND.CONV))) if there}
        places |= {block['out_place'] for block in self.record.blocks}
        if apart != {True} and places != {PLACE.SHARED}:
            raise self.fail('a thread\'s own memory for what all threads share')
        self.most: Dict[int, int] = {
            PLACE.SHARED: self.m.images, PLACE.OWN: self.m.share, PLACE.LOCAL: self.images}
        item_in, item_out, item_2 = (1 if f[name] else 2 for name in ('in8', 'out8', 'in2_8'))
        if kind not in (KIND.INPUT, KIND.ZEROS) and kind != KIND.CONV:
            size = 4 if kind == KIND.OUTPUT and f['is_f32'] else item_in
            self.map('in', f['in_off'], f['in_ps'], f['in_h'], f['in_w'], f['in_rows'], f['in_place'],
                     f['in_c'] * size)
        if kind not in (KIND.OUTPUT, KIND.CONV):
            self.map('out', f['out_off'], f['out_ps'], height, f['out_w'], f['out_rows'], f['out_place'],
                     f['out_c'] * item_out)
            self.turns('out', f['out_rows'], height, steps)
        if self.has_second() and kind != KIND.CONV:
            small = f['in2_small']
            self.map('in2', f['in2_off'], f['in2_ps'], 1 if small else height, 1 if small else f['out_w'],
                     f['in2_rows'], f['in2_place'], f['out_c'] * item_2)
            if not small:
                self.turns('in2', f['in2_rows'], height, steps)
        if f['in_turns']:
            self.turns('in', f['in_rows'], f['in_h'], steps)
            self.same((f['in_h'], f['in_w']), (height, f['out_w']), 'a map')
        self.tables(steps)
        if kind in (KIND.DEPTHWISE, KIND.POOL, KIND.BINARY, KIND.UPSAMPLE, KIND.MEAN):
            self.between(f['in_c'], f['out_c'], f['in_c'], 'out_c')
        direct = kind == KIND.CONV and f['mode'] == MODE.DIRECT
        self.between(int(direct or kind in (KIND.BINARY, KIND.OUTPUT)), f['in_turns'],
                     int(direct or kind in (KIND.BINARY, KIND.OUTPUT)), 'in_turns')
        if kind == KIND.OUTPUT:
            self.between(0, f['index'], len(self.m.outputs) - 1, 'index')
            self.same((f['in_c'], f['in_h'], f['in_w']), self.m.outputs[f['index']], 'an output')
        elif kind == KIND.INPUT:
            self.same((f['out_c'], height, f['out_w']), self.m.input, 'an image')
        elif kind == KIND.MEAN:
            self.same((height, f['out_w'], f['out8']), (1, 1, 0), 'a mean')
        elif kind == KIND.POOL:
            self.between(0, f['flavour'], max(POOL), 'flavour')
            self.window()
            self.between(f['in8'], f['out8'], f['in8'], 'out8')
        elif kind == KIND.BINARY:
            self.between(0, f['flavour'], max(BINARY), 'flavour')
        elif kind == KIND.UPSAMPLE:
            self.between(f['in8'], f['out8'], f['in8'], 'out8')
            for name, count, size in (('row_table', height, f['in_h']), ('column_table', f['out_w'], f['in_w'])):
                self.known(f[name], 4 * count, name)
                for row in (ctypes.c_int32 * count).from_address(f[name]):
                    self.between(0, row, size - 1, f'a number in {name}')
        elif kind == KIND.DEPTHWISE:
            self.depthwise()
        elif kind == KIND.CONV:
            self.convolution(steps)

    def has_second(self) -> bool:
        f = self.f
        return bool(f['res_mode']) or (f['kind'] == KIND.BINARY and f['flavour'] != BINARY.ACTIVATION)

    def region(self, place: int) -> range:
        arena = self.m.arena
        return range(0, arena.shared) if place == PLACE.SHARED else range(arena.shared, arena.shared + arena.own)

    def others(self, place: int) -> int:
        """How far behind the first thread's memory the last one's lies."""
        team = self.m.images // self.m.share if self.m.share else 1
        return 0 if place == PLACE.SHARED else self.m.arena.own * (team - 1)

    def tiles_of_runs(self) -> int:
        """Of rows that follow one another in memory, within an image: the last tile of each run may be in part."""
        rows = self.f['rows_at_once']
        return -(-rows * self.f['out_w'] // 16) + min(rows, self.images + 1) + 1

    def map(self, what: str, offset: int, stride: int, h: int, w: int, rows: int, place: int, size: int) -> None:
        """A map's pixels lie in the memory of its place, for as many images as it may be asked for."""
        images = self.most[place]
        if rows < h and (place != PLACE.LOCAL or images > 1):
            raise self.fail(f'{what}_rows {rows} of {h}, and not one image at a time in a thread\'s own memory')
        self.between(size, stride, LARGEST, f'{what}_ps')
        room = self.region(place)
        end = offset + ((images - 1) * h * w + min(rows, h) * w - 1) * stride + size
        if not (room.start <= offset and end <= room.stop):
            raise self.fail(f'{what} from {offset} to {end}, and its memory goes from {room.start} to {room.stop}')

    def turns(self, what: str, rows: int, h: int, steps: set) -> None:
        """Where not all rows have room, those of a step lie side by side."""
        if rows < h:
            for step in steps:
                if step.y0 // rows != (step.y1 - 1) // rows:
                    raise self.fail(f'a step of rows {step.y0} to {step.y1}, where {what} has room for {rows} at once')

    def tables(self, steps: set) -> None:
        """Scales, zeros and fills of maps in bytes have a number for each channel that is read or written."""
        f = self.f
        kind = f['kind']
        up = (f['in_c'] + 31) // 32 * 32
        if f['in8'] and kind in (KIND.MEAN, KIND.BINARY, KIND.OUTPUT, KIND.DEPTHWISE, KIND.POOL):
            self.known(f['in_scale'], 4 * up, 'in_scale')
            self.known(f['in_zero'], 4 * up, 'in_zero')
        if f['in2_8'] and self.has_second() and kind in (KIND.BINARY, KIND.DEPTHWISE):
            self.known(f['in2_scale'], 4 * up, 'in2_scale')
            self.known(f['in2_zero'], 4 * up, 'in2_zero')
        if f['out8'] and kind in (KIND.INPUT, KIND.BINARY, KIND.DEPTHWISE):
            up = (f['out_c'] + 31) // 32 * 32
            self.known(f['out_inv'], 4 * up, 'out_inv')
            self.known(f['out_zero'], 4 * up, 'out_zero')

    def window(self) -> None:
        """Each window of a pooling lies on the map, at least in part."""
        f = self.f
        for out, size, k, pad in (
                (f['out_h'], f['in_h'], f['kh'], f['pad_h']), (f['out_w'], f['in_w'], f['kw'], f['pad_w'])):
            self.between(0, pad, k - 1, 'pad')
            if (out - 1) * f['stride'] - pad >= size:
                raise self.fail(f'a window beyond a map of {size}')

    def depthwise(self) -> None:
        f = self.f
        channels = f['nblocks'] * 32
        self.between(f['in_c'], channels, f['in_c'] + 31, 'nblocks')
        taps = f['kh'] * f['kw']
        if f['flow'] == FLOW.BYTES:
            if not f['in8'] or f['dil'] != 1:
                raise self.fail('words for a map that is not in bytes, or with a dilation')
            self.known(f['weights'], (f['kh'] + 1) // 2 * f['kw'] * channels * 4, 'weights')
            self.known(f['bias'], 8 * channels, 'bias')
            self.known(f['fill'], channels, 'fill')
        else:
            self.between(FLOW.HALF, f['flow'], FLOW.HALF, 'flow')
            self.known(f['weights'], 4 * taps * channels, 'weights')
            self.known(f['bias'], 4 * channels, 'bias')

    def convolution(self, steps: set) -> None:
        f, blocks, arena, in_tiles = self.f, self.record.blocks, self.m.arena, self.m.in_tiles
        self.between(0, f['mode'], max(MODE), 'mode')
        self.between(0, f['flow'], max(FLOW), 'flow')
        self.between(0, f['res_mode'], 2, 'res_mode')
        for name in ('out_w', 'tap_c', 'ksteps', 'rows_at_once', 'steps_at_once', 'planes', 'plane', 'width',
                     'band_ps'):
            self.between(1, f[name], LARGEST, name)
        self.between(len(blocks), f['nblocks'], len(blocks), 'nblocks')
        of_bytes = f['flow'] in (FLOW.BYTES, FLOW.FROM_BYTES)
        if of_bytes != bool(f['in8']):
            raise self.fail(f'flow {f["flow"]} with in8={f["in8"]}')
        size, item_2 = (1 if f[name] else 2 for name in ('in8', 'in2_8'))
        item = 4 if f['is_f32'] else 1 if f['out8'] else 2
        if (f['is_f32'] and f['out8']) or (
                f['flow'] in (FLOW.BYTES, FLOW.HALF) and bool(f['out8']) != (f['flow'] == FLOW.BYTES)):
            raise self.fail(f'flow {f["flow"]} with out8={f["out8"]} and is_f32={f["is_f32"]}')
        if f['res_mode'] and f['flow'] in (FLOW.BYTES, FLOW.HALF) and bool(f['in2_8']) != (f['flow'] == FLOW.BYTES):
            raise self.fail(f'flow {f["flow"]} with in2_8={f["in2_8"]}')
        # How far a product reads beyond the first byte of a position, and its weights.
        koff = self.record.koff
        if in_tiles:
            self.between(f['ksteps'], len(koff), f['ksteps'], 'ksteps')
            reach, panel = max(koff) + 64, f['ksteps'] * 2048
            low = min(koff)
        else:
            self.between(3 * f['ksteps'], len(koff), 3 * f['ksteps'], 'ksteps')
            runs = [koff[i:i + 3] for i in range(0, len(koff), 3)]
            low = min(min(run) for run in runs)
            reach, panel = max(a + 4 * n for a, n, _ in runs), max(128 * (w // 128 + n) for _, n, w in runs)
            if any(w % 128 for *_, w in runs) or runs[-1][2] + 128 * runs[-1][1] != panel:
                raise self.fail('runs whose weights do not follow one another')
        self.between(0, low, LARGEST, 'koff')
        self.known(f['weights'], panel * len(blocks), 'weights')
        self.known(f['bias'], 128 * len(blocks), 'bias')
        height, width, stride, d = f['out_h'], f['out_w'], f['stride'], f['dil']
        epilogue = 32 * (4 + 4 * 2) if f['flow'] == FLOW.BYTES and in_tiles else 32 * 5 * 4
        epilogue = 0 if f['flow'] == FLOW.HALF else epilogue
        furthest = 0
        for block in blocks:
            self.between(1, block['nstore'], 32, 'nstore')
            self.between(0, block['a_off'], LARGEST, 'a_off')
            self.between(0, block['out_place'], max(PLACE), 'out_place')
            self.between(1, block['out_rows'], LARGEST, 'out_rows')
            self.map('a block\'s out', block['out_off'], block['out_ps'], height, width, block['out_rows'],
                     block['out_place'], block['nstore'] * item)
            self.turns('a block\'s out', block['out_rows'], height, steps)
            if f['res_mode']:
                self.map('a block\'s res', block['res_off'], block['res_ps'], height, width, f['in2_rows'],
                         f['in2_place'], block['nstore'] * item_2)
                self.turns('a block\'s res', f['in2_rows'], height, steps)
            if epilogue:
                self.known(block['epilogue'], epilogue, 'epilogue')
            furthest = max(furthest, block['a_off'])
        reach += furthest
        # The map itself.
        pixels = ((self.most[f['in_place']] - 1) * f['in_h'] + min(f['in_rows'], f['in_h'])) * f['in_w']
        if f['mode'] == MODE.DIRECT:
            self.map('in', f['in_off'], f['in_ps'], height, width, f['in_rows'], f['in_place'], 1)
            # A tile reads 16 positions whether they are there or not.
            end = f['in_off'] + (pixels + 15) * f['in_ps'] + reach + self.others(f['in_place'])
            if end > arena.total:
                raise self.fail(f'in read up to {end}, and the arena ends at {arena.total}')
            tiles = self.tiles_of_runs()
        else:
            copied = f['in_c'] * size
            self.map('in', f['in_off'], f['in_ps'], f['in_h'], f['in_w'], f['in_rows'], f['in_place'], copied)
            if f['in8'] and f['in_ps'] == f['band_ps'] and f['mode'] == MODE.BAND:
                # A row is copied as it is, with what lies behind its channels.
                end = f['in_off'] + pixels * f['in_ps'] + self.others(f['in_place'])
                if end > arena.total:
                    raise self.fail(f'in read up to {end}, and the arena ends at {arena.total}')
            if f['in8']:
                self.known(f['fill'], max(f['band_ps'] if f['mode'] == MODE.BAND else f['tap_c'], 1), 'fill')
            if f['mode'] == MODE.PATCH:
                self.between(f['in_c'], f['tap_c'], LARGEST, 'tap_c')
                patch = (f['kh'] * f['kw'] * f['tap_c'] * size + 63) // 64 * 64
                tiles = self.tiles_of_runs()
                used = (f['rows_at_once'] * width + 15) * patch
                last = (f['rows_at_once'] * width - 1 + 15) * patch
            else:
                px, s = f['band_ps'], f['planes']
                self.between(f['in_c'] * size, px, LARGEST, 'band_ps')
                if stride % s or (not f['dense'] and px % 64):
                    raise self.fail(f'planes {s} at a stride of {stride}, pixels of {px} bytes')
                rows = min(f['rows_at_once'], height)
                needed = (rows - 1) * (stride // s) + (f['kh'] - 1) * d // s + 1
                self.between(needed, f['plane'], LARGEST, 'plane')
                pieces = min(self.images, f['rows_at_once'])
                one = s * s * f['plane'] * f['width'] * px
                used = pieces * one
                if f['flat']:
                    self.between(stride, s, stride, 'planes')
                    tiles = -(-f['rows_at_once'] * f['width'] // 16) + pieces + 1
                    last = (pieces - 1) * one + (rows * f['width'] - 1 + 15) * px
                else:
                    self.between(1, s, 1, 'planes')
                    tiles = f['rows_at_once'] * ((width + 15) // 16) + 1
                    last = (pieces - 1) * one + (((rows - 1) * f['width'] + width - 1 + 15) * stride) * px
            end = max(used, last + reach)
            if end > self.m.scratch:
                raise self.fail(f'{end} bytes of scratch memory, where there are {self.m.scratch}')
        self.between(1, tiles, self.m.tiles, 'tiles')
