"""HDF5 files of Keras: ``save_weights`` and ``model.save`` of Keras 2 (``.h5``), ``.weights.h5`` of Keras 3.

They are read by h5py, without Keras. Nothing outside of the file is opened, and what the file declares is compared with
its size before anything is allocated. Attributes are not read: their texts lie in heaps, in which a damaged file sends
HDF5 around in circles. Kernels and names become PyTorch's: ``dark2_csp/conv2d_2/kernel:0`` of ``(height, width, in,
out)`` becomes ``dark2_csp.conv2d_2.weight`` of ``(out, in, height, width)``.
"""
import math
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch

from ._errors import CheckpointError
from .description import Checkpoint, TensorInfo

__all__ = ['describe', 'import_h5py', 'recognises']

_MAGIC = b'\x89HDF\r\n\x1a\n'
_MAX_OBJECTS = 1 << 16
_MAX_DEPTH = 24
_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)

_LEAVES = {
    'kernel': 'weight', 'depthwise_kernel': 'weight', 'bias': 'bias', 'gamma': 'weight', 'beta': 'bias',
    'moving_mean': 'running_mean', 'moving_variance': 'running_var',
}
# Keras 3 numbers a layer's variables; how many there are tells them apart.
_NUMBERED: Dict[str, Dict[int, Tuple[str, ...]]] = {
    r'(?:depthwise_)?conv2d(?:_\d+)?': {1: ('weight',), 2: ('weight', 'bias')},
    r'dense(?:_\d+)?': {1: ('weight',), 2: ('weight', 'bias')},
    r'batch_normalization(?:_\d+)?': {4: ('weight', 'bias', 'running_mean', 'running_var')},
}
_ASIDE = re.compile(r'optimizer(_weights)?|metrics|top_level_model_weights')
_CONTAINERS = ('layers', '_layer_checkpoint_dependencies')  # Keras 3's, and that of Keras 2.12 and 2.13


def import_h5py() -> Any:
    """Import h5py.

    Returns:
        The module.

    Raises:
        CheckpointError: If it is not installed; the message names the extra.
    """
    try:
        import h5py
    except ImportError as error:
        raise CheckpointError(
            "is an HDF5 file, of Keras perhaps, which is read by h5py: `pip install '.[keras]'` in a clone.") from error
    return h5py


def recognises(path: Path, head: bytes) -> bool:
    """Whether the file is an HDF5 file, by its first bytes or its name.

    Args:
        path: The file.
        head: Its first bytes.

    Returns:
        True if :func:`describe` is to open it.
    """
    return head.startswith(_MAGIC) or path.suffix in ('.h5', '.hdf5')


def describe(path: Path) -> Checkpoint:
    """Open a file and list its arrays; none of them is read.

    Args:
        path: The file.

    Returns:
        The open checkpoint.

    Raises:
        CheckpointError: If h5py is not installed; if the file is damaged, refers to something outside of it, or
            declares more than its size can hold.
    """
    h5py = import_h5py()
    try:
        file = h5py.File(path, 'r', locking=False)
    except _ERRORS as error:
        raise CheckpointError(f'it is no HDF5 file, or a damaged one ({error}).') from error
    try:
        return _describe(h5py, file, path)
    except CheckpointError:
        file.close()
        raise
    except _ERRORS as error:
        file.close()
        raise CheckpointError(f'it is a damaged HDF5 file ({type(error).__name__}: {error}).') from error


def _describe(h5py: Any, file: Any, path: Path) -> Checkpoint:
    part = 'model_weights' if isinstance(_child(h5py, file, 'model_weights'), h5py.Group) else ''
    group = file[part] if part else file
    others: List[str] = []
    arrays: Dict[str, Any] = {}
    total, size = 0, path.stat().st_size
    for name, dataset in _walk(h5py, group, others):
        total += _check(name, dataset)
        if total > 2 * size:
            raise CheckpointError('its arrays together would take more than twice the memory of the file.')
        arrays[name] = dataset
    names = _torch_names(arrays)
    if not any(new.endswith(('.weight', '.running_var')) for new in names.values()):
        raise CheckpointError('holds no weights: it is an HDF5 file without an array that Keras names.')
    infos: Dict[str, TensorInfo] = {}
    sources: Dict[str, str] = {}
    for name, new in names.items():
        if new in infos:
            raise CheckpointError(f'its arrays {sources[new]!r} and {name!r} have one name.')
        sources[new] = name
        dataset = arrays[name]
        shape = tuple(dataset.shape[d] for d in _order(name, dataset.shape))
        infos[new] = TensorInfo(shape, _dtype(dataset))

    def read() -> Dict[str, torch.Tensor]:
        try:
            return {new: _read(name, arrays[name]) for new, name in sources.items()}
        except _ERRORS as error:
            raise CheckpointError(f'it is damaged ({type(error).__name__}: {error}).') from error

    return Checkpoint(
        path=path,
        container='HDF5 file',
        framework='Keras',
        part=part,
        tensors=infos,
        num_classes=next((
            info.shape[0] for name, info in infos.items() if re.search(r'\b(predictions|dense)\.bias$', name)), None),
        others=tuple(others),
        read=read,
        close=file.close,
    )


def _child(h5py: Any, group: Any, name: str) -> Any:
    """What a name stands for, by no other way than a place in this file."""
    key = name.encode('utf-8', 'surrogateescape')
    if not group.id.links.exists(key):
        return None
    if group.id.links.get_info(key).type != h5py.h5l.TYPE_HARD:  # Group.get would follow it to see whether it is there
        raise CheckpointError(f'its entry {name!r} is a link to another place, which Keras never writes; refused.')
    return group[name]


def _walk(h5py: Any, root: Any, others: List[str]) -> Iterator[Tuple[str, Any]]:
    """The arrays of numbers under a group by their paths; what stands beside weights is named in ``others``."""
    seen = {h5py.h5o.get_info(root.id).addr}
    pending: List[Tuple[str, int, Any]] = [('', 0, root)]
    while pending:
        path, depth, group = pending.pop()
        if len(seen) + len(group) > _MAX_OBJECTS or depth > _MAX_DEPTH:
            raise CheckpointError(f'it has more than {_MAX_OBJECTS} entries, or they lie deeper than {_MAX_DEPTH}.')
        for name in group:
            child = _child(h5py, group, name)
            address = h5py.h5o.get_info(child.id).addr
            if address in seen:
                raise CheckpointError(f'its entry {path + name!r} is there twice, which Keras never writes; refused.')
            seen.add(address)
            if isinstance(child, h5py.Group):
                if depth == 0 and _ASIDE.fullmatch(name):
                    if len(child):
                        others.append(name)
                else:
                    pending.append((path + name.replace('\\', '/') + '/', depth + 1, child))  # as written on Windows
            elif isinstance(child, h5py.Dataset) and child.shape is not None and _dtype(child) is not None:
                yield path + name, child
            else:
                others.append(path + name)


def _dtype(dataset: Any) -> Any:
    """The type of an array, None if it is none of numbers."""
    dtype = dataset.dtype
    if dtype.fields is not None or dtype.subdtype is not None or dtype.kind not in 'fiub':
        return None
    name = f'float{dtype.itemsize * 8}' if dtype.kind == 'f' else dtype.name
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def _check(name: str, dataset: Any) -> int:
    """Refuse an array whose numbers do not lie in the file, each in a place of its own size.

    What is compressed can become a thousand times as large while HDF5 unpacks it, whatever size it declares.

    Returns:
        How many bytes reading it takes.
    """
    if dataset.external or dataset.is_virtual:
        raise CheckpointError(f'its array {name!r} lies in another file, which Keras never writes; refused.')
    if dataset.id.get_create_plist().get_nfilters():
        raise CheckpointError(
            f'its array {name!r} is compressed, which Keras never does: `h5repack -f NONE` unpacks it.')
    numel, stored = math.prod(dataset.shape), dataset.id.get_storage_size()
    if stored < numel * dataset.dtype.itemsize:
        raise CheckpointError(f'its array {name!r} of shape {dataset.shape} has {stored} bytes in the file.')
    return numel * (4 if _dtype(dataset) == torch.float16 else dataset.dtype.itemsize)


def _torch_names(arrays: Dict[str, Any]) -> Dict[str, str]:
    """This package's form of Keras' names: dots, PyTorch's words for a layer's variables."""
    counts: Dict[str, int] = {}
    for name in arrays:
        layer = name.rpartition('/')[0]
        counts[layer] = counts.get(layer, 0) + 1
    names: Dict[str, str] = {}
    for name in arrays:
        layer, _, leaf = name.rpartition('/')
        leaf = re.sub(r':\d+$', '', leaf)
        if layer.endswith('vars') and leaf.isdecimal():
            words = _numbered(layer, counts[layer])
            leaf = words[int(leaf)] if words is not None and int(leaf) < len(words) else f'vars.{leaf}'
            parts = [part for part in layer.split('/')[:-1] if part not in _CONTAINERS]
        else:
            leaf = _LEAVES.get(leaf, leaf)
            parts = layer.split('/') if layer else []
        names[name] = '.'.join([*parts, leaf])
    return names


def _numbered(layer: str, count: int) -> Optional[Tuple[str, ...]]:
    parts = layer.split('/')
    kind = parts[-2] if len(parts) > 1 else ''
    for pattern, words in _NUMBERED.items():
        if re.fullmatch(pattern, kind):
            return words.get(count)
    return None


def _order(name: str, shape: Tuple[int, ...]) -> Tuple[int, ...]:
    """The order of dimensions that PyTorch has of a kernel."""
    if len(shape) == 4:
        return (2, 3, 0, 1) if 'depthwise' in name.rpartition('/')[2] or 'depthwise_conv2d' in name else (3, 2, 0, 1)
    return tuple(reversed(range(len(shape)))) if len(shape) == 2 else tuple(range(len(shape)))


def _read(name: str, dataset: Any) -> torch.Tensor:
    array = dataset[()]
    tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder('='), copy=False))
    if tensor.dtype == torch.float16:
        tensor = tensor.float()
    return tensor.permute(_order(name, dataset.shape)).contiguous()
