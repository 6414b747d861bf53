"""What a plan becomes on its way to the engine: layers that read and write maps, and maps in buffers."""
import functools
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F

from .records import PLACE

__all__ = ['Buffer', 'Layer', 'Value', 'link']


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

    @property
    def inverse(self) -> torch.Tensor:
        """One over each of the scales, with room behind them."""
        assert self.scale is not None
        return F.pad(1 / self.scale, (0, -self.c % 64 + 64))


class Buffer:
    """Memory of one or several maps side by side in channels; ``stride`` bytes from pixel to pixel."""

    def __init__(self, c: int, h: int, w: int, is8: bool) -> None:
        self.c, self.h, self.w, self.rows = c, h, w, h
        if is8:
            self.stride = (c + 15) // 16 * 16
        else:
            self.stride = 2 * (c if c < 16 else (c + 31) // 32 * 32)
        self.first, self.last = 1 << 60, -1  # of the segments that use it
        self.address = 0
        self.alone = False  # nothing else ever lies there
        self.place = PLACE.SHARED

    def bytes(self, images: int) -> int:
        """How much it takes for a number of images."""
        return images * self.rows * self.w * self.stride


class Layer:
    """One piece of work: reads ``ins``, writes ``outs``."""

    def __init__(self, op: str, ins: List[Value], outs: List[Value], fields: Optional[Dict[str, Any]] = None) -> None:
        self.op, self.ins, self.outs, self.fields = op, ins, outs, dict(fields or {})
        self.act, self.slope, self.res, self.res_mode = 'none', 0., None, 0  # type: str, float, Optional[Value], int
        self.weights: List[torch.Tensor] = []  # of each output of a convolution
        self.biases: List[torch.Tensor] = []
        self.units: List[Optional[torch.Tensor]] = []  # of weights in bytes, what a step stands for if that is given
        self.peaks: List[float] = []  # the largest magnitude of each output's sums, where maps lie in bytes
        self.depthwise = False
        self.is_f32 = False

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    @property
    def reads(self) -> List[Value]:
        """All maps that the layer reads."""
        return self.ins + ([self.res] if self.res is not None else [])


def link(layers: List[Layer]) -> None:
    """Tell every map who writes it and who reads it."""
    for layer in layers:
        for v in layer.reads + layer.outs:
            v.users = []
    for layer in layers:
        for v in layer.outs:
            v.layer = layer
        for v in layer.reads:
            v.users.append(layer)
