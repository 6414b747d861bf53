"""The detectors' backbones: equal to their references, as large as published, and read from the frameworks' names."""
import copy
import logging

import pytest
import timm
import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform, resolve_model_data_config
from timm.layers import ClassifierHead
from timm.utils import reparameterize_model

from cspnet_timm import naming, sources
from cspnet_timm.backbone import BackboneCfg, CspBackbone
from cspnet_timm.blocks import AttentionBlock
from cspnet_timm.checkpoints import CheckpointError
from cspnet_timm.checkpoints.description import TensorInfo, count_classes
from cspnet_timm.families._builder import WEIGHTS
from cspnet_timm.families.yolox import focus_to_conv
from cspnet_timm.fitting import candidates, fit, recognise
from cspnet_timm.layers import ConvHead, ConvNormAct, RepConv, SeparableConv, SpatialPyramidPool
from cspnet_timm.naming import unwrap
from tests.parity import load_fixture

FIXTURES = {
    'cspnext_nano': 'cspnet_rtmdet_nano',
    'cspnext_tiny': 'cspnet_rtmdet_tiny',
    'cspnext_s': 'cspnet_rtmdet_s',
    'yolox_nano': 'cspnet_yolox_nano',
    'yolox_tiny': 'cspnet_yolox_tiny',
    'ppyoloe_t': 'cspnet_ppyoloe_t',
    'ppyoloe_s': 'cspnet_ppyoloe_s',
    'ppyoloe_s_plus': 'cspnet_ppyoloe_plus_s',
    'yolov5n': 'cspnet_yolov5n',
    'yolov8n': 'cspnet_yolov8n',
    'yolov8n_cls': 'cspnet_yolov8n_cls',
    'yolo11n': 'cspnet_yolo11n',
    'yolo11n_cls': 'cspnet_yolo11n_cls',
    'yolo26n': 'cspnet_yolo26n',
}

BACKBONE_PARAMS = {
    'cspnet_rtmdet': dict(nano=545128, tiny=2348700, s=4378320, m=12279432, l=26138912, x=47569560),
    'cspnet_yolox': dict(nano=459968, tiny=2372304, s=4212672, m=12352992, l=27075968, x=50301600),
    'cspnet_ppyoloe': dict(t=1685256, s=2992976, m=9317424, l=21158752, x=40240640),
    'cspnet_ppyoloe_plus': dict(t=1685262, s=2992982, m=9317436, l=21158770, x=40240664),
    'cspnet_yolov5': dict(n=1046368, s=4171456, m=12167904, l=26582912, x=49275040),
    'cspnet_yolov8': dict(n=1272656, s=5079712, m=11855856, l=19808576, x=30943120),
    'cspnet_yolo11': dict(n=1365472, s=5441984, m=10352192, l=12833600, x=28847328),
    'cspnet_yolo26': dict(n=1365472, s=5441984, m=10352192, l=12833600, x=28847328),
}
CLASSIFIER_PARAMS = {  # without and with the head, at 1000 classes
    'cspnet_yolov5': dict(n=(881760, 2493000), s=(3514560, 5453480), m=(10691040, 12957640), l=(23958400, 26552680),
                          x=(45175200, 48097160)),
    'cspnet_yolov8': dict(n=(1108048, 2719288), s=(4422816, 6361736), m=(14786736, 17053336), l=(34886464, 37480744),
                          x=(54500880, 57422840)),
    'cspnet_yolo11': dict(n=(1200864, 2812104), s=(4785088, 6724008), m=(9695296, 11634216), l=(12176704, 14115624),
                          x=(27370464, 29637064)),
}
CLASSIFIER_PARAMS['cspnet_yolo26'] = CLASSIFIER_PARAMS['cspnet_yolo11']
RTMDET_WITH_HEAD = dict(tiny=2.73, s=4.89, m=13.05, l=27.16, x=48.85)  # millions, as published
DEPLOYED_PARAMS = dict(t=1650102, s=2930984, m=9040728, l=20423920, x=38713520)  # RepConv fused, and no more

BATCH_NORM = {  # eps and momentum of the released weights
    'cspnet_rtmdet_s': (1e-5, 0.1), 'cspnet_yolox_s': (1e-3, 0.03), 'cspnet_ppyoloe_s': (1e-5, 0.1),
    'cspnet_ppyoloe_plus_s': (1e-5, 0.1), 'cspnet_yolov5s': (1e-3, 0.03), 'cspnet_yolov5s_cls': (1e-3, 0.03),
    'cspnet_yolov8s': (1e-3, 0.03), 'cspnet_yolov8s_cls': (1e-5, 0.1), 'cspnet_yolo11s': (1e-3, 0.03),
    'cspnet_yolo11s_cls': (1e-5, 0.1), 'cspnet_yolo26s': (1e-3, 0.03), 'cspnet_yolo26s_cls': (1e-5, 0.1),
}


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def randomise(model, seed=0):
    """Give every batch norm statistics and weights that an error would show in."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith(('running_var', 'bn.weight')):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif name.endswith(('running_mean', 'bn.bias', 'alpha')):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return model


def parameters(model, head=True):
    return sum(p.numel() for name, p in model.named_parameters() if head or not name.startswith('head.'))


@pytest.fixture
def silent_once():
    """Notices that are given once per process are given again."""
    naming.say_once.cache_clear()
    yield
    naming.say_once.cache_clear()


@pytest.mark.parametrize('fixture', FIXTURES)
def test_equals_the_reference_at_every_stride(fixture):
    info, state_dict, x, outputs = load_fixture(fixture)
    num_classes = 1000 if 'logits' in outputs else 0
    model = timm.create_model(FIXTURES[fixture], num_classes=num_classes).eval()
    model.load_state_dict(state_dict)
    if fixture.startswith('yolox'):
        x = x.flip(1)  # the reference takes BGR, this package's network RGB
    with torch.no_grad():
        features, maps = model.forward_intermediates(x)
        maps = {f'stride{r}': y for r, y in zip((2, 4, 8, 16, 32), maps)}
        if num_classes:
            maps['logits'] = model.forward_head(features)
    assert set(outputs) <= set(maps)
    for name, expected in outputs.items():
        assert difference(maps[name], expected) < 1e-5, name
    head = num_classes and not fixture.startswith('cspnext')  # whose parameters are counted without
    assert parameters(model, head=bool(head)) == info['params']
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(info['bn_eps'], info['bn_momentum'])}


@pytest.mark.parametrize('name, params', [
    (f'{family}{"" if "yolov" in family or family[-1].isdigit() else "_"}{size}', count)
    for family, sizes in BACKBONE_PARAMS.items() for size, count in sizes.items()])
def test_backbone_parameters(name, params):
    assert parameters(timm.create_model(name, device='meta', num_classes=0)) == params


@pytest.mark.parametrize('name, params', [
    (f'{family}{size}_cls', counts) for family, sizes in CLASSIFIER_PARAMS.items() for size, counts in sizes.items()])
def test_classifier_parameters(name, params):
    model = timm.create_model(name, device='meta')
    assert (parameters(model, head=False), parameters(model)) == params


def test_published_parameters_of_the_rtmdet_classifiers():
    for size, millions in RTMDET_WITH_HEAD.items():
        model = timm.create_model(f'cspnet_rtmdet_{size}', device='meta')
        assert round(parameters(model) / 1e6, 2) == millions, size


@pytest.mark.parametrize('name', BATCH_NORM)
def test_batch_norm_is_that_of_the_released_weights(name):
    model = timm.create_model(name, device='meta')
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {BATCH_NORM[name]}


def test_every_classifying_form_has_the_convolution_in_its_head():
    for name in timm.list_models('cspnet_yolo*_cls'):
        head = timm.create_model(name, device='meta').head
        assert isinstance(head, ConvHead) and head.num_features == (1024 if 'yolov9' in name else 1280), name
    for name in ('cspnet_yolov8n', 'cspnet_yolox_nano', 'cspnet_rtmdet_nano'):
        assert type(timm.create_model(name, device='meta', num_classes=3).head) is ClassifierHead


# Layers


def test_focus_is_a_convolution():
    torch.manual_seed(0)
    weight, x = torch.randn(5, 12, 3, 3), torch.randn(2, 3, 10, 14)
    patches = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
    expected = nn.functional.conv2d(torch.cat(patches, dim=1), weight, padding=1)
    actual = nn.functional.conv2d(x, focus_to_conv(weight), stride=2, padding=2)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_chained_pools_are_the_three_sizes():
    torch.manual_seed(0)
    spp = SpatialPyramidPool(8, 6, entry_act_layer='silu').eval()
    x = torch.randn(2, 8, 17, 9)
    y = spp.conv1(x)
    pools = [nn.functional.max_pool2d(y, k, stride=1, padding=k // 2) for k in (5, 9, 13)]
    assert torch.equal(spp(x), spp.conv2(torch.cat([y, *pools], dim=1)))
    assert not SpatialPyramidPool(8, 6, shortcut=True).shortcut
    linear = SpatialPyramidPool(8, 8, shortcut=True)
    assert not hasattr(linear.conv1, 'act') and linear.shortcut


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('alpha', [False, True])
@pytest.mark.parametrize('stride, dilation', [(1, 1), (2, 1), (1, 2)])
def test_fused_branches_equal_both(alpha, training, stride, dilation):
    torch.manual_seed(0)
    layer = randomise(RepConv(6, 6, stride=stride, dilation=dilation, alpha=alpha)).eval()
    if alpha:
        layer.alpha.data.fill_(-0.7)
    x = torch.randn(2, 6, 11, 9)
    with torch.no_grad():
        expected = layer(x)
        fused = layer.train(training).fuse()
        assert fused.training == training
        assert difference(fused.eval()(x), expected) < 1e-5
    assert [type(m) for m in fused.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))] == [nn.Conv2d]


def test_what_cannot_be_fused_stays():
    layer = RepConv(32, 32, norm_layer='groupnorm')
    assert layer.fuse() is layer
    with pytest.raises(ValueError, match='kernel_size=5'):
        RepConv(8, 8, kernel_size=5)


@pytest.mark.parametrize('size, params', DEPLOYED_PARAMS.items())
def test_deployed_parameters(size, params):
    model = timm.create_model(f'cspnet_ppyoloe_{size}', num_classes=0)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, RepConv):
            parent, _, child = name.rpartition('.')
            setattr(model.get_submodule(parent), child, layer.fuse())
    assert parameters(model) == params


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('name', [
    'cspnet_ppyoloe_plus_t', 'cspnet_rtmdet_nano', 'cspnet_yolo26n', 'cspnet_yolov5n_cls'])
def test_reparameterised_model_is_equal(name, training):
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, num_classes=11)).eval()
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected = model(x)
        fused = reparameterize_model(copy.deepcopy(model).train(training)).eval()
        assert difference(fused(x), expected) < 1e-5
    assert not any(isinstance(m, (nn.BatchNorm2d, RepConv)) for m in fused.modules())


@pytest.mark.parametrize('chs, heads', [(32, 1), (128, 2)])
def test_attention_by_either_route(chs, heads):
    torch.manual_seed(0)
    block = randomise(AttentionBlock(chs)).eval()
    assert block.num_heads == heads
    x = torch.randn(2, chs, 5, 7)
    with torch.no_grad():
        block.fused_attn = True
        fused = block(x)
        block.fused_attn = False
        torch.testing.assert_close(block(x), fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', [
    'cspnet_rtmdet_nano', 'cspnet_ppyoloe_plus_t', 'cspnet_yolox_nano', 'cspnet_yolov8n', 'cspnet_yolo11n'])
def test_zero_init_last_makes_every_block_the_identity(name):
    model = timm.create_model(name, zero_init_last=True).eval()
    blocks = [m for m in model.modules() if hasattr(m, 'zero_init_last') and getattr(m, 'shortcut', True)]
    assert blocks
    for block in blocks:
        conv = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
        x = torch.randn(1, conv.in_channels, 8, 8)
        assert torch.equal(block(x), x)
    separable = SeparableConv(4, 4)
    assert separable.depthwise.bn.weight.min() == 1


def test_head_keeps_its_convolution():
    head = ConvHead(16, 5, hidden_size=24)
    conv = head.conv
    head.reset(3, 'catavgmax', in_features=99)
    assert head.conv is conv and head.num_features == 48 and head.fc.in_features == 48
    assert head(torch.randn(2, 16, 4, 4)).shape == (2, 3)
    head.reset(0, '')
    assert head(torch.randn(2, 16, 4, 4)).shape == (2, 24, 4, 4)
    assert isinstance(head.get_submodule('conv'), ConvNormAct)


def test_layer_decay_counts_the_attention_behind_the_blocks():
    model = timm.create_model('cspnet_yolo11l', device='meta')
    group = model.group_matcher()
    last = {name: group(name) for name, _ in model.named_parameters() if name.startswith('layer4.')}
    assert last['layer4.csp.blocks.blocks.0.entry.conv.weight'] == (1, 4, 0)
    assert last['layer4.csp.blocks.blocks.1.entry.conv.weight'] == (1, 4, 1)
    assert last['layer4.spp.conv1.conv.weight'] == (1, 4, 1)
    assert last['layer4.attn.blocks.0.qkv.conv.weight'] == (1, 4, 2)
    assert last['layer4.attn.blocks.1.qkv.conv.weight'] == (1, 4, 3)


# Released state dicts


@pytest.mark.parametrize('fixture', FIXTURES)
def test_recognises_the_network(fixture):
    _, state_dict, _, _ = load_fixture(fixture)
    name = FIXTURES[fixture]
    found = candidates(state_dict)
    if 'yolo11' in name or 'yolo26' in name:  # one set of tensors, two networks
        assert found == [name.replace('yolo26', 'yolo11'), name.replace('yolo11', 'yolo26')]
    else:
        assert found == [name]
    assert recognise({'state_dict': state_dict}) == found[0]
    model = timm.create_model(name, device='meta')
    assert name in candidates(model.state_dict())


def test_recognises_nothing_else():
    assert recognise({}) is None
    assert recognise({'fc.weight': torch.zeros(3, 3)}) is None
    assert recognise(timm.create_model('resnet18', device='meta').state_dict()) is None
    cut = {k: v for k, v in load_fixture('yolox_nano')[1].items() if 'dark4' not in k}
    assert recognise(cut) is None


def prefixes(state_dict, old, new):
    return {new + k[len(old):] if k.startswith(old) else k: v for k, v in state_dict.items()}


@pytest.mark.parametrize('fixture, old, new', [
    ('cspnext_nano', 'backbone.', ''), ('cspnext_nano', '', 'module.'), ('cspnext_nano', '', 'ema.module.'),
    ('cspnext_nano', 'backbone.', 'model.backbone.'), ('yolox_nano', 'backbone.backbone.', 'backbone.'),
    ('yolox_nano', 'backbone.backbone.', ''), ('yolox_nano', '', 'module.'), ('ppyoloe_t', 'backbone.', ''),
    ('ppyoloe_t', '', 'module.'), ('yolov8n', 'model.', ''), ('yolov8n', '', 'model.'), ('yolo11n', '', 'module.'),
])
def test_prefixes_of_wrappers(fixture, old, new):
    _, state_dict, _, _ = load_fixture(fixture)
    model = timm.create_model(FIXTURES[fixture], num_classes=0)
    expected = converted(state_dict, model)
    actual = converted(prefixes(state_dict, old, new), model)
    assert set(actual) == set(expected) == set(model.state_dict())
    assert all(torch.equal(actual[k], expected[k]) for k in expected)


def converted(state_dict, model):
    """The state dict that the model takes from one under any names."""
    return fit(state_dict, model).state_dict(model)


@pytest.mark.parametrize('name', [
    'cspnet_rtmdet_nano', 'cspnet_yolox_nano', 'cspnet_ppyoloe_plus_t', 'cspnet_yolo11n_cls'])
def test_native_state_dicts_stay(name):
    model = timm.create_model(name)
    state_dict = model.state_dict()
    kept = converted(state_dict, model)
    assert list(kept) == list(state_dict)
    assert all(kept[k] is state_dict[k] for k in state_dict)


def as_mmdet(state_dict):
    words = [('.dconv.', '.depthwise_conv.'), ('.pconv.', '.pointwise_conv.'), ('.m.', '.blocks.')]
    out = {}
    for key, value in state_dict.items():
        key = key.replace('backbone.backbone.', 'backbone.')
        for old, new in words:
            key = key.replace(old, new)
        parts = key.split('.')
        if parts[1].startswith('dark'):
            stage = int(parts[1][4:]) - 1
            parts[1] = f'stage{stage}'
            if parts[2] == ('2' if stage == 4 else '1'):
                parts[3] = dict(conv1='main_conv', conv2='short_conv', conv3='final_conv').get(parts[3], parts[3])
        out['.'.join(parts)] = value
    return out


def as_mmyolo(state_dict):
    out = {}
    for key, value in state_dict.items():
        for i in range(4):
            key = key.replace(f'stages.{i}.', f'stage{i + 1}.0.')
        for old, new in (('stem.conv1.', 'stem.0.'), ('stem.conv2.', 'stem.1.'), ('stem.conv3.', 'stem.2.'),
                         ('.conv2.conv1.', '.conv2.rbr_dense.'), ('.conv2.conv2.', '.conv2.rbr_1x1.'),
                         ('.attn.fc.', '.attn.fc.conv.'), ('_mean', 'running_mean'), ('_variance', 'running_var')):
            key = key.replace(old, new)
        out[key] = value
    return out


@pytest.mark.parametrize('fixture, translate', [
    ('yolox_nano', as_mmdet), ('yolox_tiny', as_mmdet), ('ppyoloe_t', as_mmyolo), ('ppyoloe_s_plus', as_mmyolo)])
def test_names_of_another_framework(fixture, translate):
    _, state_dict, _, _ = load_fixture(fixture)
    model = timm.create_model(FIXTURES[fixture])
    translated = translate(state_dict)
    assert set(translated) != set(state_dict)
    expected, actual = (converted(s, model) for s in (state_dict, translated))
    assert all(torch.equal(actual[k], expected[k]) for k in expected) and set(actual) == set(expected)


def test_the_merge_of_ppyoloe_takes_the_blocks_first():
    _, state_dict, _, _ = load_fixture('ppyoloe_t')
    model = timm.create_model('cspnet_ppyoloe_t')
    native = converted(state_dict, model)
    old = state_dict['backbone.stages.1.conv3.conv.weight']
    half = old.shape[1] // 2
    assert torch.equal(native['layer2.csp.merge.conv.conv.weight'], torch.cat([old[:, half:], old[:, :half]], dim=1))
    old = state_dict['backbone.stages.1.attn.fc.weight']
    new = native['layer2.csp.merge.attn.fc.weight']
    assert torch.equal(new[:half, half:], old[half:, :half]) and torch.equal(new[half:, half:], old[:half, :half])
    bias = state_dict['backbone.stages.1.attn.fc.bias']
    assert torch.equal(native['layer2.csp.merge.attn.fc.bias'], torch.cat([bias[half:], bias[:half]]))


def test_the_convolution_of_both_branches_is_parted():
    _, state_dict, _, _ = load_fixture('yolo11n')
    model = timm.create_model('cspnet_yolo11n')
    native = converted(state_dict, model)
    for old, new in (('model.4', 'layer2.csp'), ('model.10', 'layer4.attn')):
        both, merge = state_dict[f'{old}.cv1.conv.weight'], state_dict[f'{old}.cv2.conv.weight']
        half = both.shape[0] // 2
        assert torch.equal(native[f'{new}.bypass.conv.weight'], both[:half])
        assert torch.equal(native[f'{new}.entry.conv.weight'], both[half:])
        assert torch.equal(native[f'{new}.merge.conv.weight'][:, -half:], merge[:, :half])
        assert torch.equal(native[f'{new}.merge.conv.weight'][:, :-half], merge[:, half:])


def test_an_alpha_of_zero_is_none_at_all():
    _, state_dict, _, _ = load_fixture('ppyoloe_s_plus')
    key = 'backbone.stages.0.blocks.0.conv2.alpha'
    native = converted({**state_dict, key: torch.zeros(1)}, timm.create_model('cspnet_ppyoloe_plus_s'))
    assert native['layer1.csp.blocks.0.conv2.alpha'] == 1
    kept = converted(state_dict, timm.create_model('cspnet_ppyoloe_plus_s'))
    assert torch.equal(kept['layer1.csp.blocks.0.conv2.alpha'], state_dict[key])


def test_a_detector_of_rtmdet_takes_bgr_and_a_classifier_rgb():
    _, state_dict, _, _ = load_fixture('cspnext_nano')
    model = timm.create_model('cspnet_rtmdet_nano', num_classes=0)
    weight = state_dict['backbone.stem.0.conv.weight']
    assert torch.equal(converted(state_dict, model)['stem.conv1.conv.weight'], weight)
    detector = {k: v for k, v in state_dict.items() if not k.startswith('head.')}
    detector['bbox_head.rtm_cls.0.weight'] = torch.zeros(80, 64, 1, 1)
    assert torch.equal(converted(detector, model)['stem.conv1.conv.weight'], weight.flip(1))


@pytest.mark.parametrize('fixture', ['cspnext_nano', 'yolox_nano', 'ppyoloe_t', 'yolov8n'])
def test_neck_head_and_bookkeeping_are_left_out_and_counted(fixture, caplog):
    _, state_dict, _, _ = load_fixture(fixture)
    state_dict = {k: v for k, v in state_dict.items() if not k.startswith('head.')}
    extra = {
        'cspnext_nano': ['neck.reduce_layers.0.conv.weight', 'bbox_head.rtm_cls.0.weight', 'data_preprocessor.mean'],
        'yolox_nano': ['backbone.lateral_conv0.conv.weight', 'head.stems.0.conv.weight', 'ema_backbone_stem_conv'],
        'ppyoloe_t': ['neck.fpn_stages.0.0.conv1.conv.weight', 'yolo_head.stem_cls.0.fc.weight', 'steps'],
        'yolov8n': ['model.12.cv2.conv.weight', 'model.12.m.0.cv1.conv.weight', 'model.22.dfl.conv.weight'],
    }[fixture]
    checkpoint = {
        'epoch': 300, 'optimizer': {'state': {}},
        'state_dict': {**state_dict, **{k: torch.zeros(2, 2, 1, 1) for k in extra}},
    }
    model = timm.create_model(FIXTURES[fixture], num_classes=0)
    with caplog.at_level(logging.INFO, 'cspnet_timm'):
        assert not any(model.load_state_dict(checkpoint))
    assert '3 tensors of neck, head and training were left out' in caplog.text


@pytest.mark.parametrize('fixture, name', [
    ('cspnext_tiny', 'cspnet_rtmdet_s'), ('yolox_tiny', 'cspnet_yolox_nano'), ('ppyoloe_s', 'cspnet_ppyoloe_plus_s'),
    ('ppyoloe_s_plus', 'cspnet_ppyoloe_s'), ('yolov8n', 'cspnet_yolov8s'), ('yolov8n_cls', 'cspnet_yolov8n'),
    ('yolov5n', 'cspnet_yolov8n'), ('yolov8n', 'cspnet_yolox_nano'), ('yolox_nano', 'cspnet_yolov5n'),
    ('cspnext_nano', 'cspnet_yolox_nano'), ('yolox_nano', 'cspnet_rtmdet_nano'), ('yolo11n', 'cspnet_ppyoloe_t'),
])
@pytest.mark.parametrize('route', ['load_state_dict', 'pretrained'])
def test_the_error_names_the_network_that_the_file_holds(fixture, name, route):
    _, state_dict, _, _ = load_fixture(fixture)
    with pytest.raises(CheckpointError, match=f'holds {FIXTURES[fixture]}( or cspnet_yolo26n)?, not {name}'):
        if route == 'pretrained':
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict))
        else:
            timm.create_model(name).load_state_dict(state_dict)


def test_the_error_of_a_part_names_a_tensor():
    _, state_dict, _, _ = load_fixture('ppyoloe_t')
    del state_dict['backbone.stages.2.conv1.conv.weight']
    message = r"a part of cspnet_ppyoloe_t: 1 tensor is missing, 'layer3.csp.bypass.conv.weight'.*strict=False"
    with pytest.raises(CheckpointError, match=message):
        timm.create_model('cspnet_ppyoloe_t').load_state_dict(state_dict)


@pytest.mark.parametrize('fixture, num_classes', [('cspnext_tiny', 1000), ('ppyoloe_t', None), ('yolov8n_cls', 1000)])
def test_channel_attention_is_no_classifier(fixture, num_classes):
    _, state_dict, _, _ = load_fixture(fixture)
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in state_dict.items()}
    assert count_classes(infos) == num_classes
    backbone = {name: info for name, info in infos.items() if 'head.' not in name and 'linear.' not in name}
    assert count_classes(backbone) is None


def test_containers_are_opened():
    tensor = torch.zeros(1)
    assert unwrap({'model': {'a': tensor}, 'start_epoch': 3, 'optimizer': {'b': tensor}}) == {'a': tensor}
    assert unwrap({'meta': {}, 'state_dict': {'a': tensor, 'epoch': 3}}) == {'a': tensor}
    assert unwrap({'a': tensor, 'model': 'name'}) == {'a': tensor}


@pytest.mark.parametrize('kwargs', [dict(), dict(num_classes=10), dict(in_chans=1), dict(features_only=True)])
@pytest.mark.parametrize('fixture', ['cspnext_nano', 'yolox_nano', 'yolov8n_cls'])
def test_pretrained_adapts_input_and_classifier(fixture, kwargs):
    _, state_dict, x, outputs = load_fixture(fixture)
    model = timm.create_model(
        FIXTURES[fixture], pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict), **kwargs).eval()
    assert 'state_dict' not in model.pretrained_cfg
    if fixture.startswith('yolox'):
        x = x.flip(1)
    if 'in_chans' in kwargs:
        assert model(x[:, :1]).ndim == 2
        return
    with torch.no_grad():
        if 'features_only' in kwargs:
            last = model(x)[-1]
        else:
            last = model.forward_features(x)
            assert model(x).shape[1] == kwargs.get('num_classes', model.num_classes or model.num_features)
    assert difference(last, outputs['stride32']) < 1e-5


# Weights as tags


DETECTORS = tuple(f'cspnet_{f}' for f in ('rtmdet_', 'yolox_', 'ppyoloe_', 'yolov5', 'yolov8', 'yolo11', 'yolo26'))


def detector_tags():
    return [name for name in WEIGHTS if name.startswith(DETECTORS)]


@pytest.mark.parametrize('name', detector_tags())
def test_every_tag_tells_its_provenance(name):
    cfg, info = timm.get_pretrained_cfg(name), WEIGHTS[name]
    assert info.data and info.source and info.license == cfg.license
    assert bool(info.metrics) == bool(info.metrics_source)
    assert cfg.num_classes == (1000 if 'top1' in info.metrics else 0)
    stride = 64 if '_p6' in name else 32
    assert cfg.pool_size == tuple(size // stride for size in cfg.input_size[1:])
    if cfg.license == 'agpl-3.0':
        assert cfg.url is None and cfg.hf_hub_id is None and cfg.origin_url.startswith('https://github.com/ultralytics/')
    else:
        third = name.startswith('cspnet_rtmdet_x_p6')  # released by somebody who names no licence
        assert cfg.license == ('unknown' if third else 'apache-2.0') and cfg.url.startswith('https://')


def test_every_detectors_network_has_a_tag():
    names = {name.partition('.')[0] for name in detector_tags()}
    registered = [m for f in DETECTORS for m in timm.list_models(f'{f}*')]
    assert names == set(registered) and len(names) == 7 + 8 + 10 + 40 + 42


ONE, ZERO = (1., 1., 1.), (0., 0., 0.)
BYTES = (1 / 255, 1 / 255, 1 / 255)


@pytest.mark.parametrize('name, mean, std, size, crop', [
    ('cspnet_rtmdet_m', IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, (224, 224), (224 / 236, 'center', 'bicubic')),
    ('cspnet_rtmdet_m.coco', IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, (640, 640), (1., 'border', 'bilinear')),
    ('cspnet_rtmdet_m.udp_aic_coco', IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, (256, 192),
     (1., 'center', 'bilinear')),
    ('cspnet_yolox_tiny', ZERO, BYTES, (416, 416), (1., 'border', 'bilinear')),
    ('cspnet_yolox_s', ZERO, BYTES, (640, 640), (1., 'border', 'bilinear')),
    ('cspnet_ppyoloe_s.coco', IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, (640, 640), (1., 'squash', 'bicubic')),
    ('cspnet_ppyoloe_plus_s.coco', ZERO, ONE, (640, 640), (1., 'squash', 'bicubic')),
    ('cspnet_ppyoloe_plus_s', ZERO, ONE, (640, 640), (1., 'squash', 'bicubic')),
    ('cspnet_yolov5s', ZERO, ONE, (640, 640), (1., 'border', 'bilinear')),
    ('cspnet_yolov5s_cls', IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, (224, 224), (1., 'center', 'bilinear')),
    ('cspnet_yolov8s_cls', ZERO, ONE, (224, 224), (1., 'center', 'bilinear')),
    ('cspnet_yolo26n_cls', ZERO, ONE, (224, 224), (1., 'center', 'bilinear')),
])
def test_preprocessing(name, mean, std, size, crop):
    config = resolve_model_data_config(timm.create_model(name, device='meta'))
    assert config['mean'] == mean and config['std'] == std and config['input_size'] == (3, *size)
    assert (config['crop_pct'], config['crop_mode'], config['interpolation']) == crop


def test_timms_transform_gives_yolox_its_bytes():
    import numpy as np
    from PIL import Image

    pixels = np.random.RandomState(0).randint(0, 256, (416, 416, 3), dtype=np.uint8)
    config = resolve_model_data_config(timm.create_model('cspnet_yolox_nano', device='meta'))
    x = create_transform(**config)(Image.fromarray(pixels))
    torch.testing.assert_close(x, torch.from_numpy(pixels).permute(2, 0, 1).float(), rtol=0, atol=1e-3)


def test_defaults():
    assert timm.get_pretrained_cfg('cspnet_rtmdet_s').tag == 'rsb_a1_in1k'
    assert timm.get_pretrained_cfg('cspnet_yolox_s').tag == 'coco'
    assert timm.get_pretrained_cfg('cspnet_ppyoloe_s').tag == 'in1k'
    assert timm.create_model('cspnet_yolox_nano', device='meta').num_classes == 0
    assert timm.create_model('cspnet_yolox_nano', device='meta', num_classes=10).get_classifier().out_features == 10


# Licences and downloads


@pytest.mark.parametrize('name', ['cspnet_yolov5n', 'cspnet_yolov8n_cls', 'cspnet_yolo11n', 'cspnet_yolo26x'])
def test_agpl_weights_are_never_downloaded(name, monkeypatch):
    monkeypatch.setattr(sources, 'open_url', lambda *args, **kwargs: pytest.fail('a download was started'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    origin = timm.get_pretrained_cfg(name).origin_url
    with pytest.raises(RuntimeError) as error:
        timm.create_model(name, pretrained=True)
    for part in (name, 'agpl-3.0', origin, 'pretrained_cfg_overlay=dict(file='):
        assert part in str(error.value)


def test_the_notice_of_the_licence_comes_once(caplog, silent_once):
    _, state_dict, _, _ = load_fixture('yolov8n')
    with caplog.at_level(logging.WARNING, 'cspnet_timm'):
        for _ in range(2):
            timm.create_model('cspnet_yolov8n', pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict))
    assert [r.levelname for r in caplog.records].count('WARNING') == 1
    assert 'AGPL-3.0' in caplog.text


def test_no_notice_for_other_weights(caplog, silent_once):
    _, state_dict, _, _ = load_fixture('yolox_nano')
    with caplog.at_level(logging.WARNING, 'cspnet_timm'):
        timm.create_model('cspnet_yolox_nano').load_state_dict(state_dict)
    assert not caplog.records


@pytest.mark.parametrize('fixture, container', [('yolox_nano', 'model'), ('cspnext_tiny', 'state_dict')])
def test_pretrained_downloads_a_container(fixture, container, tmp_path, monkeypatch):
    """Where the file comes from is the matter of tests/test_sources.py."""
    _, state_dict, x, outputs = load_fixture(fixture)
    name = FIXTURES[fixture]
    asked = []

    def fetch(*args, **kwargs):
        asked.append(args)
        torch.save({container: state_dict, 'meta': {'epoch': 3}}, tmp_path / 'file.pth')
        return tmp_path / 'file.pth'

    monkeypatch.setattr(sources, 'fetch', fetch)
    model = timm.create_model(name, pretrained=True).eval()
    tag = f'{name}.{model.pretrained_cfg["tag"]}'
    assert asked[0][:3] == (tag, WEIGHTS[tag].sources, 'apache-2.0')
    assert model.pretrained_cfg['url'] == timm.get_pretrained_cfg(name).url
    with torch.no_grad():
        y = model.forward_features(x.flip(1) if fixture == 'yolox_nano' else x)
    assert difference(y, outputs['stride32']) < 1e-5


def test_a_cut_network_still_converts():
    _, state_dict, x, outputs = load_fixture('yolov8n')
    model = timm.create_model('cspnet_yolov8n').eval()
    model.prune_intermediate_layers([2])
    model.load_state_dict(state_dict)
    with torch.no_grad():
        assert difference(model.forward_features(x), outputs['stride8']) < 1e-5


def test_weights_need_no_pooled_size_in_the_network():
    cfg = BackboneCfg(levels=timm_levels('cspnet_yolo11n'))
    assert CspBackbone(cfg, num_classes=0).eval()(torch.randn(1, 3, 75, 43)).shape == (1, 256)


def timm_levels(name):
    from cspnet_timm.families.yolo11 import yolo11_cfg

    return yolo11_cfg(name[-1], classifier=False).levels
