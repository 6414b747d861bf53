"""What every registered model owes its users. A new family is tested by being registered."""
import copy
import itertools
import operator

import pytest
import timm
import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.layers import BatchNormAct2d
from timm.models import create_model, group_parameters, reparameterize_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from cspnet_timm.counting import count_macs, count_parameters
from cspnet_timm.shapes import ShapesAlone
from cspnet_timm.sizes import fingerprint, model_sizes
from tests.samples import FAMILIES
from tests.stages import forms, known_forms
from tests.zoo import ALL, create, create_short, distance, of_features

SIZE = 64


def image(batch=2, chans=3, size=(SIZE, SIZE)):
    return torch.randn(batch, chans, *size)


# On every model: names, shapes and types, on the meta device, where a large model costs no more than a small one.


def test_there_are_models():
    assert len(ALL) >= 7
    assert all(word not in name for name in ALL for word in ('vit', 'dla', 'tresnet'))  # two libraries look for these


def test_contract(any_model):
    """Layout, default config, row of the table of sizes, shapes of all maps, device and dtype: all of one instance."""
    model = create_model(any_model, device='meta', dtype=torch.bfloat16).eval()
    tensors = [*model.parameters(), *model.buffers()]
    assert all(t.device.type == 'meta' for t in tensors)
    assert all(t.dtype == torch.bfloat16 for t in tensors if t.is_floating_point())

    infos = list(model.feature_info)
    taps, channels, reductions = ([info[key] for info in infos] for key in ('module', 'num_chs', 'reduction'))
    names = ['stem'] + [f'layer{i}' for i in range(1, len(taps))]
    with_neck = any_model.endswith('_pan')
    assert [name for name, _ in model.named_children()] == [*names, *['neck'] * with_neck, 'head']
    first = len(taps) - len(model.neck.outputs) if with_neck else len(taps)
    assert taps == names[:first] + [f'neck.outputs.{i}' for i in range(len(taps) - first)]
    assert reductions == [2 ** (i + 1) for i in range(len(names))]
    for name, module in model.named_modules():
        assert not isinstance(module, BatchNormAct2d), name
        assert name.rsplit('.', 1)[-1] not in ('fuse', 'reparameterize', 'switch_to_deploy'), name
    assert type(next(m for m in model.modules() if not any(m.children()))) is nn.Conv2d  # as torchgeo expects

    row, state_dict = model_sizes()[any_model], model.state_dict()
    input_size = model.pretrained_cfg['input_size']
    assert (row.parameters, row.macs, row.side, row.channels, row.reductions, row.fingerprint) == (
        count_parameters(model), count_macs(model, input_size), input_size[-1], tuple(channels), tuple(reductions),
        fingerprint(state_dict),
    ), 'run: python benchmarks/tables.py'

    missing = forms(model) - known_forms()  # a stage or a block that no compiler would see
    assert not missing, f'put into a network of tests/stages.py: {missing}'

    cfg = model.pretrained_cfg
    assert cfg['license'] and cfg['architecture'] == any_model
    assert state_dict[f'{cfg["first_conv"]}.weight'].shape[1] == 3
    assert resolve_data_config({}, model=model)['input_size'] == cfg['input_size']
    model.reset_classifier(3)
    assert model.state_dict()[f'{cfg["classifier"]}.weight'].shape[0] == 3

    height, width = cfg['input_size'][1:]
    with ShapesAlone(convolutions=False):
        features, maps = model.forward_intermediates(torch.empty(1, *cfg['input_size'], device='meta').bfloat16())
        assert model.forward_head(features).shape == (1, 3)
    assert tuple(features.shape[1:]) == (model.num_features, *cfg['pool_size'])
    assert [tuple(m.shape) for m in maps] == [(1, c, height // r, width // r) for c, r in zip(channels, reductions)]


def test_feature_shapes(any_model):
    check_feature_shapes(any_model, 8)


def test_shapes_are_calculated_as_they_are():
    """Of a convolution of any arguments, with weights on another device; what PyTorch refuses is refused."""
    choices = dict(kernel_size=(1, 2, 3, (1, 3)), stride=(1, 2, (2, 1)), padding=(0, 1, (1, 0), 'valid'),
                   dilation=(1, 2, (1, 2)), groups=(1, 2), size=((4, 7), (8, 8), (1, 5)), in_chs=(4, 6))
    refused = 0
    for values in itertools.product(*choices.values()):
        kwargs = dict(zip(choices, values))
        x = torch.empty(2, kwargs.pop('in_chs'), *kwargs.pop('size'))
        conv = nn.Conv2d(4, 8, **kwargs)
        try:
            shape = copy.deepcopy(conv).to('meta')(x.to('meta')).shape
        except RuntimeError as error:
            refused += 1
            with pytest.raises(type(error)), ShapesAlone(convolutions=False):
                conv(x.to('meta'))
        else:
            with ShapesAlone(convolutions=False):
                assert conv(x.to('meta')).shape == shape, kwargs
    assert refused > 100


@pytest.mark.slow
@pytest.mark.parametrize('output_stride', [16, 32])
def test_feature_shapes_of_each_structure(model_name, output_stride):
    check_feature_shapes(model_name, output_stride)


def check_feature_shapes(any_model, output_stride):
    if any_model.endswith('_pan') and output_stride < max(model_sizes()[any_model].reductions):
        with pytest.raises(ValueError, match=f'output_stride={output_stride} cannot be with a neck'):
            create_model(any_model, features_only=True, output_stride=output_stride, device='meta')
        return
    model = create_model(any_model, features_only=True, output_stride=output_stride, device='meta').eval()
    with ShapesAlone(convolutions=False):
        outputs = model(torch.empty(1, 3, 128, 192, device='meta'))
    assert len(outputs) == len(model.feature_info.channels()) >= 4
    for output, chs, reduction in zip(outputs, model.feature_info.channels(), model.feature_info.reduction()):
        assert reduction <= output_stride
        assert tuple(output.shape) == (1, chs, 128 // reduction, 192 // reduction)


@pytest.mark.slow
@pytest.mark.parametrize('name', FAMILIES)
def test_runs(name):
    """With numbers, all blocks of all levels."""
    model = create(name)
    with torch.no_grad():
        assert model(image(1)).isfinite().all()


# On the small networks of stages.py, or on a model of each family: arguments, numbers, training.


@pytest.mark.parametrize('out_indices', [(0,), (-1,), (1, 3), (-3, -1), (3, 1), 2])
def test_out_indices(network, out_indices):
    every = create_model(network, features_only=True, device='meta')
    model = create_model(network, features_only=True, out_indices=out_indices, device='meta').eval()
    n = len(every.feature_info.channels())
    wanted = range(n - out_indices, n) if isinstance(out_indices, int) else sorted(i % n for i in out_indices)
    assert model.feature_info.channels() == [every.feature_info.channels()[i] for i in wanted]
    with ShapesAlone(convolutions=False):
        outputs = model(torch.empty(1, 3, 64, 64, device='meta'))
    assert [o.shape[1] for o in outputs] == model.feature_info.channels()
    assert [64 // o.shape[-1] for o in outputs] == model.feature_info.reduction()


def test_bad_arguments(network):
    with pytest.raises(TypeError, match='no_such_argument'):
        create_model(network, no_such_argument=1, device='meta')
    with pytest.raises(ValueError, match=r'output_stride=4 .*8, 16 and 32'):
        create_model(network, output_stride=4, device='meta')
    for bad in ((9,), (-9,), 9, 0, (1, 1), ()):
        with pytest.raises(ValueError, match='out_indices'):
            create_model(network, features_only=True, out_indices=bad, device='meta')
    with pytest.raises(ValueError, match='global_pool'):
        create_model(network, num_classes=7, global_pool='', device='meta')


def test_device_context(network):
    with torch.device('meta'):
        assert all(p.device.type == 'meta' for p in create_model(network).parameters())


@pytest.mark.parametrize('in_chans', [1, 4])
def test_in_chans(network, in_chans):
    model = create_model(network, in_chans=in_chans, num_classes=5, device='meta')
    assert model.in_chans == in_chans
    assert model(torch.empty(2, in_chans, 64, 64, device='meta')).shape == (2, 5)


def test_classifier(network):
    model = create_model(network, num_classes=7, device='meta').eval()
    x = torch.empty(2, 3, 64, 64, device='meta')
    features = model.forward_features(x)
    assert features.shape[1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.get_classifier().weight.shape[0] == 7
    model.reset_classifier(11)
    assert model.num_classes == 11 and model(x).shape == (2, 11)
    model.reset_classifier(3, 'catavgmax')
    assert model(x).shape == (2, 3)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    with pytest.raises(ValueError, match=r"global_pool='' gives feature maps, which num_classes=4 cannot classify"):
        model.reset_classifier(4, '')
    assert model.num_classes == 3 and model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    assert create_model(network, num_classes=0, global_pool='', device='meta').eval()(x).ndim == 4


def test_group_matcher(model_name):
    model = create_model(model_name, num_classes=5, device='meta')
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert groups.keys() == dict(model.named_parameters()).keys()
        last = max(groups.values())
        assert all(group == last for name, group in groups.items() if name.startswith('head.'))
        assert all(group == 0 for name, group in groups.items() if name.startswith('stem.'))
        parts = [name for name, _ in model.named_children() if name != 'head']
        order = [max(g for n, g in groups.items() if n.startswith(f'{part}.')) for part in parts]
        assert order == sorted(set(order)) and last == order[-1] + 1
    assert last == len(order)  # coarse: one group per level and one for the head


def test_values_to_start_from(network):
    """A classifier without preference, batch norms that change nothing, convolutions that are random."""
    model = create_model(network, num_classes=7)
    assert not model.get_classifier().bias.any() and model.get_classifier().weight.std() > 0
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()
        elif isinstance(module, nn.Conv2d):
            assert module.weight.std() > 0 and (module.bias is None or not module.bias.any() or module.bias.std() > 0)


def test_forward_backward(model_name):
    model = create_short(model_name, num_classes=10).train()
    y = model(image())
    assert y.shape == (2, 10) and y.isfinite().all()
    y.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


def test_features_agree(model_name):
    model, extractor = create_short(model_name), create_short(model_name, features_only=True)
    extractor.load_state_dict(of_features(model.state_dict(), extractor))
    x = image_of_taps = image()
    with torch.no_grad():
        final, taps = model.forward_intermediates(x)
        assert torch.equal(final, model.forward_features(x)) and torch.equal(final, taps[-1])
        assert torch.equal(model(x), model.forward_head(final))
        assert all(torch.equal(a, b) for a, b in zip(extractor(x), taps))
        last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
        assert len(last_two) == 2 and torch.equal(last_two[0], taps[-2])
        early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        assert torch.equal(early[0], taps[1])
        # torchvision's FPN wrapper and two DETR repositories take the levels from the plain model by name
        getter = IntermediateLayerGetter(model, {'layer1': 'a', 'layer3': 'b'})
        levels = taps if not hasattr(model, 'neck') else [x := level(x) for level in model.levels()]
        assert [torch.equal(o, levels[i]) for o, i in zip(getter(image_of_taps).values(), (1, 3))] == [True, True]


@pytest.mark.parametrize('feature_cls', ['dict', 'hook', 'fx', 'getter'])
def test_every_extractor(network, feature_cls):
    extractors = []
    for cls in ('list', feature_cls):
        torch.manual_seed(1)
        kwargs = dict(features_only=True, feature_cls=cls, out_indices=(-1, 1))
        extractors.append(create_model(network, **kwargs).eval())
    x = image(1)
    with torch.no_grad():
        expected, outputs = (extractor(x) for extractor in extractors)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    assert len(outputs) == 2 and all(distance(a, b) < 1e-6 for a, b in zip(outputs, expected))
    assert extractors[1].feature_info.channels() == [o.shape[1] for o in outputs]


def test_prune(network):
    model = create(network)
    x = image()
    with torch.no_grad():
        taps = model.forward_intermediates(x, intermediates_only=True)
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([1, -2]) == [1, len(taps) - 2]
        assert torch.equal(pruned.forward_features(x), taps[-2])
        assert pruned.num_features == taps[-2].shape[1] and pruned.get_classifier() is not model.get_classifier()
        kept = copy.deepcopy(model)
        kept.prune_intermediate_layers(1, prune_head=False)
        assert torch.equal(kept(x), model(x))
    pruned.train()
    pruned(image()).mean().backward()
    assert all(p.grad is not None for p in pruned.parameters())


@pytest.mark.parametrize('features', [False, True])
def test_gradient_checkpointing(network, features):
    kwargs = dict(features_only=True) if features else dict(num_classes=10)
    model = create(network, **kwargs).train()
    x = image()

    def step(checkpointing):
        net = copy.deepcopy(model)
        net.set_grad_checkpointing(checkpointing)
        y = net(x)
        sum(o.square().mean() for o in (y if features else [y])).backward()
        return y, {name: p.grad for name, p in net.named_parameters()}

    (plain, grads), (checkpointed, grads_again) = step(False), step(True)
    for a, b in zip(plain if features else [plain], checkpointed if features else [checkpointed]):
        assert torch.equal(a, b)
    assert all(torch.allclose(grads[name], grads_again[name], rtol=1e-5, atol=1e-7) for name in grads)


def test_odd_size(network):
    model = create(network)
    with torch.no_grad():
        taps = model.forward_intermediates(image(1, size=(70, 109)), intermediates_only=True)
        assert model(image(1, size=(70, 109))).isfinite().all()
    for tap, info in zip(taps, model.feature_info):
        for length, full in zip(tap.shape[-2:], (70, 109)):
            assert length in (full // info['reduction'], -(-full // info['reduction']))


def test_bfloat16_and_channels_last(network):
    model = create(network)
    x = image(1, size=(96, 96))  # a map of one pixel has no memory format
    with torch.no_grad():
        expected = model(x)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        for module in last.modules():
            if isinstance(module, torch.nn.Conv2d):  # nothing before it has changed the format
                module.register_forward_pre_hook(lambda module, args: operator.setitem(
                    formats, module, args[0].stride(1) == 1 or args[0].shape[1] == 1))
        formats = {}
        assert distance(last(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-4
        assert formats and all(formats.values())
        half = copy.deepcopy(model).to(torch.bfloat16)(x.to(torch.bfloat16))
        assert half.dtype == torch.bfloat16 and distance(half, expected) < 0.2
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert distance(model(x), expected) < 0.2


def test_reparameterize(model_name):
    # As timm's scripts do it: on a model that is still in train mode.
    model = create_short(model_name)
    fused = reparameterize_model(copy.deepcopy(model).train()).eval()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    x = image()
    with torch.no_grad():
        assert distance(fused(x), model(x)) < 1e-5
        features = create_short(model_name, features_only=True)
        features.load_state_dict(of_features(model.state_dict(), features))
        for a, b in zip(reparameterize_model(features).eval()(x), model.forward_intermediates(x)[1]):
            assert distance(a, b) < 1e-5


def test_sync_batch_norm(network):
    model = create(network)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    x = image()
    with torch.no_grad():
        assert torch.equal(converted(x), model(x))


def test_norm_and_act_layers(network):
    x = image()
    frozen = create_model(network, norm_layer=FrozenBatchNorm2d, num_classes=4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    assert frozen(x).shape == (2, 4)
    by_name = create_model(network, norm_layer='frozenbatchnorm2d', act_layer='hard_swish', num_classes=4)
    assert {type(m) for m in by_name.modules()} >= {FrozenBatchNorm2d}
    assert any('swish' in type(m).__name__.lower() for m in by_name.modules()) and by_name(x).shape == (2, 4)
    model = create_model(network, bn_eps=0.02, bn_momentum=0.3, device='meta')
    assert {(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {(0.02, 0.3)}


def test_drop(network):
    model = create(network, drop_rate=0.3, drop_path_rate=0.3, drop_block_rate=0.3, num_classes=4)
    plain = create(network, num_classes=4)
    kinds = {type(m).__name__ for m in model.modules()}
    residual = any(hasattr(m, 'drop_path') for m in model.modules())  # not every network has blocks to leave out
    assert kinds >= {'DropBlock2d', *(['DropPath'] if residual else [])}
    assert model.state_dict().keys() == plain.state_dict().keys()
    x = image(size=(128, 128))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        assert not torch.equal(model.train()(x), model(x))


def test_weights_round_trip(network, tmp_path):
    model = create(network, num_classes=6)
    path = tmp_path / 'model.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    x = image()
    with torch.no_grad():
        expected = model(x)
        for kwargs in (
            dict(checkpoint_path=str(path), num_classes=6),
            dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=6)),
        ):
            assert torch.equal(timm.create_model(network, **kwargs).eval()(x), expected)
        adapted = timm.create_model(
            network, pretrained=True, num_classes=3, in_chans=1, pretrained_cfg_overlay=dict(file=str(path))).eval()
        assert adapted(x[:, :1]).shape == (2, 3)
        taps = timm.create_model(
            network, pretrained=True, features_only=True, pretrained_cfg_overlay=dict(file=str(path))).eval()(x)
        assert all(torch.equal(a, b) for a, b in zip(taps, model.forward_intermediates(x)[1]))
