"""The commands convert and inspect: what they recognise, write and refuse."""
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cspnet_timm import cli, conversion
from cspnet_timm.checkpoints import CheckpointError
from tests import foreign
from tests.hub_server import OWNER, Hub
from tests.parity import load_fixture
from tests.test_checkpoints import NETWORKS, largest_distance
from tests.zoo import create, distance, same_weights

pytestmark = pytest.mark.filterwarnings('ignore:Couldn.t retrieve source code')


def write(fixture, folder, legacy=False):
    info, state_dict, x, outputs = load_fixture(fixture)
    path = folder / f'file{foreign.suffix(fixture)}'
    return foreign.write(fixture, path, state_dict, info, legacy), x, outputs


@pytest.mark.parametrize('fixture', [
    pytest.param(name, marks=pytest.mark.slow) if i % 3 else name for i, name in enumerate(NETWORKS)])
def test_convert_recognises_and_keeps_parity(fixture, tmp_path):
    path, x, outputs = write(fixture, tmp_path, legacy=True)
    done = conversion.convert(path, tmp_path / 'out')
    assert done.model.split('.')[0] == NETWORKS[fixture] and done.distance <= 1e-6
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert largest_distance(model, fixture, x, outputs) < 1e-5
    assert bool(model.num_classes) is ('logits' in outputs)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, 'out'])
    copyleft = fixture.startswith('yolo') and not fixture.startswith('yolox')
    assert done.license == ('agpl-3.0' if copyleft else 'apache-2.0')


@pytest.mark.parametrize('fixture, name, others', [
    ('darknet_csmobilenet-v2', 'cspnet_mobilenetv2', ()),
    # leaky, ReLU and Mish activations leave no trace in a file: the user has to say which it is
    pytest.param('darknet_csresnet50', 'cspnet_resnet50', ('cspnet_resnet50_mish',), marks=pytest.mark.slow),
    pytest.param(
        'darknet_csdarknet53-omega', 'cspnet_darknet53_mish', ('cspnet_darknet53',), marks=pytest.mark.slow),
])
def test_darknet(fixture, name, others, tmp_path):
    path, x, outputs = write(fixture, tmp_path)
    assert set(conversion.inspect(path)[-1][len('model: '):].split(' or ')) == {name, *others}
    if others:
        with pytest.raises(CheckpointError, match=f'{others[0]}.*--model'):
            conversion.convert(path, tmp_path / 'out', license='other')
    done = conversion.convert(path, tmp_path / 'out', model=name if others else None, license='other')
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    with torch.no_grad():
        assert distance(model.forward_features(x), outputs['features']) < 1e-5
    assert done.model.startswith(name) and done.found == 'Darknet weights file'


@pytest.mark.slow
def test_push(tmp_path):
    path, _, _ = write('yolox_nano', tmp_path)
    with Hub() as server:
        variables = dict(
            os.environ, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / 'home'), HF_TOKEN=OWNER, HF_HUB_OFFLINE='0',
            HF_HUB_DISABLE_XET='1', NO_PROXY='127.0.0.1', PYTHONPATH=os.pathsep.join(
                [str(Path(__file__).parents[1]), *sys.path]))
        done = subprocess.run(
            [sys.executable, '-m', 'cspnet_timm', 'convert', str(path), '--out', str(tmp_path / 'out'), '--push-to-hub',
             'owner/yolox'], env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = server.repos['owner/yolox'].files()
    written = (tmp_path / 'out' / 'model.safetensors').read_bytes()
    assert files['model.safetensors'] == written and b'license: apache-2.0' in files['README.md']
    assert b'sha256' in files['README.md'] and 'owner/yolox' in done.stdout


def test_what_is_written(tmp_path):
    labels = {i: f'thing {i}' for i in range(7)}
    _, state_dict, _, _ = load_fixture('yolov8n_cls')
    state_dict['model.9.linear.weight'] = state_dict['model.9.linear.weight'][:7].clone()
    state_dict['model.9.linear.bias'] = state_dict['model.9.linear.bias'][:7].clone()
    path = foreign.ultralytics_file(tmp_path / 'best.pt', state_dict, 'yolov8n-cls', 1e-5, half=True, names=labels)
    conversion.convert(path, tmp_path / 'out')
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {'model.safetensors', 'config.json', 'README.md'}
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architecture'] == 'cspnet_yolov8n_cls' and config['num_classes'] == 7
    assert config['label_names'] == list(labels.values()) and config['pretrained_cfg']['license'] == 'agpl-3.0'
    assert config['pretrained_cfg']['mean'] == [0, 0, 0] and config['pretrained_cfg']['std'] == [1, 1, 1]
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert 'license: agpl-3.0' in card and '`best.pt`' in card and hashlib.sha256(path.read_bytes()).hexdigest() in card
    with safe_open(tmp_path / 'out' / 'model.safetensors', 'pt') as file:
        stem = file.get_tensor('stem.conv.weight')
    assert torch.equal(stem, state_dict['model.0.conv.weight'].half().float())


def test_preprocessing_follows_the_kind_of_file(tmp_path):
    """RTMDet's classifiers and detectors have different transforms, and a detector's image is BGR."""
    _, state_dict, x, outputs = load_fixture('cspnext_tiny')
    path = foreign.openmmlab_file(tmp_path / 'a.pth', state_dict)
    assert conversion.convert(path, tmp_path / 'classifier').preprocessing == 'cspnet_rtmdet_tiny.rsb_a1_in1k'
    detector = {k: v for k, v in state_dict.items() if not k.startswith('head.')}
    detector['bbox_head.rtm_cls.0.bias'] = torch.zeros(80)
    path = foreign.openmmlab_file(tmp_path / 'b.pth', detector)
    preprocessing = conversion.convert(path, tmp_path / 'detector').preprocessing
    transforms = [timm.get_pretrained_cfg(name) for name in (preprocessing, 'cspnet_rtmdet_tiny.coco')]
    assert len({(cfg.mean, cfg.std, cfg.interpolation, cfg.crop_pct) for cfg in transforms}) == 1
    model = timm.create_model(f'local-dir:{tmp_path / "detector"}', pretrained=True).eval()
    with torch.no_grad():
        assert distance(model.forward_features(x.flip(1)), outputs['stride32']) < 1e-5
    path = foreign.openmmlab_file(
        tmp_path / 'cspnext-tiny_udp-body7_210e-256x192-a3775292_20230504.pth', {
            k: v for k, v in state_dict.items() if not k.startswith('head.')})
    assert conversion.convert(path, tmp_path / 'pose').preprocessing == 'cspnet_rtmdet_tiny.udp_body7'
    assert 'Body7' not in (tmp_path / 'pose' / 'README.md').read_text()  # the hash in the name is not the file's


def test_own_models_and_timms(tmp_path):
    model = create('cspnet_nano', num_classes=5)
    torch.save({'state_dict': model.state_dict(), 'arch': 'cspnet_nano'}, tmp_path / 'a.pth.tar')
    with pytest.raises(ValueError, match='pass --license'):
        conversion.convert(tmp_path / 'a.pth.tar', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    conversion.convert(tmp_path / 'a.pth.tar', tmp_path / 'out', license='mit')
    again = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert again.num_classes == 5
    assert same_weights(again, model)
    theirs = create('cs3darknet_focus_s', num_classes=3)
    save_file(theirs.state_dict(), tmp_path / 'b.safetensors')
    done = conversion.convert(tmp_path / 'b.safetensors', tmp_path / 'theirs')
    assert done.model.split('.')[0] == 'cspnet_small'
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert distance(timm.create_model(f'local-dir:{done.directory}', pretrained=True).eval()(x), theirs(x)) < 1e-5


def test_other_input_channels(tmp_path):
    model = create('cspnet_nano', num_classes=5, in_chans=4)
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    conversion.convert(tmp_path / 'a.pth', tmp_path / 'out', license='mit')
    again = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert torch.equal(again.stem.conv1.conv.weight, model.stem.conv1.conv.weight)


def test_networks_that_differ_in_nothing_but_the_name(tmp_path):
    _, state_dict, _, _ = load_fixture('yolo11n_cls')
    for name in ('yolo11n-cls', 'yolo26n-cls'):
        path = foreign.ultralytics_file(tmp_path / f'{name}.pt', state_dict, name, 1e-5)
        assert conversion.inspect(path)[-1] == f'model: cspnet_{name.replace("-", "_")}'
    _, state_dict, _, _ = load_fixture('yolo11n')
    torch.save(state_dict, tmp_path / 'plain.pt')
    with pytest.raises(CheckpointError, match=r'cspnet_yolo11n and cspnet_yolo26n.*choose one with --model'):
        conversion.convert(tmp_path / 'plain.pt', tmp_path / 'out')
    done = conversion.convert(tmp_path / 'plain.pt', tmp_path / 'out', model='cspnet_yolo26n')
    assert (done.model, done.preprocessing) == ('cspnet_yolo26n', 'cspnet_yolo26n.coco')


def test_nothing_is_left_behind_by_failures(tmp_path, monkeypatch):
    path, _, _ = write('yolov8n', tmp_path)
    before = sorted(tmp_path.iterdir())
    for kwargs, message in (
            (dict(model='cspnet_yolov8s'), 'holds cspnet_yolov8n'), (dict(model='cspnet_nothing'), 'no model'),
            (dict(model='cspnet_yolov8n.nothing'), 'no such weights'), (dict(model='resnet18'), 'no model'),
            (dict(license='Not A Licence'), 'licence'),
    ):
        with pytest.raises(ValueError, match=message):
            conversion.convert(path, tmp_path / 'out', **kwargs)
        assert sorted(tmp_path.iterdir()) == before
    monkeypatch.setattr(conversion, '_distance', lambda model, directory: 1.)
    with pytest.raises(CheckpointError, match='computes something else'):
        conversion.convert(path, tmp_path / 'out')
    assert sorted(tmp_path.iterdir()) == before


def test_what_was_written_is_compared(tmp_path, monkeypatch):
    """A folder whose weights are others is noticed by the check itself."""
    path, _, _ = write('yolox_nano', tmp_path)
    save = conversion.hub.save

    def save_damaged(model, directory, about):
        with torch.no_grad():
            model.layer2.down.pointwise.conv.weight.mul_(1.01)
            save(model, directory, about)
            model.layer2.down.pointwise.conv.weight.div_(1.01)

    monkeypatch.setattr(conversion.hub, 'save', save_damaged)
    with pytest.raises(CheckpointError, match='computes something else'):
        conversion.convert(path, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_weights_that_are_no_numbers(tmp_path):
    _, state_dict, _, _ = load_fixture('yolox_nano')
    state_dict['backbone.backbone.dark3.0.dconv.bn.bias'][0] = float('nan')
    with pytest.raises(CheckpointError, match='NaN'):
        conversion.convert(foreign.yolox_file(tmp_path / 'a.pth', state_dict), tmp_path / 'out')


def test_existing_folders(tmp_path):
    path, _, _ = write('yolox_nano', tmp_path)
    (tmp_path / 'empty').mkdir()
    conversion.convert(path, tmp_path / 'empty')
    for target in (tmp_path / 'empty', path):
        with pytest.raises(FileExistsError, match='not empty'):
            conversion.convert(path, target)


def test_unknown_networks(tmp_path):
    torch.save({'conv.weight': torch.zeros(3, 3, 1, 1)}, tmp_path / 'a.pt')
    assert conversion.inspect(tmp_path / 'a.pt')[-1] == 'model: none of this package'
    with pytest.raises(CheckpointError, match='no network of this package'):
        conversion.convert(tmp_path / 'a.pt', tmp_path / 'out')
    with pytest.raises(CheckpointError, match='holds another network, not cspnet_nano'):
        conversion.convert(tmp_path / 'a.pt', tmp_path / 'out', model='cspnet_nano', license='mit')


# The command line


def test_commands(tmp_path, capsys):
    path, _, _ = write('yolov8n', tmp_path)
    assert cli.main(['inspect', str(path)]) == 0
    shown = dict(line.partition(': ')[::2] for line in capsys.readouterr().out.splitlines())
    assert shown['framework'] == 'Ultralytics' and shown['model'] == 'cspnet_yolov8n' and shown['licence'] == 'agpl-3.0'
    assert shown['batch norm eps'] == '0.001' and re.fullmatch(r'SiLU \(\d+\)', shown['activations'])
    assert shown['network'] == 'yolov8n.yaml' and shown['classes'] == '80'
    assert cli.main(['inspect', str(path), '--tensors']) == 0
    assert 'model.0.conv.weight: 16x3x3x3 float32' in capsys.readouterr().out
    assert cli.main(['convert', str(path), '--out', str(tmp_path / 'out')]) == 0
    out = capsys.readouterr().out
    assert 'preprocessing of cspnet_yolov8n.coco, licence agpl-3.0: loaded again and compared' in out
    assert 'local-dir:' in out


@pytest.mark.parametrize('argv', [
    ['inspect', 'missing.pt'], ['inspect', 'bad.pt'], ['convert', 'bad.pt', '--out', 'out'],
    ['convert', 'good.pt', '--out', 'out'], ['convert', 'good.pt', '--out', '.', '--model', 'cspnet_nano'],
    ['convert', 'good.pt', '--out', 'out', '--model', 'cspnet_nan'],
])
def test_errors_are_one_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bad.pt').write_bytes(b'\x80\x02cos\nsystem\n(X\x05\0\0\0touchtR.')
    torch.save(create('cspnet_nano').state_dict(), tmp_path / 'good.pt')
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith('cspnet-timm: ')]
    assert len(errors) == 1 and not captured.out and not (tmp_path / 'out').exists()


def test_inspect_reads_no_tensor(tmp_path, monkeypatch):
    from cspnet_timm.checkpoints.containers import Container
    path, _, _ = write('ppyoloe_t', tmp_path)
    monkeypatch.setattr(Container, 'load', lambda *args: pytest.fail('tensors were read'))
    assert conversion.inspect(path)[-1] == 'model: cspnet_ppyoloe_t'
