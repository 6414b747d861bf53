import gc
import os

# Before torch is imported: there is a test process per core.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
import torch

# Exporters and compilers allocate so many small objects that Python would otherwise look for garbage most of the time.
gc.set_threshold(50_000, 20, 20)


def pytest_addoption(parser):
    parser.addoption(
        '--all-models', action='store_true',
        help='run the expensive checks on every model, not only on the smallest one of each structure')

# Files with tests that take long, each of which would leave the other processes idle if it were the last.
LONG = ('test_examples.py', 'test_timm_suite.py', 'test_speed.py', 'test_readme.py', 'test_distributed.py')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()  # what has been imported stays: no search for garbage needs to go through it


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def create_short(pytestconfig):
    """Creates what a compiler or an exporter goes through; with ``--all-models`` it is the whole model."""
    from tests import zoo
    return zoo.create if pytestconfig.getoption('--all-models') else zoo.create_short


def pytest_generate_tests(metafunc):
    from tests.zoo import ALL, representatives
    if 'any_model' in metafunc.fixturenames:
        metafunc.parametrize('any_model', ALL)
    if 'model_name' in metafunc.fixturenames:
        metafunc.parametrize('model_name', ALL if metafunc.config.getoption('--all-models') else representatives())
