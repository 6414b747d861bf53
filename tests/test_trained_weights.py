"""A YOLOv8n that somebody trained, from the file in their package: read, converted, and its error in int8.

The wheel is downloaded (46 MB), the weights in it are licensed under AGPL-3.0: nothing of it is kept.
"""
import importlib
import importlib.util
import json
import pickle
import re
import sys
from pathlib import Path

import pytest
import timm
import torch

from cspnet_timm import cli
from cspnet_timm.deployment import native

from .conftest import ALLOWED_SKIPS

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def int8():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module('int8')
    sys.path.remove(str(BENCHMARKS))
    for name in ('int8', 'paper'):
        sys.modules.pop(name, None)


@pytest.fixture(scope='module')
def files(int8, tmp_path_factory):
    """The trained weights, and an image of the kind that they were trained on."""
    try:
        return int8.fetch(tmp_path_factory.mktemp('wheel'))
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture
def nothing_is_executed(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError('a pickle was executed')

    for name in ('load', 'loads', 'Unpickler'):
        monkeypatch.setattr(pickle, name, refused)
    monkeypatch.setattr(torch, 'load', refused)


def trained(path, name='cspnet_yolov8n', **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs).eval()


@pytest.mark.usefixtures('nothing_is_executed')
def test_inspect(files, capsys):
    cli.main(['inspect', str(files[0])])
    text = capsys.readouterr().out
    assert 'cspnet_yolov8n' in text and 'cspnet_yolov8n_pan' in text and 'Ultralytics' in text
    assert 'cspnet_yolov8s' not in text


@pytest.mark.usefixtures('nothing_is_executed')
@torch.no_grad()
def test_convert_and_features(files, tmp_path):
    x = torch.rand(2, 3, 64, 96)
    maps = trained(files[0], features_only=True)
    expected = maps(x)
    assert [tuple(y.shape) for y in expected] == [
        (2, c, 64 // s, 96 // s) for c, s in zip(maps.feature_info.channels(), (2, 4, 8, 16, 32))]
    untrained = timm.create_model('cspnet_yolov8n', features_only=True).eval()
    assert all((a - b).norm() > 0.1 * b.norm() for a, b in zip(untrained(x), expected))
    some = trained(files[0], features_only=True, out_indices=(1, -1))(x)
    assert torch.equal(some[0], expected[1]) and torch.equal(some[1], expected[-1])

    folder = tmp_path / 'converted'
    cli.main(['convert', str(files[0]), '--out', str(folder)])
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'cspnet_yolov8n' and 'agpl' in (folder / 'README.md').read_text().lower()
    again = timm.create_model(f'local-dir:{folder}', pretrained=True, features_only=True).eval()
    for a, b in zip(again(x), expected):
        assert torch.equal(a, b)


@pytest.mark.usefixtures('nothing_is_executed')
@torch.no_grad()
def test_neck(files):
    pyramid = trained(files[0], 'cspnet_yolov8n_pan', features_only=True)
    maps = pyramid(torch.rand(1, 3, 64, 64))
    assert all(bool(y.isfinite().all()) and float(y.std()) > 0 for y in maps)


def test_int8(int8, files, tmp_path, monkeypatch, capsys):
    """The error that the package promises for trained weights, on images that nothing was fitted to."""
    if (why_not := native.unavailable()) is not None:
        pytest.skip(why_not)
    monkeypatch.setattr(int8, 'fetch', lambda folder, wheel: files)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *more: None if name == 'nncf' else find(name, *more))
    int8.main(['--seen', '16', '--compared', '8', '--rounds', '3', '--out', str(tmp_path)])
    report = json.loads((tmp_path / 'int8.json').read_text())
    rows = {row['name']: row['difference'] for row in report['rows']}
    own, before = rows[int8.OWN], rows[int8.BEFORE]
    assert max(own) <= 0.05 and all(a < b for a, b in zip(own, before)) and own[-1] < 0.8 * before[-1]
    page = (tmp_path / 'int8.md').read_text()
    assert page in capsys.readouterr().out and report['machine']['device'] in page and report['date'] in page
    assert 'Without NNCF\'s rows: nncf is not installed: pip install nncf.' in page
    for row in report['rows']:
        assert f'| {row["name"]} | {row["difference"][0]:.3f} |' in page


def test_the_wheel_may_not_be_there(int8, tmp_path, monkeypatch):
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
    monkeypatch.setenv('PIP_EXTRA_INDEX_URL', '')
    monkeypatch.setenv('PIP_FIND_LINKS', '')
    monkeypatch.setenv('PIP_RETRIES', '0')
    monkeypatch.setenv('PIP_NO_CACHE_DIR', '1')
    with pytest.raises(OSError) as error:
        int8.fetch(tmp_path)
    assert any(re.fullmatch(allowed, str(error.value)) for allowed in ALLOWED_SKIPS)
