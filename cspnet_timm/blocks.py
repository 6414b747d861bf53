"""What runs on the part of a stage that is transformed: residual blocks, and the containers that chain them."""
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import DropPath

from .layers import ActLayer, ConvNormAct, NormLayer, zero_init

__all__ = ['Collect', 'DarkBlock']


class DarkBlock(nn.Module):
    """Darknet's residual block: two convolutions, and the input added to what they give.

    1×1 then 3×3 in Darknet, YOLOv5 and YOLOX, 3×3 twice in YOLOv8. Nothing follows the sum.

    Paper: `YOLOv3: An Incremental Improvement`, https://arxiv.org/abs/1804.02767

    Input and output ``(B, in_chs, H, W)`` and ``(B, out_chs, H, W)``.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            bottle_ratio: float = 1.,
            kernel_size: Tuple[int, int] = (1, 3),
            dilation: int = 1,
            groups: int = 1,
            shortcut: bool = True,
            act_layer: ActLayer = nn.SiLU,
            norm_layer: NormLayer = nn.BatchNorm2d,
            drop_path: float = 0.,
            drop_block: Optional[Callable[[], nn.Module]] = None,
            device: Optional[Union[torch.device, str]] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels, equal to ``in_chs`` if there is a shortcut.
            bottle_ratio: Channels between the two convolutions, as a fraction of ``out_chs``.
            kernel_size: Sides of the two kernels.
            dilation: Dilation of the kernels larger than 1×1.
            groups: Groups of the second convolution.
            shortcut: Add the input.
            act_layer: Activation of both convolutions.
            norm_layer: Normalisation of both convolutions.
            drop_path: Probability of leaving the convolutions out, per sample.
            drop_block: Creates the DropBlock behind the second convolution.
            device: Where to create the parameters.
            dtype: Type of the parameters.
        """
        super().__init__()
        layer_kwargs: Dict[str, Any] = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        mid_chs = round(out_chs * bottle_ratio)
        k1, k2 = kernel_size
        self.conv1 = ConvNormAct(in_chs, mid_chs, k1, dilation=dilation if k1 > 1 else 1, **layer_kwargs)
        self.conv2 = ConvNormAct(
            mid_chs, out_chs, k2, dilation=dilation if k2 > 1 else 1, groups=groups, drop_layer=drop_block,
            **layer_kwargs,
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.shortcut = shortcut and in_chs == out_chs

    def zero_init_last(self) -> None:
        """Start as the identity: set the last batch norm's gamma to zero."""
        zero_init(self.conv2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, in_chs, H, W)``."""
        y = self.drop_path(self.conv2(self.conv1(x)))
        return y + x if self.shortcut else y


class Collect(nn.Module):
    """Chain blocks and concatenate the input and every block's output, as C2f, ELAN and dense blocks of the field do.

    Input ``(B, C, H, W)``, output ``(B, out_chs, H, W)`` in the order [input, first block, second block, …].
    """

    def __init__(self, blocks: Sequence[nn.Module], out_chs: int) -> None:
        """
        Args:
            blocks: Each takes the output of the one before it.
            out_chs: Channels of the input and of all outputs together.
        """
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.out_chs = out_chs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, C, H, W)`` and keep every step."""
        outputs = [x]
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return torch.cat(outputs, dim=1)
