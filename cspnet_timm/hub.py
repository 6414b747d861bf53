"""Models to a folder or to the Hugging Face Hub, with the model card that timm leaves out.

Everything is saved and loaded by timm: what :func:`save` and :func:`push` write, ``timm.create_model`` reads by
``'local-dir:folder'`` and ``'hf-hub:user/name'`` wherever this package is installed. They add a card that says what the
model is, what it was trained on, under which licence its weights are and how to load it; and they refuse, before
anything is written or sent, what could not be loaded again.
"""
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import torch
import torch.nn as nn
from huggingface_hub import CommitInfo
from timm import create_model
from timm.models import get_model_args, is_model, model_entrypoint, push_to_hf_hub, save_for_hf
from timm.models._hub import generate_readme
from timm.utils import unwrap_model

from .backbone import CspBackbone, Fitted
from .checkpoints.description import sorted_labels
from .families._builder import WEIGHTS, WeightsInfo
from .files import replaced_folder
from .fitting import fit

__all__ = ['About', 'model_card', 'push', 'save']

LabelNames = Union[Sequence[str], Mapping[int, str]]

_FILES = ('README.md', 'config.json', 'model.safetensors')
_DISTRIBUTION = 'cspnet-timm'
_PACKAGE = __name__.partition('.')[0]
_MAX_LISTED = 20  # class names that the card lists


@dataclass(frozen=True)
class About:
    """What is said of a model in its card and its ``config.json``, beyond what it says of itself.

    :func:`model_card`, :func:`save` and :func:`push` take it whole, or its fields by keyword, which replace those of a
    whole.

    Attributes:
        license: Licence of the weights, by its name on the Hub (``'apache-2.0'``, ``'cc-by-nc-4.0'``, ``'other'``). By
            default that of the pretrained weights that the model was created with; without such it has to be given.
        source: Who trained the weights, or where they come from.
        data: What they were trained on.
        label_names: Name of each class; by default those that the model was loaded with.
        card: Entries of timm's model card (``description``, ``citation``, ``license_link``, …) that replace those
            written here.
        model_config: As timm's ``push_to_hf_hub`` takes it: entries of ``config.json``.
        model_args: Arguments of ``timm.create_model`` that replace those recorded with the model, for those that JSON
            cannot hold: ``{'act_layer': 'relu'}`` for a model that was created with ``act_layer=nn.ReLU``.
    """

    license: Optional[str] = None
    source: Optional[str] = None
    data: Optional[str] = None
    label_names: Optional[LabelNames] = None
    card: Optional[Dict[str, Any]] = None
    model_config: Optional[Dict[str, Any]] = None
    model_args: Optional[Dict[str, Any]] = None


def model_card(model: nn.Module, about: Optional[About] = None, *, name: Optional[str] = None, **fields: Any) -> str:
    """Write the model card, as :func:`save` and :func:`push` do.

    Args:
        model: A model of this package.
        about: What the card says.
        name: The repository, ``'user/name'``; None for a folder.
        **fields: Those of :class:`About`, by keyword.

    Returns:
        The card in Markdown.

    Raises:
        TypeError: If the model is none of this package, or a feature extractor; if a keyword is unknown.
        ValueError: If the licence is not known, the labels do not fit, or the model could not be loaded again.
    """
    export = _prepare(model, about, fields)
    return export.readme(name)


def save(
        model: nn.Module,
        directory: Union[str, Path],
        about: Optional[About] = None,
        *,
        data_config: Optional[Dict[str, Any]] = None,
        overwrite: bool = False,
        **fields: Any,
) -> Path:
    """Save a model to a folder that ``timm.create_model('local-dir:…', pretrained=True)`` loads.

    The folder holds ``model.safetensors``, ``config.json`` and ``README.md``. It appears complete or not at all: it is
    written under another name beside its place, and renamed.

    Args:
        model: A model of this package, classifier or headless, on any device and in any memory format; it stays as
            it is. EMA, ``DistributedDataParallel`` and ``torch.compile`` are unwrapped.
        directory: The folder.
        about: What the card and ``config.json`` say of it.
        data_config: Preprocessing that the model was trained with, where it is not the architecture's.
        overwrite: Replace a model that was saved there before.
        **fields: Those of :class:`About`, by keyword.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder is not empty, and ``overwrite`` is not given or would delete other files.
        TypeError: If the model is none of this package, or a feature extractor; if a keyword is unknown.
        ValueError: If the licence is not known, the labels do not fit, or the model could not be loaded again.
    """
    directory = Path(directory).expanduser().resolve()
    _check_target(directory, overwrite)
    export = _prepare(model, about, fields)
    with replaced_folder(directory, overwrite) as folder:
        save_for_hf(export.model, str(folder), model_config=export.config, model_args=export.args,
                    safe_serialization=True, data_config=data_config)
        (folder / 'README.md').write_text(export.readme(), encoding='utf-8')
    return directory


def push(
        model: nn.Module,
        repo_id: str,
        about: Optional[About] = None,
        *,
        data_config: Optional[Dict[str, Any]] = None,
        private: bool = False,
        token: Optional[str] = None,
        revision: Optional[str] = None,
        create_pr: bool = False,
        commit_message: str = 'Add model',
        **fields: Any,
) -> CommitInfo:
    """Push a model to the Hub, for ``timm.create_model('hf-hub:user/name', pretrained=True)`` to load.

    A thin front over ``timm.models.push_to_hf_hub``: one commit of ``model.safetensors``, ``config.json`` and
    ``README.md``. A card that the repository has already is left as it is.

    Args:
        model: As for :func:`save`.
        repo_id: The repository, ``'user/name'``; it is created if it does not exist.
        about: What the card and ``config.json`` say of it.
        data_config: As for :func:`save`.
        private: Create a repository that only its owner sees.
        token: The owner's token, by default the one that ``hf auth login`` has stored.
        revision: Branch to commit to.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: First line of the commit's message.
        **fields: Those of :class:`About`, by keyword.

    Returns:
        What the Hub says of the commit, its ``oid`` and ``commit_url``.

    Raises:
        TypeError: If the model is none of this package, or a feature extractor; if a keyword is unknown.
        ValueError: If the licence is not known, the labels do not fit, or the model could not be loaded again.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses; nothing has been committed then.
    """
    export = _prepare(model, about, fields)
    return push_to_hf_hub(
        export.model,
        repo_id,
        commit_message=commit_message,
        token=token,
        revision=revision,
        private=private,
        create_pr=create_pr,
        model_config=export.config,
        model_card=export.card(repo_id),
        model_args=export.args,
        task_name=export.task,
        safe_serialization=True,
        data_config=data_config,
    )


@dataclass(frozen=True)
class _Export:
    """A model that has passed every check, and what is said of it."""

    model: CspBackbone  # a copy of its own, its tensors contiguous on the CPU
    architecture: str
    pretrained_cfg: Dict[str, Any]  # what timm knows of the weights, if the model is
    pretrained: bool
    args: Dict[str, Any]  # as config.json holds them
    config: Dict[str, Any]
    about: About  # with a licence, and the labels as a list

    @property
    def task(self) -> str:
        return 'image-classification' if self.model.num_classes else 'image-feature-extraction'

    def readme(self, repo_id: Optional[str] = None) -> str:
        name = repo_id.split('/')[-1] if repo_id else self.architecture
        return generate_readme(self.card(repo_id), name, task_name=self.task)

    def card(self, repo_id: Optional[str]) -> Dict[str, Any]:
        # Not under timm's key 'Dataset': it would go into the card's metadata as well, where the Hub wants the name of
        # a dataset of its own.
        cfg = self.pretrained_cfg
        details: Dict[str, Any] = {'Architecture': self.architecture}
        args = {k: v for k, v in self.args.items() if k not in ('num_classes', 'in_chans', 'global_pool')}
        if args:
            details['Arguments'] = ', '.join(f'`{k}={v!r}`' for k, v in args.items())
        neck: Any = getattr(self.model, 'neck', None)
        if neck is not None:
            maps = self.model.feature_info[-neck.num_levels:]
            strides, chs = (', '.join(str(info[key]) for info in maps) for key in ('reduction', 'num_chs'))
            details['Neck'] = f'the maps at strides {strides} come from behind it, with {chs} channels'
        details['Parameters'] = f'{sum(p.numel() for p in self.model.parameters()):,}'
        details['Input'] = f'{self.model.in_chans} channels, trained and evaluated as `config.json` says'
        if self.model.num_classes:
            details['Classes'] = self._classes()
        else:
            details['Output'] = f'{self.model.head_hidden_size} features, no classifier'
        if self.pretrained:
            details['Pretrained weights'] = self._lineage()
        if self.about.data or not self.pretrained or self.model.num_classes != cfg.get('num_classes'):
            details['Training data'] = self.about.data or 'not stated'
        if self.about.source:
            details['Source'] = self.about.source
        details['License'] = self.about.license
        if cfg.get('paper_name'):
            details['Paper'] = f'{cfg["paper_name"]}, {_paper_urls(cfg.get("paper_ids"))}'.rstrip(', ')
        return {
            **self._license(),
            'tags': [self.task, 'timm', _DISTRIBUTION],
            'description': (
                f'`{self.architecture}`, a Cross Stage Partial (CSP) backbone '
                f'{"with neck " if neck is not None else ""}of `{_DISTRIBUTION}`.'
            ),
            'details': details,
            'usage': self._usage(repo_id),
            **(self.about.card or {}),
        }

    def _license(self) -> Dict[str, str]:
        info = _weights_info(self.pretrained_cfg) if self.pretrained else None
        license = str(self.about.license)
        return info.terms.card if info is not None and info.license == license else {'license': license}

    def _classes(self) -> str:
        if not self.about.label_names:
            return str(self.model.num_classes)
        labels = [str(name) for name in self.about.label_names]
        names = ', '.join(labels[:_MAX_LISTED])
        more = ', …' if len(labels) > _MAX_LISTED else ''
        return f'{self.model.num_classes}: {names}{more} (all in `config.json`)'

    def _lineage(self) -> Dict[str, str]:
        """The weights that the model was created with."""
        cfg = self.pretrained_cfg
        info = _weights_info(cfg)
        lineage = {}
        if info is not None:
            lineage = {
                'Name': f'`{_weights_name(cfg)}`', 'Source': info.source, 'Training data': info.data,
                'License': f'{info.terms.label}, stated by {info.terms.stated_by}: {info.terms.link}',
            }
        else:
            if cfg.get('source') == 'hf-hub':
                repo_id, _, revision = cfg['hf_hub_id'].partition('@')
                lineage['Source'] = f'https://huggingface.co/{repo_id}' + (f'/tree/{revision}' if revision else '')
            elif cfg.get('origin_url'):
                lineage['Source'] = cfg['origin_url']
            if cfg.get('description'):
                lineage['Description'] = cfg['description']
            lineage['License'] = cfg.get('license') or 'not stated'
        return lineage

    def _usage(self, repo_id: Optional[str]) -> str:
        name = f'hf-hub:{repo_id}' if repo_id else 'local-dir:path/to/this/folder'
        module = model_entrypoint(self.architecture).__module__
        foreign = module.partition('.')[0] != _PACKAGE
        imports = f'import {module}  # registers {self.architecture}\n' if foreign else ''
        return (
            f'timm does not have this architecture by itself; the package `{_DISTRIBUTION}` adds it, and must be '
            'installed wherever the model is loaded: `pip install .` in a clone of its repository.\n\n'
            'timm finds it without an import. Where that has been turned off (`CSPNET_TIMM_AUTOLOAD=0`, '
            f'`TORCH_DEVICE_BACKEND_AUTOLOAD=0`), or if timm says `Unknown model`, `import {_PACKAGE}` first.\n\n'
            f'```python\nimport timm\n{imports}\n'
            f'model = timm.create_model({name!r}, pretrained=True).eval()\n'
            'transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))\n\n'
            '# or its feature maps, for detection and segmentation\n'
            f'backbone = timm.create_model({name!r}, pretrained=True, features_only=True)\n```'
        )


def _prepare(model: nn.Module, about: Optional[About], fields: Dict[str, Any]) -> _Export:
    about = replace(about or About(), **fields)
    model = unwrap_model(model)
    if not isinstance(model, CspBackbone):
        raise TypeError(
            f'{type(model).__name__} is no model of this package that can be saved: a classifier or headless model of '
            'timm.create_model is, but not what features_only=True puts around it, whose keys are not the '
            'architecture\'s. Other models of timm: timm.models.push_to_hf_hub.'
        )
    cfg: Dict[str, Any] = getattr(model, 'pretrained_cfg', None) or {}
    pretrained: bool = getattr(model, 'pretrained', False)
    architecture = cfg.get('architecture')
    if not architecture or not is_model(architecture):
        raise ValueError(
            f'architecture {architecture!r} is not registered with timm, and timm loads a model by that name. Register '
            'an entrypoint for it (timm.models.register_model) and create the model by timm.create_model.'
        )
    about = replace(about, license=_check_license(about.license, cfg, pretrained))
    config = dict(about.model_config or {})
    names = _check_label_names(about.label_names, config, cfg, model.num_classes)
    if names is not None:
        config['label_names'] = names
    args = get_model_args(model, {**config.pop('model_args', {}), **(about.model_args or {})})
    for key, value in args.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f'the model was created with {key}={value!r}, which config.json cannot hold: pass what stands for it, '
                f'e.g. model_args={{{key!r}: \'…\'}} with the name that timm knows it by.'
            ) from error

    written: Dict[str, Any] = {'license': about.license}
    described = [
        f'Trained on {about.data}.' if about.data else '', f'Source: {about.source}.' if about.source else '']
    if any(described):
        written['description'] = ' '.join(filter(None, described))
    if not pretrained:
        # The model has none of the weights that the tag stands for, and that the address is of.
        written.update(tag=None, origin_url=None)
    config['pretrained_cfg'] = {**written, **config.get('pretrained_cfg', {})}
    return _Export(
        model=_copy(model, architecture, args),
        architecture=architecture,
        pretrained_cfg=cfg,
        pretrained=pretrained,
        args=args,
        config=config,
        about=replace(about, label_names=names),
    )


def _copy(model: CspBackbone, architecture: str, args: Dict[str, Any]) -> CspBackbone:
    """Build the model anew from what config.json will say, around the tensors of the given one."""
    copy: Any = create_model(architecture, device='meta', **args)
    rebuilt = f'{architecture}({", ".join(f"{k}={v!r}" for k, v in args.items())})'
    why = (
        f'what would be loaded, {rebuilt}, is not this model. It has been changed since it was created (fused by '
        'reparameterize_model, pruned, converted): save it before that, and change it again after loading.'
    )
    given = model.state_dict()
    for key, value in given.items():
        if type(value) not in (torch.Tensor, nn.Parameter) or value.is_meta:
            kind = 'a meta tensor' if value.is_meta else f'a {type(value).__name__}'
            raise ValueError(f'{key} is {kind}, which has no values to save: gather or load the model first.')
    found = fit(given, copy)
    passed_over = [key for key in found.passed_over if not key.endswith('num_batches_tracked')]
    if not found.is_complete or passed_over or found.own_classes != (found.native.num_classes or 0) or (
            found.in_chans is not None and len(set(found.in_chans)) > 1):
        raise ValueError(f'{found.counts() or "another input or classifier"}; {why}')
    # safetensors writes contiguous tensors only, and the caller's may be channels_last.
    tensors = {k: v.detach().cpu().contiguous() for k, v in found.state_dict(copy).items()}
    copy.load_state_dict(Fitted(tensors), assign=True)
    for name in ('pretrained_cfg', 'default_cfg', '_traits'):
        setattr(copy, name, getattr(model, name))
    return copy


def _check_license(license: Optional[str], cfg: Dict[str, Any], pretrained: bool) -> str:
    if license is None:
        info = _weights_info(cfg) if pretrained else None
        license = info.license if info is not None else cfg.get('license') if pretrained else None
        if license in (None, 'unknown'):
            what = 'weights that name no licence' if pretrained else 'no weights that this package knows'
            raise ValueError(
                f'license is missing: {cfg["architecture"]} was created with {what}, so that only you know under which '
                'licence it may be used. Pass its name on the Hub, e.g. license=\'apache-2.0\'.'
            )
    if not re.fullmatch(r'[a-z0-9][a-z0-9.+-]*', license):
        raise ValueError(
            f'license={license!r} is no licence of the Hub, whose names are in lower case and without spaces: '
            '\'apache-2.0\', \'mit\', \'cc-by-nc-4.0\', or \'other\' with card={\'license_name\': …, '
            '\'license_link\': …}.'
        )
    return license


def _check_label_names(
        label_names: Optional[LabelNames],
        config: Dict[str, Any],
        cfg: Dict[str, Any],
        num_classes: int,
) -> Optional[List[str]]:
    names = label_names if label_names is not None else config.get('label_names')
    if names is None:
        names = cfg.get('label_names') if cfg.get('num_classes') == num_classes else None
        if names is None:
            return None
    if isinstance(names, str):
        raise ValueError(f'label_names={names!r} is one string, not a list of one name per class.')
    if isinstance(names, Mapping):
        sorted_names = sorted_labels(names, num_classes)
        if not sorted_names:
            known = sum(1 for index in range(num_classes) if index in names or str(index) in names)
            raise ValueError(
                f'label_names has {known} names of the classes 0 to {num_classes - 1}, and others beside them: it is '
                'to be a list, names by index, or indices by name.'
            )
        names = sorted_names
    names = list(names)
    if len(names) != num_classes:
        raise ValueError(f'label_names has {len(names)} names, but the model has {num_classes} classes.')
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f'label_names must be strings, not {next(n for n in names if not isinstance(n, str))!r}.')
    return names


def _weights_name(cfg: Dict[str, Any]) -> str:
    return f'{cfg.get("architecture")}.{cfg.get("tag")}'


def _weights_info(cfg: Dict[str, Any]) -> Optional[WeightsInfo]:
    """What the package knows of the weights, unless they come from somebody's folder or repository."""
    return None if cfg.get('source') else WEIGHTS.get(_weights_name(cfg))


def _paper_urls(paper_ids: Union[str, Sequence[str], None]) -> str:
    ids = [paper_ids] if isinstance(paper_ids, str) else paper_ids or []
    return ', '.join(f'https://arxiv.org/abs/{i.partition(":")[2]}' for i in ids if i.startswith('arXiv:'))


def _check_target(directory: Path, overwrite: bool) -> None:
    """Accept what is not there, an empty folder, and a model that may be replaced."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise FileExistsError(f'{directory} is a file, a model is saved to a folder.')
    files = sorted(entry.name for entry in directory.iterdir())
    if not files:
        return
    if not overwrite:
        raise FileExistsError(
            f'{directory} is not empty, it holds {files[0]}: pass overwrite=True to replace a saved model.')
    others = [name for name in files if name not in _FILES]
    if others:
        raise FileExistsError(
            f'{directory} holds {others[0]}, which is none of {", ".join(_FILES)}: overwrite=True replaces a saved '
            'model, and would delete it.'
        )
