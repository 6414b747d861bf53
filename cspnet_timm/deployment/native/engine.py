"""Running a plan: sizes of images, memory, threads."""
import ctypes
import os
import threading
from typing import Any, Dict, List, Optional, Tuple

import torch

from .build import library
from .graph import Layer
from .memory import Memory, Pool, available_bytes
from .packing import pack_depthwise, pack_weights
from .placing import arrange
from .plan import Plan
from .program import Program
from .tuning import Tuning

__all__ = ['NativeEngine']

MAX_SIZES = 4  # sizes of images whose programs are kept


class NativeEngine:
    """A plan, ready to run.

    Called with images ``(B, C, H, W)`` in float32, it returns the list of the network's outputs in float32. Any batch
    size and any size of image will do. A size of image has two programs at most, made when they are first needed: one
    for fewer images than threads, and one for all other batches; all of them share one arena.
    """

    def __init__(
            self,
            plan: Plan,
            threads: int,
            precision: str = 'bfloat16',
            tuning: Optional[Tuning] = None,
    ) -> None:
        """
        Args:
            plan: The network.
            threads: Threads that compute.
            precision: What the maps and weights are kept in: ``'bfloat16'``, or ``'int8'``.
            tuning: What the order of work goes by, if not by the usual sizes of caches.

        Raises:
            ValueError: If the precision is unknown, the plan has no ranges for int8, there are no threads, or the plan
                would read or write outside its memory.
            RuntimeError: If the engine cannot run on this machine.
            MemoryError: If the plan takes more memory than there is.
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
        self.tuning = tuning or Tuning()
        self.pool = Pool()
        self._lib = library()
        self.tiles = bool(self._lib.csp_tiles())
        self._lock = threading.Lock()
        self._team: Optional[int] = None
        self._arena: Optional[Memory] = None
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
            if not self._team:
                self._team = None
                raise RuntimeError(
                    f'The native engine wants {self.threads} threads, and the system does not give them.')
        return self._team

    def _room(self, program: Program) -> int:
        """The address of an arena that is large enough; there is one, and it grows."""
        if self._arena is None or self._arena.size < program.arena.total:
            self._arena = None  # the old one first, whose maps nobody needs any more
            self._arena = Memory(program.arena.total)
        if not self._lib.csp_reserve(self._threads(), program.compile()):
            raise MemoryError('The native engine finds no memory for its threads.')
        return self._arena.address

    def __call__(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Run the network.

        Args:
            x: Images ``(B, C, H, W)``, float32, on the CPU, contiguous or channels-last.

        Returns:
            The outputs, ``(B, C', H', W')`` in channels-last memory or ``(B, C')``.

        Raises:
            ValueError: If the images are not as said, or the network cannot take their size.
            MemoryError: If there is no memory for images of this size.
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
        self.programs: Dict[bool, Program] = {}
        self.outputs = [(layer.ins[0].c, layer.ins[0].h, layer.ins[0].w, layer['vector'])
                        for layer in self.layout.layers if layer.op == 'output']
        self.packed = {}
        for i, layer in enumerate(self.layout.layers):
            if layer.op == 'conv':
                # The same at every size of image, as the layers are; their shapes say so.
                key = (i, layer['kernel'], *(v.is8 for v in layer.reads + layer.outs),
                       *(tuple(w.shape) for w in layer.weights))
                if key not in engine._weights:
                    engine._weights[key] = _pack(layer, engine.tiles, engine.pool)
                self.packed[layer] = engine._weights[key]
            layer.weights, layer.biases, layer.units = [], [], []

    def program(self, apart: bool) -> Program:
        """What runs as many images as there are threads, or more (``apart``), or fewer."""
        if apart not in self.programs:
            self.programs[apart] = self._program(apart)
        return self.programs[apart]

    def _program(self, apart: bool) -> Program:
        e = self.engine
        there = available_bytes() + (e._arena.size if e._arena is not None else 0)
        share = e.tuning.chunk if apart else 0
        while True:
            program = Program(self.layout, self.packed, e.pool, share, e.threads, e.tiles, e.tuning)
            wanted = program.arena.total + e.threads * (program.scratch + program.tiles * 2048)
            if wanted <= there:
                return program
            if share <= 1:
                raise MemoryError(f'The native engine takes {wanted >> 20} MiB for this network at this size of image, '
                                  f'and there are {there >> 20} MiB.')
            share //= 2

    def run(self, x: torch.Tensor) -> List[torch.Tensor]:
        batch, threads = len(x), self.engine.threads
        results = [torch.empty(batch, h, w, c) for c, h, w, _ in self.outputs]
        jobs: List[Tuple[Program, int, int]] = []
        start = 0
        while start < batch:
            program = self.program(batch - start >= threads)
            count = min(batch - start, program.images)
            jobs.append((program, start, count))
            start += count
        flat: List[int] = []
        keep = []
        address = 0
        for program, first, _ in jobs:
            if first == 0 or program is not jobs[0][0]:
                address = self.engine._room(program)  # one for all; it has grown to the largest when the last has asked
        for program, start, count in jobs:
            pointers = (ctypes.c_int64 * len(results))(*(r[start:].data_ptr() for r in results))
            keep.append(pointers)
            # The members of a job, in their order.
            flat += [program.compile(), address, count, x[start:].data_ptr(), *x.stride(), ctypes.addressof(pointers)]
        self.engine._lib.csp_run(self.engine._threads(), (ctypes.c_int64 * max(len(flat), 1))(*flat), len(jobs))
        return [r.flatten(1) if vector else r.permute(0, 3, 1, 2) for r, (*_, vector) in zip(results, self.outputs)]


def _pack(layer: Layer, tiles: bool, pool: Pool) -> Dict[str, Any]:
    packed = pack_depthwise(layer, tiles) if layer.depthwise else pack_weights(layer, tiles)
    if 'epilogue' in packed:
        packed['epilogue_bytes'] = packed['epilogue'].shape[1]
    for key in ('weights', 'bias', *(['epilogue'] if 'epilogue' in packed else [])):
        packed[key] = pool.keep(packed[key].contiguous())
    return packed
