"""Memory: areas of the engine's own allocator, and which map lies where in the arena."""
import ctypes
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import torch

from .build import library
from .graph import Buffer
from .placing import Layout
from .records import PLACE
from .schedule import Segment

__all__ = ['Arena', 'Memory', 'Pool', 'allocate', 'available_bytes']

CHUNK_BYTES = 4 << 20  # of weights that lie together in large pages


class Memory:
    """An area of the engine's own allocator: aligned, and in large pages if it is large."""

    def __init__(self, size: int) -> None:
        """
        Args:
            size: Bytes.

        Raises:
            MemoryError: If they are not there.
        """
        self.lib = library()
        self.size = size
        self.address = self.lib.csp_alloc(max(size, 1))
        if not self.address:
            raise MemoryError(f'The native engine takes {size >> 20} MiB, and the system does not give them.')

    def __del__(self) -> None:
        if getattr(self, 'address', None):
            self.lib.csp_free(self.address)


class Pool:
    """Copies of tensors, side by side in a few areas, and how many bytes lie at each address."""

    def __init__(self) -> None:
        self.sizes: Dict[int, int] = {}
        self._areas: List[Memory] = []
        self._used = 0
        self._known: Dict[Tuple[torch.dtype, bytes], int] = {}

    def keep(self, tensor: torch.Tensor) -> int:
        """Copy a tensor.

        Args:
            tensor: Contiguous, on the CPU.

        Returns:
            Its address; the same for one that was kept before.
        """
        size = tensor.numel() * tensor.element_size()
        key = tensor.dtype, ctypes.string_at(tensor.data_ptr(), size) if size <= 1 << 12 else b''
        if key[1] and key in self._known:
            return self._known[key]
        room = -(-size // 64) * 64
        if not self._areas or self._used + room > self._areas[-1].size:
            self._areas.append(Memory(max(CHUNK_BYTES, room)))
            self._used = 0
        address = self._areas[-1].address + self._used
        self._used += room
        ctypes.memmove(address, tensor.data_ptr(), size)
        self.sizes[address] = size
        if key[1]:
            self._known[key] = address
        return address


class Arena(NamedTuple):
    """Sizes of an arena: of what all threads share, of what each has for itself behind it, and of all of it."""

    shared: int
    own: int
    total: int


def allocate(layout: Layout, segments: List[Segment], images: int, share: int, team: int) -> Arena:
    """Give each buffer a place and an address, such that those alive together do not overlap.

    Args:
        layout: The layers and buffers.
        segments: The order of work.
        images: How many there are at most.
        share: How many a thread has at most where threads work apart.
        team: How many threads there are.

    Returns:
        The sizes.
    """
    # Threads that work apart do not wait for one another: what only they use, each has in memory of its own.
    epochs: List[int] = []
    for i, segment in enumerate(segments):
        epochs.append(epochs[-1] + (not (segment.apart and segments[i - 1].apart)) if i else 0)
    shared, own = [], []
    for b in layout.buffers:
        b.place = PLACE.SHARED
        if segments[b.first].apart and epochs[b.first] == epochs[b.last] and not b.alone:
            b.place = PLACE.LOCAL if b.first == b.last else PLACE.OWN
            size = b.bytes(segments[b.first].images if b.place == PLACE.LOCAL else share)
            own.append((b, b.first, b.last, size))
        else:
            shared.append((b, epochs[b.first], epochs[b.last], b.bytes(images)))
    # A tile reads 16 pixels whether they are there or not.
    slack = 32 * max(b.stride for b in layout.buffers) + 4096
    total = _side_by_side(shared)
    size = _side_by_side(own) + slack
    for b, *_ in own:
        b.address += total
    return Arena(total, size, total + size * team + slack)


def _side_by_side(wanted: List[Tuple[Buffer, int, int, int]]) -> int:
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


def available_bytes() -> int:
    """Memory that the system can give without paging, as far as it says so; else a great deal."""
    found = [1 << 60]
    try:
        lines = dict(line.split(':') for line in Path('/proc/meminfo').read_text().splitlines())
        found.append(int(lines['MemAvailable'].split()[0]) << 10)
    except (OSError, KeyError, ValueError, IndexError):
        pass
    for limit, used in (('memory.max', 'memory.current'),
                        ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes')):
        try:
            numbers: List[Any] = [int(Path('/sys/fs/cgroup', name).read_text()) for name in (limit, used)]
            found.append(max(numbers[0] - numbers[1], 0))
        except (OSError, ValueError):
            pass
    return min(found)
