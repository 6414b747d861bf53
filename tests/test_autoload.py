"""Registration without an import, on the wheel that users install."""
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
IGNORED = shutil.ignore_patterns('.*', 'build', 'dist', '*.egg-info', '__pycache__')



@pytest.fixture(scope='session')
def source(tmp_path_factory):
    """A folder with this checkout in it, and what an installer notes of it for torch to find its entry points."""
    folder = tmp_path_factory.mktemp('source')
    (folder / 'cspnet_timm').symlink_to(ROOT / 'cspnet_timm')
    entry_point = re.compile(r'^\[project\.entry-points\."(.+)"\]\n(\w+) = "(.+)"$', re.MULTILINE)
    group, name, value = entry_point.search((ROOT / 'pyproject.toml').read_text()).groups()
    notes = folder / 'cspnet_timm-0.dist-info'
    notes.mkdir()
    (notes / 'METADATA').write_text('Metadata-Version: 2.1\nName: cspnet-timm\nVersion: 0\n')
    (notes / 'entry_points.txt').write_text(f'[{group}]\n{name} = {value}\n')
    return folder


def test_timm_has_the_models_without_an_import(source):
    """The one fast test of this file; the others are about the wheel."""
    run(source, f'''
        import sys, torch
        assert 'timm' not in sys.modules
        assert not [name for name in sys.modules if name.startswith('cspnet_timm') and name != 'cspnet_timm.autoload'
                    and name != 'cspnet_timm']
        import timm
        assert timm.is_model('cspnet_nano')
        assert sys.modules['cspnet_timm'].__file__.startswith({str(source)!r})
        assert not [finder for finder in sys.meta_path if 'cspnet' in type(finder).__module__]
    ''', '-W', 'error::RuntimeWarning', '-W', 'error::UserWarning')


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    """A folder with the built wheel installed in it, as site-packages has it."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'
    shutil.copytree(ROOT, source, ignore=IGNORED)
    subprocess.run([*PIP, 'wheel', '--no-deps', '-w', str(folder), str(source)], check=True)
    (wheel,) = folder.glob('cspnet_timm-*.whl')
    subprocess.run([*PIP, 'install', '--no-deps', '--target', str(folder / 'site'), str(wheel)], check=True)
    return folder / 'site'


def run(site, code, *options, cwd=None, check=True, **env):
    """Run code in a new process in which the wheel is installed, from a directory that has nothing to do with it."""
    sites = site if isinstance(site, tuple) else (site,)
    variables = {
        **os.environ, 'CSPNET_TIMM_AUTOLOAD': None, 'TORCH_DEVICE_BACKEND_AUTOLOAD': None, 'OMP_NUM_THREADS': '1',
        'PYTHONPATH': os.pathsep.join(map(str, sites)), **env,
    }
    result = subprocess.run(
        [sys.executable, *options, '-c', textwrap.dedent(code)], cwd=cwd or sites[0].parent,
        env={k: v for k, v in variables.items() if v is not None}, capture_output=True, text=True, timeout=240)
    if check:
        assert result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
def test_wheel_is_whole(site):
    files = (p for p in (ROOT / 'cspnet_timm').rglob('*') if p.is_file() and '__pycache__' not in p.parts)
    assert not [f for f in files if not (site / f.relative_to(ROOT)).is_file()]
    assert not (site / 'tests').exists()


@pytest.mark.slow
def test_nothing_else_needed(site, tmp_path):
    result = run(site, '''
        import sys, torch
        assert not [name for name in sys.modules if name.partition('.')[0] in ('timm', 'cspnet_timm')
                    and name not in ('cspnet_timm', 'cspnet_timm.autoload')]
        import timm
        model = timm.create_model('cspnet_small')
        import cspnet_timm
        print(cspnet_timm.__file__)
        assert len(timm.list_models('cspnet_*')) >= 7
        assert type(model) is cspnet_timm.CspBackbone
    ''', '-W', 'error::RuntimeWarning', '-W', 'error::UserWarning', cwd=tmp_path)
    assert str(site) in result.stdout and not result.stderr


@pytest.mark.slow
def test_torch_calls_its_entry_points(tmp_path):
    """What registration without an import rests on, by itself: an entry point of a package of two files."""
    (tmp_path / 'probe-1.0.dist-info').mkdir()
    (tmp_path / 'probe-1.0.dist-info' / 'METADATA').write_text('Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n')
    (tmp_path / 'probe-1.0.dist-info' / 'entry_points.txt').write_text('[torch.backends]\nprobe = probe:install\n')
    (tmp_path / 'probe.py').write_text("def install():\n    print('called')\n")
    called = run(tmp_path, "import torch; print('imported')").stdout.split()
    if called != ['called', 'imported']:
        import torch
        pytest.fail(
            f'torch {torch.__version__} does not call the entry points of torch.backends while it is imported, but '
            f'{"later" if "called" in called else "never"} (pytorch/pytorch#180712 proposed to make the scan lazy). '
            'Then installing this package registers no models: users have to write `import cspnet_timm`, and README.md '
            'under "How registration works", has to say so of this version.')


@pytest.mark.slow
@pytest.mark.parametrize('imports, autoload', [
    ('import cspnet_timm', None),
    ('import torch; from cspnet_timm.layers import ConvNormAct; import timm', '0'),
    ('import timm.layers; assert not timm.list_models("cspnet_*"); import cspnet_timm.blocks', '0'),
])
def test_explicit_import_in_every_order(site, imports, autoload):
    # "Overwriting" would be a UserWarning: that there is none shows that everything is registered once.
    run(site, f'''
        {imports}
        import timm
        assert timm.is_model('cspnet_nano')
        model = timm.create_model('cspnet_nano')
        import cspnet_timm, cspnet_timm.layers
        assert type(model) is cspnet_timm.CspBackbone
        assert type(model.stem.conv1) is cspnet_timm.layers.ConvNormAct
        import sys
        assert not [finder for finder in sys.meta_path if 'cspnet' in type(finder).__module__]
    ''', '-W', 'error::RuntimeWarning', '-W', 'error::UserWarning', CSPNET_TIMM_AUTOLOAD=autoload)


@pytest.mark.slow
def test_turned_off_by_torch(site):
    run(site, '''
        import timm
        assert not timm.list_models('cspnet_*')
        import cspnet_timm
        assert timm.list_models('cspnet_*')
    ''', TORCH_DEVICE_BACKEND_AUTOLOAD='0')


@pytest.mark.slow
def test_probes_reloads_threads_and_names_of_timm(site):
    run(site, '''
        import importlib, importlib.util, threading, torch, warnings
        importlib.util.find_spec('timm.models')
        found = []
        def work():
            import timm
            found.append(timm.is_model('cspnet_nano'))
        threads = [threading.Thread(target=work) for _ in range(8)]
        [t.start() for t in threads]; [t.join() for t in threads]
        assert found == [True] * 8
        import timm.models
        importlib.reload(timm.models)
        assert timm.is_model('cspnet_nano')

        # A name of timm's stays timm's.
        from cspnet_timm.families import _builder
        def resnet18(pretrained=False, **kwargs):
            raise AssertionError
        before = timm.models.model_entrypoint('resnet18')
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            assert _builder.register_model(resnet18) is resnet18
        assert timm.models.model_entrypoint('resnet18') is before
    ''', '-W', 'error::RuntimeWarning')


@pytest.mark.slow
def test_installed_twice(site, tmp_path):
    shutil.copytree(site, tmp_path / 'again')
    run((site, tmp_path / 'again'), '''
        import timm.models.resnet, timm  # timm by a module within it
        assert timm.is_model('cspnet_nano')
    ''', '-W', 'error::RuntimeWarning', '-W', 'error::UserWarning', cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('strict', [False, True])
def test_a_broken_plugin_breaks_nothing(site, tmp_path, strict):
    broken = tmp_path / 'site'
    shutil.copytree(site, broken)
    (broken / 'cspnet_timm' / 'families' / 'cspnet.py').write_text('raise RuntimeError("a broken family")\n')
    # Errors are made of our warnings alone: other packages' own would break the import.
    code = f'''
        import warnings
        if {strict}:
            warnings.filterwarnings('error', message='cspnet_timm')
        import torch, timm
        assert timm.is_model('resnet18') and not timm.is_model('cspnet_nano')
        timm.create_model('resnet18')
    '''
    result = run(broken, code, cwd=tmp_path)
    assert result.stderr.count('its models are not registered') == 1 and 'a broken family' in result.stderr
    if not strict:
        result = run(broken, 'import cspnet_timm', cwd=tmp_path, check=False)
        assert result.returncode == 1 and 'RuntimeError: a broken family' in result.stderr


@pytest.mark.slow
def test_data_loader_workers(site, tmp_path):
    script = tmp_path / 'loader.py'
    script.write_text(textwrap.dedent('''
        import sys
        import torch
        from torch.utils.data import DataLoader, Dataset

        class Names(Dataset):
            def __len__(self):
                return 1
            def __getitem__(self, index):
                import timm
                return sum(p.numel() for p in timm.create_model('cspnet_nano').parameters())

        if __name__ == '__main__':
            for method in ('fork', 'spawn', 'forkserver'):
                size, = DataLoader(Names(), batch_size=None, num_workers=1, multiprocessing_context=method)
                assert size > 0, method
            assert 'timm' not in sys.modules  # the workers have imported it themselves
    '''))
    run(site, f'import subprocess, sys; subprocess.run([sys.executable, {str(script)!r}], check=True)', cwd=tmp_path)


@pytest.mark.slow
def test_torchrun(site, tmp_path):
    script = tmp_path / 'train.py'
    script.write_text(textwrap.dedent('''
        import timm, torch
        import torch.distributed as dist
        dist.init_process_group('gloo')
        model = torch.nn.parallel.DistributedDataParallel(timm.create_model('cspnet_nano', num_classes=2))
        model(torch.randn(2, 3, 64, 64)).mean().backward()
        dist.destroy_process_group()
    '''))
    run(site, f'''
        import subprocess, sys
        subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone',
                        {str(script)!r}], check=True)
    ''', cwd=tmp_path)


@pytest.mark.slow
def test_editable_install(tmp_path):
    environment = tmp_path / 'venv'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(environment)], check=True)
    source = tmp_path / 'source'
    shutil.copytree(ROOT, source, ignore=IGNORED)
    python = next(environment.glob('bin/python'), environment / 'Scripts' / 'python.exe')
    site_packages = next(environment.rglob('site-packages'))
    # torch, timm and what they need come from the environment that runs the tests, without this package.
    others = tmp_path / 'others'
    others.mkdir()
    for folder in (Path(p) for p in sys.path if p.endswith('site-packages')):
        for entry in folder.iterdir():
            if 'cspnet_timm' not in entry.name and not (others / entry.name).exists():
                (others / entry.name).symlink_to(entry)
    (site_packages / 'tests_environment.pth').write_text(str(others))
    subprocess.run(
        [*PIP, '--python', str(python), 'install', '--no-deps', '--force-reinstall', '-e', str(source)], check=True)
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    result = subprocess.run(
        [str(python), '-c', 'import timm, cspnet_timm; timm.create_model("cspnet_nano"); print(cspnet_timm.__file__)'],
        cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    assert str(source) in result.stdout

