"""Hostile pickles: refused by name, nothing run, and no more memory than the file accounts for."""
import functools
import io
import operator
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cspnet_timm.checkpoints import CheckpointError, open_checkpoint, read_foreign
from cspnet_timm.checkpoints.containers import Container
from cspnet_timm.checkpoints.unpickle import _OPCODES, _RULES, Budget, Record, Symbol
from tests import foreign

CANARY = []  # what a pickle that is run would leave something in


def touch_canary(*args):
    CANARY.append(args)
    return args


@pytest.fixture(autouse=True)
def _canary_stays_empty():
    CANARY.clear()
    yield
    assert not CANARY


def write(path, data):
    path.write_bytes(data)
    return path


def read(path):
    with open_checkpoint(path) as checkpoint:
        return checkpoint.state_dict()


def opcodes(*parts):
    """A pickle of protocol 4 by hand; strings become globals' names and texts, bytes are taken as they are."""
    return b'\x80\x04' + b''.join(parts) + b'.'


def text(value):
    data = value.encode()
    return b'X' + struct.pack('<I', len(data)) + data


def name(module, attribute):
    return text(module) + text(attribute) + b'\x93'


def call(module, attribute, *args):
    return name(module, attribute) + b'(' + b''.join(args) + b'tR'


# What may be named


@pytest.mark.parametrize('module, attribute', [
    ('os', 'system'), ('posix', 'system'), ('nt', 'system'), ('subprocess', 'Popen'), ('builtins', 'eval'),
    ('builtins', 'exec'), ('builtins', 'compile'), ('builtins', '__import__'), ('builtins', 'open'),
    ('builtins', 'type'), ('builtins', 'vars'), ('builtins', 'map'), ('builtins', 'setattr'), ('__builtin__', 'eval'),
    ('importlib', 'import_module'), ('runpy', '_run_code'), ('functools', 'partial'), ('functools', 'reduce'),
    ('operator', 'attrgetter'), ('operator', 'methodcaller'), ('operator', 'itemgetter'), ('types', 'CodeType'),
    ('types', 'FunctionType'), ('torch', 'load'), ('torch', 'hub'), ('torch.hub', 'load'), ('torch.jit', 'load'),
    ('torch.serialization', 'load'), ('torch.storage', '_load_from_bytes'), ('torch._utils', '_import_dotted_name'),
    ('torch.utils.cpp_extension', 'load'), ('torch.utils._config_module', 'ConfigModule'), ('torch', 'tensor'),
    ('torch.distributed.rpc', 'rpc_sync'), ('torch._inductor.codecache', 'compile_file'), ('torch', 'load.os'),
    ('torch.nn', 'modules.os.system'), ('numpy', 'load'), ('numpy', 'fromfile'), ('numpy.f2py', 'compile'),
    ('numpy.testing._private.utils', 'runstring'), ('numpy.distutils.exec_command', 'exec_command'),
    ('collections', 'OrderedDict.fromkeys'), ('collections', 'namedtuple'), ('_codecs', 'decode'),
    ('copyreg', '__newobj__'), ('copyreg', 'add_extension'), ('pickle', 'loads'), ('_pickle', 'loads'),
    ('dill._dill', '_create_function'), ('cloudpickle', '_make_function'), ('pathlib', 'Path.unlink'),
    ('pathlib', 'os'), ('argparse', 'os'), ('datetime', 'sys'), ('modelsx', 'Conv'), ('ultralyticsx.a', 'B'),
    ('ultralytics', 'os.system'), ('utils', '__builtins__.eval'), ('models', 'a b'), ('ultralytics.\udc80', 'A'),
    ('tests.test_unpickle', 'touch_canary'), ('__main__', 'x'), ('', ''), ('os\nsystem', 'x'),
])
@pytest.mark.parametrize('protocol', (2, 4))
def test_names_outside_the_tables_are_refused(module, attribute, protocol, tmp_path):
    if protocol == 4 or '\n' in module or '\udc80' in module:  # which GLOBAL cannot write
        data = opcodes(text_any(module) + text_any(attribute) + b'\x93')
    else:
        data = b'\x80\x02c' + f'{module}\n{attribute}\n'.encode() + b'.'
    with pytest.raises(CheckpointError, match=r'names|damaged') as error:
        read(write(tmp_path / 'a.pt', data))
    assert str(tmp_path / 'a.pt') in str(error.value) and '\n' not in str(error.value)


def text_any(value):
    data = value.encode('utf-8', 'surrogatepass')
    return b'X' + struct.pack('<I', len(data)) + data


class Reduces:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


ATTACKS = {
    'os.system': lambda: Reduces(os.system, 'touch pwned'),
    'eval': lambda: Reduces(eval, '__import__("os").mkdir("pwned")'),
    'exec': lambda: Reduces(exec, 'import os; os.mkdir("pwned")'),
    'nested': lambda: Reduces(list, [Reduces(tuple, [Reduces(os.mkdir, 'pwned')])]),
    'canary': lambda: Reduces(touch_canary, 1),
    'getattr': lambda: Reduces(getattr, Reduces(__import__, 'os'), 'mkdir'),
    'partial': lambda: functools.partial(os.mkdir, 'pwned'),
    'attrgetter': lambda: operator.attrgetter('system'),
    'torch.load': lambda: Reduces(torch.load, 'x'),
    'numpy.load': lambda: Reduces(np.load, 'x'),
    'object array': lambda: np.array([Reduces(os.mkdir, 'pwned')], dtype=object),
}


@pytest.mark.parametrize('where', ('root', 'beside the weights', 'in the state dict', 'as a key'))
@pytest.mark.parametrize('attack', ATTACKS)
@pytest.mark.parametrize('kind', ('zip', 'legacy', 'pickle 2', 'pickle 5'))
def test_attacks_run_nothing(attack, where, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = ATTACKS[attack]()
    weights = {'conv.weight': np.zeros((2, 2), np.float32) if 'pickle' in kind else torch.zeros(2, 2)}
    content = {
        'root': bad, 'beside the weights': {'state_dict': weights, 'extra': bad},
        'in the state dict': {'state_dict': {**weights, 'x': bad}}, 'as a key': {'state_dict': weights, 1: [(bad,)]},
    }[where]
    path = tmp_path / 'a.pt'
    if 'pickle' in kind:
        path.write_bytes(pickle.dumps(content, protocol=int(kind[-1])))
    else:
        foreign.save(content, path, legacy=kind == 'legacy')
    with pytest.raises(CheckpointError):
        read(path)
    assert not (tmp_path / 'pwned').exists()


def conv_tensor(storage, key='0', numel=4, shape=(4,), stride=(1,), offset=0):
    pid = name('torch', storage).join((b'(' + text('storage'), b'')) + text(key) + text('cpu') + number(numel) + b'tQ'
    sizes = b'(' + b''.join(map(number, shape)) + b't' + b'(' + b''.join(map(number, stride)) + b't'
    return name('torch._utils', '_rebuild_tensor_v2') + b'(' + pid + number(offset) + sizes + b'\x89N' + b'tR'


def number(value):
    data = value.to_bytes(9, 'little', signed=True)
    return b'\x8a\x09' + data


@pytest.mark.parametrize('body', [
    b'cos\nsystem\n(X\x04\x00\x00\x00exittR',
    call('builtins', 'getattr', name('torch._utils', '_rebuild_tensor_v2'), text('__globals__')),
    call('builtins', 'getattr', name('ultralytics.a', 'B'), text('__init__')),
    call('builtins', 'getattr', call('builtins', 'getattr', name('ultralytics.a', 'B'), text('c')), text('d')),
    call('builtins', 'getattr', b'}', text('update')),
    call('builtins', 'getattr', name('builtins', 'str'), text('format')),
    call('builtins', 'getattr', name('ultralytics.a', 'B'), text('b')) + b')R',  # calls what getattr gave
    call('builtins', 'getattr', name('ultralytics.a', 'B'), text('b')) + b')\x81',
    call('builtins', 'getattr', name('ultralytics.a', 'B'), text('b')) + b'}b',
    call('builtins', 'getattr', name('ultralytics.a', 'B'), text('b')) + text('c') + b'\x93',
    name('ultralytics.a', 'B') + b'}b',  # sets attributes of a class
    name('ultralytics.a', 'B') + text('x') + b'K\x01s',
    name('ultralytics.a', 'B') + b')R)R',  # calls an object
    b'}}b' + b'K\x01R',
    b']}b', b')}b', b'K\x01}b', b'\x8f}b', b'X\x00\x00\x00\x00}b',
    b']K\x01K\x02s', b'}K\x01a', b')K\x01a', b'](K\x01\x90', b'}(K\x01u',
    b'}]K\x01s', b'}}K\x01s', b'\x8f(]\x90', b'(]\x91', b'}' + b'K\x01' * 3 + b'\x87\x85\x85K\x01s',
    call('collections', 'OrderedDict', name('ultralytics.a', 'B')),
    call('collections', 'OrderedDict', b'(K\x01K\x02K\x03l'),
    call('collections', 'defaultdict', call('torch', 'Size', b')')),
    call('collections', 'Counter', text('abc')),
    call('builtins', 'set', text('abc')), call('builtins', 'list', b'}'), call('builtins', 'tuple', b'K\x01'),
    call('builtins', 'bytes', b'J\xff\xff\xff\x7f'), call('builtins', 'bytearray', b'J\xff\xff\xff\x7f'),
    call('builtins', 'int', text('1')), call('builtins', 'str', b'K\x01'), call('builtins', 'object'),
    call('builtins', 'complex', text('1'), text('2')),
    call('_codecs', 'encode', text('abc'), text('rot13')), call('_codecs', 'encode', b'K\x01', text('latin1')),
    call('_codecs', 'encode', text('\u20ac'), text('latin1')),
    call('copyreg', '_reconstructor', name('builtins', 'object'), name('builtins', 'object'), b'N'),
    call('copyreg', '_reconstructor', name('models.a', 'B'), name('builtins', 'str'), text('x')),
    call('numpy', 'dtype', text('O8'), b'\x89', b'\x88'), call('numpy', 'dtype', text('V8')),
    call('numpy', 'dtype', b'K\x01'), call('numpy', 'dtype', text('f4' * 100)), call('numpy', 'dtype', text('f')),
    call('numpy.core.multiarray', '_reconstruct', name('ultralytics.a', 'B'), b'K\x00\x85', text('b')),
    call('numpy.core.multiarray', '_reconstruct', name('numpy', 'ndarray'), number(10 ** 9) + b'\x85', text('b')),
    call('numpy._core.multiarray', 'scalar', call('numpy', 'dtype', text('f8')), b'C\x01a'),
    call('numpy._core.multiarray', 'scalar', text('f8'), b'C\x08aaaaaaaa'),
    call('torch._utils', '_rebuild_tensor_v2', b'N', b'K\x00', b')', b')', b'\x89', b'N'),
    call('torch._utils', '_rebuild_parameter', b'K\x01', b'\x88', b'N'),
    call('torch._tensor', '_rebuild_from_type_v2', name('builtins', 'getattr'), name('torch', 'Tensor'), b')', b'N'),
    call('torch._tensor', '_rebuild_from_type_v2', name('builtins', 'set'), name('torch', 'Tensor'), b')', b'N'),
    name('numpy', 'ndarray') + b')R', name('torch', 'FloatStorage') + b')R', name('torch', 'float32') + b')R',
    b'K\x01Q',  # a persistent id where there are no storages
    b'\x82\x01', b'\x83\x01\x00', b'\x84\x01\x00\x00\x00',  # copyreg's extension codes
    b'Pabc\n', b"S'abc'\n", b'Vabc\n', b'I1\n', b'L1L\n', b'F1\n', b'(ios\nsystem\n', b'(' + name('models', 'A') + b'o',
    b'p0\n', b'g0\n', b'\x97', b'\x98', b'\xff', b'0', b'1', b'2', b'a', b's', b'u', b't', b'\x85', b'h\x05',
    b'j\xff\xff\xff\xff',
    b'\x8b\xff\xff\xff\x7f', b'\x8b\xff\xff\xff\xff', b'\x8a\xff' + b'\x01' * 255,
    b'B\xff\xff\xff\xff', b'\x8e' + b'\xff' * 8, b'\x8e' + b'\xff' * 7 + b'\x7f', b'\x96' + b'\xff' * 8,
    b'X\xff\xff\xff\xff', b'\x8d' + b'\xff' * 8, b'T\xff\xff\xff\xff', b'\x95' + b'\xff' * 8, b'C\xff', b'U\xff',
    b'\x8c\xff', b'X\x01\x00\x00\x00\xff', b'\x80\x01', b'\x80\x06', b'G\x00', b'', b'q', b'c' + b'a' * 1000, b'ca\n',
    b'c\xff\n\xff\n',
], ids=lambda body: body.hex()[:24])
def test_bodies_that_are_refused(body, tmp_path):
    with pytest.raises(CheckpointError):
        read(write(tmp_path / 'a.pt', b'\x80\x04' + body + b'.'))


def test_objects_of_frameworks_become_records(tmp_path):
    with foreign.made_up('models.deep.Thing', 'utils.Other') as (thing, other):
        value = thing()
        value.a, value.b = 1, [other()]
        value.b[0].again = value
        data = pickle.dumps({'x': value, 'kind': other, 'path': Path('/a/b')}, protocol=4)
    with Container(write(tmp_path / 'a.pt', data)) as container:
        root = container.root
    assert type(root['x']) is Record and str(root['x']) == 'models.deep.Thing'
    assert root['x'].state['a'] == 1 and root['x'].state['b'][0].state['again'] is root['x']
    assert type(root['kind']) is Symbol
    assert str(root['path']) == 'pathlib.PosixPath' and root['path'].args == ('/', 'a', 'b')
    assert 'models' not in sys.modules and 'utils' not in sys.modules


def test_nothing_is_imported(tmp_path):
    """Names of modules that exist and would do something when imported."""
    (tmp_path / 'models.py').write_text('raise SystemExit("imported")')
    (tmp_path / 'a.pt').write_bytes(opcodes(name('models', 'A') + b')\x81}X\x01\x00\x00\x00aK\x01sb'))
    script = textwrap.dedent('''
        import sys
        from cspnet_timm.checkpoints import CheckpointError, open_checkpoint, pickled
        before = set(sys.modules)
        try:
            open_checkpoint("a.pt")
        except CheckpointError as error:
            print(error)
        print(set(sys.modules) - before)
    ''')
    done = subprocess.run([sys.executable, '-c', 'import sys; sys.path.insert(0, "")\n' + script], cwd=tmp_path,
                          capture_output=True, text=True, check=True, env={**os.environ, 'PYTHONPATH': os.pathsep.join(
                              [str(Path(__file__).parents[1]), *sys.path])})
    assert done.stdout.splitlines() == ['a.pt: it is a pickle that holds no weights.', 'set()']


def test_every_rule_builds_data_only():
    """No rule, and no name that may stand, is anything that could be called to an effect: the table is closed."""
    for module, attribute in _RULES:
        assert (module, attribute) not in {('builtins', n) for n in ('eval', 'exec', 'open', '__import__', 'type')}
        assert module.split('.')[0] in ('torch', 'numpy', 'builtins', '_codecs', 'collections', 'copyreg')
    names = {op.code.encode('latin-1')[0]: op.name for op in pickletools.opcodes}
    known = {names[code] for code in _OPCODES} | {'STOP'}
    assert not known & {'EXT1', 'EXT2', 'EXT4', 'INST', 'OBJ', 'PERSID', 'NEXT_BUFFER', 'READONLY_BUFFER', 'GET', 'PUT'}


# Memory


@pytest.fixture
def small_allowance(monkeypatch):
    """Files of a megabyte are to be refused."""
    monkeypatch.setattr(Budget, 'ALLOWANCE', ALLOWANCE)


def peak(function, *args):
    tracemalloc.start()
    try:
        try:
            function(*args)
            raised = False
        except CheckpointError:
            raised = True
        return tracemalloc.get_traced_memory()[1], raised
    finally:
        tracemalloc.stop()


ALLOWANCE = 1 << 20
SLACK = ALLOWANCE + (1 << 18)
N = 1_000_000


BODIES = [  # a third of them is fast
    b']' * N, b'}' * N, b')' * N, b'\x8f' * N, b'(' * N, b'N' * N, b'K\x01' * N, b'J\xff\xff\xff\x7f' * (N // 4),
    b']' + b'2' * N, b'G\x00\x00\x00\x00\x00\x00\x00\x01' * (N // 8), b']' + b'\x94' * N,
    b']' + b'\x94h\x00h\x00\x86' * (N // 6), b'\x8c\x01a' * (N // 3),
    b']q\x00' + b'(h\x00h\x00e' * (N // 6),  # a list that doubles by itself
    b'}q\x00' + b'(K\x01h\x00K\x02h\x00u' * (N // 10), b']' + b'\x85' * N, b']' + b'(' + b'K\x01' * N + b'e',
    b']' + b''.join(b'r' + struct.pack('<I', i * 7919) for i in range(N // 5)),
    b']q\x00' + (name('builtins', 'list') + b'h\x00\x85R') * (N // 40),
    b'](' + b'K\x01' * 10000 + b'eq\x00' + (name('builtins', 'tuple') + b'q\x01')
    + b'h\x01h\x00\x85R' * (N // 6),
    name('models', 'A') + b'q\x00' + b'h\x00)R' * (N // 4),
    b'X\xff\x00\x00\x00' + b'\xf0\x9f\x98\x80' + b'a' * 251 + b''.join(
        b'X\xff\x00\x00\x00' + b'\xf0\x9f\x98\x80' + b'a' * 251 for _ in range(N // 260)),
]


@pytest.mark.parametrize('body', [
    pytest.param(body, marks=pytest.mark.slow) if i % 3 else body for i, body in enumerate(BODIES)
], ids=lambda body: body[:12].hex())
def test_small_opcodes_cannot_fill_the_memory(body, tmp_path, small_allowance):
    path = write(tmp_path / 'a.pt', b'\x80\x04' + body + b'.')
    used, raised = peak(read, path)
    assert raised and used <= 2 * path.stat().st_size + SLACK


@pytest.mark.parametrize('step', (
    b'\x85', b']\x86', *(pytest.param(step, marks=pytest.mark.slow) for step in (b'\x85\x85', b']\x85', b'}\x86')),
), ids=lambda step: step.hex())
def test_deep_nesting_ends_without_a_crash(step, tmp_path):
    path = write(tmp_path / 'a.pt', b'\x80\x04' + b']' + step * 300_000 + b'.')
    os.truncate(path, 100_000_000)  # of which that many objects may be made
    with pytest.raises(CheckpointError):
        read(path)


def test_modules_within_modules_end(tmp_path):
    """A hundred modules, each of which has the next one twice: walked by name they would be 2^100."""
    def module(children):
        empty = text('_parameters') + b'}s' + text('_buffers') + b'}s'
        return name('models', 'A') + b')\x81}' + empty + text('_modules') + b'}' + children + b'sb'

    body = module(b'') + b'q\x00'
    for _ in range(100):
        body += module(text('a') + b'h\x00s' + text('b') + b'h\x00s') + b'q\x00'
    with pytest.raises(CheckpointError, match='nested or repeated'):
        read(write(tmp_path / 'a.pt', b'\x80\x04' + body + b'.'))
    loop = name('models', 'A') + b')\x81q\x00}' + b''.join(
        text(k) + b'}' + (text('a') + b'h\x00s' if k == '_modules' else b'') + b's'
        for k in ('_modules', '_parameters', '_buffers')) + b'b'
    with pytest.raises(CheckpointError, match='nested or repeated'):
        read(write(tmp_path / 'b.pt', b'\x80\x04' + loop + b'.'))


def test_dicts_within_dicts_end(tmp_path):
    body = b'}q\x00' + b''.join(
        text(k) + b'h\x00s' for k in ('state_dict', 'model', 'ema', 'params', 'module', 'model_ema', 'state_dict_ema'))
    with pytest.raises(CheckpointError, match='no weights'):
        read(write(tmp_path / 'a.pt', b'\x80\x04' + body + b'.'))


@pytest.mark.slow
def test_reading_takes_twice_the_size_at_most(tmp_path):
    """Of the resident memory of a process of its own, which counts torch's allocations as well."""
    weights = {f'w{i}': torch.rand(1000, 1000).half() for i in range(20)}
    torch.save({'state_dict': weights}, tmp_path / 'half.pt')
    torch.save({'state_dict': {k: v.t() for k, v in weights.items()}}, tmp_path / 'transposed.pt',
               _use_new_zipfile_serialization=False)
    with open(tmp_path / 'a.pdparams', 'wb') as file:
        pickle.dump({k: v.float().numpy() for k, v in weights.items()}, file, protocol=2)
    script = textwrap.dedent('''
        import os, resource, sys, threading
        from cspnet_timm.checkpoints import open_checkpoint
        import cspnet_timm.checkpoints.pickled
        import torch
        torch.rand(10).half().float()
        def resident():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before = resident()
        with open_checkpoint(sys.argv[1]) as checkpoint:
            described = resident() - before
            tensors = checkpoint.state_dict()
        assert sum(v.numel() for v in tensors.values()) == 20_000_000
        print(described, resident() - before, os.path.getsize(sys.argv[1]))
    ''')
    for file in ('half.pt', 'transposed.pt', 'a.pdparams'):
        done = subprocess.run(
            [sys.executable, '-c', script, str(tmp_path / file)], capture_output=True, text=True, check=True,
            env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])})
        described, used, size = map(int, done.stdout.split())
        assert described < 8 << 20 and used <= 2 * size + (8 << 20), (file, described, used, size)


# Storages and archives


def zipped(path, pickle_bytes, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', compression) as file:
        file.writestr('a/data.pkl', pickle_bytes)
        file.writestr('a/byteorder', 'little')
        for key, data in members.items():
            file.writestr(f'a/data/{key}', data)
    return path


def in_dict(*tensors):
    return opcodes(b'}' + b''.join(text(f'w{i}') + tensor + b's' for i, tensor in enumerate(tensors)))


def test_a_handmade_archive_reads(tmp_path):
    data = struct.pack('<4f', 1, 2, 3, 4)
    path = zipped(tmp_path / 'a.pt', in_dict(
        conv_tensor('FloatStorage'), conv_tensor('FloatStorage', shape=(2, 2), stride=(1, 2))), {'0': data})
    tensors = read(path)
    assert tensors['w0'].tolist() == [1, 2, 3, 4] and tensors['w1'].tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize('tensors, data, message', [
    ([dict(numel=10 ** 12, shape=(10 ** 12,))], 16, 'bytes, but its pickle claims'),
    ([dict(numel=3, shape=(3,))], 16, 'bytes, but its pickle claims'),
    ([dict(shape=(5,))], 16, 'larger than its storage'),
    ([dict(shape=(4,), offset=1)], 16, 'larger than its storage'),
    ([dict(shape=(2,), stride=(4,))], 16, 'larger than its storage'),
    ([dict(shape=(2,), offset=-1)], 16, 'negative'),
    ([dict(shape=(2,), stride=(-1,))], 16, 'shape or stride'),
    ([dict(shape=(-1,))], 16, 'shape or stride'),
    ([dict(shape=(2, 2), stride=(1,))], 16, '2 sizes but 1 strides'),
    ([dict(shape=(1,) * 17, stride=(1,) * 17)], 16, 'shape or stride'),
    ([dict(shape=(10 ** 9,), stride=(0,))], 16, 'repeats or skips'),
    ([dict(shape=(4, 2), stride=(1, 0))], 16, 'repeats or skips'),
    ([dict(shape=(3, 2), stride=(1, 1))], 16, 'repeats or skips'),
    ([dict(shape=(2,), stride=(2,))], 16, 'repeats or skips'),
    ([dict(shape=(2 ** 30, 2 ** 30, 0), stride=(1, 1, 1))], 16, 'beyond any memory'),
    ([dict(shape=(2 ** 50,))], 16, 'shape or stride'),
    ([dict(), dict(shape=(2,), offset=1)], 16, 'overlap'),
    ([dict(shape=(3,)), dict(shape=(3,), offset=1)], 16, 'overlap'),
    ([dict(), dict(numel=5, shape=(5,))], 16, 'bytes, but its pickle claims'),
    ([dict(key='1')], 16, 'not in the archive'),
    ([dict(key='../../data.pkl')], 16, 'not in the archive'),
])
def test_storages_are_held_against_the_file(tensors, data, message, tmp_path):
    path = zipped(tmp_path / 'a.pt', in_dict(*[conv_tensor('FloatStorage', **t) for t in tensors]), {'0': b'\0' * data})
    used, raised = peak(read, path)
    assert raised and used < SLACK
    with pytest.raises(CheckpointError, match=message):
        read(path)


def test_tensors_may_share_a_storage(tmp_path):
    w = torch.arange(12.)
    torch.save({'a': w[:6], 'b': w[6:].view(2, 3).t(), 'tied': w[:6], 'c': torch.zeros(0), 'd': torch.tensor(3.)},
               tmp_path / 'a.pt')
    tensors = read(tmp_path / 'a.pt')
    assert torch.equal(tensors['a'], w[:6]) and torch.equal(tensors['b'], w[6:].view(2, 3).t())
    assert tensors['tied'].data_ptr() == tensors['a'].data_ptr() and tensors['c'].shape == (0,) and tensors['d'] == 3


def test_zip_bombs_and_broken_archives(tmp_path):
    good = in_dict(conv_tensor('FloatStorage'))
    data = b'\0' * 16
    bomb = zipped(tmp_path / 'bomb.pt', good, {'0': b'\0' * 100_000_000}, zipfile.ZIP_DEFLATED)
    used, raised = peak(read, bomb)
    assert raised and used < SLACK
    with pytest.raises(CheckpointError, match='compressed'):
        read(bomb)
    with pytest.raises(CheckpointError, match=r'none that torch\.save writes'):
        zipped(tmp_path / 'b.pt', good, {})
        with zipfile.ZipFile(tmp_path / 'c.pt', 'w') as file:
            file.writestr('a.txt', 'x')
        read(tmp_path / 'c.pt')
    path = zipped(tmp_path / 'd.pt', good, {'0': data})
    with zipfile.ZipFile(path, 'a') as file:
        file.writestr('a/constants.pkl', b'')
    with pytest.raises(CheckpointError, match='TorchScript'):
        read(path)
    whole = zipped(tmp_path / 'e.pt', good, {'0': data}).read_bytes()
    with pytest.raises(CheckpointError, match='byte order'):
        read(write(tmp_path / 'f.pt', whole.replace(b'little', b'bigbig')))
    with pytest.raises(CheckpointError, match='checksum'):
        at = whole.index(data)
        read(write(tmp_path / 'g.pt', whole[:at] + b'\x01' + whole[at + 1:]))
    # Two members at one place
    at = whole.rindex(b'PK\x01\x02')
    start = struct.unpack_from('<I', whole, whole.index(b'PK\x01\x02') + 42)
    with pytest.raises(CheckpointError, match=r'overlaps|not where'):
        read(write(tmp_path / 'h.pt', whole[:at + 42] + struct.pack('<I', *start) + whole[at + 46:]))
    # A member that claims to be larger than the file
    with pytest.raises(CheckpointError, match='claims'):
        read(write(tmp_path / 'i.pt', whole[:at + 20] + struct.pack('<II', 1 << 30, 1 << 30) + whole[at + 28:]))
    # A directory of millions of entries
    with pytest.raises(CheckpointError, match='directory'):
        end = whole.rindex(b'PK\x05\x06')
        read(write(tmp_path / 'j.pt', whole[:end + 8] + struct.pack('<HH', 0xfffe, 0xfffe) + whole[end + 12:]))


def test_a_directory_of_many_entries_is_paid_for(tmp_path, small_allowance):
    with zipfile.ZipFile(tmp_path / 'a.pt', 'w') as file:
        for i in range(30000):
            file.writestr(f'{i:x}', b'')
    used, raised = peak(read, tmp_path / 'a.pt')
    assert raised and used <= 2 * (tmp_path / 'a.pt').stat().st_size + SLACK


def test_legacy_storages_are_held_against_the_file(tmp_path):
    torch.save({'w': torch.zeros(4)}, tmp_path / 'a.pt', _use_new_zipfile_serialization=False)
    data = (tmp_path / 'a.pt').read_bytes()
    assert data.endswith(struct.pack('<q', 4) + b'\0' * 16)
    for numel in (5, 3, -1, 1 << 60):
        with pytest.raises(CheckpointError, match='elements'):
            read(write(tmp_path / 'b.pt', data[:-24] + struct.pack('<q', numel) + b'\0' * 16))
    at = data.index(b'\x88', data.index(b'little_endian'))
    with pytest.raises(CheckpointError, match='big-endian'):
        read(write(tmp_path / 'c.pt', data[:at] + b'\x89' + data[at + 1:]))


@pytest.mark.parametrize('dtype', ('float16', 'bfloat16', 'float32', 'float64', 'int64', 'uint8', 'bool'))
@pytest.mark.parametrize('legacy', (False, True))
def test_types(dtype, legacy, tmp_path):
    w = (torch.rand(3, 5) * 10).to(getattr(torch, dtype))
    torch.save({'w': w, 'p': nn.Parameter(torch.rand(2))}, tmp_path / 'a.pt', _use_new_zipfile_serialization=not legacy)
    out = read(tmp_path / 'a.pt')['w']
    assert out.dtype == (torch.float32 if '16' in dtype else w.dtype) and torch.equal(out, w.to(out.dtype))


@pytest.mark.parametrize('protocol', (2, 3, 4, 5))
@pytest.mark.parametrize('dtype', ('<f2', '<f4', '<f8', '<i8', '|u1', '|b1'))
def test_numpy_arrays(protocol, dtype, tmp_path):
    arrays = {'w': np.random.rand(7, 9) * 200, 'big': np.random.rand(90, 70) * 250, 'n': np.array(3.)}
    arrays = {k: v.astype(dtype) for k, v in {**arrays, 'e': np.zeros((0, 3))}.items()}
    arrays['f'] = np.asfortranarray(arrays['big'])
    tensors = read(write(tmp_path / 'a.pdparams', pickle.dumps(arrays, protocol=protocol)))
    for key, value in arrays.items():
        assert np.array_equal(tensors[key].numpy(), value.astype(tensors[key].numpy().dtype)), key


def test_numpy_of_both_generations(tmp_path):
    data = pickle.dumps({'w': np.arange(4, dtype=np.float32), 's': np.float64(2.5)}, protocol=2)
    old, new = b'cnumpy.core.', b'cnumpy._core.'
    for spelled in (data.replace(new, old), data.replace(old, new)):
        path = write(tmp_path / 'a.pdparams', spelled)
        assert read(path)['w'].tolist() == [0, 1, 2, 3]
        with Container(path) as container:
            assert container.root['s'] == 2.5


def test_big_endian_arrays_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match='big-endian'):
        read(write(tmp_path / 'a.pdparams', pickle.dumps({'w': np.arange(4, dtype='>f4')}, protocol=4)))


# Damage


def small_files(folder):
    state_dict = {'layer.conv.weight': torch.rand(2, 3, 1, 1), 'layer.bn.weight': torch.rand(2), 'n': torch.tensor(3)}
    module = {'model.0.conv.weight': torch.rand(2, 3, 1, 1), 'model.0.bn.weight': torch.rand(2),
              'model.0.bn.bias': torch.rand(2), 'model.0.bn.running_mean': torch.rand(2),
              'model.0.bn.running_var': torch.rand(2), 'model.0.bn.num_batches_tracked': torch.tensor(1)}
    return [
        foreign.openmmlab_file(folder / 'a.pth', state_dict, training=True),
        foreign.openmmlab_file(folder / 'b.pth', state_dict, legacy=True, training=True),
        foreign.yolox_file(folder / 'c.pth', state_dict),
        foreign.ultralytics_file(folder / 'd.pt', module),
        foreign.ultralytics_file(folder / 'e.pt', module, legacy=True, half=True),
        foreign.paddle_file(folder / 'f.pdparams', state_dict),
        foreign.paddle_file(folder / 'g.pdparams', state_dict, protocol=2),
    ]


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('warnings.warn', lambda *args, **kwargs: None)
        return [path.read_bytes() for path in small_files(tmp_path_factory.mktemp('originals'))]


def check_damaged(path, data, strict=False):
    """A damaged file reads or is refused; nothing else comes of it."""
    path.write_bytes(data)
    try:
        read_foreign(path, nn.Identity())
    except CheckpointError as error:
        assert str(path) in str(error) and len(str(error)) < 2000
    else:
        assert not strict, 'a truncated file was read'


@pytest.mark.parametrize('step', [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize('index', range(7))
def test_truncated_anywhere(index, step, originals, tmp_path):
    data = originals[index]
    ends = range(len(data)) if len(data) < 2000 else [
        *range(300), *range(300, len(data) - 300, 19), *range(len(data) - 300, len(data))]
    for end in ends[::step]:
        check_damaged(tmp_path / 'a.pt', data[:end], strict=True)


# A fifth of what is tried where time does not matter; hypothesis draws others each time.
some_and_many = pytest.mark.parametrize('examples', [150, pytest.param(700, marks=pytest.mark.slow)])


def fuzz(examples, strategy, check):
    settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))(
        given(strategy)(check))()


@some_and_many
def test_mutations(originals, tmp_path, examples):
    """Bytes flipped, cut out, doubled and spliced from another file."""
    fuzz(examples, st.data(), lambda data: check_mutation(originals, tmp_path, data))


def check_mutation(originals, folder, data):
    body = bytearray(data.draw(st.sampled_from(originals)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(body) - 1, 0)))
        kind = data.draw(st.sampled_from(('flip', 'set', 'cut', 'double', 'splice', 'insert')))
        size = data.draw(st.integers(1, 64))
        if kind == 'flip' and body:
            body[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == 'set' and body:
            body[at] = data.draw(st.integers(0, 255))
        elif kind == 'cut':
            del body[at:at + size]
        elif kind == 'double':
            body[at:at] = body[at:at + size]
        elif kind == 'splice':
            other = data.draw(st.sampled_from(originals))
            start = data.draw(st.integers(0, len(other) - 1))
            body[at:at + size] = other[start:start + size]
        else:
            body[at:at] = data.draw(st.binary(min_size=1, max_size=16))
    check_damaged(folder / 'mutated.pt', bytes(body))


@some_and_many
def test_mutated_opcodes_within_a_sound_archive(originals, tmp_path, examples):
    """Damage that no checksum of the archive finds, since the pickle is packed again."""
    fuzz(examples, st.data(), lambda data: check_mutated_opcodes(
        originals, tmp_path / 'repacked.pt', data))


def check_mutated_opcodes(originals, path, data):
    with zipfile.ZipFile(io.BytesIO(data.draw(st.sampled_from([originals[0], originals[2], originals[3]])))) as file:
        members = {name: file.read(name) for name in file.namelist()}
    key = next(name for name in members if name.endswith('data.pkl'))
    body = bytearray(members[key])
    codes = sorted(_OPCODES)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(body) - 1))
        if data.draw(st.booleans()):
            body[at] = data.draw(st.sampled_from(codes))
        else:
            body[at:at + data.draw(st.integers(0, 3))] = bytes(data.draw(st.lists(st.sampled_from(codes), max_size=3)))
    with zipfile.ZipFile(path, 'w') as file:
        for name_, content in members.items():
            file.writestr(name_, bytes(body) if name_ == key else content)
    check_damaged(path, path.read_bytes())


OPCODES = st.lists(st.sampled_from([bytes([code]) for code in _OPCODES] + [
    b'K\x01', b'h\x00', b'q\x00', text('a'), name('models', 'A'), name('collections', 'OrderedDict'), b'\x85', b')',
    name('builtins', 'getattr'), name('builtins', 'set'), name('numpy', 'dtype'), name('torch', 'Size'), b'C\x01a',
]), max_size=60)


@some_and_many
def test_any_sequence_of_opcodes(tmp_path, examples):
    def check(parts):
        check_damaged(tmp_path / 'opcodes.pt', b'\x80\x04' + b''.join(parts) + b'.')

    fuzz(examples, OPCODES, check)
