"""Foreign checkpoint files: recognised by their content, read without executing anything that is in them.

Each reader is a module with two functions: ``recognises(path, head)`` looks at the file's name and first bytes, and
``read(path, model)`` returns a state dict under the names that the file's framework or this package uses; the family's
``convert`` does the rest. A reader whose files may end early has ``read_partial`` beside it. Readers know modules and
containers, and no family.
"""
import importlib
from pathlib import Path
from typing import Dict, Optional, Tuple, Union

import torch
import torch.nn as nn

__all__ = ['CheckpointError', 'read_foreign']

_READERS: Tuple[str, ...] = ('darknet',)
_HEAD_BYTES = 64


class CheckpointError(ValueError):
    """A checkpoint file cannot be read, or holds another network than the one asked for; the message says which."""


def read_foreign(
        path: Union[str, Path],
        model: nn.Module,
        allow_partial: bool = False,
) -> Optional[Dict[str, torch.Tensor]]:
    """Read a file that timm cannot read by itself.

    Args:
        path: The file.
        model: The network that it is for, on any device, ``'meta'`` included: only its shapes are looked at.
        allow_partial: Accept a file that holds the network's beginning only, if its kind has such files.

    Returns:
        The state dict, or None if timm reads files of this kind itself.

    Raises:
        CheckpointError: If the file is missing, damaged, or not for this network.
    """
    path = Path(path)
    try:
        with path.open('rb') as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read ({error.strerror or error}).') from error
    for name in _READERS:
        reader = importlib.import_module(f'{__name__}.{name}')
        if reader.recognises(path, head):
            read = getattr(reader, 'read_partial', reader.read) if allow_partial else reader.read
            return read(path, model)
    return None
