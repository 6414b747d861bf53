"""What is installed, what works, and what to do about the rest: ``cspnet-timm doctor``.

It has to work where half of the installation is broken, so this file imports the standard library alone, and everything
that may fail, hang or end the process is tried in a process of its own (this file again, as a script).
"""
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple
from urllib.parse import urlsplit

__all__ = ['HOSTS', 'Finding', 'examine', 'report']

DISTRIBUTION, PACKAGE = 'cspnet-timm', 'cspnet_timm'
REINSTALL = '`pip install --force-reinstall --no-deps .` in a clone'  # it is on no index
PYTHON = (3, 10)
REQUIRED = {'torch': '2.6', 'timm': '1.0.31', 'huggingface_hub': '', 'safetensors': ''}  # as pyproject.toml has them
BROUGHT = ('numpy', 'torchvision')  # by these, and broken often enough
EXTRAS = {
    'openvino': 'deploy', 'onnx': 'deploy', 'onnxscript': 'deploy', 'onnxruntime': 'deploy', 'h5py': 'keras'}
HOSTS = (  # of the tags
    'https://huggingface.co', 'https://download.openmmlab.com', 'https://github.com', 'https://paddledet.bj.bcebos.com',
    'https://bj.bcebos.com', 'https://data.pjreddie.com', 'https://pjreddie.com', 'https://storage.googleapis.com',
)
SECONDS = 180  # for a process that imports everything; file systems of clusters are slow
CACHE_SECONDS = 5  # for the size of a cache
OK, NOTE, WRONG = 'ok', 'note', 'WRONG'


class Finding(NamedTuple):
    """One line of the report, and its remedy if it is wrong."""

    state: str
    subject: str
    detail: str
    remedy: str = ''


# What is tried in a process of its own. Each returns what is written as JSON.

def _probe_import(name: str) -> Dict[str, Any]:
    module = __import__(name)
    return {'version': str(getattr(module, '__version__', '')), 'file': str(getattr(module, '__file__', ''))}


def _probe_registered() -> Dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        import timm
    said = [str(w.message) for w in caught if PACKAGE in str(w.message)]
    return {'models': len(timm.list_models('cspnet_*')), 'said': said[:1]}


def _probe_explicit() -> Dict[str, Any]:
    import timm

    __import__(PACKAGE).register()
    return {'models': len(timm.list_models('cspnet_*'))}


def _probe_gpu() -> Dict[str, Any]:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    built = torch.version.cuda or torch.version.hip or ''
    if names:  # what fails if the driver is older than torch's CUDA, or the architecture too old for its kernels
        torch.zeros(8, device='cuda').add_(1).sum().item()
    return {'names': names, 'built': built}


def _probe_backends() -> Dict[str, Any]:
    import torch

    __import__(f'{PACKAGE}.deployment.backends')
    backends = sys.modules[f'{PACKAGE}.deployment.backends'].BACKENDS
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    return {name: backend.unavailable(device) for name, backend in backends.items()}


def _probe_caches() -> Dict[str, Any]:
    import torch

    return {'torch': os.path.join(torch.hub.get_dir(), 'checkpoints')}


_PROBES: Dict[str, Callable[[], Dict[str, Any]]] = {
    'numpy': lambda: _probe_import('numpy'),
    'torch': lambda: _probe_import('torch'),
    'torchvision': lambda: _probe_import('torchvision'),
    'safetensors': lambda: _probe_import('safetensors'),
    'huggingface_hub': lambda: _probe_import('huggingface_hub'),
    'timm': lambda: _probe_import('timm'),
    'registered': _probe_registered,
    'explicit': _probe_explicit,
    'gpu': _probe_gpu,
    'backends': _probe_backends,
    'caches': _probe_caches,
}

_NEED = {  # what is not tried where an import has ended its process, and would end another
    'numpy': ('torch', 'torchvision', 'timm', 'registered', 'explicit', 'gpu', 'backends', 'caches'),
    'torch': ('torchvision', 'timm', 'registered', 'explicit', 'gpu', 'backends', 'caches'),
    'timm': ('registered', 'explicit', 'backends'),
}


def _serve(names: Sequence[str]) -> None:
    """Try each in turn, and say so before: what follows the last answer has ended the process."""
    out = os.fdopen(os.dup(1), 'w', encoding='utf-8')
    os.dup2(2, 1)  # whatever libraries print is none of the answer
    if 'timm' not in names and not {'registered', 'explicit', 'backends'}.isdisjoint(names):
        with contextlib.suppress(Exception):
            __import__('timm')  # before this package, as where nothing is broken
    for name in names:
        out.write(json.dumps({'begins': name}) + '\n')
        out.flush()
        try:
            answer = _PROBES[name]()
        except BaseException as error:
            answer = {'error': f'{type(error).__name__}: {error}'.strip()[:600]}
        out.write(json.dumps({'name': name, **({'answer': answer})}) + '\n')
        out.flush()
    out.close()
    os._exit(0)  # some libraries crash when they are taken down


def _probe(seconds: float = SECONDS) -> Dict[str, Dict[str, Any]]:
    """Answers by the name of the probe; ``{'error': …}`` where it failed, hung or ended its process."""
    answers: Dict[str, Dict[str, Any]] = {}
    left = list(_PROBES)
    environment = {**os.environ, '_CSPNET_TIMM_PATH': json.dumps([p or os.getcwd() for p in sys.path])}
    while left:
        command = [sys.executable, '-X', 'faulthandler', os.path.abspath(__file__), *left]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, timeout=seconds)
            output, ended, stderr = done.stdout, f'ended the process with {done.returncode}', done.stderr
            if done.returncode < 0:
                ended = f'ended the process by signal {-done.returncode}'
        except subprocess.TimeoutExpired as expired:
            output, stderr = expired.stdout or b'', expired.stderr or b''
            ended = f'did not come back within {seconds:.0f} s'
        except OSError as error:
            return {name: {'error': f'no process can be started ({error})'} for name in _PROBES}
        begun = ''
        for line in output.decode(errors='replace').splitlines():
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if 'name' in message:
                    answers[message['name']] = message['answer']
                begun = message.get('begins', begun)
        if begun not in answers:
            last = [line for line in stderr.decode(errors='replace').splitlines() if line.strip()][-1:]
            culprit = begun or left[0]
            answers[culprit] = {'error': f'{ended} {" ".join(last)[:300]}'.strip()}
            answers.update({name: {'error': f'needs {culprit}'} for name in _NEED.get(culprit, ()) if name in left})
        left = [name for name in left if name not in answers]
    return answers


# What is found

def _numbers(version: str) -> Tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r'\d+', re.split(r'[+a-z]', version)[0]))


def _installed(name: str) -> Optional[str]:
    try:
        return importlib.metadata.version(name.replace('_', '-')) or ''
    except Exception:  # damaged metadata raise anything
        return None


def _python() -> Iterator[Finding]:
    state = OK if sys.version_info >= PYTHON else WRONG
    yield Finding(
        state, 'Python', f'{platform.python_version()} ({platform.python_implementation()}), {sys.executable}',
        '' if state == OK else f'Install Python {PYTHON[0]}.{PYTHON[1]} or newer.')
    yield Finding(OK, 'system', f'{platform.system()} {platform.release()}, {platform.machine()}, '
                                f'{os.cpu_count()} processors')


def _own() -> Iterator[Finding]:
    folder = Path(__file__).resolve().parent
    text = (folder / '__init__.py').read_text(encoding='utf-8') if (folder / '__init__.py').is_file() else ''
    match = re.search(r"^__version__ = '(.+)'", text, re.MULTILINE)
    version = match[1] if match else 'of no version'
    installed = _installed(DISTRIBUTION)
    where = f'{version}, {folder}'
    if installed is None:
        yield Finding(
            NOTE, DISTRIBUTION, f'{where}: not installed, only on the path',
            f'timm finds the models without an import only if it is installed: `pip install .` in a clone, or '
            f'`pip install -e .` to work on it. `import {PACKAGE}` works regardless.')
    elif installed != version:
        yield Finding(
            WRONG, DISTRIBUTION, f'{where}, but installed as {installed}: two versions',
            f'pip uninstall -y {DISTRIBUTION} (until it says that it is not installed), then install it again.')
    else:
        yield Finding(OK, DISTRIBUTION, where)
    needed = ('__init__.py', 'autoload.py', 'cli.py', 'families', 'backbone.py', 'checkpoints', 'layers.py')
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        yield Finding(WRONG, DISTRIBUTION, f'files are missing: {", ".join(missing)}',
                      REINSTALL)


def _packages(answers: Dict[str, Dict[str, Any]]) -> Iterator[Finding]:
    for name in (*REQUIRED, *BROUGHT):
        least, installed, answer = REQUIRED.get(name, ''), _installed(name), answers.get(name, {})
        wanted = f"pip install '{name}{'>=' if least else ''}{least}'"
        error = answer.get('error', '')
        if error:
            if installed is None and f"No module named '{name}'" in error:
                state = NOTE if name in BROUGHT else WRONG
                yield Finding(state, name, 'not installed', wanted)
            elif 'backend extension' in error and PACKAGE in error:
                yield Finding(
                    WRONG, name, f'{installed}: import fails, {error}',
                    f'The files or the metadata of {DISTRIBUTION} are damaged: set TORCH_DEVICE_BACKEND_AUTOLOAD=0, '
                    f'then `pip uninstall {DISTRIBUTION}` or install it again.')
            else:
                yield Finding(
                    WRONG, name, f'{installed or "not installed"}: import fails, {error}',
                    f'pip install --force-reinstall {name}' if "needs " not in error and (
                        name != 'timm' or 'torch' not in error) else
                    'Mend what it needs first, torch or numpy.')
            continue
        version, file = answer.get('version') or installed or '', answer.get('file', '')
        if file and Path.cwd().resolve() in (Path(file).resolve().parent, Path(file).resolve().parent.parent):
            yield Finding(
                WRONG, name, f'{version or "no version"}, imported from the working directory: {file}',
                f'What is called {name} here hides the installed one ({installed or "none"}): start somewhere else, '
                'or rename it.')
        elif least and _numbers(version) < _numbers(least):
            remedy = f"pip install --upgrade '{name}>={least}'"
            yield Finding(WRONG, name, f'{version}, older than {least}; {file}', remedy)
        else:
            yield Finding(OK, name, version + ('' if not installed or installed in version or version in installed
                                               else f' (its metadata say {installed})'))
    for name, extra in EXTRAS.items():
        installed = _installed(name)
        yield Finding(OK if installed else NOTE, name, installed or f'not installed (extra: {extra})')


def _registration(answers: Dict[str, Dict[str, Any]]) -> Iterator[Finding]:
    hook, explicit = answers.get('registered', {}), answers.get('explicit', {})
    if explicit.get('error') or not explicit.get('models'):
        yield Finding(
            WRONG, 'models', f'cannot be registered: {explicit.get("error") or "there are none"}',
            'Mend what is wrong above first; if nothing is, this is a bug of the package: please report it.')
        return
    if hook.get('models'):
        yield Finding(OK, 'models', f'{hook["models"]} are registered with timm, without an import')
        return
    own = os.environ.get('CSPNET_TIMM_AUTOLOAD', '1').strip().lower()
    torchs = os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD', '1')
    before = f'{explicit["models"]} are there after `import {PACKAGE}`, but not without it: '
    remedy = f'Write `import {PACKAGE}` before the models are used'
    if own in ('0', 'false', 'no', 'off'):
        yield Finding(NOTE, 'models', f'{before}CSPNET_TIMM_AUTOLOAD={own} turns that off', f'{remedy}, or unset it.')
    elif torchs != '1':
        yield Finding(NOTE, 'models', f'{before}TORCH_DEVICE_BACKEND_AUTOLOAD={torchs} turns that off',
                      f'{remedy}, or unset it.')
    elif _installed(DISTRIBUTION) is None:
        yield Finding(NOTE, 'models', f'{before}it is not installed', f'{remedy}, or install it.')
    elif hook.get('said'):
        yield Finding(WRONG, 'models', f'{before}{hook["said"][0]}', f'{remedy}.')
    elif not _entry_points():
        yield Finding(WRONG, 'models', f'{before}its metadata have no entry point for torch',
                      REINSTALL)
    else:
        yield Finding(
            WRONG, 'models', f'{before}this torch does not call the entry points of torch.backends when it is imported '
            '(pytorch#180712)', f'{remedy}, and please report the version of torch.')


def _entry_points() -> List[str]:
    with contextlib.suppress(Exception):
        return [e.value for e in importlib.metadata.entry_points(group='torch.backends') if e.name == PACKAGE]
    return []


def _deployment(answers: Dict[str, Dict[str, Any]]) -> Iterator[Finding]:
    answer = answers.get('backends', {})
    if 'error' in answer:
        yield Finding(WRONG, 'deploy', answer['error'], 'Mend what is wrong above first.')
        return
    for name, lacks in answer.items():
        state, why = (NOTE, ' '.join(str(lacks).split())) if lacks else (OK, 'can be used')
        yield Finding(state, f'deploy: {name}', why)


def _compiler() -> Iterator[Finding]:
    own = os.environ.get('CXX', '').split()
    found = next((path for path in map(shutil.which, [*own[:1], 'g++', 'c++', 'clang++']) if path), None)
    if found is None:
        named = f' (CXX={os.environ["CXX"]} is not there)' if own else ''
        yield Finding(NOTE, 'compiler', f'there is no C++ compiler{named}',
                      'Install g++ or clang++ for `deploy`\'s own engine and for torch.compile.')
        return
    try:
        done = subprocess.run([found, '--version'], capture_output=True, timeout=20)
        first = done.stdout.decode(errors='replace').splitlines()[:1]
        if done.returncode:
            raise OSError(f'--version ends with {done.returncode}')
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding(WRONG, 'compiler', f'{found}: {error}', 'Install it again, or name another one in CXX.')
        return
    yield Finding(OK, 'compiler', f'{found}: {"".join(first)}')


def _processor() -> Iterator[Finding]:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    flags = next((line.partition(':')[2].split() for line in lines if line.startswith('flags')), [])
    units = [f for f in ('avx2', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'amx_tile') if f in flags]
    yield Finding(OK, 'processor', f'{names[0] if names else "unknown"}, {" ".join(units) or "no AVX2"}')


def _gpu(answers: Dict[str, Dict[str, Any]]) -> Iterator[Finding]:
    answer, driver = answers.get('gpu', {}), shutil.which('nvidia-smi')
    if 'error' in answer:
        if 'error' not in answers.get('torch', {}):
            yield Finding(
                WRONG, 'GPU', answer['error'], 'Update the driver, or install the build of torch that fits it.')
    elif answer.get('names'):
        yield Finding(OK, 'GPU', f'{", ".join(answer["names"])}, torch built for {answer["built"]}')
    elif driver and not answer.get('built'):
        yield Finding(NOTE, 'GPU', f'there is {driver}, but this torch is built for the CPU alone',
                      'Install torch from the index of its CUDA builds: https://pytorch.org/get-started/locally')
    else:
        yield Finding(OK, 'GPU', 'none')


def _size(folder: Path) -> str:
    total, files, began = 0, 0, time.monotonic()
    for directory, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(directory, name))
                total, files = total + status.st_size, files + 1
        if time.monotonic() - began > CACHE_SECONDS:
            return f'more than {total / 1e6:,.0f} MB in {files:,} files'
    return f'{total / 1e6:,.0f} MB in {files:,} files'


def _caches(answers: Dict[str, Dict[str, Any]]) -> Iterator[Finding]:
    home = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'))
    torch_home = Path(os.environ.get('TORCH_HOME') or home / 'torch') / 'hub' / 'checkpoints'
    hub = Path(os.environ.get('HF_HUB_CACHE') or Path(os.environ.get('HF_HOME') or home / 'huggingface') / 'hub')
    own = Path(os.environ.get('CSPNET_TIMM_CACHE') or home / PACKAGE)
    places = (
        ('torch\'s files', Path(answers.get('caches', {}).get('torch') or torch_home), 'TORCH_HOME'),
        ('the Hub\'s files', hub.expanduser(), 'HF_HOME'),
        ('compiled engine', own.expanduser(), 'CSPNET_TIMM_CACHE'),
    )
    for name, folder, variable in places:
        existing = next((p for p in (folder, *folder.parents) if p.exists()), Path('/'))
        if not os.access(existing, os.W_OK | os.X_OK):
            yield Finding(WRONG, f'cache: {name}', f'{folder}: cannot be written',
                          f'Name a folder of yours in {variable}.')
        elif folder.exists():
            yield Finding(OK, f'cache: {name}', f'{folder}: {_size(folder)}, '
                                                f'{shutil.disk_usage(folder).free / 1e9:,.0f} GB free')
        else:
            yield Finding(OK, f'cache: {name}', f'{folder}: not there yet')
    given = os.environ.get('CSPNET_TIMM_WEIGHTS', '').strip()
    if given:
        folder = Path(given).expanduser()
        if folder.is_dir():
            yield Finding(OK, 'CSPNET_TIMM_WEIGHTS', f'{folder}: {_size(folder)}')
        else:
            yield Finding(WRONG, 'CSPNET_TIMM_WEIGHTS', f'{given}: there is no such folder',
                          f'Name a folder that `{DISTRIBUTION} download` has filled, or unset it.')


def _environment() -> Iterator[Finding]:
    prefixes = ('CSPNET_TIMM_', 'TORCH', 'HF_', 'TIMM_', 'CUDA_VISIBLE', 'OMP_', 'MKL_', 'PYTHONPATH',
                'LD_LIBRARY_PATH', 'TRANSFORMERS_OFFLINE')
    for name in sorted(os.environ):
        proxy = name.lower() in ('http_proxy', 'https_proxy', 'all_proxy', 'no_proxy')
        if not proxy and not name.startswith(prefixes):
            continue
        value = os.environ[name]
        if re.search('TOKEN|SECRET|PASSWORD|KEY', name):
            value = '(set)'
        elif '@' in value:
            value = re.sub(r'//[^/@]*@', '//…@', value)
        yield Finding(NOTE, name, value)
    if any(os.environ.get(n, '').strip().lower() in ('1', 'on', 'yes', 'true') for n in ('HF_HUB_OFFLINE',)):
        yield Finding(NOTE, 'offline', 'HF_HUB_OFFLINE is set: weights come from caches and CSPNET_TIMM_WEIGHTS alone')


def _network(hosts: Sequence[str]) -> Iterator[Finding]:
    from .sources import describe_failure, open_url

    answers: Dict[str, str] = {}

    def ask(host: str) -> None:
        import urllib.error
        try:
            with open_url(host, 'HEAD', follow=False):
                answers[host] = ''
        except urllib.error.HTTPError:
            answers[host] = ''  # it answers, whatever it thinks of the question
        except Exception as error:
            answers[host] = describe_failure(error)

    threads = [threading.Thread(target=ask, args=(host,), daemon=True) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(12)
    for host in hosts:
        why = answers.get(host, 'no answer in time')
        yield Finding(WRONG if why else OK, urlsplit(host).netloc, why or 'answers', '' if not why else (
            f'Files of this host: fetch them elsewhere by `{DISTRIBUTION} download`, and name the folder in '
            'CSPNET_TIMM_WEIGHTS. Behind a proxy, set HTTPS_PROXY.'))


def examine(network: bool = False, hosts: Sequence[str] = HOSTS) -> Iterator[Finding]:
    """Examine the installation and the machine.

    Args:
        network: Ask the hosts of the weights whether they answer; without, no host is asked anything.
        hosts: Addresses of hosts.

    Yields:
        What is found, in the order of the report. A check that fails itself is a finding, too.
    """
    answers: Dict[str, Dict[str, Any]] = {}
    sections: List[Callable[[], Iterator[Finding]]] = [
        _python, _own, _processor, _compiler,
        lambda: _packages(answers), lambda: _registration(answers), lambda: _deployment(answers), lambda: _gpu(answers),
        lambda: _caches(answers), _environment,
    ]
    if network:
        sections.append(lambda: _network(hosts))
    for index, section in enumerate(sections):
        if index == 4:
            answers.update(_probe())
        try:
            yield from section()
        except Exception as error:  # one check that fails takes no other along
            yield Finding(WRONG, 'doctor', f'a check failed: {type(error).__name__}: {error}',
                          'This is a bug of the package: please report it.')


def report(network: bool = False) -> int:
    """Print what :func:`examine` finds, each thing that is wrong with its remedy.

    Args:
        network: As for :func:`examine`.

    Returns:
        The exit code: 1 if something is wrong.
    """
    wrong = 0
    for finding in examine(network):
        line = f'{finding.state:<5}  {finding.subject:<22}  {finding.detail}'
        encoding = sys.stdout.encoding or 'utf-8'
        print(line.encode(encoding, 'replace').decode(encoding), flush=True)
        if finding.remedy:
            print(f'{"":<7}-> {finding.remedy}'.encode(encoding, 'replace').decode(encoding), flush=True)
        wrong += finding.state == WRONG
    print('Nothing is wrong.' if not wrong else f'{wrong} {"thing is" if wrong == 1 else "things are"} wrong.')
    return int(wrong > 0)


if __name__ == '__main__':
    sys.path[:] = json.loads(os.environ.pop('_CSPNET_TIMM_PATH'))
    _serve(sys.argv[1:])
