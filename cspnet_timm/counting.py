"""Parameters and operations of a network, counted on the meta device: a large model costs no more than a small one."""
from typing import Any, Dict, Tuple

import timm
import torch
import torch.nn as nn
from timm.models import model_entrypoint
from torch.utils.flop_counter import FlopCounterMode

from .shapes import ShapesAlone
from .sizes import ModelSize, activations_of, fingerprint

__all__ = ['count_macs', 'count_parameters', 'list_activations', 'measure']


def count_parameters(model: nn.Module) -> int:
    """Number of learnable values, as PyTorch counts them: running statistics of batch norms are none.

    Args:
        model: The network.

    Returns:
        The number.
    """
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, input_size: Tuple[int, int, int]) -> int:
    """Multiply-accumulates of the convolutions and matrix products for one image.

    Args:
        model: The network, on any device, the meta device included.
        input_size: ``(C, H, W)`` of the image.

    Returns:
        The number, half of what PyTorch's ``FlopCounterMode`` counts.
    """
    parameter = next(model.parameters())
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad(), ShapesAlone(), FlopCounterMode(display=False) as counter:
            model.eval()(torch.empty(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for module in training:  # each by itself: parts of the model may be frozen in eval mode
            module.training = True
    return counter.get_total_flops() // 2


def list_activations(model: nn.Module) -> Dict[str, str]:
    """Say what the layers of a network end in.

    Args:
        model: The network.

    Returns:
        Class name of the activation behind each batch norm, by the batch norm's name.
    """
    return {
        name: type(getattr(model.get_submodule(name.rpartition('.')[0]), 'act', nn.Identity())).__name__
        for name, module in model.named_modules() if hasattr(module, 'running_var') and '.' in name
    }


def measure(name: str) -> ModelSize:
    """Count everything that the table of sizes says of a registered model.

    Args:
        name: The model, as ``timm.create_model`` takes it.

    Returns:
        Its row.
    """
    model: Any = timm.create_model(name, device='meta')
    input_size = model.pretrained_cfg['input_size']
    parameters, macs, activations = count_parameters(model), count_macs(model, input_size), list_activations(model)
    if not name.endswith('_cls') and hasattr(model, 'reset_classifier'):
        model.reset_classifier(0)
    return ModelSize(
        model=name,
        module=model_entrypoint(name).__module__.rpartition('.')[2],
        parameters=parameters,
        macs=macs,
        side=input_size[-1],
        channels=tuple(info['num_chs'] for info in model.feature_info),
        reductions=tuple(info['reduction'] for info in model.feature_info),
        backbone_parameters=count_parameters(model),
        macs_224=count_macs(model, (3, 224, 224)),
        macs_640=count_macs(model, (3, 640, 640)),
        fingerprint=fingerprint(model.state_dict()),
        activations=activations_of(activations),
    )
