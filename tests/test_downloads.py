"""``cspnet-timm download`` and ``verify``, and the script that checks links."""
import csv
import hashlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from cspnet_timm import sources
from cspnet_timm.cli import main
from cspnet_timm.downloads import select
from cspnet_timm.families import WEIGHTS
from cspnet_timm.sources import Source
from tests.test_sources import web  # noqa: F401  a fixture
from tests.zoo import same_weights

NAME, OTHER = 'cspnet_rtmdet_tiny.coco', 'cspnet_rtmdet_tiny.udp_aic_coco'


@pytest.fixture
def released(web, tmp_path, monkeypatch):  # noqa: F811
    """Two sets of weights on a host, the first of them behind one that fails."""
    model = timm.create_model('cspnet_rtmdet_tiny', num_classes=0)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'file')
    data = (tmp_path / 'file').read_bytes()
    digest = hashlib.sha256(data).hexdigest()[:8]
    for name, hows in ((NAME, ('refuses', 'cut')), (OTHER, ('good',))):
        file = f'{name.partition(".")[2]}-{digest}.pth'
        web.files[file] = data
        places = tuple(Source(url=f'{web.url}/{how}/{file}') for how in hows)
        monkeypatch.setitem(WEIGHTS, name, replace(WEIGHTS[name], sources=places))
    return web, model, digest


def test_what_a_pattern_means():
    assert select('cspnet_yolox_nano') == [n for n in sorted(WEIGHTS) if n.startswith('cspnet_yolox_nano')]
    assert NAME in select('cspnet_rtmdet*') and NAME in select('rtmdet_tiny*') and NAME in select('*.coco')
    assert select(NAME) == [NAME] and select('no such') == []
    assert select('*') == sorted(WEIGHTS)


def test_download_and_verify(released, tmp_path, monkeypatch, capsys):
    web, model, digest = released  # noqa: F811
    folder = tmp_path / 'new' / 'folder'
    for pattern in (NAME, OTHER):
        assert main(['download', '--filter', pattern, '--out', str(folder)]) == 0
    files = sorted(path.name for path in folder.iterdir())
    assert files == ['SHA256SUMS', f'coco-{digest}.pth', 'licenses.csv', f'udp_aic_coco-{digest}.pth']
    with (folder / 'licenses.csv').open() as file:
        rows = {row['weights']: row for row in csv.DictReader(file)}
    assert rows[NAME]['license'] == 'apache-2.0' and rows[NAME]['stated_by'] == WEIGHTS[NAME].terms.stated_by
    assert rows[OTHER]['file'] == f'udp_aic_coco-{digest}.pth' and rows[OTHER]['license_link']
    assert main(['verify', str(folder)]) == 0

    # What is there is kept, and what is damaged is not.
    before = len(web.requests)
    assert main(['download', '--filter', NAME, '--out', str(folder)]) == 0 and len(web.requests) == before
    (folder / f'coco-{digest}.pth').write_bytes(b'damaged')
    capsys.readouterr()
    assert main(['verify', str(folder)]) == 1
    assert f'coco-{digest}.pth: changed' in capsys.readouterr().out
    assert main(['download', '--filter', NAME, '--out', str(folder)]) == 0 and len(web.requests) > before
    assert main(['verify', str(folder)]) == 0
    (folder / f'coco-{digest}.pth').unlink()
    assert main(['verify', str(folder)]) == 1
    assert f'coco-{digest}.pth: missing' in capsys.readouterr().out

    # The folder serves a machine without a network.
    assert main(['download', '--filter', NAME, '--out', str(folder)]) == 0
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv(sources.FOLDER_VARIABLE, str(folder))
    loaded = timm.create_model(NAME, pretrained=True, num_classes=0)
    assert same_weights(model, loaded)


def test_download_converted(released, tmp_path, monkeypatch):
    _, model, _ = released
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    folder = tmp_path / 'folder'
    for _ in range(2):
        assert main(['download', '--filter', OTHER, '--out', str(folder), '--converted']) == 0
    assert sorted(path.name for path in folder.iterdir()) == ['SHA256SUMS', f'{OTHER}.safetensors', 'licenses.csv']
    assert main(['verify', str(folder)]) == 0
    monkeypatch.setenv(sources.FOLDER_VARIABLE, str(folder))
    loaded = timm.create_model(OTHER, pretrained=True, cache_dir=tmp_path / 'empty')
    # As the network takes it: a pose's network takes RGB as the file's does.
    assert same_weights(model, loaded)


def test_what_is_not_downloaded_is_said(web, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sources, 'open_url', lambda *args, **kwargs: pytest.fail('a host was asked'))
    assert main(['download', '--filter', 'cspnet_yolov8n', '--out', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert 'not downloaded, under agpl-3.0: https://github.com/ultralytics/' in out
    assert f'0 of {len(select("cspnet_yolov8n"))} are in' in out and not list(tmp_path.iterdir())
    assert main(['download', '--filter', 'cspnet_darknet53.in1k', '--out', str(tmp_path)]) == 0
    assert 'to be fetched with a browser: https://drive.google.com/' in capsys.readouterr().out


def test_download_says_what_failed(web, tmp_path, capsys, monkeypatch):  # noqa: F811
    place = Source(url=f'{web.url}/broken/net.pth')
    monkeypatch.setitem(WEIGHTS, NAME, replace(WEIGHTS[NAME], sources=(place,)))
    assert main(['download', '--filter', NAME, '--out', str(tmp_path)]) == 1
    assert f'- {place.url}: answers 503' in capsys.readouterr().out


@pytest.mark.parametrize('argv, reason', [
    (['download', '--filter', 'nothing', '--out', '{tmp}'], "no weights match 'nothing'"),
    (['download', '--filter', 'yolox_nano', '--out', '{tmp}/file'], 'File exists'),
    (['verify', '{tmp}/none'], 'there is no such folder'),
    (['verify', '{tmp}/empty'], 'has neither SHA256SUMS nor a file'),
    (['verify', '{tmp}/sums'], 'is no SHA-256 and name of a file here'),
    (['verify', '{tmp}/escape'], 'is no SHA-256 and name of a file here'),
])
def test_bad_input_is_one_line(argv, reason, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    for name, text in (('empty', None), ('sums', 'nonsense'), ('escape', f'{"0" * 64}  ../secret')):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / 'SHA256SUMS').write_text(text)
    assert main([word.format(tmp=tmp_path) for word in argv]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.startswith('cspnet-timm: ') and error.count('\n') == 1


# The links

@pytest.fixture(scope='module')
def links():
    path = Path(__file__).parents[1] / '.ci' / 'links.py'
    spec = importlib.util.spec_from_file_location('links', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('how, state, detail', [
    ('good', 'ok', ''),
    ('refuses', 'dead', 'answers 403'),
    ('broken', 'dead', 'answers 503'),
    ('silent', 'dead', 'no answer'),
    ('page', 'dead', 'a page for a browser'),
    ('loop', 'dead', 'redirects 8 times'),
    ('for_good', 'moved', 'for good, to '),
    ('redirect', 'ok', ''),
    ('other', 'changed', 'its size is 20004 and not 20000'),
])
def test_links(links, web, how, state, detail):  # noqa: F811
    web.elsewhere = web.url
    first = links.check_link(Source(url=f'{web.url}/good/net.pth'))
    assert first.state == 'ok' and first.seen == {'size': 20000, 'tag': '20000'}
    answer = links.check_link(Source(url=f'{web.url}/{how}/net.pth'), first.seen)
    assert answer.state == state and answer.detail.startswith(detail)


def test_a_link_whose_file_has_another_size_or_version(links, web):  # noqa: F811
    place = Source(url=f'{web.url}/good/net.pth', size=5)
    assert links.check_link(place).detail == 'its size is 20000 and not 5'
    place = Source(url=f'{web.url}/good/net.pth')
    assert links.check_link(place, {'size': 20000, 'tag': 'other'}).detail == 'its version is 20000 and not other'
    page = Source(url=f'{web.url}/page/net.pth', manual=True, filename='net.pth')
    assert links.check_link(page).state == 'ok'  # where a browser has to go


def test_every_link_is_asked(links, monkeypatch, capsys, tmp_path):
    asked = []

    def check(source, known):
        asked.append(source.link)
        return links.Answer('dead' if 'darknet53.w' in source.link else 'ok', 'gone', {'size': 1, 'tag': ''})

    monkeypatch.setattr(links, 'check_link', check)
    monkeypatch.setattr('sys.argv', ['links.py', '--attempts', '1', '--known', str(tmp_path / 'known.json')])
    assert links.main() == 1
    assert sorted(asked) == sorted({s.link for info in WEIGHTS.values() for s in info.sources})
    out = capsys.readouterr().out
    assert 'dead: https://data.pjreddie.com/files/darknet53.weights (cspnet_plain_darknet53.in1k): gone' in out
    assert '0 moved, 0 changed, 2 dead' in out and 'darknet53.w' not in (tmp_path / 'known.json').read_text()
