"""timm's own test-suite, which its source distribution carries, on a few models."""
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
from tests.preloaded import python
from tests.samples import FEW

pytestmark = pytest.mark.slow

NAMES = (*FEW, 'cspnet_tutorial')
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


# To collect its tests of all of timm's models takes the suite as long as to run those of ours.
ONLY = f'''
import timm
every = timm.list_models
timm.list_models = lambda *args, **kwargs: [name for name in every(*args, **kwargs) if name.split('.')[0] in {NAMES}]
'''


def test_timms_suite(suite):
    (suite / 'only.py').write_text(ONLY)
    packages = [str(Path(cspnet_timm.__file__).parents[1]), os.environ.get('PYTHONPATH', '')]
    result = subprocess.run(
        [python(), '-m', 'pytest', 'tests/test_models.py', '-q', '-rA', '-p', 'no:cacheprovider', '-p', 'only',
         '-k', f'({" or ".join(NAMES)}) and not pretrained'],
        cwd=suite, capture_output=True, text=True,
        env={**os.environ, 'TORCH_BACKEND': 'cspnet_timm', 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1',
             'PYTHONPATH': os.pathsep.join([str(suite), *packages])},
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    for name in NAMES:
        passed = re.findall(rf'^PASSED \S+::(\w+)\[(?:\S+-)?{name}(?:\.\S+)?\]', result.stdout, re.MULTILINE)
        # forward, cfg, features, backward, script, fx and what follows from it
        assert len(passed) >= 8, f'{name}: {passed}\n{result.stdout[-2000:]}'
