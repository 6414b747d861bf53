"""What a network makes of a shape, without what changes none."""
from typing import Any, Callable, Dict, Optional, Tuple

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
        return func(*args, **(kwargs or {}))
