"""Two processes on one machine: the gradients of one, sharded or not, and checkpoints that load anywhere."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import cspnet_timm
from tests.samples import FAMILIES

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='torch was built without distributed')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('distributed')
    package = str(Path(cspnet_timm.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone',
         str(Path(__file__).with_name('distributed_worker.py')), str(folder), *FAMILIES],
        capture_output=True, text=True, timeout=1200,
        env={**os.environ, 'OMP_NUM_THREADS': '1',
             'PYTHONPATH': os.pathsep.join([package, os.environ.get('PYTHONPATH', '')])},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.mark.parametrize('name', FAMILIES)
def test_two_processes_compute_what_one_does(folder, name):
    for rank in range(2):
        result = torch.load(folder / f'results_{rank}.pt')[name]
        assert 'error' not in result, result['error']
        assert result['ddp'] < 1e-4 and result['fsdp'] < 1e-4, result
        assert result['extractor']
    assert torch.load(folder / 'results_0.pt')[name]['full']


@pytest.mark.parametrize('name', FAMILIES)
def test_a_checkpoint_written_in_shards_loads_unsharded(folder, name):
    dcp_to_torch_save(folder / name, folder / f'{name}.pt')
    model = timm.create_model(name, num_classes=5, checkpoint_path=str(folder / f'{name}.pt'))
    torch.manual_seed(0)
    expected = timm.create_model(name, num_classes=5).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('name', FAMILIES)
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
