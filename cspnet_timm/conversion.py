"""Checkpoint files of other frameworks into folders that ``timm.create_model('local-dir:…')`` loads.

:func:`convert` and :func:`inspect` are what the commands of the same names do. Both recognise the file's kind and its
network by themselves, and neither runs anything that is in the file.
"""
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, is_model, split_model_name_tag

from . import hub
from .backbone import CspBackbone, StateDict
from .checkpoints import Checkpoint, CheckpointError, check_modules, open_checkpoint
from .checkpoints.darknet import NETWORKS
from .families._builder import WEIGHTS
from .files import replaced_folder
from .naming import candidates

__all__ = ['Conversion', 'convert', 'inspect']

_PREFIX = 'cspnet_'
_CHUNK = 1 << 20
_SIDE = 64  # of the fixed input, for networks whose config names none that is smaller
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` has done.

    Attributes:
        model: Name of the model, with the tag whose preprocessing it has been given.
        directory: The folder.
        found: What the file held, in a line.
        sha256: The file's hash.
        license: Licence that the model card states.
        distance: Largest relative distance between the outputs of what was converted and of what was loaded again.
        url: Where it was pushed to, '' if it was not.
    """

    model: str
    directory: Path
    found: str
    sha256: str
    license: str
    distance: float
    url: str = ''


@dataclass(frozen=True)
class _Target:
    """The model that a file is for."""

    name: str
    num_classes: Optional[int] = None  # None for as many as the architecture has by itself
    in_chans: int = 3


# Recognition


class _Converted(Exception):
    """Ends loading once the model's own hook has run."""


def _convert(state_dict: StateDict, model: Any) -> StateDict:
    """What the model's own hook, where its family's ``convert`` is, makes of a state dict; nothing is loaded."""
    converted: StateDict = {}

    def stop(module: Any, own: StateDict, *_: Any) -> None:
        converted.update(own)
        raise _Converted

    handle = model.register_load_state_dict_pre_hook(stop)
    try:
        model.load_state_dict(dict(state_dict))
    except _Converted:
        pass
    finally:
        handle.remove()
    return converted


def _fits(name: str, checkpoint: Checkpoint) -> Optional[_Target]:
    """Compare names and shapes, but for what the user's own classes and input channels decide."""
    model = timm.create_model(name, num_classes=checkpoint.num_classes or 1000, device='meta')
    try:
        converted = _convert(checkpoint.meta_state_dict(), model)
    except (LookupError, RuntimeError, TypeError, ValueError):  # of another network; the last is also CheckpointError
        return None
    own = {k: v for k, v in model.state_dict().items() if not k.endswith('num_batches_tracked')}
    fc = [converted[k] for k in converted if k.startswith('head.fc.')]
    first = next((k for k, v in own.items() if k.startswith('stem.') and v.ndim == 4), '')
    for key, value in own.items():
        given = converted.get(key)
        if key.startswith('head.fc.') and (given is None or given.shape[1:] == value.shape[1:]):
            continue
        if key == first and given is not None and given[:, :1].shape == value[:, :1].shape:
            continue
        if given is None or given.shape != value.shape:
            return None
    in_chans = converted[first].shape[1] if first else 3
    if converted[first].shape[1] != own[first].shape[1] and own[first].shape[1] != 3:
        return None
    return _Target(name, fc[0].shape[0] if fc else 0, in_chans)


def _find_models(checkpoint: Checkpoint) -> List[str]:
    """Every model of the package that a file's tensors and modules fit."""
    try:
        names = candidates(checkpoint.meta_state_dict())
    except (LookupError, RuntimeError, TypeError, ValueError):  # names that are only partly a network's
        names = []
    if not names:  # under other names than the detectors'
        names = [name for name in timm.list_models(f'{_PREFIX}*') if _fits(name, checkpoint) is not None]
    if checkpoint.modules:
        names = [name for name in names if _same_modules(name, checkpoint)] or names
    # Where networks differ in nothing but the name, the file's own name for it decides.
    stem = re.sub(r'\.\w+$', '', checkpoint.network).replace('-', '_')
    sized = re.sub(r'(?<=\d)(?=_|$)', lambda _: checkpoint.scale, stem, count=1)
    told = {f'{_PREFIX}{stem}', f'{_PREFIX}{sized}'}
    return [name for name in names if name in told] or names


def _same_modules(name: str, checkpoint: Checkpoint) -> bool:
    try:
        check_modules(checkpoint, timm.create_model(name, device='meta'), _convert)
    except CheckpointError:
        return False
    return True


def _darknet_models(path: Path) -> List[str]:
    """The networks that as many numbers make as a Darknet file has; it says nothing else of them."""
    size = path.stat().st_size
    names = []
    for name, build in NETWORKS.items():
        tensors = build(device='meta').state_dict()
        numbers = sum(v.numel() for k, v in tensors.items() if not k.endswith('num_batches_tracked'))
        if size - 4 * numbers in (16, 20):
            names.append(name)
    return names


def _choose(path: Path, names: List[str], found: str) -> str:
    if len(names) == 1:
        return names[0]
    if names:
        raise CheckpointError(
            f'{path}: its tensors are those of {" and ".join(names)}, and the file does not say which it is: choose '
            'one with --model.'
        )
    raise CheckpointError(
        f'{path}: is a {found}, but of no network of this package (`cspnet-timm list`); --model tells what is missing.')


def _check_name(name: str) -> str:
    architecture, _ = split_model_name_tag(name)
    if not is_model(architecture) or not architecture.startswith(_PREFIX):
        raise ValueError(f'{architecture!r} is no model of this package; `cspnet-timm list` shows all.')
    if name != architecture and name not in get_arch_pretrained_cfgs(architecture):
        tags = ', '.join(get_arch_pretrained_cfgs(architecture))
        raise ValueError(f'{name!r}: {architecture} has no such weights, only {tags}.')
    return name


def _choose_tag(name: str, path: Path, num_classes: Optional[int]) -> str:
    """The set of weights whose preprocessing the file most likely has.

    That is the one that is published under the file's name; else the first with a classifier, if the file has one,
    or without, if it has none.
    """
    architecture, tag = split_model_name_tag(name)
    if tag:
        return name
    cfgs = get_arch_pretrained_cfgs(architecture)
    for full, cfg in cfgs.items():
        if path.name in ((cfg.url or '').rpartition('/')[2], (cfg.origin_url or '').rpartition('/')[2]):
            return full
    if num_classes is not None:
        for full, cfg in cfgs.items():
            if bool(cfg.num_classes) == bool(num_classes):
                return full
    return next(iter(cfgs), architecture)


# Conversion


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while part := file.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()


def _license(name: str, given: Optional[str], implied: str, path: Path) -> Dict[str, str]:
    """Entries of the model card: the licence that was given, the file's, or that of the released weights."""
    if given or implied:
        return {'license': given or implied}
    architecture, _ = split_model_name_tag(name)
    known = {info.license: info.terms for key, info in WEIGHTS.items() if key.startswith(f'{architecture}.')}
    if len(known) == 1:
        return known.popitem()[1].card
    why = 'have several licences' if known else 'do not exist'
    raise ValueError(
        f'{path}: does not say under which licence its weights are, and released ones of {architecture} {why}: pass '
        '--license with its name on the Hub, e.g. apache-2.0 or other.'
    )


def _published(name: str, path: Path, sha256: str) -> Dict[str, str]:
    """What is known of the weights, if the file is one that was released: its name carries the hash."""
    info = WEIGHTS.get(name)
    if info is None or path.name not in (source.filename for source in info.sources):
        return {}
    match = re.search(r'[-_]([0-9a-f]{8})(?=[._])', path.name)
    if match is None or not sha256.startswith(match[1]):
        return {}
    return {'data': info.data, 'source': info.source}


def _create(path: Path, name: str, target: _Target) -> CspBackbone:
    overlay: Dict[str, Any] = {'file': str(path)}
    kwargs: Dict[str, Any] = {}
    if target.num_classes is not None:
        overlay['num_classes'] = kwargs['num_classes'] = target.num_classes
    if target.in_chans != 3:
        # The first convolution is as the file has it, and not to be adapted from three channels.
        overlay['first_conv'], kwargs['in_chans'] = None, target.in_chans
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    except CheckpointError as error:
        message = str(error)
        raise error if message.startswith(str(path)) else CheckpointError(f'{path}: {message}') from error
    except RuntimeError as error:
        raise CheckpointError(f'{path}: does not fit {name} ({" ".join(str(error).split())[:500]}).') from error
    return model.eval()  # type: ignore[return-value]


@torch.no_grad()
def _outputs(model: CspBackbone) -> List[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, model.in_chans, _SIDE, _SIDE + 32, generator=generator)
    features, maps = model.forward_intermediates(x)
    return [*maps, model.forward_head(features)]


def _distance(model: CspBackbone, directory: Path) -> float:
    """Load what was written as its users will, and compare."""
    loaded = timm.create_model(f'local-dir:{directory}', pretrained=True).eval()
    distance = 0.
    for a, b in zip(_outputs(loaded), _outputs(model)):  # type: ignore[arg-type]
        if not bool(torch.isfinite(b).all()):
            raise CheckpointError('the converted network gives NaN or infinite numbers: its weights are damaged.')
        distance = max(distance, ((a - b).norm() / b.norm().clamp(min=1e-12)).item())
    return distance


def convert(
        path: Union[str, Path],
        directory: Union[str, Path],
        model: Optional[str] = None,
        license: Optional[str] = None,
        num_classes: Optional[int] = None,
        repo_id: Optional[str] = None,
) -> Conversion:
    """Convert a checkpoint file to a folder with ``model.safetensors``, ``config.json`` and a model card.

    The folder appears complete or not at all: it is written beside its place, loaded from there by timm, compared with
    what was converted, and only then renamed.

    Args:
        path: The file, of any kind that the package reads.
        directory: The folder, which must not exist or be empty.
        model: Name of the model, with a tag or without; found out by itself if None.
        license: Licence of the weights, by its name on the Hub; by default what the file's framework implies, else
            that of the network's released weights.
        num_classes: Number of classes, for files that do not tell.
        repo_id: Push to this repository of the Hub as well, ``'user/name'``.

    Returns:
        What has been done.

    Raises:
        CheckpointError: If the file is missing, damaged, of another network, or its network cannot be told.
        FileExistsError: If the folder is there and not empty.
        ValueError: If the model does not exist, or no licence is known.
    """
    path, directory = Path(path).expanduser(), Path(directory).expanduser().resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f'{directory}: is there and not empty; a model is converted to a new folder.')
    if model is not None:
        _check_name(model)
    checkpoint = open_checkpoint(path)
    labels: Tuple[str, ...] = ()
    if checkpoint is None:
        found, implied = 'Darknet weights file', ''
        target = _Target(model or _choose(path, _darknet_models(path), found), num_classes)
    else:
        with checkpoint:
            found, implied, labels = checkpoint.summary(), checkpoint.license, checkpoint.labels
            name = model or _choose(path, _find_models(checkpoint), found)
            fit = _fits(split_model_name_tag(name)[0], checkpoint) or _Target(name, num_classes)
            target = _Target(name, fit.num_classes if num_classes is None else num_classes, fit.in_chans)
    name = _choose_tag(target.name, path, target.num_classes)
    sha256 = _sha256(path)
    terms = _license(name, license, implied, path)
    converted = _create(path, name, target)
    published = _published(name, path, sha256)
    origin = f'`{path.name}` ({found}; sha256 `{sha256}`), converted by `cspnet-timm convert`'
    about = hub.About(
        license=terms['license'],
        card=terms,
        source=f'{published["source"]}: {origin}' if published else origin,
        data=published.get('data'),
        label_names=list(labels) if labels and len(labels) == converted.num_classes else None,
    )

    with replaced_folder(directory) as temporary:
        hub.save(converted, temporary, about)
        distance = _distance(converted, temporary)
        if not distance <= _TOLERANCE:
            raise CheckpointError(
                f'{path}: what was written computes something else than what was converted, by {distance:.1e}.')
    url = ''
    if repo_id is not None:
        url = str(hub.push(converted, repo_id, about).commit_url)
    return Conversion(name, directory, found, sha256, terms['license'], distance, url)


def inspect(path: Union[str, Path], tensors: bool = False) -> List[str]:
    """Say what a checkpoint file holds, without loading any of it into a model.

    Args:
        path: The file.
        tensors: Add a line for every tensor.

    Returns:
        Lines of the form ``'name: value'``.

    Raises:
        CheckpointError: If the file is missing, damaged, or of no kind that is known.
    """
    path = Path(path).expanduser()
    checkpoint = open_checkpoint(path)
    if checkpoint is None:
        names = _darknet_models(path)
        return [
            'container: Darknet weights file',
            f'numbers: {(path.stat().st_size - 16) // 4:,} and the header',
            f'model: {_listed(names)}',
        ]
    with checkpoint:
        lines = checkpoint.lines()
        lines.append(f'model: {_listed(_find_models(checkpoint))}')
        if tensors:
            lines += [
                f'{name}: {"x".join(map(str, info.shape)) or "scalar"} {str(info.dtype).partition(".")[2]}'
                for name, info in checkpoint.tensors.items()
            ]
    return lines


def _listed(names: List[str]) -> str:
    return ' or '.join(names) or 'none of this package'
