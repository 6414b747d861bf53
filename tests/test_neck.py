"""Necks: equal to the references' from the frameworks' own files, and at home on any backbone."""
import itertools
import json
import logging
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from safetensors import safe_open

from cspnet_timm import BottomUp, CrossStage, PathAggregation, TopDown, cli
from cspnet_timm.checkpoints import CheckpointError
from cspnet_timm.conversion import inspect
from cspnet_timm.fitting import candidates
from tests import foreign, stages  # noqa: F401  registers small networks
from tests.parity import FOLDER, load_fixture
from tests.zoo import create, distance

FAST = ('rtmdet_nano', 'yolox_nano', 'ppyoloe_plus_t', 'yolov5n', 'yolov8n', 'yolo11n', 'yolo26n')
SLOW = ('rtmdet_s', 'yolox_s', 'ppyoloe_s')
FIXTURES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]

PARAMS = {  # of the neck alone, as the references count them
    'rtmdet_': dict(nano=389184, tiny=2188944, s=3883200, m=11049408, l=23746688, x=43511040, x_p6=79891840),
    'yolox_': dict(nano=347424, tiny=1596096, s=2834688, m=8679168, l=19523072, x=36902400),
    'ppyoloe_': dict(s=3417888, m=11726496, l=28024512, x=55004160),
    'ppyoloe_plus_': dict(t=1217376, s=3417888, m=11726496, l=28024512, x=55004160),
    'yolov5': dict(n=710784, s=2834688, m=8679168, l=19523072, x=36902400),
    'yolov8': dict(n=986880, s=3939840, m=10224768, l=18238464, x=28491520),
    'yolo11': dict(n=793696, s=3166400, m=8289792, l=11065856, x=24880896),
    'yolo26': dict(n=897152, s=3574016, m=8622080, l=10544128, x=23705088),
}


def heads(fixture):
    """The tensors that stand beside backbone and neck in a detector's file, all zero."""
    with safe_open(FOLDER / f'neck_{fixture}.safetensors', 'pt') as file:
        head = json.loads(file.metadata()['info'])['head']
    return {k: torch.zeros(shape, dtype=torch.long if k.endswith('num_batches_tracked') else torch.float32)
            for k, shape in head.items()}


def write(fixture, path, state_dict, info):
    """A detector's file in its framework's own container."""
    return foreign.write(fixture.replace('rtmdet', 'cspnext'), path / f'detector{suffix(fixture)}', state_dict, info)


def suffix(fixture):
    return foreign.suffix(fixture.replace('rtmdet', 'cspnext'))


def pyramid(name, file, **kwargs):
    return timm.create_model(
        name, pretrained=True, features_only=True, pretrained_cfg_overlay=dict(file=str(file)), **kwargs).eval()


@pytest.mark.parametrize('fixture', FIXTURES)
def test_a_detectors_file_gives_the_references_maps(fixture, tmp_path):
    info, state_dict, x, outputs = load_fixture(f'neck_{fixture}')
    head = {} if fixture.startswith('yolov5') else heads(fixture)  # the fixture's is not the one of its files
    file = write(fixture, tmp_path, {**state_dict, **head}, info)
    x = x.flip(1) if fixture.startswith(('yolox', 'rtmdet')) else x  # whose detectors take BGR
    with torch.no_grad():
        for name in (f'cspnet_{fixture}_pan', f'cspnet_{fixture}'):
            model = pyramid(name, file)
            for reduction, y in zip(model.feature_info.reduction(), model(x)):
                key = f'neck{reduction}' if name.endswith('_pan') and reduction >= 8 else f'stride{reduction}'
                if key in outputs:
                    assert distance(y, outputs[key]) < 1e-5, key
    model = timm.create_model(f'cspnet_{fixture}_pan', device='meta', num_classes=0)
    assert sum(p.numel() for p in model.parameters()) == info['params'] + info['neck_params']
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(info['bn_eps'], info['bn_momentum'])}


@pytest.mark.parametrize('family', PARAMS)
def test_parameters(family):
    for size, params in PARAMS[family].items():
        name = f'cspnet_{family}{size}_pan'
        if size in ('nano', 'n', 't', 's', 'x', 'x_p6'):
            neck = timm.create_model(name, device='meta').neck
            assert sum(p.numel() for p in neck.parameters()) == params, name
        assert timm.get_pretrained_cfg(name).license == timm.get_pretrained_cfg(name.removesuffix('_pan')).license


def test_every_name_is_a_line_that_can_be_found():
    source = '\n'.join(p.read_text() for p in (Path(__file__).parents[1] / 'cspnet_timm/families').glob('*.py'))
    for name in timm.list_models('cspnet_*_pan'):
        assert re.search(rf'^{name} = ', source, re.MULTILINE), name
        entrypoint = timm.model_entrypoint(name)
        assert entrypoint.__name__ == name and entrypoint.__doc__
        assert getattr(__import__(entrypoint.__module__, fromlist=[name]), name) is entrypoint


def test_weights_are_those_of_the_detector():
    for name in timm.list_models('cspnet_*_pan', pretrained=True):
        plain, cfg = (timm.get_pretrained_cfg(n).to_dict() for n in (name.replace('_pan', ''), name))
        assert {**plain, 'architecture': None} == {**cfg, 'architecture': None}, name
    assert 'cspnet_rtmdet_s_pan.rsb_a1_in1k' not in timm.list_pretrained('cspnet_rtmdet_s_pan')


# The composition


@pytest.mark.parametrize('channels', [(128, 256, 512), (64, 128)])
@pytest.mark.parametrize('out_chs', [None, 32, 'own'])
def test_on_any_channels(channels, out_chs):
    out_chs = [8 * (i + 1) for i in range(len(channels))] if out_chs == 'own' else out_chs
    neck = PathAggregation.for_channels(channels, out_chs)
    expected = channels if out_chs is None else [32] * len(channels) if out_chs == 32 else out_chs
    maps = [torch.randn(2, c, 32 >> i, 48 >> i) for i, c in enumerate(channels)]
    assert [tuple(p.shape) for p in neck(maps)] == [(2, c, *x.shape[2:]) for c, x in zip(expected, maps)]
    sum(p.square().mean() for p in neck(maps)).backward()
    assert all(p.grad is not None for p in neck.parameters())


def test_on_timms_backbone_with_a_stage_of_ones_own():
    backbone = timm.create_model('resnet18', features_only=True, out_indices=(1, 2, 3, 4))
    neck = PathAggregation.for_channels(
        backbone.feature_info.channels(), 24,
        stage=lambda in_chs, out_chs: CrossStage(
            in_chs, out_chs, blocks=lambda c: nn.Conv2d(c, c, 3, padding=1), partial_ratio=0.25, fusion='last'))
    maps = neck(backbone(torch.randn(2, 3, 70, 109)))  # odd at every stride
    assert [tuple(p.shape) for p in maps] == [(2, 24, 18, 28), (2, 24, 9, 14), (2, 24, 5, 7), (2, 24, 3, 4)]
    assert {type(node.stage) for node in [*neck.top_down, *neck.bottom_up]} == {CrossStage}


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match=r'in_chs=\[8\]'):
        PathAggregation.for_channels([8])
    with pytest.raises(ValueError, match=r'out_chs=\[8, 8\]'):
        PathAggregation.for_channels([8, 16, 32], [8, 8])
    with pytest.raises(ValueError, match='bottom_up has 1 entries'):
        PathAggregation([TopDown(nn.Identity()), TopDown(nn.Identity())], [BottomUp(nn.Identity(), nn.Identity())])
    with pytest.raises(ValueError, match='2 maps were given to a neck of 3 levels'):
        PathAggregation.for_channels([8, 16, 32])([torch.zeros(1, 8, 4, 4), torch.zeros(1, 16, 2, 2)])


def test_a_pyramid_that_only_goes_down():
    neck = PathAggregation([TopDown(nn.Conv2d(12, 8, 1)), TopDown(nn.Conv2d(12, 4, 1))], outputs=[nn.Identity()] * 3)
    maps = [torch.randn(1, c, s, s) for c, s in ((4, 8), (8, 4), (4, 2))]
    fine, middle, coarse = neck(maps)
    assert torch.equal(coarse, maps[2]) and fine.shape == (1, 4, 8, 8) and middle.shape == (1, 8, 4, 4)
    enlarged = maps[2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(middle, neck.top_down[0].stage(torch.cat([enlarged, maps[1]], dim=1)))
    neck.prune([1])
    assert torch.equal(neck(maps)[1], middle)
    assert len(list(neck.parameters())) == 2  # of the one node that the map needs


# The networks


@pytest.mark.parametrize('out_indices', [(2,), (3,), (4,), (1, 3), (2, 4)])
def test_an_extractor_has_no_parameter_that_its_maps_do_not_need(out_indices):
    whole = create('cspnet_rtmdet_nano_pan')
    model = timm.create_model('cspnet_rtmdet_nano_pan', features_only=True, out_indices=out_indices)
    model.load_state_dict({f'model.{k}': v for k, v in whole.state_dict().items()}, strict=False)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = whole.forward_intermediates(x, indices=list(out_indices), intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(model.eval()(x), expected))
    assert len(expected) == len(out_indices)
    sum(y.square().mean() for y in model.train()(x)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('name', [
    'stages_neck', 'stages_crossing',
    *(pytest.param(name, marks=pytest.mark.slow) for name in ('cspnet_yolov4_tiny_pan', 'cspnet_yolov9t_pan')),
])
def test_extractors_of_any_levels(name):
    """Of every choice, or of a third: the maps of the whole network, and no parameter that they do not need."""
    whole = create(name)
    state_dict = {f'model.{k}': v for k, v in whole.state_dict().items()}
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = whole.forward_intermediates(x, intermediates_only=True)
    choices = [c for n in range(1, len(maps) + 1) for c in itertools.combinations(range(len(maps)), n)]
    for out_indices in choices if name.startswith('stages_') else choices[::3]:
        model = timm.create_model(name, features_only=True, out_indices=out_indices)
        model.load_state_dict(state_dict)
        with torch.no_grad():
            assert all(torch.equal(a, maps[i]) for a, i in zip(model.eval()(x), out_indices, strict=True))
        sum(y.square().mean() for y in model.train()(x)).backward()
        assert not [k for k, p in model.named_parameters() if p.grad is None], out_indices


def test_inspect_convert_and_the_card_name_the_neck(tmp_path, capsys):
    info, state_dict, *_ = load_fixture('neck_yolov8n')
    file = write('yolov8n', tmp_path, {**state_dict, **heads('yolov8n')}, info)
    lines = inspect(file)
    assert 'model: cspnet_yolov8n' in lines and 'with neck: cspnet_yolov8n_pan' in lines
    assert cli.main(['convert', str(file), '--out', str(tmp_path / 'plain')]) == 0
    assert 'The neck of the file was left out: --model cspnet_yolov8n_pan takes it' in capsys.readouterr().out
    assert cli.main(['convert', str(file), '--out', str(tmp_path / 'neck'), '--model', 'cspnet_yolov8n_pan']) == 0
    out = capsys.readouterr().out
    assert 'cspnet_yolov8n_pan' in out and 'With neck' in out and 'left out' not in out
    card = (tmp_path / 'neck' / 'README.md').read_text()
    assert 'a Cross Stage Partial (CSP) backbone with neck' in card
    assert '**Neck:** the maps at strides 8, 16, 32 come from behind it, with 64, 128, 256 channels' in card
    assert 'neck' not in (tmp_path / 'plain' / 'README.md').read_text().lower()
    model = timm.create_model(f'local-dir:{tmp_path / "neck"}', pretrained=True, features_only=True)
    assert model.feature_info.channels() == [16, 32, 64, 128, 256]
    assert torch.equal(model.model.neck.bottom_up[1].down.conv.weight, state_dict['model.19.conv.weight'])
    # A neck tells YOLO26 from YOLO11, whose backbones have the same tensors.
    assert candidates(load_fixture('neck_yolo26n')[1]) == ['cspnet_yolo26n']


def test_a_file_without_a_neck(tmp_path):
    info, state_dict, x, _ = load_fixture('cspnext_nano')
    file = foreign.write('cspnext_nano', tmp_path / 'backbone.pth', state_dict, info)
    with pytest.raises(CheckpointError, match='holds cspnet_rtmdet_nano without the neck of cspnet_rtmdet_nano_pan'):
        pyramid('cspnet_rtmdet_nano_pan', file)
    model = pyramid('cspnet_rtmdet_nano_pan', file, pretrained_strict=False)
    plain = pyramid('cspnet_rtmdet_nano', file)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x)[:2], plain(x)[:2]))


@pytest.mark.parametrize('fixture', ['yolov8n', 'rtmdet_nano', 'yolox_nano', 'ppyoloe_plus_t'])
@pytest.mark.parametrize('suffix', ['', '_pan'])
def test_what_is_left_out_is_counted_as_the_file_has_it(fixture, suffix, caplog):
    """Of the file's own tensors, whatever becomes of one: cut in two, folded into another."""
    _, state_dict, *_ = load_fixture(f'neck_{fixture}')
    backbone = {k for k in state_dict if not re.match(
        r'neck\.|backbone\.(lateral|reduce|bu|C3)_|model\.(1[2-9]|2\d)\.', k)}
    whole = {**state_dict, **heads(fixture)}
    model = timm.create_model(f'cspnet_{fixture}{suffix}', num_classes=0)
    with caplog.at_level(logging.INFO, 'cspnet_timm'):
        model.load_state_dict(whole)
    taken = set(state_dict) if suffix else backbone
    assert f'{len(whole) - len(taken)} tensors of neck, head and training were left out' in caplog.text


def test_tensors_of_another_neck_are_too_many():
    _, state_dict, *_ = load_fixture('neck_rtmdet_nano')
    more = {k.replace('.out_convs.2.', '.out_convs.3.'): v for k, v in state_dict.items() if '.out_convs.2.' in k}
    model = timm.create_model('cspnet_rtmdet_nano_pan', num_classes=0)
    with pytest.raises(CheckpointError, match=r'holds cspnet_rtmdet_nano with another neck than .*10 tensors are too'):
        model.load_state_dict({**state_dict, **more})
    extractor = timm.create_model('cspnet_rtmdet_nano_pan', features_only=True, out_indices=(3,))
    extractor.load_state_dict(state_dict)  # of which it needs a part
    with pytest.raises(CheckpointError, match='10 tensors are too many'):
        extractor.load_state_dict({**state_dict, **more})
    fewer = {k: v for k, v in state_dict.items() if '.out_convs.' not in k}
    with pytest.raises(CheckpointError, match=r'holds cspnet_rtmdet_nano and a part of the neck of .*30 tensors'):
        model.load_state_dict(fewer)
    model.load_state_dict(fewer, strict=False)


@pytest.mark.parametrize('name', ['cspnet_nano', 'cspnet_yolov8n_pan'])
@pytest.mark.parametrize('feature_cls', ['list', 'dict'])
def test_an_extractor_is_told_to_give_other_maps(name, feature_cls):
    """As transformers asks one for all of them, and then for its own again; by depth, whatever the order."""
    extractor = timm.create_model(name, features_only=True, out_indices=(2, 4), feature_cls=feature_cls).eval()
    x = torch.rand(1, 3, 64, 64)
    own = extractor.return_layers
    names = [info['module'] for info in extractor.feature_info.info]

    def maps():
        with torch.no_grad():
            found = extractor(x)
        if isinstance(found, dict):  # by their numbers
            assert [*found] == sorted(found)
            return [*found.values()]
        return found

    two = maps()
    extractor.return_layers = {names[i]: str(i) for i in (4, 1, 3, 0, 2)}
    five = maps()
    assert [y.shape[-1] for y in five] == [64 // info['reduction'] for info in extractor.feature_info.info]
    assert len(five) == 5 and torch.equal(five[2], two[0]) and torch.equal(five[4], two[1])
    extractor.return_layers = own
    assert all(torch.equal(a, b) for a, b in zip(maps(), two)) and len(maps()) == 2
