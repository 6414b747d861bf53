"""Weights from hosts that fail, from folders, and on machines without a network."""
import hashlib
import multiprocessing
import random
import socket
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import cspnet_timm
from cspnet_timm import sources
from cspnet_timm.families import WEIGHTS
from cspnet_timm.sources import DownloadError, Source
from tests.hub_server import Hub
from tests.test_hub import client_environment, environment
from tests.web_server import Web
from tests.zoo import same_weights

NAME = 'cspnet_rtmdet_tiny.rsb_a1_in1k'
DATA = random.Random(0).randbytes(20000)  # the same in every process that collects the tests
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def web(monkeypatch):
    for name in (sources.FOLDER_VARIABLE, 'TRANSFORMERS_OFFLINE'):
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(HF_HUB_OFFLINE='0', NO_PROXY='127.0.0.1,localhost', no_proxy='127.0.0.1,localhost').items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sources, 'ANSWER_SECONDS', 0.5)
    monkeypatch.setattr(sources, 'READ_SECONDS', 0.5)
    with Web() as web:
        web.files['net.pth'] = DATA
        yield web


@pytest.fixture
def down():
    """An address at which nobody listens."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = sock.getsockname()[1]
    return f'http://127.0.0.1:{port}/net.pth'


def source(web, how, **kwargs):
    return Source(url=f'{web.url}/{how}/net.pth', **kwargs)


def fetch(web, tmp_path, *hows, **kwargs):
    return sources.fetch(NAME, [source(web, how, **kwargs) for how in hows], 'apache-2.0', tmp_path, progress=False)


@pytest.mark.parametrize('how', ['good', 'cut', 'no_ranges', 'untagged', 'picky'])
def test_a_file_arrives_whole(web, tmp_path, how):
    path = fetch(web, tmp_path, how, sha256=SHA256)
    assert path.read_bytes() == DATA and sorted(p.suffix for p in tmp_path.iterdir()) in (['.pth'], ['.lock', '.pth'])
    ranges = [headers.get('range') for _, _, headers in web.requests]
    assert ranges == ([None, 'bytes=10000-'] if how in ('cut', 'no_ranges') else [None] * len(ranges))
    assert all(headers['user-agent'].startswith('cspnet-timm') for _, _, headers in web.requests)
    fetch(web, tmp_path, how, sha256=SHA256)
    assert len(web.requests) == len(ranges)  # from the cache


@pytest.mark.parametrize('how, known, reason', [
    ('refuses', {}, 'answers 403'),
    ('broken', {}, 'answers 503'),
    ('missing', {}, 'answers 404'),
    ('silent', {}, 'no answer'),
    ('stalls', {}, 'no answer in time'),
    ('slow', {}, 'too slow'),
    ('page', {}, 'a page for a browser'),
    ('page', dict(sha256=SHA256), 'a page for a browser'),
    ('loop', {}, 'redirect'),
    ('always_cut', {}, 'bytes before the end'),
    ('other', dict(sha256=SHA256), 'the file has the SHA-256'),
    ('other', dict(size=len(DATA)), f'20004 bytes and not {len(DATA)}'),
    ('wrong', dict(sha256=SHA256), 'it is damaged, or another one'),
    ('wrong', dict(sha256=SHA256[:8]), f'and not {SHA256[:8]}'),
])
def test_a_host_that_fails_is_left_for_the_next(web, tmp_path, how, known, reason):
    name = 'gone.pth' if how == 'missing' else 'net.pth'
    failing = Source(url=f'{web.url}/{how}/{name}', **known)
    began = time.monotonic()
    with pytest.raises(DownloadError) as error:
        sources.fetch(NAME, [failing], 'apache-2.0', tmp_path, progress=False)
    assert time.monotonic() - began < 4
    assert f'- {failing.url}: ' in str(error.value) and reason in str(error.value)
    assert not list(tmp_path.glob('[!.]*'))  # nothing under the file's name
    path = sources.fetch(NAME, [failing, source(web, 'good', sha256=SHA256)], 'apache-2.0', tmp_path, progress=False)
    assert path.read_bytes() == DATA


def test_a_host_that_is_down(web, down, tmp_path):
    answers = [Source(url=down), source(web, 'refuses'), Source(url='http://no.such.host.invalid/net.pth')]
    with pytest.raises(DownloadError) as error:
        sources.fetch(NAME, answers, 'apache-2.0', tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == f'The weights of {NAME} could not be downloaded:'
    assert [line.partition(': ')[0] for line in lines[1:4]] == [f'- {place.url}' for place in answers]
    for part in ('apache-2.0', 'net.pth', sources.FOLDER_VARIABLE, 'pretrained_cfg_overlay=dict(file=', NAME,
                 f'cspnet-timm download --filter {NAME}'):
        assert part in '\n'.join(lines[4:])


def test_a_cut_file_goes_on_in_the_next_process(web, tmp_path):
    with pytest.raises(DownloadError):
        fetch(web, tmp_path, 'always_cut')
    before = len(web.requests)
    left = [p for p in tmp_path.iterdir() if p.suffix == '.part']
    assert len(left) == 1 and len(DATA) / 2 <= left[0].stat().st_size < len(DATA)
    web.cut.add('/cut/net.pth')
    for name in ('part', 'etag'):  # as if the same address had been cut
        (old,) = (p for p in tmp_path.iterdir() if p.suffix == f'.{name}')
        digest = hashlib.sha1(f'{web.url}/cut/net.pth'.encode()).hexdigest()[:8]
        old.rename(old.with_name(f'.net.pth.{digest}.{name}'))
    assert fetch(web, tmp_path, 'cut').read_bytes() == DATA
    assert web.requests[before][2]['range'].startswith('bytes=1')


def test_a_redirect_takes_no_token_along(web, tmp_path):
    with Web() as other:
        other.files['net.pth'] = DATA
        web.elsewhere = other.url
        with sources.open_url(f'{web.url}/redirect/net.pth', headers={'Authorization': 'Bearer secret'}) as response:
            assert response.read() == DATA
        assert web.requests[-1][2]['authorization'] == 'Bearer secret'
        assert 'authorization' not in other.requests[-1][2]
        assert fetch(web, tmp_path, 'redirect', sha256=SHA256).read_bytes() == DATA


def test_many_processes_download_once(web, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch(web, tmp_path, 'good'), range(4)))
    assert len(set(paths)) == 1 and len(web.requests) == 1


def test_a_cached_file_that_has_rotted_is_downloaded_again(web, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    place = source(web, 'good', sha256=SHA256)
    path = sources.fetch(NAME, [place], progress=False)
    assert tmp_path in path.parents
    path.write_bytes(b'rotten')
    assert sources.fetch(NAME, [place], progress=False).read_bytes() == DATA and len(web.requests) == 2
    path.write_bytes(b'rotten')
    with pytest.raises(DownloadError, match=r'net\.pth: .*SHA-256'):  # in a folder of the user's it is hers to mend
        sources.fetch(NAME, [place], cache_dir=path.parent, progress=False)


# The Hub

def _hub_fetch(cache, sha256):
    place = Source(repo_id='timm/net', filename='model.safetensors', sha256=sha256)
    try:
        return sources.fetch(NAME, [place], 'apache-2.0', cache, progress=False).read_bytes()
    except DownloadError as error:
        return str(error)


@pytest.mark.slow
def test_the_hub(web, tmp_path):
    """One process of the Hub's client for all of it, since the client reads its environment when it is imported."""
    with Hub() as hub, environment(**client_environment(hub, tmp_path / 'home')), \
            ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        def ask(cache, sha256=''):
            began = time.monotonic()
            answer = pool.submit(_hub_fetch, tmp_path / cache, sha256).result()
            return answer, time.monotonic() - began

        assert 'answers 401' in ask('a')[0] or 'answers 404' in ask('a')[0]  # there is no such repository
        hub.add('timm/net', {'model.safetensors': DATA})
        assert ask('a')[0] == DATA
        hub.faults['download_damaged_values'] = 1
        assert 'it was removed' in ask('b')[0]
        assert ask('b')[0] == DATA
        assert 'the file has the SHA-256' in ask('c', '0123abcd')[0]
        # Its storage is another host: the owner's token stays with the Hub.
        web.files['model.safetensors'] = DATA
        hub.storage = f'{web.url}/good'
        web.requests.clear()
        assert ask('d')[0] == DATA
        assert web.requests and all('authorization' not in headers for _, _, headers in web.requests)
        hub.storage = None
        before = len(hub.requests)
        assert ask('d')[0] == DATA and len(hub.requests) == before  # from the cache, without a question
        hub.stop()
        answer, seconds = ask('e')
        assert 'the connection failed' in answer or 'cannot be reached' in answer
        assert seconds < 5
        assert ask('d')[0] == DATA


# Without a network

def test_offline_is_an_error_at_once(web, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    for name in (NAME, 'cspnet_yolox_s.coco', 'cspnet_small.ra4_e3600_r256_in1k', 'cspnet_plain_resnet50.in1k'):
        began = time.monotonic()
        with pytest.raises(DownloadError) as error:
            timm.create_model(name, pretrained=True, cache_dir=tmp_path)
        assert time.monotonic() - began < 5
        for place in WEIGHTS[name].sources:
            assert f'- {place.link}: not asked, since HF_HUB_OFFLINE is set' in str(error.value)
        assert name in str(error.value) and sources.FOLDER_VARIABLE in str(error.value)


def test_a_folder_that_is_not_there(web, monkeypatch, tmp_path):
    monkeypatch.setenv(sources.FOLDER_VARIABLE, str(tmp_path / 'nowhere'))
    with pytest.raises(DownloadError, match=r'CSPNET_TIMM_WEIGHTS=.*nowhere: there is no such folder'):
        timm.create_model('cspnet_yolox_nano', pretrained=True)


@pytest.fixture(scope='module')
def trained():
    from tests.zoo import create

    return {name: create(name) for name in ('cspnet_nano', 'cspnet_rtmdet_tiny')}


@pytest.mark.parametrize('layout', [
    'released', 'tag.safetensors', 'tag.pth', 'tag/model.safetensors', 'hub/model.safetensors', 'any/config.json'])
@pytest.mark.parametrize('where', ['variable', 'cache_dir'])
def test_a_folder_of_files(layout, where, trained, tmp_path, monkeypatch):
    """Released under their own names, downloaded from the Hub, converted: all are found before a host is asked."""
    model = trained['cspnet_rtmdet_tiny']
    state_dict = model.state_dict()
    info = WEIGHTS[NAME]
    released = tmp_path / info.sources[-1].filename
    if layout == 'released':
        torch.save({'state_dict': state_dict}, released)
        digest = hashlib.sha256(released.read_bytes()).hexdigest()[:8]
        places = [*info.sources[:-1], replace(info.sources[-1], sha256=digest)]
        monkeypatch.setitem(WEIGHTS, NAME, replace(info, sources=tuple(places)))
    elif layout == 'tag.pth':
        torch.save(state_dict, tmp_path / f'{NAME}.pth')
    elif layout == 'any/config.json':
        monkeypatch.setattr(model, 'pretrained', True)  # loaded from the tag, which the config names then
        cspnet_timm.hub.save(model, tmp_path / 'omega', license='apache-2.0')
    else:
        names = dict(tag=NAME, hub='cspnext_tiny.rsb_a1_in1k')
        path = tmp_path / (names[layout[:3]] + layout[3:])
        path.parent.mkdir(exist_ok=True)
        save_file(state_dict, path)
    if where == 'variable':
        monkeypatch.setenv(sources.FOLDER_VARIABLE, str(tmp_path))
        loaded = timm.create_model(NAME, pretrained=True)
    else:
        loaded = timm.create_model(NAME, pretrained=True, cache_dir=tmp_path)
    assert same_weights(loaded, model)
    assert loaded.pretrained_cfg['hf_hub_id'] == 'munehiro-k/cspnext_tiny.rsb_a1_in1k'


@pytest.mark.parametrize('fixture, name', [
    ('darknet_csmobilenet-v2', 'cspnet_mobilenetv2.in1k'), ('ppyoloe_t', 'cspnet_ppyoloe_t.in1k'),
    ('yolov5n', 'cspnet_yolov5n.coco')])
def test_a_folder_has_files_in_the_containers_of_their_frameworks(fixture, name, tmp_path, monkeypatch):
    from tests import foreign
    from tests.parity import load_fixture
    from tests.zoo import distance

    info, state_dict, x, outputs = load_fixture(fixture)
    foreign.write(fixture, tmp_path / WEIGHTS[name].sources[-1].filename, state_dict, info)
    monkeypatch.setenv(sources.FOLDER_VARIABLE, str(tmp_path))
    model = timm.create_model(name, pretrained=True).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(x)[1]
    for key, value in outputs.items():
        if key.startswith('stride'):
            level = [level['reduction'] for level in model.feature_info].index(int(key[6:]))
            assert distance(maps[level], value) < 1e-5


def test_the_files_of_a_licence_that_is_not_downloaded_are_taken_from_the_folder(tmp_path, monkeypatch):
    from tests.parity import load_fixture

    torch.save({'model': load_fixture('yolov5n')[1]}, tmp_path / 'yolov5n.pt')
    monkeypatch.setenv(sources.FOLDER_VARIABLE, str(tmp_path))
    timm.create_model('cspnet_yolov5n', pretrained=True)


def test_a_file_under_a_known_name_with_other_contents(tmp_path, monkeypatch):
    monkeypatch.setenv(sources.FOLDER_VARIABLE, str(tmp_path))
    name = WEIGHTS[NAME].sources[-1].filename
    (tmp_path / name).write_bytes(DATA)
    with pytest.raises(DownloadError, match=f'{name}: the file has the SHA-256 .* and not 3a2dd350'):
        timm.create_model(NAME, pretrained=True)


def test_another_files_folder_is_left_alone(tmp_path, trained, monkeypatch):
    """A config.json of somebody else's, damaged or of another network."""
    texts = ('', '{', '[]', '{"architecture": 1}', '{"architecture": "resnet50", "pretrained_cfg": {}}')
    for i, text in enumerate(texts):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / 'config.json').write_text(text)
        (tmp_path / str(i) / 'model.safetensors').write_bytes(DATA)
    assert sources.find_local(NAME, WEIGHTS[NAME].sources, Path(tmp_path)) is None


# The whole way, into a model

def test_a_model_takes_the_second_source(web, down, tmp_path, monkeypatch, trained):
    info = WEIGHTS[NAME]
    torch.save({'state_dict': trained['cspnet_rtmdet_tiny'].state_dict()}, tmp_path / 'file.pth')
    web.files['net.pth'] = (tmp_path / 'file.pth').read_bytes()
    monkeypatch.setitem(WEIGHTS, NAME, replace(info, sources=(Source(url=down), source(web, 'good'))))
    model = timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / 'cache')
    assert same_weights(model, trained['cspnet_rtmdet_tiny'])
    assert model.pretrained_cfg['url'] == info.sources[-1].url


def test_what_is_no_file_of_weights_is_not_kept(web, tmp_path, monkeypatch):
    monkeypatch.setitem(WEIGHTS, NAME, replace(WEIGHTS[NAME], sources=(source(web, 'good'),)))
    with pytest.raises(DownloadError, match='no file of weights, and removed'):
        timm.create_model(NAME, pretrained=True, cache_dir=tmp_path)
    assert not list(tmp_path.glob('*.pth'))


def test_timms_own_state_dicts_load_exactly():
    """Its Hub files, and what people have made of them: other classes, under the prefixes of wrappers."""
    from tests.zoo import randomize

    theirs = randomize(timm.create_model('cspnext_tiny', num_classes=7)).eval()
    x = torch.randn(1, 3, 64, 96)
    for prefix in ('', 'module.', 'model.', 'backbone.'):
        state_dict = {f'{prefix}{key}': value for key, value in theirs.state_dict().items()}
        overlay = dict(state_dict=state_dict, num_classes=7)
        ours = timm.create_model('cspnet_rtmdet_tiny', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7)
        with torch.no_grad():
            assert torch.equal(ours.eval()(x), theirs(x))
    state_dict = {f'backbone.{k}': v for k, v in theirs.state_dict().items()}
    state_dict['bbox_head.rtm_cls.0.weight'] = torch.zeros(1)  # a detector around timm's backbone, which takes RGB
    ours = timm.create_model('cspnet_rtmdet_tiny', num_classes=0)
    ours.load_state_dict(state_dict)
    with torch.no_grad():
        assert torch.equal(ours.eval().forward_features(x), theirs.forward_features(x))
