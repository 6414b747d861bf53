"""The pages of docs/: every snippet runs as it stands, and the site is built without a warning.

The snippets of README, ``clients.md``, ``deploy.md`` and ``many_gpus.md`` have tests of their own.
"""
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from cspnet_timm.sources import SUFFIXES
from tests import foreign
from tests.parity import fill, load_fixture

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = ('clients.md', 'deploy.md', 'many_gpus.md')
PAGES = [page for page in sorted((ROOT / 'docs').glob('*.md')) if page.name not in ELSEWHERE]
SNIPPETS = [
    pytest.param(page, code, id=f'{page.stem}-{i}') for page in PAGES
    for i, code in enumerate(re.findall(r'^```python\n(.*?)^```', page.read_text(), re.MULTILINE | re.DOTALL))]
RELEASED = 'pretrained=True'


@pytest.mark.parametrize('page, code', SNIPPETS)
def test_snippet(page, code, tmp_path, monkeypatch):
    """Weights that would have to be downloaded and others' files are left out: what they become is tested elsewhere."""
    monkeypatch.chdir(tmp_path)
    create = timm.create_model

    def without_weights(name, pretrained=False, pretrained_cfg_overlay=None, **kwargs):
        if not pretrained:
            return create(name, **kwargs)
        file = (pretrained_cfg_overlay or {}).get('file')
        assert file or name.startswith('local-dir:') or timm.models.is_model_pretrained(name), f'{name} has no weights'
        assert file is None or Path(file).suffix in SUFFIXES, file
        if 'torch' not in code:  # nothing is computed
            kwargs['device'] = 'meta'
        return create('cspnet_yolox_s' if name == 'local-dir:yolox_s' else name, **kwargs)

    if RELEASED in code:
        monkeypatch.setattr(timm, 'create_model', without_weights)
    exec(compile(code, page.name, 'exec'), {'__name__': 'snippet'})


def test_a_file_of_another_framework_as_the_pages_load_it(tmp_path):
    """The one road that all the snippets with a file take, with a file."""
    keys = load_fixture('yolov8n')[0]['keys']
    foreign.ultralytics_file(tmp_path / 'yolov8n.pt', fill(keys), 'yolov8n')
    timm.create_model('cspnet_yolov8n', pretrained=True, pretrained_cfg_overlay=dict(file=tmp_path / 'yolov8n.pt'))


@pytest.mark.parametrize('page', sorted((ROOT / 'docs').rglob('*.md')), ids=lambda page: page.stem)
def test_page_says_what_it_is_for(page):
    title, _, text = page.read_text().partition('\n')
    assert re.match(r'# \S', title), title
    assert re.match(r'\n(?!```)[A-Z[`*]', text), f'{page.name}: a sentence has to stand below the title'


def test_navigation_has_every_page():
    navigation = set(re.findall(r': (\S+\.md)$', (ROOT / 'mkdocs.yml').read_text(), re.MULTILINE))
    assert navigation == {str(page.relative_to(ROOT / 'docs')) for page in (ROOT / 'docs').rglob('*.md')}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('mkdocstrings') is None, reason='pip install ".[docs]" brings the tools')
def test_site(tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '-q', '-d', str(tmp_path / 'site')], cwd=ROOT,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    api = (tmp_path / 'site' / 'api' / 'index.html').read_text()
    for name in ('CrossStage', 'CspBackbone', 'deploy', 'save', 'convert', 'register'):
        assert re.search(rf'<h3 id="cspnet_timm[^"]*\.{name}"', api), name
    assert ':func:' not in api and 'Args:' not in api and 'partial_ratio' in api
