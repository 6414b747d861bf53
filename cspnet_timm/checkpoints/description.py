"""What a checkpoint file says of itself, before a single tensor of it is read."""
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Type

import torch

from ._errors import CheckpointError

__all__ = ['Checkpoint', 'TensorInfo', 'count_classes', 'labels_of', 'sorted_labels']

# Where the networks of the lineage have as many rows as classes, the most particular first.
_CLASS_KEYS = (
    'head.cls_preds.0.bias', 'bbox_head.rtm_cls.0.bias', 'bbox_head.multi_level_conv_cls.0.bias',
    'yolo_head.pred_cls.0.bias', 'head.fc.bias', 'head.fc.weight', 'linear.bias', 'fc.bias',
)


# Where training scripts keep the names of their classes, as a list, by index, or the index by name.
_LABEL_KEYS = (
    'names', 'class_names', 'classes', 'label_names', 'labels', 'idx_to_class', 'idx_to_label', 'id2label', 'idx2label',
    'class_to_idx', 'label2id', 'categories',
)


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a tensor that has not been read."""

    shape: Tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


@dataclass
class Checkpoint:
    """An open checkpoint file: what it holds, and the way to its tensors until it is closed.

    Attributes:
        path: The file.
        container: Kind of file, in words.
        tensors: Shape and type of each tensor of the state dict, by the framework's own names.
        framework: The framework that wrote it; '' if it does not tell.
        part: Key of the file that the state dict lies under, '' if it is the whole file.
        network: What the framework calls the network; '' if the file does not tell.
        scale: The network's size, where the framework has a name for it.
        ema: Whether the weights are the moving average of training; None if the file does not tell.
        num_classes: Number of classes; None if the file does not tell.
        labels: Name of each class, if they are in the file.
        license: Licence that the framework implies for what it writes, as an SPDX name in lower case, or ''.
        bn_eps: Epsilon of each batch norm by its module's name, where modules were pickled.
        modules: Class name of each module, where modules were pickled.
        others: What else the file holds.
        read: Reads tensors, given their names.
        close: Closes the file.
    """

    path: Path
    container: str
    tensors: Dict[str, TensorInfo]
    framework: str = ''
    part: str = ''
    network: str = ''
    scale: str = ''
    ema: Optional[bool] = None
    num_classes: Optional[int] = None
    labels: Tuple[str, ...] = ()
    license: str = ''
    bn_eps: Dict[str, float] = field(default_factory=dict)
    modules: Dict[str, str] = field(default_factory=dict)
    others: Tuple[str, ...] = ()
    read: Callable[[], Dict[str, torch.Tensor]] = field(default=dict, repr=False)
    close: Callable[[], None] = field(default=lambda: None, repr=False)

    def __enter__(self) -> 'Checkpoint':
        return self

    def __exit__(
            self,
            kind: Optional[Type[BaseException]],
            error: Optional[BaseException],
            traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def state_dict(self) -> Dict[str, torch.Tensor]:
        """Read the tensors.

        Returns:
            The state dict by the framework's own names; half precision becomes float32.

        Raises:
            CheckpointError: If the file is damaged.
        """
        try:
            return self.read()
        except CheckpointError as error:
            raise CheckpointError(f'{self.path}: {error}') from error
        except OSError as error:
            raise CheckpointError(f'{self.path}: cannot be read ({error.strerror or error}).') from error

    def meta_state_dict(self) -> Dict[str, torch.Tensor]:
        """The state dict with every tensor on the ``'meta'`` device, which takes no memory."""
        return {
            name: torch.empty(info.shape, dtype=info.dtype, device='meta') for name, info in self.tensors.items()}

    @property
    def activations(self) -> Dict[str, int]:
        """How many activations of each kind the pickled modules have."""
        kinds: Dict[str, int] = {}
        for name, kind in self.modules.items():
            if name.rpartition('.')[2].startswith('act'):
                kinds[kind] = kinds.get(kind, 0) + 1
        return dict(sorted(kinds.items()))

    @property
    def name(self) -> str:
        """The network and its size as the file has them, '' if it does not tell."""
        if self.scale and not self.network.rpartition('.')[0].endswith(self.scale):
            return f'{self.network or "network"}, scale {self.scale}'
        return self.network

    def summary(self) -> str:
        """Say in a line what was found."""
        parts = [f'{self.container} of {self.framework}' if self.framework else self.container]
        if self.name:
            parts.append(self.name)
        if self.part:
            parts.append(f'weights of {self.part!r}')
        if self.ema is not None:
            parts.append('moving average' if self.ema else 'no moving average')
        parts.append(f'{len(self.tensors)} tensors')
        if self.num_classes is not None:
            parts.append(f'{self.num_classes} classes')
        if self.license:
            parts.append(f'licence {self.license}')
        return ', '.join(parts)

    def lines(self) -> List[str]:
        """Say what was found, a fact to a line: ``'name: value'``."""
        numel = sum(info.numel for info in self.tensors.values())
        dtypes = sorted({str(info.dtype).partition('.')[2] for info in self.tensors.values()})
        facts = {
            'container': self.container,
            'framework': self.framework or 'not told',
            'network': self.name or 'not told',
            'weights': f'under {self.part!r}' if self.part else 'the whole file',
            'moving average': {None: 'not told', True: 'yes', False: 'no'}[self.ema],
            'classes': 'not told' if self.num_classes is None else str(self.num_classes),
            'tensors': f'{len(self.tensors)} ({numel:,} numbers, {", ".join(dtypes)})',
            'batch norm eps': ', '.join(f'{eps:g}' for eps in sorted(set(self.bn_eps.values()))) or 'not told',
            'activations': ', '.join(f'{kind} ({count})' for kind, count in self.activations.items()) or 'not told',
            'licence': self.license or 'not told',
        }
        if self.others:
            facts['besides'] = ', '.join(self.others)
        return [f'{name}: {value}' for name, value in facts.items()]


def count_classes(tensors: Mapping[str, TensorInfo]) -> Optional[int]:
    """Tell the number of classes from the shapes of a classifier or a detector's head.

    Args:
        tensors: By the framework's names.

    Returns:
        The number, or None if no head is known.
    """
    for ending in _CLASS_KEYS:
        for name, info in tensors.items():
            if re.search(r'\b(attn|attention)\.', name):  # a channel attention's layer may be called fc, too
                continue
            if info.shape and (name == ending or name.endswith(f'.{ending}')):
                return info.shape[0]
    return None


def labels_of(place: Mapping[Any, Any], num_classes: Optional[int] = None) -> Tuple[str, ...]:
    """Find the names of the classes among a file's values.

    Args:
        place: Values by name, e.g. ``{'class_to_idx': {'cat': 0, 'dog': 1}}``.
        num_classes: Number of classes, if it is known.

    Returns:
        A name for each class in their order; a class without a name has its index for one. Empty if there are none.
    """
    lower = {key.lower(): value for key, value in place.items() if type(key) is str}
    for key in _LABEL_KEYS:
        if key in lower and (labels := sorted_labels(lower[key], num_classes)):
            return labels
    return ()


def sorted_labels(names: Any, num_classes: Optional[int] = None) -> Tuple[str, ...]:
    """Put the names of classes into their order.

    Args:
        names: A list; names by index, which may be a string and leave indices out; or the index by name, as
            torchvision's ``class_to_idx``.
        num_classes: Number of classes, if it is known.

    Returns:
        A name for each class; one that has none has its index for a name. Empty if these are no names of classes.
    """
    if isinstance(names, (list, tuple)):
        return tuple(names) if all(type(name) is str for name in names) else ()
    if not isinstance(names, Mapping) or not names:
        return ()
    if all(type(key) is str and type(value) is int and value >= 0 for key, value in names.items()):
        names = {index: name for name, index in names.items()}
    by_index: Dict[int, str] = {}
    for index, name in names.items():
        if type(index) is str and index.isdecimal() and len(index) < 10:
            index = int(index)
        if type(index) is not int or type(name) is not str or index < 0 or index in by_index:
            return ()
        by_index[index] = name
    size = max(max(by_index) + 1, num_classes or 0)
    if size > (num_classes or 2 * len(by_index) + 16):
        return ()  # of something else than the classes
    return tuple(by_index.get(i, str(i)) for i in range(size))
