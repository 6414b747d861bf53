"""The paper's networks: counts to the printed digit, what is irregular in them, and the comparison."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn

from cspnet_timm.blocks import BottleneckBlock, ElasticBlock
from cspnet_timm.cross_stage import ComposedStage, CrossStage
from cspnet_timm.families import WEIGHTS
from cspnet_timm.layers import PartialShortcut
from tests.preloaded import python

BENCHMARK = Path(__file__).parents[1] / 'benchmarks' / 'paper.py'

# The README of the paper's repository: parameters (M) and operations (G) as printed, None where it prints none or, as
# for ResNet-50, where its cfg classifies before it pools; then the cfg's exact weights and what PyTorch counts.
TABLE = {
    'cspnet_resnet50': ('21.57', '8.97', 21_566_656, 21_607_848),
    'cspnet_resnet50_elastic': (None, '9.36', 29_795_520, 29_848_360),
    'cspnet_resnext50': ('20.50', '7.93', 20_499_136, 20_557_480),
    'cspnet_resnext50_elastic': (None, '5.45', 16_857_792, 16_916_264),
    'cspnet_darknet53': ('27.61', '13.07', 27_605_856, 27_642_184),
    'cspnet_darknet53_elastic': (None, '7.74', 19_045_216, 19_081_608),
    'cspnet_mobilenetv2': ('2.51', '0.764', 2_513_400, 2_541_424),
    'cspnet_plain_mobilenetv2': ('3.47', '0.858', 3_470_784, 3_505_960),
    'cspnet_plain_resnet50': ('22.73', '9.74', 22_734_016, 22_780_456),
    'cspnet_plain_resnext50': ('22.19', '10.11', 22_190_784, 22_252_328),
    'cspnet_plain_darknet53': ('41.57', '18.57', 41_573_216, 41_609_928),
    'cspnet_plain_peleenet': ('2.79', None, 2_791_520, None),
}
PAPER = [name for name in TABLE if 'plain' not in name] + [
    'cspnet_resnet50_mish', 'cspnet_resnext50_mish', 'cspnet_darknet53_mish']
AFTER = ['cspnet_densenet121', 'cspnet_densenet169', 'cspnet_densenet201', 'cspnet_densenet264', 'cspnet_peleenet']


@pytest.fixture(scope='module')
def benchmark():
    spec = importlib.util.spec_from_file_location('benchmark_paper', BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('name', TABLE)
def test_counts_to_the_printed_digit(name, benchmark):
    printed_params, printed_operations, weights, params = TABLE[name]
    size = timm.get_pretrained_cfg(name).input_size[-1]
    counts = benchmark.count(name, size)
    assert counts['weights'] == weights
    if params is not None:
        assert counts['params'] == params
    if printed_params is not None:
        assert f'{counts["weights"] / 1e6:.2f}' == printed_params
    if printed_operations is not None:
        digits = len(printed_operations.partition('.')[2])
        assert f'{counts["operations"] / 1e9:.{digits}f}' == printed_operations
    assert counts['flops'] == counts['operations']  # PyTorch counts the same layers


def test_operations_of_peleenet(benchmark):
    """README: 1.017, with the pools; 1.0155 of its convolutions."""
    assert f'{benchmark.count("cspnet_plain_peleenet", 224)["operations"] / 1e9:.4f}' == '1.0155'


@pytest.mark.parametrize('name, traffic', [('cspnet_plain_resnext50', '34.4'), ('cspnet_resnext50', '32.6')])
def test_traffic_of_the_paper(name, traffic, benchmark):
    assert f'{benchmark.count(name, 256)["traffic"] / 1e6:.1f}' == traffic


def test_mish_forms_differ_in_the_activation_alone():
    for name in ('cspnet_resnet50', 'cspnet_resnext50', 'cspnet_darknet53'):
        leaky = timm.create_model(name, device='meta')
        mish = timm.create_model(f'{name}_mish', device='meta')
        assert {k: v.shape for k, v in leaky.state_dict().items()} == {k: v.shape for k, v in mish.state_dict().items()}
        for (key, a), (_, b) in zip(leaky.named_modules(), mish.named_modules()):
            if isinstance(a, nn.LeakyReLU):
                assert isinstance(b, nn.Mish), key
            else:
                assert type(a) is type(b), key


def activations(model):
    return {type(m) for m in model.modules() if type(m) in (nn.LeakyReLU, nn.Mish, nn.ReLU, nn.SiLU, nn.GELU)}


@pytest.mark.parametrize('name', PAPER + AFTER)
def test_activation(name):
    model = timm.create_model(name, device='meta')
    expected = nn.Mish if 'mish' in name else nn.ReLU if 'mobilenet' in name else nn.LeakyReLU
    assert activations(model) == {expected}
    if expected is nn.LeakyReLU:
        assert {m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)} == {0.1}
    other = timm.create_model(name, device='meta', act_layer='silu')
    assert activations(other) == {nn.SiLU}
    count = [sum(isinstance(m, cls) for m in net.modules()) for net, cls in ((model, expected), (other, nn.SiLU))]
    assert count[0] == count[1]  # what is linear stays linear


@pytest.mark.parametrize('name', ['cspnet_resnet50', 'cspnet_resnext50', 'cspnet_resnet50_elastic'])
def test_partitions_of_the_middle_stages_are_linear(name):
    model = timm.create_model(name, device='meta')
    stages = [model.layer1.csp, model.layer2.csp, model.layer3.csp, model.layer4.csp]
    assert [hasattr(stage.entry, 'act') for stage in stages] == [True, False, False, True]
    assert [hasattr(stage.bypass, 'act') for stage in stages] == [True, False, False, True]
    assert all(hasattr(stage.transition, 'act') and hasattr(stage.merge, 'act') for stage in stages)


@pytest.mark.parametrize('name', ['cspnet_resnet50', 'cspnet_resnext50'])
def test_first_residual_is_partial(name):
    model = timm.create_model(name, device='meta')
    blocks = [m for m in model.modules() if isinstance(m, BottleneckBlock)]
    assert len(blocks) == 3 + 3 + 5 + 2
    assert [block.shortcut.missing_chs for block in blocks] == [64] + 12 * [0]
    assert model.layer1.csp.entry.conv.out_channels == 64
    assert model.layer1.csp.bypass.conv.out_channels == 128


def test_elastic_has_no_partial_residual():
    model = timm.create_model('cspnet_resnext50_elastic', device='meta')
    assert model.layer1.csp.entry.conv.out_channels == 128
    assert sum(isinstance(m, ElasticBlock) for m in model.modules()) == 13


def test_first_stage_of_darknet_is_full_width_and_in_the_stem():
    model = timm.create_model('cspnet_darknet53', device='meta')
    stage = model.stem.csp
    assert stage.entry.conv.weight.shape == stage.bypass.conv.weight.shape == (64, 64, 1, 1)
    assert stage.merge.conv.weight.shape == (64, 128, 1, 1)
    assert stage.blocks[0].conv1.conv.out_channels == 32
    assert model.layer1.csp.entry.conv.weight.shape == (64, 128, 1, 1)
    assert [info['reduction'] for info in model.feature_info] == [2, 4, 8, 16, 32]


def test_bypass_of_mobilenet_strides():
    model = timm.create_model('cspnet_mobilenetv2', device='meta')
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        assert isinstance(stage, ComposedStage)
        bypass = stage.bypass.conv
        assert bypass.groups == bypass.in_channels == bypass.out_channels and bypass.stride == (2, 2)
        depthwise = stage.blocks[0].conv2.conv
        assert depthwise.stride == (2, 2) and depthwise.out_channels == 2 * depthwise.groups
        assert isinstance(stage.entry, nn.Identity) and isinstance(stage.transition, nn.Identity)
        assert not hasattr(stage.blocks[0].conv3, 'act')
    assert model.stem.csp.bypass.conv.groups == 16


def test_partial_shortcut():
    y, x = torch.randn(2, 6, 3, 2), torch.randn(2, 4, 5, 3)
    out = PartialShortcut(4, 6, stride=2)(y, x)
    assert torch.equal(out[:, :4], y[:, :4] + x[:, :, ::2, ::2])
    assert torch.equal(out[:, 4:], y[:, 4:])
    x = torch.randn(2, 8, 3, 2)
    assert torch.equal(PartialShortcut(8, 6)(y, x), y + x[:, :6])
    assert torch.equal(PartialShortcut(6, 6)(y, y), y + y)


def test_elastic_block_halves_the_second_half():
    block = ElasticBlock(4, block=lambda chs: nn.Identity())
    x = torch.randn(1, 4, 6, 4)
    low = nn.functional.interpolate(nn.functional.max_pool2d(x[:, 2:], 2), scale_factor=2)
    assert torch.equal(block(x), torch.cat([x[:, :2], low], dim=1) + x)
    for size in ((1, 1), (3, 5), (7, 2)):  # beyond what Darknet can
        assert block(torch.randn(1, 4, *size)).shape == (1, 4, *size)


@pytest.mark.parametrize('name', ['cspnet_resnet50', 'cspnet_resnext50_elastic', 'cspnet_darknet53_elastic',
                                  'cspnet_mobilenetv2', 'cspnet_plain_resnet50', 'cspnet_peleenet'])
@pytest.mark.parametrize('output_stride', [8, 16, 32])
@pytest.mark.slow
def test_output_stride(name, output_stride):
    model = timm.create_model(name, device='meta', output_stride=output_stride)
    reductions = [min(r, output_stride) for r in (2, 4, 8, 16, 32)]
    assert [info['reduction'] for info in model.feature_info] == reductions
    maps = model.eval().forward_intermediates(torch.empty(1, 3, 128, 192, device='meta'), intermediates_only=True)
    for tap, info in zip(maps, model.feature_info):
        assert tap.shape == (1, info['num_chs'], 128 // info['reduction'], 192 // info['reduction'])
    dilations = {m.dilation for m in model.layer4.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)}
    assert max(dilations) == (32 // output_stride,) * 2


@pytest.mark.parametrize('name', ['cspnet_resnext50_elastic', 'cspnet_darknet53', 'cspnet_plain_resnext50',
                                  'cspnet_mobilenetv2', 'cspnet_peleenet', 'cspnet_densenet121'])
@pytest.mark.slow
def test_any_size(name):
    model = timm.create_model(name, device='meta').eval()
    for height, width in ((33, 47), (65, 1), (224, 200)):
        maps = model.forward_intermediates(torch.empty(1, 3, height, width, device='meta'), intermediates_only=True)
        for tap in maps:
            height, width = (height + 1) // 2, (width + 1) // 2
            assert tap.shape[2:] == (height, width)


@pytest.mark.parametrize('name', ['cspnet_resnet50', 'cspnet_resnext50_elastic', 'cspnet_mobilenetv2'])
def test_zero_init_last(name):
    blocks = {'cspnet_resnet50': 'conv3', 'cspnet_resnext50_elastic': 'conv3', 'cspnet_mobilenetv2': 'conv3'}
    model = timm.create_model(name, zero_init_last=True)
    gammas = [m.bn.weight for key, m in model.named_modules() if key.rpartition('.')[2] == blocks[name]]
    zero = [not gamma.any() for gamma in gammas]
    assert any(zero) if 'mobile' in name else all(zero)
    assert all(m.weight.all() for m in timm.create_model(name).modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize('name', ['cspnet_resnet50', 'cspnet_resnext50_elastic', 'cspnet_darknet53_elastic',
                                  'cspnet_mobilenetv2', 'cspnet_densenet121', 'cspnet_peleenet'])
@pytest.mark.slow
def test_drop_path_and_drop_block(name):
    model = timm.create_model(name, device='meta', drop_path_rate=0.4, drop_block_rate=0.1)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == 'DropPath']
    assert rates == sorted(rates) and 0.3 < rates[-1] < 0.4 + 1e-6
    assert sum(type(m).__name__ == 'DropBlock2d' for m in model.layer4.modules()) > 0
    plain = timm.create_model(name, device='meta')
    assert not any(type(m).__name__ in ('DropPath', 'DropBlock2d') for m in plain.modules())


@pytest.mark.parametrize('norm_layer', ['groupnorm', 'groupnorm1', 'frozenbatchnorm2d', nn.BatchNorm2d])
def test_norm_layer(norm_layer):
    model = timm.create_model('cspnet_resnext50', device='meta', norm_layer=norm_layer)
    norms = [m.bn for m in model.modules() if hasattr(m, 'bn')]
    assert len(norms) == 59 and {type(norm) for norm in norms} == {type(norms[0])}
    assert {norm.eps for norm in norms} == {1e-6}


# After the paper's text.

@pytest.mark.parametrize('name', ['cspnet_densenet121', 'cspnet_peleenet'])
@pytest.mark.parametrize('partial_ratio, fusion', [(0.25, 'csp'), (0.5, 'first'), (0.75, 'last')])
def test_partial_ratio_and_fusion(name, fusion, partial_ratio):
    model = timm.create_model(name, device='meta', partial_ratio=partial_ratio, fusion=fusion).eval()
    stages = [m for m in model.modules() if isinstance(m, CrossStage)]
    assert len(stages) == 4
    for i, stage in enumerate(stages):
        in_chs = stage.entry.stop
        assert stage.bypass.start == 0 and stage.bypass.stop == stage.entry.start == round(partial_ratio * in_chs)
        assert isinstance(stage.transition, nn.Identity) is (fusion == 'first')
        assert isinstance(stage.merge, nn.Identity) is (fusion == 'last' or i < 3)
    assert hasattr(model.layer2, 'transition') is (fusion != 'last')
    maps = model.forward_intermediates(torch.empty(1, 3, 64, 96, device='meta'), intermediates_only=True)
    assert [tap.shape[1] for tap in maps] == [info['num_chs'] for info in model.feature_info]


@pytest.mark.slow
def test_partial_stages_work_less(benchmark):
    """The paper's claim, of these layers: γ = 0.5 saves operations, and a larger γ saves more."""
    plain = benchmark.count('cspnet_plain_peleenet', 224)['operations']
    assert benchmark.count('cspnet_peleenet', 224)['operations'] < plain
    for name in AFTER[:2]:
        plain = timm_operations(name.removeprefix('cspnet_'))
        operations = [timm_operations(name, partial_ratio=ratio) for ratio in (0.25, 0.5, 0.75)]
        assert operations == sorted(operations, reverse=True)
        assert operations[1] < plain


def timm_operations(name, **kwargs):
    from torch.utils.flop_counter import FlopCounterMode
    model = timm.create_model(name, device='meta', **kwargs).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device='meta'))
    return counter.get_total_flops()


@pytest.mark.parametrize('kwargs, match', [
    (dict(fusion='both'), "fusion='both' is unknown"),
    (dict(partial_ratio=1.), r'partial_ratio=1.0 is outside \(0, 1\)'),
    (dict(partial_ratio=0.001), 'neither may be less than 1'),
])
def test_partial_ratio_and_fusion_are_checked(kwargs, match):
    for name in ('cspnet_densenet121', 'cspnet_peleenet'):
        with pytest.raises(ValueError, match=match):
            timm.create_model(name, **kwargs)


def test_stage_without_merge():
    stage = CrossStage(8, 8, blocks=lambda chs: nn.Identity(), partition='split', fusion='first', merge=False)
    x = torch.randn(1, 8, 2, 2)
    assert torch.equal(stage(x), torch.cat([x[:, 4:], x[:, :4]], dim=1))
    with pytest.raises(ValueError, match='out_chs=16 cannot be'):
        CrossStage(8, 16, blocks=lambda chs: nn.Identity(), partition='split', fusion='first', merge=False)


# Weights and their provenance.

def test_weights_are_described():
    names = [name for name in PAPER if 'plain' not in name]
    for name in names + [name for name in TABLE if 'plain' in name and 'pelee' not in name]:
        cfg = timm.get_pretrained_cfg(name)
        info = WEIGHTS[f'{name}.{cfg.tag}']
        assert info.metrics['size'] == cfg.input_size[-1]
        redmon = any('pjreddie' in source.url for source in info.sources)
        assert info.license == cfg.license == ('other' if redmon else 'unknown')
        assert info.terms.label == ('other (darknet)' if redmon else 'unknown')
        assert (cfg.mean, cfg.std, cfg.interpolation, cfg.crop_pct) == ((0.,) * 3, (1.,) * 3, 'bilinear', 1.0)
        assert bool(cfg.has_weights) is redmon  # the others lie on Google Drive and in a repository without a licence
    assert WEIGHTS['cspnet_resnext50_mish.omega_in1k'].metrics == dict(top1=79.8, top5=95.2, size=256)
    assert {tag.partition('.')[2] for tag in WEIGHTS if tag.startswith('cspnet_resnext50.')} == {
        'in1k', 'gamma_in1k', 'coco'}
    for name in AFTER:
        assert not any(weights.startswith(f'{name}.') for weights in WEIGHTS)  # the paper's figures are not theirs


# The comparison.

@pytest.mark.slow
def test_comparison_runs(tmp_path):
    command = [
        python(), str(BENCHMARK), '--networks', 'mobilenetv2', '--size', '64', '--batch-size', '2',
        '--repeats', '1', '--iterations', '1', '--out', str(tmp_path / 'results'),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    assert {path.name for path in (tmp_path / 'results').iterdir()} == {'paper.json', 'paper.md', 'paper.png'}
    report = json.loads((tmp_path / 'results' / 'paper.json').read_text())
    pair = report['pairs']['mobilenetv2']
    assert pair['csp']['weights'] == 2_513_400 and pair['plain']['weights'] == 3_470_784
    for key, ratio in pair['ratio'].items():
        assert pair['csp'][key] > 0 and pair['plain'][key] > 0
        assert ratio == pytest.approx(pair['csp'][key] / pair['plain'][key])
    table = (tmp_path / 'results' / 'paper.md').read_text()
    assert '| `cspnet_mobilenetv2` | 64 | 2.51 | 2.54 |' in table
    assert (tmp_path / 'results' / 'paper.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('arguments', [['--networks', 'vgg'], ['--repeats', '0'], ['--size', '-1']])
def test_comparison_refuses(arguments, benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert arguments[-1] in capsys.readouterr().err


# The documentation.

def doc_rows(compared=False):
    text = (Path(__file__).parents[1] / 'docs' / 'paper.md').read_text()
    text = text.split('## Is it less work?')[int(compared)]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines()
            if line.startswith('| `cspnet_')]


def test_documented_weights():
    rows = {row[0].strip('`'): row for row in doc_rows() if '.' in row[0]}
    ours = {
        name for name, info in WEIGHTS.items() if info.task == 'classification'
        and (name.partition('.')[0] in PAPER or name.startswith('cspnet_plain_'))}
    assert set(rows) == ours
    for name, (_, file, top1, top5, pixels, licence) in rows.items():
        info = WEIGHTS[name]
        assert f'({info.sources[-1].link})' in file
        assert info.metrics == dict(top1=float(top1), top5=float(top5), size=int(pixels))
        assert info.terms.label == licence


@pytest.mark.slow
def test_documented_comparison(benchmark):
    rows = doc_rows(compared=True)
    assert len(rows) >= 10 and len(rows) % 2 == 0
    for name, pixels, weights, params, operations, _, traffic, *_ in rows:
        counts = benchmark.count(name.strip('`'), int(pixels))
        assert f'{counts["weights"] / 1e6:.2f}' == weights
        assert f'{counts["params"] / 1e6:.2f}' == params
        assert f'{counts["operations"] / 1e9:.3f}' == operations
        assert f'{counts["traffic"] / 1e6:.1f}' == traffic


@pytest.mark.slow
def test_documented_sizes(benchmark):
    rows = [row for row in doc_rows() if '.' not in row[0]]
    assert len(rows) == len(TABLE) + len(AFTER)
    for name, params, weights, operations, pixels, channels in rows:
        name = name.strip('`')
        counts = benchmark.count(name, int(pixels))
        assert timm.get_pretrained_cfg(name).input_size[-1] == int(pixels)
        assert f'{counts["params"] / 1e6:.2f}' == params
        assert f'{counts["weights"] / 1e6:.2f}' == weights
        assert f'{counts["operations"] / 1e9:.2f}' == operations
        model = timm.create_model(name, device='meta')
        assert ', '.join(str(info['num_chs']) for info in model.feature_info) == channels


def test_traffic_of_darknet_is_higher(benchmark):
    """What the paper says of ResNeXt does not carry to Darknet."""
    assert benchmark.count('cspnet_darknet53', 256)['traffic'] > benchmark.count(
        'cspnet_plain_darknet53', 256)['traffic']
