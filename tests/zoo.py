"""Every model of the package, and the smallest one of each structure, for the suites to run over."""
import functools
import re

import timm
import torch

ALL = timm.list_models('cspnet_*')


@functools.cache
def structure(name):
    """What a model is made of, whatever its widths and depths: its modules' names without numbers, and their types."""
    model = timm.create_model(name, device='meta')
    return frozenset((re.sub(r'\d+', '#', n), type(m).__name__) for n, m in model.named_modules())


@functools.cache
def representatives():
    """The smallest model of each structure, for checks too expensive to run on all."""
    smallest = {}
    for name in ALL:
        params = sum(p.numel() for p in timm.create_model(name, device='meta').parameters())
        key = structure(name)
        if key not in smallest or params < smallest[key][0]:
            smallest[key] = (params, name)
    return sorted(name for _, name in smallest.values())


def create(name, **kwargs):
    """A model in eval mode with every parameter and every running statistic random, as trained weights are."""
    return randomize(timm.create_model(name, **kwargs)).eval()


@torch.no_grad()
def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        uniform = torch.rand(value.shape, generator=generator)
        normal = torch.randn(value.shape, generator=generator)
        if key.endswith('running_var'):
            value.copy_(0.5 + uniform)
        elif value.ndim > 1:
            value.copy_(normal * (1.6 / max(value[0].numel(), 1)) ** 0.5)
        elif key.endswith('weight'):
            value.copy_(0.6 + 0.8 * uniform)
        else:
            value.copy_(0.2 * normal)
    return model


def distance(a, b):
    """Relative distance of two tensors: ``|a - b| / |b|``."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
