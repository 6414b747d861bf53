"""Darknet's ``.weights`` files: a header, and float32 numbers without a name in the order of the network's cfg.

A convolution is stored as bias, then scale, mean and variance if it has a batch norm (whose beta the bias is), then
weights; :attr:`~cspnet_timm.backbone.BackboneCfg.file_order` says which convolution comes when. Nothing in a file names
its network, but its length does: it is compared before a single number is read.

Darknet numbers the classes of ImageNet in an order of its own, which ``data/darknet_imagenet_order.txt`` lists; the
rows of a classifier of 1000 classes are put into the order of the sorted WordNet ids, timm's and everybody's else.

Format: https://github.com/AlexeyAB/darknet, ``src/parser.c``
"""
import functools
import logging
import re
import struct
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, List, NamedTuple, Tuple

import numpy as np
import torch
import torch.nn as nn

from . import CheckpointError

__all__ = ['NETWORKS', 'check', 'class_order', 'read', 'recognises']

_logger = logging.getLogger(__name__)

# Networks that such files were released for, by name: what a file of another size is for is looked up here. The
# families enter theirs.
NETWORKS: Dict[str, Callable[..., nn.Module]] = {}

_NAME = re.compile(r'.\.(weights|backup|conv\.\d+)$')
_VERSIONS = {(0, 1, 0), (0, 2, 0), (0, 2, 5)}  # all that Darknet and its forks have written
_MAX_VERSION = 1000  # larger numbers meant transposed layers long ago, and are otherwise no header at all


class _Tensor(NamedTuple):
    key: str
    shape: Tuple[int, ...]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


def recognises(path: Path, head: bytes) -> bool:
    """Whether the file is, by its name or by its version numbers, one of Darknet's.

    Args:
        path: The file.
        head: Its first bytes.

    Returns:
        True if :func:`read` is to read it.
    """
    return _NAME.search(path.name) is not None or (len(head) >= 16 and struct.unpack_from('<3i', head) in _VERSIONS)


@functools.lru_cache(maxsize=1)
def class_order() -> Tuple[int, ...]:
    """Darknet's index of each of ImageNet's classes, these in the order of their sorted WordNet ids.

    The data lists the WordNet ids in Darknet's order (the first 1000 lines of its ``data/imagenet.labels.list``), so
    that the permutation is where each of the sorted ids stands in it.

    Returns:
        1000 indices: row i of timm's classifier is row ``class_order()[i]`` of Darknet's.
    """
    data = resources.files(__package__.rpartition('.')[0]) / 'data' / 'darknet_imagenet_order.txt'
    wordnet_ids = data.read_text(encoding='ascii').split()
    return tuple(sorted(range(len(wordnet_ids)), key=wordnet_ids.__getitem__))


def _layers(model: nn.Module) -> List[List[_Tensor]]:
    """The tensors of each convolution, in file order; of a model without such files, none."""
    order = getattr(model, 'file_order', None)
    layers = []
    for name in order(model) if order is not None else ():
        module: Any = model.get_submodule(name)
        conv, bn, prefix = getattr(module, 'conv', module), getattr(module, 'bn', None), f'{name}.'
        if bn is None:
            tensors = [_Tensor(f'{prefix}bias', tuple(conv.bias.shape))]
        else:
            tensors = [
                _Tensor(f'{prefix}bn.{key}', tuple(conv.weight.shape[:1]))
                for key in ('bias', 'weight', 'running_mean', 'running_var')
            ]
            prefix = f'{prefix}conv.'
        layers.append(tensors + [_Tensor(f'{prefix}weight', tuple(conv.weight.shape))])
    return layers


def _num_bytes(layers: List[List[_Tensor]]) -> int:
    return 4 * sum(tensor.size for layer in layers for tensor in layer)


def _read_header(path: Path, file: BinaryIO, size: int) -> int:
    """Check the header, leave the file behind it, and return its length."""
    if not size:
        raise CheckpointError(f'{path}: is empty.')
    if size < 16:
        raise CheckpointError(f'{path}: has {size} bytes, less than the 16 of the shortest header of Darknet.')
    major, minor, revision = struct.unpack('<3i', file.read(12))
    if not all(0 <= number < _MAX_VERSION for number in (major, minor, revision)):
        raise CheckpointError(
            f'{path}: is no Darknet file: its version would be {major}.{minor}.{revision}, '
            'and 0.1.0, 0.2.0 and 0.2.5 exist.'
        )
    length = 20 if major * 10 + minor >= 2 else 16  # behind the version, the images seen as 64 or 32 bits
    if size < length:
        raise CheckpointError(f'{path}: ends within its header, {size} bytes instead of {length}.')
    file.seek(length)
    return length


@functools.lru_cache(maxsize=1)
def _known_sizes() -> Dict[int, List[str]]:
    sizes: Dict[int, List[str]] = {}
    for name, build in NETWORKS.items():
        sizes.setdefault(_num_bytes(_layers(build(device='meta'))), []).append(name)
    return sizes


def _is_classifier(layer: List[_Tensor]) -> bool:
    return layer[0].key.startswith('head.fc.')


def _check_size(path: Path, layers: List[List[_Tensor]], num_bytes: int, allow_partial: bool, classifier: bool) -> int:
    """Compare the length with what the network needs, and return how many of its convolutions the file holds."""
    expected = _num_bytes(layers)
    if num_bytes == expected:
        return len(layers)
    held, rest = 0, num_bytes
    while held < len(layers) and rest >= _num_bytes(layers[held:held + 1]):
        rest -= _num_bytes(layers[held:held + 1])
        held += 1
    is_prefix = 0 < held < len(layers) and not rest
    if is_prefix and (allow_partial or (not classifier and all(_is_classifier(layer) for layer in layers[held:]))):
        return held

    message = (
        f'{path}: holds {num_bytes} bytes of weights where this network has {expected}, '
        f'{abs(num_bytes - expected)} too {"few" if num_bytes < expected else "many"}.'
    )
    names = _known_sizes().get(num_bytes)
    if names:
        message += f' Of this length is {" or ".join(names)}.'
    elif is_prefix:
        message += (
            f' It ends behind convolution {held} of {len(layers)}, as the files of `darknet partial` do: '
            'pretrained_strict=False loads these and leaves the others as they are.'
        )
        if all(_is_classifier(layer) for layer in layers[held:]):
            message += ' The classifier alone is missing: num_classes=0 or features_only=True needs none.'
    else:
        features = layers[-1][-1].shape[-1]
        classes, left = divmod(num_bytes - _num_bytes(layers[:-1]), 4 * (features + 1))
        if classes > 0 and not left:
            message += (
                f' It would fit with {classes} classes: '
                f'pass pretrained_cfg_overlay=dict(file=…, num_classes={classes}).'
            )
        elif num_bytes < expected:
            message += f' It ends within convolution {held + 1} of {len(layers)}: is it truncated?'
    raise CheckpointError(message)


def _read_tensor(path: Path, file: BinaryIO, tensor: _Tensor) -> torch.Tensor:
    values = np.fromfile(file, dtype='<f4', count=tensor.size)
    if values.size != tensor.size:
        raise CheckpointError(f'{path}: has become shorter while it was read.')
    broken = int(values.size - np.isfinite(values).sum())
    if broken:
        raise CheckpointError(f'{path}: {broken} of the {values.size} numbers of {tensor.key} are NaN or infinite.')
    if tensor.key.endswith('running_var') and (values < 0).any():
        raise CheckpointError(
            f'{path}: {tensor.key} has {int((values < 0).sum())} variances below zero, so that these are no weights of '
            'this network.'
        )
    return torch.from_numpy(values.astype(np.float32, copy=False)).reshape(tensor.shape)


def _read(path: Path, model: nn.Module, allow_partial: bool, classifier: bool) -> Dict[str, torch.Tensor]:
    layers = _layers(model)
    try:
        size = path.stat().st_size
        with path.open('rb') as file:
            header = _read_header(path, file, size)
            if not layers:
                raise CheckpointError(
                    f'{path}: is a Darknet file, and there are none for this network, but for {", ".join(NETWORKS)}.')
            absent = {tensor.key for layer in layers for tensor in layer}.difference(model.state_dict())
            if absent:
                raise CheckpointError(
                    f'{path}: holds batch norms, and this network has no {min(absent)}: '
                    'norm_layer must be a batch norm.'
                )
            held = _check_size(path, layers, size - header, allow_partial, classifier)
            state_dict = {
                tensor.key: _read_tensor(path, file, tensor) for layer in layers[:held] for tensor in layer}
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read ({error.strerror or error}).') from error
    if any(classifier or not _is_classifier(layer) for layer in layers[held:]):
        _logger.warning(
            f'{path} holds the first {held} of {len(layers)} convolutions. Not in it, and left as they are: '
            f'{", ".join(tensor.key for layer in layers[held:] for tensor in layer[-1:])}.'
        )
    if held == len(layers):
        _sort_classes(state_dict, layers[-1])
    return state_dict


def _sort_classes(state_dict: Dict[str, torch.Tensor], classifier: List[_Tensor]) -> None:
    order = list(class_order())
    for tensor in classifier:
        if tensor.shape[0] == len(order):
            state_dict[tensor.key] = state_dict[tensor.key][order]


def read(
        path: Path,
        model: nn.Module,
        allow_partial: bool = False,
        classifier: bool = True,
) -> Dict[str, torch.Tensor]:
    """Read a file, which may be one of ``darknet partial``: ``csdarknet53-omega.conv.105`` is a published backbone.

    Args:
        path: The file.
        model: The network that it is for, on any device, with as many classes as the file has.
        allow_partial: Accept a file that ends behind any of the network's convolutions, the beginning of a network.
            What it does not hold is logged.
        classifier: Whether the classifier is needed. Where it is not, a file that ends before it is whole.

    Returns:
        The state dict under the network's own keys, a classifier of 1000 classes in timm's order. Darknet counts no
        batches: ``num_batches_tracked`` is not in it.

    Raises:
        CheckpointError: If the file is none of Darknet's, damaged, or not for this network.
    """
    return _read(path, model, allow_partial, classifier)


def check(path: Path) -> None:
    """See whether a file begins as Darknet's do.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it is no Darknet file.
        OSError: If it cannot be read.
    """
    with path.open('rb') as file:
        _read_header(path, file, path.stat().st_size)
