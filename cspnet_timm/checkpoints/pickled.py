"""Files that torch and Paddle pickle: state dicts of OpenMMLab, YOLOX, PaddleDetection and timm, and whole modules.

``torch.save`` of a module pickles the module itself, by its class: reading such a file the usual way imports the
framework that wrote it. Here its classes stay names, and the tensors are found by walking what its attributes
``_modules``, ``_parameters`` and ``_buffers`` would have been. The walk also finds what a state dict does not carry,
the epsilon of each batch norm and the kind of each activation.
"""
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch

from ._errors import CheckpointError
from .choosing import Choice, choose, clean_names, split_average
from .containers import Container, is_container
from .description import Checkpoint, TensorInfo, count_classes, labels_of
from .unpickle import Array, Budget, Record

__all__ = ['describe', 'recognises']

_MAX_DEPTH = 32
_NAME_COST = 400  # of a name in all tables of this module, beside its letters: measured with CPython 3.10
_AGPL = 'agpl-3.0'
_PACKAGE = __name__.partition('.')[0]
_SCALES = {  # depth and width multiples, of the networks whose files do not name their size otherwise
    (0.33, 0.25): 'n', (0.33, 0.5): 's', (0.67, 0.75): 'm', (1.0, 1.0): 'l', (1.33, 1.25): 'x',
}


class _Found(NamedTuple):
    """A state dict within a file."""

    part: str
    average: Optional[bool]
    arrays: Dict[str, Array]
    bn_eps: Dict[str, float]
    modules: Dict[str, str]
    record: Optional[Record]


def recognises(path: Path, head: bytes) -> bool:
    """Whether the file is a zip archive or a pickle, by its first bytes.

    Args:
        path: The file.
        head: Its first bytes.

    Returns:
        True if :func:`describe` is to open it.
    """
    return is_container(head) and path.suffix != '.npz'


def describe(path: Path) -> Checkpoint:
    """Open a file and find the state dict in it.

    Args:
        path: The file.

    Returns:
        The open checkpoint.

    Raises:
        CheckpointError: If the file is damaged, asks for code, or holds no weights.
        OSError: If it cannot be read.
    """
    container = Container(path)
    try:
        root = container.root
        found = _find(root, Budget(container.size))
        if found is None:
            raise CheckpointError(f'it is a {container.kind} that holds no weights.')
        framework, license = _framework(root, found, container.modules)
        network, scale = _network(found.record)
        cleaned = clean_names(found.arrays)
        names, average = split_average({name: array.shape for name, array in cleaned.items()}, found.average)
        arrays = {name: _decoded(cleaned[name]) for name in names}
        tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
        classes = _count(found.record) or count_classes(tensors)
        labels = _labels(root, found.record, classes)
        checkpoint = Checkpoint(
            path=path,
            container='pickled module' if found.record is not None else container.kind,
            tensors=tensors,
            framework=framework,
            part=found.part,
            network=network,
            scale=scale,
            ema=average,
            num_classes=classes or len(labels) or None,
            labels=labels,
            license=license,
            bn_eps=clean_names(found.bn_eps),
            modules=clean_names(found.modules),
            others=_others(root, found.part),
            read=lambda: container.load(arrays),
            close=container.close,
        )
    except BaseException:
        container.close()
        raise
    container.root = None  # the descriptions of the tensors are all that is needed of it
    return checkpoint


# Pickled modules and state dicts


def _is_module(value: Any) -> bool:
    return isinstance(value, Record) and all(
        isinstance(value.state.get(name), dict) for name in ('_modules', '_parameters', '_buffers'))


def _children(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Record):
        # An average may be an object with the module as an attribute.
        return {} if _is_module(value) else value.entries if value.entries is not None else value.state
    return value if isinstance(value, dict) else {}


def _size(value: Any) -> int:
    """How many weights a module or a dict holds by name; numbers that stand alone are bookkeeping."""
    if _is_module(value):
        return 1 + len(value.state['_modules'])
    return sum(1 for array in _arrays(value).values() if array.shape)


def _find(root: Any, budget: Budget) -> Optional[_Found]:
    choice = choose(root, _children, _size, lambda value: [array.shape for array in _arrays(value).values()])
    if choice is None:
        return None
    if _is_module(choice.value):
        return _walk(choice, budget)
    return _Found(choice.part, choice.average, _arrays(choice.value), {}, {}, None)


def _walk(choice: Choice, budget: Budget) -> _Found:
    found = _Found(choice.part, choice.average, {}, {}, {}, choice.value)
    # Shared modules are walked at each of their names, as state_dict() does; a pickle in which they nest would take
    # exponentially long, so that every name is paid for.
    pending = [('', choice.value, 0)]
    while pending:
        prefix, record, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise CheckpointError('its modules are nested or repeated without end.')
        _pay(budget, prefix)
        state = record.state
        found.modules[prefix[:-1]] = record.name
        skipped = state.get('_non_persistent_buffers_set')
        skipped = skipped if isinstance(skipped, (set, frozenset)) else ()
        for kind in ('_parameters', '_buffers'):
            for name, value in state[kind].items():
                if isinstance(value, Array) and type(name) is str and not (kind == '_buffers' and name in skipped):
                    _pay(budget, prefix, name)
                    found.arrays[prefix + name] = value
        if 'running_var' in state['_buffers'] and type(state.get('eps')) is float:
            found.bn_eps[prefix[:-1]] = state['eps']
        children = []
        for name, child in state['_modules'].items():
            if type(name) is str and len(name) <= 256 and child is not None:
                if not _is_module(child):
                    raise CheckpointError(
                        f'its module {prefix}{name} is a {type(child).__name__.lower()} and no module.')
                _pay(budget, prefix, name)
                children.append((f'{prefix}{name}.', child, depth + 1))
        pending.extend(reversed(children))
    return found


def _pay(budget: Budget, *names: str) -> None:
    try:
        budget.charge(_NAME_COST + sum(map(len, names)))
    except CheckpointError as error:
        raise CheckpointError(
            'its modules are nested or repeated without end: their names would take more than twice the memory that '
            'the file has bytes.'
        ) from error


def _array_of(value: Any) -> Optional[Array]:
    if isinstance(value, Array):
        return value
    # Paddle's tensors are pickled with their name before them.
    if isinstance(value, tuple) and len(value) == 2 and type(value[0]) is str and isinstance(value[1], Array):
        return value[1]
    return None


def _arrays(value: Any) -> Dict[str, Array]:
    if isinstance(value, Record):
        value = value.entries
    if not isinstance(value, dict):
        return {}
    # Paddle keeps its bookkeeping under keys with '@@'.
    pairs = ((name, _array_of(item)) for name, item in value.items() if type(name) is str and '@@' not in name)
    return {name: array for name, array in pairs if array is not None and array.source is not None}


def _decoded(array: Array) -> Array:
    """numpy has no bfloat16: Paddle pickles its bits as 16-bit integers, which no weights are by themselves."""
    if array.dtype == torch.uint16:
        return Array(array.source, torch.bfloat16, array.offset, array.shape, array.stride)
    return array


# What the rest of the file tells


def _plain(value: Any) -> Dict[Any, Any]:
    if isinstance(value, Record):
        value = value.entries or value.state
    return value if isinstance(value, dict) else {}


def _framework(root: Any, found: _Found, modules: List[str]) -> Tuple[str, str]:
    """The framework's name, and the licence that it implies for what it writes."""
    packages = {module.partition('.')[0] for module in modules}
    top = _plain(root)
    if 'ultralytics' in packages:
        return 'Ultralytics', _AGPL
    if found.record is not None and 'models' in packages:
        return 'YOLOv5', _AGPL
    if found.record is not None and found.record.module.partition('.')[0] in ('timm', _PACKAGE):
        return found.record.module.partition('.')[0], ''
    meta = _plain(top.get('meta'))
    told = [key for key in meta if type(key) is str]
    if 'message_hub' in top or any(package.startswith('mm') for package in packages) or any(
            key.startswith('mm') or key in ('env_info', 'dataset_meta', 'CLASSES') for key in told):
        copyleft = any(key.startswith('mmyolo') for key in told)
        return 'OpenMMLab', 'gpl-3.0' if copyleft else ''
    names = found.arrays
    if any(name.endswith(('._mean', '._variance')) for name in names) or any(
            type(key) is str and '@@' in key for key in top):
        return 'Paddle', ''
    if any(name.startswith('backbone.backbone.dark') for name in names):
        return 'YOLOX', ''
    if 'pytorch-lightning_version' in top:
        return 'Lightning', ''
    if type(top.get('arch')) is str:
        return 'timm', ''
    return '', ''


def _network(record: Optional[Record]) -> Tuple[str, str]:
    """Name and size of the network as a pickled module has them."""
    own = _text(_plain(record.state.get('pretrained_cfg')).get('architecture')) if record is not None else ''
    if own:
        return own, ''
    cfg = _plain(record.state.get('yaml')) if record is not None else {}
    network = _text(cfg.get('yaml_file')) or (_text(record.state.get('yaml_file')) if record is not None else '')
    scale = _text(cfg.get('scale'))
    if not scale:
        multiples = cfg.get('depth_multiple'), cfg.get('width_multiple')
        numbers = all(isinstance(value, (int, float)) for value in multiples)
        scale = _SCALES.get(multiples, '') if numbers else ''  # type: ignore[arg-type]
    return re.split(r'[\\/]', network)[-1], scale


def _count(record: Optional[Record]) -> Optional[int]:
    if record is not None:
        for count in (record.state.get('nc'), _plain(record.state.get('yaml')).get('nc')):
            if type(count) is int and count > 0:
                return count
    return None


def _text(value: Any) -> str:
    return value if type(value) is str and len(value) <= 256 and value.isprintable() else ''


def _labels(root: Any, record: Optional[Record], classes: Optional[int]) -> Tuple[str, ...]:
    """Names of the classes, in the module, beside the weights, or in what describes them."""
    places = [record.state] if record is not None else []
    top = _plain(root)
    for key in ('', 'meta', 'dataset_meta', 'hyper_parameters', 'args', 'config', 'cfg', 'pretrained_cfg'):
        for owner in (*places[:1], top):
            place = _plain(owner.get(key)) if key else owner
            places.append(place)
            if key == 'meta':
                places.append(_plain(place.get('dataset_meta')))
    for place in places:
        if labels := labels_of({k: _plain(v) or v for k, v in place.items() if type(k) is str}, classes):
            return labels
    return ()


def _others(root: Any, part: str) -> Tuple[str, ...]:
    top: Mapping[Any, Any] = root if isinstance(root, dict) else {}
    if not part:
        return ()
    skip = part.split('.')[0]
    return tuple(key for key, value in top.items() if _text(key) and key != skip and value is not None)[:32]
