"""Every model of the package, and the smallest one of each structure, for the suites to run over."""
import functools
import re
from unittest import mock

import timm
import torch
import torch.nn as nn

from cspnet_timm.families import cspdensenet, peleenet

ALL = timm.list_models('cspnet_*')

# The smallest network with a neck of each composition; their stages are those that backbones have.
NECKS = (
    'cspnet_rtmdet_nano_pan', 'cspnet_yolox_nano_pan', 'cspnet_ppyoloe_plus_t_pan', 'cspnet_yolov8n_pan',
    'cspnet_yolo11n_pan', 'cspnet_yolo26n_pan', 'cspnet_yolov9t_pan',
    'cspnet_yolov4_tiny_pan', 'cspnet_yolov4_csp_pan', 'cspnet_damo_m_pan',
)


def of_features(state_dict, extractor):
    """A network's state dict as its feature extractor takes it: without the head, timm's getter with a prefix."""
    prefix = 'model.' if any(key.startswith('model.') for key in extractor.state_dict()) else ''
    return {prefix + k: v for k, v in state_dict.items() if not k.startswith('head.')}


def structure(model):
    """What a model is made of, whatever its widths, depths and activations: its modules' names and types."""
    modules = model.named_modules()
    return frozenset((re.sub(r'\d+', '#', n), type(m).__name__) for n, m in modules if not n.endswith('act'))


# The smallest model of each structure, for checks too expensive to run on all; test_stages.py holds that it is.
REPRESENTATIVES = (
    'cspnet_damo_m', 'cspnet_darknet53', 'cspnet_darknet53_elastic', 'cspnet_densenet121', 'cspnet_mobilenetv2',
    'cspnet_nano', 'cspnet_peleenet', 'cspnet_plain_darknet53', 'cspnet_plain_mobilenetv2', 'cspnet_plain_peleenet',
    'cspnet_plain_resnext50', 'cspnet_ppyoloe_t', 'cspnet_resnext50', 'cspnet_resnext50_elastic', 'cspnet_rtmdet_nano',
    'cspnet_rtmdet_tiny', 'cspnet_rtmdet_x_p6', 'cspnet_tutorial', 'cspnet_yolo11m', 'cspnet_yolo11m_cls',
    'cspnet_yolo11n', 'cspnet_yolo11n_cls', 'cspnet_yolov4', 'cspnet_yolov4_csp', 'cspnet_yolov4_tiny',
    'cspnet_yolov5n', 'cspnet_yolov5n_cls', 'cspnet_yolov8n', 'cspnet_yolov8n_cls', 'cspnet_yolov9c',
    'cspnet_yolov9c_cls', 'cspnet_yolov9m', 'cspnet_yolov9t', 'cspnet_yolox_nano', 'cspnet_yolox_tiny_keras',
)


def smallest_of_each_structure():
    """What ``REPRESENTATIVES`` has to be."""
    smallest = {}
    for name in ALL:
        if name.endswith('_pan'):
            continue
        model = timm.create_model(name, device='meta')
        params = sum(p.numel() for p in model.parameters())
        key = structure(model)
        if key not in smallest or params < smallest[key][0]:
            smallest[key] = (params, name)
    return tuple(sorted(name for _, name in smallest.values()))


def create(name, **kwargs):
    """A model in eval mode with every parameter and every running statistic random, as trained weights are."""
    if name.startswith(('cspnet_', 'stages_')):
        # Without computing the values that it would be trained from.
        return randomize(timm.create_model(name, device='meta', **kwargs).to_empty(device='cpu')).eval()
    return randomize(timm.create_model(name, **kwargs)).eval()


def create_for(backend, num_classes):
    """A small classifier for a backend; a few layers for the compiler, which takes seconds for each kernel."""
    if not backend.startswith('inductor'):
        return create('cspnet_nano', num_classes=num_classes)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, num_classes)).eval()


def create_short(name, **kwargs):
    """As :func:`create`, with two or three blocks alike in a row at most: what comes next, a compiler has seen.

    The structure and the channels of the maps are the model's.
    """
    # Dense layers, each wider than the one before, cannot be taken out of a network that is made.
    depths = {variant: (3,) * len(depths) for variant, depths in cspdensenet.SIZES.items()}
    blocks = [functools.partial(block.func, **{**block.keywords, 'depth': 2}) for block in peleenet._BLOCKS]
    with mock.patch.dict(cspdensenet.SIZES, depths), \
            mock.patch.multiple(peleenet, _BLOCKS=blocks, _DEPTHS=[2] * len(blocks)):
        model = timm.create_model(name, device='meta', **kwargs)
    for row in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        kept = []
        for key, block in list(row.named_children()):
            if kept[-2:] == [repr(block)] * 2:
                delattr(row, key)
            else:
                kept.append(repr(block))
    return randomize(model.to_empty(device='cpu')).eval()


@torch.no_grad()
def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        if not value.is_floating_point():
            value.zero_()
            continue
        if key.endswith('running_var'):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.ndim > 1:
            value.normal_(std=(1.6 / max(value[0].numel(), 1)) ** 0.5, generator=generator)
        elif key.endswith('weight'):
            value.uniform_(0.6, 1.4, generator=generator)
        else:
            value.normal_(std=0.2, generator=generator)
    return model


def same_weights(model, other):
    """Whether every tensor of a model's state dict is in another's, and equal."""
    expected = other.state_dict()
    return all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def distance(a, b):
    """Relative distance of two tensors: ``|a - b| / |b|``."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
