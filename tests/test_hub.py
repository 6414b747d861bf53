"""Models to the Hub and back, through timm's functions and this package's, against a Hub on the loopback interface."""
import contextlib
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import timm
import torch

import cspnet_timm
from tests.hub_server import OWNER, READER, Hub
from tests.samples import FAMILIES, FEW

SMALL = dict(num_classes=5, in_chans=3)


def make(name='cspnet_nano', seed=0, **kwargs):
    """A model whose every tensor is its own."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SMALL, **kwargs}).eval()
    for key, value in model.state_dict().items():
        if key.endswith(('running_mean', 'running_var')):
            value.copy_(torch.rand_like(value) + 0.5)
        elif key.endswith('num_batches_tracked'):
            value.fill_(seed + 3)
    return model


def digests(model):
    return {k: hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest() for k, v in model.state_dict().items()}


# huggingface_hub reads its environment when it is imported: what talks to the server runs in a process of its own.

@contextlib.contextmanager
def environment(**variables):
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def client_environment(hub, home):
    return dict(
        HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_TOKEN=OWNER, HF_HUB_DISABLE_XET='1', HF_HUB_OFFLINE='0',
        HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_DISABLE_PROGRESS_BARS='1', NO_PROXY='127.0.0.1', no_proxy='127.0.0.1',
    )


def _answer(function, token, args, kwargs):
    os.environ['HF_TOKEN'] = token
    try:
        return function(*args, **kwargs), None
    except Exception as error:
        causes, cause = [], error
        while cause is not None:
            causes.append(str(cause))
            cause = cause.__cause__ or cause.__context__
        return None, (type(error).__name__, '\n'.join(causes))


class Client:
    """Calls functions of this module in the client's process."""

    def __init__(self, pool):
        self.pool = pool

    def __call__(self, function, *args, token=OWNER, **kwargs):
        value, error = self.pool.submit(_answer, function, token, args, kwargs).result()
        assert error is None, error
        return value

    def error(self, function, *args, token=OWNER, **kwargs):
        value, error = self.pool.submit(_answer, function, token, args, kwargs).result()
        assert error is not None, value
        return error


@pytest.fixture(scope='module')
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope='module')
def client(hub, tmp_path_factory):
    with environment(**client_environment(hub, tmp_path_factory.mktemp('hf_home'))):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
            yield Client(pool)


@pytest.fixture
def repo(hub, request):
    hub.faults.clear()
    hub.objects.clear()
    hub.requests.clear()
    hub.uploading.clear()
    name = hashlib.sha1(request.node.name.encode()).hexdigest()[:12]
    return f'owner/{name}'


# What runs in the client's process

def push_by_timm(repo, name='cspnet_nano', **kwargs):
    model = make(name)
    timm.models.push_to_hf_hub(model, repo, safe_serialization=True, **kwargs)
    return digests(model)


def push(repo, name='cspnet_nano', seed=0, model=None, **kwargs):
    model = make(name, seed=seed, **(model or {}))
    commit = cspnet_timm.hub.push(model, repo, **{'license': 'mit', **kwargs})
    return digests(model), commit.oid


def pull(repo, cache, **kwargs):
    return digests(timm.create_model(f'hf-hub:{repo}', pretrained=True, cache_dir=str(cache), **kwargs))


def pull_cfg(repo, cache):
    return timm.create_model(f'hf-hub:{repo}', pretrained=True, cache_dir=str(cache)).pretrained_cfg


def pull_maps(repo, cache):
    """The features of the pulled extractor and of the pulled model, which must agree."""
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = timm.create_model(f'hf-hub:{repo}', pretrained=True, features_only=True, cache_dir=str(cache)).eval()(x)
        expected = timm.create_model(f'hf-hub:{repo}', pretrained=True, cache_dir=str(cache)).eval() \
            .forward_intermediates(x, intermediates_only=True)
    return [bool(torch.equal(a, b)) for a, b in zip(maps, expected)]


def push_again(repo, cache, to, classes=None, **kwargs):
    model = timm.create_model(f'hf-hub:{repo}', pretrained=True, cache_dir=str(cache))
    if classes is not None:
        model.reset_classifier(classes)
    cspnet_timm.hub.push(model, to, **kwargs)


def push_channels_last(repo):
    model = make().to(memory_format=torch.channels_last)
    cspnet_timm.hub.push(model, repo, license='mit')
    weight = model.layer1.down.conv.weight
    return digests(model), weight.is_contiguous(memory_format=torch.channels_last), weight.is_contiguous()


def push_pretrained(repo, cache, **kwargs):
    model = timm.create_model('cspnet_small', pretrained=True, cache_dir=str(cache))
    cspnet_timm.hub.push(model, repo, **kwargs)


def create_branch(repo, branch):
    from huggingface_hub import HfApi

    HfApi().create_branch(repo, branch=branch)


def do_not_wait():
    """In this process, the client's attempts follow each other at once."""
    time.sleep = lambda seconds: None


def verify(repo, cache):
    from huggingface_hub import HfApi

    return [m['path'] for m in HfApi().verify_repo_checksums(repo, cache_dir=str(cache)).mismatches]


# Round trips

@pytest.mark.parametrize('name', FEW[:1])
def test_timms_own_push_and_pull(client, repo, tmp_path, name):
    pushed = client(push_by_timm, repo, name)
    assert client(pull, repo, tmp_path) == pushed


@pytest.mark.parametrize('name', [
    FEW[0], 'cspnet_yolov4_tiny_pan',
    *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != FEW[0]),
])
def test_push_and_pull(client, hub, repo, tmp_path, name):
    pushed, commit = client(push, repo, name, data='drawn images')
    files = hub.repos[repo].files(commit)
    assert sorted(files) == ['README.md', 'config.json', 'model.safetensors']
    assert client(pull, repo, tmp_path) == pushed
    assert all(client(pull_maps, repo, tmp_path))
    adapted = client(pull, repo, tmp_path, num_classes=2, in_chans=1)
    changed = [k for k in pushed if adapted[k] != pushed[k]]
    assert len(changed) == 3, changed  # the first convolution, and the classifier's weight and bias
    card = files['README.md'].decode()
    assert f'create_model(\'hf-hub:{repo}\', pretrained=True)' in card
    for line in ('license: mit', '`pip install .` in a clone', f'`{name}`', 'drawn images'):
        assert line in card


@pytest.mark.parametrize('args', [
    dict(num_classes=0), dict(num_classes=0, global_pool=''), dict(global_pool='catavgmax'), dict(in_chans=1),
    dict(act_layer='relu'), dict(partial_ratio=0.25, fusion='csp'), dict(output_stride=16),
], ids=str)
def test_the_models_arguments_come_back(client, repo, tmp_path, args):
    pushed, _ = client(push, repo, model=args)
    assert client(pull, repo, tmp_path) == pushed


def test_labels_of_a_fine_tuned_head_stay(client, hub, repo, tmp_path):
    names = ['cat', 'dog', 'bird', 'fish', 'worm']
    client(push, repo, label_names=dict(enumerate(names)), model_config=dict(label_descriptions={'cat': 'A cat.'}))
    config = json.loads(hub.repos[repo].files()['config.json'])
    assert config['label_names'] == names and config['label_descriptions'] == {'cat': 'A cat.'}
    assert 'cat, dog, bird, fish, worm' in hub.repos[repo].files()['README.md'].decode()
    assert list(client(pull_cfg, repo, tmp_path)['label_names']) == names

    again = f'{repo}-again'
    client(push_again, repo, tmp_path, again)  # without naming labels or licence
    config = json.loads(hub.repos[again].files()['config.json'])
    assert config['label_names'] == names
    assert 'license: mit' in hub.repos[again].files()['README.md'].decode()
    assert f'huggingface.co/{repo}' in hub.repos[again].files()['README.md'].decode()

    other = f'{repo}-other'
    client(push_again, repo, tmp_path, other, classes=2)  # other classes: the names would be wrong
    assert 'label_names' not in json.loads(hub.repos[other].files()['config.json'])


def test_pretrained_weights_bring_their_licence_and_origin(client, hub, repo, tmp_path):
    source = 'timm/cs3darknet_focus_s.ra4_e3600_r256_in1k'
    cspnet_timm.hub.save(make('cspnet_small', num_classes=1000), tmp_path / 'source', license='mit')
    hub.add(source, {'model.safetensors': (tmp_path / 'source' / 'model.safetensors').read_bytes()})
    client(push_pretrained, repo, tmp_path)
    card = hub.repos[repo].files()['README.md'].decode()
    for line in ('license: apache-2.0', 'cspnet_small.ra4_e3600_r256_in1k', 'Ross Wightman', 'ImageNet-1k'):
        assert line in card
    client(push_pretrained, f'{repo}-2', tmp_path, license='cc-by-nc-4.0', data='my own images')
    card = hub.repos[f'{repo}-2'].files()['README.md'].decode()
    assert 'license: cc-by-nc-4.0' in card and 'my own images' in card and 'Ross Wightman' in card


def test_a_card_that_is_there_stays(client, hub, repo):
    hub.add(repo, {'README.md': b'# Mine'})
    client(push, repo)
    assert hub.repos[repo].files()['README.md'] == b'# Mine'


def test_channels_last(client, repo, tmp_path):
    pushed, channels_last, contiguous = client(push_channels_last, repo)
    assert channels_last and not contiguous  # the caller's model is what it was
    assert client(pull, repo, tmp_path) == pushed


def test_revisions(client, hub, repo, tmp_path):
    first, sha = client(push, repo, seed=1)
    client(create_branch, repo, 'v2')
    second, _ = client(push, repo, seed=2, revision='v2')
    assert first != second
    assert client(pull, repo, tmp_path) == first
    assert client(pull, f'{repo}@v2', tmp_path) == second
    third, _ = client(push, repo, seed=3)
    assert client(pull, repo, tmp_path) == third
    assert client(pull, f'{repo}@{sha}', tmp_path) == first
    error, message = client.error(pull, f'{repo}@v3', tmp_path)
    assert error == 'RevisionNotFoundError' and 'v3' in message
    _, sha = client(push, repo, seed=4, create_pr=True)
    assert client(pull, repo, tmp_path) == third and hub.repos[repo].branches['refs/pr/1'] == sha


# Who may

def test_private_repository(client, hub, repo, tmp_path):
    pushed, _ = client(push, repo, private=True)
    assert hub.repos[repo].private
    assert client(pull, repo, tmp_path / 'owner') == pushed
    assert client(pull, repo, tmp_path / 'reader', token=READER) == pushed
    for token in ('', 'hf_wrong'):
        error, message = client.error(pull, repo, tmp_path / f'other{token}', token=token)
        assert error in ('RepositoryNotFoundError', 'HfHubHTTPError') and '401' in message
        assert not list((tmp_path / f'other{token}').rglob('*.safetensors'))


@pytest.mark.parametrize('token, status', [('', '401'), ('hf_wrong', '401'), (READER, '403')])
def test_pushing_without_the_right_to(client, hub, repo, token, status):
    error, message = client.error(push, repo, token=token)
    assert error in ('HfHubHTTPError', 'RepositoryNotFoundError') and status in message
    assert repo not in hub.repos
    client(push, repo)
    before = dict(hub.repos[repo].files())
    error, message = client.error(push, repo, seed=1, token=token)
    assert error in ('HfHubHTTPError', 'RepositoryNotFoundError') and status in message
    assert hub.repos[repo].files() == before


# Uploads that fail

@pytest.mark.parametrize('fault', ['upload_refused', 'commit_refused'])
def test_a_refused_upload_commits_nothing(client, hub, repo, tmp_path, fault):
    client(push, repo, seed=1)
    before = dict(hub.repos[repo].files())
    hub.faults[fault] = 1
    error, message = client.error(push, repo, seed=2)
    reason = {'upload_refused': '403', 'commit_refused': 'The commit is malformed'}[fault]
    assert error in ('HfHubHTTPError', 'BadRequestError', 'RuntimeError') and reason in message
    assert hub.repos[repo].files() == before
    pushed, _ = client(push, repo, seed=2)
    assert client(pull, repo, tmp_path) == pushed


def test_a_dropped_connection_is_tried_again(client, hub, repo, tmp_path):
    hub.faults['upload_drops'] = 1
    pushed, _ = client(push, repo)
    assert sum(method == 'PUT' for method, _ in hub.requests) > 1
    assert client(pull, repo, tmp_path) == pushed


@pytest.mark.slow
def test_a_process_killed_while_it_uploads_commits_nothing(client, hub, repo, tmp_path):
    client(push, repo, seed=1)
    before = dict(hub.repos[repo].files())
    hub.faults['upload_hangs'] = 1
    code = f'from tests import test_hub; test_hub.push({repo!r}, seed=2)'
    with environment(**client_environment(hub, tmp_path / 'home')):
        paths = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), *filter(None, sys.path)])
        process = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': paths})
    try:
        assert hub.uploading.wait(120)
    finally:
        process.kill()
        process.wait()
    assert hub.repos[repo].files() == before
    pushed, _ = client(push, repo, seed=2)
    assert client(pull, repo, tmp_path) == pushed


# Downloads that fail

def test_a_dropped_download_goes_on_where_it_was(client, hub, repo, tmp_path):
    pushed, _ = client(push, repo)
    hub.faults['download_drops'] = 1
    assert client(pull, repo, tmp_path) == pushed


@pytest.mark.parametrize('fault, error, reason', [
    ('download_short', 'OSError', 'Consistency check failed'),  # found before the file has its name in the cache
    ('download_damaged_header', 'RuntimeError', 'weights received are damaged'),
    ('download_damaged_values', 'RuntimeError', 'weights received are damaged'),  # nothing in the file is malformed
])
@pytest.mark.parametrize('kwargs', [{}, dict(features_only=True)], ids=str)
def test_a_damaged_download_is_an_error_and_can_be_repeated(client, hub, repo, tmp_path, fault, error, reason, kwargs):
    pushed, _ = client(push, repo)
    hub.faults[fault] = 1
    raised, message = client.error(pull, repo, tmp_path, **kwargs)
    assert raised == error and reason in message
    assert client(pull, repo, tmp_path) == pushed
    assert client(verify, repo, tmp_path) == []


def test_released_weights_are_checked_too(client, hub, repo, tmp_path):
    cspnet_timm.hub.save(make('cspnet_small', num_classes=1000), tmp_path / 'source', license='mit')
    hub.add('timm/cs3darknet_focus_s.ra4_e3600_r256_in1k', {
        'model.safetensors': (tmp_path / 'source' / 'model.safetensors').read_bytes()})
    hub.faults['download_damaged_values'] = 1
    error, message = client.error(push_pretrained, repo, tmp_path / 'cache')
    assert error == 'DownloadError' and 'SHA-256' in message and repo not in hub.repos
    client(push_pretrained, repo, tmp_path / 'cache')


def test_missing_files_and_repositories(client, hub, repo, tmp_path):
    client(push, repo)
    files = hub.repos[repo].files()
    hub.add(f'{repo}-a', {k: v for k, v in files.items() if k != 'config.json'})
    error, message = client.error(pull, f'{repo}-a', tmp_path)
    assert error.endswith('EntryNotFoundError') and 'config.json' in message
    hub.add(f'{repo}-b', {k: v for k, v in files.items() if k != 'model.safetensors'})
    error, message = client.error(pull, f'{repo}-b', tmp_path)
    assert error.endswith('EntryNotFoundError') and 'pytorch_model.bin' in message
    error, message = client.error(pull, f'{repo}-c', tmp_path)
    assert error == 'RepositoryNotFoundError' and f'{repo}-c' in message
    config = files['config.json'].replace(b'cspnet_nano', b'cspnet_of_tomorrow')
    hub.add(f'{repo}-d', {**files, 'config.json': config})
    error, message = client.error(pull, f'{repo}-d', tmp_path)
    assert error == 'RuntimeError' and 'cspnet_of_tomorrow' in message


def test_weights_of_another_network(client, hub, repo, tmp_path):
    client(push, repo)
    files = hub.repos[repo].files()
    hub.add(f'{repo}-a', {**files, 'config.json': files['config.json'].replace(b'cspnet_nano', b'cspnet_tiny')})
    error, message = client.error(pull, f'{repo}-a', tmp_path)
    assert error == 'CheckpointError' and 'holds cspnet_nano, not cspnet_tiny' in message


@pytest.mark.slow
def test_the_cache_serves_while_the_hub_is_away(tmp_path):
    with Hub() as hub, environment(**client_environment(hub, tmp_path / 'home')):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
            client = Client(pool)
            pushed, _ = client(push, 'owner/away')
            assert client(pull, 'owner/away', tmp_path) == pushed
            hub.stop()
            client(do_not_wait)
            assert client(pull, 'owner/away', tmp_path) == pushed


# What is refused before anything is sent or written

def fused():
    return timm.models.reparameterize_model(make())


def pruned():
    model = make(num_classes=0)
    model.prune_intermediate_layers([2])
    return model


def narrowed():
    model = make()
    model.layer4.csp.merge.conv = torch.nn.Conv2d(256, 200, 1, bias=False)
    return model


REFUSED = {
    'fused': (fused, 'fused by reparameterize_model'),
    'pruned': (pruned, 'layer3'),
    'narrowed': (narrowed, r'layer4\.csp\.merge\.conv\.weight. \(200×256×1×1 given'),
    'extractor': (lambda: make(features_only=True, num_classes=None), 'features_only'),
    'of timm': (lambda: timm.create_model('resnet18'), 'ResNet'),
    'class as argument': (lambda: make(act_layer=torch.nn.ReLU), 'act_layer.*model_args'),
    'meta': (lambda: timm.create_model('cspnet_nano', device='meta'), 'meta tensor'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_could_not_be_loaded_is_refused(tmp_path, monkeypatch, case):
    model, reason = REFUSED[case]
    monkeypatch.setattr(cspnet_timm.hub, 'push_to_hf_hub', lambda *args, **kwargs: pytest.fail('it was sent'))
    model = model()
    for write in (
            lambda: cspnet_timm.hub.save(model, tmp_path / 'model', license='mit'),
            lambda: cspnet_timm.hub.push(model, 'owner/name', license='mit'),
            lambda: cspnet_timm.hub.model_card(model, license='mit'),
    ):
        with pytest.raises((TypeError, ValueError), match=reason):
            write()
    assert not list(tmp_path.iterdir())


def test_an_argument_that_json_cannot_hold_can_be_named(tmp_path):
    model = make(act_layer=torch.nn.ReLU)
    folder = cspnet_timm.hub.save(model, tmp_path / 'model', license='mit', model_args=dict(act_layer='relu'))
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert digests(loaded) == digests(model)
    assert any(isinstance(m, torch.nn.ReLU) for m in loaded.modules())


def test_the_licence_is_never_assumed(tmp_path):
    for model in (make(), make('cspnet_small')):  # the latter has a tag, with a licence, but none of its weights
        with pytest.raises(ValueError, match='license is missing'):
            cspnet_timm.hub.save(model, tmp_path / 'model')
    folder = cspnet_timm.hub.save(make(), tmp_path / 'model', license='mit')
    file = dict(file=str(folder / 'model.safetensors'))
    model = timm.create_model('cspnet_nano', pretrained=True, pretrained_cfg_overlay=dict(file, num_classes=5), **SMALL)
    with pytest.raises(ValueError, match='license is missing'):  # somebody's file
        cspnet_timm.hub.model_card(model)
    for license in ('Apache 2.0', 'mit\nevil: true', ''):
        with pytest.raises(ValueError, match='license'):
            cspnet_timm.hub.save(make(), tmp_path / 'other', license=license)
    assert 'license: mit' in cspnet_timm.hub.model_card(timm.create_model(f'local-dir:{folder}', pretrained=True))


@pytest.mark.parametrize('names, reason', [
    (['a', 'b'], '2 names, but the model has 5 classes'), ('abcde', 'one string'), ([1, 2, 3, 4, 5], 'strings, not 1'),
    ({1: 'a', 2: 'b', 3: 'c', 4: 'd', 5: 'e'}, '4 names'),
])
def test_labels_that_do_not_fit(names, reason):
    with pytest.raises(ValueError, match=reason):
        cspnet_timm.hub.model_card(make(), license='mit', label_names=names)


# Folders

@pytest.mark.parametrize('name', FEW)
def test_save_and_load_from_a_folder(tmp_path, name):
    model = make(name)
    folder = cspnet_timm.hub.save(model, tmp_path / 'new' / 'model', license='mit', label_names=list('abcde'))
    assert sorted(f.name for f in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert digests(loaded) == digests(model)
    assert list(loaded.pretrained_cfg['label_names']) == list('abcde')
    maps = timm.create_model(f'local-dir:{folder}', pretrained=True, features_only=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(maps(x), model.forward_intermediates(x, intermediates_only=True)))


def test_a_folder_is_replaced_only_when_asked(tmp_path):
    folder = tmp_path / 'model'
    folder.mkdir()
    cspnet_timm.hub.save(make(seed=1), folder, license='mit')  # an empty one may be there
    with pytest.raises(FileExistsError, match='overwrite=True'):
        cspnet_timm.hub.save(make(seed=2), folder, license='mit')
    assert digests(timm.create_model(f'local-dir:{folder}', pretrained=True)) == digests(make(seed=1))
    cspnet_timm.hub.save(make(seed=2), folder, license='mit', overwrite=True)
    assert digests(timm.create_model(f'local-dir:{folder}', pretrained=True)) == digests(make(seed=2))
    (folder / 'thesis.tex').write_text('irreplaceable')
    with pytest.raises(FileExistsError, match=r'thesis\.tex'):
        cspnet_timm.hub.save(make(seed=3), folder, license='mit', overwrite=True)
    (tmp_path / 'file').write_text('')
    with pytest.raises(FileExistsError, match='is a file'):
        cspnet_timm.hub.save(make(), tmp_path / 'file', license='mit', overwrite=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ['file', 'model']


def test_a_failure_while_writing_leaves_what_was_there(tmp_path):
    folder = cspnet_timm.hub.save(make(seed=1), tmp_path / 'model', license='mit')
    with pytest.raises(TypeError):  # the weights are written by then, the config is not
        cspnet_timm.hub.save(make(seed=2), folder, license='mit', overwrite=True, model_config=dict(notes={1, 2}))
    assert [f.name for f in tmp_path.iterdir()] == ['model']
    assert digests(timm.create_model(f'local-dir:{folder}', pretrained=True)) == digests(make(seed=1))


def test_wrapped_models_are_unwrapped(tmp_path):
    model = make()
    ema = timm.utils.ModelEmaV3(model)
    folder = cspnet_timm.hub.save(ema, tmp_path / 'ema', license='mit')
    assert digests(timm.create_model(f'local-dir:{folder}', pretrained=True)) == digests(model)
    folder = cspnet_timm.hub.save(torch.compile(model), tmp_path / 'compiled', license='mit')
    assert digests(timm.create_model(f'local-dir:{folder}', pretrained=True)) == digests(model)


def test_the_cards_snippet_runs(tmp_path):
    folder = cspnet_timm.hub.save(make(), tmp_path / 'model', license='mit')
    code = (folder / 'README.md').read_text().split('```python\n')[1].split('```')[0]
    names = {}
    exec(textwrap.dedent(code).replace('path/to/this/folder', str(folder)), names)
    assert digests(names['model']) == digests(make())
    assert len(names['backbone'](torch.randn(1, 3, 64, 64))) == 5


def test_a_variant_of_the_users_own_says_what_to_import(tmp_path, monkeypatch):
    (tmp_path / 'my_nets.py').write_text(textwrap.dedent('''
        import timm
        from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
        from cspnet_timm import CspBackbone
        from cspnet_timm.backbone import BackboneCfg, Level
        from cspnet_timm.layers import ConvNormAct

        default_cfgs = generate_default_cfgs({'my_csp_net.untrained': dict(input_size=(3, 64, 64))})

        def level(in_chs, args):
            return ConvNormAct(in_chs, 8, 3, stride=args.stride, **args.layers)

        @register_model
        def my_csp_net(pretrained=False, **kwargs):
            cfg = BackboneCfg(levels=(Level(level, 8),) * 5)
            return build_model_with_cfg(CspBackbone, 'my_csp_net', pretrained, model_cfg=cfg, **kwargs)
    '''))
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__('my_nets')
    model = make('my_csp_net')
    folder = cspnet_timm.hub.save(model, tmp_path / 'model', license='mit')
    assert 'import my_nets' in (folder / 'README.md').read_text()
    assert digests(timm.create_model(f'local-dir:{folder}', pretrained=True)) == digests(model)
