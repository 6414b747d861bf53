"""Every operation of a plan by itself against a slow reference, and random plans and networks."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cspnet_timm.deployment.native import (
    NativeEngine,
    Plan,
    UnsupportedNetwork,
    build,
    calibrate,
    correct,
    lower,
    unavailable,
)
from cspnet_timm.deployment.native.plan import ACTIVATIONS, POOLS

from . import native_fuzz, native_reference
from .native_fuzz import LEVELS, level
from .native_graphs import Drawn, Source, random_plan

WHY_NOT = unavailable()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

SIZES = [(1, 1), (4, 6), (7, 5), (16, 16), (9, 17)]
CHANNELS = [1, 16, 17, 33, 64, 96]


def conv(x, out, kernel=(1, 1), stride=1, pad=None, dilation=1, groups=1):
    """A convolution as an operation, and its weights."""
    pad = [k // 2 * dilation for k in kernel] if pad is None else pad
    return dict(op='conv', x=x, stride=stride, pad=pad, dilation=dilation, groups=groups), (out, kernel)


def pool(kind, kernel, stride, pad, ceil=False):
    return dict(op='pool', x=1, kind=kind, kernel=kernel, stride=stride, pad=pad, ceil=ceil)


def operations(c):
    """What is tested on value 1, a map of ``c`` channels; value 2 is one like it, 3 its mean, 4 its maximum."""
    yield 'conv 1x1', *conv(1, 24)
    yield 'conv 1x1 to 33', *conv(1, 33)
    yield 'conv 1x1 at 2', *conv(1, 16, stride=2)
    yield 'conv 3x3', *conv(1, 40, (3, 3))
    yield 'conv 3x3 at 2', *conv(1, 17, (3, 3), 2)
    yield 'conv 3x3 dilated', *conv(1, 32, (3, 3), dilation=2)
    yield 'conv 1x3', *conv(1, 8, (1, 3))
    yield 'conv 6x6 at 2', *conv(1, 16, (6, 6), 2, [2, 2])
    yield 'conv 5x5 at 3', *conv(1, 5, (5, 5), 3)
    yield 'depthwise 3x3', *conv(1, c, (3, 3), groups=c)
    yield 'depthwise 5x5 at 2', *conv(1, c, (5, 5), 2, groups=c)
    yield 'depthwise 3x3 dilated', *conv(1, c, (3, 3), dilation=2, groups=c)
    for groups in (2, 3):
        if c % groups == 0 and c > groups:
            yield f'conv in {groups} groups', *conv(1, 4 * groups, (3, 3), groups=groups)
    for kind in ACTIVATIONS:
        yield kind, dict(op='act', x=1, kind=kind, slope=0.1 if kind == 'leaky_relu' else 0.), None
    yield 'add', dict(op='add', x=1, y=2), None
    yield 'mul', dict(op='mul', x=1, y=2), None
    yield 'mul by a pixel', dict(op='mul', x=1, y=3), None
    yield 'cat', dict(op='cat', xs=[2, 1, 2]), None
    yield 'cat of two kinds', dict(op='cat', xs=[4, 3]), None
    yield 'slice', dict(op='slice', x=1, start=c // 3, stop=max(c // 3 + 1, c - 1)), None
    for kind in POOLS:
        yield f'{kind} pool', pool(kind, [3, 3], 1, [1, 1]), None
        yield f'{kind} pool at 2', pool(kind, [2, 3], 2, [0, 1], True), None
        yield f'{kind} pool at 3', pool(kind, [5, 5], 3, [2, 2], True), None
    yield 'mean', dict(op='mean', x=1), None
    yield 'upsample', dict(op='upsample', x=1, scale=2, like=None), None
    yield 'upsample by 3', dict(op='upsample', x=1, scale=3, like=None), None
    yield 'zeros', dict(op='zeros', x=1, channels=c + 1), None


def plan_of(source, c, size, op, weights, fused):
    """A plan of one operation between maps of its own, and of what ``fused`` names behind it."""
    tensors, ops = {}, []

    def add(op, weights=None):
        i = len(ops)
        if weights:
            out, kernel = weights
            inside = (4 if op['x'] == 0 else c) // op['groups']
            weight = source.numbers(out, inside, *kernel) / (inside * kernel[0] * kernel[1]) ** 0.5
            tensors[f'{i}.weight'] = weight.bfloat16().float()
            tensors[f'{i}.bias'] = source.numbers(out) / 4
        ops.append(op)

    add(*conv(0, c))
    add(*conv(0, c))
    add(dict(op='mean', x=1))
    add(dict(op='pool', x=1, kind='max', kernel=list(size), stride=1, pad=[0, 0], ceil=False))
    ops[3]['kernel'] = [min(n, 64) for n in size]
    add(op, weights)
    tested = [5]
    if fused in ('act', 'add and act', 'act and add') and op['op'] == 'conv':
        shape = Plan((4, *size), ops, [(5, False)], tensors).shapes(*size)
        alike = shape[1] == shape[5]
        for part in fused.split(' and '):
            if part == 'act':
                ops.append(dict(op='act', x=len(ops), kind=source.pick(ACTIVATIONS[1:]), slope=0.25))
            elif alike:
                ops.append(dict(op='add', x=len(ops), y=1))
        tested = list(range(5, len(ops) + 1))
    read = sorted({v for k in tested for v in (*ops[k - 1].get('xs', ()), *(
        ops[k - 1][n] for n in ('x', 'y') if n in ops[k - 1]))} - set(tested))
    plan = Plan((4, *size), ops, [*((v, False) for v in read), (tested[-1], False)], tensors)
    return plan, read, tested


def check_operation(source, c, size, op, weights, fused, precision, threads, batches):
    """The operation's result, of what the engine itself gave to it."""
    plan, read, tested = plan_of(source, c, size, op, weights, fused)
    x = source.numbers(max(batches), 4, *size)
    smallest = 2. ** -14 if build.library().csp_tiles() else 1e-20
    if precision == 'int8':
        plan.halves = [v for v in (1, tested[-1]) if source.pick([False, False, True])]
        plan = calibrate(plan, [x])
        read_steps = np.broadcast_to(native_reference.steps_and_zeros(plan, 1, smallest)[0].ravel(), c)
        give_units(plan, read_steps, source)
    engine = NativeEngine(plan, threads, precision)
    shapes = plan.shapes(*size)
    got = [y.double().numpy() for y in engine(x)]
    for batch in batches:
        for y, whole in zip(engine(x[:batch]), got):
            assert np.array_equal(y.double().numpy(), whole[:batch]), f'{batch} images are not the same among {len(x)}'
    values = [None] * (len(plan.operations) + 1)
    for v, y in zip(read, got):
        values[v] = y.reshape(len(x), *shapes[v])
    in_bytes = precision == 'int8' and not (3 in read and len(read) == 1) and op['op'] not in ('mean', 'zeros')
    if op['op'] in ('slice', 'upsample', 'pool'):  # which give what they read
        in_bytes = in_bytes and 1 not in plan.halves
    elif op['op'] == 'cat':  # of which one part in bytes makes it so
        in_bytes = in_bytes and (2 in op['xs'] or 1 not in plan.halves)
    else:
        in_bytes = in_bytes and tested[-1] not in plan.halves
    exact = True
    for v in tested:
        i = v - 1
        weight = None
        if (precision == 'int8' and plan.operations[i]['op'] == 'conv' and not weights_are_words(plan, i)
                and 1 not in plan.halves):
            weight = native_reference.weights_in_bytes(
                plan.tensors[f'{i}.weight'].double().numpy(), read_steps, op['groups'], plan.ranges[i + 1][2],
                len(tested) > 1 and plan.operations[i + 1]['op'] == 'act',
                plan.tensors[f'{i}.unit'].double().numpy() if f'{i}.unit' in plan.tensors else None)
        values[v] = native_reference.operation(plan, i, values, shapes[v], weight)
        exact = exact and plan.operations[i]['op'] == 'conv'
    expected, result = values[tested[-1]], got[-1].reshape(len(x), *shapes[tested[-1]])
    assert result.shape == expected.shape
    largest = np.abs(expected).max() + 1e-30
    if in_bytes and op['op'] == 'cat':
        numbers = {v: native_reference.steps_and_zeros(plan, 1 if v == 4 else v, smallest, v not in plan.halves)
                   for v in op['xs']}  # a maximum keeps the steps of its map
        bound = np.concatenate([np.broadcast_to(numbers[v][0], (shapes[v][0], 1, 1)) for v in op['xs']]) * 0.501
        expected = np.concatenate([native_reference.to_bytes(values[v], *numbers[v]) for v in op['xs']], axis=1)
    elif in_bytes and (op['op'] in ('slice', 'upsample') or op.get('kind') == 'max'):
        bound = 1e-5 * largest
    elif in_bytes:
        step, zero = native_reference.steps_and_zeros(plan, 1 if op['op'] == 'pool' else tested[-1], smallest)
        expected = np.clip(expected, -zero * step, (255 - zero) * step)
        # Beside tiles what follows the sums is float16.
        bound = (0.501 if (exact and not engine.tiles) or op['op'] == 'pool' else 1.05) * step + 2e-3 * largest
    elif precision == 'bfloat16':
        bound = 2 ** -8 * np.abs(expected) + 4e-4 * largest
    else:
        bound = 2 ** -8 * np.abs(expected) + 2e-3 * largest
    wrong = np.abs(result - expected) > bound
    assert not wrong.any(), f'{wrong.sum()} of {wrong.size}, by {np.abs(result - expected).max()}, largest {largest}'


def give_units(plan, steps, source):
    """Half of the dense convolutions get units of their own, by which some weights are cut off."""
    if plan.operations[4]['op'] == 'conv' and not weights_are_words(plan, 4) and source.pick([True, False]):
        weight, groups = plan.tensors['4.weight'], plan.operations[4]['groups']
        scales = torch.from_numpy(steps.copy()).view(groups, 1, -1).expand(-1, len(weight) // groups, -1)
        unit = (weight * scales.reshape(len(weight), -1)[..., None, None]).flatten(1).abs().amax(1) / 127
        factors = torch.tensor([source.pick([1., 0.7, 1.2, 2.5]) for _ in unit])
        plan.tensors['4.unit'] = (unit * factors).clamp(min=1e-30).float()


def weights_are_words(plan, i):
    return plan.tensors[f'{i}.weight'].shape[1] == 1 and plan.operations[i]['groups'] > 1


FUSED = ['nothing', 'act', 'add and act', 'act and add']


@pytest.mark.parametrize('precision', ['bfloat16', 'int8'])
@pytest.mark.parametrize('name', [  # the engine is compiled for each
    pytest.param(name, marks=pytest.mark.slow) if i else name for i, name in enumerate(reversed(LEVELS))])
def test_operations(name, precision):
    """Every operation once at each precision and instruction set, with sizes, channels, batches and threads in turn."""
    turns = itertools.cycle(itertools.product((2, 1), (1, 2, 3, 5, 4), range(len(FUSED))))
    sizes = itertools.cycle(SIZES)
    with level(name):
        for k, variants in enumerate(itertools.zip_longest(*(operations(c) for c in (3, 33, 64)))):
            found = [(c, v) for c, v in zip((3, 33, 64), variants) if v]
            c, (title, op, weights) = found[k % len(found)]
            (threads, batch, fused), size = next(turns), next(sizes)
            try:
                check_operation(Source(k), c, size, op, weights, FUSED[fused], precision, threads, (batch,))
            except AssertionError as error:
                raise AssertionError(f'{title} of {c} channels, {size}, batch {batch}, {threads} threads') from error
            except ValueError as error:
                assert 'leaves a map of' in str(error) or 'more than half' in str(error), (title, size)


@pytest.mark.slow
@pytest.mark.parametrize('c', CHANNELS)
@pytest.mark.parametrize('precision', ['bfloat16', 'int8'])
@pytest.mark.parametrize('name', LEVELS)
def test_all_operations(name, precision, c):
    """The product of sizes, threads and what is fused, on every batch; a tenth or a twentieth of it, in turns."""
    done, step = 0, 10 if c == 33 else 20
    with level(name):
        for k, (title, op, weights) in enumerate(operations(c)):
            product = itertools.product(SIZES, (1, 2), FUSED if weights else FUSED[:1])
            for size, threads, fused in itertools.islice(product, k % step, None, step):
                try:
                    check_operation(
                        Source(k), c, size, op, weights, fused, precision, threads, (1, 2, 3, 4, 5))
                except AssertionError as error:
                    raise AssertionError(f'{title}, {size}, {threads} threads, {fused}') from error
                except ValueError as error:
                    assert 'leaves a map of' in str(error) or 'more than half' in str(error), (title, size)
                    continue
                done += 1
    print(f'{name} {precision} {c}: {done} operations')


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_random_plans(data):
    """Any plan that is drawn is right on every batch, beside what is no number, and at every precision."""
    source = Drawn(data)
    plan = random_plan(source, 6)
    x = source.numbers(5, *plan.input_shape)
    with level(source.pick(list(LEVELS))):
        precision = source.pick(['bfloat16', 'int8'])
        if precision == 'int8':
            plan.halves = native_fuzz.some_halves(plan, source)
            plan = calibrate(plan, [x])
            plan = correct(plan, [x[:3], x[3:]]) if source.pick([True, False]) else plan
        native_fuzz.check_plan(plan, x, source, precision, source.pick([1, 2]), native_fuzz.small_caches(source))


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_random_networks(data):
    """Any network that is drawn gives PyTorch's numbers, or is refused with the name of an operation."""
    assert native_fuzz.one(Drawn(data), 'network') is None


@pytest.mark.slow
@pytest.mark.parametrize('kind, count', [('plan', 300), ('network', 30)])
def test_many_random(kind, count):
    """``python -m tests.native_fuzz`` tries as many as one likes."""
    for seed in range(count):
        try:
            native_fuzz.one(Source(seed), kind)
        except Exception as error:
            raise AssertionError(f'{kind} {seed}') from error


class Refused(nn.Module):
    """One thing that the engine does not do."""

    def __init__(self, what):
        super().__init__()
        self.conv, self.what = nn.Conv2d(4, 4, 1), what

    def forward(self, x):
        return self.what(self.conv(x))


@pytest.mark.parametrize('what, message', [
    (lambda x: x * 2, r'aten\.mul.* of a map and a number'),
    (lambda x: x[:1], r'aten\.slice.* of the batch'),
    (lambda x: x.mean(1, keepdim=True), r'aten\.mean.* over dimensions \[1\]'),
    (lambda x: x.to(torch.int32).float(), r'aten\..*to torch\.int32'),
    (lambda x: nn.functional.interpolate(x, scale_factor=1.5), r'aten\.upsample_nearest2d.* by 1\.5'),
    (lambda x: nn.functional.interpolate(x, size=(3, 3)), r'aten\.upsample_nearest2d.* to \(3, 3\)'),
    (lambda x: x.mean((2, 3)).unsqueeze(1), r'aten\.unsqueeze'),
    (lambda x: nn.functional.avg_pool2d(x, 65, 1, 32), r'aten\.avg_pool2d.*kernel is .65.'),
    (lambda x: x if x.sum() > 0 else -x, r'torch\.export'),
])
def test_refused_by_name(what, message):
    with pytest.raises(UnsupportedNetwork, match=message):
        lower(Refused(what).eval(), torch.rand(2, 4, 9, 9))


def test_a_batch_norm_behind_a_map_that_another_reads():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.drop, self.norm = nn.Conv2d(4, 4, 1), nn.Dropout(), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return y + self.norm(self.drop(y))

    model, x = Network().eval(), torch.rand(2, 4, 9, 9)
    model.norm.weight.data *= 3
    with torch.no_grad():
        got, = NativeEngine(lower(model, x), 1)(x)
        assert (got - model(x)).abs().max() < 0.05


def test_one_arena_for_every_batch():
    """Two programs serve all batches, and what they take does not grow with the batch sizes that were seen."""
    plan = random_plan(Source(5))
    engine = NativeEngine(plan, 2)
    x = torch.randn(40, *plan.input_shape)
    whole = engine(x)
    arena = engine._arena.size
    for n in range(1, 41):
        for a, b in zip(engine(x[:n]), whole):
            assert torch.equal(a, b[:n])
    assert engine._arena.size == arena
    assert [len(size.programs) for size in engine._sizes.values()] == [2]


def test_one_search_for_the_ranges_of_both_quantisers():
    """The range that is found leaves less error than the whole one does, though it cuts values off."""
    from cspnet_timm.deployment.native.ranges import Observer
    values = torch.randn(1 << 12, generator=torch.Generator().manual_seed(0))
    values = values / 10  # many of them, and few far out
    values[:4] = 2.5
    values = values.repeat(2)
    for symmetric in (False, True):
        observer = Observer()
        observer.see(values[:100])
        observer.see(values)
        low, high = observer.range(symmetric)
        assert observer.low == values.min() and observer.largest == 2.5

        def error(low, high):
            step = (high - low) / 255
            zero = round(-low / step)
            return float((((values / step + zero).round().clamp(0, 255) - zero) * step - values).square().mean())

        whole = 2.5 if symmetric else observer.high
        assert error(low, high) <= error(-whole * 128 / 127 if symmetric else observer.low, whole)
        assert not symmetric or abs(low + high * 128 / 127) < 1e-5
    observer = Observer()
    observer.see(values.abs())
    assert observer.range(symmetric=True)[0] == 0


@pytest.mark.parametrize('name', LEVELS)
@pytest.mark.parametrize('precision', ['bfloat16', 'int8'])
def test_images_as_the_residual(name, precision):
    """An image has no room behind its channels, where other maps have some."""
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.next = nn.Conv2d(17, 17, 3, padding=1), nn.Conv2d(17, 8, 1)

        def forward(self, x):
            return self.next(x + self.conv(x))

    model, x = Network().eval(), torch.randn(3, 17, 5, 6)
    with level(name), torch.no_grad():
        got, = NativeEngine(calibrate(lower(model, x), [x]), 2, precision)(x)
        assert (got - model(x)).norm() < 0.05 * model(x).norm()


@pytest.mark.parametrize('c', [241, 248, 255])
@pytest.mark.parametrize('name', LEVELS)
def test_channels_that_nearly_fill_the_sets_of_the_cache(name, c):
    """Pixels of 256 bytes are set apart by 64 more, but not where a step of the product goes over their borders."""
    op, weights = conv(1, 24, (3, 3))
    with level(name):
        check_operation(Source(0), c, (7, 5), op, weights, 'nothing', 'int8', 1, (2,))


@pytest.mark.parametrize('name', LEVELS)
def test_zeros_beside_a_map_cost_its_weights_nothing(name):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 8, 1), nn.Conv2d(16, 8, 1)

        def forward(self, x):
            return self.b(nn.functional.pad(self.a(x), (0, 0, 0, 0, 0, 8)))

    model, x = Network().eval(), torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    with level(name), torch.no_grad():
        got, = NativeEngine(calibrate(lower(model, x), [x]), 1, 'int8')(x)
        assert (got - model(x)).norm() < 0.02 * model(x).norm()
