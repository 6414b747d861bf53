"""``cspnet-timm doctor`` where things are broken: each environment is a folder of modules in front of the real ones."""
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cspnet_timm import doctor
from cspnet_timm.families import WEIGHTS

ROOT = Path(__file__).resolve().parents[1]

# Small stands-in: a doctor that imports torch and timm in earnest takes seconds, and only what breaks is of interest.
TORCH = '''
    __version__ = '2.14.1'
    import importlib.metadata, types, sys, os
    class hub:
        get_dir = staticmethod(lambda: os.path.join(os.path.expanduser('~'), 'torch_hub'))
    class version:
        cuda = hip = None
    class cuda:
        is_available = staticmethod(lambda: False)
        device_count = staticmethod(lambda: 0)
    device = str
'''
TIMM = '''
    import torch, sys, types
    __version__ = '1.0.31'
    _names = ['cspnet_small']
    def list_models(pattern):
        return list(_names)
'''


def environment(tmp_path, **modules):
    """A folder with a module each; and what is real of the package and of the standard library behind it."""
    others = {'numpy': '2.0', 'torchvision': '0.20', 'safetensors': '0.8', 'huggingface_hub': '2.4'}
    texts = {'torch': TORCH, 'timm': TIMM, **{name: f'__version__ = {version!r}' for name, version in others.items()}}
    for name, text in {**texts, **modules}.items():
        if text is not None:
            (tmp_path / f'{name}.py').write_text(textwrap.dedent(text))
    return tmp_path


def run(path, *args, cwd=None, home=None, package=ROOT, **variables):
    """Run the command with nothing installed but what is in the folder."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(('CSPNET_', 'TORCH_', 'HF_', 'PYTHON', 'XDG_'))}
    env.update(PYTHONPATH=os.pathsep.join([str(path), str(package)]), HOME=str(home or path), **variables)
    code = ('import sys; sys.argv = ["cspnet-timm", *sys.argv[1:]]; '
            'from cspnet_timm.cli import main; sys.exit(main())')
    done = subprocess.run([sys.executable, '-S', '-c', code, 'doctor', *args], env=env, cwd=cwd or '/', timeout=120,
                          capture_output=True, text=True)
    assert 'Traceback' not in done.stderr, done.stderr
    assert done.stdout.rstrip().splitlines()[-1].endswith(('wrong.',)), done.stdout
    lines = done.stdout.splitlines()
    wrong = {line[7:].split('  ')[0].strip(): line for line in lines if line.startswith('WRONG')}
    assert done.returncode == bool(wrong), done.stdout
    for i, line in enumerate(lines):  # every line that is wrong has its remedy
        assert not line.startswith('WRONG') or lines[i + 1].startswith('       -> '), line
    return wrong, done.stdout


BROKEN = {
    'no torch': (dict(torch=None), {'torch': 'not installed', 'timm': "No module named 'torch'"}),
    'no timm': (dict(timm=None), {'timm': 'not installed'}),
    'nothing at all': (dict.fromkeys(['torch', 'timm', 'numpy', 'torchvision', 'safetensors', 'huggingface_hub']),
                       {'torch': 'not installed', 'timm': 'not installed', 'safetensors': 'not installed'}),
    'a library of torch is missing': (
        dict(torch="raise OSError('libcudart.so.13: cannot open shared object file')"), {'torch': 'libcudart.so.13'}),
    'torch crashes': (dict(torch='import os; os.kill(os.getpid(), 11)'), {'torch': 'ended the process by signal 11'}),
    'torch exits': (dict(torch='import os; os._exit(3)'), {'torch': 'ended the process with 3'}),
    'torch is older': (dict(torch=TORCH.replace('2.14.1', '2.5.1')), {'torch': '2.5.1, older than 2.6'}),
    'timm is older': (dict(timm=TIMM.replace('1.0.31', '1.0.9')), {'timm': '1.0.9, older than 1.0.31'}),
    'timm is damaged': (dict(timm='def list_models(:'), {'timm': 'SyntaxError'}),
    'numpy does not fit torch': (
        dict(numpy="raise ImportError('numpy.core.multiarray failed to import')"), {'numpy': 'multiarray'}),
    'torchvision does not fit torch': (
        dict(torchvision="raise RuntimeError('operator torchvision::nms does not exist')"), {'torchvision': 'nms'}),
    'the entry point fails': (
        dict(torch="raise RuntimeError('Failed to load the backend extension: cspnet_timm')"),
        {'torch': 'backend extension'}),
    'safetensors is damaged': (dict(safetensors="raise SystemExit('bye')"), {'safetensors': 'SystemExit'}),
}


@pytest.mark.parametrize('case', BROKEN)
def test_a_broken_environment(case, tmp_path):
    modules, expected = BROKEN[case]
    wrong, out = run(environment(tmp_path, **modules))
    for subject, detail in expected.items():
        assert detail in wrong[subject], out
    # What is not broken is not called so: the processor, the compiler, Python itself.
    assert re.search(r'^ok +Python ', out, re.MULTILINE) and re.search(r'^ok +system ', out, re.MULTILINE)
    assert 'doctor' not in wrong and 'a check failed' not in out


def test_a_module_in_the_working_directory(tmp_path):
    here = tmp_path / 'here'
    here.mkdir()
    (here / 'timm.py').write_text('def list_models(pattern):\n    return []\n')
    env = environment(tmp_path / 'lib' if (tmp_path / 'lib').mkdir() is None else tmp_path)
    wrong, out = run(f'{here}{os.pathsep}{env}', cwd=here, home=tmp_path)
    assert 'imported from the working directory' in wrong['timm'], out


def test_half_of_the_package_is_gone(tmp_path):
    package = tmp_path / 'package' / 'cspnet_timm'
    package.mkdir(parents=True)
    for name in ('__init__.py', 'autoload.py', 'cli.py', 'doctor.py', 'sources.py'):
        (package / name).write_text((ROOT / 'cspnet_timm' / name).read_text())
    (tmp_path / 'lib').mkdir()
    wrong, out = run(environment(tmp_path / 'lib'), package=package.parent)
    assert 'files are missing: families, backbone.py' in wrong['cspnet-timm'], out
    assert 'models' in wrong


def test_a_folder_of_weights_that_is_not_there(tmp_path):
    wrong, out = run(
        environment(tmp_path), CSPNET_TIMM_WEIGHTS='/no/such/folder', CXX='no-such-compiler', PATH='/nowhere')
    assert '/no/such/folder' in wrong['CSPNET_TIMM_WEIGHTS']
    assert 'there is no C++ compiler (CXX=no-such-compiler is not there)' in out


def test_no_secret_is_shown(tmp_path):
    _, out = run(environment(tmp_path), HF_TOKEN='hf_xyzzy', HTTPS_PROXY='http://me:xyzzy@proxy:3128')
    assert 'xyzzy' not in out and 'HF_TOKEN' in out and '//…@proxy:3128' in out


def test_a_process_that_hangs(tmp_path, monkeypatch):
    environment(tmp_path, torch='import time; time.sleep(60)')  # a file system that does not answer
    monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
    monkeypatch.setattr(doctor, '_PROBES', dict.fromkeys(['torch', 'timm', 'safetensors']))
    answers = doctor._probe(seconds=3)
    assert 'did not come back within 3 s' in answers['torch']['error'] and answers['timm'] == {'error': 'needs torch'}
    assert 'error' not in answers['safetensors']


def test_the_hook_that_torch_no_longer_calls(monkeypatch):
    """What is said if torch stops to scan its entry points when it is imported."""
    monkeypatch.delenv('CSPNET_TIMM_AUTOLOAD', raising=False)
    monkeypatch.delenv('TORCH_DEVICE_BACKEND_AUTOLOAD', raising=False)
    monkeypatch.setattr(doctor, '_installed', lambda name: '0.1.0')
    monkeypatch.setattr(doctor, '_entry_points', lambda: ['cspnet_timm.autoload:install'])
    answers = {'registered': {'models': 0, 'said': []}, 'explicit': {'models': 9}}
    (finding,) = doctor._registration(answers)
    assert finding.state == doctor.WRONG and 'pytorch#180712' in finding.detail
    assert 'import cspnet_timm' in finding.remedy
    for variable in ('CSPNET_TIMM_AUTOLOAD', 'TORCH_DEVICE_BACKEND_AUTOLOAD'):
        with monkeypatch.context() as context:
            context.setenv(variable, '0')
            (finding,) = doctor._registration(answers)
            assert finding.state == doctor.NOTE and f'{variable}=0' in finding.detail


def test_hosts_and_requirements_are_the_projects():
    hosts = {urlsplit(source.link).netloc for info in WEIGHTS.values() for source in info.downloads}
    assert hosts <= {urlsplit(host).netloc for host in doctor.HOSTS}
    tomllib = pytest.importorskip('tomllib', reason='Python 3.10 reads no TOML')
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    required = dict(re.fullmatch(r'([\w-]+)(?:>=)?(.*)', line).groups() for line in project['dependencies'])
    assert required == doctor.REQUIRED
    extras = project['optional-dependencies']
    assert all(any(line.startswith(name) for line in extras[extra]) for name, extra in doctor.EXTRAS.items())


def test_network(monkeypatch):
    from tests.web_server import Web

    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr('cspnet_timm.sources.ANSWER_SECONDS', 0.5)
    with Web() as web:
        findings = {f.detail: f for f in doctor._network([f'{web.url}/refuses/x', f'{web.url}/silent/x'])}
    assert findings['answers'].state == doctor.OK and findings['no answer in time'].remedy


@pytest.mark.slow
def test_a_whole_environment():
    done = subprocess.run([sys.executable, '-m', 'cspnet_timm', 'doctor'], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert re.search(r'models +\d+ are registered', done.stdout) and 'deploy: eager' in done.stdout
