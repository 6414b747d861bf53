"""Outputs of the reference implementations, and the rule that makes the weights they were computed with.

A file in ``tests/parity`` holds the reference's maps and, in its metadata, the names and shapes of its parameters; the
values follow from the names.
"""
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

FOLDER = Path(__file__).with_name('parity')


def _value(key, shape):
    rs = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith('num_batches_tracked'):
        return np.zeros(shape, dtype=np.int64)
    if key.endswith(('running_var', '_variance')):
        value = 0.5 + rs.random_sample(shape)
    elif key.endswith(('running_mean', '_mean')):
        value = 0.2 * rs.standard_normal(shape)
    elif len(shape) >= 2:
        value = rs.standard_normal(shape) * np.sqrt(1.6 / np.prod(shape[1:]))
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
