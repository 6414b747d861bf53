"""A converted network is compared on more than the example, and what differs there is not taken."""
import math

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from cspnet_timm import deploy
from cspnet_timm.deployment import DeployError
from cspnet_timm.deployment.backends import BACKENDS, Arrangement
from cspnet_timm.deployment.backends.base import Recent, split_batch
from cspnet_timm.deployment.backends.eager import Eager
from cspnet_timm.deployment.contract import BOUNDS, check, make_trials
from tests.zoo import create_for


class Scaled(nn.Module):
    """A map that is scaled by its own means."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 8, 3, 1, 1)

    def forward(self, x):
        y = F.relu(self.a(x))
        return self.b(y * y.mean((2, 3), keepdim=True))


def right(model):
    def run(x):
        with torch.no_grad():
            return [model(x)]

    return run


def of_the_first_image(model):
    """Scales every image by the means of the first."""
    def run(x):
        with torch.no_grad():
            y = F.relu(model.a(x))
            return [model.b(y * y[:1].mean((2, 3), keepdim=True))]

    return run


def neighbour(model):
    """Adds nothing of the next image, which is NaN if that is."""
    def run(x):
        y = right(model)(x)[0]
        return [y + 0 * y.roll(1, 0)]

    return run


def stale(model):
    """Keeps something of the call before."""
    before = [0.]

    def run(x):
        y = right(model)(x)[0] + 0 * before[0]
        before[0] = float(y.sum())
        return [y]

    return run


def one_buffer(model):
    """Writes its output where the last one is."""
    buffers = {}

    def run(x):
        y = right(model)(x)[0]
        return [buffers.setdefault(len(x), y).copy_(y)]

    return run


def wrong_at(batches):
    def make(model):
        def run(x):
            y = right(model)(x)[0]
            return [y * 1.5 if batches(len(x)) else y]

        return run

    return make


def blind(model):
    """Gives the example's outputs, whatever it is given."""
    kept = {}

    def run(x):
        return [kept.setdefault('y', right(model)(x)[0])[:1].expand(len(x), -1, -1, -1).clone()]

    return run


def swapped(model):
    def run(x):
        y = right(model)(x)[0]
        return [torch.cat([y[1:2], y[:1], y[2:]]) if len(x) > 1 else y]

    return run


@pytest.mark.parametrize('batch', [1, 2, 4])
@pytest.mark.parametrize('example', ['random', 'zero', 'constant'])
def test_what_is_right_is_taken(batch, example):
    model = Scaled().eval()
    x = {'random': torch.randn, 'zero': torch.zeros, 'constant': torch.ones}[example](batch, 3, 16, 16)
    trials = make_trials(lambda x: [model(x)], x, right(model)(x))
    assert trials.independent and not trials.notes and len(trials.larger) == batch + 1
    assert check(right(model), trials, 'float32', 1e-3) == [0.]
    assert check(lambda x: [right(model)(x)[0] + 1e-6], trials, 'float32', 1e-3)[0] < 1e-3


@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'int8'])
@pytest.mark.parametrize('batch, make, message', [
    (1, of_the_first_image, 'differs from'), (4, of_the_first_image, 'differs from'),
    (1, neighbour, 'NaN'), (4, neighbour, 'NaN'), (1, stale, 'once more'), (4, stale, 'once more'),
    (1, one_buffer, 'gave before'), (4, one_buffer, 'gave before'),
    (1, wrong_at(lambda n: n > 1), 'differs from .* batch'),
    (4, wrong_at(lambda n: n == 1), 'differs from .* batch'), (4, wrong_at(lambda n: n > 4), 'differs from .* batch'),
    (4, wrong_at(lambda n: n == 4), 'differs from the model by'),
    (1, blind, 'differs from'), (4, blind, 'differs from'), (1, swapped, 'differs from'), (4, swapped, 'differs from'),
])
def test_what_is_wrong_beside_the_example_is_not(batch, make, message, precision):
    model, x = Scaled().eval(), torch.rand(batch, 3, 16, 16)
    trials = make_trials(lambda x: [model(x)], x, right(model)(x))
    with pytest.raises(DeployError, match=message):
        check(make(model), trials, precision, min(BOUNDS[precision], 0.4))


def test_a_model_that_mixes_images():
    """What the model itself does is right, also where it is unusual; the report says what was not compared."""
    class Mixing(nn.Module):
        def forward(self, x):
            return (x - x.mean(0, keepdim=True)).flatten(2).sum(2)

    class Fixed(nn.Module):
        def forward(self, x):
            return torch.stack([x[i].sum().view(1) for i in range(4)])

    x = torch.rand(4, 3, 8, 8)
    for model, note in ((Mixing(), 'images by themselves'), (Fixed(), 'other batches')):
        report = deploy(model, x, backend='eager', progress=False, seconds=0.01).report
        assert list(report.left_out) == [note] and note in str(report)


def planted(make, **attributes):
    """A backend that converts rightly, and whose runner is another one."""
    return type('Planted', (Eager,), dict(
        name='planted', runner=lambda self, arrangement, threads: make(self.call.model.model), **attributes))


def test_a_backend_that_differs_is_out(monkeypatch):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaled = Scaled()

        def forward(self, x):
            return self.scaled(x)

    def make(model):
        return of_the_first_image(model.scaled)

    monkeypatch.setitem(BACKENDS, 'planted', planted(make))
    model, x = Wrapped().eval(), torch.rand(1, 3, 32, 32)
    with pytest.raises(DeployError, match=r'planted float32.*: differs from the model on a batch of 2'):
        deploy(model, x, backend='planted', precision='float32', progress=False, seconds=0.01)
    report = deploy(
        model, x, backend=('planted', 'eager'), precision='float32', progress=False, seconds=0.01).report
    assert report.backend == 'eager' and 'batch of 2' in report.candidates[0]['note']
    assert 'differs from the model on a batch of 2' in str(report)


# What is kept, and what is given


def test_recent():
    made = []
    recent = Recent(lambda *key: made.append(key) or key, most=3)
    for n in (1, 2, 3, 1, 4, 1, 2):
        assert recent(n) == (n,)
    assert made == [(1,), (2,), (3,), (4,), (2,)] and set(recent.kept) == {(4,), (1,), (2,)}


def test_batches_are_cut_into_few_sizes():
    for streams, chunk in ((1, 1), (1, 8), (2, 3), (4, 16), (8, 1), (3, 5)):
        arrangement = Arrangement(streams, chunk)
        assert split_batch(streams * chunk, arrangement) == (streams, [chunk] * streams)
        seen = set()
        for batch in range(1, 200):
            used, sizes = split_batch(batch, arrangement)
            assert sum(sizes) == batch and used <= min(streams, batch) and max(sizes) <= chunk
            seen.update((used, size) for size in sizes)
        assert len(seen) <= math.log2(streams) + math.log2(chunk) + 3


@pytest.mark.parametrize('backend', ['native', 'eager'])  # all of them: test_deploy.py
def test_outputs_are_ordinary_tensors(backend):
    reason = BACKENDS[backend].unavailable(torch.device('cpu'))
    if reason is not None:
        pytest.skip(f'{backend}: {reason}')
    check_outputs(deploy(
        create_for(backend, 4), torch.rand(1, 3, 64, 64), backend=backend, progress=False, seconds=0.01, isolate=False))


def check_outputs(deployed):
    """What a deployed classifier gives belongs to the caller, in every mode and of every batch."""
    for within in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with within():
            x = torch.rand(1, 3, 64, 64, requires_grad=within is torch.enable_grad)
            assert deployed(x).requires_grad is False
        x = torch.rand(3, 3, 64, 64)
        y = deployed(x)
        before = y.clone()
        assert not y.is_inference() and not y.requires_grad and y.dtype == torch.float32
        head = nn.Linear(y.shape[1], 2)
        head(y).sum().backward()
        assert head.weight.grad is not None
        y.add_(1)
        assert torch.allclose(deployed(x), before, rtol=1e-5, atol=1e-6)  # nobody else's memory was changed
    for batch in range(1, 20):
        assert deployed(torch.rand(batch, 3, 64, 64)).shape == (batch, before.shape[1])
    if deployed.report.backend == 'openvino':
        assert len(deployed._runner.compiled.kept) <= 4  # of 1, 2, 4 and 5 images


def test_outputs_have_memory_of_their_own():
    class Same(nn.Module):
        def forward(self, x):
            return [x, x, x[:, :2]]

    deployed = deploy(Same(), torch.rand(1, 3, 8, 8), backend='eager', precision='float32', progress=False, seconds=.01)
    x = torch.rand(2, 3, 8, 8)
    kept = x.clone()
    a, b, c = deployed(x)
    a.zero_()
    assert torch.equal(x, kept) and torch.equal(b, kept) and torch.equal(c, kept[:, :2])


def test_copies_are_refused():
    import copy
    import pickle

    deployed = deploy(timm.create_model('cspnet_nano'), torch.rand(1, 3, 64, 64), backend='eager', progress=False,
                      seconds=0.01)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"'eager'.*\.save\(path\).*deploy\.load"):
            attempt(deployed)


def test_deploy_is_a_function():
    import inspect

    assert inspect.isfunction(deploy) and list(inspect.signature(deploy).parameters)[:2] == ['model', 'example_input']
    assert 'deploy.load(path)' in deploy.__doc__ and 'allow_code' in deploy.load.__doc__
