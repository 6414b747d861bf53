"""Whether a checkpoint is a network's, and what of it: converted once, judged once.

:func:`fit` gives the tensors that a network takes from a checkpoint, and everything that speaks against it. Whatever is
asked of a file on its way into a model is asked of that: is it this network, may it be loaded, what is the user told?
Which network of the package a checkpoint holds is looked up in the table of sizes (:func:`candidates`), so that none
has to be built for it.
"""
import functools
import logging
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Tuple, Union

import torch
import torch.nn as nn

from .checkpoints import Checkpoint, CheckpointError
from .naming import Native, StateDict, is_bookkeeping, say_once, to_native
from .sizes import activations_of, fingerprint, first_conv, model_sizes, same_activation

__all__ = ['Fit', 'candidates', 'fit', 'fit_native', 'is_folded', 'recognise', 'tell_left_out', 'told_of_others',
           'with_neck']

_logger = logging.getLogger(__name__)

_COUNTER = 'num_batches_tracked'

Contents = Union[Native, Checkpoint, Mapping[str, Any]]


@dataclass
class Fit:
    """What of a checkpoint becomes what of a network. Names are this package's, in the order of the network's.

    Attributes:
        name: The network's.
        native: The checkpoint.
        tensors: What the network takes, the classifier if both have one included.
        missing: What the network needs and the checkpoint lacks, but for the classifier.
        unexpected: Weights of the checkpoint that the network has no place for.
        mismatched: Shape in the checkpoint and in the network, where they differ.
        passed_over: What a network may do without: a neck, levels that pruning has removed, a classifier, counters.
        own_classes: Classes of the network's classifier, 0 if it has none.
        in_chans: Channels of the image in the checkpoint and in the network, None if it has no such layer.
        no_numbers: Types of tensors that are no floating-point numbers, where the network's are.
        folded: Whether the checkpoint's batch norms have been folded into its convolutions.
        eps: Of batch norms that have another epsilon, the checkpoint's and the network's.
        activations: Of layers that end in another activation, the checkpoint's and the network's.
        held: Other networks of the package that the checkpoint holds, where it is not all of this one.
    """

    name: str
    native: Native
    tensors: StateDict = field(default_factory=dict)
    missing: List[str] = field(default_factory=list)
    unexpected: List[str] = field(default_factory=list)
    mismatched: Dict[str, Tuple[Tuple[int, ...], Tuple[int, ...]]] = field(default_factory=dict)
    passed_over: List[str] = field(default_factory=list)
    own_classes: int = 0
    in_chans: Optional[Tuple[int, int]] = None
    no_numbers: Dict[str, torch.dtype] = field(default_factory=dict)
    folded: bool = False
    eps: Dict[str, Tuple[float, float]] = field(default_factory=dict)
    activations: Dict[str, Tuple[str, str]] = field(default_factory=dict)
    held: List[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether the network gets all it needs, and nothing of the checkpoint's network is left."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def is_part(self) -> bool:
        """Whether what there is, is the network's."""
        return bool(self.tensors) and not (self.unexpected or self.mismatched)

    @property
    def wrong(self) -> int:
        """How many tensors speak against it."""
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)

    @property
    def has_classifier(self) -> bool:
        """Whether the checkpoint's classifier is the network's."""
        return bool(self.own_classes) and self.native.num_classes == self.own_classes

    def counts(self) -> str:
        """Say in numbers, and by an example of each, what speaks against it."""
        parts = []
        if self.missing:
            parts.append(_some(self.missing, 'missing'))
        if self.unexpected:
            parts.append(_some(self.unexpected, 'too many'))
        if self.mismatched:
            given, own = next(iter(self.mismatched.values()))
            shapes = f'{_shape(given)} given, {_shape(own)} in the network'
            parts.append(f'{_some(self.mismatched, "of another shape")} ({shapes})')
        return ', '.join(parts)

    def check(self, strict: bool = True, classifier: Optional[bool] = None, adapts_input: bool = False) -> None:
        """Refuse what cannot be loaded.

        Args:
            strict: Everything has to be there, and nothing may be too many.
            classifier: Whether the network needs a classifier out of the checkpoint; None if it does where it has one
                and ``strict``.
            adapts_input: Other input channels than the checkpoint's are made of them afterwards.

        Raises:
            CheckpointError: If the checkpoint holds another network, or not enough of this one.
        """
        if self.activations:
            layer, (given, own) = next(iter(self.activations.items()))
            source = self.native.sources.get(layer, layer).rpartition('.')[0]
            told = f' ({self.native.network})' if self.native.network else ''
            raise CheckpointError(
                f'{self.native.origin}: {source} ends in {given}, but {layer.rpartition(".")[0]} of the network asked '
                f'for ends in {own}, so that the weights would give other numbers. The file is of another network'
                f'{told}, or was built by a version of its framework that had changed that layer.'
            )
        if self.no_numbers:
            dtype = next(iter(self.no_numbers.values()))
            raise CheckpointError(
                f'{self.native.origin}: {_some(self.no_numbers, "of a type that holds no weights")} of '
                f'{str(dtype).partition(".")[2]}: if they were quantised, pass the weights from before that.'
            )
        if not adapts_input and self.in_chans is not None and self.in_chans[0] != self.in_chans[1]:
            raise CheckpointError(
                f'{self.native.origin}: is for images of {self.in_chans[0]} channels, and {self.name} was built with '
                f'in_chans={self.in_chans[1]}.'
            )
        if self.wrong if strict else self.mismatched or not self.tensors:
            raise CheckpointError(f'{self.native.origin}: {self._reason()}')
        if classifier is None:
            classifier = strict
        if classifier and self.own_classes and not self.has_classifier:
            classes = self.native.num_classes
            if classes is None:
                raise CheckpointError(
                    f'{self.native.origin}: has no classifier, and {self.name} has one of {self.own_classes} classes: '
                    'pass num_classes=0 for the features alone, or another number for a new classifier.'
                )
            raise CheckpointError(
                f'{self.native.origin}: its classifier has {classes} classes, and that of {self.name} has '
                f'{self.own_classes}: pass num_classes={classes} to use it, or num_classes=0 for the features alone.'
            )

    def _reason(self) -> str:
        numbers = f'{self.counts()}.'
        if self.folded and self.held:
            return (
                f'its batch norms have been folded into the convolutions, and its tensors are of '
                f'{" or ".join(self.held)}, not of {self.name}: {numbers}'
            )
        if self.folded:
            return (
                f'its batch norms have been folded into the convolutions, and {self.name} has them: {numbers} Build '
                'the network without weights, fold its own by model = timm.utils.reparameterize_model(model), and '
                'model.load_state_dict(…) takes the file\'s.'
            )
        if self.held and all(key.startswith('neck.') for key in (*self.missing, *self.unexpected, *self.mismatched)):
            held = ' or '.join(self.held)
            if not self.is_part:
                return f'holds {held} with another neck than {self.name} has: {numbers} Load it into {self.held[0]}.'
            which = 'and a part of' if any(key.startswith('neck.') for key in self.tensors) else 'without'
            return (
                f'holds {held} {which} the neck of {self.name}: {numbers} Load it into {self.held[0]}, or pass '
                'pretrained_strict=False, which leaves what is missing as it is initialised.'
            )
        if self.held or not self.tensors or (not self.is_part and 2 * len(self.tensors) < self.wrong):
            return f'holds {" or ".join(self.held) or "another network"}, not {self.name}: {numbers}'
        if self.is_part:
            return (
                f'holds a part of {self.name}: {numbers} pretrained_strict=False (or load_state_dict(…, strict=False)) '
                'loads it and leaves the others as they are.'
            )
        return f'does not hold {self.name} as it was built: {numbers}'

    def state_dict(self, network: nn.Module) -> StateDict:
        """Make the network's state dict.

        Args:
            network: The network, for the counters that some frameworks do not store.

        Returns:
            :attr:`tensors`, none of which shares its memory with another, and running variances such that the network's
            epsilon gives what the checkpoint's gave.

        Raises:
            CheckpointError: If a variance would become negative.
        """
        out = dict(self.tensors)
        for layer, (given, own) in self.eps.items():
            # Both are only ever added to each other: var + eps = (var + eps - eps') + eps'.
            key = f'{layer}.running_var'
            moved = (out[key].double() + (given - own)).to(out[key].dtype)
            if bool((moved < 0).any()):
                raise CheckpointError(
                    f'{self.native.origin}: {self.native.sources.get(layer, layer)} was trained with eps {given:g}, '
                    f'and its variances are too small to be converted to the network\'s eps {own:g}: '
                    f'pass bn_eps={given:g}.'
                )
            out[key] = moved
        if not self.native.given:
            _part(out)
        for key, value in network.state_dict().items():
            if key.endswith(_COUNTER) and key not in out and key.replace(_COUNTER, 'running_var') in out:
                out[key] = torch.zeros_like(value, device='cpu')
        return out


def _some(names: Iterable[str], what: str) -> str:
    names = list(names)
    count = f'{len(names)} tensor{"s are" if len(names) > 1 else " is"} {what}'
    return f'{count}, {"such as " if len(names) > 1 else ""}{names[0]!r}'


def _shape(shape: Tuple[int, ...]) -> str:
    return '×'.join(map(str, shape)) or 'a number'


def _part(state_dict: StateDict) -> None:
    """Give tensors that share their memory, or a part of it, memory of their own, in place."""
    seen = set()
    for key, value in state_dict.items():
        if value.is_meta or not value.numel():
            continue
        try:
            storage = value.untyped_storage()
            shares = storage.data_ptr() in seen or storage.nbytes() != value.numel() * value.element_size()
        except (NotImplementedError, RuntimeError):  # of a subclass without a storage
            continue
        if shares:
            state_dict[key] = value = value.clone(memory_format=torch.contiguous_format)
            storage = value.untyped_storage()
        seen.add(storage.data_ptr())


def _name(network: nn.Module) -> str:
    return (getattr(network, 'pretrained_cfg', None) or {}).get('architecture') or type(network).__name__


def fit_native(native: Native, network: nn.Module, name: str = '') -> Fit:
    """Compare a network with tensors that have this package's names.

    Args:
        native: The tensors.
        network: The network, on any device.
        name: What messages call it, by default what it calls itself.

    Returns:
        The result.
    """
    own = network.state_dict()
    found = Fit(name or _name(network), native)
    if 'head.fc.weight' in own:
        found.own_classes = own['head.fc.weight'].shape[0]
    input_key, parts = first_conv(own), {key.partition('.')[0] for key in own}
    cfg = getattr(network, 'cfg', None)
    num_levels = len(getattr(cfg, 'levels', ())) or len(getattr(network, 'feature_info', ()))
    # What pruning has left out, and the neck of a network that has none.
    optional = {'neck', 'stem', *(f'layer{i}' for i in range(1, num_levels))} - parts
    pruned = getattr(network, '_pruned', ())
    if getattr(cfg, 'head', None) is not None:
        optional |= {'head'} - parts
    leaves = {key.rpartition('.')[2] for key in own}
    for key, value in native.tensors.items():
        shape = tuple(value.shape)
        if key not in own:
            leaf = key.rpartition('.')[2]
            is_optional = key.partition('.')[0] in optional or key in pruned or key.startswith('head.fc.')
            counts = leaf == _COUNTER or (leaf not in leaves and is_bookkeeping(key, value.ndim))
            (found.passed_over if is_optional or counts else found.unexpected).append(key)
        elif own[key].is_floating_point() and not value.is_floating_point():
            found.no_numbers[key] = value.dtype
            found.tensors[key] = value
        elif key.startswith('head.fc.') and shape != tuple(own[key].shape):
            if shape[1:] != tuple(own[key].shape)[1:]:
                found.mismatched[key] = shape, tuple(own[key].shape)
            found.passed_over.append(key)
        elif key == input_key and shape[:1] + shape[2:] == tuple(own[key].shape[:1] + own[key].shape[2:]):
            found.in_chans = shape[1], own[key].shape[1]
            found.tensors[key] = value
        elif shape != tuple(own[key].shape):
            found.mismatched[key] = shape, tuple(own[key].shape)
        else:
            found.tensors[key] = value
    given = native.tensors
    found.missing = [key for key in own if key not in given and not key.endswith(_COUNTER) and key[:8] != 'head.fc.']
    if any((key in given) != (key.replace('.weight', '.bias') in given) for key in own if key == 'head.fc.weight'):
        found.missing += [key for key in own if key.startswith('head.fc.') and key not in given]
    found.folded = is_folded(native) and any(key.endswith('.conv.bias') for key in found.unexpected)
    _compare_layers(found, network)
    return found


def is_folded(native: Native) -> bool:
    """Whether a checkpoint's batch norms have been folded into its convolutions, whose biases they have become.

    Args:
        native: What :func:`~cspnet_timm.naming.to_native` has made of the checkpoint.

    Returns:
        True if no batch norm is left.
    """
    biases = sum(key.endswith('.conv.bias') for key in native.tensors)
    return biases > 1 and not any(key.endswith('.running_var') for key in native.tensors)


def _unfolded(tensors: StateDict) -> StateDict:
    """The names and shapes that the tensors had before their batch norms were folded."""
    out: StateDict = {}
    for key, value in tensors.items():
        prefix = key.removesuffix('conv.bias')
        if key.endswith('.conv.bias'):
            out.update({f'{prefix}bn.{leaf}': value for leaf in ('weight', 'bias', 'running_mean', 'running_var')})
        else:
            out[key] = value
    return out


def _compare_layers(found: Fit, network: nn.Module) -> None:
    """Compare what no state dict carries, where the checkpoint tells it: epsilon and activations."""
    for layer in {**found.native.bn_eps, **found.native.activations}:
        if f'{layer}.running_var' not in found.tensors:
            continue
        given, own = found.native.bn_eps.get(layer), getattr(network.get_submodule(layer), 'eps', None)
        if given is not None and isinstance(own, float) and given != own:
            found.eps[layer] = given, own
        parent = layer.rpartition('.')[0]
        act = found.native.activations.get(layer)
        if act and parent:
            kind = type(getattr(network.get_submodule(parent), 'act', nn.Identity())).__name__
            if same_activation(act) != same_activation(kind):
                found.activations[layer] = act, kind


def fit(
        source: Contents,
        network: nn.Module,
        convert: Optional[Callable[[StateDict, nn.Module], StateDict]] = None,
        look: bool = False,
) -> Fit:
    """Find what a network takes from a checkpoint.

    Args:
        source: An open file, what somebody has read from one, or what :func:`~cspnet_timm.naming.to_native` has made of
            either.
        network: The network, on any device.
        convert: The network's own map from other names; that of its ``cfg`` if None.
        look: Read no tensor of a file.

    Returns:
        The result, of the network in the checkpoint that fits best.

    Raises:
        CheckpointError: If the file is damaged.
    """
    if isinstance(source, Native):
        found = fit_native(source, network)
        if source.beside:
            _logger.warning('%s', told_of_others(source))
        if not found.is_complete:
            found.held = _others(_candidates(source), found.name)
        return found
    if convert is None:
        convert = getattr(getattr(network, 'cfg', None), 'convert', None)
    best: Optional[Fit] = None
    held: List[str] = []
    for native in to_native(source, convert, network, look):
        found = fit_native(native, network)
        if best is None or found.wrong < best.wrong:
            best = found
        if best.is_complete:
            break
        held += _candidates(native)
    if best is None:
        origin = str(source.path) if isinstance(source, Checkpoint) and source.path.name else 'The checkpoint'
        best = fit_native(Native({}, origin=origin), network)
    best.held = _others(held, best.name)
    if best.native.beside and not look:
        _logger.warning('%s', told_of_others(best.native))
    if best.native.naming is not None and best.native.naming.notice and not look:
        say_once(best.native.naming.notice)
    return best


def _others(names: List[str], own: str) -> List[str]:
    """Other networks that a checkpoint holds, that first which the own one is with a neck.

    None if, for all that it tells, it is the own one's.
    """
    return [] if own in names else sorted(dict.fromkeys(names), key=lambda name: f'{name}_pan' != own)


def told_of_others(native: Native) -> str:
    """Say which of several networks in a checkpoint is taken, '' if there is one alone."""
    if not native.beside:
        return ''
    behind = ', '.join(repr(prefix) for prefix in native.beside)
    return (
        f'{native.origin}: has a network behind the prefix {native.prefix!r}, which is taken, and others behind '
        f'{behind}: for one of these, pass its tensors alone.'
    )


def tell_left_out(found: Fit) -> None:
    """Log how much of a checkpoint is not in the network."""
    if found.native.given or not _logger.isEnabledFor(logging.INFO):
        return
    counters = [key for key in found.passed_over if key.replace(_COUNTER, 'running_var') in found.tensors]
    left_out = found.native.left_out([*found.tensors, *counters])
    if left_out > 0:
        _logger.info('%d tensors of neck, head and training were left out.', left_out)


# Recognition


@functools.cache
def _by_fingerprint() -> Dict[str, List[str]]:
    rows: Dict[str, List[str]] = {}
    for name, size in model_sizes().items():
        rows.setdefault(size.fingerprint, []).append(name)
    return rows


def candidates(source: Contents) -> List[str]:
    """Find every network of the package whose tensors a checkpoint has, under any of the names that frameworks give.

    Args:
        source: As :func:`fit` takes it, of a whole detector or of the backbone alone, on any device.

    Returns:
        Names of models, more than one where networks differ in nothing that the checkpoint tells: YOLO11 and YOLO26.
        A checkpoint whose batch norms have been folded is its network's all the same (:func:`is_folded`).
    """
    try:
        for native in [source] if isinstance(source, Native) else to_native(source, look=True):
            if names := _candidates(native):
                return names
    except CheckpointError:  # the names are only partly a network's
        pass
    return []


def _candidates(native: Native) -> List[str]:
    tensors = {
        key: value for key, value in native.tensors.items()
        if not is_bookkeeping(key, value.ndim) and not key.endswith(f'.{_COUNTER}')
    }
    if is_folded(native):
        tensors = _unfolded(tensors)
    backbone = {key: value for key, value in tensors.items() if not key.startswith('neck.')}
    # A released detector is known by its backbone; whoever saved a network of this package means all of it.
    forms = (tensors, backbone) if native.naming is None else (backbone, tensors)
    names: List[str] = []
    for form in forms:
        names = names or _by_fingerprint().get(fingerprint(form), [])
    rows = model_sizes()
    if native.naming is not None and tensors.keys() != backbone.keys():
        # A neck tells networks apart whose backbones have the same tensors.
        with_neck = _by_fingerprint().get(fingerprint(tensors), [])
        names = [name for name in names if f'{name}_pan' in with_neck] or names
    if native.activations:
        told = activations_of(native.activations)
        names = [name for name in names if rows[name].activations == told] or names
    return list(names)


def with_neck(native: Native) -> List[str]:
    """Find the networks with a neck that a checkpoint holds all of: a detector's file is a backbone's and theirs.

    Args:
        native: What :func:`~cspnet_timm.naming.to_native` has made of the checkpoint.

    Returns:
        Names of models.
    """
    tensors = {
        key: value for key, value in native.tensors.items()
        if not is_bookkeeping(key, value.ndim) and not key.endswith(f'.{_COUNTER}')
    }
    if not any(key.startswith('neck.') for key in tensors):
        return []
    return list(_by_fingerprint().get(fingerprint(tensors), []))


def recognise(source: Contents) -> Optional[str]:
    """Say which network of the package a checkpoint holds.

    Args:
        source: As :func:`fit` takes it.

    Returns:
        Name of the model, the first one if several have the same tensors, or None.
    """
    return next(iter(candidates(source)), None)
