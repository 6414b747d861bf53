"""State dicts, and what training scripts put around them, that somebody has read already."""
from pathlib import Path
from typing import Any, Dict, Mapping, Union

import torch
import torch.nn as nn

from .choosing import choose, clean_names, split_average
from .description import Checkpoint, TensorInfo, count_classes

__all__ = ['describe_mapping']


def _tensors(value: Any) -> Dict[str, torch.Tensor]:
    if isinstance(value, nn.Module):
        return value.state_dict()
    if not isinstance(value, Mapping):
        return {}
    return {k: v for k, v in value.items() if isinstance(v, torch.Tensor) and type(k) is str}


def describe_mapping(root: Union[Mapping[str, Any], nn.Module]) -> Checkpoint:
    """Find the state dict in what a checkpoint file held.

    Args:
        root: A state dict, or one under a name such as ``'state_dict'`` or ``'model'``, or a module.

    Returns:
        The checkpoint. Its tensors are those given, of whatever type; what is no tensor (epochs, optimisers) is left
        out.
    """
    choice = choose(
        root,
        children=lambda value: value if isinstance(value, Mapping) else {},
        count=lambda value: sum(1 for tensor in _tensors(value).values() if tensor.ndim),
        shapes=lambda value: [tensor.shape for tensor in _tensors(value).values()],
    )
    cleaned = clean_names(_tensors(choice.value if choice is not None else root))
    names, average = split_average(
        {name: tensor.shape for name, tensor in cleaned.items()}, choice.average if choice is not None else None)
    tensors = {name: cleaned[name] for name in names}
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    module = choice.value if choice is not None and isinstance(choice.value, nn.Module) else nn.Identity()
    return Checkpoint(
        path=Path(),
        container='state dict',
        tensors=infos,
        part=choice.part if choice is not None else '',
        ema=average,
        num_classes=count_classes(infos),
        bn_eps=clean_names({
            name: part.eps for name, part in module.named_modules()
            if hasattr(part, 'running_var') and isinstance(getattr(part, 'eps', None), float)
        }),
        modules=clean_names({name: type(part).__name__ for name, part in module.named_modules()}),
        read=lambda: dict(tensors),
    )
