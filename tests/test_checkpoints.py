"""Files in each framework's own container, written without the frameworks: recognised, read, equal to the reference."""
import logging
import pickle
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cspnet_timm.checkpoints import CheckpointError, open_checkpoint, read_foreign
from tests import foreign
from tests.parity import load_fixture
from tests.zoo import distance

pytestmark = pytest.mark.filterwarnings('ignore:Couldn.t retrieve source code')

NETWORKS = {
    'cspnext_nano': 'cspnet_rtmdet_nano', 'cspnext_tiny': 'cspnet_rtmdet_tiny', 'cspnext_s': 'cspnet_rtmdet_s',
    'yolox_nano': 'cspnet_yolox_nano', 'yolox_tiny': 'cspnet_yolox_tiny', 'ppyoloe_t': 'cspnet_ppyoloe_t',
    'ppyoloe_s': 'cspnet_ppyoloe_s', 'ppyoloe_s_plus': 'cspnet_ppyoloe_plus_s', 'yolov5n': 'cspnet_yolov5n',
    'yolov8n': 'cspnet_yolov8n', 'yolov8n_cls': 'cspnet_yolov8n_cls', 'yolo11n': 'cspnet_yolo11n',
    'yolo11n_cls': 'cspnet_yolo11n_cls', 'yolo26n': 'cspnet_yolo26n',
}


def create(model, path, **kwargs):
    overlay = {'file': str(path), **kwargs.pop('overlay', {})}
    return timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@torch.no_grad()
def largest_distance(model, fixture, x, outputs):
    if fixture.startswith('yolox'):
        x = x.flip(1)  # the reference takes BGR, and loading has turned the first convolution to RGB
    features, maps = model.forward_intermediates(x)
    found = {f'stride{x.shape[-1] // y.shape[-1]}': y for y in maps}
    if model.num_classes:
        found['logits'] = model.forward_head(features)
    assert set(found) & set(outputs) >= set(outputs) - {'logits'}
    return max(distance(found[key], outputs[key]) for key in found if key in outputs)


@pytest.mark.parametrize('fixture', NETWORKS)
@pytest.mark.parametrize('legacy', (False, True))
def test_parity_through_the_frameworks_container(fixture, legacy, tmp_path):
    info, state_dict, x, outputs = load_fixture(fixture)
    path = foreign.write(fixture, tmp_path / f'a{foreign.suffix(fixture)}', state_dict, info, legacy)
    model = create(NETWORKS[fixture], path)
    assert largest_distance(model, fixture, x, outputs) < 1e-5


# What is found


def lines(path):
    with open_checkpoint(path) as checkpoint:
        return dict(line.partition(': ')[::2] for line in checkpoint.lines())


def small_module():
    return {'model.0.conv.weight': torch.rand(4, 3, 1, 1), 'model.0.bn.weight': torch.rand(4),
            'model.0.bn.bias': torch.rand(4), 'model.0.bn.running_mean': torch.rand(4),
            'model.0.bn.running_var': torch.rand(4), 'model.0.bn.num_batches_tracked': torch.tensor(1),
            'model.1.linear.weight': torch.rand(5, 4), 'model.1.linear.bias': torch.rand(5)}


@pytest.mark.parametrize('part', ('model', 'ema'))
@pytest.mark.parametrize('package', ('ultralytics', 'models'))
@pytest.mark.parametrize('legacy', (False, True))
def test_pickled_modules(part, package, legacy, tmp_path):
    weights = small_module()
    path = foreign.ultralytics_file(tmp_path / 'a.pt', weights, 'yolov8s', part=part, package=package, legacy=legacy)
    assert not {'ultralytics', 'models', 'utils'} & set(sys.modules)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.container == 'pickled module' and checkpoint.part == part
        assert checkpoint.framework == ('Ultralytics' if package == 'ultralytics' else 'YOLOv5')
        assert (checkpoint.network, checkpoint.scale, checkpoint.name) == ('yolov8s.yaml', 's', 'yolov8s.yaml')
        assert checkpoint.ema is (part == 'ema') and checkpoint.license == 'agpl-3.0'
        assert checkpoint.num_classes == 80 and checkpoint.labels[3] == 'class3'
        assert checkpoint.bn_eps == {'model.0.bn': 1e-3} and checkpoint.activations == {'SiLU': 1}
        assert checkpoint.modules['model.0.conv'] == 'Conv2d' and checkpoint.modules[''] == 'DetectionModel'
        assert list(checkpoint.tensors) == list(checkpoint.meta_state_dict())
        tensors = checkpoint.state_dict()
    assert set(tensors) == set(weights) and all(torch.equal(tensors[k], v) for k, v in weights.items())
    assert 'agpl-3.0' in checkpoint.summary() and 'best_fitness' in lines(path)['besides']


def test_half_precision_becomes_single(tmp_path):
    weights = small_module()
    tensors = read_foreign(foreign.ultralytics_file(tmp_path / 'a.pt', weights, half=True), nn.Identity())
    for key, value in weights.items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(tensors[key], expected) and tensors[key].dtype == expected.dtype


def test_a_bare_module_and_one_in_a_wrapper(tmp_path):
    weights = small_module()
    with foreign.made_up('models.common.Conv', 'models.yolo.Model', base=nn.Module) as (conv, root):
        model = foreign.build_module(weights, conv, nn.Sequential, root, 1e-3)
        wrapped = nn.Module()
        wrapped.module = model
        foreign.save(model, tmp_path / 'bare.pt')
        foreign.save({'model': wrapped}, tmp_path / 'wrapped.pt')
    for file in ('bare.pt', 'wrapped.pt'):
        assert set(read_foreign(tmp_path / file, nn.Identity())) == set(weights)


def test_buffers_that_are_not_saved_are_left_out(tmp_path):
    with foreign.made_up('models.yolo.Model', base=nn.Module) as (cls,):
        module = cls()
        module.register_buffer('kept', torch.zeros(2))
        module.register_buffer('left', torch.zeros(2), persistent=False)
        module.register_parameter('none', None)
        module.tensor_attribute = torch.zeros(5)
        foreign.save(module, tmp_path / 'a.pt')
    assert set(read_foreign(tmp_path / 'a.pt', nn.Identity())) == {'kept'}


@pytest.mark.parametrize('legacy', (False, True))
@pytest.mark.parametrize('training', (False, True))
def test_openmmlab(legacy, training, tmp_path):
    weights = {'backbone.stem.0.conv.weight': torch.rand(4, 3, 3, 3), 'bbox_head.rtm_cls.0.bias': torch.rand(2)}
    path = foreign.openmmlab_file(tmp_path / 'a.pth', weights, legacy, training)
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.framework, checkpoint.part) == ('OpenMMLab', 'state_dict')
        assert checkpoint.ema is (True if training else None) and checkpoint.labels == ('person', 'bicycle')
        assert checkpoint.container == ('torch legacy file' if legacy else 'torch zip archive')
        assert checkpoint.license == '' and ('message_hub' in checkpoint.others) is training
        assert all(torch.equal(v, weights[k]) for k, v in checkpoint.state_dict().items())


def test_mmyolo_is_copyleft(tmp_path):
    torch.save({'meta': {'mmyolo_version': '0.6.0'}, 'state_dict': {'a': torch.zeros(1)}}, tmp_path / 'a.pth')
    assert lines(tmp_path / 'a.pth')['licence'] == 'gpl-3.0'


def test_yolox(tmp_path):
    weights = {'backbone.backbone.dark2.0.conv.weight': torch.rand(4, 3, 3, 3), 'head.cls_preds.0.bias': torch.rand(80)}
    found = lines(foreign.yolox_file(tmp_path / 'a.pth', weights))
    assert (found['framework'], found['weights'], found['classes']) == ('YOLOX', "under 'model'", '80')
    assert 'best_ap' in found['besides']


@pytest.mark.parametrize('protocol', (2, 3, 4))
def test_paddle(protocol, tmp_path):
    weights = {'backbone.stem.conv1.conv.weight': torch.rand(40, 3, 3, 3),
               'backbone.stem.conv1.bn._mean': torch.rand(40)}
    path = foreign.paddle_file(tmp_path / 'a.pdparams', weights, protocol)
    assert lines(path)['framework'] == 'Paddle'
    tensors = read_foreign(path, nn.Identity())
    assert set(tensors) == set(weights) and all(torch.equal(tensors[k], v) for k, v in weights.items())
    named = {k: (f'w_{i}', v.numpy()) for i, (k, v) in enumerate(weights.items())}  # as Paddle's tensors are pickled
    path.write_bytes(pickle.dumps(named, protocol=protocol))
    assert all(torch.equal(v, weights[k]) for k, v in read_foreign(path, nn.Identity()).items())


@pytest.mark.parametrize('content, part, ema', [
    (lambda sd, z: sd, '', None),
    (lambda sd, z: {'state_dict': sd}, 'state_dict', None),
    (lambda sd, z: {'state_dict': z, 'state_dict_ema': sd, 'arch': 'x'}, 'state_dict_ema', True),
    (lambda sd, z: {'model': z, 'model_ema': sd}, 'model_ema', True),
    (lambda sd, z: {'model': z, 'ema': {'module': sd, 'updates': 3}}, 'ema.module', True),
    (lambda sd, z: {'state_dict': z, 'ema_state_dict': sd}, 'ema_state_dict', True),
    # mmengine has swapped the two, and so has Lightning's WeightAveraging
    (lambda sd, z: {'state_dict': sd, 'ema_state_dict': {'steps': torch.tensor(1), **z}, 'message_hub': {}},
     'state_dict', True),
    (lambda sd, z: {'state_dict': sd, 'current_model_state': z, 'averaging_state': {'n_averaged': torch.tensor(1)}},
     'state_dict', True),
    (lambda sd, z: {'model_state_dict': sd, 'loss': 0.1}, 'model_state_dict', None),
    (lambda sd, z: OrderedDict((f'module.{k}', v) for k, v in sd.items()), '', None),
    (lambda sd, z: {'state_dict': {f'_orig_mod.{k}': v for k, v in sd.items()}}, 'state_dict', None),
])
def test_state_dicts_of_training_scripts(content, part, ema, tmp_path):
    weights = {'a.weight': torch.rand(3), 'b': torch.rand(2)}
    torch.save(content(weights, {k: torch.zeros_like(v) for k, v in weights.items()}), tmp_path / 'a.bin')
    with open_checkpoint(tmp_path / 'a.bin') as checkpoint:
        assert (checkpoint.part, checkpoint.ema) == (part, ema)
        tensors = checkpoint.state_dict()
    assert set(tensors) == set(weights) and all(torch.equal(tensors[k], v) for k, v in weights.items())


def test_a_checkpoint_of_timms_training_script(tmp_path):
    import argparse
    model = timm.create_model('cspnet_nano', num_classes=3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(1, 3, 64, 64)).sum().backward()
    optimizer.step()
    torch.save({
        'epoch': 3, 'arch': 'cspnet_nano', 'state_dict': model.state_dict(), 'optimizer': optimizer.state_dict(),
        'version': 2, 'args': argparse.Namespace(lr=0.1, betas=(0.9, 0.99), path='x'), 'metric': 50.,
    }, tmp_path / 'a.pth.tar')
    tensors = read_foreign(tmp_path / 'a.pth.tar', model)
    assert set(tensors) == set(model.state_dict())
    assert all(torch.equal(tensors[k], v) for k, v in model.state_dict().items())
    assert lines(tmp_path / 'a.pth.tar')['framework'] == 'timm'


def test_safetensors(tmp_path):
    weights = {'head.fc.bias': torch.rand(7), 'h': torch.rand(2).half()}
    save_file(weights, tmp_path / 'a.safetensors', {'format': 'pt'})
    assert set(read_foreign(tmp_path / 'a.safetensors', nn.Identity())) == set(weights)
    found = lines(tmp_path / 'a.safetensors')
    assert found['container'] == 'safetensors file' and found['classes'] == '7' and found['tensors'].startswith('2 (9 ')
    (tmp_path / 'a.safetensors').rename(tmp_path / 'a.bin')  # under a name by which timm would not know it
    tensors = read_foreign(tmp_path / 'a.bin', nn.Identity())
    assert torch.equal(tensors['head.fc.bias'], weights['head.fc.bias']) and tensors['h'].dtype == torch.float32
    for data in (b'\x10\0\0\0\0\0\0\0{"a":1', (tmp_path / 'a.bin').read_bytes()[:-1]):
        (tmp_path / 'b.bin').write_bytes(data)
        with pytest.raises(CheckpointError, match='safetensors'):
            open_checkpoint(tmp_path / 'b.bin')


@pytest.mark.parametrize('data, message', [
    (b'', 'is empty'), (b'hello', 'no checkpoint file'), (b'\x80', 'no checkpoint file'),
    (b'PK\x03', 'no checkpoint file'),
    (b'\x89HDF\r\n\x1a\n' + b'\0' * 90, 'no HDF5 file, or a damaged one'), (b'PK\x03\x04' + b'\0' * 90, 'truncated'),
    (pickle.dumps([1, 2], 4), 'holds no weights'), (pickle.dumps({'a': {'b': 1}}, 2), 'holds no weights'),
    (b'\x80\x05.', 'damaged'),
])
def test_files_that_are_no_checkpoints(data, message, tmp_path):
    (tmp_path / 'a.pth').write_bytes(data)
    for function in (
            open_checkpoint, lambda path: read_foreign(path, nn.Identity()), lambda path: create('cspnet_nano', path)):
        with pytest.raises(CheckpointError, match=message) as error:
            function(tmp_path / 'a.pth')
        assert str(tmp_path / 'a.pth') in str(error.value)


def test_files_that_cannot_be_opened(tmp_path):
    for path in (tmp_path / 'missing.pt', tmp_path):
        with pytest.raises(CheckpointError, match='cannot be read'):
            open_checkpoint(path)


def test_the_log_says_what_was_found(tmp_path, caplog):
    _, state_dict, _, _ = load_fixture('yolov8n')
    path = foreign.ultralytics_file(tmp_path / 'a.pt', state_dict, 'yolov8n')
    with caplog.at_level(logging.INFO):
        create('cspnet_yolov8n', path)
    assert f'{path}: pickled module of Ultralytics, yolov8n.yaml, weights of \'model\'' in caplog.text


# What a state dict does not carry


def test_epsilon_is_converted(tmp_path):
    info, state_dict, x, _ = load_fixture('yolov8n')
    assert info['bn_eps'] == 1e-3
    model = create('cspnet_yolov8n', foreign.ultralytics_file(tmp_path / 'a.pt', state_dict, eps=0.1))
    expected = create('cspnet_yolov8n', foreign.ultralytics_file(tmp_path / 'b.pt', state_dict, eps=1e-3)).eval()
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-3
            module.eps = 0.1
    assert all(m.eps == 1e-3 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        for a, b in zip(model.forward_intermediates(x)[1], expected.forward_intermediates(x)[1]):
            assert distance(a, b) < 1e-5
    # where the caller asks for the file's epsilon, nothing has to be converted
    kept = create('cspnet_yolov8n', tmp_path / 'a.pt', bn_eps=0.1)
    assert torch.equal(kept.stem.bn.running_var, state_dict['model.0.bn.running_var'])


def test_epsilon_that_cannot_be_converted(tmp_path):
    _, state_dict, _, _ = load_fixture('yolov8n')
    state_dict['model.4.cv1.bn.running_var'][3] = 1e-4
    path = foreign.ultralytics_file(tmp_path / 'a.pt', state_dict, eps=1e-5)
    with pytest.raises(CheckpointError, match=r'model\.4\.cv1\.bn was trained with eps 1e-05.*bn_eps=1e-05'):
        create('cspnet_yolov8n', path)
    create('cspnet_yolov8n', path, bn_eps=1e-5)


@pytest.mark.parametrize('fixture, linear, layer', [
    ('yolov8n', ('model.9.cv1.',), 'model.9.cv1 ends in Identity.*SiLU'),
    ('yolo11n', ('.attn.', '.ffn.1.', 'model.9.cv1.'), 'model.9.cv1 ends in Identity.*SiLU'),
    ('yolo26n', ('.attn.', '.ffn.1.'), 'model.9.cv1 ends in SiLU.*Identity'),
    ('yolo11n', ('.ffn.1.',), 'model.10.m.0.attn.*ends in SiLU.*Identity'),
])
def test_activations_that_differ_are_refused(fixture, linear, layer, tmp_path):
    _, state_dict, _, _ = load_fixture(fixture)
    path = foreign.ultralytics_file(tmp_path / 'a.pt', state_dict, fixture, linear=linear)
    with pytest.raises(CheckpointError, match=layer):
        create(NETWORKS[fixture], path)


def test_another_activation_can_be_asked_for(tmp_path):
    _, state_dict, _, _ = load_fixture('yolov5n')
    path = foreign.ultralytics_file(tmp_path / 'a.pt', state_dict, 'yolov5n', act=nn.ReLU, package='models')
    with pytest.raises(CheckpointError, match=r'model\.0 ends in ReLU.*SiLU'):
        create('cspnet_yolov5n', path)
    assert isinstance(create('cspnet_yolov5n', path, act_layer='relu').stem.act, nn.ReLU)


@pytest.mark.parametrize('fixture, model, held', [
    ('yolov8n', 'cspnet_yolov8s', 'cspnet_yolov8n'), ('yolox_tiny', 'cspnet_yolox_s', 'cspnet_yolox_tiny'),
    ('ppyoloe_s', 'cspnet_ppyoloe_plus_s', 'cspnet_ppyoloe_s'),
    ('cspnext_tiny', 'cspnet_yolox_tiny', 'cspnet_rtmdet_tiny'),
    ('yolov5n', 'cspnet_yolov8n', 'cspnet_yolov5n'), ('yolo11n', 'cspnet_yolo26n', 'yolo11n'),
    ('yolo26n', 'cspnet_yolo11n', 'yolo26n'), ('yolov8n_cls', 'cspnet_yolov8n', 'cspnet_yolov8n_cls'),
    ('yolov8n', 'cspnet_nano', 'cspnet_yolov8n'), ('yolox_nano', 'cspnet_resnet50', 'cspnet_yolox_nano'),
])
def test_errors_name_the_network_that_the_file_holds(fixture, model, held, tmp_path):
    info, state_dict, _, _ = load_fixture(fixture)
    path = foreign.write(fixture, tmp_path / f'a{foreign.suffix(fixture)}', state_dict, info)
    with pytest.raises(CheckpointError, match=held) as error:
        create(model, path)
    assert str(path) in str(error.value) or fixture == 'ppyoloe_s'


def test_native_files_of_another_size(tmp_path):
    torch.save(timm.create_model('cspnet_tiny').state_dict(), tmp_path / 'a.pt')
    with pytest.raises(CheckpointError, match='holds cspnet_tiny, not cspnet_nano'):
        create('cspnet_nano', tmp_path / 'a.pt')
    torch.save({'conv.weight': torch.zeros(2)}, tmp_path / 'b.pt')
    with pytest.raises(CheckpointError, match='holds another network, not cspnet_nano'):
        create('cspnet_nano', tmp_path / 'b.pt')


@settings(
    max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate])  # each takes a second: too long to look for the smallest
@given(st.data())
def test_state_dicts_that_lack_or_mistake_something(tmp_path_factory, data):
    fixture = data.draw(st.sampled_from(['yolox_nano', 'cspnext_nano', 'yolov8n', 'ppyoloe_t', 'yolo11n']))
    state_dict = dict(load_fixture(fixture)[1])
    before = dict(state_dict)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(state_dict)))
        value = state_dict.pop(key)
        kind = data.draw(st.sampled_from(('drop', 'rename', 'shape', 'scalar')))
        if kind == 'rename':
            state_dict[key.replace(data.draw(st.sampled_from(('conv', 'bn', '0', '.'))), 'x')] = value
        elif kind == 'shape':
            state_dict[key] = value[:0] if value.ndim else value[None]
        elif kind == 'scalar':
            state_dict[key] = torch.tensor(1.)
    path = tmp_path_factory.getbasetemp() / 'mistaken.pt'
    torch.save(state_dict, path)
    try:
        create(NETWORKS[fixture], path)
    except CheckpointError:
        return
    lacking = {k for k in before if k not in state_dict or state_dict[k].shape != before[k].shape}
    assert all(k.endswith('num_batches_tracked') or k.startswith('head.') for k in lacking), lacking


def test_timm_would_refuse_or_run_these(tmp_path):
    """Why the readers exist: without them the same files are errors, or code."""
    _, state_dict, _, _ = load_fixture('yolox_nano')
    path = foreign.yolox_file(tmp_path / 'a.pth', state_dict)
    with pytest.raises(Exception, match=r'[Ww]eights.only|[Uu]nsafe'):
        timm.models.load_state_dict(str(path))


def test_features_and_other_inputs(tmp_path):
    """The file overlay goes through all that timm does with weights."""
    _, state_dict, x, outputs = load_fixture('yolov8n')
    path = foreign.ultralytics_file(tmp_path / 'a.pt', state_dict, 'yolov8n')
    backbone = create('cspnet_yolov8n', path, features_only=True, out_indices=(2, 3, 4))
    with torch.no_grad():
        for tap, key in zip(backbone(x), ('stride8', 'stride16', 'stride32')):
            assert distance(tap, outputs[key]) < 1e-5
    assert create('cspnet_yolov8n', path, in_chans=1).stem.conv.weight.shape[1] == 1


def test_a_file_read_while_it_shrinks(tmp_path):
    torch.save({'w': torch.rand(1000)}, tmp_path / 'a.pt')
    with open_checkpoint(tmp_path / 'a.pt') as checkpoint:
        (tmp_path / 'a.pt').write_bytes((tmp_path / 'a.pt').read_bytes()[:1000])
        with pytest.raises(CheckpointError, match='shorter'):
            checkpoint.state_dict()


def test_files_of_the_real_serializer_in_a_process_without_the_classes(tmp_path):
    """Pickled by a process that has the package, read by this one, which never had it."""
    (tmp_path / 'ultralytics' / 'nn').mkdir(parents=True)
    (tmp_path / 'ultralytics' / '__init__.py').write_text('')
    (tmp_path / 'ultralytics' / 'nn' / '__init__.py').write_text('')
    (tmp_path / 'ultralytics' / 'nn' / 'tasks.py').write_text(
        'import torch.nn as nn\n'
        'class DetectionModel(nn.Module):\n'
        '    def __init__(self):\n'
        '        super().__init__()\n'
        '        self.model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3), nn.SiLU())\n'
        '        self.yaml = dict(yaml_file="yolo11n.yaml", scale="n", nc=4)\n')
    subprocess.run(
        [sys.executable, '-c', 'import torch, numpy\nfrom ultralytics.nn.tasks import DetectionModel\n'
         'torch.save({"model": DetectionModel().half(), "best": numpy.float64(1), "epoch": 3}, "a.pt")'],
        cwd=tmp_path, check=True, env={'PYTHONPATH': f'{tmp_path}', 'PATH': ''})
    with open_checkpoint(tmp_path / 'a.pt') as checkpoint:
        assert checkpoint.name == 'yolo11n.yaml' and checkpoint.num_classes == 4 and len(checkpoint.tensors) == 7
        assert checkpoint.bn_eps == {'model.1': 1e-3}
        assert np.isfinite(checkpoint.state_dict()['model.0.weight'].numpy()).all()
    assert 'ultralytics' not in sys.modules
