"""The command line, as a user types it."""
import csv
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import cspnet_timm
from cspnet_timm.cli import main
from cspnet_timm.counting import count_macs, count_parameters
from cspnet_timm.feature_image import most_varied_channels
from cspnet_timm.features import output_paths
from tests import foreign
from tests.parity import load_fixture
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


def test_list_filter_in_the_users_words(capsys):
    assert main(['list', '--filter', 'YOLOX_[nt]*[!n]']) == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]}
    assert names == {'cspnet_yolox_nano', 'cspnet_yolox_tiny', 'cspnet_yolox_tiny_keras'}


def test_list_for_programs(capsys):
    assert main(['list', '--filter', 'cspnet_[ns]*l*', '--json']) == 0
    (small,) = json.loads(capsys.readouterr().out)
    assert (small['model'], small['weights']) == ('cspnet_small', 'ra4_e3600_r256_in1k')
    assert small['parameters'] == 3274728 and small['macs'] // 10 ** 7 == 68 and small['input_size'] == 256
    assert small['metrics'] == {'top1': 73.158, 'top5': 91.458, 'size': 320}
    assert small['license'] == 'apache-2.0' and small['downloads'] is True
    assert main(['list', '--filter', 'cspnet_[ns]*', '--csv']) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row['model'], row['top1']) for row in rows] == [('cspnet_nano', ''), ('cspnet_small', '73.158')]


def test_counts_are_timms():
    ours = timm.create_model('cspnet_medium', device='meta')
    theirs = timm.create_model('cs3darknet_focus_m', device='meta')
    assert count_parameters(ours) == count_parameters(theirs)
    assert count_macs(ours, (3, 256, 256)) == count_macs(theirs, (3, 256, 256))
    assert ours.training  # counting leaves the mode as it was
    ours.stem.eval()  # as whoever freezes a part leaves it
    frozen = {name for name, module in ours.named_modules() if not module.training}
    count_macs(ours, (3, 64, 64))
    assert {name for name, module in ours.named_modules() if not module.training} == frozen and frozen


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


def test_most_varied_channels():
    features = torch.zeros(4, 5, 5)
    features[2, 0, 0], features[1, 0, 0] = 9, 3
    features[3] = 7.  # constant: nothing to see
    assert most_varied_channels(features, 2) == [2, 1]
    assert len(most_varied_channels(features, 9)) == 4


@pytest.mark.parametrize('args, message', [
    (['features', 'nowhere.jpg', '--model', 'cspnet_nano'], 'nowhere.jpg: there is no such image or folder'),
    (['features', __file__, '--model', 'cspnet_nano', '--random'], 'nothing was read'),
    (['features', str(SAMPLE), '--model', 'local-dir:nowhere'], 'there is no config.json in this folder'),
    (['features', str(SAMPLE), '--model', 'cspnet_nano', '--file', 'no.pth'], '--file no.pth: there is no such file'),
    (['features', str(SAMPLE), '--model', 'cspnet_nano', '--file', __file__], 'cspnet_nano: '),
    (['features', str(SAMPLE), '--model', 'cspnet_smal'], 'did you mean cspnet_small'),
    (['features', str(SAMPLE), '--model', 'zzz'], "no model 'zzz': `cspnet-timm list` shows all"),
    (['features', str(SAMPLE), '--model', 'cspnet_small.in22k'], "no weights 'in22k', only: ra4_e3600"),
    (['features', str(SAMPLE), '--model', 'cspnet_nano', '--pretrained'], 'No pretrained weights exist'),
    (['features', str(SAMPLE), '--model', 'cspnet_nano', '--out', __file__], 'cannot be made'),
    (['features', str(SAMPLE), '--model', 'cspnet_nano', '--out', '/proc/nothing/here'], 'cannot be made'),
    (['list', '--filter', 'regnet*'], "no model matches 'regnet*'"),
])
def test_bad_input(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith('cspnet-timm: ')]
    assert message in line and not captured.out.startswith('Traceback')
    assert not any(tmp_path.iterdir())


def damaged(path, kind):
    """The first 2000 bytes of the sample."""
    Image.open(SAMPLE).save(path, kind)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def test_what_cannot_be_read_is_named_and_passed_over(tmp_path, capsys):
    folder = tmp_path / 'in'
    (folder / 'deep').mkdir(parents=True)
    damaged(folder / 'half.png', 'png')
    damaged(folder / 'deep' / 'half.JPG', 'jpeg')
    (folder / 'empty.webp').touch()
    (folder / 'notes.txt').write_text('no image')
    for image in ('a.jpg', 'a.png', 'deep/a.jpg'):
        Image.open(SAMPLE).resize((64, 48)).save(folder / image)
    out = tmp_path / 'out'
    assert main(['features', str(folder), str(folder / 'a.jpg'), '--model', 'cspnet_nano', '--out', str(out)]) == 0
    captured = capsys.readouterr()
    broken = re.findall(r'(/\S+): passed over, ', captured.err)
    assert sorted(broken) == sorted(str(folder / name) for name in ('half.png', 'deep/half.JPG', 'empty.webp'))
    assert '3 of 6 images passed over' in captured.err and f'3 images -> {out}' in captured.out
    assert {str(p.relative_to(out)) for p in out.rglob('*.png')} == {
        f'{name}.cspnet_nano.png' for name in ('a.jpg', 'a.png', 'deep/a.jpg')}


def test_no_two_drawings_have_one_name(tmp_path):
    folders = [tmp_path / name for name in ('x', 'y', 'z/x')]
    images = [folder / name for folder in folders for name in ('a.png', 'A.jpg', 'b.png')] + [folders[0] / 'c.png']
    paths = [str(p.relative_to(tmp_path / 'out')) for p in output_paths(images, tmp_path / 'out', 'hf-hub:user/n.t')]
    assert len({path.casefold() for path in paths}) == len(images)
    assert paths[-1] == 'c.user_n.t.png' and paths[2] == 'x/b.png.user_n.t.png'


def test_which_weights(tmp_path, capsys, monkeypatch):
    """Released ones where they are at hand, random ones where they are not or were asked for."""
    monkeypatch.setenv('CSPNET_TIMM_WEIGHTS', str(tmp_path))  # HF_HUB_OFFLINE is set by conftest.py
    run = ['features', str(SAMPLE), '--model']
    for arguments, line in (
            (['cspnet_nano'], 'cspnet_nano: random weights: there are no others for cspnet_nano'),
            (['cspnet_yolov8n'], 'cspnet_yolov8n: random weights: the released ones are not at hand, --pretrained '),
            (['cspnet_yolox_nano'], 'cspnet_yolox_nano: random weights: the released ones are not at hand, '),
            (['cspnet_yolox_nano', '--random'], 'cspnet_yolox_nano: random weights: as asked for')):
        assert main([*run, *arguments]) == 0
        assert capsys.readouterr().out.startswith(line)
    assert main([*run, 'cspnet_yolox_nano', '--pretrained']) == 2
    assert 'not asked, since HF_HUB_OFFLINE is set' in capsys.readouterr().err
    info, state_dict, _, _ = load_fixture('yolox_nano')
    foreign.write('yolox_nano', tmp_path / 'cspnet_yolox_nano.coco.pth', state_dict, info)
    for arguments, weights in (
            ([], 'cspnet_yolox_nano.coco'), (['--pretrained'], 'cspnet_yolox_nano.coco'),
            (['--file', str(tmp_path / 'cspnet_yolox_nano.coco.pth')], tmp_path / 'cspnet_yolox_nano.coco.pth')):
        assert main([*run, 'cspnet_yolox_nano', *arguments]) == 0
        assert capsys.readouterr().out.startswith(f'cspnet_yolox_nano: weights of {weights}\n')
    assert main([*run, 'hf-hub:user/name']) == 2
    assert 'hf-hub:user/name: cannot be downloaded, HF_HUB_OFFLINE is set' in capsys.readouterr().err


def test_features_of_a_folder_of_weights(tmp_path, capsys):
    cspnet_timm.hub.save(timm.create_model('cspnet_nano', num_classes=3), tmp_path / 'mine', license='mit')
    out = tmp_path / 'out'
    assert main(['features', str(SAMPLE), '--model', f'local-dir:{tmp_path / "mine"}', '--out', str(out)]) == 0
    assert f'weights of local-dir:{tmp_path / "mine"}' in capsys.readouterr().out
    assert [p.name for p in out.iterdir()] == ['sample.mine.png']


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


@pytest.mark.slow
def test_whoever_stops_the_command_sees_one_line():
    command = [sys.executable, '-m', 'cspnet_timm', 'features', str(SAMPLE), '--model', 'cspnet_nano', '--random']
    pipe = subprocess.run(
        f'{sys.executable} -m cspnet_timm list | head -1', shell=True, capture_output=True, text=True)
    assert pipe.stdout.startswith('model ') and not pipe.stderr
    for library in ('libtorch', 'torchvision'):  # while torch is being imported, and while timm is
        process = subprocess.Popen(  # a shell may have this process and its children ignore interrupts
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while library not in Path(f'/proc/{process.pid}/maps').read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert err.splitlines() == ['cspnet-timm: stopped.'], err
        # If the signal fell into text that was being executed, Python ends itself by it; a shell says 130 of both.
        assert process.returncode in (130, -signal.SIGINT)
