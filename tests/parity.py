"""Outputs of the reference implementations, and the rule that makes the weights they were computed with.

A file in ``tests/parity`` holds the reference's maps and, in its metadata, the names and shapes of its parameters; the
values follow from the names. A reference in PyTorch is written by :func:`write_fixture`, in a script of its own that
imports the framework:

    from tests.parity import write_fixture
    write_fixture('net_s', net, {'stride8': 'backbone.layer2', 'stride16': 'backbone.layer3'}, (1, 3, 64, 96),
                  source='framework 1.2, configs/net_s.py', container='{"model"}')

    python -m tests.parity net_s  # the layout of a fixture: what is known of it, its maps, its parameters in file order
"""
import json
import math
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

FOLDER = Path(__file__).with_name('parity')

_RANDOM = np.random.RandomState()  # a new one for every tensor would take longer than most tensors do


def _value(key, shape):
    rs = _RANDOM
    rs.seed(zlib.crc32(key.encode()))
    if key.endswith('num_batches_tracked'):
        return np.zeros(shape, dtype=np.int64)
    if key.endswith(('running_var', '_variance')):
        value = 0.5 + rs.random_sample(shape)
    elif key.endswith(('running_mean', '_mean')):
        value = 0.2 * rs.standard_normal(shape)
    elif len(shape) >= 2:
        value = rs.standard_normal(shape) * math.sqrt(1.6 / math.prod(shape[1:]))
    elif key.endswith('alpha'):
        value = 0.25 + rs.random_sample(shape)
    elif key.endswith('weight'):
        value = 0.6 + 0.8 * rs.random_sample(shape)
    else:
        value = 0.2 * rs.standard_normal(shape)
    return np.asarray(value, dtype=np.float32)


def fill(keys):
    """The state dict of a reference network: {name: shape} in, {name: tensor} out, in the same order."""
    return {key: torch.from_numpy(_value(key, shape)) for key, shape in keys.items()}


def load_fixture(name):
    """What is known of a reference network, its state dict, the input, and its maps by name."""
    with safe_open(FOLDER / f'{name}.safetensors', 'pt') as file:
        info = json.loads(file.metadata()['info'])
        outputs = {key: file.get_tensor(key) for key in file.keys()}
    x = np.random.RandomState(zlib.crc32(b'input')).standard_normal(info['input'])
    return info, fill(info['keys']), torch.from_numpy(x.astype(np.float32)), outputs


def write_fixture(name, model, taps, input_size, folder=FOLDER, **info):
    """Fill a reference network by the rule, run it, and write what it computes.

    ``taps`` are the names of its modules by the names of the maps; '' is the whole network. What else is known, its
    source and how released files wrap their tensors, goes into ``info``.
    """
    modules = dict(model.named_modules())
    unknown = [module for module in taps.values() if module not in modules]
    if unknown:
        raise ValueError(f'the reference has no modules {unknown}; it has {sorted(modules)[:20]} and others.')
    state_dict = model.state_dict()
    keys = {key: list(value.shape) for key, value in state_dict.items()}
    model.load_state_dict(fill(keys))
    outputs = {}
    handles = [
        modules[module].register_forward_hook(
            lambda _, args, output, key=key: outputs.update({key: output.detach().clone().contiguous()}))
        for key, module in taps.items()
    ]
    x = np.random.RandomState(zlib.crc32(b'input')).standard_normal(input_size).astype(np.float32)
    try:
        with torch.no_grad():
            model.eval()(torch.from_numpy(x))
    finally:
        for handle in handles:
            handle.remove()
    norms = {(m.eps, m.momentum) for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    if len(norms) == 1:
        info['bn_eps'], info['bn_momentum'] = norms.pop()
    info.update(keys=keys, params=sum(p.numel() for p in model.parameters()), input=list(input_size))
    save_file(outputs, Path(folder) / f'{name}.safetensors', metadata={'info': json.dumps(info)})


def _print_layout(name):
    with safe_open(FOLDER / f'{name}.safetensors', 'pt') as file:
        info = json.loads(file.metadata()['info'])
        maps = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    keys = info.pop('keys')
    for title, entries in (('', info), ('maps', maps), ('parameters', keys)):
        print(*([f'{title}:'] if title else []), *(f'  {key}: {value}' for key, value in entries.items()), sep='\n')


if __name__ == '__main__':
    for argument in sys.argv[1:]:
        _print_layout(argument)
