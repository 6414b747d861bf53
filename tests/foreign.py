"""Checkpoint files as the frameworks write them, without the frameworks.

Their classes are made up for as long as it takes to pickle an object of them: a pickle holds a class by its name.
"""
import contextlib
import pickle
import struct
import sys
import types
from collections import OrderedDict

import numpy as np
import torch
import torch.nn as nn


@contextlib.contextmanager
def made_up(*names, base=object):
    """Classes under the given dotted names, importable within the block and gone behind it."""
    before, classes = dict(sys.modules), []
    for name in names:
        module, _, cls = name.rpartition('.')
        parts = module.split('.')
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault('.'.join(parts[:i]), types.ModuleType('.'.join(parts[:i])))
        classes.append(type(cls, (base,), {'__module__': module}))
        setattr(sys.modules[module], cls, classes[-1])
    try:
        yield classes
    finally:
        for name in set(sys.modules) - set(before):
            if name.split('.')[0] in {n.split('.')[0] for n in names}:
                del sys.modules[name]


def save(obj, path, legacy=False):
    torch.save(obj, path, _use_new_zipfile_serialization=not legacy)


# Whole modules, as Ultralytics pickles them


def linear_convs(name):
    """Names of the convolutions without an activation in a network of these."""
    return ('.attn.', '.ffn.1.') + (('model.9.cv1.',) if name.startswith('yolo26') and 'cls' not in name else ())


def build_module(state_dict, conv, block, root, eps, linear=(), act=nn.SiLU):
    """A module tree with the given tensors, of the given classes, with an activation in each ``conv``."""
    def build(tensors, prefix):
        children = {}
        for key in tensors:
            if '.' in key:
                children.setdefault(key.partition('.')[0], None)
        own = {k: v for k, v in tensors.items() if '.' not in k}
        if 'running_var' in own:
            module = nn.BatchNorm2d(len(own['running_var']), eps=eps, momentum=0.03)
        elif 'weight' in own:
            w = own['weight']
            if w.ndim == 4:
                module = nn.Conv2d(1, w.shape[0], w.shape[2:], bias='bias' in own)
                module.weight = nn.Parameter(torch.empty(w.shape))
            else:
                module = nn.Linear(w.shape[1], w.shape[0])
        elif set(children) and all(name.isdigit() for name in children):
            module = nn.Sequential() if not prefix.endswith('.m.') else nn.ModuleList()
        else:
            module = (conv if {'conv', 'bn'} <= set(children) else block if prefix else root)()
        for name in children:
            inner = {k[len(name) + 1:]: v for k, v in tensors.items() if k.startswith(f'{name}.')}
            module.add_module(name, build(inner, f'{prefix}{name}.'))
        if isinstance(module, conv):
            module.act = nn.Identity() if any(part in prefix for part in linear) else act()
        with torch.no_grad():
            for name, value in own.items():
                getattr(module, name).copy_(value)
        return module

    return build(state_dict, '')


def ultralytics_file(path, state_dict, name='yolov8n', eps=1e-3, legacy=False, half=False, act=nn.SiLU, linear=None,
                     part='model', names=None, package='ultralytics'):
    """A file of Ultralytics (or, with ``package='models'``, of YOLOv5) with the whole module in it."""
    if package == 'ultralytics':
        classes = ('ultralytics.nn.modules.conv.Conv', 'ultralytics.nn.modules.block.C2f',
                   'ultralytics.nn.tasks.DetectionModel')
        extra = ('ultralytics.utils.IterableSimpleNamespace',)
    else:
        classes = ('models.common.Conv', 'models.common.C3', 'models.yolo.DetectionModel')
        extra = ('utils.loss.ComputeLoss',)
    with made_up(*classes, base=nn.Module) as (conv, block, root), made_up(*extra) as (namespace,):
        model = build_module(
            state_dict, conv, block, root, eps, linear_convs(name) if linear is None else linear, act)
        model.yaml = {'yaml_file': f'{name}.yaml', 'scale': name.partition('-')[0][-1], 'nc': 80, 'backbone': [[-1, 1]]}
        model.names = names or {i: f'class{i}' for i in range(80)}
        model.args = namespace()
        model.args.imgsz, model.args.model = 640, name
        model.stride = torch.tensor([8., 16., 32.])
        model.nc = len(model.names)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if half:
            model.half()
        other = build_module(
            {k: torch.zeros_like(v) for k, v in state_dict.items()}, conv, block, root, eps,
        ) if part == 'ema' else None
        content = {
            'epoch': -1, 'best_fitness': np.float64(0.5), 'model': model if part == 'model' else other, 'ema': None,
            'updates': None, 'optimizer': None, 'train_args': {'model': f'{name}.yaml', 'lr0': 0.01},
            'date': '2026-01-01T00:00:00', 'version': '8.3.0',
        }
        if part == 'ema':
            content.update(ema=model, updates=1000)
        save(content, path, legacy)
    return path


# State dicts


def openmmlab_file(path, state_dict, legacy=False, training=False):
    """``meta`` and ``state_dict``; of training, also what mmengine's runner keeps."""
    content = {
        'meta': {'mmdet_version': '3.3.0', 'mmengine_version': '0.10.7', 'epoch': 300, 'seed': np.int64(1),
                 'dataset_meta': {'CLASSES': ('person', 'bicycle'), 'PALETTE': [(220, 20, 60), (119, 11, 32)]},
                 'cfg': 'model = dict()\n' * 2000},
        'state_dict': OrderedDict(state_dict),
    }
    content['state_dict']._metadata = OrderedDict({'': {'version': 1}})
    if training:
        with made_up('mmengine.logging.history_buffer.HistoryBuffer') as (buffer,):
            buffer.mean = lambda self: None
            history = buffer()
            history._history = np.arange(2000, dtype=np.float64)
            history._count_history = np.ones(2000, dtype=np.int64)
            history._statistics_methods = OrderedDict(mean=_Bound(history, 'mean'))
            content['message_hub'] = {'log_scalars': OrderedDict({'train/loss': history}),
                                      'runtime_info': OrderedDict(iter=1000, lr=np.float32(0.1)), 'resumed_keys': {}}
            content['ema_state_dict'] = OrderedDict(
                {f'module.{k}': torch.zeros_like(v) for k, v in state_dict.items()}, steps=torch.tensor(1000))
            content['optimizer'] = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1).state_dict()
            save(content, path, legacy)
        return path
    save(content, path, legacy)
    return path


class _Bound:
    """Pickles as a bound method does."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def yolox_file(path, state_dict, legacy=False):
    save({'start_epoch': 300, 'model': state_dict, 'best_ap': np.float64(0.405), 'curr_ap': np.float32(0.4),
          'optimizer': {'state': {}, 'param_groups': [{'lr': 0.01, 'params': [0, 1]}]}}, path, legacy)
    return path


def paddle_file(path, state_dict, protocol=4):
    """Arrays by name, without ``num_batches_tracked``, which Paddle has not."""
    arrays = {k: v.numpy() for k, v in state_dict.items() if not k.endswith('num_batches_tracked')}
    arrays['StructuredToParameterName@@'] = {k: f'conv2d_{i}.w_0' for i, k in enumerate(arrays)}
    with open(path, 'wb') as file:
        pickle.dump(arrays, file, protocol=protocol)
    return path


def darknet_file(path, state_dict):
    with open(path, 'wb') as file:
        file.write(struct.pack('<3iQ', 0, 2, 5, 0))
        for value in state_dict.values():
            file.write(value.numpy().astype('<f4').tobytes())
    return path


def write(name, path, state_dict, info, legacy=False):
    """A fixture's weights in its framework's own container."""
    if name.startswith('cspnext'):
        return openmmlab_file(path, state_dict, legacy)
    if name.startswith('yolox'):
        return yolox_file(path, state_dict, legacy)
    if name.startswith('ppyoloe'):
        return paddle_file(path, state_dict, 2 if legacy else 4)
    if name.startswith('darknet'):
        return darknet_file(path, state_dict)
    package = 'models' if name.startswith('yolov5') else 'ultralytics'
    return ultralytics_file(path, state_dict, name.replace('_', '-'), info['bn_eps'], legacy, package=package)


SUFFIXES = {'cspnext': '.pth', 'yolox': '.pth', 'ppyoloe': '.pdparams', 'darknet': '.weights'}


def suffix(name):
    return next((value for key, value in SUFFIXES.items() if name.startswith(key)), '.pt')
