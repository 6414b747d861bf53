"""An interpreter of pickles that calls nothing and imports nothing.

A pickle is a program, and the usual machine for it calls whatever the program names. This one has no way to: a global
is a pair of names (:class:`Symbol`), and calling one is looked up in a table of a few dozen rules below, which build
tensors, containers and numbers. Classes of frameworks that are known become :class:`Record` objects that hold what
the pickle says of them; every other name ends the reading with an error that states it.

Nothing large is read either. A tensor is a description of where its numbers lie (:class:`Array`), a long string is an
offset and a length (:class:`Blob`), and every object that is made is charged to a :class:`Budget` that the file's size
sets, so that a small file cannot fill the memory.
"""
import struct
import sys
from typing import Any, BinaryIO, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch

from ._errors import CheckpointError

__all__ = ['Array', 'Blob', 'Budget', 'Record', 'Storage', 'Stream', 'Symbol', 'Unpickler']

BLOB_BYTES = 512  # strings from this length on stay in the file
TEXT_BYTES = 8192
MAX_NAME = 256
MAX_INT_BYTES = 64
MAX_DIMS = 16
_ENTRY = 104  # of a dict, at the worst point of its growth

# Whatever these hold becomes a record. Nothing of them is ever imported; the names alone are looked at.
RECORD_PACKAGES = (
    'ultralytics', 'models', 'utils', 'yolox', 'mmengine', 'mmcv', 'mmdet', 'mmpose', 'mmpretrain', 'mmcls', 'mmseg',
    'mmyolo', 'mmrotate', 'ppdet', 'paddle', 'torch.nn', 'torch.optim', 'torch.amp', 'torch.cuda.amp',
    'torchvision.transforms', 'torchvision.ops', 'torchvision.models', 'segmentation_models_pytorch', 'transformers',
    'torchmetrics', 'timm', 'omegaconf', 'addict', 'yacs', 'easydict', 'pytorch_lightning',
    'lightning', 'lightning_fabric', 'super_gradients', 'cspnet_timm',
)
RECORD_CLASSES = frozenset(
    [('pathlib', f'{pure}{kind}Path') for pure in ('', 'Pure') for kind in ('Posix', 'Windows', '')]
    + [('datetime', name) for name in ('datetime', 'date', 'time', 'timedelta', 'timezone')]
    + [('argparse', 'Namespace'), ('types', 'SimpleNamespace'), ('torch', 'Tensor'), ('torch._C', 'Generator')]
)

TORCH_DTYPES = {
    name: getattr(torch, name) for name in (
        'float16', 'bfloat16', 'float32', 'float64', 'uint8', 'int8', 'int16', 'int32', 'int64', 'bool',
        'complex64', 'complex128')
}
STORAGE_DTYPES: Dict[str, torch.dtype] = {
    'HalfStorage': torch.float16, 'BFloat16Storage': torch.bfloat16, 'FloatStorage': torch.float32,
    'DoubleStorage': torch.float64, 'ByteStorage': torch.uint8, 'CharStorage': torch.int8,
    'ShortStorage': torch.int16, 'IntStorage': torch.int32, 'LongStorage': torch.int64, 'BoolStorage': torch.bool,
    'ComplexFloatStorage': torch.complex64, 'ComplexDoubleStorage': torch.complex128,
    'UntypedStorage': torch.uint8,
}
# numpy's codes; uint16 and wider are integers that torch has no full support for, and no weights are kept in.
NUMPY_DTYPES: Dict[str, Tuple[torch.dtype, str]] = {
    'f2': (torch.float16, 'e'), 'f4': (torch.float32, 'f'), 'f8': (torch.float64, 'd'), 'b1': (torch.bool, '?'),
    'i1': (torch.int8, 'b'), 'i2': (torch.int16, 'h'), 'i4': (torch.int32, 'i'), 'i8': (torch.int64, 'q'),
    'u1': (torch.uint8, 'B'), 'u2': (torch.uint16, 'H'), 'u4': (torch.uint32, 'I'), 'u8': (torch.uint64, 'Q'),
}


class Budget:
    """Bytes that reading a file may take.

    Twice the file's size, and a fixed allowance for the interpreter's own tables, so that tiny files can be read, and
    those of a thousand tensors each of which has a few numbers.
    """

    ALLOWANCE = 1 << 22

    def __init__(self, file_size: int) -> None:
        """
        Args:
            file_size: Size of the whole file in bytes.
        """
        self.limit = 2 * file_size + self.ALLOWANCE
        self.spent = 0

    def charge(self, size: int) -> None:
        """Note that ``size`` bytes are about to be taken.

        Args:
            size: Number of bytes.

        Raises:
            CheckpointError: If that is more than the file can account for.
        """
        self.spent += size
        if self.spent > self.limit:
            raise CheckpointError('it would take more than twice the memory that the file has bytes.')


class Stream:
    """A stretch of a file, read in order, never beyond its end."""

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        """
        Args:
            file: The file; nothing else may move its position while the stream is read.
            start: Offset of the first byte.
            stop: Offset behind the last byte.
        """
        self._file = file
        self.position = start
        self.stop = stop
        file.seek(start)

    def _take(self, size: int) -> None:
        if size < 0 or size > self.stop - self.position:
            raise CheckpointError(
                f'a field at byte {self.position} claims {size} bytes, where {self.stop - self.position} are left: '
                'the file is truncated or damaged.'
            )
        self.position += size

    def read(self, size: int) -> bytes:
        """Read exactly ``size`` bytes.

        Args:
            size: Number of bytes.

        Returns:
            The bytes.

        Raises:
            CheckpointError: If they are not there.
        """
        self._take(size)
        data = self._file.read(size)
        if len(data) != size:
            raise CheckpointError('the file became shorter while it was read.')
        return data

    def skip(self, size: int) -> int:
        """Step over ``size`` bytes and return the offset of the first of them."""
        start = self.position
        self._take(size)
        self._file.seek(size, 1)
        return start

    def line(self) -> str:
        """Read a name that ends with a line feed, as the opcode ``GLOBAL`` has two of."""
        data = self._file.readline(min(MAX_NAME + 1, self.stop - self.position))
        self._take(len(data))
        if not data.endswith(b'\n'):
            raise CheckpointError(f'a name at byte {self.position - len(data)} is too long or cut off.')
        return data[:-1].decode('utf-8')


class Symbol:
    """A global that a pickle names. It stands for nothing but its name."""

    __slots__ = ('module', 'name')

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    def __str__(self) -> str:
        return f'{self.module}.{self.name}'


class Record:
    """What a pickle says of an object of a framework: its class by name, and what it would be built from.

    Attributes:
        module: Module of the class.
        name: Name of the class.
        args: What the class would have been called with.
        state: What would have become the object's attributes.
        items: What would have been appended to it.
        entries: What would have been set in it by key.
    """

    __slots__ = ('args', 'entries', 'items', 'module', 'name', 'state')

    def __init__(self, module: str, name: str, args: Tuple[Any, ...] = ()) -> None:
        self.module = module
        self.name = name
        self.args = args
        self.state: Dict[Any, Any] = {}
        self.items: Optional[List[Any]] = None
        self.entries: Optional[Dict[Any, Any]] = None

    def __str__(self) -> str:
        return f'{self.module}.{self.name}'


class Blob:
    """A string that has been left in the file: where it lies, and whether its bytes are UTF-8 text of Latin-1."""

    __slots__ = ('is_bytes', 'offset', 'size', 'utf8')

    def __init__(self, offset: int, size: int, utf8: bool = False, is_bytes: bool = True) -> None:
        self.offset = offset
        self.size = size
        self.utf8 = utf8
        self.is_bytes = is_bytes


class Storage:
    """A stretch of numbers that tensors are views of; the container knows where it lies."""

    __slots__ = ('dtype', 'key', 'nbytes', 'numel', 'start')

    def __init__(self, key: str, dtype: torch.dtype, numel: int, start: int = 0) -> None:
        self.key = key
        self.dtype = dtype
        self.numel = numel
        self.nbytes = numel * dtype.itemsize
        self.start = start  # in elements of the storage that it is part of


class Array:
    """A tensor that has not been read.

    Attributes:
        source: Where its numbers lie: a storage, a stretch of the file, or bytes; None while numpy's two-step
            construction has not come to its second step.
        dtype: Type of the numbers.
        offset: First element within the source.
        shape: Shape.
        stride: Steps between neighbours along each dimension, in elements.
    """

    __slots__ = ('dtype', 'offset', 'shape', 'source', 'stride')

    def __init__(
            self,
            source: Union[Storage, Blob, bytes, None] = None,
            dtype: torch.dtype = torch.float32,
            offset: int = 0,
            shape: Tuple[int, ...] = (),
            stride: Tuple[int, ...] = (),
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.offset = offset
        self.shape = shape
        self.stride = stride

    @property
    def numel(self) -> int:
        """Number of elements."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel


class _NumpyDtype:
    """numpy's description of a type, which its pickles make in two steps."""

    __slots__ = ('code', 'order')

    def __init__(self, code: str, order: str) -> None:
        self.code = code
        self.order = order


def _refuse(what: str) -> CheckpointError:
    return CheckpointError(f'its pickle {what}; refused, and nothing of it was run.')


def _is_int(value: Any) -> bool:
    return type(value) is int


def _shape(value: Any) -> Tuple[int, ...]:
    if isinstance(value, Record) and value.name == 'Size' and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMS or not all(
            _is_int(v) and 0 <= v < 1 << 48 for v in value):
        raise CheckpointError(f'a tensor\'s shape or stride is not a tuple of up to {MAX_DIMS} sizes.')
    bound = 1
    for size in value:
        bound *= max(size, 1)
    if bound >= 1 << 60:
        raise CheckpointError('a tensor\'s shape is beyond any memory.')
    return tuple(value)


def _contiguous(shape: Sequence[int], fortran: bool = False) -> Tuple[int, ...]:
    stride: List[int] = []
    step = 1
    for size in shape if fortran else reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(stride if fortran else reversed(stride))


def _key(value: Any) -> Any:
    # Hashing a nested tuple recurses in C without a limit, so that only flat ones may be keys.
    plain = (str, int, float, bool, bytes, type(None), Record, Symbol, Blob, Array, torch.dtype)
    if isinstance(value, plain) or (isinstance(value, tuple) and len(value) <= 64 and all(
            isinstance(v, plain) for v in value)):
        return value
    raise CheckpointError(f'a {type(value).__name__} is used as a key, which no checkpoint does.')


class Unpickler:
    """Reads one pickle from a stream into plain containers, numbers, strings, and this module's descriptions."""

    def __init__(
            self,
            stream: Stream,
            budget: Budget,
            persistent: Optional[Callable[[Any], Any]] = None,
    ) -> None:
        """
        Args:
            stream: Where the pickle begins; it is left behind the pickle's end.
            budget: What the objects are charged to.
            persistent: Called with a persistent id, as torch's files have one per storage; they are refused if None.
        """
        self._stream = stream
        self._budget = budget
        self._persistent = persistent
        self._stack: List[Any] = []
        self._marks: List[List[Any]] = []
        self._memo: Dict[int, Any] = {}
        self.symbols: Dict[Tuple[str, str], Symbol] = {}

    def load(self) -> Any:
        """Interpret the pickle.

        Returns:
            What it holds.

        Raises:
            CheckpointError: If it is damaged, or asks for anything that is not in the tables of this module.
        """
        read, opcodes = self._stream.read, _OPCODES
        try:
            while True:
                opcode = read(1)[0]
                if opcode == 0x2e:  # STOP
                    return self._stack.pop()
                operate = opcodes.get(opcode)
                if operate is None:
                    raise _refuse(f'has the opcode {opcode:#04x} at byte {self._stream.position - 1}')
                operate(self)
        except CheckpointError:
            raise
        except (IndexError, KeyError, UnicodeError, struct.error, OverflowError) as error:
            raise CheckpointError(
                f'its pickle is damaged at byte {self._stream.position} ({type(error).__name__}).') from error

    # Stack

    def _push(self, value: Any) -> None:
        self._budget.charge(sys.getsizeof(value) + 10)
        self._stack.append(value)

    def _push_shared(self, value: Any) -> None:
        self._budget.charge(10)
        self._stack.append(value)

    def _pop_mark(self) -> List[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _discard_mark(self) -> None:
        self._pop_mark()

    def _mark(self) -> None:
        self._budget.charge(80)
        self._marks.append(self._stack)
        self._stack = []

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _memoize(self, index: int) -> None:
        self._budget.charge(_ENTRY + 32)
        self._memo[index] = self._stack[-1]

    # Numbers and strings

    def _number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self._stream.read(size), 'little', signed=signed)

    def _long(self, size: int) -> None:
        if size > MAX_INT_BYTES:
            raise CheckpointError(
                f'an integer of {size} bytes at byte {self._stream.position} is none that weights need.')
        self._push(self._number(size, signed=True))

    def _bytes(self, size: int) -> None:
        if size < BLOB_BYTES:
            self._push(self._stream.read(size))
        else:
            self._budget.charge(160)
            self._stack.append(Blob(self._stream.skip(size), size))

    def _text(self, size: int) -> None:
        if size < TEXT_BYTES:
            self._push(self._stream.read(size).decode('utf-8', 'surrogatepass'))
        else:
            self._budget.charge(160)
            self._stack.append(Blob(self._stream.skip(size), size, utf8=True, is_bytes=False))

    def _string(self, size: int) -> None:
        """A string of Python 2: text where it is ASCII, else bytes."""
        if size >= BLOB_BYTES:
            return self._bytes(size)
        data = self._stream.read(size)
        self._push(data.decode('ascii') if data.isascii() else data)

    def _protocol(self) -> None:
        protocol = self._number(1)
        if not 2 <= protocol <= 5:
            raise CheckpointError(f'its pickle is of protocol {protocol}; 2 to 5 can be read.')

    def _frame(self) -> None:
        size = self._number(8)
        if size > self._stream.stop - self._stream.position:
            raise CheckpointError(f'a frame of its pickle claims {size} bytes, more than the file has left.')

    # Containers

    def _tuple(self, items: List[Any]) -> None:
        self._push(tuple(items))

    def _tuple_of(self, count: int) -> None:
        items = self._stack[-count:]
        if len(items) < count:
            raise IndexError
        del self._stack[-count:]
        self._push(tuple(items))

    def _append(self, items: List[Any]) -> None:
        target = self._stack[-1]
        self._budget.charge(18 * len(items))
        if type(target) is list:
            target.extend(items)
        elif isinstance(target, Record):
            target.items = (target.items or [])
            target.items.extend(items)
        else:
            raise _refuse(f'appends to {_kind(target)}')

    def _set_items(self, items: List[Any]) -> None:
        target = self._stack[-1]
        if len(items) % 2:
            raise IndexError
        self._budget.charge(_ENTRY * (len(items) // 2))
        if isinstance(target, Record):
            if target.entries is None:
                target.entries = {}
            target = target.entries
        if type(target) is not dict:
            raise _refuse(f'sets items of {_kind(target)}')
        for i in range(0, len(items), 2):
            target[_key(items[i])] = items[i + 1]

    def _add_items(self, items: List[Any]) -> None:
        target = self._stack[-1]
        self._budget.charge(_ENTRY * len(items))
        if type(target) is not set:
            raise _refuse(f'adds to {_kind(target)}')
        target.update(_key(item) for item in items)

    def _dict(self, items: List[Any]) -> None:
        self._push({})
        self._set_items(items)

    def _frozenset(self, items: List[Any]) -> None:
        self._budget.charge(_ENTRY * len(items))
        self._push(frozenset(_key(item) for item in items))

    # Globals, and what stands for calling them

    def _global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise _refuse('computes the name of a global')
        module = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}.get(module, module)
        if module.startswith('pathlib.'):  # pathlib._local in Python 3.13
            module = 'pathlib'
        symbol = self.symbols.get((module, name))
        if symbol is None:
            if not _is_known(module, name):
                shown = f'{module}.{name}'[:MAX_NAME]
                raise _refuse(f'names {shown!r}, which no checkpoint needs')
            self._budget.charge(_ENTRY + 200)
            symbol = self.symbols[module, name] = Symbol(module, name)
        dtype = TORCH_DTYPES.get(name) if module == 'torch' else None
        self._push_shared(symbol if dtype is None else dtype)

    def _reduce(self) -> None:
        args = self._stack.pop()
        self._call(self._stack.pop(), args)

    def _call(self, function: Any, args: Any, kwargs: Any = None) -> None:
        if type(args) is not tuple:
            raise _refuse('calls something without a tuple of arguments')
        if not isinstance(function, Symbol):
            raise _refuse(f'calls {_kind(function)}')
        rule = _RULES.get((function.module, function.name))
        if rule is None and _is_record(function.module, function.name):
            self._budget.charge(200)
            self._stack.append(Record(function.module, function.name, args))
            return
        if rule is None or kwargs:
            raise _refuse(f'calls {function}')
        # A rule may copy what it is given.
        copied = sum(_ENTRY * len(arg) for arg in args if type(arg) in (list, tuple, dict, set, frozenset))
        self._budget.charge(16 + copied + sum(len(arg) for arg in args if type(arg) is str))
        try:
            value = rule(args)
        except (TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f'its pickle calls {function} with arguments that it does not take.') from error
        self._budget.charge(200 if isinstance(value, (Array, Blob, Record, _NumpyDtype)) else 0)
        self._push(value)

    def _new_object(self) -> None:
        args = self._stack.pop()
        self._call(self._stack.pop(), args)

    def _new_object_ex(self) -> None:
        kwargs = self._stack.pop()
        args = self._stack.pop()
        self._call(self._stack.pop(), args, kwargs)

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Record) and not _is_getattr(target):
            parts = state if type(state) is tuple and len(state) == 2 else (state,)
            for part in parts:
                if type(part) is dict:
                    # Shared with the pickle's own dict where it can be: a copy would have to be paid for.
                    if target.state:
                        self._budget.charge(_ENTRY * (len(target.state) + len(part)))
                        part = {**target.state, **part}
                    target.state = part
        elif isinstance(target, _NumpyDtype):
            _build_dtype(target, state)
        elif isinstance(target, Array) and target.source is None:
            _build_array(target, state)
        elif type(target) is dict and type(state) is dict:
            pass  # attributes of an OrderedDict: a state dict has the versions of its modules there
        else:
            raise _refuse(f'sets the state of {_kind(target)}')

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise _refuse('refers to objects outside it')
        value = self._persistent(self._stack.pop())
        self._budget.charge(160)
        self._stack.append(value)


def _kind(value: Any) -> str:
    return str(value) if isinstance(value, (Symbol, Record)) else f'a {type(value).__name__.lstrip("_")}'


# Names


def _is_record(module: str, name: str) -> bool:
    if (module, name) in RECORD_CLASSES:
        return True
    if not any(module == package or module.startswith(f'{package}.') for package in RECORD_PACKAGES):
        return False
    if not all(part.isidentifier() for part in module.split('.')):
        return False
    # A dotted name is a chain of attributes. Nested classes have one too, and are written in capitals.
    parts = name.split('.')
    return all(part.isidentifier() for part in parts) and (
        len(parts) == 1 or all(part[0].isupper() for part in parts))


def _is_known(module: str, name: str) -> bool:
    return (module, name) in _RULES or (module, name) in _NAMES or _is_record(module, name) or (
        module == 'torch' and name in TORCH_DTYPES)


def _is_getattr(record: Record) -> bool:
    return (record.module, record.name) == ('builtins', 'getattr')


# Rules: what stands for calling a name. Each takes the tuple of arguments and makes a plain value or a description.


def _rebuild_tensor(args: Tuple[Any, ...]) -> Array:
    storage, offset, size, stride = args[:4]
    dtype = args[6] if len(args) > 6 and isinstance(args[6], torch.dtype) else None
    if not isinstance(storage, Storage) or not _is_int(offset) or offset < 0:
        raise CheckpointError('a tensor of its pickle has no storage, or a negative offset.')
    shape, stride = _shape(size), _shape(stride)
    if len(shape) != len(stride):
        raise CheckpointError(f'a tensor has {len(shape)} sizes but {len(stride)} strides.')
    numel = storage.numel
    if dtype is not None:  # of an untyped storage
        if offset * dtype.itemsize > storage.nbytes:
            raise CheckpointError('a tensor begins behind the end of its storage.')
        numel = storage.nbytes // dtype.itemsize
    array = Array(storage, dtype or storage.dtype, offset, shape, stride)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride))
    if (0 not in shape and last >= numel) or offset > numel:
        raise CheckpointError(
            f'a tensor of shape {shape} and stride {stride} at element {offset} is larger than its storage '
            f'{storage.key!r} of {numel} elements.'
        )
    return array


def _rebuild_parameter(args: Tuple[Any, ...]) -> Array:
    if not isinstance(args[0], Array):
        raise CheckpointError('a parameter of its pickle is no tensor.')
    return args[0]


def _rebuild_from_type(args: Tuple[Any, ...]) -> Any:
    function, _, inner = args[:3]
    rule = _RULES.get((function.module, function.name)) if isinstance(function, Symbol) else None
    if rule not in (_rebuild_tensor, _rebuild_parameter) or type(inner) is not tuple:
        raise _refuse(f'rebuilds a tensor by {_kind(function)}')
    return rule(inner)  # type: ignore[misc]


def _array_type(dtype: Any) -> Tuple[torch.dtype, str]:
    if not isinstance(dtype, _NumpyDtype):
        raise CheckpointError('an array of its pickle has no type.')
    if dtype.order == '>' and dtype.code[1:] != '1':
        raise CheckpointError('its arrays are big-endian, which cannot be read.')
    if dtype.code not in NUMPY_DTYPES:
        raise CheckpointError(f'an array is of numpy\'s type {dtype.code!r}, which holds no weights.')
    return NUMPY_DTYPES[dtype.code]


def _fill_array(array: Array, shape: Any, dtype: Any, fortran: bool, data: Any) -> Array:
    array.dtype, _ = _array_type(dtype)
    array.shape = _shape(shape)
    array.stride = _contiguous(array.shape, fortran)
    if isinstance(data, str):  # of Python 2
        data = data.encode('latin-1')
    if not isinstance(data, (bytes, Blob)) or (isinstance(data, Blob) and not data.is_bytes):
        raise CheckpointError('an array of its pickle has no data.')
    need = array.numel * array.dtype.itemsize
    exact = not (isinstance(data, Blob) and data.utf8)
    size = data.size if isinstance(data, Blob) else len(data)
    if need != size if exact else not need <= size <= 2 * need:
        raise CheckpointError(f'an array of shape {array.shape} needs {need} bytes, but its pickle has {size}.')
    array.source = data
    return array


def _build_array(array: Array, state: Any) -> None:
    if type(state) is not tuple or len(state) not in (4, 5):
        raise CheckpointError('an array of its pickle has no state that numpy writes.')
    shape, dtype, fortran, data = state[-4:]
    _fill_array(array, shape, dtype, bool(fortran) if isinstance(fortran, (bool, int)) else False, data)


def _reconstruct(args: Tuple[Any, ...]) -> Array:
    cls, shape, _ = args
    if not isinstance(cls, Symbol) or (cls.module, cls.name) != ('numpy', 'ndarray') or shape != (0,):
        raise _refuse('reconstructs something else than an array')
    return Array()


def _from_buffer(args: Tuple[Any, ...]) -> Array:
    data, dtype, shape, order = args
    return _fill_array(Array(), shape, dtype, order == 'F', data)


def _numpy_dtype(args: Tuple[Any, ...]) -> _NumpyDtype:
    code = args[0]
    if type(code) is not str or not code or len(code) > 16:
        raise CheckpointError('numpy\'s type is described by something else than a short string.')
    order = code[0] if code[0] in '<>=|' else '<'
    code = code.lstrip('<>=|')
    if code[:1] not in tuple('biufcSU') or not code[1:].isdigit():
        raise _refuse(f'has values of numpy\'s type {code!r}')
    return _NumpyDtype(code, order)


def _build_dtype(dtype: _NumpyDtype, state: Any) -> None:
    if type(state) is not tuple or len(state) < 5 or state[1] not in ('<', '>', '=', '|') or any(
            part is not None for part in state[2:5]):
        raise CheckpointError('numpy\'s type has a state that weights do not have (subarrays, fields).')
    dtype.order = state[1]


def _numpy_scalar(args: Tuple[Any, ...]) -> Any:
    dtype, data = args
    if isinstance(data, str):
        data = data.encode('latin-1')
    if not isinstance(dtype, _NumpyDtype) or type(data) is not bytes:
        raise CheckpointError('a number of numpy\'s has no type or no bytes.')
    if dtype.code[0] in 'SUc':  # a label; of no use here
        return data
    _, code = _array_type(dtype)
    if len(data) != struct.calcsize(f'<{code}'):
        raise CheckpointError(f'a number of numpy\'s type {dtype.code!r} has {len(data)} bytes.')
    return struct.unpack(f'<{code}', data)[0]


def _encode(args: Tuple[Any, ...]) -> Any:
    text, encoding = args
    if encoding not in ('latin1', 'latin-1'):
        raise _refuse('encodes text as something else than Latin-1')
    if isinstance(text, Blob) and not text.is_bytes:
        return Blob(text.offset, text.size, utf8=True)
    if type(text) is not str:
        raise _refuse(f'encodes {_kind(text)}')
    return text.encode('latin-1')


def _getattr(args: Tuple[Any, ...]) -> Record:
    """The placeholder of a bound method, which mmengine's history buffers keep; it is never resolved."""
    owner, name = args
    known = (isinstance(owner, Record) and not _is_getattr(owner)) or (
        isinstance(owner, Symbol) and _is_record(owner.module, owner.name))
    if not known or type(name) is not str or name.startswith('__') or not name.isidentifier():
        raise _refuse('calls builtins.getattr on something else than a framework\'s object')
    return Record('builtins', 'getattr', args)


def _pairs(args: Tuple[Any, ...]) -> Dict[Any, Any]:
    if not args:
        return {}
    items = args[0]
    if len(args) > 1 or type(items) not in (list, tuple, dict):
        raise _refuse('makes a dict of something else than pairs')
    if type(items) is dict:
        return dict(items)
    return {_key(key): value for key, value in items}


def _default_dict(args: Tuple[Any, ...]) -> Dict[Any, Any]:
    if args and args[0] is not None and not isinstance(args[0], Symbol):
        raise _refuse(f'makes a defaultdict of {_kind(args[0])}')
    return _pairs(args[1:])


def _sequence(make: Callable[[Any], Any]) -> Callable[[Tuple[Any, ...]], Any]:
    def rule(args: Tuple[Any, ...]) -> Any:
        items = args[0] if args else ()
        if len(args) > 1 or type(items) not in (list, tuple, set, frozenset):
            raise _refuse('makes a container of something else than a container')
        return make(_key(item) for item in items) if make in (set, frozenset) else make(items)

    return rule


def _byte_string(args: Tuple[Any, ...]) -> Any:
    if not args:
        return b''
    if len(args) == 2:
        return _encode(args)
    if len(args) == 1 and isinstance(args[0], (bytes, Blob)):
        return args[0]
    raise _refuse('makes bytes of something else than bytes')


def _complex(args: Tuple[Any, ...]) -> complex:
    if len(args) != 2 or not all(type(part) is float for part in args):
        raise _refuse('makes a complex number of something else than two numbers')
    return complex(*args)


def _record_of(module: str, name: str, count: int) -> Callable[[Tuple[Any, ...]], Record]:
    def rule(args: Tuple[Any, ...]) -> Record:
        if len(args) > count:
            raise CheckpointError(f'{module}.{name} has {len(args)} arguments.')
        return Record(module, name, args)

    return rule


def _reconstructor(args: Tuple[Any, ...]) -> Record:
    cls, base, state = args
    if not isinstance(cls, Symbol) or not isinstance(base, Symbol) or not _is_record(cls.module, cls.name) or (
            (base.module, base.name) != ('builtins', 'object') or state is not None):
        raise _refuse('reconstructs something else than a framework\'s object')
    return Record(cls.module, cls.name)


_RULES: Dict[Tuple[str, str], Callable[[Tuple[Any, ...]], Any]] = {
    ('torch._utils', '_rebuild_tensor'): _rebuild_tensor,
    ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
    ('torch._utils', '_rebuild_tensor_v3'): _rebuild_tensor,
    ('torch._utils', '_rebuild_parameter'): _rebuild_parameter,
    ('torch._utils', '_rebuild_parameter_with_state'): _rebuild_parameter,
    ('torch._tensor', '_rebuild_from_type_v2'): _rebuild_from_type,
    ('torch', 'Size'): _record_of('torch', 'Size', 1),
    ('torch', 'device'): _record_of('torch', 'device', 2),
    ('torch.serialization', '_get_layout'): _record_of('torch', 'layout', 1),
    ('numpy', 'dtype'): _numpy_dtype,
    ('_codecs', 'encode'): _encode,
    ('builtins', 'getattr'): _getattr,
    ('builtins', 'set'): _sequence(set),
    ('builtins', 'frozenset'): _sequence(frozenset),
    ('builtins', 'list'): _sequence(list),
    ('builtins', 'tuple'): _sequence(tuple),
    ('builtins', 'dict'): _pairs,
    ('builtins', 'bytes'): _byte_string,
    ('builtins', 'bytearray'): _byte_string,
    ('builtins', 'complex'): _complex,
    ('builtins', 'slice'): _record_of('builtins', 'slice', 3),
    ('builtins', 'range'): _record_of('builtins', 'range', 3),
    ('collections', 'OrderedDict'): _pairs,
    ('collections', 'Counter'): _pairs,
    ('collections', 'defaultdict'): _default_dict,
    ('collections', 'deque'): lambda args: _sequence(list)(args[:1]),
    ('copyreg', '_reconstructor'): _reconstructor,
    **{('numpy.' + core + '.multiarray', '_reconstruct'): _reconstruct for core in ('core', '_core')},
    **{('numpy.' + core + '.multiarray', 'scalar'): _numpy_scalar for core in ('core', '_core')},
    **{('numpy.' + core + '.numeric', '_frombuffer'): _from_buffer for core in ('core', '_core')},
}
# Names that may stand in a pickle and may not be called.
_NAMES = frozenset(
    [('builtins', name) for name in ('object', 'int', 'float', 'bool', 'str')]
    + [('numpy', 'ndarray')]
    + [(module, name) for module in ('torch', 'torch.cuda', 'torch.storage') for name in STORAGE_DTYPES]
)

_OPCODES: Dict[int, Callable[[Unpickler], None]] = {
    ord(code): operate for code, operate in {
        '(': lambda self: self._mark(),
        '0': lambda self: self._pop(),
        '1': lambda self: self._discard_mark(),
        '2': lambda self: self._push_shared(self._stack[-1]),
        'N': lambda self: self._push_shared(None),
        '\x88': lambda self: self._push_shared(True),
        '\x89': lambda self: self._push_shared(False),
        'J': lambda self: self._push(self._number(4, signed=True)),
        'K': lambda self: self._push_shared(self._stream.read(1)[0]),  # Python 3.10 shares no int of from_bytes
        'M': lambda self: self._push(self._number(2)),
        'G': lambda self: self._push(struct.unpack('>d', self._stream.read(8))[0]),
        '\x8a': lambda self: self._long(self._number(1)),
        '\x8b': lambda self: self._long(self._number(4)),
        'B': lambda self: self._bytes(self._number(4)),
        'C': lambda self: self._bytes(self._number(1)),
        '\x8e': lambda self: self._bytes(self._number(8)),
        '\x96': lambda self: self._bytes(self._number(8)),
        'X': lambda self: self._text(self._number(4)),
        '\x8c': lambda self: self._text(self._number(1)),
        '\x8d': lambda self: self._text(self._number(8)),
        'T': lambda self: self._string(self._number(4)),
        'U': lambda self: self._string(self._number(1)),
        ']': lambda self: self._push([]),
        '}': lambda self: self._push({}),
        ')': lambda self: self._push_shared(()),
        '\x8f': lambda self: self._push(set()),
        'l': lambda self: self._push(self._pop_mark()),
        'd': lambda self: self._dict(self._pop_mark()),
        't': lambda self: self._tuple(self._pop_mark()),
        '\x85': lambda self: self._tuple_of(1),
        '\x86': lambda self: self._tuple_of(2),
        '\x87': lambda self: self._tuple_of(3),
        '\x91': lambda self: self._frozenset(self._pop_mark()),
        'a': lambda self: self._append([self._stack.pop()]),
        'e': lambda self: self._append(self._pop_mark()),
        's': lambda self: self._set_items([self._stack.pop(-2), self._stack.pop()]),
        'u': lambda self: self._set_items(self._pop_mark()),
        '\x90': lambda self: self._add_items(self._pop_mark()),
        'h': lambda self: self._push_shared(self._memo[self._number(1)]),
        'j': lambda self: self._push_shared(self._memo[self._number(4)]),
        'q': lambda self: self._memoize(self._number(1)),
        'r': lambda self: self._memoize(self._number(4)),
        '\x94': lambda self: self._memoize(len(self._memo)),
        'c': lambda self: self._global(self._stream.line(), self._stream.line()),
        '\x93': lambda self: self._global(self._stack.pop(-2), self._stack.pop()),
        'R': lambda self: self._reduce(),
        '\x81': lambda self: self._new_object(),
        '\x92': lambda self: self._new_object_ex(),
        'b': lambda self: self._build(),
        'Q': lambda self: self._persistent_id(),
        '\x80': lambda self: self._protocol(),
        '\x95': lambda self: self._frame(),
    }.items()
}
