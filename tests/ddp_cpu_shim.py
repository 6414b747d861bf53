"""For timm's train.py under torchrun on CPUs: ``--device-modules ddp_cpu_shim``.

The script gives ``DistributedDataParallel`` the ids of its devices, which that refuses for modules on the CPU, whatever
the model. This drops them there.
"""
import torch.nn.parallel

_DistributedDataParallel = torch.nn.parallel.DistributedDataParallel


class DistributedDataParallel(_DistributedDataParallel):
    def __init__(self, module, device_ids=None, **kwargs):
        on_cpu = all(p.device.type == 'cpu' for p in module.parameters())
        super().__init__(module, device_ids=None if on_cpu else device_ids, **kwargs)


torch.nn.parallel.DistributedDataParallel = DistributedDataParallel
