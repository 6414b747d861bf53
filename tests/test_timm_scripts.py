"""timm's own scripts, unedited, with this package's models.

They are not in timm's wheel: set ``TIMM_SCRIPTS`` to the folder that holds them, a clone of timm. The test copies them
to a folder without a ``timm`` beside them, so that they run with the timm that is installed.
"""
import csv
import json
import math
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save

import cspnet_timm
from tests.hub_server import Hub
from tests.preloaded import python
from tests.samples import FAMILIES, FEW
from tests.test_hub import client_environment
from tests.test_readme import code

SCRIPTS = os.environ.get('TIMM_SCRIPTS')
NAME = 'cspnet_nano'
# What timm's recipes have most; a run is resumed with the flags that it began with.
RECIPE = ('--model-ema', '--model-ema-decay', '0.5', '--opt', 'adamw', '--layer-decay', '0.7', '--grad-checkpointing')
NAMES = ('train', 'validate', 'inference', 'benchmark', 'onnx_export', 'avg_checkpoints')

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SCRIPTS, reason='TIMM_SCRIPTS does not name the folder of timm\'s scripts'),
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('timm_scripts')
    for name in NAMES:
        shutil.copy(Path(SCRIPTS) / f'{name}.py', folder)
    shutil.copy(Path(__file__).with_name('ddp_cpu_shim.py'), folder)
    draw_images(folder / 'images')
    return folder


def draw_images(root):
    """Discs and bars, eight of each to train on and four to validate."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 8), ('validation', 4)):
        for kind in ('bar', 'disc'):
            (root / split / kind).mkdir(parents=True)
            for i in range(count):
                x, y, shade = torch.randint(0, 30, (3,), generator=generator).tolist()
                image = Image.new('RGB', (64, 64), (shade, shade, shade))
                box = (x, y, x + 30, y + (30 if kind == 'disc' else 6))
                draw = ImageDraw.Draw(image)
                (draw.ellipse if kind == 'disc' else draw.rectangle)(box, fill=(220, 200, 40))
                image.save(root / split / kind / f'{split}_{kind}_{i}.png')  # the scripts want unique names


def run(folder, *command, launcher=(), **environment):
    packages = [str(Path(cspnet_timm.__file__).parents[1]), os.environ.get('PYTHONPATH', '')]
    result = subprocess.run(
        [python(), *launcher, *map(str, command)], cwd=folder, capture_output=True, text=True, timeout=600,
        env={**os.environ, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(packages),
             **environment},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout + result.stderr


def train(folder, model, experiment, *options, launcher=(), epochs=1):
    """Train and return the run's folder, its log and its summary, a row per epoch."""
    log = run(
        folder, 'train.py', '--data-dir', 'images', '--model', model, '--num-classes', 2, '--device', 'cpu', '-b', 4,
        '-j', 0, '--epochs', epochs, '--warmup-epochs', 0, '--img-size', 64, '--lr', 0.01, '--log-interval', 1,
        '--output', 'runs', '--experiment', experiment, *options, launcher=launcher,
    )
    output = folder / 'runs' / experiment
    with (output / 'summary.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert all(math.isfinite(float(row['train_loss'])) and math.isfinite(float(row['eval_loss'])) for row in rows)
    return output, log, rows


def results(log):
    return json.JSONDecoder().raw_decode(log.partition('--result')[2].lstrip())[0]


@pytest.fixture(scope='module')
def trained(folder):
    """The checkpoint of each model, trained once."""
    checkpoints = {}

    def checkpoint(name):
        if name not in checkpoints:
            epochs = 2 if name == NAME else 1  # of which an average is made
            output, _, rows = train(folder, name, f'first_{name}', *RECIPE, epochs=epochs)
            assert len(rows) == epochs
            checkpoints[name] = output / 'last.pth.tar'
        return checkpoints[name]

    return checkpoint


# Every family is trained, a few are validated; the other scripts and flags are tried with one.

@pytest.mark.parametrize('name', FAMILIES)
def test_train(trained, name):
    checkpoint = torch.load(trained(name), weights_only=False)
    weights, average = checkpoint['state_dict'], checkpoint['state_dict_ema']
    assert weights.keys() == average.keys() == timm.create_model(name, num_classes=2, device='meta').state_dict().keys()
    assert not all(torch.equal(v, average[k]) for k, v in weights.items())


@pytest.mark.parametrize('name', FEW)
def test_validate(folder, trained, name):
    found = results(run(
        folder, 'validate.py', '--data-dir', 'images', '--model', name, '--num-classes', 2, '--device', 'cpu', '-b', 4,
        '-j', 0, '--img-size', 64, '--checkpoint', trained(name), '--reparam'))
    assert 0 <= found['top1'] <= 100
    fused = timm.models.reparameterize_model(timm.create_model(name, num_classes=2))
    assert found['param_count'] == round(sum(p.numel() for p in fused.parameters()) / 1e6, 2)


def test_reparam_changes_no_result(folder, trained):
    options = ('--data-dir', 'images', '--model', NAME, '--num-classes', 2, '--device', 'cpu', '-b', 4, '-j', 0,
               '--img-size', 64, '--checkpoint', trained(NAME))
    plain, fused = (results(run(folder, 'validate.py', *options, *more)) for more in ((), ('--reparam',)))
    assert fused['top1'] == plain['top1'] and fused['param_count'] <= plain['param_count']


def test_average(folder, trained):
    average = folder / 'average.safetensors'
    run(folder, 'avg_checkpoints.py', '--input', trained(NAME).parent, '--filter', 'checkpoint-*.pth.tar', '--output',
        average, '--safetensors')
    model = timm.create_model(NAME, num_classes=2, checkpoint_path=str(average))
    assert torch.isfinite(model.eval()(torch.zeros(1, 3, 64, 64))).all()


def test_inference(folder, trained):
    run(folder, 'inference.py', '--data-dir', 'images/validation', '--model', NAME, '--num-classes', 2,
        '--device', 'cpu', '-b', 4, '-j', 0, '--img-size', 64, '--checkpoint', trained(NAME), '--label-type', 'none',
        '--fullname', '--topk', 2, '--results-separate-col', '--results-dir', 'inference')
    table, = (folder / 'inference').glob('*.csv')
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert all(float(row['prob_0']) + float(row['prob_1']) == pytest.approx(1, abs=1e-4) for row in rows)


@pytest.mark.parametrize('options', [('inference', '--reparam'), ('train',)], ids=' '.join)
def test_benchmark(folder, options):
    # --num-classes, because the script cannot train a model whose weights have no classifier, as a detector's have not.
    found = results(run(folder, 'benchmark.py', '--model', NAME, '--num-classes', 2, '--device', 'cpu', '-b', 2,
                        '--img-size', 64, '--num-warm-iter', 1, '--num-bench-iter', 5, '--bench', *options))
    assert found['model'] == NAME
    rate, = (v for k, v in found.items() if k in ('infer_samples_per_sec', 'train_samples_per_sec'))
    assert rate > 0


@pytest.mark.parametrize('options', [(), ('--dynamo', '--reparam')], ids=' '.join)
def test_onnx_export(folder, trained, options):
    output = folder / f'{NAME}{"".join(options)}.onnx'
    run(folder, 'onnx_export.py', output, '--model', NAME, '--num-classes', 2, '--checkpoint', trained(NAME),
        '--img-size', 64, '-b', 1, '--check-forward', *options)  # fails if ONNX Runtime's output differs
    assert output.stat().st_size > 10_000


FLAGS = {  # those of one entry do not meet each other's code
    'arithmetic': ('--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--torchcompile', 'eager'),
    'regularisation': ('--drop-path', '0.2', '--drop', '0.1', '--drop-block', '0.1', '--bn-momentum', '0.02',
                       '--bn-eps', '0.002'),
    'split bn': ('--aug-splits', '2', '--split-bn', '--jsd-loss', '--smoothing', '0'),
    'shape': ('--in-chans', '1', '--gp', 'catavgmax'),
}


@pytest.mark.parametrize('flags', FLAGS)
def test_training_flags(folder, flags):
    train(folder, NAME, flags.replace(' ', '_'), *FLAGS[flags])


def test_resume(folder, trained):
    before = torch.load(trained(NAME), weights_only=False)
    output, _, rows = train(folder, NAME, 'resumed', *RECIPE, '--resume', trained(NAME), epochs=3)
    assert [row['epoch'] for row in rows] == ['2']  # it went on with the third
    after = torch.load(output / 'last.pth.tar', weights_only=False)
    assert before['state_dict'].keys() == after['state_dict'].keys()
    steps = {k: v for k, v in after['state_dict'].items() if k.endswith('num_batches_tracked')}
    assert all(v > before['state_dict'][k] for k, v in steps.items())


def test_pretrained_path(folder, trained):
    output, _, _ = train(folder, NAME, 'pretrained', '--pretrained', '--pretrained-path', trained(NAME),
                         '--lr', '1e-12', '--weight-decay', 0)
    before = torch.load(trained(NAME), weights_only=False)['state_dict_ema']  # which timm prefers
    after = torch.load(output / 'last.pth.tar', weights_only=False)['state_dict']
    for key, value in before.items():
        if key.endswith('.conv.weight'):
            torch.testing.assert_close(after[key], value)


README = [text for kind, text in code() if kind == 'command' and re.search(r'\b(train|validate)\.py\b', text)]


@pytest.fixture(scope='module')
def released(folder):
    """Weights where the commands of the README look for the released ones; the variables that lead there."""
    (folder / 'data').symlink_to(folder / 'images')
    with Hub() as hub:
        for name, of_timm in (('cspnet_small', 'cs3darknet_focus_s'), ('cspnet_medium', 'cs3darknet_focus_m'),
                              ('cspnet_rtmdet_s', 'cspnext_s')):
            weights = save(timm.create_model(of_timm).state_dict())
            hub.add(timm.get_pretrained_cfg(name).hf_hub_id, {'model.safetensors': weights})
        yield client_environment(hub, folder / 'hf_home')


@pytest.mark.parametrize('command', README, ids=lambda command: re.search(r'(?:torchrun.*)?\w+\.py', command)[0])
def test_commands_of_the_readme(folder, released, command):
    """As printed, but on the CPU, for two processes and an epoch; SyncBN is for GPUs alone."""
    program, *arguments = shlex.split(command)
    launcher, options = (), ['--device', 'cpu', '-b', '2', '-j', '0', '--img-size', '64']
    if program == 'torchrun':
        assert arguments.pop(0) == '--nproc_per_node=4' and torch.distributed.is_available()
        arguments.remove('--sync-bn')
        launcher = ('-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone')
        options += ['--device-modules', 'ddp_cpu_shim']
    if arguments[0] == 'train.py':
        options += ['--epochs', '1', '--warmup-epochs', '0', '--output', 'runs']
    log = run(folder, *arguments, *options, launcher=launcher, **released)
    assert 'Loading pretrained weights' in log
    if arguments[0] == 'train.py':
        assert 'Best metric' in log
    else:
        assert 0 <= results(log)['top1'] <= 100


def test_the_readme_shows_the_scripts():
    assert len(README) >= 3


def test_commands_of_the_page_on_many_gpus(folder):
    """On two CPU processes, in the page's order: the last resumes what the first has left."""
    page = (Path(__file__).parents[1] / 'docs' / 'many_gpus.md').read_text()
    commands = re.findall(
        r'^torchrun --nproc_per_node=8 train.py --data-dir \S+ --model cspnet_small (.*)$', page, re.MULTILINE)
    assert len(commands) == 3
    launcher = ('-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone')
    for i, command in enumerate(commands):
        for flag, instead in (
                (' --sync-bn', ''), (' --pretrained', ''), ('-b 128', ''), ('--num-classes 10', ''),
                ('output/train/run', 'runs/page_0'),
        ):
            command = command.replace(flag, instead)
        _, log, rows = train(
            folder, 'cspnet_nano', f'page_{i}', *command.split(), '--device-modules', 'ddp_cpu_shim', launcher=launcher,
            epochs=2 if '--resume' in command else 1)
        assert re.search(r'total 2\b', log), log[-2000:]
    assert [row['epoch'] for row in rows] == ['1']  # it went on with the second
