"""Parameters and operations of a network, counted on the meta device: a large model costs no more than a small one."""
from typing import Any, Tuple

import timm
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['count_macs', 'count_parameters', 'describe_size']


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
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    model.train(training)
    return counter.get_total_flops() // 2


def describe_size(name: str) -> Tuple[int, int, Tuple[int, int, int]]:
    """Size of a registered model at its default input.

    Args:
        name: The model, as ``timm.create_model`` takes it.

    Returns:
        Parameters, multiply-accumulates, and the input ``(C, H, W)`` that they are for.
    """
    model: Any = timm.create_model(name, device='meta')
    input_size = model.pretrained_cfg['input_size']
    return count_parameters(model), count_macs(model, input_size), input_size
