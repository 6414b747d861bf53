"""The one road from a file to a model: what is found in it, whatever was put around it, and what is said of it."""
import copy
import json
import pickle
import re
import struct
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from timm.utils import freeze, reparameterize_model

from cspnet_timm import conversion, hub, naming
from cspnet_timm.backbone import BackboneCfg, CspBackbone, Level
from cspnet_timm.checkpoints import CheckpointError, open_checkpoint
from cspnet_timm.checkpoints.description import sorted_labels
from cspnet_timm.fitting import candidates, fit
from cspnet_timm.layers import ConvNormAct
from tests import foreign
from tests.parity import load_fixture
from tests.zoo import create, randomize

pytestmark = pytest.mark.filterwarnings('ignore:Couldn.t retrieve source code')

GENERATED = settings(
    max_examples=6, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
FIXTURES = {'yolox_nano': 'cspnet_yolox_nano', 'cspnext_nano': 'cspnet_rtmdet_nano', 'yolov8n': 'cspnet_yolov8n',
            'ppyoloe_t': 'cspnet_ppyoloe_t'}
OWN = 'cspnet_yolox_nano'


@pytest.fixture(scope='module')
def own():
    return create(OWN, num_classes=3)


def from_file(model, path, **kwargs):
    overlay = {'file': str(path), **kwargs.pop('overlay', {})}
    return timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Wrappers

WORDS = st.sampled_from((
    'module', 'model', 'net', 'encoder', 'backbone', 'body', '_backbone', 'timm_model', 'a', 'b0', 'feature_extractor'))
INSIDE = st.sampled_from(('_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'))
CONTAINERS = st.sampled_from((None, 'state_dict', 'model', 'model_state_dict', 'module', 'net', 'params', 'anything'))


@GENERATED
@given(st.lists(WORDS, max_size=4), st.lists(INSIDE, max_size=2), CONTAINERS, st.sampled_from(('own', *FIXTURES)))
def test_any_wrapper(own, tmp_path_factory, words, inside, container, source):
    name, state_dict = OWN, own.state_dict()
    if source != 'own':
        name, state_dict = FIXTURES[source], load_fixture(source)[1]
    model = timm.create_model(name, num_classes=3 if source == 'own' else 0)
    expected = fit(state_dict, model).state_dict(model)
    prefix = ''.join(f'{word}.' for word in words)
    wrapped = {}
    for key, value in state_dict.items():
        parts = key.split('.')
        for word in inside:  # modules that are wrapped one by one
            parts.insert(min(1, len(parts) - 1), word)
        wrapped[prefix + '.'.join(parts)] = value
    others = {'epoch': 3, 'optimizer': {'state': {0: {'exp_avg': torch.zeros(3)}}, 'param_groups': [{'lr': 0.1}]}}
    content = {container: wrapped, **others} if container else wrapped
    model.load_state_dict(content)
    assert equal(model.state_dict(), expected)
    assert name in candidates(content)
    path = tmp_path_factory.getbasetemp() / 'wrapped.pth'
    torch.save(content, path)
    assert conversion.inspect(path)[-1] == f'model: {name}'
    loaded = from_file(name, path, num_classes=model.num_classes, overlay=dict(num_classes=model.num_classes))
    assert equal(loaded.state_dict(), expected)


def test_every_road_gives_one_result(own, tmp_path):
    state_dict = own.state_dict()
    torch.save({'model': state_dict}, tmp_path / 'a.pth')
    save_file(state_dict, tmp_path / 'a.safetensors')
    torch.save(own, tmp_path / 'whole.pt')
    hub.save(own, tmp_path / 'saved', license='mit')
    models = [timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True)]
    for file in ('a.pth', 'a.safetensors', 'whole.pt'):
        models.append(from_file(OWN, tmp_path / file, num_classes=3))
        models.append(timm.create_model(OWN, num_classes=3, checkpoint_path=str(tmp_path / file)))
        assert conversion.inspect(tmp_path / file)[-1] == f'model: {OWN}'
    models.append(from_file(OWN, '', num_classes=3, overlay=dict(file=None, state_dict=state_dict)))
    url = (tmp_path / 'a.pth').as_uri()
    models.append(from_file(OWN, '', num_classes=3, overlay=dict(file=None, url=url, hf_hub_id=None)))
    outer = nn.ModuleDict({'backbone': timm.create_model(OWN, num_classes=3)})
    outer.load_state_dict({f'backbone.module.{k}': v for k, v in state_dict.items()})
    models.append(outer['backbone'])
    for model in models:
        assert equal(model.state_dict(), state_dict)


@pytest.mark.parametrize('fixture, feature_cls, out_indices', [
    ('yolox_nano', 'list', None), ('own', 'list', (1, 2)), ('own', 'getter', (2,)), ('weights', 'dict', (-1,)),
    ('weights', 'getter', (1, 2)),
    *(pytest.param('neck_yolo11n', c, None, marks=pytest.mark.slow) for c in ('list', 'dict', 'getter')),
])
def test_an_extractor_takes_what_the_network_takes(fixture, feature_cls, out_indices, own, tmp_path):
    name = FIXTURES.get(fixture, OWN)
    if fixture == 'own':
        torch.save({'model': {f'module.{k}': v for k, v in own.state_dict().items()}}, path := tmp_path / 'a.pth')
    elif fixture == 'weights':
        name, path = 'cspnet_mobilenetv2', tmp_path / 'a.weights'
        tensors = load_fixture('darknet_csmobilenet-v2')[1].values()
        path.write_bytes(struct.pack('<3iQ', 0, 2, 5, 0) + b''.join(t.numpy().tobytes() for t in tensors))
    else:
        info, state_dict, _, _ = load_fixture(fixture)
        name = name if fixture in FIXTURES else 'cspnet_yolo11n_pan'
        path = foreign.write(fixture, tmp_path / f'a{foreign.suffix(fixture)}', state_dict, info)
    whole = from_file(name, path, num_classes=0)
    kwargs = dict(features_only=True, feature_cls=feature_cls)
    if out_indices is not None:
        kwargs['out_indices'] = out_indices
    first = timm.create_model(name, checkpoint_path=str(path), **kwargs).eval()
    second = timm.create_model(name, **kwargs).eval()
    if fixture in ('weights', 'neck_yolo11n'):
        second.load_state_dict(whole.state_dict())
    else:
        with open_checkpoint(path) as checkpoint:
            second.load_state_dict({'state_dict': checkpoint.state_dict()})
    for extractor in (first, second, pickle.loads(pickle.dumps(first))):
        given, expected = extractor.state_dict(), whole.state_dict()
        assert given and all(torch.equal(v, expected[k.removeprefix('model.')]) for k, v in given.items())
        assert type(extractor(torch.zeros(1, 3, 64, 64))) is not torch.Tensor
    with pytest.raises(CheckpointError, match='5 tensors are missing'):
        second.load_state_dict(dict(list(whole.state_dict().items())[5:]))
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        timm.create_model('cspnet_yolov5n', checkpoint_path=str(path), features_only=True)


def test_a_pickled_model_still_loads_by_any_names(own):
    again = pickle.loads(pickle.dumps(own))
    state_dict = load_fixture('yolox_nano')[1]
    again.load_state_dict(state_dict, strict=False)
    assert again.cfg.convert is not None and copy.deepcopy(own).cfg is own.cfg
    expected = fit(state_dict, own).tensors['layer1.csp.merge.conv.weight']
    assert torch.equal(again.layer1.csp.merge.conv.weight, expected)


@pytest.mark.parametrize('name', ('cspnet_yolox_nano_pan', 'cspnet_mobilenetv2', 'cspnet_yolo26n', 'cspnet_peleenet'))
def test_pickled_models_are_recognised(name, tmp_path):
    """No builder of a level, a neck or a head is pickled with them."""
    torch.save(timm.create_model(name, num_classes=2), tmp_path / 'a.pt')
    assert conversion.inspect(tmp_path / 'a.pt')[-1] == f'model: {name}'


# Frozen batch norm


@pytest.mark.parametrize('fixture', FIXTURES)
def test_frozen_batch_norm_takes_the_same_weights(fixture, tmp_path):
    _, state_dict, x, _ = load_fixture(fixture)
    torch.save({'state_dict': state_dict}, tmp_path / 'a.pth')
    kwargs = dict(features_only=True)
    frozen = from_file(FIXTURES[fixture], tmp_path / 'a.pth', norm_layer='frozenbatchnorm2d', **kwargs)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    with torch.no_grad():
        for a, b in zip(frozen(x), from_file(FIXTURES[fixture], tmp_path / 'a.pth', **kwargs)(x)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_frozen_model_is_saved(own, tmp_path):
    model = copy.deepcopy(own)
    freeze(model, ['stem', 'layer1'])
    hub.save(model, tmp_path / 'saved', license='mit')
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
        torch.testing.assert_close(again(x), own(x))


# Which of two sets

RAW = st.sampled_from(('model', 'state_dict', 'model_state_dict', 'net', 'params'))
AVERAGES = st.sampled_from((
    ('ema',), ('model_ema',), ('state_dict_ema',), ('ema_state_dict',), ('ema_model',), ('params_ema',), ('swa_model',),
    ('ema', 'module'), ('ema', 'shadow'), ('ema', 'state_dict'), ('averaged_model',), ('modelEMA',)))


@GENERATED
@given(RAW, AVERAGES, st.booleans(), st.booleans(), st.data())
def test_the_average_is_taken_by_every_road(own, tmp_path_factory, raw, names, first, has_prefix, data):
    average = {k: v * 0.5 if v.is_floating_point() else v for k, v in own.state_dict().items()}
    content = {f'module.{k}': v for k, v in average.items()} if has_prefix else average
    if has_prefix:
        content['n_averaged'] = torch.tensor(3)
    for name in reversed(names[1:]):
        content = {'decay': torch.tensor(0.99), 'updates': 3, name: content}
    content = {names[0]: content, raw: own.state_dict()} if first else {raw: own.state_dict(), names[0]: content}
    path = tmp_path_factory.getbasetemp() / 'both.pth'
    torch.save(content, path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.ema and checkpoint.part == '.'.join(names)
    model = timm.create_model(OWN, num_classes=3)
    model.load_state_dict(content)
    for loaded in (model, from_file(OWN, path, num_classes=3),
                   timm.create_model(OWN, num_classes=3, checkpoint_path=str(path))):
        assert equal(loaded.state_dict(), average)


def test_an_average_within_a_state_dict(own):
    """As a module has it that keeps both: Lightning's, with an average as an attribute."""
    average = {k: v * 0.5 if v.is_floating_point() else v for k, v in own.state_dict().items()}
    content = {f'model.{k}': v for k, v in own.state_dict().items()}
    content.update({f'model_ema.module.{k}': v for k, v in average.items()})
    model = timm.create_model(OWN, num_classes=3)
    model.load_state_dict({'state_dict': content, 'pytorch-lightning_version': '2.5'})
    assert equal(model.state_dict(), average)


@pytest.mark.parametrize('taken, left, average', [
    ('teacher', 'student', 'yes'), ('teacher_model', 'student_model', 'yes'),
    ('module.encoder_q', 'module.encoder_k', ''),
    ('model.base_encoder', 'model.momentum_encoder', ''), ('online_network.net', 'target_network.net', ''),
])
@pytest.mark.parametrize('taken_first', (True, False))
@pytest.mark.parametrize('nested', (True, False))
def test_of_two_copies_that_is_taken_which_is_used(own, taken, left, average, taken_first, nested, tmp_path):
    sets = {left: {k: v + 1 for k, v in own.state_dict().items()}, taken: dict(own.state_dict())}
    if taken_first:
        sets = dict(reversed(sets.items()))
    if not nested:
        sets = {f'{name}.{k}': v for name, tensors in sets.items() for k, v in tensors.items()}
    torch.save(sets, path := tmp_path / 'a.pth')
    assert equal(from_file(OWN, path, num_classes=3).state_dict(), own.state_dict())
    assert average in next(line for line in conversion.inspect(path) if line.startswith('moving average'))


@pytest.mark.parametrize('nested', (True, False))
@pytest.mark.parametrize('order', (1, -1))
def test_a_larger_teacher_is_not_taken_for_its_student(own, nested, order, tmp_path):
    sets = dict([('student', dict(own.state_dict())), ('teacher', create('cspnet_yolox_tiny').state_dict())][::order])
    if not nested:
        sets = {f'{name}.{k}': v for name, tensors in sets.items() for k, v in tensors.items()}
    torch.save(sets, path := tmp_path / 'a.pth')
    assert equal(from_file(OWN, path, num_classes=3).state_dict(), own.state_dict())
    assert f'model: {OWN}' in conversion.inspect(path)


def test_of_several_networks_it_is_said_which_is_taken(own, tmp_path, caplog):
    sets = {f'{name}.{k}': v + i for i, name in enumerate(('rgb', 'infrared')) for k, v in own.state_dict().items()}
    torch.save(sets, path := tmp_path / 'a.pth')
    assert "networks: 'rgb.', 'infrared.', the first is taken" in conversion.inspect(path)
    assert equal(from_file(OWN, path, num_classes=3).state_dict(), own.state_dict())
    assert "behind the prefix 'rgb.', which is taken, and others behind 'infrared.'" in caplog.text
    caplog.clear()
    info, state_dict, _, _ = load_fixture('yolov5n')  # whose blocks have names like the network's
    from_file('cspnet_yolov5n', foreign.write('yolov5n', tmp_path / 'a.pt', state_dict, info), num_classes=0)
    assert 'which is taken' not in caplog.text


@pytest.mark.parametrize('ema', (None, {'decay': 0.9}, {'decay': torch.tensor(0.9), 'shadow_params': [torch.zeros(3)]}))
def test_an_average_that_is_none_is_not_claimed(own, ema, tmp_path):
    torch.save({'model': own.state_dict(), 'ema': ema}, tmp_path / 'a.pth')
    lines = conversion.inspect(tmp_path / 'a.pth')
    assert 'moving average: no' in lines and 'weights: under \'model\'' in lines


# What is no weight

COUNTERS = st.sampled_from((
    'total_ops', 'total_params', 'n_averaged', 'activation_post_process.min_val', 'weight_fake_quant.scale',
    'fake_quant_enabled', 'activation_post_process.eps', 'updates'))


@GENERATED
@given(st.sampled_from(('own', *FIXTURES)), st.sets(COUNTERS, min_size=1), st.data())
def test_counters_are_passed_over(own, source, counters, data):
    name, state_dict = OWN, own.state_dict()
    if source != 'own':
        name, state_dict = FIXTURES[source], load_fixture(source)[1]
    model = timm.create_model(name, num_classes=3 if source == 'own' else 0)
    expected = fit(state_dict, model).state_dict(model)
    modules = sorted({key.rpartition('.')[0] for key in state_dict})
    extra = {f'{module}.{counter}': torch.zeros(data.draw(st.sampled_from(((), (1,), (7,)))))
             for module in modules[::3] for counter in counters}
    keys = list(state_dict)
    dropped = {key for key in keys if key.endswith('num_batches_tracked')} if data.draw(st.booleans()) else set()
    given = {k: v for k, v in {**extra, **state_dict}.items() if k not in dropped}
    assert not any(model.load_state_dict(given))
    found = model.state_dict()
    assert all(torch.equal(found[k], expected[k]) for k in expected if not k.endswith('num_batches_tracked'))
    assert name in candidates(given)


# Parts


@GENERATED
@given(st.sampled_from(('own', *FIXTURES)), st.data())
def test_a_part_loads_on_request_and_its_refusal_says_what_is_missing(own, tmp_path_factory, source, data):
    name, state_dict = OWN, own.state_dict()
    if source != 'own':
        name, state_dict = FIXTURES[source], load_fixture(source)[1]
    classes = 3 if source == 'own' else 0
    model = timm.create_model(name, num_classes=classes)
    whole = fit(state_dict, model)
    keys = [k for k in state_dict if not k.endswith('num_batches_tracked') and not k.startswith('head.')]
    cut = data.draw(st.sets(st.sampled_from(keys[1:]), min_size=1, max_size=len(keys) // 3))
    markers = [k for n in naming.namings() for k in keys if n.prefixes([k])]  # by which the network is known
    part = {k: v for k, v in state_dict.items() if k not in cut or k in markers}
    found = fit(part, model)
    if found.is_complete:
        return
    with pytest.raises(CheckpointError, match=r'missing, (such as )?\'') as error:
        model.load_state_dict(part)
    assert 'another network' not in str(error.value) and f' {len(found.missing)} tensor' in str(error.value)
    result = model.load_state_dict(part, strict=False)
    assert set(found.missing) <= set(result.missing_keys)
    values = model.state_dict()
    assert all(torch.equal(values[k], v) for k, v in whole.tensors.items() if k in found.tensors)
    path = tmp_path_factory.getbasetemp() / 'part.pth'
    torch.save({'model': part}, path)
    with pytest.raises(CheckpointError, match='holds a part of'):
        from_file(name, path, num_classes=classes)
    loaded = from_file(name, path, num_classes=classes, pretrained_strict=False).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in found.tensors.items() if not k.startswith('head.'))


@pytest.mark.parametrize('source, name', [
    ('cspnext_nano', 'cspnet_rtmdet_nano'), ('damo_m', 'cspnet_damo_m'), ('ppyoloe_t', 'cspnet_ppyoloe_t'),
    ('neck_ppyoloe_plus_t', 'cspnet_ppyoloe_plus_t_pan'), ('tutorial_small', 'cspnet_tutorial'),
    ('neck_yolo11n', 'cspnet_yolo11n_pan'), ('yolov5n', 'cspnet_yolov5n'), ('neck_yolov8n', 'cspnet_yolov8n_pan'),
    ('yolov9_t', 'cspnet_yolov9t'), ('neck_yolox_nano', 'cspnet_yolox_nano_pan'),
])
def test_what_a_tensor_becomes_depends_on_no_other(source, name):
    """Every tensor of a file is left out once: those that a part has are what they are in the whole."""
    info, state_dict, *_ = load_fixture(source)
    model = timm.create_model(name, device='meta', **({} if 'neck' in source else info.get('args', {})))
    whole = fit(state_dict, model).tensors
    keys = [k for k in state_dict if not k.endswith('num_batches_tracked')]
    markers = {k for n in naming.namings() for k in keys if n.prefixes([k])}  # by which the network is known
    for i in range(6):
        left_out = {*keys[i::6]} - markers
        part = fit({k: v for k, v in state_dict.items() if k not in left_out}, model).tensors
        assert len(part) < len(whole)
        assert not [k for k, v in part.items() if not torch.equal(v, whole[k])]


def test_a_network_that_is_nearly_the_one_is_refused(tmp_path):
    def level(chs, args, depth):
        return nn.Sequential(ConvNormAct(chs, 8, 3, stride=args.stride, **args.layers), *[
            ConvNormAct(8, 8, 3, **args.layers) for _ in range(depth - 1)])

    shallow, deep = (CspBackbone(BackboneCfg(levels=(Level(partial(level, depth=depth), 8),) * 3), num_classes=2)
                     for depth in (2, 3))
    with pytest.raises(RuntimeError, match=r'too many, such as .stem\.2\.conv\.weight'):
        shallow.load_state_dict(deep.state_dict())
    with pytest.raises(ValueError, match=r'missing, such as .stem\.2\.conv\.weight'):
        deep.load_state_dict(shallow.state_dict())
    tiny = load_fixture('yolox_tiny')[1]
    for strict in (True, False):
        with pytest.raises(CheckpointError, match='of another shape'):
            timm.create_model('cspnet_yolox_s', num_classes=0).load_state_dict(tiny, strict=strict)


# Classes


@pytest.mark.parametrize('name', (OWN, 'cspnet_yolov8n_cls', 'cspnet_nano'))
def test_the_classifier_of_a_file(name, tmp_path):
    model = randomize(timm.create_model(name, num_classes=5))
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    fc = model.get_classifier().weight
    assert torch.equal(from_file(name, tmp_path / 'a.pth', num_classes=5).get_classifier().weight, fc)
    assert from_file(name, tmp_path / 'a.pth', num_classes=7).get_classifier().out_features == 7
    from_file(name, tmp_path / 'a.pth', features_only=True)
    new = from_file(name, tmp_path / 'a.pth', num_classes=5, overlay=dict(num_classes=-1))  # timm's train.py
    assert not torch.equal(new.get_classifier().weight, fc)
    if name != OWN:  # which has no classifier by itself
        with pytest.raises(CheckpointError, match=r'classifier has 5 classes.*has 1000: pass num_classes=5'):
            from_file(name, tmp_path / 'a.pth')
        headless = {k: v for k, v in model.state_dict().items() if not k.startswith('head.fc.')}
        torch.save(headless, tmp_path / 'b.pth')
        with pytest.raises(CheckpointError, match=r'has no classifier.*num_classes=0'):
            from_file(name, tmp_path / 'b.pth')
        assert from_file(name, tmp_path / 'b.pth', num_classes=7).num_classes == 7


# Folded batch norms


def test_folded_files(own, tmp_path):
    folded = reparameterize_model(copy.deepcopy(own)).eval()
    torch.save(folded.state_dict(), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r'folded.*reparameterize_model'):
        from_file(OWN, tmp_path / 'a.pth', num_classes=3)
    lines = conversion.inspect(tmp_path / 'a.pth')
    assert 'batch norms: folded into the convolutions' in lines and f'model: {OWN}' in lines
    with pytest.raises(CheckpointError, match=r'folded.*cspnet_yolox_nano has them'):
        conversion.convert(tmp_path / 'a.pth', tmp_path / 'out', license='mit')
    with pytest.raises(CheckpointError, match=rf'folded.*are of {OWN}, not of cspnet_yolox_tiny'):
        from_file('cspnet_yolox_tiny', tmp_path / 'a.pth', num_classes=3)
    model = reparameterize_model(timm.create_model(OWN, num_classes=3)).eval()
    model.load_state_dict(torch.load(tmp_path / 'a.pth'))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), folded(x))


def test_a_frameworks_folded_file_loads_into_a_folded_network():
    _, state_dict, x, outputs = load_fixture('yolov8n')
    folded = {k: v for k, v in state_dict.items() if '.bn.' not in k}
    for key in [k for k in state_dict if k.endswith('.bn.weight')]:
        name = key[:-len('.bn.weight')]
        scale = state_dict[key] / (state_dict[f'{name}.bn.running_var'] + 1e-3).sqrt()
        folded[f'{name}.conv.weight'] = state_dict[f'{name}.conv.weight'] * scale[:, None, None, None]
        folded[f'{name}.conv.bias'] = state_dict[f'{name}.bn.bias'] - state_dict[f'{name}.bn.running_mean'] * scale
    with pytest.raises(CheckpointError, match='folded'):
        timm.create_model('cspnet_yolov8n', num_classes=0).load_state_dict(folded)
    assert candidates(folded) == ['cspnet_yolov8n']
    model = reparameterize_model(timm.create_model('cspnet_yolov8n', num_classes=0)).eval()
    model.load_state_dict(folded)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), outputs['stride32'], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('dtype', (torch.int8, torch.int16, torch.uint8, torch.bool, torch.int64, torch.complex64))
@pytest.mark.parametrize('all_of_them', (True, False))
def test_what_is_no_floating_point_number_is_no_weight(own, dtype, all_of_them, tmp_path):
    """Quantised weights have the right names and shapes."""
    state_dict = dict(own.state_dict())
    for key in list(state_dict) if all_of_them else ['layer3.csp.merge.conv.weight']:
        state_dict[key] = state_dict[key].to(dtype)
    torch.save(state_dict, path := tmp_path / 'a.pth')
    model = timm.create_model(OWN, num_classes=3)
    for load in (partial(from_file, OWN, path, num_classes=3), partial(model.load_state_dict, state_dict),
                 partial(timm.create_model, OWN, num_classes=3, checkpoint_path=str(path))):
        with pytest.raises(CheckpointError, match=rf'holds no weights, .*of {str(dtype)[6:]}: if they were quantised'):
            load()


@pytest.mark.parametrize('key, value', [
    ('stem.conv.weight', float('nan')), ('head.fc.bias', float('inf')), ('layer2.csp.merge.bn.running_var', -1.)])
def test_a_diverged_training_is_told(own, key, value, tmp_path, caplog):
    state_dict = {k: v.clone() for k, v in own.state_dict().items()}
    state_dict[key].view(-1)[-1] = value
    torch.save(state_dict, path := tmp_path / 'a.pth')
    from_file(OWN, path, num_classes=3)
    assert str(path) in caplog.text and f'such as {key!r}' in caplog.text
    caplog.clear()
    torch.save(own.state_dict(), path)
    from_file(OWN, path, num_classes=3)
    assert 'NaN' not in caplog.text


# Memory of one's own


def test_assigned_tensors_are_not_shared():
    model = timm.create_model('cspnet_small')
    model.load_state_dict(timm.create_model('cs3darknet_focus_s').state_dict(), assign=True)
    model.train()(torch.rand(2, 3, 64, 64))
    assert {int(v) for k, v in model.state_dict().items() if k.endswith('num_batches_tracked')} == {1}
    save(model.state_dict())


# Containers


def test_bfloat16_of_paddle(tmp_path):
    state_dict = {k: v for k, v in load_fixture('ppyoloe_t')[1].items() if not k.endswith('num_batches_tracked')}
    bits = {k: v.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16) for k, v in state_dict.items()}
    for protocol in (2, 4):
        (tmp_path / 'a.pdparams').write_bytes(pickle.dumps(bits, protocol=protocol))
        with open_checkpoint(tmp_path / 'a.pdparams') as checkpoint:
            tensors = checkpoint.state_dict()
        assert all(torch.equal(tensors[k], v.to(torch.bfloat16).float()) for k, v in state_dict.items())


def test_without_checksums(own, tmp_path):
    config = pytest.importorskip('torch.utils.serialization', reason='before PyTorch 2.7 all files had them').config
    config.save.compute_crc32 = False
    try:
        torch.save(own.state_dict(), tmp_path / 'a.pth')
    finally:
        config.save.compute_crc32 = True
    assert conversion.inspect(tmp_path / 'a.pth')[-1] == f'model: {OWN}'


POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:' + b'4d' * 32 + b'\nsize 257717640\n'


@pytest.mark.parametrize('data, word', [
    (b'<!DOCTYPE html><title>Quota exceeded</title>' + b'x' * 900, 'HTML'),
    (b'\n <html><body>no</body></html>', 'HTML'),
    (POINTER, 'Git LFS'), (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', 'XML'),
    (b'{"error": "not found"}', 'JSON'), (b'\x1f\x8b' + b'\0' * 50, 'gzip'), (b'BZh9' + b'x' * 50, 'bzip2'),
    (b'\0' * 10, r'less than the 16|no checkpoint|no safetensors'),
])
@pytest.mark.parametrize('ending', ('.pt', '.pth', '.weights', '.safetensors', '.pdparams'))
def test_what_is_no_checkpoint_is_called_what_it_is(data, word, ending, tmp_path):
    path = tmp_path / f'a{ending}'
    path.write_bytes(data)
    for read in (conversion.inspect, lambda path: from_file('cspnet_mobilenetv2', path)):
        with pytest.raises(CheckpointError, match=word) as error:
            read(path)
        assert str(path) in str(error.value)


def test_torchscript_and_packed_files(own, tmp_path):
    import zipfile

    torch.jit.save(torch.jit.trace(own, torch.rand(1, 3, 64, 64)), tmp_path / 'best.torchscript')
    with pytest.raises(CheckpointError, match='TorchScript'):
        conversion.inspect(tmp_path / 'best.torchscript')
    torch.save(own.state_dict(), tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as file:
        file.write(tmp_path / 'a.pth', 'inner/a.pth')
    with pytest.raises(CheckpointError, match=r'inner/a\.pth.*unpack'):
        conversion.inspect(tmp_path / 'a.zip')


# Labels


@pytest.mark.parametrize('names, expected', [
    (['a', 'b', 'c'], ('a', 'b', 'c')), ({0: 'a', 1: 'b', 2: 'c'}, ('a', 'b', 'c')),
    ({0: 'a', 2: 'c'}, ('a', '1', 'c')),
    ({'2': 'c', '0': 'a', '1': 'b'}, ('a', 'b', 'c')), ({'b': 1, 'a': 0, 'c': 2}, ('a', 'b', 'c')),
    ({0: 'a', 10 ** 9: 'b'}, ()), ({0: 1.5}, ()), ({}, ()), (None, ()), ({-1: 'a'}, ()), ('abc', ()),
])
def test_labels_in_any_form(names, expected, tmp_path):
    assert sorted_labels(names, 3) == expected
    model = timm.create_model(OWN, num_classes=3)
    for key in ('names', 'class_to_idx', 'idx_to_class'):
        torch.save({'state_dict': model.state_dict(), key: names}, tmp_path / 'a.pth')
        with open_checkpoint(tmp_path / 'a.pth') as checkpoint:
            assert checkpoint.labels == expected
    if isinstance(names, dict) and expected:
        folder = hub.save(model, tmp_path / 'saved', license='mit', label_names=names)
        config = json.loads((folder / 'config.json').read_text())
        assert config['label_names'] == list(expected)


# Provenance and cost of a conversion


def test_a_file_of_the_users_is_called_that(tmp_path):
    _, state_dict, _, _ = load_fixture('yolov8n')
    path = foreign.ultralytics_file(tmp_path / 'My best.pt', state_dict)
    done = conversion.convert(path, tmp_path / 'out')
    assert (done.model, done.preprocessing) == ('cspnet_yolov8n', 'cspnet_yolov8n.coco')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']
    assert config['tag'] == f'my_best_{done.sha256[:8]}' and not config.get('origin_url')
    for text in ('`My best.pt`', done.sha256, 'Ultralytics'):
        assert text in config['description'] and text in (tmp_path / 'out' / 'README.md').read_text()
    assert 'github.com/ultralytics' not in (tmp_path / 'out' / 'README.md').read_text()


@pytest.mark.parametrize('fixture', ('yolox_nano', 'yolo11n', 'own'))
def test_a_conversion_builds_three_networks_and_converts_once(fixture, own, tmp_path, monkeypatch):
    if fixture == 'own':
        torch.save({'state_dict': {f'net.{k}': v for k, v in own.state_dict().items()}}, path := tmp_path / 'a.pth')
    else:
        info, state_dict, _, _ = load_fixture(fixture)
        path = foreign.write(fixture, tmp_path / f'a{foreign.suffix(fixture)}', state_dict, info)
    built, renamed = [], []
    init, rename = CspBackbone.__init__, naming.Naming.rename_behind
    monkeypatch.setattr(CspBackbone, '__init__', lambda *args, **kwargs: built.append(1) or init(*args, **kwargs))
    monkeypatch.setattr(naming.Naming, 'rename_behind', lambda *args: renamed.append(1) or rename(*args))
    conversion.convert(path, tmp_path / 'out', license='mit')
    assert len(built) <= 3 and len(renamed) == (fixture != 'own')
    built.clear()
    renamed.clear()
    conversion.inspect(path)
    assert not built and len(renamed) <= 1


# Small files that are slow


def _text(value):
    return b'X' + struct.pack('<I', len(value)) + value.encode()


@settings(GENERATED, phases=[Phase.explicit, Phase.generate])
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
@example(13, 299, 6)  # as many names as could once be had
@example(100, 300, 1)
def test_shared_children_are_paid_for(tmp_path_factory, params, middles, leaves):
    import tracemalloc

    def module(parameters, modules):
        parts = [
            b'(' + b''.join(_text(k) + v for k, v in items) + b'u' if items else b'' for items in (parameters, modules)]
        return (_text('models.a') + _text('B') + b'\x93)\x81}' + _text('_buffers') + b'}s'
                + _text('_parameters') + b'}' + parts[0] + b's' + _text('_modules') + b'}' + parts[1] + b'sb')

    def repeated(body, memo, count):
        return [(str(i), body + b'q' + bytes([memo]) if i == 0 else b'h' + bytes([memo])) for i in range(count)]

    array = pickle.dumps(np.zeros(1, np.float32), 2)[2:-1]
    leaf = module(repeated(array, 201, params), [])
    body = module([], repeated(module([], repeated(leaf, 202, leaves)), 203, middles))
    path = tmp_path_factory.getbasetemp() / 'shared.pt'
    path.write_bytes(b'\x80\x04' + body + b'.')
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            assert len(checkpoint.tensors) == params * middles * leaves
    except CheckpointError as error:
        assert 'nested or repeated' in str(error)
    finally:
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert used < 2 * path.stat().st_size + (5 << 20)
