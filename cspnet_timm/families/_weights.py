"""Weights as data: what each tag was trained on, by whom, where its file lies, and under which licence.

A family's file lists its tags in ``default_cfgs``, each under a key that is written out, so that it is found by
searching for it. :func:`describe_weights` makes timm's default configs of the entries, and keeps what timm has no field
for in :data:`WEIGHTS`.
"""
from dataclasses import dataclass
from typing import Any, Dict, Sequence, Tuple, Union

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, generate_default_cfgs

from ..sources import Source

__all__ = [
    'CLASSIFICATION', 'DETECTION', 'IN1K', 'KEYPOINTS', 'License', 'ROTATED', 'SEGMENTATION', 'WEIGHTS', 'WeightsInfo',
    'by_hand', 'default_cfg', 'describe_weights', 'hub', 'web', 'with_pan',
]

IN1K = 'ImageNet-1k'

CLASSIFICATION = 'classification'
DETECTION = 'detection'
SEGMENTATION = 'instance segmentation'
KEYPOINTS = 'keypoints'
ROTATED = 'rotated detection'


@dataclass(frozen=True)
class License:
    """Under which licence weights are, and who says so.

    Attributes:
        id: The Hub's identifier: ``'apache-2.0'``, ``'agpl-3.0'``, ``'other'``, or ``'unknown'`` where nobody says.
        stated_by: Who states it, and of what: the repository's licence file says nothing of a file beside it.
        link: Where it is stated.
        name: The licence's name where the identifier is ``'other'``, the Hub's ``license_name``; its ``license_link``
            is ``link`` then.
    """

    id: str
    stated_by: str
    link: str
    name: str = ''

    @property
    def label(self) -> str:
        """The identifier, with the name where it says nothing by itself: ``'other (darknet)'``."""
        return f'{self.id} ({self.name})' if self.name else self.id

    @property
    def card(self) -> Dict[str, str]:
        """Entries of a model card's metadata on the Hub."""
        return dict(license=self.id, **(dict(license_name=self.name, license_link=self.link) if self.name else {}))


@dataclass(frozen=True)
class WeightsInfo:
    """Where a set of weights comes from, beyond what timm's ``PretrainedCfg`` records.

    Attributes:
        data: What they were trained on.
        task: What for: ``'classification'``, ``'detection'``, ``'keypoints'``, ….
        source: Who trained and published them, and where.
        terms: Their licence, and who states it.
        metrics: Published figures, e.g. ``{'top1': 77.9, 'size': 256}``; accuracies in percent, the size in pixels.
        metrics_source: Where the figures are published.
        sources: Where the file is to be had, in the order in which the places are tried.
    """

    data: str
    task: str
    source: str
    terms: License
    metrics: Dict[str, float]
    metrics_source: str = ''
    sources: Tuple[Source, ...] = ()

    @property
    def license(self) -> str:
        """The Hub's identifier of the licence."""
        return self.terms.id

    @property
    def downloads(self) -> Tuple[Source, ...]:
        """The sources that are downloaded from; the others are for a person with a browser."""
        return tuple(source for source in self.sources if not source.manual)


WEIGHTS: Dict[str, WeightsInfo] = {}  # by 'architecture.tag', every set of weights of the package


def hub(repo_id: str, filename: str = 'model.safetensors', **kwargs: Any) -> Source:
    """A file of a repository on the Hugging Face Hub; its hash is the Hub's to tell."""
    return Source(repo_id=repo_id, filename=filename, **kwargs)


def web(url: str, **kwargs: Any) -> Source:
    """A file at an address."""
    return Source(url=url, **kwargs)


def by_hand(url: str, **kwargs: Any) -> Source:
    """A file that is not downloaded, because its licence or its host does not allow it: the user brings it."""
    return Source(url=url, manual=True, **kwargs)


def default_cfg(**kwargs: Any) -> Dict[str, Any]:
    """timm's default config of an ImageNet classifier of this package, with the given entries replaced."""
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7), 'crop_pct': 0.875,
        'interpolation': 'bicubic', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv', 'classifier': 'head.fc', 'license': 'apache-2.0',
        'paper_ids': 'arXiv:1911.11929',
        'paper_name': 'CSPNet: A New Backbone that can Enhance Learning Capability of CNN',
        **kwargs,
    }


def _timm_fields(sources: Sequence[Source]) -> Dict[str, Any]:
    """timm has a field for one source of each kind: the first."""
    fields: Dict[str, Any] = {}
    for source in sources:
        if source.manual:
            fields.setdefault('origin_url', source.url)
        elif source.repo_id:
            fields.setdefault('hf_hub_id', source.repo_id)
            if fields['hf_hub_id'] == source.repo_id and source.filename != 'model.safetensors':
                fields.setdefault('hf_hub_filename', source.filename)
        else:
            fields.setdefault('url', source.url)
    return fields


def with_pan(cfgs: Dict[str, Dict[str, Any]], names: Sequence[str]) -> Dict[str, Dict[str, Any]]:
    """Add the configs of the networks with a neck: the detectors' files hold both, so they are the same.

    Args:
        cfgs: Config by 'architecture.tag', as :func:`describe_weights` takes it.
        names: 'architecture_pan.tag' of each that has the file of 'architecture.tag', written out to be found by grep.

    Returns:
        The same, and the configs by these names.

    Raises:
        ValueError: If there is no such file.
    """
    wrong = [name for name in names if '_pan.' not in name or name.replace('_pan.', '.', 1) not in cfgs]
    if wrong or len(set(names)) < len(names):
        raise ValueError(f'{wrong or names}: each is to be a model in _pan with a tag of the model without, once.')
    return {**cfgs, **{name: cfgs[name.replace('_pan.', '.', 1)] for name in names}}


def describe_weights(cfgs: Dict[str, Dict[str, Any]]) -> Dict[str, Any]:
    """Make timm's default configs, and note in :data:`WEIGHTS` what timm has no field for.

    Args:
        cfgs: Config by 'architecture.tag'. Of an entry with weights, ``license`` is a :class:`License`, ``sources`` a
            sequence of :func:`hub`, :func:`web` and :func:`by_hand` in the order in which they are tried, and ``info``
            holds the other fields of :class:`WeightsInfo`.

    Returns:
        What timm's ``generate_default_cfgs`` makes of them.
    """
    plain: Dict[str, Union[Dict[str, Any], PretrainedCfg]] = {}
    for name, cfg in cfgs.items():
        cfg = dict(cfg)
        info, sources = cfg.pop('info', None), tuple(cfg.pop('sources', ()))
        if info is not None:
            terms = cfg['license']
            cfg.update(license=terms.id, **_timm_fields(sources))
            WEIGHTS[name.rstrip('*')] = WeightsInfo(terms=terms, sources=sources, **info)
        plain[name] = cfg
    return generate_default_cfgs(plain)
