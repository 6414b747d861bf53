"""How large each registered network is, as data: numbers that do not change within a version are not counted anew.

``data/models.csv`` has a row for every registered model. ``python benchmarks/tables.py`` writes it.
"""
import csv
import functools
import hashlib
import re
from dataclasses import astuple, dataclass, fields
from importlib import resources
from typing import Any, Dict, Iterable, List, Mapping, Tuple

__all__ = [
    'ModelSize', 'activations_of', 'comparable_shapes', 'fingerprint', 'first_conv', 'format_rows', 'model_sizes',
    'same_activation',
]

Shapes = Tuple[Tuple[str, Tuple[int, ...]], ...]


@dataclass(frozen=True)
class ModelSize:
    """A row of the table.

    Attributes:
        model: Name of the entrypoint.
        module: The file of the family, ``yolox`` of ``cspnet_timm.families.yolox``.
        parameters: Learnable values, the classifier of the default config included.
        macs: Multiply-accumulates for one image of the default config's size.
        side: Height and width of that image in pixels.
        channels: Channels of the maps, from the first level to the last.
        reductions: Their strides.
        backbone_parameters: Learnable values without the classifier; for ``_cls`` networks, whose classifier is a layer
            more, with it.
        macs_224: Multiply-accumulates of the same for one image of 224×224 pixels.
        macs_640: And of 640×640 pixels.
        fingerprint: :func:`fingerprint` of the network's state dict. Networks that differ in nothing that a state dict
            holds have the same.
        activations: :func:`activations_of` the network's layers, by which some of these can be told apart.
    """

    model: str
    module: str
    parameters: int
    macs: int
    side: int
    channels: Tuple[int, ...]
    reductions: Tuple[int, ...]
    backbone_parameters: int
    macs_224: int
    macs_640: int
    fingerprint: str
    activations: str


_TUPLES = ('channels', 'reductions')
_WORDS = ('model', 'module', 'fingerprint', 'activations')
_SAME = {'Swish': 'SiLU', 'Hardswish': 'HardSwish'}  # classes of frameworks that do one thing


def first_conv(state_dict: Mapping[str, Any]) -> str:
    """Find the convolution that reads the image, whatever the order of the tensors.

    Args:
        state_dict: Tensors by this package's names, on any device.

    Returns:
        The name of its weight, '' if the state dict has none. It is called ``stem.conv`` or is the first of
        ``stem.conv1`` and its like; where a stem has no such layer it is the first by name.
    """
    kernels = (key for key, value in state_dict.items() if key.startswith('stem.') and len(value.shape) == 4)
    return min(kernels, key=lambda key: (re.match(r'stem\.conv\d?\.', key) is None, key), default='')


def comparable_shapes(state_dict: Mapping[str, Any]) -> Shapes:
    """Say what state dicts of one network have in common, whoever trained it and for what.

    Args:
        state_dict: Tensors by this package's names, on any device.

    Returns:
        Names and shapes in order, without what the user's own classes and input channels decide, and without what some
        frameworks do not store.
    """
    shapes = {
        k: tuple(v.shape) for k, v in state_dict.items()
        if not k.startswith('head.fc.') and not k.endswith('num_batches_tracked')
    }
    key = first_conv(state_dict)
    if key in shapes:
        shapes[key] = shapes[key][:1] + shapes[key][2:]
    return tuple(sorted(shapes.items()))


def fingerprint(state_dict: Mapping[str, Any]) -> str:
    """Reduce :func:`comparable_shapes` to a word that the table can hold.

    Args:
        state_dict: Tensors by this package's names, on any device.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.
    """
    text = '\n'.join(f'{name} {shape}' for name, shape in comparable_shapes(state_dict))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def same_activation(kind: str) -> str:
    """The name by which an activation is compared, of the class name that a framework has for it."""
    return _SAME.get(kind, kind)


def activations_of(layers: Mapping[str, str]) -> str:
    """Reduce what the layers of a network end in to a word that the table can hold.

    Args:
        layers: Class name of the activation behind each batch norm, by the batch norm's name.

    Returns:
        The first 8 hexadecimal digits of a SHA-256.
    """
    text = '\n'.join(f'{name} {same_activation(kind)}' for name, kind in sorted(layers.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@functools.cache
def model_sizes() -> Dict[str, ModelSize]:
    """Read the table.

    Returns:
        The rows by name of the model.
    """
    text = resources.files(__package__).joinpath('data/models.csv').read_text(encoding='utf-8')
    rows = {}
    for row in csv.DictReader(text.splitlines()):
        values: Dict[str, Any] = {}
        for key, value in row.items():
            if key in _TUPLES:
                values[key] = tuple(map(int, value.split()))
            else:
                values[key] = value if key in _WORDS else int(value)
        rows[values['model']] = ModelSize(**values)
    return rows


def format_rows(rows: Iterable[ModelSize]) -> str:
    """Write the table.

    Args:
        rows: One for each model.

    Returns:
        The text of the file, in the order of the models' names.
    """
    lines: List[Iterable[Any]] = [[field.name for field in fields(ModelSize)]]
    for row in sorted(rows, key=lambda r: r.model):
        lines.append(' '.join(map(str, v)) if isinstance(v, tuple) else v for v in astuple(row))
    return ''.join(f'{",".join(map(str, line))}\n' for line in lines)
