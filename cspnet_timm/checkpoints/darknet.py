"""Darknet's ``.weights`` files: a header, and float32 numbers without a name in the order of the network's cfg.

A convolution is stored as bias, then scale, mean and variance if it has a batch norm (whose beta the bias is), then
weights; a network's :class:`Layout` says which convolution comes when, and what follows the network in files that hold
more: a detector's begins with its backbone, its neck follows, and how long it is depends on its classes. Nothing in a
file names its network, but its length does: it is compared before a single number is read. What the networks' files
hold is listed in ``data/darknet.csv``, so that none of them is built for it.

Darknet numbers the classes of ImageNet in an order of its own, which ``data/darknet_imagenet_order.txt`` lists; the
rows of a classifier of 1000 classes are put into the order of the sorted WordNet ids, timm's and everybody's else.

Format: https://github.com/AlexeyAB/darknet, ``src/parser.c``
"""
import csv
import functools
import logging
import math
import os
import re
import struct
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn as nn

from . import CheckpointError

__all__ = ['NETWORKS', 'DetectionConv', 'FileConv', 'Layout', 'Match', 'Tail', 'candidates', 'check', 'class_order',
           'format_streams', 'read', 'recognises']

_logger = logging.getLogger(__name__)

# Networks that such files were released for, by name: what a file of another size is for is looked up here. The
# families enter theirs.
NETWORKS: Dict[str, Callable[..., nn.Module]] = {}

_NAME = re.compile(r'.\.(weights|backup|conv\.\d+)$')
_VERSIONS = {(0, 1, 0), (0, 2, 0), (0, 2, 5)}  # all that Darknet and its forks have written
_MAX_VERSION = 1000  # larger numbers meant transposed layers long ago, and are otherwise no header at all
_COCO_CLASSES = 80
_MAX_CLASSES = 10_000  # that the beginning of a detector's file is tried for; YOLO9000 has 9418
_IMAGENET_CLASSES = 1000


class FileConv(NamedTuple):
    """A convolution with batch norm behind the network in its file.

    Attributes:
        in_chs: Channels that it reads.
        out_chs: Channels that it gives.
        kernel_size: Side of its kernel.
    """

    in_chs: int
    out_chs: int
    kernel_size: int = 1

    def count(self, num_classes: int) -> int:
        """Numbers in the file."""
        return self.out_chs * (4 + self.in_chs * self.kernel_size ** 2)


class DetectionConv(NamedTuple):
    """A detector's last convolution at one stride, 1×1 with a bias: box, objectness and classes for each anchor.

    Attributes:
        in_chs: Channels that it reads.
        anchors: Anchors per position.
    """

    in_chs: int
    anchors: int

    def count(self, num_classes: int) -> int:
        """Numbers in the file."""
        return self.anchors * (5 + num_classes) * (self.in_chs + 1)


@dataclass(frozen=True)
class Tail:
    """What follows a backbone in a detector's file, in the file's order.

    Attributes:
        network: Name of the model that such a file is for, where several have its backbone.
        layers: The neck's convolutions and those that detect.
        bn_eps: Batch norm's epsilon of the whole file.
        with_neck: Name of the model that has the neck as well, '' if there is none.
    """

    network: str
    layers: Tuple[Union[FileConv, DetectionConv], ...]
    bn_eps: float = 1e-5
    with_neck: str = ''

    def count(self, num_classes: int) -> int:
        """Numbers in the file."""
        return sum(layer.count(num_classes) for layer in self.layers)


@dataclass(frozen=True)
class Layout:
    """How a network's tensors stand in its files.

    Attributes:
        order: Names the network's convolutions, and its classifier if its files have one, in the order of the file.
        arrange: Puts the tensors that were read, in place and under the network's keys, into the network's own order of
            channels, where that is not the file's.
        tails: Of detectors whose files begin with the network.
        neck_order: Names those of the network's convolutions that stand in each of the tails, the first of them first;
            ``order`` does not name them. None if the network has no neck.
    """

    order: Callable[[nn.Module], List[str]]
    arrange: Optional[Callable[[Dict[str, torch.Tensor]], None]] = None
    tails: Tuple[Tail, ...] = ()
    neck_order: Optional[Callable[[nn.Module], List[str]]] = None


class Match(NamedTuple):
    """A network that a file may be of.

    Attributes:
        network: Name of the model.
        content: What the file holds of it, in words.
        num_classes: Of its classifier, None if it has none.
        alone: Whether it holds the backbone and nothing behind it.
        with_neck: Name of the model that takes the detector's neck as well, '' if there is none.
    """

    network: str
    content: str
    num_classes: Optional[int] = None
    alone: bool = False
    with_neck: str = ''


class _Tensor(NamedTuple):
    key: str
    shape: Tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class _Extent(NamedTuple):
    """How much of a network a file holds, and what of it the network has no place for."""

    held: int  # convolutions of the network
    tail: Optional[Tail] = None
    num_classes: int = 0  # of the tail
    held_behind: int = 0  # convolutions of the tail

    @property
    def held_of_neck(self) -> int:
        """Convolutions of the tail that do not detect."""
        behind = self.tail.layers[:self.held_behind] if self.tail is not None else ()
        return sum(isinstance(layer, FileConv) for layer in behind)

    @property
    def has_neck(self) -> bool:
        """Whether nothing is missing of the tail but what detects."""
        missing = self.tail.layers[self.held_behind:] if self.tail is not None else ()
        return self.tail is not None and not any(isinstance(layer, FileConv) for layer in missing)


_LooksRight = Callable[[List[List[_Tensor]], _Extent], bool]


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


def _layout(model: nn.Module) -> Optional[Layout]:
    return getattr(getattr(model, 'cfg', None), 'file_layout', None)


def _layers(model: nn.Module) -> List[List[_Tensor]]:
    """The tensors of each convolution but the neck's, in file order; of a model without such files, none."""
    layout = _layout(model)
    return [] if layout is None else _tensors(model, layout.order(model))


def _neck(model: nn.Module) -> List[List[_Tensor]]:
    """The tensors of each of the neck's convolutions, in file order."""
    layout = _layout(model)
    return [] if layout is None or layout.neck_order is None else _tensors(model, layout.neck_order(model))


def _tensors(model: nn.Module, names: List[str]) -> List[List[_Tensor]]:
    layers = []
    for name in names:
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


def _tails(model: nn.Module) -> Tuple[Tail, ...]:
    layout = _layout(model)
    return layout.tails if layout is not None else ()


def _backbone(layers: List[List[_Tensor]]) -> List[List[_Tensor]]:
    """The convolutions without the classifier, which alone has no batch norm."""
    return [layer for layer in layers if len(layer) > 2]


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


def _extents(
        layers: List[List[_Tensor]],
        tails: Tuple[Tail, ...],
        num_bytes: int,
        looks_right: Optional[_LooksRight] = None,
) -> List[_Extent]:
    """Every way in which so many bytes are the network, the beginning of it, or a detector that begins with it.

    A length is the beginning of a detector for many numbers of classes by chance: but for COCO's, ``looks_right`` has
    to agree.
    """
    whole: List[_Extent] = []
    beginnings: List[_Extent] = []
    by_chance: List[_Extent] = []
    backbone = _backbone(layers)
    rest = num_bytes - _num_bytes(backbone)
    for tail in tails:
        # The whole detector, of however many classes, or its beginning, as `darknet partial` makes it.
        fixed = per_class = 0
        for held, layer in enumerate(tail.layers, start=1):
            fixed += 4 * layer.count(0)
            per_class += 4 * (layer.count(1) - layer.count(0))
            num_classes, left = divmod(rest - fixed, per_class) if per_class else (0, rest - fixed)
            if left or num_classes < bool(per_class):
                continue
            extent = _Extent(len(backbone), tail, num_classes, held)
            if held == len(tail.layers):
                whole.append(extent)
            elif num_classes in (0, _COCO_CLASSES):
                beginnings.append(extent)
            elif num_classes <= _MAX_CLASSES and looks_right is not None and looks_right(layers, extent):
                by_chance.append(extent)
    ranks = (whole, beginnings, by_chance)
    for rank in ranks:
        if any(looks_right is None or looks_right(layers, extent) for extent in rank):
            return rank
    if whole or beginnings:
        return whole or beginnings
    held, rest = 0, num_bytes
    while held < len(layers) and rest >= _num_bytes(layers[held:held + 1]):
        rest -= _num_bytes(layers[held:held + 1])
        held += 1
    return [_Extent(held)] if held and not rest else []


# What files of the networks hold, as data: a line for each network and for what follows it in a detector's file. A
# convolution is out_chs×in_chs×kernel_size, one that detects anchors@in_chs, a classifier its features alone.


def _word(layer: Union[List[_Tensor], FileConv, DetectionConv]) -> str:
    if isinstance(layer, DetectionConv):
        return f'{layer.anchors}@{layer.in_chs}'
    if isinstance(layer, FileConv):
        return f'{layer.out_chs}x{layer.in_chs}x{layer.kernel_size}'
    shape = layer[-1].shape
    return str(shape[1]) if len(layer) == 2 else f'{shape[0]}x{shape[1]}x{shape[2]}'


def format_streams() -> str:
    """Build the networks that files were released for, and write down what their files hold.

    Returns:
        The text of ``data/darknet.csv``.
    """
    lines = ['model,network,with_neck,layers']
    for name, build in NETWORKS.items():
        model = build(device='meta')
        rows = [(',', _layers(model)), *((f'{t.network},{t.with_neck}', t.layers) for t in _tails(model))]
        lines += [f'{name},{networks},{" ".join(map(_word, layers))}' for networks, layers in rows]
    return ''.join(f'{line}\n' for line in lines)


def _own_layer(word: str) -> List[_Tensor]:
    if 'x' not in word:
        return [_Tensor('', (_IMAGENET_CLASSES,)), _Tensor('', (_IMAGENET_CLASSES, int(word)))]
    out_chs, in_chs, kernel_size = map(int, word.split('x'))
    return [_Tensor('', (out_chs,))] * 4 + [_Tensor('', (out_chs, in_chs, kernel_size, kernel_size))]


def _tail_layer(word: str) -> Union[FileConv, DetectionConv]:
    if '@' in word:
        anchors, in_chs = map(int, word.split('@'))
        return DetectionConv(in_chs, anchors)
    out_chs, in_chs, kernel_size = map(int, word.split('x'))
    return FileConv(in_chs, out_chs, kernel_size)


@functools.lru_cache(maxsize=1)
def _known() -> Dict[str, Tuple[List[List[_Tensor]], Tuple[Tail, ...]]]:
    """What the files of each network hold; one that is not in the data, a plugin's, is built."""
    layers: Dict[str, List[List[_Tensor]]] = {}
    tails: Dict[str, List[Tail]] = {}
    data = resources.files(__package__.rpartition('.')[0]) / 'data' / 'darknet.csv'
    for row in csv.DictReader(data.read_text(encoding='ascii').splitlines()):
        words = row['layers'].split()
        if row['network']:
            tail = Tail(row['network'], tuple(map(_tail_layer, words)), with_neck=row['with_neck'])
            tails[row['model']].append(tail)
        else:
            layers[row['model']], tails[row['model']] = list(map(_own_layer, words)), []
    known = {name: (layers[name], tuple(tails[name])) for name in NETWORKS if name in layers}
    for name in NETWORKS.keys() - layers.keys():
        model = NETWORKS[name](device='meta', num_classes=_IMAGENET_CLASSES)
        known[name] = _layers(model), _tails(model)
    return known


def _classes(layers: List[List[_Tensor]], num_bytes: int) -> int:
    """Classes with which a classifier would have so many bytes, 0 if none do."""
    if len(_backbone(layers)) == len(layers):
        return 0
    num_classes, left = divmod(num_bytes - _num_bytes(layers[:-1]), 4 * (layers[-1][-1].shape[-1] + 1))
    return num_classes if num_classes > 0 and not left else 0


def _matches(num_bytes: int, looks_right: Optional[_LooksRight] = None) -> List[Match]:
    """What so many bytes may be, likelier things alone if there are any."""
    usual: List[Tuple[Match, bool]] = []
    unusual: List[Tuple[Match, bool]] = []
    beginnings: List[Tuple[Match, bool]] = []
    for name, (layers, tails) in _known().items():
        num_classes = _classes(layers, num_bytes)
        if num_classes:
            match = Match(name, f'a classifier of {num_classes} classes', num_classes)
            (usual if num_classes == _IMAGENET_CLASSES else unusual).append((match, True))
            continue
        for extent in _extents(layers, tails, num_bytes, looks_right):
            tail = extent.tail
            if tail is None:
                if extent.held == len(_backbone(layers)):
                    content = f'its {extent.held} convolutions, and nothing behind them'
                    beginnings.append((Match(name, content, alone=True), True))
                continue
            content = f'its {extent.held} convolutions, and {extent.held_behind} of a detector behind them'
            if extent.held_behind == len(tail.layers):
                content = _describe(extent)
            rank = usual if extent.num_classes in (0, _COCO_CLASSES) else unusual
            match = Match(tail.network, content, with_neck=tail.with_neck if extent.has_neck else '')
            rank.append((match, looks_right is None or looks_right(layers, extent)))
    ranks = (usual, unusual, beginnings)
    right = [[match for match, is_right in rank if is_right] for rank in ranks]
    found_right = next((rank for rank in right if rank), [])
    # Where no variance is as it should be, the length alone is said, and a reader will refuse the file.
    found = found_right or [match for match, _ in next((rank for rank in ranks if rank), [])]
    # Of two detectors that begin alike, what a file holds may be the whole neck of the one.
    told: Dict[Match, Match] = {}
    for match in found:
        same = match._replace(with_neck='')
        told[same] = match if match.with_neck else told.get(same, match)
    return list(told.values())


def _comparing(file: BinaryIO, header: int) -> _LooksRight:
    return lambda layers, extent: not _impossible(file, header, layers, extent)


def candidates(path: Path) -> List[Match]:
    """Find the networks that a file may be of: those of its length in whose order no variance is below zero.

    Args:
        path: The file.

    Returns:
        The networks, more than one where they differ in nothing that the file tells.

    Raises:
        CheckpointError: If the file is none of Darknet's, or damaged.
    """
    try:
        size = path.stat().st_size
        with path.open('rb') as file:
            header = _read_header(path, file, size)
            return _matches(size - header, _comparing(file, header))
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read ({error.strerror or error}).') from error


def _impossible(file: BinaryIO, header: int, layers: List[List[_Tensor]], extent: _Extent) -> int:
    """How many variances behind the backbone would be below zero, or no number, in a network's order.

    Where a length means something by chance only, they must not all be zero either.
    """
    offset, negative = header + _num_bytes(layers[:extent.held]), 0
    behind_it = extent.tail.layers if extent.tail is not None else ()
    by_chance = extent.num_classes not in (0, _COCO_CLASSES) and extent.held_behind < len(behind_it)
    for behind in behind_it[:extent.held_behind]:
        if isinstance(behind, FileConv):
            file.seek(offset + 4 * 3 * behind.out_chs)
            variances = np.fromfile(file, dtype='<f4', count=behind.out_chs)
            negative += int((~(variances >= 0)).sum()) + int(by_chance and not variances.any())
        offset += 4 * behind.count(extent.num_classes)
    return negative


def _check_size(
        path: Path,
        layers: List[List[_Tensor]],
        tails: Tuple[Tail, ...],
        num_bytes: int,
        allow_partial: bool,
        classifier: bool,
        looks_right: Optional[_LooksRight] = None,
        num_of_neck: int = 0,
) -> List[_Extent]:
    """Compare the length with what the network needs, and return how much of it the file may hold."""
    expected = _num_bytes(layers)
    extents = _extents(layers, tails, num_bytes, looks_right)
    if classifier and extents and extents[0].tail is not None and len(_backbone(layers)) < len(layers):
        if allow_partial:
            return extents
        raise CheckpointError(
            f'{path}: holds {_describe(extents[0])}, and no classifier: num_classes=0 or features_only=True needs '
            'none, and pretrained_strict=False leaves it as it is.'
        )
    needed = len(layers) if classifier else len(_backbone(layers))
    complete = [extent for extent in extents if extent.held >= needed]
    with_neck = [extent for extent in complete if extent.held_of_neck >= num_of_neck]
    if complete and not with_neck and not allow_partial:
        lacking = f'only {complete[0].held_of_neck}' if complete[0].held_of_neck else 'none'
        raise CheckpointError(
            f'{path}: holds the backbone, and of the {num_of_neck} convolutions of the neck behind it {lacking}: load '
            f'it into {tails[0].network}, or pass pretrained_strict=False, which leaves the others as they are.'
        )
    if complete or (extents and allow_partial):
        return with_neck or complete or extents

    message = (
        f'{path}: holds {num_bytes} bytes of weights where this network has {expected}, '
        f'{abs(num_bytes - expected)} too {"few" if num_bytes < expected else "many"}.'
    )
    classes = _classes(layers, num_bytes)
    whole = [match for match in _matches(num_bytes, looks_right) if not match.alone]
    if tails and num_bytes > expected:
        lengths = ' or '.join(f'{expected + 4 * tail.count(_COCO_CLASSES)}' for tail in tails)
        message += (
            f' Nor is it a detector with this backbone: of {_COCO_CLASSES} classes that has {lengths}, and with no '
            'other number of classes it has this length.'
        )
    if whole and (not classes or any(match.num_classes == _IMAGENET_CLASSES for match in whole)):
        message += f' Of this length is {" or ".join(dict.fromkeys(match.network for match in whole))}.'
    elif extents:
        message += (
            f' It ends behind convolution {extents[0].held} of {len(layers)}, as the files of `darknet partial` do: '
            'pretrained_strict=False loads these and leaves the others as they are.'
        )
        if extents[0].held == len(_backbone(layers)):
            message += ' The classifier alone is missing: num_classes=0 or features_only=True needs none.'
    elif classes:
        message += (
            f' It would fit with {classes} classes: pass pretrained_cfg_overlay=dict(file=…, num_classes={classes}).'
        )
    elif num_bytes < expected:
        held = sum(num_bytes >= _num_bytes(layers[:i + 1]) for i in range(len(layers)))
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
    layers, neck = _layers(model), _neck(model)
    try:
        size = path.stat().st_size
        with path.open('rb') as file:
            header = _read_header(path, file, size)
            if not layers:
                raise CheckpointError(
                    f'{path}: is a Darknet file, and there are none for this network, but for {", ".join(NETWORKS)}.')
            absent = {tensor.key for layer in layers + neck for tensor in layer}.difference(model.state_dict())
            if absent:
                raise CheckpointError(
                    f'{path}: holds batch norms, and this network has no {min(absent)}: '
                    'norm_layer must be a batch norm.'
                )
            extents = _check_size(
                path, layers, _tails(model), size - header, allow_partial, classifier, _comparing(file, header),
                len(neck))
            extent = _choose_order(path, file, header, layers, extents)
            file.seek(header)
            state_dict = {
                tensor.key: _read_tensor(path, file, tensor) for layer in layers[:extent.held] for tensor in layer}
            state_dict.update(_read_neck(path, file, neck, extent))
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read ({error.strerror or error}).') from error
    if extent.tail is not None:
        taken = min(len(neck), extent.held_of_neck)
        of_neck = f', and {taken} behind them the neck\'s' if taken else ''
        _logger.info(
            f'{path} holds {_describe(extent)}. {extent.held} convolutions are the backbone\'s{of_neck}; '
            f'{extent.held_behind - taken} {"others" if taken else "behind them"}, of neck and head, were left out.'
        )
        _convert_eps(path, state_dict, model, extent.tail.bn_eps)
    elif extent.held < (len(layers) if classifier else len(_backbone(layers))):
        _logger.warning(
            f'{path} holds the first {extent.held} of {len(layers)} convolutions. Not in it, and left as they are: '
            f'{", ".join(tensor.key for layer in layers[extent.held:] for tensor in layer[-1:])}.'
        )
    elif extent.held == len(layers) > len(_backbone(layers)):
        _sort_classes(state_dict, layers[-1])
    elif not classifier:
        _tell_eps(path, model)
    if extent.held_of_neck < len(neck):
        _logger.warning(
            f'{path} holds {extent.held_of_neck} of the {len(neck)} convolutions of the neck; the others are left as '
            'they are.'
        )
    layout: Any = model.cfg.file_layout
    if layout.arrange is not None:
        layout.arrange(state_dict)
    return state_dict


def _read_neck(
        path: Path,
        file: BinaryIO,
        neck: List[List[_Tensor]],
        extent: _Extent,
) -> Dict[str, torch.Tensor]:
    """Read what a network has of the tail, from behind the backbone; what detects is passed over."""
    state_dict, remaining = {}, iter(neck)
    for layer in extent.tail.layers[:extent.held_behind] if neck and extent.tail is not None else ():
        tensors = next(remaining, None) if isinstance(layer, FileConv) else None
        if tensors is None:
            file.seek(4 * layer.count(extent.num_classes), os.SEEK_CUR)
            continue
        state_dict.update({tensor.key: _read_tensor(path, file, tensor) for tensor in tensors})
    return state_dict


def _describe(extent: _Extent) -> str:
    if extent.tail is None or extent.held_behind < len(extent.tail.layers):
        return 'the beginning of a detector'
    return f'a detector of {extent.num_classes} classes'


def _choose_order(
        path: Path,
        file: BinaryIO,
        header: int,
        layers: List[List[_Tensor]],
        extents: List[_Extent],
) -> _Extent:
    """Of the files of this length, the one in whose order nothing behind the backbone is impossible."""
    if all(extent.tail is None for extent in extents):
        return extents[0]
    for extent in extents:
        if not _impossible(file, header, layers, extent):
            return extent
    others = dict.fromkeys(match.network for match in candidates(path))
    raise CheckpointError(
        f'{path}: is as long as {_describe(extents[0])} with this backbone, but in its order would have variances '
        'below zero or that are no numbers: these are weights of another network, or damaged. Of this length is '
        f'{" or ".join(others)}.'
    )


def _tell_eps(path: Path, model: nn.Module) -> None:
    """Say of a backbone alone what nothing in it tells: it may be a detector's, of another epsilon."""
    own = next((m.eps for m in model.modules() if isinstance(getattr(m, 'eps', None), float)), None)
    for tail in _tails(model):
        if own is not None and own != tail.bn_eps:
            _logger.warning(
                f'{path} holds the backbone alone, and does not tell whether it was a classifier\'s or begins the '
                f'detector of {tail.network}: it is taken with this network\'s batch norm eps of {own:g}. For the '
                f'detector\'s pass bn_eps={tail.bn_eps:g}.'
            )
            return


def _convert_eps(path: Path, state_dict: Dict[str, torch.Tensor], model: nn.Module, eps: float) -> None:
    """Make variances such that the network's epsilon gives what the file's gave, in place: both are only ever added."""
    for key in [key for key in state_dict if key.endswith('.running_var')]:
        own = getattr(model.get_submodule(key.rpartition('.')[0]), 'eps', eps)
        if own == eps:
            continue
        moved = (state_dict[key].double() + (eps - own)).float()
        if bool((moved < 0).any()):
            raise CheckpointError(
                f'{path}: its batch norms have eps {eps:g}, and variances of {key} are too small to be converted to '
                f'this network\'s eps {own:g}: pass bn_eps={eps:g}.'
            )
        state_dict[key] = moved


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
    """Read a file: of the network, of a detector that begins with it, or one of ``darknet partial``.

    ``csdarknet53-omega.conv.105`` is a published backbone. What a detector's file holds behind it and is not of the
    network's neck is left out, and how much that is logged.

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
