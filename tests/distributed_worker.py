"""What one of two processes does for test_distributed.py: ``torchrun … distributed_worker.py folder name …``."""
import sys
import traceback
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

CLASSES = 5


def create(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, **kwargs).train()
    # Batch statistics are of each process, the mean of the gradients is otherwise that of one process.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 64, 64, generator=generator), torch.arange(4) % CLASSES


def loss_of(model, images, labels):
    return torch.nn.functional.cross_entropy(model(images), labels)


def gradients(model):
    return {
        name.removeprefix('module.'): getattr(p.grad, 'full_tensor', lambda p=p: p.grad)().clone()
        for name, p in model.named_parameters()
    }


def worst(found, expected):
    """Largest relative distance of any gradient."""
    assert found.keys() == expected.keys()
    scale = max(e.norm() for e in expected.values())
    return max(((found[k] - e).norm() / (e.norm() + 1e-4 * scale)).item() for k, e in expected.items())


def check(name, folder, rank):
    images, labels = batch()
    mine = slice(rank, None, 2)
    single = create(name)
    loss_of(single, images, labels).backward()
    expected = gradients(single)
    result = {}

    parallel = DistributedDataParallel(create(name))
    for _ in range(2):  # with a parameter left over, the second forward is an error
        parallel.zero_grad()
        loss_of(parallel, images[mine], labels[mine]).backward()
    result['ddp'] = worst(gradients(parallel), expected)

    extractor = DistributedDataParallel(timm.create_model(name, features_only=True))
    for _ in range(2):
        sum(m.square().mean() for m in extractor(images[mine])).backward()
    result['extractor'] = all(p.grad is not None for p in extractor.parameters())

    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    sharded = create(name)
    for level in sharded.levels():
        fully_shard(level, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    loss_of(sharded, images[mine], labels[mine]).backward()
    result['fsdp'] = worst(gradients(sharded), expected)
    dcp.save(sharded.state_dict(), checkpoint_id=folder / name)
    full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        plain = create(name)
        plain.load_state_dict(full)
        result['full'] = all(torch.equal(a, b) for a, b in zip(
            plain.state_dict().values(), single.state_dict().values()))
    return result


def main():
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group('gloo')
    rank = dist.get_rank()
    results = {}
    for name in names:
        try:
            results[name] = check(name, folder, rank)
        except Exception:
            results[name] = {'error': traceback.format_exc()}
    torch.save(results, folder / f'results_{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
