"""What every family's file calls: build a variant, describe its weights, register it."""
import contextlib
import functools
import hashlib
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple, Union

import torch.nn as nn
from huggingface_hub import try_to_load_from_cache
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    get_pretrained_cfg,
    is_model,
    model_entrypoint,
    resolve_pretrained_cfg,
)
from timm.models import register_model as timm_register_model

from .. import sources
from ..backbone import BackboneCfg, CspBackbone, StateDict
from ..checkpoints import CheckpointError, check_reader, open_checkpoint
from ..extractors import extractor
from ..fitting import Contents
from ..loading import fit_to, fitted, install, opened
from ..sources import Source
from ._weights import IN1K, WEIGHTS, License, WeightsInfo, by_hand, default_cfg, describe_weights, hub, web

__all__ = [
    'IN1K', 'WEIGHTS', 'License', 'WeightsInfo', 'build_backbone', 'by_hand', 'default_cfg', 'describe_weights', 'hub',
    'register_model', 'register_pan', 'web',
]


install()


def register_model(fn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """timm's decorator, but a name that timm has itself stays timm's."""
    name = fn.__name__
    if is_model(name) and model_entrypoint(name).__module__.split('.')[0] != __name__.split('.')[0]:
        return fn
    return timm_register_model(fn)


def register_pan(name: str, create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register a family's backbone with its neck, which needs no function of its own.

    Args:
        name: The model's, which ends in ``_pan``; the module of ``create`` assigns the result to a variable called so.
        create: The family's function that takes a name, ``pretrained`` and what ``timm.create_model`` passes on.

    Returns:
        The entrypoint.
    """
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = create.__module__
    entrypoint.__doc__ = f'``{name.removesuffix("_pan")}`` and the neck of its detector: maps of one pyramid.'
    return register_model(entrypoint)


def _check_out_indices(variant: str, out_indices: Union[int, Sequence[int]], num_levels: int) -> Tuple[int, ...]:
    allowed = f'{variant} has the levels 0 to {num_levels - 1}, or {-num_levels} to -1 from the end'
    if isinstance(out_indices, int):
        if not 1 <= out_indices <= num_levels:
            raise ValueError(f'out_indices={out_indices} takes the last {out_indices} levels, but {allowed}.')
        return tuple(range(num_levels - out_indices, num_levels))
    for index in out_indices:
        if not -num_levels <= index < num_levels:
            raise ValueError(f'out_indices={tuple(out_indices)}: {index} is out of range, {allowed}.')
    absolute = [index % num_levels for index in out_indices]
    if not absolute or len(set(absolute)) < len(absolute):
        raise ValueError(f'out_indices={tuple(out_indices)} must name at least one level, and none twice; {allowed}.')
    # timm's extractors give the maps in the network's order whatever the order of the indices, but report the
    # channels in the order of the indices: sorted, both agree.
    return tuple(sorted(absolute))


def _cached_from_hub(weights: PretrainedCfg, cache_dir: Optional[Union[str, Path]]) -> Optional[Path]:
    """The file of weights in the Hub's cache, where the Hub's client stores it under its hash."""
    repo_id, _, revision = (weights.hf_hub_id or '').partition('@')
    names = [weights.hf_hub_filename] if weights.hf_hub_filename else ['model.safetensors', 'pytorch_model.bin']
    for name in names:
        path = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision or None)
        if isinstance(path, str):
            return Path(path).resolve()
    return None


@contextlib.contextmanager
def _checked_download(variant: str, kwargs: Dict[str, Any]) -> Iterator[None]:
    """Check the hash of weights that timm downloads from the Hub within the block, which the Hub's client does not do.

    Args:
        variant: Name of the entrypoint.
        kwargs: What ``timm.create_model`` passes on.

    Raises:
        RuntimeError: If the file is damaged; it is removed, so that the next attempt downloads it again.
    """
    weights = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    cache_dir = kwargs.get('cache_dir')
    if weights.source == 'local-dir' or weights.file or weights.state_dict or not weights.hf_hub_id:
        yield
        return
    before = _cached_from_hub(weights, cache_dir)
    try:
        yield
    finally:
        path = _cached_from_hub(weights, cache_dir)
        if path is not None and path != before and re.fullmatch('[0-9a-f]{64}', path.name):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest != path.name:
                path.unlink(missing_ok=True)
                raise RuntimeError(
                    f'{weights.hf_hub_id}: the weights received are damaged, their SHA-256 is {digest} and not '
                    f'{path.name}. The file was removed; try again.'
                )


def _take_source(variant: str, kwargs: Dict[str, Any]) -> Tuple[Union[Contents, Path, None], bool]:
    """Take the file or state dict that weights come from out of what timm gets, which asks :func:`_filter` for them.

    timm would read files by itself, and copy every tensor of a state dict. Also returns whether it was fetched.
    """
    overlay = dict(kwargs.get('pretrained_cfg_overlay') or {})
    weights = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    if weights.source:
        return None, False
    source: Union[Contents, Path, None] = weights.state_dict or (Path(weights.file) if weights.file else None)
    fetched = None if source else _fetch(variant, weights, kwargs.get('cache_dir'))
    if not source and not fetched:
        return None, False
    kwargs['pretrained_cfg_overlay'] = {**overlay, 'file': None, 'state_dict': {'': None}}
    return source or fetched, bool(fetched)


def _fetch(variant: str, weights: PretrainedCfg, cache_dir: Optional[Union[str, Path]]) -> Optional[Path]:
    """Get the file of a config that timm would download, or None if timm is to do it.

    Raises:
        CheckpointError: If files of its kind cannot be read here.
        DownloadError: If no place has it.
    """
    name = f'{variant}.{weights.tag}'
    registered, info = get_pretrained_cfg(name, allow_unregistered=True) if weights.tag else None, WEIGHTS.get(name)
    if info is not None and registered is not None and all(
            getattr(weights, k) == getattr(registered, k) for k in ('url', 'hf_hub_id', 'hf_hub_filename')):
        check_reader(info.sources[0].filename)
        return sources.fetch(name, info.sources, info.terms.label, cache_dir, _check_container)
    if isinstance(weights.url, str) and weights.url and not weights.hf_hub_id:  # the caller's own
        places = [Source(url=weights.url)]
        return sources.fetch(variant, places, weights.license or 'unknown', cache_dir, _check_container)
    return None


def _check_container(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    if checkpoint is not None:
        checkpoint.close()


def _filter(
        source: Union[Contents, Path, None],
        kwargs: Dict[str, Any],
        state_dict: StateDict,
        model: CspBackbone,
) -> StateDict:
    """What the model takes from the source of its weights, or from what timm has read.

    timm drops the classifier where the config tells of another number of classes than the model has; here the source
    itself is asked.
    """
    cfg: Dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    told, asked = cfg.get('num_classes', 0), model.num_classes
    is_new = told < 0 or ('num_classes' in kwargs and asked != told)  # timm's train.py has -1
    needed = bool(asked) and not kwargs.get('features_only') and not is_new
    found = fit_to(
        state_dict if source is None else source, model, kwargs.get('pretrained_strict', True), needed, max(told, 0),
        (cfg.get('input_size') or (3,))[0])
    keeps = bool(asked) and told >= 0 and found.has_classifier
    if keeps:
        cfg['num_classes'] = asked
    return fitted(found, model, keeps)


def build_backbone(variant: str, pretrained: bool, cfg: BackboneCfg, **kwargs: Any) -> CspBackbone:
    """Build a registered variant the way timm builds its own.

    Args:
        variant: Name of the entrypoint.
        pretrained: Load the weights of the pretrained config.
        cfg: The network.
        **kwargs: What ``timm.create_model`` passes on, for timm's builder and for :class:`CspBackbone`.

    Returns:
        The model, or timm's feature extractor around it if ``features_only``.

    Raises:
        ValueError: If ``out_indices`` names a level that does not exist.
        CheckpointError: If a foreign file is damaged or holds another network.
        DownloadError: If ``pretrained`` and no place has the weights, or they have to be fetched by hand.
        TypeError: If an argument is unknown.
    """
    num_levels = len(cfg.levels)
    if kwargs.get('features_only') and kwargs.get('out_indices') is not None:
        kwargs['out_indices'] = _check_out_indices(variant, kwargs['out_indices'], num_levels)
    if kwargs.get('features_only'):
        kwargs['feature_cls'] = extractor(kwargs.get('feature_cls', 'list'), has_neck=cfg.neck is not None)
    named = pretrained and _names_its_weights(kwargs.get('pretrained_cfg_overlay') or {})
    source, is_fetched = _take_source(variant, kwargs) if pretrained else (None, False)
    download = _checked_download(variant, kwargs) if pretrained else contextlib.nullcontext()
    try:
        with download, opened(source) as contents:
            model: Any = build_model_with_cfg(
                CspBackbone,
                variant,
                pretrained,
                model_cfg=cfg,
                feature_cfg=dict(out_indices=tuple(range(num_levels))),
                pretrained_filter_fn=functools.partial(_filter, contents, dict(kwargs)),
                **kwargs,
            )
    except CheckpointError as error:
        if is_fetched:
            raise CheckpointError(f'{error} If this is not the released file, remove it.') from error
        raise
    # What was read is loaded: in the config it would be kept in memory, and could not be written as JSON.
    model.pretrained_cfg.pop('state_dict', None)
    model.pretrained = named
    return model


def _names_its_weights(overlay: Dict[str, Any]) -> bool:
    """Whether the pretrained config still says where the weights come from, and not a file of the caller's."""
    return 'license' in overlay or not any(overlay.get(k) for k in ('file', 'url', 'state_dict', 'hf_hub_id'))
