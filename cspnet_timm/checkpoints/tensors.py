"""safetensors files. timm reads them itself; here they are opened to be described and converted."""
import json
import struct
from pathlib import Path
from typing import Any, Dict

import torch
from safetensors import SafetensorError, safe_open

from ._errors import CheckpointError
from .choosing import clean_names, split_average
from .description import Checkpoint, TensorInfo, count_classes, labels_of

__all__ = ['describe', 'recognises']

_DTYPES = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64,
    'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8, 'U8': torch.uint8, 'BOOL': torch.bool,
}


def recognises(path: Path, head: bytes) -> bool:
    """Whether the file is one of safetensors, by the length and the brace that it begins with, or by its name.

    Args:
        path: The file.
        head: Its first bytes.

    Returns:
        True if :func:`describe` is to open it.
    """
    begins = len(head) > 8 and head[8:9] == b'{' and 2 <= struct.unpack_from('<Q', head)[0] <= 100_000_000
    return begins or path.suffix == '.safetensors'


def describe(path: Path) -> Checkpoint:
    """Open a file; safetensors' own parser checks its header.

    Args:
        path: The file.

    Returns:
        The open checkpoint.

    Raises:
        CheckpointError: If the file is damaged.
    """
    try:
        file: Any = safe_open(path, framework='pt').__enter__()
    except SafetensorError as error:
        raise CheckpointError(f'it is no safetensors file, or a damaged one ({error}).') from error
    tensors = {}
    for name in file.keys():
        part = file.get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise CheckpointError(f'its tensor {name!r} is of the type {part.get_dtype()}, which holds no weights.')
        tensors[name] = TensorInfo(tuple(part.get_shape()), _DTYPES[part.get_dtype()])

    cleaned = {clean: name for name, clean in zip(tensors, clean_names(tensors))}
    names, average = split_average({name: tensors[key].shape for name, key in cleaned.items()}, None)

    def read() -> Dict[str, torch.Tensor]:
        out = {name: file.get_tensor(cleaned[name]) for name in names}
        half = (torch.float16, torch.bfloat16)
        return {k: v.float() if v.dtype in half else v for k, v in out.items()}

    taken = {name: tensors[cleaned[name]] for name in names}
    metadata = file.metadata() or {}
    classes = count_classes(taken)
    return Checkpoint(
        path=path,
        container='safetensors file',
        tensors=taken,
        ema=average,
        num_classes=classes,
        labels=labels_of({key: _json(value) for key, value in metadata.items()}, classes),
        others=('metadata ' + json.dumps(metadata),) if metadata else (),
        read=read,
        close=lambda: file.__exit__(None, None, None),
    )


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (RecursionError, ValueError):
        return text
