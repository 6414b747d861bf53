"""What a state dict does not carry: batch norm's epsilon and the activations, compared with a network's.

A pickled module has both. The names of its modules lead to this package's by the family's own ``convert``: it is given
the file's batch norm weights filled with numbers of their own, and where these come out is where they belong.
"""
from typing import Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn

from ._errors import CheckpointError
from .description import Checkpoint

__all__ = ['Convert', 'check_activations', 'convert_eps', 'trace_norms']

Convert = Callable[[Dict[str, torch.Tensor], nn.Module], Dict[str, torch.Tensor]]

_SAME = {'Swish': 'SiLU', 'Hardswish': 'HardSwish'}


def trace_norms(checkpoint: Checkpoint, model: nn.Module, convert: Optional[Convert]) -> List[Tuple[str, str]]:
    """Find which batch norm of the file becomes which of the network.

    Args:
        checkpoint: The file.
        model: The network.
        convert: The family's ``convert``, None if the file has the network's own names.

    Returns:
        Pairs of names, the file's module and the network's.

    Raises:
        CheckpointError: If ``convert`` finds that the file holds another network.
    """
    probe = checkpoint.meta_state_dict()
    sources: Dict[float, str] = {}
    for name, value in probe.items():
        module, _, kind = name.rpartition('.')
        if kind == 'weight' and f'{module}.running_var' in probe:
            sources[float(len(sources))] = module
            probe[name] = torch.full(value.shape, float(len(sources) - 1))
    converted = convert(probe, model) if convert is not None else probe
    norms = {name for name, module in model.named_modules() if hasattr(module, 'running_var')}
    pairs: List[Tuple[str, str]] = []
    for name, value in converted.items():
        module, _, kind = name.rpartition('.')
        if kind == 'weight' and module in norms and not value.is_meta:
            pairs.extend((sources[number], module) for number in sorted(set(value.tolist())) if number in sources)
    return pairs


def check_activations(checkpoint: Checkpoint, model: nn.Module, norms: List[Tuple[str, str]]) -> None:
    """Refuse a file whose layers have other activations than the network's: it would load, and give other numbers.

    Args:
        checkpoint: The file.
        model: The network.
        norms: From :func:`trace_norms`.

    Raises:
        CheckpointError: If a layer differs.
    """
    for source, target in norms:
        layer, own = source.rpartition('.')[0], target.rpartition('.')[0]
        given = checkpoint.modules.get(f'{layer}.act')
        if given is None or not own:
            continue
        kind = type(getattr(model.get_submodule(own), 'act', nn.Identity())).__name__
        if _SAME.get(given, given) != _SAME.get(kind, kind):
            raise CheckpointError(
                f'{checkpoint.path}: {layer} ends in {given}, but {own} of the network asked for ends in {kind}, so '
                'that the weights would give other numbers. The file is of another network'
                f'{_told(checkpoint)}, or was built by a version of its framework that had changed that layer.'
            )


def convert_eps(
        checkpoint: Checkpoint,
        model: nn.Module,
        norms: List[Tuple[str, str]],
        state_dict: Dict[str, torch.Tensor],
) -> None:
    """Make running variances, in place, such that the network's epsilon gives what the file's gave.

    Both are only ever added to each other: ``var + eps = (var + eps - eps') + eps'``.

    Args:
        checkpoint: The file.
        model: The network.
        norms: From :func:`trace_norms`.
        state_dict: The file's tensors, under its own names.

    Raises:
        CheckpointError: If a variance would become negative.
    """
    wanted: Dict[str, float] = {}
    for source, target in norms:
        eps = getattr(model.get_submodule(target), 'eps', None)
        if isinstance(eps, float) and wanted.setdefault(source, eps) != eps:
            raise CheckpointError(f'{checkpoint.path}: {source} would become batch norms of two epsilons.')
    for source, eps in wanted.items():
        given = checkpoint.bn_eps.get(source, eps)
        if given == eps:
            continue
        variance = state_dict[f'{source}.running_var']
        moved = (variance.double() + (given - eps)).to(variance.dtype)
        if bool((moved < 0).any()):
            raise CheckpointError(
                f'{checkpoint.path}: {source} was trained with eps {given:g}, and its variances are too small to be '
                f'converted to the network\'s eps {eps:g}: pass bn_eps={given:g}.'
            )
        state_dict[f'{source}.running_var'] = moved


def _told(checkpoint: Checkpoint) -> str:
    return f' ({checkpoint.name})' if checkpoint.name else ''
