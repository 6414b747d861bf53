"""The command line, as a user types it."""
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from cspnet_timm.cli import main
from cspnet_timm.counting import count_macs, count_parameters
from cspnet_timm.feature_image import strongest_channels
from tests.zoo import ALL

SAMPLE = Path(__file__).resolve().parent.parent / 'docs' / 'sample.jpg'


def test_list(capsys):
    assert main(['list']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ['model', 'Mparams', 'GMACs', 'weights', 'top-1', 'licence']
    assert {line.split()[0] for line in lines[1:]} == set(ALL)
    (small,) = [line.split() for line in lines if line.startswith('cspnet_small')]
    assert small == ['cspnet_small', '3.27', '0.69', '@256', 'ra4_e3600_r256_in1k', '73.2', '@320', 'apache-2.0']


def test_list_filter(capsys):
    assert main(['list', '--filter', 'nano']) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]} == {n for n in ALL if 'nano' in n}
    assert main(['list', '--filter', 'cspnet_[nt]*']) == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]}
    assert names == {n for n in ALL if n.startswith(('cspnet_n', 'cspnet_t'))} >= {'cspnet_nano', 'cspnet_tiny'}


def test_counts_are_timms():
    ours = timm.create_model('cspnet_medium', device='meta')
    theirs = timm.create_model('cs3darknet_focus_m', device='meta')
    assert count_parameters(ours) == count_parameters(theirs)
    assert count_macs(ours, (3, 256, 256)) == count_macs(theirs, (3, 256, 256))
    assert ours.training  # counting leaves the mode as it was


def test_features_prints_every_level(capsys):
    assert main(['features', str(SAMPLE), '--model', 'cspnet_nano']) == 0
    out = capsys.readouterr().out
    for i, level in enumerate(('stem', 'layer1', 'layer2', 'layer3', 'layer4')):
        stride, chs = 2 ** (i + 1), 16 * 2 ** i
        shape = (chs, 256 // stride, 256 // stride)
        assert f'{level:<8} stride {stride:>2}  channels {chs:>4}  shape {shape}' in out


def test_features_writes_images(tmp_path, capsys):
    images = [SAMPLE]
    for i, mode in enumerate(('L', 'RGBA', 'P')):
        images.append(tmp_path / f'{mode}.png')
        Image.open(SAMPLE).resize((90 + i, 70)).convert(mode).save(images[-1])
    out = tmp_path / 'deep' / 'out'
    assert main(['features', *map(str, images), '--model', 'cspnet_nano', '--out', str(out)]) == 0
    written = sorted(p.name for p in out.iterdir())
    assert written == sorted(f'{p.stem}.cspnet_nano.png' for p in images)
    with Image.open(out / 'sample.cspnet_nano.png') as drawing:
        assert drawing.format == 'PNG' and drawing.width == 6 * 232 + 8
        assert len(drawing.getcolors(1 << 20)) > 1000
    assert '4 images' in capsys.readouterr().out


def test_strongest_channels():
    features = torch.zeros(4, 5, 5)
    features[2, 0, 0], features[1, 0, 0] = 9, 3
    features[3] = 7.  # constant: nothing to see
    assert strongest_channels(features, 2) == [2, 1]
    assert len(strongest_channels(features, 9)) == 4


@pytest.mark.parametrize('args, message', [
    (['features', 'nowhere.jpg', '--model', 'cspnet_nano'], 'nowhere.jpg: there is no such image'),
    (['features', __file__, '--model', 'cspnet_nano'], 'cannot be read as an image'),
    (['features', str(SAMPLE), '--model', 'cspnet_smal'], 'did you mean cspnet_small'),
    (['features', str(SAMPLE), '--model', 'zzz'], "no model 'zzz': `cspnet-timm list` shows all"),
    (['features', str(SAMPLE), '--model', 'cspnet_small.in22k'], "no weights 'in22k', only: ra4_e3600"),
    (['features', str(SAMPLE), '--model', 'cspnet_nano', '--pretrained'], 'No pretrained weights exist'),
    (['features', str(SAMPLE), str(SAMPLE), '--model', 'cspnet_nano', '--out', 'o'], 'is already the result of'),
    (['features', str(SAMPLE), '--model', 'cspnet_nano', '--out', __file__], 'is a file, not a directory'),
    (['list', '--filter', 'resnet*'], "no model matches 'resnet*'"),
])
def test_bad_input(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith('cspnet-timm: ')]
    assert message in line and not captured.out.startswith('Traceback')
    assert not any(tmp_path.iterdir())


def test_damaged_image(tmp_path, capsys):
    path = tmp_path / 'half.png'
    Image.open(SAMPLE).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert main(['features', str(SAMPLE), str(path), '--model', 'cspnet_nano', '--out', str(tmp_path / 'out')]) == 2
    assert 'half.png: cannot be read as an image' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_bad_usage():
    for args in ([], ['nothing'], ['features', str(SAMPLE)]):
        with pytest.raises(SystemExit) as error:
            main(args)
        assert error.value.code == 2


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['--version'])
    assert not stopped.value.code and capsys.readouterr().out.startswith('cspnet-timm ')


@pytest.mark.slow
def test_module_and_script():
    for command in ([sys.executable, '-m', 'cspnet_timm'], [str(Path(sys.executable).with_name('cspnet-timm'))]):
        result = subprocess.run([*command, 'features', 'x', '--model', 'x'], capture_output=True, text=True)
        assert result.returncode == 2 and 'cspnet-timm: ' in result.stderr and not result.stdout
