"""How the frameworks name the tensors of a network, and which network a state dict holds.

A family says once how the frameworks name its tensors (:class:`Naming`), and announces it when it is defined
(:func:`register_naming`). From that follow its ``convert`` and its share in :func:`recognise`, which compares with the
registered networks themselves, built on the meta device. No family is known here by its name.
"""
import functools
import logging
import re
from dataclasses import dataclass
from typing import Any, Callable, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.models import create_model, list_models

from .backbone import StateDict
from .checkpoints import CheckpointError
from .sizes import Shapes, comparable_shapes

__all__ = [
    'Naming', 'candidates', 'namings', 'recognise', 'register_naming', 'rename_keys', 'roll_channels', 'unwrap',
]

_logger = logging.getLogger(__name__)

_CONTAINERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model', 'ema', 'params')
_NATIVE = re.compile(r'(stem|layer\d|neck|head\.(fc|conv))\.')
_NAMINGS: List['Naming'] = []

Rule = Tuple[str, Union[str, Callable[[re.Match], str]]]


def unwrap(checkpoint: Mapping[str, Any]) -> StateDict:
    """Take the tensors out of the dicts that training scripts put around them.

    Args:
        checkpoint: A state dict, or one under a name such as ``'state_dict'`` or ``'model'``.

    Returns:
        The tensors by name; whatever is none (epochs, optimisers) is left out.
    """
    for name in _CONTAINERS:
        if isinstance(checkpoint.get(name), Mapping):
            return unwrap(checkpoint[name])
    return {k: v for k, v in checkpoint.items() if isinstance(v, torch.Tensor)}


def rename_keys(state_dict: StateDict, rules: Sequence[Rule]) -> StateDict:
    """Apply every rule, a pattern and its replacement, to every key in turn."""
    out = {}
    for key, value in state_dict.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        out[key] = value
    return out


def roll_channels(state_dict: StateDict, key: str, dims: Sequence[int], bypass_chs: int) -> None:
    """Turn the channel order [bypass, blocks] of one tensor into this package's [blocks, bypass], in place.

    Args:
        state_dict: The tensors.
        key: Name of the tensor, which may be missing.
        dims: Its dimensions that have the order.
        bypass_chs: Channels of the bypass.
    """
    if key in state_dict and state_dict[key].ndim > max(dims):
        state_dict[key] = state_dict[key].roll([-bypass_chs] * len(dims), list(dims))


@functools.cache
def _shapes(name: str) -> Shapes:
    return comparable_shapes(create_model(name, device='meta').state_dict())


@dataclass(frozen=True)
class Naming:
    """How the frameworks name the tensors of one family.

    Attributes:
        family: Name for messages.
        models: The registered networks, as a timm filter or several.
        marker: Pattern of a key that every file has, without the prefixes that wrappers put before it.
        rename: Makes this package's keys and tensors of those behind the prefix. Keys that it leaves in the
            framework's form, of a detector's head, are dropped. It may give keys of a neck as well (``neck.…``): a
            network without one passes them over, one that has it needs them. The second argument is all that the
            file has, without the wrappers' prefix, for parts that do not lie beside the backbone's.
        notice: What whoever loads such a file has to know of its licence, said once per process.
    """

    family: str
    models: Tuple[str, ...]
    marker: str
    rename: Callable[[StateDict, StateDict], StateDict]
    notice: str = ''

    def to_native(self, checkpoint: Mapping[str, Any]) -> Optional[Tuple[StateDict, int]]:
        """Rename a checkpoint of the family.

        Args:
            checkpoint: Tensors by name, or what :func:`unwrap` finds them in.

        Returns:
            The tensors of the backbone and its classifier under this package's names, and how many others were left
            out; None if the checkpoint is not of the family.
        """
        whole = unwrap(checkpoint)
        prefixes = [m[1] for m in (re.fullmatch(f'(|.*\\.)(?:{self.marker})', key) for key in whole) if m]
        if not prefixes:
            return None
        # A copy under a longer prefix is the one that an average is kept in during training.
        prefix = min(prefixes, key=len)
        outer = re.sub(r'(backbone\.)*$', '', prefix)
        own = {k[len(prefix):]: v for k, v in whole.items() if k.startswith(prefix)}
        own.update({k[len(outer):]: v for k, v in whole.items() if k.startswith(f'{outer}head.fc.')})
        renamed = self.rename(own, {k[len(outer):]: v for k, v in whole.items() if k.startswith(outer)})
        native = {k: v for k, v in renamed.items() if _NATIVE.match(k)}
        return native, len(whole) - len(own) + len(renamed) - len(native)

    def convert(self, state_dict: StateDict, model: nn.Module) -> StateDict:
        """The family's ``BackboneCfg.convert``.

        Args:
            state_dict: A released file's tensors, or a native state dict, which is returned as it is.
            model: The network to load into.

        Returns:
            A complete state dict of the network, without the classifier if either side has none.

        Raises:
            CheckpointError: If the file holds another network of the lineage.
        """
        renamed = self.to_native(state_dict)
        if renamed is None:
            if not any(_NATIVE.match(k) for k in state_dict) and (found := recognise(state_dict)) is not None:
                raise CheckpointError(f'The checkpoint holds {found}, not {_name(model, self.family)}.')
            return state_dict
        if self.notice:
            _say_once(self.notice)
        own = model.state_dict()
        levels = {k.split('.')[0] for k in own}  # those that pruning has left
        with_fc = any(k.startswith('head.fc.') for k in own)
        native = {
            k: v for k, v in renamed[0].items()
            if k.split('.')[0] in levels and (with_fc or not k.startswith('head.fc.'))
        }
        expected, given = dict(comparable_shapes(own)), dict(comparable_shapes(native))
        if given != expected:
            found = recognise(state_dict)
            wrong = sorted(k for k in {**given, **expected} if given.get(k) != expected.get(k))
            raise CheckpointError(
                f'The checkpoint holds {found or "another network"}, not {_name(model, self.family)}: {len(wrong)} of '
                f'its tensors are missing, too many or of another shape, among them {wrong[0]!r}.'
            )
        left_out = renamed[1] + len(renamed[0]) - len(native)
        if left_out > 0 and not any(v.is_meta for v in native.values()):  # on meta it is but a look
            _logger.info('%d tensors of neck, head and training were left out.', left_out)
        for key, value in own.items():
            if key.endswith('num_batches_tracked') and key not in native:
                native[key] = torch.zeros_like(value, device='cpu')
        return native


@functools.cache
def _say_once(notice: str) -> None:
    _logger.warning(notice)


def _name(model: nn.Module, family: str) -> str:
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or f'the {family} network asked for'


def register_naming(naming: Naming) -> Naming:
    """Announce how the frameworks name a family's tensors, so that files of it are recognised.

    Args:
        naming: The family's.

    Returns:
        The same.
    """
    _NAMINGS[:] = [known for known in _NAMINGS if known.family != naming.family] + [naming]
    return naming


def namings() -> Tuple[Naming, ...]:
    """Every naming that a family has announced."""
    return tuple(_NAMINGS)


def candidates(state_dict: Mapping[str, Any]) -> List[str]:
    """Find every registered network whose tensors a state dict has, under any of the names that frameworks give them.

    Args:
        state_dict: Tensors by name, of a whole detector or of the backbone alone, on any device.

    Returns:
        Names of models, more than one where networks differ in nothing that a state dict holds: YOLO11 and YOLO26.
    """
    native = unwrap(state_dict)
    models: Tuple[str, ...] = ('cspnet_*',)
    for naming in _NAMINGS:
        renamed = naming.to_native(state_dict)
        if renamed is not None:
            native, models = renamed[0], naming.models
            break
    else:
        if not any(_NATIVE.match(k) for k in native):
            return []
    given = comparable_shapes(native)
    backbone = tuple(item for item in given if not item[0].startswith('neck.'))
    return [name for name in list_models(list(models)) if _shapes(name) == backbone] or [
        name for name in list_models(list(models)) if _shapes(name) == given]


def recognise(state_dict: Mapping[str, Any]) -> Optional[str]:
    """Say which registered network a state dict belongs to.

    Args:
        state_dict: As :func:`candidates` takes it.

    Returns:
        Name of the model, the first one if several have the same tensors, or None.
    """
    return next(iter(candidates(state_dict)), None)
