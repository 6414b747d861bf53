"""How the frameworks name the tensors of a network.

A family says once how the frameworks name its tensors (:class:`Naming`), and announces it when it is defined
(:func:`register_naming`). :func:`to_native` finds a network's tensors in whatever was put around them, and gives them
this package's names, once for each checkpoint: everything that is asked of it afterwards is asked of the result. No
family is known here by its name.
"""
import functools
import logging
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, FrozenSet, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from .checkpoints import Checkpoint, CheckpointError, describe_mapping
from .sizes import first_conv

__all__ = [
    'Native', 'Naming', 'Rule', 'StateDict', 'focus_to_conv', 'foreign_project', 'is_bookkeeping',
    'naming_of', 'namings', 'register_foreign_project', 'register_naming', 'rename_keys', 'roll_channels', 'say_once',
    'to_native', 'unwrap',
]

_logger = logging.getLogger(__name__)

StateDict = Dict[str, torch.Tensor]
Convert = Callable[[StateDict, nn.Module], StateDict]
Rule = Tuple[str, Union[str, Callable[[re.Match], str]]]

_NATIVE = re.compile(r'(stem|layer\d|neck|head\.(fc|conv))\.')
_ROOTS = re.compile(r'((?:.*\.)?)(stem|layer1)\.')
_NAMINGS: List['Naming'] = []
_PROJECTS: Dict[str, Any] = {}
_MAX_PREFIXES = 4
_MAX_TENSORS = 8192
# Names of what a network computes with. Everything else that has a value or a row of values only counts, observes or
# remembers: n_averaged, total_ops, activation_post_process.min_val.
_WEIGHTS = frozenset((
    'weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked', 'alpha', '_mean', '_variance', 'gamma',
    'beta',
))
_TOLD = 'told'  # stands beside a batch norm's tensors and goes where they go: what its module says


def unwrap(checkpoint: Mapping[str, Any]) -> StateDict:
    """Take the tensors out of the dicts that training scripts put around them.

    Args:
        checkpoint: A state dict, or one under a name such as ``'state_dict'`` or ``'model'``.

    Returns:
        The tensors by name; whatever is none (epochs, optimisers) is left out.
    """
    return describe_mapping(checkpoint).state_dict()


def is_bookkeeping(name: str, ndim: int) -> bool:
    """Whether a tensor is no weight, by its name and its number of dimensions."""
    return ndim < 2 and name.rpartition('.')[2] not in _WEIGHTS and not name.endswith(f'.{_TOLD}')


def rename_keys(state_dict: StateDict, rules: Sequence[Rule]) -> StateDict:
    """Apply every rule, a pattern and its replacement, to every key in turn."""
    out = {}
    for key, value in state_dict.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        out[key] = value
    return out


def roll_channels(state_dict: StateDict, key: str, dims: Sequence[int], bypass_chs: Optional[int] = None) -> None:
    """Turn the channel order [bypass, blocks] of one tensor into this package's [blocks, bypass], in place.

    Args:
        state_dict: The tensors.
        key: Name of the tensor, which may be missing.
        dims: Its dimensions that have the order.
        bypass_chs: Channels of the bypass, half of the dimension's if it is None. No other tensor may decide about it:
            in a part of a file any of them may be missing.
    """
    if key in state_dict and state_dict[key].ndim > max(dims):
        tensor = state_dict[key]
        shifts = [-(tensor.shape[dim] // 2 if bypass_chs is None else bypass_chs) for dim in dims]
        state_dict[key] = tensor.roll(shifts, list(dims))


def focus_to_conv(weight: torch.Tensor) -> torch.Tensor:
    """Make the kernel of a focus stem one of a 6×6 convolution of stride 2 and padding 2, exactly.

    Args:
        weight: ``(out_chs, 4 · C, 3, 3)``; the four pixels of a patch are stacked in the order top left, bottom left,
            top right, bottom right.

    Returns:
        The same numbers as ``(out_chs, C, 6, 6)``.
    """
    out_chs, chs = weight.shape[0], weight.shape[1] // 4
    patches = weight.reshape(out_chs, 2, 2, chs, 3, 3)  # (out, column, row, channel, y, x)
    return patches.permute(0, 3, 4, 2, 5, 1).reshape(out_chs, chs, 6, 6)


@dataclass(frozen=True)
class Naming:
    """How the frameworks name the tensors of one family.

    Attributes:
        family: Name for messages.
        models: The registered networks, as a timm filter or several.
        marker: Pattern of a key that every file has, without the prefixes that wrappers put before it.
        rename: Makes this package's keys and tensors of those behind the prefix. Keys that it leaves in the
            framework's form, of a detector's head, are dropped. It gives keys of a neck as well (``neck.…``): a
            network without one passes them over, one that has it needs them. The second argument is all that the
            file has, without the wrappers' prefix, for parts that do not lie beside the backbone's.
        notice: What whoever loads such a file has to know of its licence, said once per process.
    """

    family: str
    models: Tuple[str, ...]
    marker: str
    rename: Callable[[StateDict, StateDict], StateDict]
    notice: str = ''

    def __reduce__(self) -> Any:
        # A pickled model refers to its family's naming by name, so that no function of a family is pickled with it.
        return (naming_of, (self.family,)) if self in _NAMINGS else super().__reduce__()

    def prefixes(self, state_dict: Mapping[str, Any]) -> List[str]:
        """The prefixes behind which networks of the family lie, the shortest first."""
        found = (re.fullmatch(f'(|.*\\.)(?:{self.marker})', key) for key in state_dict)
        # A copy under a longer prefix is the one that an average is kept in during training.
        return sorted({m[1] for m in found if m}, key=len)[:_MAX_PREFIXES]

    def rename_behind(self, state_dict: StateDict, prefix: str) -> StateDict:
        """Rename the tensors of one network.

        Args:
            state_dict: The tensors.
            prefix: One of :meth:`prefixes`.

        Returns:
            Those of the backbone, its neck and its classifier, under this package's names.

        Raises:
            CheckpointError: If the names are only partly the family's.
        """
        outer = re.sub(r'(backbone\.)*$', '', prefix)
        whole = {k[len(outer):]: v for k, v in state_dict.items() if k.startswith(outer)}
        own = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
        own.update({k: v for k, v in whole.items() if k.startswith('head.fc.')})
        if len(own) > _MAX_TENSORS:  # renaming may look through all of them for each
            raise CheckpointError(f'holds {len(own)} tensors behind {prefix!r}, more than any network of these has.')
        try:
            renamed = self.rename(own, whole)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f'holds another network; its names are only partly those of {self.family} '
                f'({type(error).__name__}: {error}).'
            ) from error
        return {k: v for k, v in renamed.items() if _NATIVE.match(k)}

    def convert(self, state_dict: StateDict, model: Optional[nn.Module] = None) -> StateDict:
        """The family's ``BackboneCfg.convert``.

        Args:
            state_dict: A released file's tensors.
            model: The network to load into; what it has no place for is not looked at here.

        Returns:
            The network's tensors under this package's names; the state dict as it is if it is none of the family.

        Raises:
            CheckpointError: If the names are only partly the family's.
        """
        whole = {k: v for k, v in unwrap(state_dict).items() if not is_bookkeeping(k, v.ndim)}
        prefixes = self.prefixes(whole)
        return self.rename_behind(whole, prefixes[0]) if prefixes else state_dict


def register_naming(naming: Naming) -> Naming:
    """Announce how the frameworks name a family's tensors, so that files of it are recognised.

    Args:
        naming: The family's.

    Returns:
        The same.
    """
    _NAMINGS[:] = [known for known in _NAMINGS if known.family != naming.family] + [naming]
    return naming


def register_foreign_project(name: str, marker: str) -> None:
    """Announce a project whose files are taken for a family's by their users, and hold other networks.

    Args:
        name: The project, for messages.
        marker: Pattern of a key that its files have, without the prefixes that wrappers put before it.
    """
    _PROJECTS[name] = re.compile(rf'(?:(?:module|model|ema|state_dict|_orig_mod)\.)*(?:{marker})')


def foreign_project(names: Iterable[str]) -> str:
    """The project that a file's names are those of, '' if it is none that is known not to be read."""
    names = list(names)
    return next((project for project, marker in _PROJECTS.items() if any(map(marker.fullmatch, names))), '')


def namings() -> Tuple[Naming, ...]:
    """Every naming that a family has announced."""
    return tuple(_NAMINGS)


def naming_of(family: str) -> Naming:
    """The naming that a family has announced."""
    return next(naming for naming in _NAMINGS if naming.family == family)


@dataclass
class Native:
    """A network's tensors under this package's names, as a checkpoint has them, and what it tells of its layers.

    Attributes:
        tensors: The tensors, also those that some network may have no place for.
        count: How many tensors the checkpoint has.
        origins: Finds the checkpoint's own names of what each of the tensors was made of; None if that is not known.
        origin: The file, or ``'The checkpoint'``, for messages.
        given: Whether the checkpoint has these names itself, without anything before them.
        naming: The family's, None if the names are this package's.
        bn_eps: Epsilon of batch norms, by this package's names; those of which the checkpoint tells it.
        activations: Likewise the class of the activation behind a batch norm.
        sources: Likewise the checkpoint's own name of the batch norm.
        network: What the checkpoint calls the network, '' if it does not tell.
        prefix: What stands before the names in the checkpoint.
        beside: Behind which other prefixes the checkpoint has networks.
    """

    tensors: StateDict
    count: int = 0
    origins: Optional[Callable[[], Dict[str, FrozenSet[str]]]] = None
    origin: str = 'The checkpoint'
    given: bool = False
    naming: Optional[Naming] = None
    bn_eps: Dict[str, float] = field(default_factory=dict)
    activations: Dict[str, str] = field(default_factory=dict)
    sources: Dict[str, str] = field(default_factory=dict)
    network: str = ''
    prefix: str = ''
    beside: Tuple[str, ...] = ()

    @property
    def num_classes(self) -> Optional[int]:
        """Classes of the classifier, None if there is none."""
        rows = self.tensors.get('head.fc.weight', self.tensors.get('head.fc.bias'))
        return rows.shape[0] if rows is not None and rows.ndim else None

    def left_out(self, taken: Iterable[str]) -> int:
        """Count the checkpoint's tensors, of neck, head and training, that are no part of some of these.

        Args:
            taken: Names of :attr:`tensors`.

        Returns:
            How many. Of a tensor that was cut in two, or of two that were made one, as the checkpoint has them.
        """
        if self.origins is None:
            return len(self.tensors.keys() - set(taken))
        origins = self.origins()
        return self.count - len(frozenset().union(*(origins.get(name, ()) for name in taken)))

    @property
    def first_conv(self) -> str:
        """Name of the convolution that reads the image, '' if it is not there."""
        return first_conv(self.tensors)


class _Traced(torch.Tensor):
    """A tensor without values, which knows the names of those that it was made of."""

    names: FrozenSet[str] = frozenset()

    @classmethod
    def of(cls, name: str, shape: Tuple[int, ...], dtype: torch.dtype) -> '_Traced':
        traced = torch.empty(shape, dtype=dtype, device='meta').as_subclass(cls)
        traced.names = frozenset((name,))
        return traced

    @classmethod
    def __torch_function__(
            cls,
            func: Callable[..., Any],
            types: Any,
            args: Tuple[Any, ...] = (),
            kwargs: Optional[Dict[str, Any]] = None,
    ) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        given = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,)) if isinstance(x, cls)]
        for y in made if isinstance(made, (list, tuple)) else (made,):
            if isinstance(y, cls):
                y.names = frozenset().union(*(x.names for x in given))
        return made


def _origins(
        shapes: Dict[str, Tuple[Tuple[int, ...], torch.dtype]],
        naming: Naming,
        prefix: str,
) -> Dict[str, FrozenSet[str]]:
    """Rename tensors without values, to see what becomes of which."""
    traced: StateDict = {name: _Traced.of(name, *shape) for name, shape in shapes.items()}
    return {name: getattr(value, 'names', frozenset()) for name, value in naming.rename_behind(traced, prefix).items()}


def _own_prefixes(state_dict: Mapping[str, Any]) -> List[str]:
    """The prefixes behind which this package's own names lie, the shortest first."""
    roots: Dict[str, set] = {}
    for key in state_dict:
        if m := _ROOTS.match(key):
            roots.setdefault(m[1], set()).add(m[2])
    return sorted((prefix for prefix, names in roots.items() if len(names) == 2), key=len)[:_MAX_PREFIXES]


def _tell(checkpoint: Checkpoint, state_dict: StateDict) -> List[Tuple[str, Optional[float], str]]:
    """Put beside each batch norm's tensors, in place, a row of numbers that stand for what its module says."""
    told: List[Tuple[str, Optional[float], str]] = []
    if not checkpoint.modules and not checkpoint.bn_eps:
        return told
    for key in [key for key in state_dict if key.endswith('.running_var')]:
        module = key.rpartition('.')[0]
        act = checkpoint.modules.get(f'{module.rpartition(".")[0]}.act', '')
        state_dict[f'{module}.{_TOLD}'] = torch.full(tuple(state_dict[key].shape), len(told))
        told.append((module, checkpoint.bn_eps.get(module), act))
    return told


def _hear(native: Native, told: List[Tuple[str, Optional[float], str]]) -> Native:
    """Take what :func:`_tell` has put beside the tensors from where it has come to."""
    for key in [key for key in native.tensors if key.endswith(f'.{_TOLD}')]:
        module, numbers = key.rpartition('.')[0], set(native.tensors.pop(key).flatten().tolist())
        facts = [told[number] for number in sorted(numbers)]
        if len({fact[1:] for fact in facts}) > 1:
            raise CheckpointError(f'{native.origin}: {facts[0][0]} and {facts[1][0]} become one layer, and differ.')
        for source, eps, act in facts[:1]:
            native.sources[module] = source
            if eps is not None:
                native.bn_eps[module] = eps
            if act:
                native.activations[module] = act
    return native


def to_native(
        checkpoint: Union[Checkpoint, Mapping[str, Any]],
        convert: Optional[Convert] = None,
        network: Optional[nn.Module] = None,
        look: bool = False,
) -> Iterator[Native]:
    """Give the tensors of a checkpoint this package's names.

    Args:
        checkpoint: An open file, or what somebody has read from one.
        convert: A network's own map, tried before those that families have announced.
        network: What ``convert`` is asked for.
        look: Read no tensor: only names and shapes are asked for.

    Yields:
        The network in it. Where there are several, behind other prefixes or by another family's names, they follow: the
        next one is made when it is asked for.

    Raises:
        CheckpointError: If the file is damaged, or the names are only partly a family's.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = describe_mapping(checkpoint)
    whole = checkpoint.meta_state_dict() if look else checkpoint.state_dict()
    origin = str(checkpoint.path) if checkpoint.path.name else 'The checkpoint'
    count = len(whole)  # before what the modules say is put beside the tensors
    if project := foreign_project(whole):
        raise CheckpointError(f'{origin}: has the names of {project}, whose networks this package does not read.')
    told = _tell(checkpoint, whole)
    weights = {k: v for k, v in whole.items() if not is_bookkeeping(k, v.ndim)}

    shapes = {k: (tuple(v.shape), v.dtype) for k, v in weights.items() if not k.endswith(f'.{_TOLD}')}

    def native(tensors: StateDict, prefix: str = '', prefixes: Sequence[str] = (), **kwargs: Any) -> Native:
        return _hear(Native(
            dict(tensors), count, origin=origin, network=checkpoint.name, prefix=prefix,
            beside=tuple(other for other in prefixes if other != prefix), **kwargs), told)

    prefixes = _own_prefixes(whole)
    for prefix in prefixes:
        own = {k[len(prefix):]: v for k, v in whole.items() if k.startswith(prefix) and _NATIVE.match(k, len(prefix))}
        names: Dict[str, FrozenSet[str]] = {k: frozenset((prefix + k,)) for k in own}
        yield native(own, origins=names.copy, given=not prefix, prefix=prefix, prefixes=prefixes)
    try:
        if convert is not None and not isinstance(getattr(convert, '__self__', None), Naming) and network is not None:
            own = convert(dict(whole), network)
            if any(k not in whole for k in own):
                yield native(own)
        first = getattr(convert, '__self__', None)
        for naming in sorted(_NAMINGS, key=lambda naming: naming is not first):
            prefixes = naming.prefixes(weights)
            for prefix in prefixes:
                # Blocks within a network may have names like a network's.
                others = [other for other in prefixes if not other.startswith(prefix)]
                origins = functools.partial(_origins, shapes, naming, prefix)
                yield native(
                    naming.rename_behind(weights, prefix), naming=naming, origins=origins, prefix=prefix,
                    prefixes=others)
    except CheckpointError as error:
        message = str(error)
        raise error if message.startswith(origin) else CheckpointError(f'{origin}: {message}') from error


@functools.cache
def say_once(notice: str) -> None:
    """Log a warning, once per process."""
    _logger.warning(notice)
