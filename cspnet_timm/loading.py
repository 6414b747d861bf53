"""Weights into a network by every road that timm has: from a released source, a file, a state dict or a checkpoint.

timm reads some files by itself before a model is asked, and takes another set of weights out of a file than this
package does; :func:`fit_to` is the one road behind all of them.
"""
import contextlib
import copy
import functools
import logging
import re
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.models import _factory, _helpers

from .backbone import CspBackbone, Fitted
from .checkpoints import CheckpointError, open_checkpoint, read_numbers
from .extractors import network_of
from .fitting import Contents, Fit, fit, tell_left_out
from .naming import Native
from .sizes import first_conv

__all__ = ['fit_to', 'fitted', 'install', 'opened']

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def opened(source: Union[Contents, Path, None]) -> Iterator[Union[Contents, Path, None]]:
    """Open a file; anything else than a path stays as it is.

    Args:
        source: A path, or what is not to be opened.

    Yields:
        The open checkpoint; the path of a file that does not name its tensors.

    Raises:
        CheckpointError: If the file is missing, damaged, or of no kind that is known.
    """
    if not isinstance(source, Path):
        yield source
        return
    checkpoint = open_checkpoint(source)
    if checkpoint is None:
        yield source
        return
    with checkpoint:
        _logger.info('%s: %s.', source, checkpoint.summary())
        yield checkpoint


def _replaced(module: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """The module with another part at a name; it shares all else with the one given."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    first, _, rest = name.partition('.')
    child = module._modules[first]
    assert child is not None
    other._modules[first] = _replaced(child, rest, part) if rest else part
    return other


def _as_in_file(network: nn.Module, num_classes: int, in_chans: int) -> nn.Module:
    """The network with the classes and input channels that a file has, these layers on the meta device."""
    conv = network.get_submodule(first_conv(network.state_dict()).rpartition('.')[0])
    if isinstance(conv, nn.Conv2d) and conv.in_channels != in_chans:
        name = first_conv(network.state_dict()).rpartition('.')[0]
        network = _replaced(network, name, nn.Conv2d(
            in_chans, conv.out_channels, conv.kernel_size, bias=conv.bias is not None,  # type: ignore[arg-type]
            device='meta'))
    if num_classes and num_classes != getattr(network, 'num_classes', None):
        features: int = network.head.num_features  # type: ignore[assignment]
        network = _replaced(network, 'head.fc', nn.Linear(features, num_classes, device='meta'))
    return network


def _read_numbers(
        path: Path,
        network: nn.Module,
        strict: bool,
        classifier: bool,
        num_classes: int,
        in_chans: int,
) -> Native:
    """Read a file that does not name its tensors, with the classifier that it has."""
    cfg: Any = network.cfg
    if any(not hasattr(network, name) for name in ('head', 'stem', *(f'layer{i}' for i in range(1, len(cfg.levels))))):
        # An extractor, or a network that was pruned: the file holds the levels that it lacks as well.
        network = CspBackbone(cfg, in_chans, num_classes=getattr(network, 'num_classes', 0), device='meta')
    own: int = getattr(network, 'num_classes', 0)
    first: Optional[CheckpointError] = None
    tried: List[int] = []
    for classes in (own if classifier else 0, num_classes, own, 1000):
        if classes < 1 or classes in tried:
            continue
        tried.append(classes)
        try:
            tensors = read_numbers(path, _as_in_file(network, classes, in_chans), not strict, classifier)
        except CheckpointError as error:
            first = first or error
            match = re.search(r'would fit with (\d+) classes', str(error))
            if match and not classifier and int(match[1]) not in tried:  # whatever it classifies is not asked for
                return _read_numbers(path, network, strict, classifier, int(match[1]), in_chans)
        else:
            return Native(tensors, origin=str(path))
    raise first or CheckpointError(f'{path}: cannot be read.')


def fit_to(
        source: Union[Contents, Path],
        network: nn.Module,
        strict: bool = True,
        classifier: bool = True,
        num_classes: int = 0,
        in_chans: int = 3,
) -> Fit:
    """Find what a network takes from a source of weights, and refuse what is another network's.

    Args:
        source: A checkpoint, or a path as :func:`opened` gives it.
        network: The network.
        strict: Everything has to be there, and no weights may be left over.
        classifier: Whether the network's classifier is to come out of the source.
        num_classes: Classes that the source may have beside the network's own number.
        in_chans: Channels of the image in a file that does not name its tensors.

    Returns:
        The fit.

    Raises:
        CheckpointError: If it is damaged, another network's, or not enough.
    """
    if isinstance(source, Path):
        found = fit(_read_numbers(source, network, strict, classifier, num_classes, in_chans), network)
    else:
        found = fit(source, network)
    found.check(strict, classifier=classifier and strict, adapts_input=True)
    return found


def fitted(found: Fit, network: nn.Module, classifier: bool = True) -> Fitted:
    """The state dict of a fit that has been checked, for ``load_state_dict`` of the network.

    Args:
        found: The fit.
        network: The network.
        classifier: Whether to take the source's classifier.

    Returns:
        The state dict.
    """
    tell_left_out(found)
    tensors = found.state_dict(network)
    _tell_damage(found.native.origin, tensors)
    if not (classifier and found.has_classifier):
        tensors = {k: v for k, v in tensors.items() if not k.startswith('head.fc.')}
    return Fitted(tensors)


def _tell_damage(origin: str, tensors: Dict[str, torch.Tensor]) -> None:
    """Warn of numbers with which no network computes anything: of a training that diverged, or a damaged file."""
    broken = [
        key for key, value in tensors.items()
        if value.is_floating_point() and not value.is_meta
        and not (bool(torch.isfinite(value).all()) and (not key.endswith('running_var') or bool((value >= 0).all())))
    ]
    if broken:
        _logger.warning(
            '%s: %d tensors have numbers that are NaN, infinite, or variances below zero, such as %r: the network will '
            'give NaN.', origin, len(broken), broken[0])


def _load_checkpoint(
        load_checkpoint: Any,
        model: nn.Module,
        checkpoint_path: str,
        use_ema: bool = True,
        device: Any = 'cpu',
        strict: bool = True,
        remap: bool = False,
        filter_fn: Any = None,
        weights_only: bool = True,
) -> Any:
    network = network_of(model)
    if network is None or remap or filter_fn is not None or not use_ema:
        return load_checkpoint(model, checkpoint_path, use_ema, device, strict, remap, filter_fn, weights_only)
    path = Path(checkpoint_path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: there is no such checkpoint.')
    with opened(path) as source:
        assert source is not None
        found = fit_to(source, network, strict, classifier=isinstance(network, CspBackbone))
        found.check(strict)
        return network.load_state_dict(fitted(found, network), strict=strict)


def install() -> None:
    """Read what timm's ``load_checkpoint``, behind ``checkpoint_path=`` and its scripts, loads into these networks.

    timm takes the weights out of a file before it asks the model, and would take others than ``pretrained=True`` with
    the same file. Other models, and calls that ask for the raw weights (``use_ema=False``), stay timm's.
    """
    original = _helpers.load_checkpoint
    if getattr(original, 'func', None) is _load_checkpoint:
        return
    own = functools.partial(_load_checkpoint, original)
    functools.update_wrapper(own, original)
    modules: Tuple[Any, ...] = (sys.modules[_helpers.__name__.rpartition('.')[0]], _helpers, _factory)
    for module in modules:
        if getattr(module, 'load_checkpoint', None) is original:
            module.load_checkpoint = own
