"""README.md as it is printed: its snippets, its commands and the expressions in its sentences, run from top to bottom.

The Hub is one on the loopback interface, with weights under the names of the released ones, and the files of other
frameworks lie where the commands expect them. The commands of timm's scripts run in tests/test_timm_scripts.py.
"""
import ast
import contextlib
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from safetensors.torch import save

import cspnet_timm
from cspnet_timm.deployment import search
from cspnet_timm.deployment.backends import BACKENDS
from tests import foreign
from tests.hub_server import Hub
from tests.parity import fill, load_fixture
from tests.test_hub import Client, client_environment, environment

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def code():
    """``(kind, text)`` of every Python block, command, and Python expression in a sentence, in order."""
    pattern = re.compile(
        r'^```python\n(?P<block>.*?)^```|^ {4}(?P<commands>\S[^\n]*)$|`(?P<expression>(?:timm|cspnet_timm)\.[^`]*\))`',
        re.MULTILINE | re.DOTALL)
    for match in pattern.finditer((ROOT / 'README.md').read_text()):
        if match.lastgroup == 'commands':
            yield from (('command', command) for command in match['commands'].split(' && '))
        else:
            yield match.lastgroup, match[match.lastgroup]


def deploy_quickly():
    """In this process, deployment tries what is quick to convert, and measures little."""
    interleave = search.interleave
    search.interleave = lambda calls, device, *args: interleave(calls, device, 0.01)
    search.FORMS = {}
    BACKENDS['inductor'].unavailable = classmethod(lambda cls, device: 'it takes its time, and has its own tests')


def run_all(folder):
    """Run every block by itself, the expressions with what the first has made; returns what came of it."""
    os.chdir(folder)
    deploy_quickly()
    blocks, results, claims = [], {}, {}
    for kind, text in code():
        if kind == 'block':
            said = io.StringIO()
            names = {'__name__': 'snippet'}
            with contextlib.redirect_stdout(said):
                exec(compile(text, 'README.md', 'exec'), names)
            blocks.append({**names, 'said': said.getvalue()})
            for expression, value in re.findall(r'^(\w.*?)  +# (\[.*\])$', text, re.MULTILINE):
                claims[expression] = eval(expression, names), ast.literal_eval(value)
        elif kind == 'expression':
            results[text] = eval(text, {'timm': timm, 'cspnet_timm': cspnet_timm, **(blocks[0] if blocks else {})})
        elif text.startswith('cspnet-timm '):
            done = subprocess.run(text, shell=True, capture_output=True, text=True)
            assert done.returncode == 0, f'{text}\n{done.stderr}'
            results[text] = done.stdout
    classifier, maps, libraries, stage, deployed = blocks
    image = classifier['image'][None]
    with torch.no_grad():
        return {
            'claims': claims,
            'labels': classifier['said'].splitlines(),
            'maps': [tuple(maps[level].shape) for level in ('p3', 'p4', 'p5')],
            'losses': {name: loss.item() for name, loss in libraries['losses'].items()},
            'masks': tuple(libraries['masks'].shape),
            'stage': tuple(stage['out'].shape),
            'deployed': tuple(deployed['logits'].shape),
            'logits': classifier['model'](image),
            **{k: v.eval()(image) if isinstance(v, nn.Module) else str(v) for k, v in results.items()},
        }


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('readme')
    (folder / 'docs').mkdir()
    shutil.copy(ROOT / 'docs' / 'sample.jpg', folder / 'docs')
    foreign.darknet_file(
        folder / 'csresnext50-omega_final.weights', load_fixture('darknet_csresnext50')[1])
    narrow = load_fixture('yolov8n')[0]['keys']  # the next size has twice the channels, and the same depth
    wide = {key: [n if n == 3 or i > 1 else 2 * n for i, n in enumerate(shape)] for key, shape in narrow.items()}
    foreign.ultralytics_file(folder / 'yolov8s.pt', fill(wide), 'yolov8s')
    torch.manual_seed(0)
    released = timm.create_model('cs3darknet_focus_s')
    with Hub() as hub:
        hub.add('timm/cs3darknet_focus_s.ra4_e3600_r256_in1k', {'model.safetensors': save(released.state_dict())})
        variables = client_environment(hub, folder / 'hf_home')
        scripts = os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']])
        with environment(**variables, PATH=scripts, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
                yield {**Client(pool)(run_all, folder), 'folder': folder, 'released': released.eval()}


def test_everything_ran(results):
    ran = [text for kind, text in code() if kind != 'block']
    assert {text.split()[0] for text in ran if text not in results} == {'pip', 'pytest', 'python', 'torchrun'}
    assert sum(text.startswith('cspnet-timm ') for text in ran) >= 3
    assert sum(kind == 'block' for kind, _ in code()) >= 3


def test_the_values_in_the_comments(results):
    assert len(results['claims']) >= 2
    assert all(found == said for found, said in results['claims'].values()), results['claims']


def test_what_the_snippets_make(results):
    assert len(results['labels']) == 5 and all(re.match(r'\d+\.\d%  \w', line) for line in results['labels'])
    assert results['maps'] == [(2, c, 320 // stride, 256 // stride) for c, stride in ((128, 8), (256, 16), (512, 32))]
    assert len(results['losses']) == 3 and all(loss > 0 for loss in results['losses'].values())
    assert results['masks'] == (2, 2, 64, 64) and results['stage'] == (2, 128, 32, 32)
    assert results['deployed'] == (8, 1000)


def test_the_released_weights_compute_what_timms_network_does(results):
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(timm.create_model('cspnet_small', device='meta')))
    with torch.no_grad():
        expected = results['released'](transform(Image.open(ROOT / 'docs' / 'sample.jpg'))[None])
    torch.testing.assert_close(results['logits'], expected)


def test_what_is_pushed_is_pulled(results):
    assert torch.equal(results['timm.create_model(\'hf-hub:user/name\', pretrained=True)'], results['logits'])


def test_the_commands_write_what_is_said(results):
    with Image.open(results['folder'] / 'features' / 'sample.cspnet_small.png') as image:
        assert image.width > 500
    assert {f.name for f in (results['folder'] / 'omega').iterdir()} == {
        'README.md', 'config.json', 'model.safetensors'}
