"""timm's own test-suite, which its source distribution carries, on a model of each family."""
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import cspnet_timm
from tests.samples import FAMILIES

pytestmark = pytest.mark.slow

VERSION = importlib.metadata.version('timm')


@pytest.fixture(scope='module')
def suite(tmp_path_factory):
    """A folder with timm's tests, of the release that is installed, and no ``timm`` beside them."""
    folder = tmp_path_factory.mktemp('timm_suite')
    download = subprocess.run(
        [sys.executable, '-m', 'pip', 'download', f'timm=={VERSION}', '--no-binary', 'timm', '--no-deps', '-q', '-d',
         str(folder / 'sdist')],
        capture_output=True, text=True,
    )
    if download.returncode:
        pytest.skip(f'timm\'s source distribution cannot be downloaded: {download.stderr.strip()[-200:]}')
    archive, = (folder / 'sdist').glob('timm-*.tar.gz')
    with tarfile.open(archive) as tar:
        tar.extractall(folder / 'sdist', filter='data')
    source = folder / 'sdist' / f'timm-{VERSION}'
    shutil.move(source / 'tests', folder / 'tests')
    shutil.copy(source / 'pyproject.toml', folder)
    shutil.rmtree(folder / 'sdist')
    return folder


@pytest.mark.parametrize('name', FAMILIES)
def test_timms_suite(suite, name):
    packages = [str(Path(cspnet_timm.__file__).parents[1]), os.environ.get('PYTHONPATH', '')]
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', 'tests/test_models.py', '-q', '-p', 'no:cacheprovider', '-k',
         f'{name} and not pretrained'],
        cwd=suite, capture_output=True, text=True,
        env={**os.environ, 'TORCH_BACKEND': 'cspnet_timm', 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '2',
             'PYTHONPATH': os.pathsep.join(packages)},
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    passed = int(re.search(r'(\d+) passed', result.stdout)[1])
    assert passed >= 8, result.stdout[-2000:]  # forward, cfg, features, backward, script, fx and what follows from it
