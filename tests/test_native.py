"""The native engine: equal to PyTorch on every structure, at any batch and size, and deaf to plans that lie."""
import copy
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from timm.models import reparameterize_model

from cspnet_timm.deployment.native import (
    NativeEngine,
    Plan,
    UnsupportedNetwork,
    build,
    calibrate,
    correct,
    lower,
    unavailable,
    within,
)
from cspnet_timm.deployment.native.calibrate import evaluate
from cspnet_timm.deployment.native.tuning import Tuning

from .preloaded import python
from .stages import NETWORKS
from .zoo import create, distance, randomize

WHY_NOT = unavailable()
runs_here = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

# What the engine can be compiled for here, the best last, which is what it is compiled for outside these tests.
LEVELS = {'vnni': build.NEEDED, 'bfloat16': build.NEEDED + build.BFLOAT16, 'tiles': build.NEEDED + build.TILES}
LEVELS = {name: units for name, units in LEVELS.items() if build.cpu_flags().issuperset(units)}

# Self-attention is not what the engine does, and its plans are for every size, while TensorFlow's padding of one is not
# that of another. Nothing else may be added here without a reason.
UNSUPPORTED = {'stages_attention', 'stages_padding', 'cspnet_yolo11m', 'cspnet_yolo11m_cls', 'cspnet_yolo11n',
               'cspnet_yolo11n_cls', 'cspnet_yolo11n_pan', 'cspnet_yolo26n_pan', 'cspnet_yolox_tiny_keras'}
BOUND_8 = 0.1  # the same of maps and weights in bytes
BOUND = 0.015  # relative distance of bfloat16 maps and weights to float32; OpenVINO has 0.010 where this has 0.0097


# The best first, as it is used; the others are slow.
@pytest.fixture(params=[
    pytest.param(name, marks=pytest.mark.slow if i else ()) for i, name in enumerate(reversed(list(LEVELS)))])
def level(request, monkeypatch):
    """The engine as it is on a CPU that has less."""
    monkeypatch.setattr(build, 'cpu_flags', lambda: frozenset(LEVELS[request.param]))
    assert bool(build.library().csp_tiles()) == (request.param == 'tiles')


def prepared(name, **kwargs):
    return reparameterize_model(create(name, **kwargs))


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_list(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


@torch.no_grad()
def check(model, x, bound=BOUND, threads=2):
    engine = NativeEngine(lower(model, x), threads)
    expected, got = as_list(model(x)), engine(x)
    assert len(expected) == len(got)
    for a, b in zip(got, expected):
        assert a.shape == b.shape and a.dtype == torch.float32
        assert distance(a, b) < bound
    return engine, got


@torch.no_grad()
def check_bytes(model, x, plan, bound=BOUND_8):
    engine = NativeEngine(calibrate(plan, [x]), 2, 'int8')
    expected, got = as_list(model(x)), engine(x)
    for a, b in zip(got, expected):
        assert a.shape == b.shape and a.dtype == torch.float32
        assert distance(a, b) < bound
    return engine, got


@runs_here
@pytest.mark.networks('stages_detectors', 'stages_paper', 'stages_attention', 'stages_padding')
def test_every_stage(network, build):
    model = reparameterize_model(build())
    x = images(2, 3, 64, 96)
    if network in UNSUPPORTED:
        with pytest.raises(UnsupportedNetwork, match=r'aten\.(reshape|pad).* in layer\d\.\w+\.'):
            lower(model, x)
        return
    engine, _ = check(model, x)
    check_bytes(model, x, engine.plan)


@runs_here
@pytest.mark.usefixtures('level')
@pytest.mark.parametrize('name', [
    'mobilenetv3_small_100', *(pytest.param(name, marks=pytest.mark.slow) for name in (
        'cs3sedarknet_l', 'cspresnext50')),
])
def test_models_of_timm(name):
    model, x = prepared(name), images(1, 3, 64, 64)
    engine, _ = check(model, x)
    check_bytes(model, x, engine.plan)


@runs_here
def test_unsupported_are_known():
    assert UNSUPPORTED <= {*timm.list_models('cspnet_*'), *NETWORKS}


@runs_here
@pytest.mark.parametrize('name', [
    'cspnet_nano', *(pytest.param(name, marks=pytest.mark.slow) for name in (
        'cspnet_rtmdet_nano', 'cspnet_plain_peleenet')),
])
def test_features(name):
    model, x = prepared(name, features_only=True), images(3, 3, 96, 160)
    engine, _ = check(model, x)
    check_bytes(model, x, engine.plan)


@runs_here
@pytest.mark.parametrize('precision, bound', [('bfloat16', BOUND), ('int8', BOUND_8)])
@pytest.mark.parametrize(
    'name', ['cspnet_nano', pytest.param('cspnet_resnext50_elastic', marks=pytest.mark.slow)])
def test_batches_sizes_and_threads(name, precision, bound):
    model = prepared(name)
    plan = calibrate(lower(model, images(2, 3, 64, 64)), [images(8, 3, 96, 160, seed=8)])
    one, two = (NativeEngine(plan, threads, precision) for threads in (1, 2))
    for batch, height, width in ((1, 64, 64), (2, 64, 64), (3, 96, 160), (5, 64, 64), (9, 64, 64), (1, 96, 160)):
        x = images(batch, 3, height, width, seed=batch)
        got = one(x)[0]
        with torch.no_grad():
            assert distance(got, model(x)) < bound
        assert torch.equal(two(x)[0], got)
        assert torch.equal(two(x.contiguous(memory_format=torch.channels_last))[0], got)
    assert one(x[:0])[0].shape == (0, 1000)


@runs_here
@pytest.mark.usefixtures('level')
def test_large_maps_by_bands():
    """Bands of rows, buffers that hold a part of the rows, and layers that threads share, as at the sizes of use."""
    model = prepared('cspnet_medium')
    x = images(3, 3, 256, 256)
    engine, (got,) = check(model, x)
    assert torch.equal(got, NativeEngine(engine.plan, 1)(x)[0])
    assert torch.equal(got[:1], engine(x[:1])[0])
    engine, (got,) = check_bytes(model, x, engine.plan)
    assert torch.equal(got, NativeEngine(engine.plan, 1, 'int8')(x)[0])
    assert torch.equal(got[:1], engine(x[:1])[0])


class JoinsItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)

    def forward(self, x):
        return torch.cat([x, self.conv(x)], 1)


class OneConv(nn.Module):
    def __init__(self, *args, act=None, residual=False, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(*args, **kwargs)
        self.act = act or nn.Identity()
        self.residual = residual

    def forward(self, x):
        y = self.act(self.conv(x))
        return x + y if self.residual else y


CONVS = [
    OneConv(3, 16, 6, 2, 2), OneConv(3, 64, 7, 2, 3), OneConv(64, 96, 3, 2, 1), OneConv(40, 72, 3, 1, 1),
    OneConv(64, 64, 3, 1, 1, residual=True), OneConv(64, 64, 3, 1, 2, dilation=2), OneConv(96, 40, 1, 2),
    OneConv(128, 128, 3, 1, 1, groups=32), OneConv(128, 128, 3, 2, 1, groups=4), OneConv(48, 96, 5, 1, 2, groups=48),
    OneConv(40, 40, 5, 2, 2, groups=40, residual=False), OneConv(64, 64, (1, 3), 1, (0, 1)), OneConv(24, 24, 1),
    *(OneConv(32, 32, 1, act=act) for act in (
        nn.SiLU(), nn.ReLU(), nn.LeakyReLU(0.1), nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(),
        nn.ReLU6())),
]


def conv_id(m):
    return f'{m.conv.in_channels}-{m.conv.out_channels}-{m.conv.kernel_size[0]}-{type(m.act).__name__}'


@runs_here
@pytest.mark.usefixtures('level')
@pytest.mark.parametrize('conv', CONVS, ids=conv_id)
@pytest.mark.parametrize('size', [(9, 21), (32, 16)])
def test_layers(conv, size):
    """A layer of numbers that bfloat16 has, against float64: nothing is left but the rounding of the result."""
    randomize(conv)
    for p in conv.parameters():
        p.data = p.data.bfloat16().float()
    x = images(2, conv.conv.in_channels, *size).bfloat16().float()
    got, = NativeEngine(lower(conv.eval(), x), 2)(x)
    with torch.no_grad():
        expected = conv.double()(x.double())
    conv.float()
    assert (got.double() - expected).abs().max() <= 2 ** -8 * expected.abs().max()
    assert distance(got, expected) < 2.5e-3


class AfterAConv(nn.Module):
    """What is tested reads a map in bytes, or two side by side with scales of their own."""

    def __init__(self, layer, chs, joined=False):
        super().__init__()
        self.layer = layer
        part = max(chs // 4, 1)
        self.first = nn.ModuleList(nn.Conv2d(4, n, 1) for n in ([part, chs - part] if joined else [chs]))

    def forward(self, x):
        y = torch.cat([nn.functional.silu(conv(x)) for conv in self.first], 1)
        return y, self.layer(y)


def channel_range(plan, v):
    """The ends of each channel of a value, ``(C, 1, 1)``."""
    return plan.tensors[f'{v - 1}.range'][..., None, None].unbind(1)


@runs_here
@pytest.mark.usefixtures('level')
@pytest.mark.parametrize('joined', [False, True], ids=['one', 'joined'])
@pytest.mark.parametrize('conv', [
    *CONVS, OneConv(32, 64, 3, 1, 1), OneConv(48, 40, 3, 2, 1), OneConv(96, 96, 3, 1, 1, residual=True),
    OneConv(256, 24, 3, 1, 1, act=nn.SiLU()), OneConv(256, 64, 1),
    OneConv(20, 20, 5, 1, 2, act=nn.ReLU(), residual=True),
    OneConv(48, 48, 3, 1, 1, groups=48, act=nn.SiLU(), residual=True),
], ids=conv_id)
def test_layers_of_bytes(conv, joined):
    """A layer between maps in bytes: float64 makes of what it reads what it writes, but for the rounding to a step."""
    chs = conv.conv.in_channels
    model = randomize(AfterAConv(copy.deepcopy(conv), chs, joined)).eval()
    model.first[-1].weight.data *= len(model.first)
    x = images(2, 4, 9, 21)
    if not conv.conv.groups > 1 and not joined:  # weights that bytes have, times the steps of what they read
        plan = calibrate(lower(model, x), [x])
        low, high = channel_range(plan, plan.outputs[0][0])
        weight = model.layer.conv.weight.data
        weight.copy_((weight / weight.flatten(1).abs().amax(dim=1)[:, None, None, None] * 127).round() / 127)
        weight /= chs * weight[0, 0].numel() ** 0.5 / 8 * (high - low) / (high - low).mean()
    plan = calibrate(lower(model, x), [x])
    for i in range(len(plan.operations)):  # the plan's copy is in bfloat16
        if plan.tensors.get(f'{i}.weight', x).shape == model.layer.conv.weight.shape:
            plan.tensors[f'{i}.weight'] = model.layer.conv.weight.detach()
    read, got = NativeEngine(plan, 2, 'int8')(x)
    low, high = channel_range(plan, plan.outputs[1][0])
    step = (high - low) / 255
    zero = (-low / step).round()
    with torch.no_grad():
        expected = model.layer.double()(read.double())
    error = (got / step - (expected / step).maximum(-zero).minimum(255 - zero)).abs()
    exact = not joined and (conv.conv.groups == 1 or conv.conv.groups == conv.conv.out_channels)
    assert error.max() < (0.85 if exact else 4) and error.mean() < (0.27 if exact else 0.5)


@runs_here
@pytest.mark.usefixtures('level')
@pytest.mark.parametrize('act', [nn.SiLU(), nn.ReLU()])
def test_layers_of_bytes_hold_what_calibration_did_not_show(act):
    """Twice and four times the largest values that the scales were taken from are cut off, and nothing runs over."""
    model = randomize(AfterAConv(OneConv(32, 32, 3, 1, 1, act=act), 32)).eval()
    x = images(1, 4, 16, 16)
    plan = calibrate(lower(model, x), [x])
    low, high = channel_range(plan, plan.outputs[1][0])
    engine = NativeEngine(plan, 1, 'int8')
    for factor in (2, 4, 1000):
        read, got = engine(factor * x)
        with torch.no_grad():
            expected = model.layer(read).maximum(low).minimum(high)
        assert distance(got, expected) < 0.05


@runs_here
@pytest.mark.usefixtures('level')
def test_small_numbers_have_small_steps():
    """A map of numbers of a ten-thousandth is as exact as any, but beside tiles, whose float16 ends there."""
    model, x = randomize(AfterAConv(OneConv(32, 32, 3, 1, 1, act=nn.ReLU()), 32)).eval(), images(1, 4, 16, 16)
    for p in model.layer.parameters():
        p.data *= 1e-5
    _, got = NativeEngine(calibrate(lower(model, x), [x]), 1, 'int8')(x)
    with torch.no_grad():
        expected = model(x)[1]
    assert expected.abs().max() < 1e-3
    if build.library().csp_tiles():
        assert (got - expected).abs().max() <= 2 ** -14  # a step
    else:
        assert distance(got, expected) < 0.03


def test_ranges():
    """The plan computed by PyTorch is the network, and its ranges are those of the maps."""
    model, x = randomize(EveryOperation()).eval(), images(2, 4, 18, 34)
    plan = lower(model, x)
    for weight in (name for name in plan.tensors if name.endswith('weight')):
        plan.tensors[weight] = plan.tensors[weight].float()
    with torch.no_grad():
        values, expected = list(evaluate(plan, x)), model(x)
    for (v, _), y in zip(plan.outputs, expected):
        assert distance(values[v].flatten(), y.flatten()) < 5e-3
    ranges = calibrate(plan, [x, 2 * x]).ranges
    with torch.no_grad():
        twice = list(evaluate(plan, 2 * x))
    for (low, high, peak), a, b in zip(ranges, values, twice, strict=True):
        least, most = (min(float(v.min()) for v in (a, b)), max(float(v.max()) for v in (a, b)))
        assert min(least, 0) <= low <= 0.3 * min(least, 0) and 0.3 * max(most, 0) <= high <= max(most, 0)
        assert peak == max(-min(least, 0), most)
    assert plan.ranges is None


def test_channels_have_ranges_of_their_own():
    """Between a channel's own and that of the whole map, however few positions there are, and with room for more."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.MaxPool2d(7, 1, 3)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1., 0, 0], [0.01, 0, 0], [0, 0, 0], [0, 1, 0]])[..., None, None])
        model[0].bias.zero_()
    x, few = torch.rand(4, 3, 40, 40), torch.rand(1, 3, 1, 2)
    plan = calibrate(lower(model, x, torch.float32), [x[:2], x[2:]])
    ends = plan.tensors['0.range']
    assert tuple(ends.shape) == (4, 2) and bool((ends[:, 0] <= 0).all() and (ends[:, 1] >= 0).all())
    width = ends[:, 1] - ends[:, 0]
    assert 1.1 < ends[0, 1] < 1.4 and 1.1 < ends[3, 1] < 1.4
    assert 0.05 < width[1] / width[0] < 0.3 and 0.03 < width[2] / width[0] < 0.3  # a tenth of it, and what was nothing
    with torch.no_grad():  # what a pooling takes is not cut off
        y = model[:2](x)
    assert bool((plan.tensors['1.range'][:, 1] >= y.amax((0, 2, 3))).all())
    with torch.no_grad():
        y, ends = model[0](few), calibrate(lower(model, few, torch.float32), [few]).tensors['0.range']
    assert bool((ends[:, 0] <= y.amin((0, 2, 3))).all() and (ends[:, 1] >= y.amax((0, 2, 3))).all())
    assert bool((ends[:, 1] - ends[:, 0] > 0.5 * (y.max() - y.min())).all())


class Layers(nn.Module):
    """Dense, grouped and depthwise convolutions, and a pooling that leaves the largest values."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 6, 2, 2), nn.SiLU(), nn.Conv2d(16, 32, 3, padding=1), nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Hardswish(), nn.Conv2d(32, 48, 3, 2, 1, groups=2), nn.SiLU(),
            nn.MaxPool2d(5, 1, 2), nn.Conv2d(48, 40, 1), nn.ReLU(), nn.Conv2d(40, 24, 3, padding=1))
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = self.layers(x)
        return x, self.head(x.mean((2, 3)))


@runs_here
@pytest.mark.usefixtures('level')
def test_corrected():
    """On other images than it has seen, what rounding does is less by a tenth and more; the plan as given stays."""
    model = Layers().eval()
    x = torch.nn.functional.interpolate(images(24, 3, 12, 12), scale_factor=4., mode='bilinear') + 0.5
    seen, x = [x[:8], x[8:16]], x[16:]
    plan = calibrate(lower(model, x[:1], torch.float32), seen)
    before = {name: tensor.clone() for name, tensor in plan.tensors.items()}
    better = correct(plan, seen)
    assert all(torch.equal(tensor, plan.tensors[name]) for name, tensor in before.items())
    with torch.no_grad():
        expected = model(x)
    errors = [[distance(a, b) for a, b in zip(NativeEngine(p, 1, 'int8')(x), expected)] for p in (plan, better)]
    assert all(b < 0.9 * a for a, b in zip(*errors))
    for few in ([seen[0][:1]], [seen[0][:3, :, :16, :16]]):  # nothing is fitted to what tells nothing
        plan = calibrate(lower(model, x[:1], torch.float32), few)
        plans = plan, correct(plan, few)
        errors = [[distance(a, b) for a, b in zip(NativeEngine(p, 1, 'int8')(x), expected)] for p in plans]
        assert all(b < 1.1 * a for a, b in zip(*errors))
    again = Plan.from_bytes(*better.to_bytes())
    for a, b in zip(NativeEngine(again, 2, 'int8')(x), NativeEngine(better, 1, 'int8')(x)):
        assert torch.equal(a, b)


@runs_here
def test_what_costs_most_stays_in_bfloat16():
    """As few maps as a bound takes, and the error of all if it cannot be kept."""
    model = Layers().eval()
    with torch.no_grad():
        model.layers[6].weight[0] *= 50  # by whose range others have few steps, as have the weights
        model.layers[9].weight[:, 0] /= 50
    x = torch.nn.functional.interpolate(images(16, 3, 12, 12), scale_factor=4., mode='bilinear')
    plan = calibrate(lower(model, x[:1], torch.float32), [x[:8]])
    with torch.no_grad():
        expected = model(x[8:])
    tried = {}

    def error(plan):
        found = max(distance(a, b) for a, b in zip(NativeEngine(plan, 1, 'int8')(x[8:]), expected))
        tried[len(plan.halves)] = found
        return found

    assert not within(plan, [x[:8]], error, 1.).halves and list(tried) == [0]
    best = within(plan, [x[:8]], error, 0.7 * tried[0])
    assert error(best) <= 0.7 * tried[0] and 0 < len(best.halves) < 6
    assert 'layers.7' in [best.names[v - 1] for v in best.halves]  # the activation behind that channel
    again = Plan.from_bytes(*best.to_bytes())
    assert again.halves == best.halves
    for a, b in zip(NativeEngine(again, 2, 'int8')(x), NativeEngine(best, 1, 'int8')(x)):
        assert torch.equal(a, b)
    least = within(plan, [x[:8]], error, 0.)
    assert error(least) == min(tried.values()) < 0.02


@runs_here
def test_weights_in_bytes_are_those_that_were_chosen():
    """bfloat16 holds them so well that the byte of each follows."""
    for k in range(-127, 128):
        unit = torch.rand(64, generator=torch.Generator().manual_seed(k)) * 1e-3 + 1e-6
        assert bool((((k * unit / 0.37).bfloat16().double() * 0.37 / unit).round() == k).all())


@pytest.mark.parametrize('kind', [None, 'calibrated'])
def test_plan_round_trip(kind):
    model = prepared('cspnet_nano')
    x = images(1, 3, 64, 64)
    plan = lower(model, x)
    if kind:
        plan = calibrate(plan, [x])
    text, tensors = plan.to_bytes()
    again = Plan.from_bytes(text, tensors)
    assert again.to_bytes()[0] == text
    if WHY_NOT is None:
        precision = 'int8' if kind else 'bfloat16'
        assert torch.equal(NativeEngine(again, 1, precision)(x)[0], NativeEngine(plan, 1, precision)(x)[0])


class EveryOperation(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.gate = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = nn.functional.leaky_relu(self.conv(x), 0.1)
        y = y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        y = y + torch.cat([y[:, 4:], nn.functional.pad(y[:, :2], (0, 0, 0, 0, 0, 2))], 1)
        down = nn.functional.max_pool2d(y, 2, ceil_mode=True)
        y = nn.functional.interpolate(down, scale_factor=2.) + y
        return y, nn.functional.avg_pool2d(y, 3, 2, 1), y[:, :, ::2, ::2]


def test_every_operation():
    model, x = randomize(EveryOperation()).eval(), images(2, 4, 18, 34)
    plan = lower(model, x)
    kinds = {op['op'] for op in plan.operations}
    assert kinds == {'conv', 'act', 'add', 'mul', 'cat', 'slice', 'pool', 'mean', 'upsample', 'zeros'}
    if WHY_NOT is None:
        check(model, x)
        check_bytes(model, x, plan)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 16, 3, 1, 1)

    def forward(self, x):
        y = self.a(x).relu()
        return self.b(y * y.mean((2, 3), keepdim=True))


@runs_here
@pytest.mark.parametrize('precision', ['bfloat16', 'int8'])
def test_a_map_scaled_by_its_own_mean(precision):
    """By bands of rows, as at the sizes of use: the one pixel has no rows to go by."""
    model, x = randomize(Scaled()).eval(), images(4, 3, 64, 64)
    engine = NativeEngine(calibrate(lower(model, x), [x]), 2, precision, Tuning(band=20 << 10))
    with torch.no_grad():
        expected = model(x)
    for n in (1, 2, 3, 4):
        assert distance(engine(x[:n])[0], expected[:n]) < 0.05


@runs_here
@pytest.mark.usefixtures('level')
def test_slices_of_slices():
    class Slices(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 64, 3, 1, 1)

        def forward(self, x):
            y = self.conv(x)[:, 16:]
            return y[:, 8:24].mean((2, 3)), y[:, 40:][:, 1:5], self.conv(x)[:, :3]

    check(randomize(Slices()).eval(), images(2, 3, 9, 7))


@runs_here
@pytest.mark.usefixtures('level')
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_in_one_image_stays_in_it(value):
    """A map of one channel, and one of 17 with a residual: what lies behind a pixel's channels is another's."""
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (
                nn.Conv2d(3, 1, 1), nn.Conv2d(1, 17, 1), nn.Conv2d(17, 17, 3, 1, 1), nn.Conv2d(17, 4, 1))

        def forward(self, x):
            y = self.b(self.a(x))
            return self.d(nn.functional.max_pool2d(y + self.c(y), 1)), self.d(y + self.c(y))

    model, x = randomize(Narrow()).eval(), images(3, 3, 5, 5)
    engine, clean = check(model, x)
    bad = x.clone()
    bad[1] = value
    for a, b in zip(engine(bad), clean):
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2]) and not a[1].isfinite().all()
    engine(torch.full_like(x, value))
    for a, b in zip(engine(x[:1]), clean):
        assert torch.equal(a, b[:1])


@runs_here
@pytest.mark.usefixtures('level')
@pytest.mark.parametrize('act', [nn.Identity(), nn.SiLU(), nn.ReLU(), nn.LeakyReLU(0.1), nn.Mish(), nn.Hardswish(),
                                 nn.Hardsigmoid(), nn.Sigmoid(), nn.ReLU6(), nn.MaxPool2d(3, 1, 1)])
def test_no_number_stays_no_number(act):
    model, x = randomize(OneConv(3, 8, 1, act=act)).eval(), images(2, 3, 7, 7)
    engine = NativeEngine(lower(model, x), 1)
    x[0, :, 3, 3] = float('nan')
    with torch.no_grad():
        assert torch.equal(engine(x)[0].isnan(), model(x).isnan())


LIES = {
    'op': 'system', 'x': 10 ** 6, 'y': -1, 'xs': [0, 99], 'stride': 0, 'pad': [1, 10 ** 9], 'dilation': 2 ** 40,
    'groups': 3, 'kind': '../x', 'slope': 'nan', 'start': -8, 'stop': 10 ** 5, 'kernel': [0, 3], 'ceil': 1,
    'scale': 0.5, 'like': 77, 'channels': 2 ** 31,
}


def test_plans_that_lie_are_refused():
    text, tensors = lower(EveryOperation().eval(), images(1, 4, 18, 34)).to_bytes()
    seen = set()
    for i, op in enumerate(json.loads(text)['operations']):
        for field in op:
            for lie in (LIES[field], None if field != 'like' else 'x', True if field != 'ceil' else 7, [[]]):
                data = json.loads(text)
                data['operations'][i][field] = lie
                with pytest.raises(ValueError, match=rf'operations\[{i}\]|\.weight'):
                    Plan.from_bytes(json.dumps(data), tensors)
            seen.add(field)
    assert seen == set(LIES)
    for field, lie in (('input', [4, 18]), ('input', [5, 18, 34]), ('input', [4, 10 ** 9, 34]),
                       ('outputs', [[99, False]]), ('outputs', []), ('outputs', [[1, True]]),
                       ('operations', 'x'), ('format', 2), ('halves', 'x'), ('halves', {}), ('halves', None),
                       ('halves', [0]), ('halves', [10 ** 6]), ('halves', [True]), ('halves', [1.5]),
                       ('halves', [1] * 5000), ('ranges', []), ('ranges', 'x'), ('ranges', {}),
                       *(('ranges', [lie] * (len(json.loads(text)['operations']) + 1)) for lie in (
                           None, [0, 1], [0, 1, '2'], [0.5, 1, 1], [-2, -1, 1], [0, 1, -1], [0, 1, 1e300], [0, True, 1],
                           [-1, float('nan'), 1]))):
        with pytest.raises(ValueError, match='The plan'):
            Plan.from_bytes(json.dumps({**json.loads(text), field: lie}), tensors)
    with pytest.raises(ValueError, match='no JSON'):
        Plan.from_bytes('{', tensors)


def test_tensors_that_lie_are_refused():
    text, tensors = lower(EveryOperation().eval(), images(1, 4, 18, 34)).to_bytes()
    name = next(n for n in tensors if n.endswith('.weight'))
    bias = name.replace('weight', 'bias')
    for wrong in ({name: tensors[name][:, :2]}, {name: tensors[name][:4]}, {name: tensors[name].flatten()},
                  {bias: tensors[bias].double()}, {bias: tensors[bias][:1]}, {'99.weight': tensors[name]}):
        with pytest.raises(ValueError, match='The plan'):
            Plan.from_bytes(text, {**tensors, **wrong})
    unit, bad = name.replace('weight', 'unit'), torch.ones(len(tensors[bias]))
    Plan.from_bytes(text, {**tensors, unit: bad})
    for wrong in (bad.double(), bad[1:], -bad, 0 * bad, bad / 0, 0 * bad / 0):
        with pytest.raises(ValueError, match=f'The plan.s tensor {unit} is no vector of {len(bad)} positive float32'):
            Plan.from_bytes(text, {**tensors, unit: wrong})
    ends, count = name.replace('weight', 'range'), len(tensors[bias])
    each = torch.tensor([[-1., 2.]]).repeat(count, 1)
    Plan.from_bytes(text, {**tensors, ends: each})
    for wrong in (each.double(), each[1:], -each, each[:, :1], each.flatten(), each / 0, 0 * each / 0, each * 1e30):
        with pytest.raises(ValueError, match=f'The plan.s tensor {ends} (is no ranges of|has {count - 1} ranges)'):
            Plan.from_bytes(text, {**tensors, ends: wrong})
    moved = next(i for i, op in enumerate(json.loads(text)['operations']) if op['op'] == 'pool')
    with pytest.raises(ValueError, match=f'{moved}.range'):
        Plan.from_bytes(text, {**tensors, f'{moved}.range': each})
    with pytest.raises(ValueError, match=f'{name} is missing'):
        Plan.from_bytes(text, {k: v for k, v in tensors.items() if k != name})


def test_unsupported_operations_are_named():
    class Odd(nn.Module):
        def forward(self, x):
            return x.cumsum(1)

    with pytest.raises(UnsupportedNetwork, match='cumsum'):
        lower(Odd(), images(1, 3, 8, 8))


def test_no_compiler(monkeypatch):
    monkeypatch.setenv('CXX', '/nowhere/g++')
    with pytest.raises(RuntimeError, match='no C\\+\\+ compiler was found'):
        build.library()


def test_compiler_that_fails(monkeypatch, tmp_path):
    monkeypatch.setenv('CXX', 'false')
    monkeypatch.setenv('CSPNET_TIMM_CACHE', str(tmp_path))
    with pytest.raises(RuntimeError, match='could not be compiled by false'):
        build.library()
    assert not list(tmp_path.iterdir())


@runs_here
@pytest.mark.usefixtures('level')
def test_images_joined_with_maps():
    """Where the engine multiplies in tiles it keeps images in bfloat16, but beside maps in bytes."""
    model, x = randomize(JoinsItsInput()).eval(), images(1, 4, 8, 8)
    check_bytes(model, x, check(model, x)[0].plan, 0.02)


@runs_here
def test_without_the_right_to_tiles(monkeypatch):
    """A system that keeps the tiles' registers from programs gets an engine without them."""
    monkeypatch.setattr(build, 'cpu_flags', lambda: frozenset(build.NEEDED + build.TILES))
    asked = []

    class Withheld:
        def csp_permission(self):
            return -1

    def compiled(units):
        asked.append(units)
        return Withheld() if 'amx_int8' in units else units

    monkeypatch.setattr(build, '_compiled', compiled)
    assert build.library() == (*build.NEEDED, *build.BFLOAT16)
    assert len(asked) == 2


@pytest.mark.parametrize('units, message', [
    ((), 'a CPU with AVX-512 and VNNI, and this one lacks avx512f, '),
    (build.NEEDED[:-2] + build.NEEDED[-1:], 'this one lacks avx512_vnni\\.'),
])
def test_a_cpu_with_less_is_told_what_it_lacks(monkeypatch, units, message):
    monkeypatch.setattr(build, 'cpu_flags', lambda: frozenset(units))
    monkeypatch.setattr(build.sys, 'platform', 'linux')
    monkeypatch.setattr(build.platform, 'machine', lambda: 'x86_64')
    assert re.search(message, build.unavailable())


@runs_here
def test_wrong_use():
    plan = lower(OneConv(3, 8, 1).eval(), images(1, 3, 8, 8))
    with pytest.raises(ValueError, match='precision=\'int4\''):
        NativeEngine(plan, 1, 'int4')
    with pytest.raises(ValueError, match='threads=0'):
        NativeEngine(plan, 0)
    with pytest.raises(ValueError, match='calibrate it'):
        NativeEngine(plan, 1, 'int8')
    for x in (torch.zeros(1, 4, 8, 8), torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8).half()):
        with pytest.raises(ValueError, match='takes float32 images'):
            NativeEngine(plan, 1)(x)


@runs_here
def test_processes_that_start_at_once_compile_once(tmp_path):
    """As torchrun starts them, on a machine that has not compiled the engine yet."""
    compiler = tmp_path / 'compiler'
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *engine.cpp*) echo >> {tmp_path}/calls; sleep 1;; esac\n'
        'exec g++ "$@" -O0 -fsyntax-only\n')
    compiler.chmod(0o755)
    code = ('from cspnet_timm.deployment.native import build\n'
            'build._load = lambda path: open(path).close()\nbuild._compiled(build._units(tiles=True))')
    environment = {**os.environ, 'CXX': str(compiler), 'CSPNET_TIMM_CACHE': str(tmp_path / 'cache')}
    root = Path(__file__).parents[1]
    processes = [subprocess.Popen([python(), '-c', code], env=environment, cwd=root) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0] * 3
    assert (tmp_path / 'calls').read_text() == '\n'
    assert len(list((tmp_path / 'cache').iterdir())) == 1
