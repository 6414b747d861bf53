"""Static int8: what a network's convolutions read is rounded to eight bits, with scales taken from given images.

The rounding is written into the network as fake quantisation, which an inference engine turns into integer arithmetic.
Weights are symmetric with a scale per output channel, maps have one scale; a map without negative values uses all 256
steps for the positive ones. Biases, sums, activations and what is no convolution stay as they were.
"""
import copy
from typing import Any, Dict, Iterable, List, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['check_batches', 'quantize']

SAMPLES = 1 << 14  # values kept of each map of each calibration batch
CLIPS = [1. - 0.02 * i for i in range(36)]  # of the largest value, down to 0.3


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


class _Observer:
    """Keeps a sample of the values that enter a layer."""

    def __init__(self) -> None:
        self.samples: List[torch.Tensor] = []
        self.largest = 0.
        self.signed = False

    def __call__(self, layer: nn.Module, inputs: Tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach()
        self.signed |= bool((x < 0).any())
        x = x.abs().flatten().float()
        self.largest = max(self.largest, float(x.max()))
        self.samples.append(x[torch.randint(x.numel(), (min(SAMPLES, x.numel()),))])

    def scale(self) -> float:
        """The step with the least squared error over the sample, which may clip a few values."""
        if not self.largest > 0:
            return 1.
        steps = 127 if self.signed else 255
        x = torch.cat(self.samples)
        best: Tuple[float, float] = (float('inf'), 1.)
        for clip in CLIPS:
            scale = self.largest * clip / steps
            error = float((x.div(scale).round().clamp(max=steps).mul(scale) - x).square().mean())
            best = min(best, (error, scale))
        return best[1]


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
    observers: Dict[str, _Observer] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            observers[name] = _Observer()
            hooks.append(module.register_forward_pre_hook(observers[name]))
    if not observers:
        raise ValueError('The model has no convolution and no linear layer: there is nothing to compute in int8.')
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for batch in calibration:
            model(batch)
    for hook in hooks:
        hook.remove()
    for name, observer in observers.items():
        parent, _, child = name.rpartition('.')
        layer = model.get_submodule(name)
        if observer.samples:
            setattr(model.get_submodule(parent), child, QuantizedLayer(layer, observer.scale(), observer.signed).eval())
    return model
