"""What walks through a network: compilers, exporters, engines. They see its blocks and stages, whatever its size.

Each runs on the small networks of ``stages.py``, what takes long on one or two of them; on a few whole networks, and on
the other small ones, ``-m slow``.
"""
import io

import pytest
import torch
import torch.nn as nn
from timm.models import create_model
from torch.distributed._tools.mem_tracker import MemTracker

from tests.samples import FEW
from tests.stages import LEAKY
from tests.zoo import REPRESENTATIVES, create_short, distance, smallest_of_each_structure, structure

SIZE = 64


def image(batch=2, size=(SIZE, SIZE)):
    return torch.randn(batch, 3, *size)


@pytest.mark.networks('stages_detectors', whole=False)
@pytest.mark.parametrize('features', [False, True])
def test_torchscript(build, features):
    model = build(features_only=features, scriptable=True)
    scripted = torch.jit.script(model)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    for size in ((SIZE, SIZE), (96, 128)):
        x = image(1, size=size)
        with torch.no_grad():
            a, b = model(x), scripted(x)
        for p, q in zip(a, b) if features else [(a, b)]:
            assert distance(q, p) < 1e-5


@pytest.mark.slow
def test_representatives():
    assert smallest_of_each_structure() == REPRESENTATIVES


@pytest.mark.slow
def test_short_models_are_of_the_structure(model_name):
    whole, short = create_model(model_name, device='meta').eval(), create_short(model_name)
    assert structure(short) == structure(whole)
    assert len(list(short.modules())) <= len(list(whole.modules()))
    assert [info['num_chs'] for info in short.feature_info] == [
        m.shape[1] for m in short.forward_intermediates(image(), intermediates_only=True)]


def test_fx(build):
    model = build()
    traced = torch.fx.symbolic_trace(model)
    x = image(1)
    with torch.no_grad():
        assert distance(traced(x), model(x)) < 1e-6


@pytest.mark.slow
@pytest.mark.networks(whole=False)
def test_compile(build):
    model = build()
    torch._dynamo.reset()  # all models share one forward, and the number of its versions is limited
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = image(batch)
            torch._dynamo.mark_dynamic(x, 0)
            with torch._dynamo.config.patch(error_on_recompile=batch > 2):
                assert distance(compiled(x), model(x)) < 1e-5


@pytest.mark.parametrize('network', [  # the others' blocks are among these, but for what joins them
    'stages_attention', *(pytest.param(name, marks=pytest.mark.slow) for name in ('stages_paper', 'stages_detectors')),
])
def test_compile_for_training(build):
    """The second batch size makes the graph dynamic, and no other compiles again."""
    model = build(num_classes=10).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    for i, batch in enumerate((4, 2, 3, 5, 8)):
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            compiled(image(batch)).square().mean().backward()


class Everything(nn.Module):
    """Logits and maps of one model, so that one export shows both."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        features, maps = self.model.forward_intermediates(x)
        return (self.model.forward_head(features), *maps)


# A map of one pixel would be taken for a constant, and the elastic nets halve the last level's once more.
EXAMPLE_SIZE, OTHER = (128, 128), (3, (96, 192))


def export(model):
    dynamic = torch.export.Dim.DYNAMIC
    return torch.export.export(
        model, (image(2, EXAMPLE_SIZE),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},))


@pytest.mark.parametrize('network', [  # the other small ones are exported on their way to ONNX
    'stages_detectors', pytest.param('cspnet_yolo11n', marks=pytest.mark.slow)])
def test_export(build):
    model, x = Everything(build()).eval(), image(*OTHER)
    program = export(model)
    with torch.no_grad():
        expected, outputs = model(x), program.module()(x)
    assert len(outputs) == len(expected) >= 4
    assert all(distance(a, b) < 1e-5 for a, b in zip(outputs, expected))


@pytest.mark.slow
@pytest.mark.networks(whole=False)
def test_onnx(build, network, tmp_path):
    import onnxruntime

    # A leaky ReLU takes the exporter longer than all else in the network, so that a small one has it.
    other = {'stages_paper': dict(act_layer='silu'), 'stages_padding': dict(act_layer=LEAKY)}
    model, x = Everything(build(**other.get(network, {}))).eval(), image(*OTHER)
    path = tmp_path / 'model.onnx'
    if tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 9):
        torch.onnx.export(export(model), (), path, dynamo=True, verbose=False)
    else:  # today's onnxscript no longer fits the exporter of then
        torch.onnx.export(
            model, (image(2, EXAMPLE_SIZE),), path, opset_version=17, input_names=['x'],
            dynamic_axes={'x': {0: 'batch', 2: 'height', 3: 'width'}})
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = model(x)
    assert len(outputs) == len(expected)
    assert all(distance(torch.from_numpy(a), b) < 1e-4 for a, b in zip(outputs, expected))


@pytest.mark.parametrize('network', [  # those with more blocks than a stem's maps weigh
    'stages_detectors', *(pytest.param(name, marks=pytest.mark.slow) for name in ('stages_paper', *FEW)),
])
def test_gradient_checkpointing_saves_memory(build):
    """What a step holds beside parameters and gradients is at most half; of more blocks, less."""

    def peak(checkpointing):
        model = build(num_classes=10).train()
        model.set_grad_checkpointing(checkpointing)
        x = image(2, size=(128, 128))
        tracker = MemTracker()
        tracker.track_external(model, x)
        with tracker:
            model(x).square().mean().backward()
        sizes, = tracker.get_tracker_snapshot('peak').values()
        return sum(size for kind, size in sizes.items() if str(kind).split('.')[-1] in ('ACT', 'TEMP'))

    assert 0 < peak(True) < 0.5 * peak(False)


