"""Nothing that deploy tries can end or hang the process that called it."""
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from cspnet_timm import deploy
from cspnet_timm.deployment import DeployError, isolation
from cspnet_timm.deployment.backends import BACKENDS
from tests import planted, zoo
from tests.preloaded import python

NAMES = [backend.name for backend in planted.ALL]
PYTHON = sys.executable


class Own(nn.Module):
    """A model of the user's own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


@pytest.fixture
def plants(monkeypatch, tmp_path):
    for backend in planted.ALL:
        monkeypatch.setitem(BACKENDS, backend.name, backend)
    monkeypatch.setenv('PLANTED_PID', str(tmp_path / 'pid'))
    monkeypatch.setattr(sys, 'executable', python())  # of the processes in which candidates are tried
    return tmp_path / 'pid'


def quick(backend, **kwargs):
    kwargs = dict(precision='float32', seconds=0.01, progress=False, limit=20.) | kwargs
    return deploy(Own().eval(), torch.rand(2, 3, 16, 16), backend=backend, **kwargs)


def alive(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().split(')')[-1].split()[0] != 'Z'
    except OSError:
        return False


@pytest.mark.slow
def test_what_ends_its_process_is_a_line_of_the_report(plants, capfd, monkeypatch):
    started = []
    popen = subprocess.Popen

    def counted(command, *args, **kwargs):
        process = popen(command, *args, **kwargs)
        if isolation.ENTRY in command:
            started.append(process)
        return process

    monkeypatch.setattr(isolation.subprocess, 'Popen', counted)
    names = [n for n in NAMES if n != 'hangs']
    report = quick([*names, 'eager']).report
    assert report.backend in ('right', 'eager')
    notes = {c['backend']: c.get('note') for c in report.candidates}
    assert set(notes) == {*names, 'eager'} and notes['right'] is None and notes['eager'] is None
    assert notes['segfaults'].startswith('ended its process by signal 11 (SIGSEGV) while converting, in string_at')
    assert notes['segfaults_when_run'].startswith('ended its process by signal 11 (SIGSEGV) while running')
    assert 'signal 9 (SIGKILL), as the system does where memory runs out' in notes['killed']
    assert notes['too_large'].startswith('MemoryError')
    assert notes['exits'] == 'ended its process with exit code 3 while converting'
    assert 'signal 9 (SIGKILL)' in notes['ends_all']
    assert notes['wrong'].startswith('DeployError: differs from') and 'batch' in notes['wrong']
    for name, note in notes.items():
        assert note is None or f'{name} float32: {note}' in str(report)
    assert len(started) == 2  # one for all of them, and another after the one that was ended itself
    assert not any(alive(process.pid) for process in started)
    assert capfd.readouterr() == ('', '')


def test_what_hangs_is_ended(plants, capsys, monkeypatch):
    monkeypatch.setattr(isolation, 'QUIET', 0.5)
    monkeypatch.setattr(isolation, 'EVERY', 0.5)
    report = quick(['hangs', 'eager'], limit=2., progress=True).report
    assert report.backend == 'eager'
    assert report.candidates[0]['note'].startswith('took longer than 2 s while converting')
    assert not alive(int(plants.read_text()))
    assert 'hangs float32: converting for 1 s, given up after 2 s' in capsys.readouterr().err


def test_nothing_survives(plants, monkeypatch):
    monkeypatch.setattr(sys, 'executable', PYTHON)  # a process of its own, and not a fork
    before = set(Path(isolation.tempfile.gettempdir()).glob('cspnet-timm-*'))
    with pytest.raises(DeployError, match=r'No backend takes this model: killed float32: ended its process by sign'):
        quick('killed')
    assert set(Path(isolation.tempfile.gettempdir()).glob('cspnet-timm-*')) <= before


def test_an_interrupt_ends_the_process_too(plants, monkeypatch):
    kept = []
    start = isolation.Isolation.start

    def started(self):
        start(self)
        kept.append(self.process.pid)

    def interrupted(self, seconds):
        if not self.ready:
            return dict(ready=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(isolation.Isolation, 'start', started)
    monkeypatch.setattr(isolation.Isolation, '_answer', interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick('right')
    assert kept and not alive(kept[-1])


@pytest.mark.parametrize('executable, frozen', [('/usr/bin/uwsgi', False), ('', False), (sys.executable, True)])
def test_where_no_process_can_be_started(plants, monkeypatch, executable, frozen):
    """In an interpreter that is part of another program: it is not tried, unless the user takes the risk."""
    monkeypatch.setattr(sys, 'executable', executable)
    monkeypatch.setattr(sys, 'frozen', frozen, raising=False)
    report = quick(['right', 'eager']).report
    assert report.backend == 'eager' and 'no Python interpreter to start' in report.candidates[0]['note']
    assert quick('right', isolate=False).report.backend == 'right'


def test_the_process_does_not_start(plants, monkeypatch):
    monkeypatch.setattr(isolation, 'ENTRY', 'raise SystemExit("no torch here")')
    report = quick(['right', 'eager']).report
    assert report.backend == 'eager' and 'did not start: no torch here; isolate=False' in report.candidates[0]['note']


def test_limit():
    with pytest.raises(ValueError, match='limit=0'):
        quick('eager', limit=0)


SCRIPT = '''
import sys, torch, torch.nn as nn
from cspnet_timm import deploy
print('once')

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.hook = lambda x: x

    def forward(self, x):
        return self.conv(self.hook(x))

fast = deploy(Mine(), torch.rand(1, 3, 16, 16), backend='openvino', seconds=.01, progress=False)
print(tuple(fast(torch.rand(3, 3, 16, 16)).shape))
'''


@pytest.mark.slow
@pytest.mark.parametrize('how', ['file', 'input', 'thread', 'daemon'])
def test_the_callers_script_is_not_run_again(how, tmp_path):
    """Without a guard, a class of its own that no other process can import, from wherever it comes."""
    pytest.importorskip('openvino')
    script = SCRIPT
    body = ''.join(f'    {line}\n' for line in SCRIPT.splitlines())
    if how == 'thread':
        script = f'import threading\ndef work():\n{body}\nt = threading.Thread(target=work)\nt.start()\nt.join()\n'
    if how == 'daemon':
        script = (f'import multiprocessing\ndef work():\n{body}\n'
                  'p = multiprocessing.get_context("fork").Process(target=work, daemon=True)\np.start()\np.join()\n')
    path = tmp_path / 'script.py'
    path.write_text(script)
    (tmp_path / 'json.py').write_text('raise SystemExit("a file of the user took a module\'s place")')
    # By a Python of its own from a file and from its input, which the worker's looks for modules depend on.
    command = dict(file=[sys.executable, 'script.py'], input=[sys.executable, '-']).get(how, [python(), 'script.py'])
    done = subprocess.run(
        command, input=script if how == 'input' else None, capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={**os.environ, 'PYTHONSAFEPATH': '1'})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split('\n') == ['once', '(3, 4, 14, 14)', '']


@pytest.mark.slow
def test_two_threads_deploy_at_once(plants):
    found = []
    threads = [threading.Thread(target=lambda: found.append(quick(['segfaults', 'right']).report)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.backend for report in found] == ['right', 'right']


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['openvino', 'onnxruntime'])  # the compiler: test_deploy.py
def test_every_backend_gets_there_and_back(backend):
    """What was converted in the other process computes here what the network does."""
    reason = BACKENDS[backend].unavailable(torch.device('cpu'))
    if reason is not None:
        pytest.skip(f'{backend}: {reason}')
    assert BACKENDS[backend].isolated
    model, x = zoo.create_short('cspnet_nano', num_classes=4), torch.rand(2, 3, 64, 64)
    there = deploy(model, x, backend=backend, precision='float32', seconds=0.01, progress=False)
    y = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(there(y), model(y), rtol=1e-3, atol=1e-5)
