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
from .backbone import CspBackbone
from .checkpoints import Checkpoint, CheckpointError, darknet, open_checkpoint
from .families._builder import WEIGHTS
from .files import replaced_folder
from .fitting import candidates, is_folded, with_neck
from .naming import Native, foreign_project, to_native

__all__ = ['Conversion', 'convert', 'inspect']

_PREFIX = 'cspnet_'
_CHUNK = 1 << 20
_SIDE = 64  # of the fixed input, for networks whose config names none that is smaller
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` has done.

    Attributes:
        model: Name of the model; with a tag only where the file is the released one of that tag.
        preprocessing: Name of the weights whose preprocessing it has been given.
        directory: The folder.
        found: What the file held, in a line.
        sha256: The file's hash.
        license: Licence that the model card states.
        distance: Largest relative distance between the outputs of what was converted and of what was loaded again.
        url: Where it was pushed to, '' if it was not.
        with_neck: Models that take the neck of the file as well, if the one converted to has none.
    """

    model: str
    preprocessing: str
    directory: Path
    found: str
    sha256: str
    license: str
    distance: float
    url: str = ''
    with_neck: Tuple[str, ...] = ()


@dataclass(frozen=True)
class _Target:
    """The model that a file is for."""

    name: str
    num_classes: Optional[int] = None  # None for as many as the architecture has by itself
    in_chans: int = 3
    native: Optional[Native] = None  # its tensors, converted; None if the file does not name them


# Recognition


def _natives(checkpoint: Checkpoint, look: bool = False) -> Tuple[Optional[Native], List[str]]:
    """The network in a file, converted once, and every model of the package that it is."""
    first: Optional[Native] = None
    try:
        for native in to_native(checkpoint, look=look):
            first = first or native
            if names := candidates(native):
                return native, _told(names, checkpoint)
    except CheckpointError:
        if first is None and not look:
            raise
    return first, []


def _told(names: List[str], checkpoint: Checkpoint) -> List[str]:
    """Where networks differ in nothing but the name, the file's own name for it decides."""
    stem = re.sub(r'\.\w+$', '', checkpoint.network).replace('-', '_')
    sized = re.sub(r'(?<=\d)(?=_|$)', lambda _: checkpoint.scale, stem, count=1)
    told = {stem, f'{_PREFIX}{stem}', f'{_PREFIX}{sized}'}
    return [name for name in names if name in told] or names




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
    or without, if it has none: that of the detector trained on COCO, where there is one.
    """
    architecture, tag = split_model_name_tag(name)
    if tag:
        return name
    cfgs = get_arch_pretrained_cfgs(architecture)
    for full, cfg in cfgs.items():
        if path.name in ((cfg.url or '').rpartition('/')[2], (cfg.origin_url or '').rpartition('/')[2]):
            return full
    if num_classes is not None:
        alike = [full for full, cfg in cfgs.items() if bool(cfg.num_classes) == bool(num_classes)]
        if alike:
            return min(alike, key=lambda full: not full.endswith('.coco'))
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
    """What is known of the weights, if the file is one that was released: its hash is."""
    info = WEIGHTS.get(name)
    known = [source.sha256 for source in info.sources if source.filename == path.name] if info is not None else []
    if info is None or not any(digest and sha256.startswith(digest) for digest in known):
        return {}
    return {'data': info.data, 'source': info.source}


def _provenance(path: Path, sha256: str) -> Dict[str, Any]:
    """Entries of the config that say what a file of the user's is: no release of somebody else's."""
    stem = re.sub(r'[^A-Za-z0-9]+', '_', path.name.partition('.')[0]).strip('_').lower() or 'file'
    return {'tag': f'{stem}_{sha256[:8]}', 'origin_url': None}


def _target(path: Path, name: str, native: Optional[Native], num_classes: Optional[int]) -> _Target:
    if native is None:
        native = Native({}, origin=str(path))
    if num_classes is None:
        num_classes = native.num_classes or 0
    stem = native.tensors.get(native.first_conv)
    return _Target(name, num_classes, 3 if stem is None else stem.shape[1], native)


def _create(path: Path, name: str, target: _Target) -> CspBackbone:
    overlay: Dict[str, Any] = {'file': str(path)} if target.native is None else {'state_dict': target.native}
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
    for name, value in model.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f'{name} of the converted network has NaN or infinite numbers: it is damaged.')
    loaded = timm.create_model(f'local-dir:{directory}', pretrained=True).eval()
    distance = 0.
    for a, b in zip(_outputs(loaded), _outputs(model)):  # type: ignore[arg-type]
        if not bool(torch.isfinite(b).all()):  # weights that are no numbers have been refused: these are too large
            distance = max(distance, 0. if torch.allclose(a, b, equal_nan=True) else float('inf'))
            continue
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
        matches = darknet.candidates(path)
        name = model or _choose(path, list(dict.fromkeys(match.network for match in matches)), found)
        # A classifier's length tells its classes; nothing of a detector's file is a classifier.
        told = next((match.num_classes for match in matches if match.network == split_model_name_tag(name)[0]), None)
        target = _Target(name, told if num_classes is None else num_classes)
        necks = [match.with_neck for match in matches if match.with_neck and match.network == name]
    else:
        with checkpoint:
            found, implied, labels = checkpoint.summary(), checkpoint.license, checkpoint.labels
            native, names = _natives(checkpoint)
            target = _target(path, model or _choose(path, names, found), native, num_classes)
            necks = [] if native is None else with_neck(native)
    name = _choose_tag(target.name, path, target.num_classes)
    sha256 = _sha256(path)
    terms = _license(name, license, implied, path)
    converted = _create(path, name, target)
    published = _published(name, path, sha256)
    origin = f'the file `{path.name}` ({found}; sha256 `{sha256}`), converted by `cspnet-timm convert`'
    about = hub.About(
        license=terms['license'],
        card=terms,
        source=f'{published["source"]}: {origin}' if published else origin,
        data=published.get('data'),
        label_names=list(labels) if labels and len(labels) == converted.num_classes else None,
        model_config={} if published else {'pretrained_cfg': _provenance(path, sha256)},
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
    called = name if published else split_model_name_tag(name)[0]
    others = () if hasattr(converted, 'neck') else tuple(dict.fromkeys(necks))
    return Conversion(called, name, directory, found, sha256, terms['license'], distance, url, others)


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
        matches = darknet.candidates(path)
        contents = list(dict.fromkeys(match.content for match in matches))
        return [
            'container: Darknet weights file',
            f'numbers: {(path.stat().st_size - 16) // 4:,} and the header',
            *[f'holds: {content}' for content in contents],
            f'model: {_listed(list(dict.fromkeys(match.network for match in matches)))}',
            *_with_neck(list(dict.fromkeys(match.with_neck for match in matches if match.with_neck))),
        ]
    with checkpoint:
        lines = checkpoint.lines()
        if project := foreign_project(checkpoint.tensors):
            lines.append(f'names: those of {project}')
        native, names = _natives(checkpoint, look=True)
        lines.append(f'model: {_listed(names)}')
        if native is not None:
            if is_folded(native):
                lines.append('batch norms: folded into the convolutions')
            if native.beside:
                lines.append(f'networks: {", ".join(map(repr, (native.prefix, *native.beside)))}, the first is taken')
            lines += _with_neck([name for name in with_neck(native) if name not in names])
        if tensors:
            lines += [
                f'{name}: {"x".join(map(str, info.shape)) or "scalar"} {str(info.dtype).partition(".")[2]}'
                for name, info in checkpoint.tensors.items()
            ]
    return lines


def _with_neck(names: List[str]) -> List[str]:
    return [f'with neck: {_listed(names)}'] if names else []


def _listed(names: List[str]) -> str:
    return ' or '.join(names) or 'none of this package'
