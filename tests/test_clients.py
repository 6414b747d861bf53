"""The libraries that take a backbone from timm, with a few models: forward, and backward to every parameter.

What each needs is in the extra ``clients``, but fastai and anomalib, which bring too much; a test whose library is
missing is skipped. The snippets of docs/clients.md run here as well.
"""
import importlib.util
import math
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2

from tests.samples import FAMILIES, FEW
from tests.stages import NETWORKS

DOCS = Path(__file__).parents[1] / 'docs' / 'clients.md'

# Those that end at stride 32, as detectors and most decoders want it.
PYRAMIDS = [name for name in FAMILIES if name != 'cspnet_tutorial']
pyramids = pytest.mark.parametrize('name', FEW)

# What walks through a network sees the same in these as in all of them.
stages = pytest.mark.parametrize('name', NETWORKS)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings('ignore'),  # what the libraries warn of is theirs
]


def needs(*libraries):
    """Skip without a library; fastai and anomalib are not in the extra ``clients``, for what they bring."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    wanted = ' '.join(missing) if {*missing} <= {'fastai', 'anomalib'} else '".[clients]"'
    return pytest.mark.skipif(bool(missing), reason=f'{", ".join(missing)} is not installed: pip install {wanted}')


def seeded(build):
    """The module, its every batch norm away from the identity, so that leaving one out would show."""
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.8, 1.2)
    return model


def scalar(outputs):
    if isinstance(outputs, torch.Tensor):
        return outputs.float().square().mean()
    if isinstance(outputs, dict):
        outputs = outputs.values()
    return sum(scalar(o) for o in outputs)


def assert_backward(loss, backbone):
    """The loss is finite, and every parameter of the backbone has a gradient."""
    assert loss.isfinite()
    loss.backward()
    missing = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing, missing


def images(batch=2, size=64, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


# segmentation-models-pytorch

@needs('segmentation_models_pytorch')
@pytest.mark.parametrize('name, decoder, kwargs', [
    *((name, 'Unet', {}) for name in PYRAMIDS),
    *((name, 'DeepLabV3Plus', dict(encoder_output_stride=8)) for name in FEW),
    ('cspnet_nano', 'FPN', {}), ('cspnet_nano', 'DeepLabV3Plus', dict(encoder_output_stride=16)),
    ('cspnet_nano', 'Unet', dict(in_channels=4)),
    ('cspnet_rtmdet_nano_pan', 'Unet', {}), ('cspnet_yolov4_tiny_pan', 'FPN', {}),
], ids=str)
def test_smp(name, decoder, kwargs):
    import segmentation_models_pytorch as smp

    model = getattr(smp, decoder)(f'tu-{name}', encoder_weights=None, classes=2, **kwargs)
    masks = model(images(channels=kwargs.get('in_channels', 3)))
    assert masks.shape == (2, 2, 64, 64)
    assert_backward(scalar(masks), model.encoder)


@needs('segmentation_models_pytorch')
def test_smp_with_a_network_that_ends_at_stride_16():
    import segmentation_models_pytorch as smp

    model = smp.Unet('tu-cspnet_tutorial', encoder_weights=None, encoder_depth=4, decoder_channels=(64, 32, 16, 16))
    masks = model(images())
    assert masks.shape == (2, 1, 64, 64)
    assert_backward(scalar(masks), model.encoder)


# transformers

def timm_backbone_config(name, **kwargs):
    from transformers import TimmBackboneConfig

    return TimmBackboneConfig(backbone=name, use_pretrained_backbone=False, **{'out_indices': [2, 3, 4], **kwargs})


@needs('transformers')
@pytest.mark.parametrize('name', [*FEW, 'cspnet_rtmdet_nano_pan', 'cspnet_damo_m_pan'])
def test_transformers_backbone(name):
    from transformers import AutoBackbone

    backbone = AutoBackbone.from_config(timm_backbone_config(name))
    outputs = backbone(images(), output_hidden_states=True)
    assert [m.shape[-1] for m in outputs.feature_maps] == [8, 4, 2]
    assert [m.shape[1] for m in outputs.feature_maps] == list(backbone.channels)
    assert len(outputs.hidden_states) == 5
    assert_backward(scalar(outputs.feature_maps), backbone)


@needs('transformers')
@pyramids
def test_transformers_backbone_options(name):
    from transformers import AutoBackbone

    backbone = AutoBackbone.from_config(timm_backbone_config(
        name, out_indices=[-2, -1], output_stride=16, num_channels=4, freeze_batch_norm_2d=True)).eval()
    maps = backbone(images(channels=4)).feature_maps
    assert [m.shape[-1] for m in maps] == [4, 4]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())


@needs('transformers')
@pyramids
def test_transformers_detr(name, tmp_path):
    from transformers import DetrConfig, DetrForObjectDetection

    model = DetrForObjectDetection(DetrConfig(
        backbone_config=timm_backbone_config(name, out_indices=[4]), use_timm_backbone=False,
        use_pretrained_backbone=False, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5, num_labels=3,
    ))
    outputs = model(images())
    assert outputs.logits.shape == (2, 5, 4)
    assert_backward(scalar([outputs.logits, outputs.pred_boxes]), model.model.backbone)
    model.save_pretrained(tmp_path)
    again = DetrForObjectDetection.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(images()).logits, model.eval()(images()).logits)


@needs('transformers', 'scipy')
@pyramids
def test_transformers_rt_detr(name):
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    model = RTDetrForObjectDetection(RTDetrConfig(
        backbone_config=timm_backbone_config(name), num_labels=3, d_model=32, encoder_hidden_dim=32,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=10, num_denoising=0, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, decoder_in_channels=[32, 32, 32],
        encoder_in_channels=timm.create_model(name, features_only=True, out_indices=(2, 3, 4)).feature_info.channels(),
    ))
    labels = [{'class_labels': torch.tensor([1]), 'boxes': torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    outputs = model(images(), labels=labels)
    assert outputs.pred_boxes.shape == (2, 10, 4)
    assert_backward(outputs.loss, model.model.backbone)


@needs('transformers')
@pyramids
def test_transformers_timm_wrapper(name, tmp_path):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=name, num_labels=4))
    model.gradient_checkpointing_enable()
    outputs = model(images(), labels=torch.tensor([0, 1]), output_hidden_states=True)
    assert outputs.logits.shape == (2, 4) and len(outputs.hidden_states) == 5
    assert_backward(outputs.loss, model)
    model.save_pretrained(tmp_path)
    again = TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(images()).logits, model.eval()(images()).logits)


# The wrapper of the RT-DETR and D-FINE repositories: it asks the extractor for the names of its taps, and takes the
# outputs of the extractor's children by those names.

@pyramids
def test_return_layers(name):
    from torchvision.models._utils import IntermediateLayerGetter

    extractor = timm.create_model(name, features_only=True, out_indices=(2, 3, 4))
    taps = extractor.feature_info.module_name()
    children = [child for child, _ in extractor.named_children()]
    assert set(taps) <= set(children)
    assert sorted(taps, key=children.index) == taps  # by depth, so that a sort by name could not change them
    getter = IntermediateLayerGetter(extractor, {tap: str(i) for i, tap in enumerate(taps)})
    outputs = getter(images())
    assert list(outputs) == ['0', '1', '2']
    assert [m.shape[1] for m in outputs.values()] == extractor.feature_info.channels()
    assert [64 // m.shape[-1] for m in outputs.values()] == extractor.feature_info.reduction()
    assert_backward(scalar(outputs), extractor)


# torchvision

def pyramid(name, layers, extra):
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    model = timm.create_model(name)
    channels = {info['module']: info['num_chs'] for info in model.feature_info}
    return BackboneWithFPN(
        model, {layer: str(i) for i, layer in enumerate(layers)}, [channels[layer] for layer in layers], 64, extra(64))


@pytest.mark.parametrize('name, detector', [
    *((name, 'FasterRCNN') for name in PYRAMIDS), ('cspnet_nano', 'RetinaNet'), ('cspnet_nano', 'FCOS'),
])
def test_torchvision_detection(name, detector):
    from torchvision.models import detection
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

    if detector == 'FasterRCNN':
        backbone = pyramid(name, ['layer1', 'layer2', 'layer3', 'layer4'], lambda chs: LastLevelMaxPool())
    else:
        backbone = pyramid(name, ['layer2', 'layer3', 'layer4'], lambda chs: LastLevelP6P7(chs, chs))
    model = getattr(detection, detector)(backbone, num_classes=3, min_size=64, max_size=64)
    target = {'boxes': torch.tensor([[8., 8., 40., 50.]]), 'labels': torch.tensor([1])}
    losses = model(list(images()), [target, target])
    assert_backward(sum(losses.values()), backbone.body)
    model.eval()
    with torch.no_grad():
        found = model([images()[0]])
    assert set(found[0]) == {'boxes', 'labels', 'scores'}


# fastai

@pytest.fixture
def folder(tmp_path):
    from PIL import Image

    for split in ('train', 'valid'):
        for label in ('a', 'b'):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(4):
                noise = images(1, 64).mul(60).add(128).clamp(0, 255)[0].permute(1, 2, 0).byte().numpy()
                Image.fromarray(noise).save(tmp_path / split / label / f'{i}.png')
    return tmp_path


@needs('fastai')
@pyramids
def test_fastai_vision_learner(name, folder):
    from fastai.vision.all import ImageDataLoaders, vision_learner

    learner = vision_learner(
        ImageDataLoaders.from_folder(folder, bs=4, num_workers=0), name, pretrained=False, path=folder)
    learner.unfreeze()
    batch, labels = learner.dls.one_batch()
    outputs = learner.model(batch.as_subclass(torch.Tensor))
    assert outputs.shape == (4, 2)
    assert_backward(nn.functional.cross_entropy(outputs, labels.as_subclass(torch.Tensor)), learner.model[0])


@needs('fastai')
@pyramids
def test_fastai_unet_learner(name, folder):
    from fastai.vision.all import SegmentationDataLoaders, get_image_files, unet_learner
    from fastai.vision.models.unet import UnetBlock

    files = get_image_files(folder)
    loaders = SegmentationDataLoaders.from_label_func(
        folder, files, lambda file: torch.zeros(64, 64).byte().numpy(), bs=2, num_workers=0, codes=['ground', 'shape'])
    learner = unet_learner(
        loaders, lambda pretrained=False: timm.create_model(name), pretrained=False, n_out=2, path=folder)
    assert sum(isinstance(m, UnetBlock) for m in learner.model.modules()) == 4  # with the cut that fastai finds itself
    learner.unfreeze()
    batch = loaders.one_batch()[0].as_subclass(torch.Tensor)
    outputs = learner.model(batch)
    assert outputs.shape[1:] == (2, 64, 64)
    assert_backward(scalar(outputs), learner.model[0])


# anomalib

@needs('anomalib')
@pyramids
def test_anomalib(name):
    from anomalib.models.components import TimmFeatureExtractor
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    layers = ['layer2', 'layer3']  # what anomalib takes if nothing is said
    extractor = TimmFeatureExtractor(name, layers=layers, pre_trained=False, requires_grad=True)
    maps = extractor(images())
    assert {k: v.shape[-1] for k, v in maps.items()} == {'layer2': 8, 'layer3': 4}
    used = nn.ModuleList(module for key, module in extractor.feature_extractor.named_children() if key != 'layer4')
    assert_backward(scalar(maps), used)
    patchcore = PatchcoreModel(backbone=name, pre_trained=False, layers=layers).train()
    assert patchcore(images()).shape[1] == sum(m.shape[1] for m in maps.values())


# Lightning, lightly

@needs('lightning')
@pyramids
def test_lightning_sync_batchnorm(name):
    from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm

    model = seeded(lambda: timm.create_model(name, num_classes=5)).eval()
    with torch.no_grad():
        expected = model.forward_intermediates(images())
        plain = model(images())
    converted = TorchSyncBatchNorm().apply(model)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    with torch.no_grad():
        features, maps = converted.forward_intermediates(images())
        assert torch.equal(converted(images()), plain)
    assert all(torch.equal(a, b) for a, b in zip([features, *maps], [expected[0], *expected[1]]))


@needs('lightning')
@pyramids
def test_lightning_fit(name, tmp_path):
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model(name, num_classes=2)

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return create_optimizer_v2(self.model, opt='sgd', lr=0.01)

    data = torch.utils.data.DataLoader([(x, i % 2) for i, x in enumerate(images(4))], batch_size=2)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator='cpu', logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        enable_model_summary=False)
    module = Classifier()
    trainer.fit(module, data)
    checkpoint = next(tmp_path.rglob('*.ckpt'))
    again = Classifier.load_from_checkpoint(checkpoint).cpu().eval()
    assert torch.equal(again.model(images()), module.cpu().eval().model(images()))


@needs('lightly')
@pyramids
def test_lightly_simclr(name):
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    backbone = timm.create_model(name, num_classes=0)
    head = SimCLRProjectionHead(backbone.num_features, 32, 16)
    views = [head(backbone(images(4) + noise)) for noise in (0, 0.1)]
    assert_backward(NTXentLoss()(*views), backbone)


# Explanation, pruning

@needs('captum')
@pytest.mark.parametrize('name', ['cspnet_small', 'cspnet_yolov8n', 'cspnet_yolox_nano', 'cspnet_ppyoloe_s'])
def test_captum(name):
    """DeepLift takes a network in which no module is called twice; pools in a row are a module each."""
    from captum.attr import DeepLift

    model = timm.create_model(name, num_classes=4).eval()
    attribution = DeepLift(model).attribute(torch.rand(1, 3, 64, 64), target=1)
    assert attribution.shape == (1, 3, 64, 64) and bool(attribution.isfinite().all()) and bool(attribution.any())


@needs('pytorch_grad_cam')
@pyramids
def test_grad_cam(name):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = seeded(lambda: timm.create_model(name, num_classes=5)).eval()
    with GradCAM(model=model, target_layers=[model.layer4]) as cam:
        heat = cam(input_tensor=images(5, 128), targets=[ClassifierOutputTarget(i) for i in range(5)])
    assert heat.shape == (5, 128, 128) and heat.min() >= 0 and 0.5 < heat.max() <= 1


# torch-pruning follows neither a channel split, nor a depthwise convolution with several outputs per channel; with an
# attention's reshapes it does not come to an end, so that cspnet_yolo11n is not tried.
NOT_PRUNED = {'cspnet_peleenet': IndexError, 'cspnet_mobilenetv2': IndexError, 'cspnet_yolov4_tiny': RuntimeError}


@needs('torch_pruning')
@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.xfail(raises=NOT_PRUNED[name], strict=True)) if name in NOT_PRUNED else name
    for name in ('cspnet_nano', 'cspnet_rtmdet_nano', *NOT_PRUNED)
])
def test_torch_pruning(name):
    import torch_pruning as tp

    model = timm.create_model(name, num_classes=5).eval()
    before = sum(p.numel() for p in model.parameters())
    tp.pruner.MagnitudePruner(
        model, images(), importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=[model.get_classifier()],
    ).step()
    assert sum(p.numel() for p in model.parameters()) < 0.5 * before
    logits = model.train()(images())
    assert logits.shape == (2, 5)
    assert_backward(scalar(logits), model)


# Export and quantisation

class Maps(nn.Module):
    """Classifier and maps in one graph."""

    def __init__(self, name):
        super().__init__()
        self.model = timm.create_model(name, num_classes=5)

    def forward(self, x):
        features, maps = self.model.forward_intermediates(x)
        return self.model.forward_head(features), *maps


def assert_same(found, expected):
    for a, b in zip(found, expected):
        a = torch.as_tensor(a)
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-4 * b.norm()


SIZES = [(2, 64, 64), (1, 96, 64), (3, 64, 128)]

# ONNX Runtime has them in tests/test_stages.py.


@needs('openvino')
@stages
def test_openvino(name):
    import openvino

    model = seeded(lambda: Maps(name)).eval()
    converted = openvino.convert_model(model, example_input=images(), input=[-1, 3, -1, -1])
    compiled = openvino.compile_model(converted, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for batch, height, width in SIZES:
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = model(x)
        assert_same([compiled(x.numpy())[i] for i in range(len(expected))], expected)


def quantizer(qat):
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=qat))


def signal_to_noise(found, expected):
    return 20 * math.log10(expected.norm() / (found - expected).norm())


@needs('torchao')
@stages
def test_pt2e_static_int8(name):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    model = seeded(lambda: timm.create_model(name, num_classes=5)).eval()
    prepared = prepare_pt2e(torch.export.export(model, (images(),)).module(), quantizer(qat=False))
    prepared(images())
    converted = convert_pt2e(prepared)
    with torch.no_grad():
        assert signal_to_noise(converted(images()), model(images())) > 10
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    quantized = [n for n in converted.graph.nodes if 'dequantize_per_channel' in str(n.target)]
    assert len(quantized) >= convolutions


@needs('torchao')
@pytest.mark.parametrize('name', ['stages_padding'])  # static int8 has the others
def test_pt2e_qat(name, monkeypatch):
    from torchao.quantization.pt2e import move_exported_model_to_eval, qat_utils
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

    model = timm.create_model(name, num_classes=5)
    prepared = prepare_qat_pt2e(torch.export.export(model, (images(),)).module(), quantizer(qat=True))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    for _ in range(2):
        loss = nn.functional.cross_entropy(prepared(images()), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prepared.parameters())
    # torchao exports every pattern that it looks for, of every kind of convolution, whatever the model has.
    fold = getattr(qat_utils, '_fold_conv_bn_qat_helper', None)
    if fold is not None:
        monkeypatch.setattr(
            qat_utils, '_fold_conv_bn_qat_helper',
            lambda m, conv, *args, **kwargs: fold(m, conv, *args, **kwargs) if conv is nn.functional.conv2d else m)
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    assert converted(images()).isfinite().all()
    # Every convolution, with the batch norm behind it folded into it, is quantised.
    targets = [str(node.target) for node in converted.graph.nodes]
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert sum('dequantize_per_channel' in target for target in targets) >= convolutions
    assert not any('batch_norm' in target for target in targets)


# The table

def snippets():
    text = DOCS.read_text() if DOCS.is_file() else ''
    sections = [section.split('\n', 1) for section in re.split(r'^### ', text, flags=re.MULTILINE)[1:]]
    return [(title, code) for title, body in sections for code in re.findall(r'```python\n(.*?)```', body, re.DOTALL)]


@pytest.mark.parametrize('title, code', [pytest.param(*s, id=s[0]) for s in snippets()])
def test_snippet(title, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for library in set(re.findall(r'^\s*(?:import|from) (\w+)', code, flags=re.MULTILINE)):
        pytest.importorskip(library)
    exec(compile(code, f'{DOCS.name}: {title}', 'exec'), {'__name__': 'snippet'})
