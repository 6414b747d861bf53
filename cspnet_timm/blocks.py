"""What runs on the part of a stage that is transformed: residual blocks, and the containers that chain them."""
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, use_fused_attn

from .layers import ActLayer, ConvNormAct, NormLayer, zero_init

__all__ = ['AttentionBlock', 'Collect', 'DarkBlock']


class DarkBlock(nn.Module):
    """Darknet's residual block: two convolutions, and the input added to what they give.

    1×1 then 3×3 in Darknet, YOLOv5 and YOLOX, 3×3 twice in YOLOv8. Nothing follows the sum. With other layers than
    plain convolutions in the two places it is the block of RTMDet (3×3, then a separable 5×5) and of PP-YOLOE (3×3,
    then a re-parameterisable one).

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
            conv_layers: Tuple[Callable[..., nn.Module], Callable[..., nn.Module]] = (ConvNormAct, ConvNormAct),
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
            conv_layers: What the two convolutions are, :class:`~cspnet_timm.layers.ConvNormAct` or its like.
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
        conv1, conv2 = conv_layers
        self.conv1 = conv1(in_chs, mid_chs, k1, dilation=dilation if k1 > 1 else 1, **layer_kwargs)
        if groups != 1:
            layer_kwargs.update(groups=groups)
        self.conv2 = conv2(
            mid_chs, out_chs, k2, dilation=dilation if k2 > 1 else 1, drop_layer=drop_block, **layer_kwargs)
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


class AttentionBlock(nn.Module):
    """Self-attention over the map's pixels and a two-layer perceptron, each added to its input, of convolutions alone.

    Heads of about 64 channels; queries and keys have half a head's channels. A depthwise 3×3 convolution of the values
    stands for a position embedding, so that any size of map can enter.

    Paper: `YOLOv10: Real-Time End-to-End Object Detection` (partial self-attention), https://arxiv.org/abs/2405.14458

    Input and output ``(B, chs, H, W)``.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
            self,
            chs: int,
            mlp_ratio: float = 2.,
            drop_path: float = 0.,
            act_layer: ActLayer = nn.SiLU,
            norm_layer: NormLayer = nn.BatchNorm2d,
            device: Optional[Union[torch.device, str]] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        """
        Args:
            chs: Channels, a multiple of the number of heads.
            mlp_ratio: Channels within the perceptron, as a multiple of ``chs``.
            drop_path: Probability of leaving out each of the two steps, per sample.
            act_layer: Activation within the perceptron; there is no other.
            norm_layer: Normalisation behind every convolution.
            device: Where to create the parameters.
            dtype: Type of the parameters.
        """
        super().__init__()
        kwargs: Dict[str, Any] = dict(norm_layer=norm_layer, device=device, dtype=dtype)
        self.num_heads = max(chs // 64, 1)
        self.head_dim = chs // self.num_heads
        self.key_dim = self.head_dim // 2
        self.scale = self.key_dim ** -0.5
        self.fused_attn = use_fused_attn()
        self.qkv = ConvNormAct(chs, chs + 2 * self.key_dim * self.num_heads, act_layer=None, **kwargs)
        self.pos = ConvNormAct(chs, chs, 3, groups=chs, act_layer=None, **kwargs)
        self.proj = ConvNormAct(chs, chs, act_layer=None, **kwargs)
        mid_chs = round(chs * mlp_ratio)
        self.mlp = nn.Sequential(
            ConvNormAct(chs, mid_chs, act_layer=act_layer, **kwargs),
            ConvNormAct(mid_chs, chs, act_layer=None, **kwargs),
        )
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def zero_init_last(self) -> None:
        """Start as the identity: set the last batch norm's gamma of both steps to zero."""
        zero_init(self.proj)
        zero_init(self.mlp[-1])

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(x).reshape(B, self.num_heads, 2 * self.key_dim + self.head_dim, H * W)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.head_dim], dim=2)
        if self.fused_attn:
            y = F.scaled_dot_product_attention(
                q.transpose(-2, -1), k.transpose(-2, -1), v.transpose(-2, -1)).transpose(-2, -1)
        else:
            y = v @ ((q.transpose(-2, -1) * self.scale) @ k).softmax(dim=-1).transpose(-2, -1)
        return self.proj(y.reshape(B, C, H, W) + self.pos(v.reshape(B, C, H, W)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, chs, H, W)``."""
        x = x + self.drop_path1(self._attend(x))
        return x + self.drop_path2(self.mlp(x))
