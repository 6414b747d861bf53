"""Static int8: what a network's convolutions read is rounded to eight bits, with scales taken from given images.

The rounding is written into the network as fake quantisation, which an inference engine turns into integer arithmetic.
Weights are symmetric with a scale per output channel, maps have one scale; a map without negative values uses all 256
steps for the positive ones. Biases, sums, activations and what is no convolution stay as they were.
"""
import copy
from typing import Any, Dict, Iterable, List, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from .native.ranges import Observer

__all__ = ['check_batches', 'quantize']


class QuantizedLayer(nn.Module):
    """A convolution or a linear layer whose input and weights are rounded to eight bits."""

    def __init__(self, layer: nn.Module, scale: float, signed: bool) -> None:
        """
        Args:
            layer: ``nn.Conv2d`` or ``nn.Linear``.
            scale: What one step of the input stands for.
            signed: The input has negative values.
        """
        super().__init__()
        self.layer = layer
        self.scale = scale
        self.range = (-128, 127) if signed else (0, 255)
        weight = layer.weight.detach()  # type: ignore[operator]
        largest = weight.flatten(1).abs().amax(dim=1)
        self.register_buffer('weight_scale', torch.where(largest > 0, largest / 127, torch.ones_like(largest)))
        self.register_buffer('weight_zero', torch.zeros(len(weight), dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Round and compute."""
        layer: Any = self.layer
        scale: Any = self.weight_scale
        zero: Any = self.weight_zero
        x = torch.fake_quantize_per_tensor_affine(x, self.scale, 0, *self.range)
        weight = torch.fake_quantize_per_channel_affine(layer.weight, scale, zero, 0, -127, 127)
        if isinstance(layer, nn.Conv2d):
            return layer._conv_forward(x, weight, layer.bias)
        return F.linear(x, weight, layer.bias)


def check_batches(calibration: Iterable[torch.Tensor]) -> List[torch.Tensor]:
    """Take the batches that scales shall come from.

    Args:
        calibration: Batches ``(B, C, H, W)``.

    Returns:
        All of them.

    Raises:
        ValueError: If there is no batch, or one is no float tensor of four dimensions.
    """
    batches = list(calibration)
    if not batches:
        raise ValueError('calibration is empty: int8 takes the scales of its maps from a few batches of images.')
    for batch in batches:
        if not isinstance(batch, torch.Tensor) or batch.ndim != 4 or not batch.is_floating_point() or not len(batch):
            shape = tuple(batch.shape) if isinstance(batch, torch.Tensor) else type(batch).__name__
            raise ValueError(f'calibration must give float tensors (B, C, H, W), not {shape}.')
        if not bool(batch.isfinite().all()):
            raise ValueError('calibration has images with NaN or infinity: no range of numbers covers those.')
    return batches


def quantize(model: nn.Module, calibration: Sequence[torch.Tensor]) -> nn.Module:
    """Round what every convolution and linear layer reads, and its weights, to eight bits.

    Args:
        model: A network in eval mode, its batch norms folded.
        calibration: Batches ``(B, C, H, W)`` of what it will be given, normalised as it will be.

    Returns:
        A copy with fake quantisation.

    Raises:
        ValueError: If the network has no such layer.
    """
    model = copy.deepcopy(model)
    observers: Dict[str, Observer] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            observer = observers[name] = Observer()
            hooks.append(module.register_forward_pre_hook(lambda _, inputs, observer=observer: observer.see(inputs[0])))
    if not observers:
        raise ValueError('The model has no convolution and no linear layer: there is nothing to compute in int8.')
    with torch.no_grad():
        for batch in calibration:
            model(batch)
    for hook in hooks:
        hook.remove()
    for name, observer in observers.items():
        parent, _, child = name.rpartition('.')
        layer = model.get_submodule(name)
        if observer.samples:
            low, high = observer.range(symmetric=True)
            scale = (high - low) / 255 if high > low else 1.
            setattr(model.get_submodule(parent), child, QuantizedLayer(layer, scale, low < 0).eval())
    return model
