import functools
import gc
import os
import re
from collections import Counter

# Before torch is imported: there is a test process per core.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
import torch

from tests import preloaded

# Exporters and compilers allocate so many small objects that Python would otherwise look for garbage most of the time.
gc.set_threshold(50_000, 20, 20)

# Why a test may be skipped where CI is set: what a machine lacks, and no pip install brings.
ALLOWED_SKIPS = (
    r'there is no GPU',
    r'this processor has no int8 arithmetic',
    r'tau-fibrils-yolo==0\.2\.0 could not be downloaded: .*',
    r'(native: )?The native engine needs a CPU with AVX-512 and VNNI, and this one lacks .*',
)


def pytest_addoption(parser):
    parser.addoption(
        '--all-models', action='store_true',
        help='run the expensive checks on every model, not only on the smallest one of each structure')
    parser.addoption(
        '--cpu', type=int, default=0, metavar='N',
        help='name the N tests, functions and files that took most CPU seconds')


@pytest.fixture(autouse=True, scope='session')
def _torch_home(tmp_path_factory):
    """PyTorch keeps downloads by the file's name: what an earlier run has left is not to be found again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TORCH_HOME', str(tmp_path_factory.mktemp('torch')))
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    from tests.samples import FAMILIES, FEW
    from tests.stages import NETWORKS
    from tests.zoo import ALL, NECKS, REPRESENTATIVES
    every = metafunc.config.getoption('--all-models')
    if 'any_model' in metafunc.fixturenames:
        metafunc.parametrize('any_model', ALL)
    if 'model_name' in metafunc.fixturenames:
        metafunc.parametrize('model_name', [
            name if name in (*FAMILIES, NECKS[0]) else pytest.param(name, marks=pytest.mark.slow)
            for name in (ALL if every else (*REPRESENTATIVES, *NECKS))])
    own = [mark.args[0] for mark in metafunc.definition.iter_markers('parametrize')]
    if 'network' in metafunc.fixturenames and 'network' not in own:
        # A few whole ones, with slices of channels, attention and a neck: what these tests look at is in the small
        # networks once already.
        mark = metafunc.definition.get_closest_marker('networks') or pytest.mark.networks.mark
        fast = mark.args or NETWORKS
        whole = ALL if every else (*FEW[1:3], NECKS[0]) if mark.kwargs.get('whole', True) else ()
        metafunc.parametrize('network', [
            name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in (*NETWORKS, *whole)])


@pytest.fixture
def build(network, pytestconfig):
    """Creates the network of a test that asks for ``network``: a small one of ``stages.py``, or a whole one."""
    from tests import stages, zoo
    whole = network in stages.NETWORKS or pytestconfig.getoption('--all-models')
    return functools.partial(zoo.create if whole else zoo.create_short, network)


# Order: what takes long comes first, or it would leave the other processes idle at the end.

LONG = ('test_examples.py', 'test_timm_suite.py', 'test_speed.py', 'test_readme.py', 'test_distributed.py')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()  # what has been imported stays: no search for garbage needs to go through it


# No silent skips: in continuous integration a test that was not run has failed.

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    return fail_if_not_allowed(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    return fail_if_not_allowed(report)


def fail_if_not_allowed(report):
    if report.skipped and not hasattr(report, 'wasxfail') and os.environ.get('CI', '').lower() in ('1', 'true'):
        reason = report.longrepr[2].removeprefix('Skipped: ') if isinstance(report.longrepr, tuple) else ''
        if not any(re.fullmatch(allowed, reason) for allowed in ALLOWED_SKIPS):
            report.outcome = 'failed'
            report.longrepr = f'Skipped, and CI is set: {reason}\nWhat may be skipped stands in tests/conftest.py.'
    return report


# CPU seconds, which other programs hardly change, of a test and of the processes that it started.

STARTED = pytest.StashKey()


def _cpu_seconds():
    return sum(os.times()[:4]) + preloaded.cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    item.stash[STARTED] = _cpu_seconds()
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    item.user_properties.append(('cpu', _cpu_seconds() - item.stash[STARTED]))


def pytest_terminal_summary(terminalreporter, config):
    reports = [r for stats in terminalreporter.stats.values() for r in stats if isinstance(r, pytest.TestReport)]
    tests = {r.nodeid: dict(r.user_properties)['cpu'] for r in reports if r.when == 'teardown'}
    if not tests or not config.getoption('--cpu'):
        return
    functions, files = Counter(), Counter()
    for name, seconds in tests.items():
        functions[name.partition('[')[0]] += seconds
        files[name.partition('::')[0]] += seconds
    terminalreporter.section(f'{sum(tests.values()):.0f} CPU seconds in {len(tests)} tests')
    for times in (tests, functions, files):
        for name, seconds in sorted(times.items(), key=lambda item: -item[1])[:config.getoption('--cpu')]:
            terminalreporter.write_line(f'{seconds:8.2f}  {name}')
