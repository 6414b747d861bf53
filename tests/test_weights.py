"""Weights as data: every tag says what it is, where its file lies and who states its licence."""
import ast
import functools
import inspect
import re
from pathlib import Path

import pytest
import timm
from timm.models import get_pretrained_cfg

from cspnet_timm import families
from cspnet_timm.families import WEIGHTS
from cspnet_timm.families._weights import CLASSIFICATION, DETECTION, KEYPOINTS, ROTATED, SEGMENTATION
from cspnet_timm.sources import Source
from tests.zoo import ALL

HUB_LICENSES = {'apache-2.0', 'mit', 'agpl-3.0', 'gpl-3.0', 'bsd-3-clause', 'unlicense', 'other', 'unknown'}
TASKS = {CLASSIFICATION, DETECTION, KEYPOINTS, ROTATED, SEGMENTATION}
METRICS = {'top1', 'top5', 'ap', 'ap50', 'mask_ap', 'keypoint_ap', 'wholebody_ap', 'pck', 'nme', 'size'}
FAMILIES = Path(inspect.getfile(families)).parent


@functools.cache
def tags():
    return [f'{name}.{get_tag}' for name in ALL for get_tag in _tags(name)]


def _tags(name):
    return [full.partition('.')[2] for full in timm.models.get_arch_pretrained_cfgs(name)]


def test_every_tag_has_an_entry_or_is_untrained():
    for name in tags():
        assert (name in WEIGHTS) != name.endswith('.untrained'), name
    assert set(WEIGHTS) <= set(tags())


def test_every_entry_is_complete():
    """One walk over all of them, since there are hundreds."""
    for name, info in WEIGHTS.items():
        cfg = get_pretrained_cfg(name)
        assert (cfg.architecture, cfg.tag) == tuple(name.split('.', 1)), name
        assert info.data and info.source and info.task in TASKS, name
        assert set(info.metrics) <= METRICS and all(0 < v < 2000 for v in info.metrics.values()), name
        assert all(v <= 100 for k, v in info.metrics.items() if k != 'size'), name
        assert bool(info.metrics) == bool(info.metrics_source), name
        assert not cfg.num_classes or info.task == CLASSIFICATION, name
        assert 'top1' not in info.metrics or cfg.num_classes == 1000, name
        assert cfg.pool_size == tuple(-(-side // 32) for side in cfg.input_size[1:]) or '_p6' in name, name


def test_a_models_default_are_its_weights_for_classification():
    """Where it has any: general features, and a classifier, are what a name without a tag promises."""
    for name in ALL:
        found = [tag for tag in tags() if tag.startswith(f'{name}.') and tag in WEIGHTS]
        if any(WEIGHTS[tag].task == CLASSIFICATION and 'top1' in WEIGHTS[tag].metrics for tag in found):
            cfg = get_pretrained_cfg(name)
            assert WEIGHTS[f'{name}.{cfg.tag}'].task == CLASSIFICATION, f'{name} means {cfg.tag}'


def test_every_licence_is_the_hubs_and_somebody_states_it():
    for name, info in WEIGHTS.items():
        terms = info.terms
        assert terms.id in HUB_LICENSES and terms.id == info.license == get_pretrained_cfg(name).license, name
        assert terms.stated_by and terms.link.startswith('https://'), name
        # What the Hub calls other has a name and a link to its text; everything else has neither.
        assert bool(terms.name) == (terms.id == 'other') and terms.name == terms.name.lower(), name
        assert terms.label.startswith(terms.id)
        assert set(terms.card) == ({'license', 'license_name', 'license_link'} if terms.name else {'license'}), name


def test_every_entry_has_a_source():
    files = {}
    for name, info in WEIGHTS.items():
        assert info.sources, name
        cfg = get_pretrained_cfg(name)
        assert bool(cfg.has_weights) is bool(info.downloads), name
        assert bool(cfg.origin_url) is any(source.manual for source in info.sources), name
        for source in info.sources:
            assert source.filename and re.fullmatch(r'[\w.+-]+', source.filename), name
            assert source.link.startswith('https://'), name
            assert re.fullmatch('[0-9a-f]{0,64}', source.sha256), name
            # One name is one file: a folder of released files holds them side by side.
            if source.url and not source.url.startswith('https://pjreddie.com'):
                assert files.setdefault(source.filename, source.url) == source.url, name
        if info.license == 'agpl-3.0':
            assert not info.downloads, f'{name}: what is under the AGPL is never downloaded'


def test_hashes_are_taken_from_names():
    assert Source(url='https://x.org/a/cspnext-m_in1k-ecb3bbd9.pth').sha256 == 'ecb3bbd9'
    assert Source(url='https://x.org/rtmpose-m_simcc-256x192-63eb25f7_20230126.pth').sha256 == '63eb25f7'
    assert Source(url='https://x.org/rtmw-dw-x-l_simcc-cocktail14_270e-256x192-20231122.pth').sha256 == ''
    assert Source(url='https://x.org/rtmpose-m_simcc-hand5_210e-256x256-74fb594_20230320.pth').sha256 == '74fb594'
    assert Source(url='https://x.org/yolox_s.pth').sha256 == ''


@pytest.mark.parametrize('kwargs', [dict(), dict(url='https://x.org/a.pth', repo_id='a/b')])
def test_a_source_is_one_place(kwargs):
    with pytest.raises(ValueError, match='either an address or a repository'):
        Source(**kwargs)


def test_every_key_is_found_by_grep():
    written = set()
    for path in FAMILIES.glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'describe_weights':
                entries, keys = node.args[0], []
                if isinstance(entries, ast.Call):  # with_pan, whose second argument names what it adds
                    keys = entries.args[1].elts
                    entries = entries.args[0]
                keys = [*entries.keys, *keys]
                assert all(isinstance(key, ast.Constant) for key in keys), f'{path.name}: a key is computed'
                assert len({key.value for key in keys}) == len(keys), f'{path.name}: a key is there twice'
                written.update(key.value.rstrip('*') for key in keys)
    assert written == set(tags())


def test_every_detectors_file_has_its_neck():
    """Where the model with a neck is registered, but for detectors that have another one."""
    lacking = {
        name for name, info in WEIGHTS.items()
        if info.task in (DETECTION, ROTATED, SEGMENTATION) and f'{name.partition(".")[0]}_pan' in ALL
        and name.replace('.', '_pan.', 1) not in WEIGHTS
    }
    assert all('_sod' in name or '_p2' in name for name in lacking), lacking
