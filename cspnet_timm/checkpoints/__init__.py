"""Foreign checkpoint files: recognised by their content, read without executing anything that is in them.

Each reader is a module. Its ``recognises(path, head)`` looks at the file's name and first bytes. Then either
``describe(path)`` opens the file and returns a :class:`Checkpoint`, which says what is in it and reads its tensors; or,
where a file holds numbers without names, ``read(path, model)`` returns the state dict of the network given. State dicts
are under the names that the file's framework or this package uses; the family's ``convert`` does the rest. Readers know
modules and containers, and no family.
"""
import importlib
import logging
from pathlib import Path
from types import ModuleType
from typing import Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn

from ._errors import CheckpointError
from .description import Checkpoint, TensorInfo
from .fitting import Convert, check_activations, convert_eps, trace_norms

__all__ = ['Checkpoint', 'CheckpointError', 'TensorInfo', 'check_modules', 'fitted_state_dict', 'open_checkpoint',
           'read_foreign']

_logger = logging.getLogger(__name__)

_READERS: Tuple[str, ...] = ('pickled', 'tensors', 'darknet')
_TIMMS = ('.safetensors', '.npz', '.npy')  # names of files that timm reads itself
_HEAD_BYTES = 64


def _find_reader(path: Path) -> Optional[ModuleType]:
    try:
        with path.open('rb') as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read ({error.strerror or error}).') from error
    if not head:
        raise CheckpointError(f'{path}: is empty.')
    for name in _READERS:
        reader = importlib.import_module(f'{__name__}.{name}')
        if reader.recognises(path, head):
            return reader
    return None


def _unknown(path: Path) -> CheckpointError:
    return CheckpointError(f'{path}: is no checkpoint file of a kind that is known here, or its beginning is damaged.')


def open_checkpoint(path: Union[str, Path]) -> Optional[Checkpoint]:
    """Open a checkpoint file and find out what is in it; none of its tensors are read.

    Args:
        path: The file.

    Returns:
        The open checkpoint, a context manager; None if the file is of a kind that does not name its tensors.

    Raises:
        CheckpointError: If the file is missing, damaged, or of no kind that is known.
    """
    path = Path(path)
    reader = _find_reader(path)
    if reader is None:
        raise _unknown(path)
    return _describe(reader, path) if hasattr(reader, 'describe') else None


def _describe(reader: ModuleType, path: Path) -> Checkpoint:
    try:
        return reader.describe(path)
    except CheckpointError as error:
        raise CheckpointError(f'{path}: {error}') from error
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read ({error.strerror or error}).') from error


def check_modules(
        checkpoint: Checkpoint,
        model: nn.Module,
        convert: Optional[Convert] = None,
) -> List[Tuple[str, str]]:
    """Compare a checkpoint's names and shapes, and what its modules say if it has any, with a network.

    Args:
        checkpoint: The open file.
        model: The network that it is for, on any device, ``'meta'`` included.
        convert: The family's map from the file's names to the network's.

    Returns:
        Pairs of names: batch norms of the file, and what they become in the network.

    Raises:
        CheckpointError: If the file is for another network, or has other activations.
    """
    try:
        norms = trace_norms(checkpoint, model, convert)
    except CheckpointError as error:
        raise CheckpointError(f'{checkpoint.path}: {error}') from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f'{checkpoint.path}: holds another network; its names are only partly those of the one '
                              f'asked for ({type(error).__name__}: {error}).') from error
    check_activations(checkpoint, model, norms)
    return norms


def fitted_state_dict(
        checkpoint: Checkpoint,
        model: nn.Module,
        convert: Optional[Convert] = None,
) -> Dict[str, torch.Tensor]:
    """Read a checkpoint's tensors for a network, with everything taken into account that its modules say.

    Args:
        checkpoint: The open file.
        model: The network that it is for, on any device, ``'meta'`` included.
        convert: The family's map from the file's names to the network's. It is only looked through: the tensors keep
            the file's names.

    Returns:
        The state dict. Where the file's batch norms have another epsilon than the network's, their running variances
        are moved so that the network computes the same.

    Raises:
        CheckpointError: If the file is damaged, or for another network, or has other activations.
    """
    norms = check_modules(checkpoint, model, convert)
    state_dict = checkpoint.state_dict()
    convert_eps(checkpoint, model, norms, state_dict)
    return state_dict


def read_foreign(
        path: Union[str, Path],
        model: nn.Module,
        allow_partial: bool = False,
        convert: Optional[Convert] = None,
        classifier: bool = True,
) -> Optional[Dict[str, torch.Tensor]]:
    """Read a file that timm cannot read by itself, or would have to trust.

    Args:
        path: The file.
        model: The network that it is for, on any device, ``'meta'`` included: only its shapes are looked at.
        allow_partial: Accept a file that holds the network's beginning only, if its kind has such files.
        convert: As for :func:`fitted_state_dict`.
        classifier: Whether the classifier is needed, for files that may end before it.

    Returns:
        The state dict, or None if timm reads files of this kind itself.

    Raises:
        CheckpointError: If the file is missing, damaged, or not for this network.
    """
    path = Path(path)
    reader = _find_reader(path)
    if path.suffix in _TIMMS:
        return None
    if reader is None:
        raise _unknown(path)
    if not hasattr(reader, 'describe'):
        return reader.read(path, model, allow_partial, classifier)
    with _describe(reader, path) as checkpoint:
        _logger.info('%s: %s.', path, checkpoint.summary())
        return fitted_state_dict(checkpoint, model, convert)
