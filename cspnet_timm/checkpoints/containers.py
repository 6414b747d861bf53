"""Files that pickles come in: torch's zip archives, torch's older format, and plain pickles of numpy arrays.

A :class:`Container` is opened by reading the pickle alone. Where every storage lies is checked against the file before
anything is allocated for it, and :meth:`Container.load` reads those tensors that are asked for, straight into place.
"""
import os
import re
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

import torch

from ._errors import CheckpointError
from .unpickle import STORAGE_DTYPES, Array, Blob, Budget, Storage, Stream, Symbol, Unpickler

__all__ = ['Container', 'is_container']

_ZIP_MAGIC = b'PK\x03\x04'
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_TORCH_PROTOCOL = 1001
_CHUNK = 1 << 18
_RECORD_COST = 400  # of a zip member's entry in memory
_HALF = (torch.float16, torch.bfloat16)  # become float32


class _Member(NamedTuple):
    start: int
    size: int
    crc: int
    packed: bool


class _Extent(NamedTuple):
    """Where a storage lies in the file."""

    start: int
    size: int
    crc: Optional[int]


def is_container(head: bytes) -> bool:
    """Tell from a file's first bytes whether it is a zip archive or a pickle."""
    return head.startswith(_ZIP_MAGIC) or (len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5)


class Container:
    """An open checkpoint file. A context manager: the tensors can be read until it is closed.

    Attributes:
        kind: What the file is, in words.
        root: The object that was pickled, with an :class:`~cspnet_timm.checkpoints.unpickle.Array` for each tensor.
        modules: Names of the modules whose classes and functions the pickle names.
    """

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: The file.

        Raises:
            CheckpointError: If it is damaged, or its pickle asks for more than tensors, containers and numbers.
            OSError: If it cannot be read.
        """
        self._file: Any = path.open('rb')
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self._budget = Budget(self.size)
            self._extents: Dict[str, _Extent] = {}
            self._checked: Set[str] = set()
            self._has_sums = False
            self.modules: List[str] = []
            head = self._file.read(len(_ZIP_MAGIC))
            self.root: Any = None
            if head == _ZIP_MAGIC:
                self.kind = 'torch zip archive'
                self._open_zip()
            else:
                self._open_pickle()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> 'Container':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.root = None
        self._file.close()

    def _unpickle(self, stream: Stream, persistent: Any = None) -> Any:
        unpickler = Unpickler(stream, self._budget, persistent)
        root = unpickler.load()
        self.modules = sorted({module for module, _ in unpickler.symbols} | set(self.modules))
        return root

    # A plain pickle, or torch's format before 1.6: several pickles in a row and the storages behind them

    def _open_pickle(self) -> None:
        self.kind = 'pickle'
        stream = Stream(self._file, 0, self.size)
        first = self._unpickle(stream)
        if type(first) is not int or first != _TORCH_MAGIC:
            self.root = first
            return
        self.kind = 'torch legacy file'
        protocol = self._unpickle(stream)
        if type(protocol) is not int or protocol != _TORCH_PROTOCOL:
            raise CheckpointError('it is of another version of torch\'s legacy format than 1001.')
        system = self._unpickle(stream)
        if not isinstance(system, dict) or system.get('little_endian') is not True:
            raise CheckpointError('it was written on a big-endian machine, which cannot be read.')
        storages: Dict[str, Tuple[torch.dtype, int]] = {}

        def persistent(pid: Any) -> Any:
            storage = _storage_of(pid)
            if isinstance(storage, Storage):
                # What lies in the file is the root storage, and it is larger than a view of it.
                declared = storages.setdefault(storage.key, (storage.dtype, pid[4]))
                if declared[0].itemsize * declared[1] != storage.dtype.itemsize * pid[4]:
                    raise CheckpointError(f'its storage {storage.key!r} has two sizes.')
            return storage

        self.root = self._unpickle(stream, persistent)
        keys = self._unpickle(stream)
        if type(keys) is not list or any(type(key) is not str for key in keys) or len(set(keys)) < len(keys) or (
                set(keys) != set(storages)):
            raise CheckpointError('the list of its storages is not that of the tensors in it.')
        for key in keys:
            dtype, numel = storages[key]
            stored, = struct.unpack('<q', stream.read(8))
            if stored != numel:
                raise CheckpointError(f'its storage {key!r} has {stored} elements, but tensors of {numel} refer to it.')
            size = numel * dtype.itemsize
            self._extents[key] = _Extent(stream.skip(size), size, None)

    # A zip archive, which torch stores uncompressed

    def _open_zip(self) -> None:
        members = _read_directory(self._file, self.size, self._budget)
        pickles = [name for name in members if name.count('/') == 1 and name.endswith('/data.pkl')]
        folders = {name.partition('/')[0] for name in members}
        for folder in folders:
            if f'{folder}/constants.pkl' in members or any(name.startswith(f'{folder}/code/') for name in members):
                raise CheckpointError(
                    'it is a TorchScript program, which holds code beside its weights; refused. Save the state dict '
                    'of the model that it was made from.'
                )
            if f'{folder}/archive_format' in members or f'{folder}/models/model.json' in members:
                raise CheckpointError('it is a program of torch.export (.pt2), which holds a graph; refused.')
        if len(pickles) != 1:
            endings = r'\.(pt|pth|safetensors|pdparams|weights|h5|ckpt|tar)$'
            held = [name for name in members if re.search(endings, name)]
            packed = f' It holds {held[0]!r}: unpack it and pass that.' if held else ''
            raise CheckpointError(
                f'it is a zip archive, but none that torch.save writes: it has no data.pkl.{packed}')
        prefix = pickles[0][:-len('data.pkl')]
        for name, member in members.items():
            if member.packed:
                raise CheckpointError(
                    f'its part {name!r} is compressed or encrypted, which torch never does; unpack and store it.')
        # torch.utils.serialization.config.save.compute_crc32 = False leaves every checksum zero.
        self._has_sums = any(member.crc for member in members.values())
        order = members.get(f'{prefix}byteorder')
        if order is not None and Stream(self._file, order.start, order.start + order.size).read(
                min(order.size, 8)) != b'little':
            raise CheckpointError('its byte order is not little, and no other can be read.')

        def persistent(pid: Any) -> Any:
            storage = _storage_of(pid)
            if isinstance(storage, Storage):
                member = members.get(f'{prefix}data/{storage.key}')
                if member is None:
                    raise CheckpointError(f'its storage {storage.key!r} is not in the archive.')
                size = pid[4] * storage.dtype.itemsize
                if size != member.size:
                    raise CheckpointError(
                        f'its storage {storage.key!r} has {member.size} bytes, but its pickle claims {size}.')
                self._extents[storage.key] = _Extent(*member[:3])
            return storage

        member = members[pickles[0]]
        self._check_sum('data.pkl', _Extent(*member[:3]))
        self.root = self._unpickle(Stream(self._file, member.start, member.start + member.size), persistent)

    def _check_sum(self, name: str, extent: _Extent) -> None:
        if extent.crc is None or not self._has_sums or name in self._checked:
            return
        stream, crc = Stream(self._file, extent.start, extent.start + extent.size), 0
        while stream.position < stream.stop:
            crc = zlib.crc32(stream.read(min(_CHUNK, stream.stop - stream.position)), crc)
        if crc != extent.crc:
            raise CheckpointError(f'its part {name!r} is damaged: the checksum is another.')
        self._checked.add(name)

    # Tensors

    def load(self, arrays: Mapping[str, Array]) -> Dict[str, torch.Tensor]:
        """Read tensors.

        Half precision becomes float32; tensors that share their storage stay shared.

        Args:
            arrays: Descriptions by name, out of :attr:`root`.

        Returns:
            The tensors by the same names.

        Raises:
            CheckpointError: If they overlap, repeat their elements, or would not fit into twice the file's size.
        """
        self._check_overlap(arrays)
        total = 0
        out: Dict[str, torch.Tensor] = {}
        shared: Dict[Any, torch.Tensor] = {}
        for name, array in arrays.items():
            source = array.source
            identity = (
                source.key if isinstance(source, Storage) else id(source),
                array.dtype, array.offset, array.shape, array.stride, getattr(source, 'start', 0),
            )
            if identity not in shared:
                total += array.numel * _loaded(array.dtype).itemsize
                if total > 2 * self.size:
                    raise CheckpointError('its tensors together would take more than twice the memory of the file.')
                shared[identity] = self._read(name, array)
            out[name] = shared[identity]
        return out

    def _check_overlap(self, arrays: Mapping[str, Array]) -> None:
        spans: Dict[Any, List[Tuple[int, int, str]]] = {}
        for name, array in arrays.items():
            if array.source is None:
                raise CheckpointError(f'its tensor {name!r} was never given any data.')
            if array.numel and _permutation(array) is None:
                raise CheckpointError(
                    f'its tensor {name!r} of shape {array.shape} and stride {array.stride} repeats or skips elements.')
            source = array.source
            start = array.offset * array.dtype.itemsize
            key: Any = id(source)
            if isinstance(source, Storage):
                key = source.key
                start += source.start * source.dtype.itemsize
            spans.setdefault(key, []).append((start, start + array.numel * array.dtype.itemsize, name))
        for parts in spans.values():
            parts.sort()
            for (start, stop, name), (next_start, next_stop, other) in pairwise(parts):
                if next_start < stop and (start, stop) != (next_start, next_stop) and next_stop > next_start:
                    raise CheckpointError(f'its tensors {name!r} and {other!r} overlap in their storage.')

    def _read(self, name: str, array: Array) -> torch.Tensor:
        dtype = _loaded(array.dtype)
        order = _permutation(array) if array.numel else None
        shape = array.shape if order is None else tuple(array.shape[d] for d in order)
        out = torch.empty(shape, dtype=dtype)
        if not array.numel:
            return out
        source = array.source
        if isinstance(source, Storage):
            extent = self._extents[source.key]
            self._check_sum(source.key, extent)
            start = extent.start + source.start * source.dtype.itemsize + array.offset * array.dtype.itemsize
            self._fill(out, array.dtype, start)
        elif isinstance(source, Blob) and not source.utf8:
            self._fill(out, array.dtype, source.offset)
        else:
            self._fill_from_bytes(name, out, array.dtype, source)
        if order is None or list(order) == list(range(len(order))):
            return out
        inverse = [order.index(d) for d in range(len(order))]
        return out.permute(inverse)

    def _fill(self, out: torch.Tensor, dtype: torch.dtype, start: int) -> None:
        self._file.seek(start)
        flat = out.view(-1)
        if out.dtype == dtype:
            return self._read_into(flat)
        step = _CHUNK // dtype.itemsize
        for i in range(0, len(flat), step):
            part = torch.empty(min(step, len(flat) - i), dtype=dtype)
            self._read_into(part)
            flat[i:i + len(part)].copy_(part)

    def _read_into(self, flat: torch.Tensor) -> None:
        target: Any = flat.view(torch.uint8).numpy()
        if self._file.readinto(target) != len(target):
            raise CheckpointError('the file became shorter while it was read.')

    def _fill_from_bytes(self, name: str, out: torch.Tensor, dtype: torch.dtype, source: Any) -> None:
        if isinstance(source, Blob):  # Latin-1 as UTF-8, the way that protocol 2 has of writing bytes
            self._file.seek(source.offset)
            source = self._decode(name, source.size, out.numel() * dtype.itemsize)
        if len(source) != out.numel() * dtype.itemsize:
            raise CheckpointError(f'its array {name!r} has {len(source)} bytes for {out.numel()} elements.')
        out.view(-1).copy_(torch.frombuffer(bytearray(source), dtype=dtype))

    def _decode(self, name: str, size: int, expected: int) -> bytearray:
        data, rest = bytearray(), b''
        while size:
            part = self._file.read(min(_CHUNK, size))
            if not part:
                raise CheckpointError('the file became shorter while it was read.')
            size -= len(part)
            part = rest + part
            # A character of Latin-1 has at most two bytes, so that one at most is left over.
            rest = part[-1:] if size and part[-1] >= 0xc0 else b''
            try:
                data += part[:len(part) - len(rest)].decode('utf-8').encode('latin-1')
            except UnicodeError as error:
                raise CheckpointError(f'its array {name!r} has bytes that are no Latin-1 in UTF-8.') from error
            if len(data) > expected:
                raise CheckpointError(f'its array {name!r} has more bytes than elements.')
        return data


def _loaded(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _permutation(array: Array) -> Optional[Tuple[int, ...]]:
    """The order of the dimensions in which the elements lie in a row, None if there is none."""
    order = sorted(range(len(array.shape)), key=lambda d: (-array.stride[d], d))
    order.sort(key=lambda d: array.shape[d] > 1)  # where dimensions of one element are counts for nothing
    step = 1
    for d in reversed(order):
        if array.shape[d] > 1:
            if array.stride[d] != step:
                return None
            step *= array.shape[d]
    return tuple(order)


def _storage_of(pid: Any) -> Any:
    """What a persistent id of torch's stands for: a storage, or the class of a module in the oldest files."""
    if type(pid) is not tuple or not pid:
        raise CheckpointError('a persistent id of its pickle is none of torch\'s.')
    if pid[0] == 'module' and len(pid) == 4 and isinstance(pid[1], Symbol):
        return pid[1]
    if pid[0] != 'storage' or len(pid) not in (5, 6):
        raise CheckpointError('a persistent id of its pickle is none of torch\'s.')
    cls, key, _, numel = pid[1:5]
    if not isinstance(cls, Symbol) or cls.name not in STORAGE_DTYPES or type(key) is not str or (
            type(numel) is not int or not 0 <= numel < 1 << 60):
        raise CheckpointError('a storage of its pickle has no type, key or size that torch writes.')
    dtype = STORAGE_DTYPES[cls.name]
    view = pid[5] if len(pid) == 6 else None
    if view is None:
        return Storage(key, dtype, numel)
    if type(view) is not tuple or len(view) != 3 or any(type(v) is not int or v < 0 for v in view[1:]):
        raise CheckpointError(f'a view of its storage {key!r} is none that torch writes.')
    _, offset, size = view
    if offset + size > numel:
        raise CheckpointError(f'a view of its storage {key!r} ends behind it.')
    return Storage(key, dtype, size, start=offset)


def _read_directory(file: BinaryIO, size: int, budget: Budget) -> Dict[str, _Member]:
    """The members of a zip archive and where their bytes lie; only ones that overlap with nothing.

    zipfile would make an object of half a kilobyte of every entry, however many a damaged archive claims.
    """
    tail = min(size, 22 + 0xffff)
    file.seek(size - tail)
    data = file.read(tail)
    at = data.rfind(b'PK\x05\x06')
    if at < 0 or len(data) - at < 22:
        raise CheckpointError('it begins like a zip archive, but has no directory: it is truncated.')
    end = size - tail + at
    disk, start_disk, _, count, length, offset, _ = struct.unpack('<4xHHHHIIH', data[at:at + 22])
    locator = data[at - 20:at] if at >= 20 else b''
    if locator.startswith(b'PK\x06\x07'):
        disk64, end64, disks = struct.unpack('<4xIQI', locator)
        record = Stream(file, end64, end).read(56) if end64 < end else b''
        if disk64 or disks > 1 or not record.startswith(b'PK\x06\x06'):
            raise CheckpointError('the directory of its zip archive is damaged.')
        disk, start_disk, _, count, length, offset = struct.unpack('<4x8x4xIIQQQQ', record)
        end = end64
    if disk or start_disk or offset + length > end or count * 46 > length:
        raise CheckpointError('the directory of its zip archive is damaged.')

    stream = Stream(file, offset, offset + length)
    entries: Dict[str, Tuple[int, int, int, bool]] = {}
    for _ in range(count):
        budget.charge(_RECORD_COST)
        (signature, flags, method, crc, packed, unpacked, name_len, extra_len, comment_len, start) = struct.unpack(
            '<4s4xHH4xIIIHHH8xI', stream.read(46))
        name = stream.read(name_len).decode('utf-8', 'replace')
        extra = stream.read(extra_len)
        stream.skip(comment_len)
        if signature != b'PK\x01\x02' or name in entries:
            raise CheckpointError('the directory of its zip archive is damaged.')
        is_packed = bool(method or flags & 1)
        packed, unpacked, start = _zip64(extra, packed, unpacked, start)
        if packed != unpacked and not is_packed:
            raise CheckpointError(f'its part {name!r} has {packed} bytes in the archive but claims {unpacked}.')
        entries[name] = (start, packed, crc, is_packed)

    members, previous = {}, 0
    for name, (start, packed, crc, is_packed) in sorted(entries.items(), key=lambda item: item[1][0]):
        if start < previous or start + 30 > offset:
            raise CheckpointError(f'its part {name!r} overlaps with another.')
        header = Stream(file, start, offset)
        signature, name_len, extra_len = struct.unpack('<4s22xHH', header.read(30))
        if signature != _ZIP_MAGIC or header.read(name_len).decode('utf-8', 'replace') != name:
            raise CheckpointError(f'its part {name!r} is not where the directory of its zip archive says.')
        header.skip(extra_len)
        members[name] = _Member(header.position, packed, crc, is_packed)
        header.skip(packed)
        previous = header.position
    return members


def _zip64(extra: bytes, packed: int, unpacked: int, start: int) -> Tuple[int, int, int]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from('<HH', extra, at)
        body = extra[at + 4:at + 4 + length]
        at += 4 + length
        if kind != 1:
            continue
        wide = [unpacked == 0xffffffff, packed == 0xffffffff, start == 0xffffffff]
        if len(body) < 8 * sum(wide):
            raise CheckpointError('the directory of its zip archive is damaged.')
        values = iter(struct.unpack_from(f'<{sum(wide)}Q', body))
        unpacked = next(values) if wide[0] else unpacked
        packed = next(values) if wide[1] else packed
        start = next(values) if wide[2] else start
    return packed, unpacked, start
