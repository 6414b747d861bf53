import os

# Before torch is imported: there is a test process per core.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        '--all-models', action='store_true',
        help='run the expensive checks on every model, not only on the smallest one of each structure')


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    from tests.zoo import ALL, representatives
    if 'any_model' in metafunc.fixturenames:
        metafunc.parametrize('any_model', ALL)
    if 'model_name' in metafunc.fixturenames:
        metafunc.parametrize('model_name', ALL if metafunc.config.getoption('--all-models') else representatives())
