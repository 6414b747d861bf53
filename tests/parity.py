"""The parity fixtures: what reference implementations computed from weights that follow from their keys."""
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

FIXTURES = Path(__file__).parent / 'parity'


def fill(keys):
    """Weights by key and shape, the same on every machine."""
    state_dict = {}
    for key, shape in keys.items():
        rs = np.random.RandomState(zlib.crc32(key.encode()))
        if 'num_batches_tracked' in key:
            state_dict[key] = torch.zeros(shape, dtype=torch.long)
            continue
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
        state_dict[key] = torch.from_numpy(np.asarray(value)).float()
    return state_dict


def load_fixture(name):
    """A fixture's info, state dict under the reference's keys, input, and outputs."""
    with safe_open(FIXTURES / f'{name}.safetensors', 'pt') as file:
        info = json.loads(file.metadata()['info'])
        outputs = {key: file.get_tensor(key) for key in file.keys()}
    rs = np.random.RandomState(zlib.crc32(b'input'))
    return info, fill(info['keys']), torch.from_numpy(rs.standard_normal(info['input'])).float(), outputs
