"""What runs on the part of a stage that is transformed: residual blocks, and the containers that chain them."""
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, use_fused_attn

from .layers import ActLayer, ConvNormAct, NormLayer, PartialShortcut, create_act, zero_init

__all__ = ['AttentionBlock', 'BasicBlock', 'BottleneckBlock', 'ConcatOutputs', 'DarkBlock', 'DenseBlock', 'DenseLayer',
           'ElasticBlock', 'InvertedResidual']


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


class ConcatOutputs(nn.Module):
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


class BottleneckBlock(nn.Module):
    """ResNet's and ResNeXt's residual block: 1×1, 3×3, linear 1×1, the input added, an activation.

    There is no projection: where input and output differ, :class:`~cspnet_timm.layers.PartialShortcut` adds them.

    Papers: `Deep Residual Learning for Image Recognition`, https://arxiv.org/abs/1512.03385; `Aggregated Residual
    Transformations for Deep Neural Networks`, https://arxiv.org/abs/1611.05431

    Input ``(B, in_chs, H, W)``, output ``(B, out_chs, H', W')`` with ``H' = ceil(H / stride)``.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            bottle_ratio: float = 0.5,
            stride: int = 1,
            dilation: int = 1,
            groups: int = 1,
            shortcut: bool = True,
            act_layer: ActLayer = nn.ReLU,
            norm_layer: NormLayer = nn.BatchNorm2d,
            drop_path: float = 0.,
            drop_block: Optional[Callable[[], nn.Module]] = None,
            device: Optional[Union[torch.device, str]] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            bottle_ratio: Channels of the 3×3 convolution, as a fraction of ``out_chs``.
            stride: Stride of the 3×3 convolution.
            dilation: Its dilation.
            groups: Its groups.
            shortcut: Add the input and activate the sum; without, the block ends linear.
            act_layer: Activation of the first two convolutions and of the sum.
            norm_layer: Normalisation of the convolutions.
            drop_path: Probability of leaving the convolutions out, per sample.
            drop_block: Creates the DropBlock behind the 3×3 convolution.
            device: Where to create the parameters.
            dtype: Type of the parameters.
        """
        super().__init__()
        layer_kwargs: Dict[str, Any] = dict(norm_layer=norm_layer, device=device, dtype=dtype)
        mid_chs = round(out_chs * bottle_ratio)
        self.conv1 = ConvNormAct(in_chs, mid_chs, act_layer=act_layer, **layer_kwargs)
        self.conv2 = ConvNormAct(
            mid_chs, mid_chs, 3, stride=stride, dilation=dilation, groups=groups, act_layer=act_layer,
            drop_layer=drop_block, **layer_kwargs,
        )
        self.conv3 = ConvNormAct(mid_chs, out_chs, act_layer=None, **layer_kwargs)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.shortcut = PartialShortcut(in_chs, out_chs, stride) if shortcut else None
        self.act = create_act(act_layer) if shortcut else nn.Identity()

    def zero_init_last(self) -> None:
        """Start with the shortcut alone: set the last batch norm's gamma to zero."""
        zero_init(self.conv3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, in_chs, H, W)``."""
        y = self.drop_path(self.conv3(self.conv2(self.conv1(x))))
        if self.shortcut is not None:
            y = self.shortcut(y, x)
        return self.act(y)


class BasicBlock(nn.Module):
    """ResNet's residual block of two 3×3 convolutions: the second is linear, the input is added, an activation follows.

    With a re-parameterisable second convolution it is the block of DAMO-YOLO.

    Paper: `Deep Residual Learning for Image Recognition`, https://arxiv.org/abs/1512.03385

    Input ``(B, in_chs, H, W)``, output ``(B, out_chs, H, W)``.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            mid_chs: Optional[int] = None,
            dilation: int = 1,
            conv_layers: Tuple[Callable[..., nn.Module], Callable[..., nn.Module]] = (ConvNormAct, ConvNormAct),
            act_layer: ActLayer = nn.ReLU,
            norm_layer: NormLayer = nn.BatchNorm2d,
            drop_path: float = 0.,
            drop_block: Optional[Callable[[], nn.Module]] = None,
            device: Optional[Union[torch.device, str]] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            mid_chs: Channels between the two convolutions, by default ``out_chs``.
            dilation: Dilation of both.
            conv_layers: What the two are, :class:`~cspnet_timm.layers.ConvNormAct` or its like.
            act_layer: Activation of the first convolution and of the sum.
            norm_layer: Normalisation of both.
            drop_path: Probability of leaving the convolutions out, per sample.
            drop_block: Creates the DropBlock behind the second convolution.
            device: Where to create the parameters.
            dtype: Type of the parameters.
        """
        super().__init__()
        kwargs: Dict[str, Any] = dict(dilation=dilation, norm_layer=norm_layer, device=device, dtype=dtype)
        mid_chs = mid_chs or out_chs
        conv1, conv2 = conv_layers
        self.conv1 = conv1(in_chs, mid_chs, 3, act_layer=act_layer, **kwargs)
        self.conv2 = conv2(mid_chs, out_chs, 3, act_layer=None, drop_layer=drop_block, **kwargs)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.shortcut = PartialShortcut(in_chs, out_chs)
        self.act = create_act(act_layer)

    def zero_init_last(self) -> None:
        """Start with the shortcut alone: set the last batch norms' gammas to zero."""
        zero_init(self.conv2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, in_chs, H, W)``."""
        return self.act(self.shortcut(self.drop_path(self.conv2(self.conv1(x))), x))


class ElasticBlock(nn.Module):
    """A residual block that works on half of its channels at half the resolution.

    The other half of the channels keeps the resolution; the same convolutions run on both.

    Paper: `ELASTIC: Improving CNNs with Dynamic Scaling Policies`, https://arxiv.org/abs/1812.05262

    Input and output ``(B, chs, H, W)``, of any size: an odd map is halved upwards and cut when it is enlarged again.
    """

    def __init__(
            self,
            chs: int,
            block: Callable[[int], nn.Module],
            act_layer: ActLayer = None,
            drop_path: float = 0.,
    ) -> None:
        """
        Args:
            chs: Channels.
            block: Called with half the channels, returns the convolutions of one half, without shortcut.
            act_layer: Activation of the sum, none if None.
            drop_path: Probability of leaving the convolutions out, per sample.
        """
        super().__init__()
        self.full_chs = chs // 2
        self.full = block(self.full_chs)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.low = block(chs - self.full_chs)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.act = create_act(act_layer) if act_layer is not None else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, chs, H, W)``."""
        full = self.full(x[:, :self.full_chs])
        low = self.low(self.pool(x[:, self.full_chs:]))
        low = F.interpolate(low, size=full.shape[2:], mode='nearest')
        return self.act(self.drop_path(torch.cat([full, low], dim=1)) + x)


class InvertedResidual(nn.Module):
    """MobileNetV2's residual block: 1×1 up, depthwise 3×3, linear 1×1 down.

    The input is added where its shape is the output's; nothing follows the sum. The depthwise convolution may give
    several channels for each of its input, as in CSPMobileNetV2.

    Paper: `MobileNetV2: Inverted Residuals and Linear Bottlenecks`, https://arxiv.org/abs/1801.04381

    Input ``(B, in_chs, H, W)``, output ``(B, out_chs, H', W')`` with ``H' = ceil(H / stride)``.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            mid_chs: Optional[int] = None,
            depth_multiplier: int = 1,
            stride: int = 1,
            dilation: int = 1,
            act_layer: ActLayer = nn.ReLU,
            norm_layer: NormLayer = nn.BatchNorm2d,
            drop_path: float = 0.,
            drop_block: Optional[Callable[[], nn.Module]] = None,
            device: Optional[Union[torch.device, str]] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            mid_chs: Channels that the first convolution gives; there is none if None.
            depth_multiplier: Channels that the depthwise convolution gives for each of its input.
            stride: Stride of the depthwise convolution.
            dilation: Its dilation.
            act_layer: Activation of the first two convolutions.
            norm_layer: Normalisation of the convolutions.
            drop_path: Probability of leaving the convolutions out, per sample.
            drop_block: Creates the DropBlock behind the depthwise convolution.
            device: Where to create the parameters.
            dtype: Type of the parameters.
        """
        super().__init__()
        layer_kwargs: Dict[str, Any] = dict(norm_layer=norm_layer, device=device, dtype=dtype)
        self.shortcut = in_chs == out_chs and stride == 1
        self.conv1 = nn.Identity() if mid_chs is None else ConvNormAct(
            in_chs, mid_chs, act_layer=act_layer, **layer_kwargs)
        mid_chs = mid_chs or in_chs
        depth_chs = mid_chs * depth_multiplier
        self.conv2 = ConvNormAct(
            mid_chs, depth_chs, 3, stride=stride, dilation=dilation, groups=mid_chs, act_layer=act_layer,
            drop_layer=drop_block, **layer_kwargs,
        )
        self.conv3 = ConvNormAct(depth_chs, out_chs, act_layer=None, **layer_kwargs)
        self.drop_path = DropPath(drop_path) if drop_path and self.shortcut else nn.Identity()

    def zero_init_last(self) -> None:
        """Start as the identity, where there is a shortcut: set the last batch norm's gamma to zero."""
        if self.shortcut:
            zero_init(self.conv3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, in_chs, H, W)``."""
        y = self.drop_path(self.conv3(self.conv2(self.conv1(x))))
        return y + x if self.shortcut else y


class DenseLayer(nn.Module):
    """DenseNet's layer, convolution first: 1×1, 3×3, and the input beside what they give.

    Paper: `Densely Connected Convolutional Networks`, https://arxiv.org/abs/1608.06993

    Input ``(B, in_chs, H, W)``, output ``(B, in_chs + growth, H, W)`` in the order [input, new channels].
    """

    def __init__(
            self,
            in_chs: int,
            growth: int,
            mid_chs: int,
            dilation: int = 1,
            act_layer: ActLayer = nn.ReLU,
            norm_layer: NormLayer = nn.BatchNorm2d,
            drop_path: float = 0.,
            drop_block: Optional[Callable[[], nn.Module]] = None,
            device: Optional[Union[torch.device, str]] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            growth: New channels.
            mid_chs: Channels between the two convolutions.
            dilation: Dilation of the 3×3 convolution.
            act_layer: Activation of both convolutions.
            norm_layer: Normalisation of both convolutions.
            drop_path: Probability of leaving the new channels zero, per sample.
            drop_block: Creates the DropBlock behind the 3×3 convolution.
            device: Where to create the parameters.
            dtype: Type of the parameters.
        """
        super().__init__()
        layer_kwargs: Dict[str, Any] = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        self.conv1 = ConvNormAct(in_chs, mid_chs, **layer_kwargs)
        self.conv2 = ConvNormAct(mid_chs, growth, 3, dilation=dilation, drop_layer=drop_block, **layer_kwargs)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Widen ``(B, in_chs, H, W)``."""
        return torch.cat([x, self.drop_path(self.conv2(self.conv1(x)))], dim=1)


class DenseBlock(nn.Sequential):
    """Layers in a row, each of which hands on its input beside what it adds.

    Input ``(B, C, H, W)``, output ``(B, out_chs, H, W)``.
    """

    def __init__(self, layers: Sequence[nn.Module], out_chs: int) -> None:
        """
        Args:
            layers: Such as :class:`DenseLayer`.
            out_chs: Channels of the input and of all that the layers add.
        """
        super().__init__(*layers)
        self.out_chs = out_chs


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
        self.split_sizes = [2 * self.key_dim, self.head_dim] * self.num_heads  # queries and keys, values; per head
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
        qkv = self.qkv(x)
        # Parts of the channels, put together again, are in the memory format of x; a reshaped v is not.
        parts = qkv.split(self.split_sizes, dim=1)
        values = torch.cat([parts[2 * head + 1] for head in range(self.num_heads)], dim=1)
        qkv = qkv.reshape(B, self.num_heads, 2 * self.key_dim + self.head_dim, H * W)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.head_dim], dim=2)
        if self.fused_attn:
            y = F.scaled_dot_product_attention(
                q.transpose(-2, -1), k.transpose(-2, -1), v.transpose(-2, -1)).transpose(-2, -1)
        else:
            y = v @ ((q.transpose(-2, -1) * self.scale) @ k).softmax(dim=-1).transpose(-2, -1)
        return self.proj(self.pos(values) + y.reshape(B, C, H, W))  # a sum has the format of its first term

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, chs, H, W)``."""
        x = x + self.drop_path1(self._attend(x))
        return x + self.drop_path2(self.mlp(x))
