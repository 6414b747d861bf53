"""What a network makes of a shape, without what changes none."""
from typing import Any, Callable, Dict, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

__all__ = ['ShapesAlone']

_SHAPE_KEEPING = frozenset((F.batch_norm, F.mish, F.silu, F.relu, F.leaky_relu, F.hardswish))


class ShapesAlone(TorchFunctionMode):
    """Leaves out what changes no shape: batch norm, activations, sums of equally large tensors.

    On the meta device PyTorch decomposes these in Python, which is nearly all the time that a network takes there. What
    comes out has the right shape and no meaning. Convolutions and products are all there to be counted.
    """

    def __init__(self, convolutions: bool = True) -> None:
        """
        Args:
            convolutions: Without them their shapes are calculated, in less than half of the time, and their weights may
                be on any device.
        """
        super().__init__()
        self.convolutions = convolutions

    def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Any,
            args: Tuple[Any, ...] = (),
            kwargs: Optional[Dict[str, Any]] = None,
    ) -> Any:
        if func in _SHAPE_KEEPING:
            return args[0]
        if func is torch.Tensor.add and isinstance(args[1], torch.Tensor) and args[0].shape == args[1].shape:
            return args[0]
        if func is F.conv2d and not self.convolutions:
            return _convolved(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _convolved(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        stride: Union[int, Tuple[int, ...]] = 1,
        padding: Union[int, str, Tuple[int, ...]] = 0,
        dilation: Union[int, Tuple[int, ...]] = 1,
        groups: int = 1,
) -> torch.Tensor:
    """What ``F.conv2d`` makes of a shape; where it makes nothing, it says itself why."""
    if not isinstance(padding, str) and input.dim() == 4 and input.shape[1] == groups * weight.shape[1]:
        numbers = [(n, n) if isinstance(n, int) else 2 * tuple(n) if len(n) == 1 else n
                   for n in (stride, padding, dilation)]
        sides = [(side + 2 * p - d * (k - 1) - 1) // s + 1
                 for side, k, s, p, d in zip(input.shape[2:], weight.shape[2:], *numbers)]
        if min(sides) > 0:
            return input.new_empty(input.shape[0], weight.shape[0], *sides)
    weight, bias = weight.to(input.device), None if bias is None else bias.to(input.device)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
