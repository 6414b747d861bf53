"""Files that torch and Paddle pickle: state dicts of OpenMMLab, YOLOX, PaddleDetection and timm, and whole modules.

``torch.save`` of a module pickles the module itself, by its class: reading such a file the usual way imports the
framework that wrote it. Here its classes stay names, and the tensors are found by walking what its attributes
``_modules``, ``_parameters`` and ``_buffers`` would have been. The walk also finds what a state dict does not carry,
the epsilon of each batch norm and the kind of each activation.
"""
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

from timm.models import clean_state_dict

from ._errors import CheckpointError
from .containers import Container, is_container
from .description import Checkpoint, TensorInfo, count_classes
from .unpickle import Array, Record

__all__ = ['describe', 'recognises']

# In timm's order of preference, then the names that other training scripts have. mmengine's 'ema_state_dict' is none of
# them: what it holds are the weights before averaging, which have been swapped with those of 'state_dict'.
_PARTS = ('state_dict_ema', 'model_ema', 'ema', 'params_ema', 'state_dict', 'model', 'model_state_dict', 'params',
          'module')
_AVERAGES = ('state_dict_ema', 'model_ema', 'ema', 'params_ema')
_MODULE_PARTS = ('ema', 'model_ema', 'model', 'module', 'net', 'state_dict')
_MAX_DEPTH = 32
_AGPL = 'agpl-3.0'
_SCALES = {  # depth and width multiples, of the networks whose files do not name their size otherwise
    (0.33, 0.25): 'n', (0.33, 0.5): 's', (0.67, 0.75): 'm', (1.0, 1.0): 'l', (1.33, 1.25): 'x',
}


class _Found(NamedTuple):
    """A state dict within a file."""

    part: str
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
        found = _find_modules(root) or _find_state_dict(root, '', set())
        if found is None:
            raise CheckpointError(f'it is a {container.kind} that holds no weights.')
        framework, license = _framework(root, found, container.modules)
        arrays = clean_state_dict(found.arrays)
        network, scale = _network(found.record)
        tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
        labels = _labels(root, found.record)
        checkpoint = Checkpoint(
            path=path,
            container='pickled module' if found.record is not None else container.kind,
            tensors=tensors,
            framework=framework,
            part=found.part,
            network=network,
            scale=scale,
            ema=_is_average(root, found),
            num_classes=len(labels) or _count(found.record) or count_classes(tensors),
            labels=labels,
            license=license,
            bn_eps=clean_state_dict(found.bn_eps),
            modules=clean_state_dict(found.modules),
            others=_others(root, found.part),
            read=lambda: container.load(arrays),
            close=container.close,
        )
    except BaseException:
        container.close()
        raise
    container.root = None  # the descriptions of the tensors are all that is needed of it
    return checkpoint


# Pickled modules


def _is_module(value: Any) -> bool:
    return isinstance(value, Record) and all(
        isinstance(value.state.get(name), dict) for name in ('_modules', '_parameters', '_buffers'))


def _find_modules(root: Any) -> Optional[_Found]:
    if _is_module(root):
        return _walk('', root)
    if isinstance(root, dict):
        for part in _MODULE_PARTS:
            value = root.get(part)
            for _ in range(2):  # an average is an object with the module as an attribute
                if isinstance(value, Record) and not _is_module(value):
                    value = next((value.state[k] for k in ('ema', 'module') if k in value.state), None)
            if isinstance(value, Record) and _is_module(value):
                return _walk(part, value)
    return None


def _walk(part: str, root: Record) -> _Found:
    found = _Found(part, {}, {}, {}, root)
    # Shared modules are walked at each of their names, as state_dict() does; a pickle in which they nest would take
    # exponentially long.
    pending, visits = [('', root, 0)], 0
    while pending:
        prefix, record, depth = pending.pop()
        visits += 1
        if depth > _MAX_DEPTH or visits > 1 << 16:
            raise CheckpointError('its modules are nested or repeated without end.')
        state = record.state
        found.modules[prefix[:-1]] = record.name
        skipped = state.get('_non_persistent_buffers_set')
        skipped = skipped if isinstance(skipped, (set, frozenset)) else ()
        for kind in ('_parameters', '_buffers'):
            for name, value in state[kind].items():
                if isinstance(value, Array) and type(name) is str and not (kind == '_buffers' and name in skipped):
                    found.arrays[prefix + name] = value
        if 'running_var' in state['_buffers'] and type(state.get('eps')) is float:
            found.bn_eps[prefix[:-1]] = state['eps']
        children = [
            (f'{prefix}{name}.', child, depth + 1) for name, child in state['_modules'].items()
            if type(name) is str and len(name) <= 256 and child is not None
        ]
        for name, child, _ in children:
            if not _is_module(child):
                raise CheckpointError(f'its module {name[:-1]!r} is a {type(child).__name__.lower()} and no module.')
        pending.extend(reversed(children))
    return found


# State dicts


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


def _find_state_dict(root: Any, part: str, seen: Set[int]) -> Optional[_Found]:
    if not isinstance(root, dict) or id(root) in seen:
        return None
    seen.add(id(root))
    for name in _PARTS:
        if isinstance(root.get(name), (dict, Record)):
            inner = _find_state_dict(root[name], f'{part}.{name}' if part else name, seen)
            if inner is None and (arrays := _arrays(root[name])):
                inner = _Found(name, arrays, {}, {}, None)
            if inner is not None:
                return inner
    arrays = _arrays(root)
    return _Found(part, arrays, {}, {}, None) if arrays else None


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
    cfg = _plain(record.state.get('yaml')) if record is not None else {}
    network = _text(cfg.get('yaml_file')) or (_text(record.state.get('yaml_file')) if record is not None else '')
    scale = _text(cfg.get('scale'))
    if not scale:
        multiples = cfg.get('depth_multiple'), cfg.get('width_multiple')
        numbers = all(isinstance(value, (int, float)) for value in multiples)
        scale = _SCALES.get(multiples, '') if numbers else ''  # type: ignore[arg-type]
    return re.split(r'[\\/]', network)[-1], scale


def _count(record: Optional[Record]) -> Optional[int]:
    count = record.state.get('nc') if record is not None else None
    return count if type(count) is int and count > 0 else None


def _text(value: Any) -> str:
    return value if type(value) is str and len(value) <= 256 and value.isprintable() else ''


def _labels(root: Any, record: Optional[Record]) -> Tuple[str, ...]:
    """Names of the classes, as Ultralytics keeps them in the module and OpenMMLab beside the weights."""
    names: Any = record.state.get('names') if record is not None else None
    meta = _plain(_plain(root).get('meta'))
    if not names:
        data = {str(k).lower(): v for k, v in _plain(meta.get('dataset_meta')).items() if type(k) is str}
        names = data.get('classes') or meta.get('CLASSES')
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            return ()
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, (list, tuple)) or not all(type(name) is str for name in names):
        return ()
    return tuple(names)


def _is_average(root: Any, found: _Found) -> Optional[bool]:
    names = found.part.split('.')
    if any(name in _AVERAGES for name in names):
        return True
    top = _plain(root)
    if found.record is not None:
        return False if 'ema' in top or 'updates' in top else None
    return True if _plain(top.get('ema_state_dict')) else None


def _others(root: Any, part: str) -> Tuple[str, ...]:
    top: Mapping[Any, Any] = root if isinstance(root, dict) else {}
    if not part:
        return ()
    skip = part.split('.')[0]
    return tuple(key for key, value in top.items() if _text(key) and key != skip and value is not None)[:32]
