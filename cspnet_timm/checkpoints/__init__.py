"""Foreign checkpoint files: recognised by their content, read without executing anything that is in them.

Each reader is a module. Its ``recognises(path, head)`` looks at the file's name and first bytes. Then either
``describe(path)`` opens the file and returns a :class:`Checkpoint`, which says what is in it and reads its tensors; or,
where a file holds numbers without names, ``read(path, model)`` returns the state dict of the network given. State dicts
are under the names that the file's framework or this package uses; the family's ``convert`` does the rest. Readers know
modules and containers, and no family.
"""
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Dict, Optional, Tuple, Union

import torch
import torch.nn as nn

from ._errors import CheckpointError
from .description import Checkpoint, TensorInfo
from .memory import describe_mapping

__all__ = [
    'Checkpoint', 'CheckpointError', 'TensorInfo', 'check_reader', 'describe_mapping', 'open_checkpoint',
    'read_foreign', 'read_numbers',
]

_READERS: Tuple[str, ...] = ('pickled', 'tensors', 'hdf5', 'darknet')
_HEAD_BYTES = 512

# What is found under the names of checkpoints and is none, by how it begins; what to do stands behind it.
_OTHERS: Tuple[Tuple[bytes, str], ...] = (
    (rb'version https://git-lfs', 'a Git LFS pointer, which stands for the weights: `git lfs pull` fetches them'),
    (rb'(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body|script)\b',
     'an HTML page, which a server sent in place of the weights: open the address in a browser'),
    (rb'(\xef\xbb\xbf)?\s*<(\?xml|error)', 'an XML page, which a server sent in place of the weights'),
    (rb'\s*\{\s*"(error|message|detail|code|status)"', 'an error in JSON, which a server sent in place of the weights'),
    (rb'\x1f\x8b', 'compressed by gzip: unpack it'),
    (rb'BZh[1-9]', 'compressed by bzip2: unpack it'),
    (rb'\xfd7zXZ\x00', 'compressed by xz: unpack it'),
    (rb'\x28\xb5\x2f\xfd', 'compressed by zstd: unpack it'),
    (rb'7z\xbc\xaf\x27\x1c', 'a 7z archive: unpack it'),
    (rb'Rar!', 'a RAR archive: unpack it'),
    (rb'GGUF', 'a GGUF file, which is not read'),
    (rb'....TFL3', 'a TensorFlow Lite program, which is not read'),
    (rb'\x93NUMPY', 'a single array of numpy, without a name'),
    (rb'.{257}ustar', 'a tar archive: unpack it, or save it with a torch of 0.1.10 or later'),
    (rb'\x08[\x00-\x20](\x12|\x1a)', 'an ONNX program, which holds a graph and is not read'),
)


def _refuse_others(path: Path, head: bytes) -> None:
    for pattern, what in _OTHERS:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            kind = 'Darknet' if re.search(r'\.(weights|backup)$', path.name) else 'checkpoint'
            raise CheckpointError(f'{path}: is no {kind} file of a kind that is known here, but {what}.')


def _find_reader(path: Path) -> Optional[ModuleType]:
    try:
        with path.open('rb') as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read ({error.strerror or error}).') from error
    if not head:
        raise CheckpointError(f'{path}: is empty.')
    _refuse_others(path, head)
    for name in _READERS:
        reader = importlib.import_module(f'{__name__}.{name}')
        if reader.recognises(path, head):
            return reader
    return None


def _unknown(path: Path) -> CheckpointError:
    return CheckpointError(f'{path}: is no checkpoint file of a kind that is known here, or its beginning is damaged.')


def check_reader(filename: str) -> None:
    """Find out before a file is downloaded whether it can be read.

    Args:
        filename: Its name.

    Raises:
        CheckpointError: If that takes a package that is not installed; the message names the extra.
    """
    if filename.endswith('.h5'):
        try:
            importlib.import_module(f'{__name__}.hdf5').import_h5py()
        except CheckpointError as error:
            raise CheckpointError(f'{filename}: {error}') from error


def open_checkpoint(path: Union[str, Path]) -> Optional[Checkpoint]:
    """Open a checkpoint file and find out what is in it; none of its tensors are read.

    Args:
        path: The file.

    Returns:
        The open checkpoint, a context manager; None if the file is of a kind that does not name its tensors, for
        :func:`read_numbers`.

    Raises:
        CheckpointError: If the file is missing, damaged, or of no kind that is known.
    """
    path = Path(path)
    reader = _find_reader(path)
    if reader is None:
        raise _unknown(path)
    try:
        if not hasattr(reader, 'describe'):
            return reader.check(path)
        checkpoint = reader.describe(path)
    except CheckpointError as error:
        message = str(error)
        raise error if message.startswith(f'{path}: ') else CheckpointError(f'{path}: {message}') from error
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read ({error.strerror or error}).') from error
    return checkpoint


def read_numbers(
        path: Union[str, Path],
        model: nn.Module,
        allow_partial: bool = False,
        classifier: bool = True,
) -> Dict[str, torch.Tensor]:
    """Read a file of a kind that does not name its tensors.

    Args:
        path: The file.
        model: The network that it is for, on any device, ``'meta'`` included: only its shapes are looked at.
        allow_partial: Accept a file that holds the network's beginning only.
        classifier: Whether the classifier is needed: where it is not, a file may end before it.

    Returns:
        The state dict under the network's own names.

    Raises:
        CheckpointError: If the file is missing, damaged, or not for this network.
    """
    path = Path(path)
    reader = _find_reader(path)
    if reader is None:
        raise _unknown(path)
    return reader.read(path, model, allow_partial, classifier)


def read_foreign(
        path: Union[str, Path],
        model: nn.Module,
        allow_partial: bool = False,
) -> Dict[str, torch.Tensor]:
    """Read the tensors of a file of any kind.

    Args:
        path: The file.
        model: As for :func:`read_numbers`, for files that do not name their tensors.
        allow_partial: As for :func:`read_numbers`.

    Returns:
        The state dict, under the names of the file's framework or the network's own.

    Raises:
        CheckpointError: If the file is missing, damaged, or not for this network.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint is None:
        return read_numbers(path, model, allow_partial)
    with checkpoint:
        return checkpoint.state_dict()
