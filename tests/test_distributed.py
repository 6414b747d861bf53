"""Two processes on one machine: the gradients of one, sharded or not, and checkpoints that load anywhere."""
import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import cspnet_timm
from tests.preloaded import python

PAGE = Path(__file__).parents[1] / 'docs' / 'many_gpus.md'

pytestmark = pytest.mark.slow

# One code path for all: one network as most are, one with parameters beside its convolutions, one with maps of a neck
# that its classifier does not read.
SOME = ('cspnet_nano', 'cspnet_ppyoloe_plus_t', 'cspnet_yolov4_tiny_pan')

TORCHRUN = ('-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone')


def run(*command, **kwargs):
    package = str(Path(cspnet_timm.__file__).parents[1])
    done = subprocess.run(
        [python(), *map(str, command)], capture_output=True, text=True, timeout=1200, **kwargs,
        env={**os.environ, 'OMP_NUM_THREADS': '1',
             'PYTHONPATH': os.pathsep.join([package, os.environ.get('PYTHONPATH', '')])},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('distributed')
    run(*TORCHRUN, Path(__file__).with_name('distributed_worker.py'), folder, *SOME)
    return folder


@pytest.mark.parametrize('name', SOME)
def test_two_processes_compute_what_one_does(folder, name):
    for rank in range(2):
        result = torch.load(folder / f'results_{rank}.pt')[name]
        assert 'error' not in result, result['error']
        assert result['ddp'] < 1e-4 and result['fsdp'] < 1e-4, result
        assert result['extractor']
    assert torch.load(folder / 'results_0.pt')[name]['full']


@pytest.mark.parametrize('name', SOME)
def test_a_checkpoint_written_in_shards_loads_unsharded(folder, name):
    dcp_to_torch_save(folder / name, folder / f'{name}.pt')
    model = timm.create_model(name, num_classes=5, checkpoint_path=str(folder / f'{name}.pt'))
    torch.manual_seed(0)
    expected = timm.create_model(name, num_classes=5).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('name', SOME)
@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_conversion_to_sync_batchnorm_changes_no_output(name, convert):
    model = timm.create_model(name, num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        model = convert(model)
        assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == norms > 0
        assert torch.equal(model(x), logits)
        assert all(torch.equal(a, b) for a, b in zip(model.forward_intermediates(x, intermediates_only=True), maps))


# The scripts of the page on many GPUs, on two processes with the CPU.

def script(path, library, *replacements):
    """Write the page's script that uses a library, with what stands for GPUs replaced."""
    code, = (code for code in re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL) if library in code)
    for old, new in replacements:
        assert old in code
        code = code.replace(old, new)
    path.write_text(code)
    return path


def test_page_lightning(tmp_path):
    if importlib.util.find_spec('lightning') is None:
        pytest.skip('lightning is not installed: pip install ".[clients]"')
    path = script(
        tmp_path / 'train.py', 'import lightning', ("accelerator='gpu', devices=8", "accelerator='cpu', devices=2"),
        ('sync_batchnorm=True', 'sync_batchnorm=False'))  # torch has it for GPUs only
    log = run(path, cwd=tmp_path)
    assert 'All distributed processes registered. Starting with 2 processes' in log and '`max_epochs=1` reached' in log
    checkpoint, = tmp_path.rglob('*.ckpt')
    saved = torch.load(checkpoint, weights_only=False)
    assert saved['global_step'] == 4  # 32 images, four for each of two processes


def test_page_fsdp(tmp_path):
    path = script(
        tmp_path / 'train_sharded.py', 'fully_shard', ("torch.cuda.set_device(int(os.environ['LOCAL_RANK']))", ''),
        ("'cuda'", "'cpu'"))
    run(*TORCHRUN, path, cwd=tmp_path)
    model = timm.create_model('cspnet_nano', num_classes=10, checkpoint_path=str(tmp_path / 'model.pt'))
    assert model.stem.conv1.bn.num_batches_tracked == 2
