"""The few layers that timm lacks, or has in a form that its consumers cannot take apart."""
import functools
import inspect
from collections import OrderedDict
from typing import Any, Callable, Dict, Optional, Type, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import ClassifierHead, create_act_layer, get_act_layer, get_norm_layer
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = ['ActLayer', 'ChannelSlice', 'ConvHead', 'ConvNormAct', 'NormLayer', 'PartialShortcut', 'RepConv',
           'SamePad', 'SeparableConv', 'SpatialPyramidPool', 'bind_norm_layer', 'create_act', 'create_norm',
           'down_pool', 'fold_batch_norm', 'zero_init']

ActLayer = Union[str, Type[nn.Module], Callable[..., nn.Module], None]
NormLayer = Union[str, Type[nn.Module], Callable[..., nn.Module], None]

# Their gradient needs the output alone, so that the in-place form saves a map; for SiLU and its like it saves nothing.
_INPLACE_ACTS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)


def create_act(act_layer: ActLayer) -> nn.Module:
    """Create an activation, in place where that saves memory in training.

    Args:
        act_layer: A class, a partial of one, or one of timm's names (``'silu'``, ``'mish'``, ``'leaky_relu'``).

    Returns:
        The module.
    """
    layer = get_act_layer(act_layer)
    cls = layer.func if isinstance(layer, functools.partial) else layer
    inplace = True if isinstance(cls, type) and issubclass(cls, _INPLACE_ACTS) else None
    return create_act_layer(layer, inplace=inplace)


def _accepts(layer: Callable[..., Any], name: str) -> bool:
    function = layer.func if isinstance(layer, functools.partial) else layer
    # A class that takes any keyword hands it to its base, which may not: timm's GroupNorm takes no momentum.
    functions = [vars(c)['__init__'] for c in function.__mro__ if '__init__' in vars(c)] if isinstance(
        function, type) else [function]
    for function in functions:
        parameters = inspect.signature(function).parameters
        if name in parameters:
            return True
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return False
    return True


def create_norm(
        norm_layer: NormLayer,
        num_features: int,
        device: Optional[Union[torch.device, str]] = None,
        dtype: Optional[torch.dtype] = None,
) -> nn.Module:
    """Create a normalisation layer, also of classes that know nothing of ``device`` and ``dtype``.

    Args:
        norm_layer: A class (torchvision's and detectron2's ``FrozenBatchNorm2d`` included), a partial of one, or one
            of timm's names (``'batchnorm2d'``, ``'groupnorm'``, ``'frozenbatchnorm2d'``).
        num_features: Channels to normalise.
        device: Where to create it.
        dtype: Type of its parameters.

    Returns:
        The module.
    """
    layer = get_norm_layer(norm_layer)
    if _accepts(layer, 'device'):
        return layer(num_features, device=device, dtype=dtype)
    return layer(num_features).to(device=device, dtype=dtype)


def bind_norm_layer(
        norm_layer: NormLayer,
        defaults: Dict[str, float],
        overrides: Dict[str, Optional[float]],
) -> NormLayer:
    """Bind a network's epsilon and momentum to a normalisation layer.

    What the caller has bound already wins over the network's defaults; what the caller asks for by name wins over both.

    Args:
        norm_layer: A class, a partial of one, or one of timm's names.
        defaults: What the network's released weights were trained with, e.g. ``{'eps': 1e-3, 'momentum': 0.03}``.
        overrides: What the caller asks for; ``None`` where he does not.

    Returns:
        The layer with the arguments bound that it accepts.

    Raises:
        ValueError: If an override is asked for that the layer does not have.
    """
    layer = get_norm_layer(norm_layer)
    bound = dict(layer.keywords) if isinstance(layer, functools.partial) else {}
    wanted = {k: v for k, v in overrides.items() if v is not None}
    for name in wanted:
        if not _accepts(layer, name):
            raise ValueError(f'bn_{name}={wanted[name]} was given, but norm_layer {layer} has no argument {name!r}.')
    kwargs = {**{k: v for k, v in defaults.items() if _accepts(layer, k)}, **bound, **wanted}
    return functools.partial(layer, **kwargs) if kwargs else layer


class ConvNormAct(nn.Sequential):
    """Convolution, normalisation and activation, as plain modules in a row: ``conv``, ``bn``, ``act``.

    timm's layer of the same name holds normalisation and activation in one module. SyncBN conversion and every naive
    batch-norm folding replace that module and lose the activation without a word, hence this one. What is left out
    (``norm_layer=None``, ``act_layer=None``) is no child at all.

    Input ``(B, in_chs, H, W)``, output ``(B, out_chs, H', W')`` with ``H' = ceil(H / stride)`` at the default padding.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            kernel_size: int = 1,
            stride: int = 1,
            dilation: int = 1,
            groups: int = 1,
            padding: Optional[int] = None,
            act_layer: ActLayer = nn.SiLU,
            norm_layer: NormLayer = nn.BatchNorm2d,
            drop_layer: Optional[Callable[[], nn.Module]] = None,
            device: Optional[Union[torch.device, str]] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            kernel_size: Side of the kernel.
            stride: Stride of the convolution.
            dilation: Spacing of the kernel's points.
            groups: Groups of the convolution.
            padding: Zeros on each side, symmetric "same" padding if None.
            act_layer: Activation, none if None.
            norm_layer: Normalisation, none (and a bias in the convolution) if None.
            drop_layer: Creates what drops parts of the map between normalisation and activation (DropBlock).
            device: Where to create the parameters.
            dtype: Type of the parameters.
        """
        if padding is None:
            padding = dilation * (kernel_size - 1) // 2
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers['conv'] = nn.Conv2d(
            in_chs, out_chs, kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups,
            bias=norm_layer is None, device=device, dtype=dtype,
        )
        if norm_layer is not None:
            layers['bn'] = create_norm(norm_layer, out_chs, device=device, dtype=dtype)
        if drop_layer is not None:
            layers['drop'] = drop_layer()
        if act_layer is not None:
            layers['act'] = create_act(act_layer)
        super().__init__(layers)

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Fold the batch norm's running statistics into the convolution, whichever mode the module is in.

        timm's ``reparameterize_model`` calls this.

        Returns:
            An ``nn.Sequential`` without batch norm, or this module if its norm is none that can be folded.
        """
        bn = getattr(self, 'bn', None)
        if bn is None or getattr(bn, 'running_mean', None) is None:
            return self
        layers = OrderedDict(self.named_children())
        del layers['bn']
        layers['conv'] = fold_batch_norm(self.conv, bn)
        return nn.Sequential(layers).train(self.training)


def fold_batch_norm(conv: Any, bn: Any) -> nn.Conv2d:
    """Merge a convolution and the (frozen) batch norm behind it into one convolution.

    Args:
        conv: The convolution, an ``nn.Conv2d``.
        bn: A module with ``running_mean``, ``running_var``, ``weight``, ``bias`` and ``eps``.

    Returns:
        A new convolution with a bias that gives what both gave in eval mode. Its weight and its bias are trainable
        where something that they are made of is.
    """
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    fused = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride, padding=conv.padding,
        dilation=conv.dilation, groups=conv.groups, bias=True, device='meta',
    )
    fused.weight, fused.bias = weight, bias  # PyTorch has given both whatever the convolution's own had
    fused.weight.requires_grad_(_trainable(conv.weight, bn.weight))
    fused.bias.requires_grad_(_trainable(conv.bias, bn.bias))
    return fused.train(conv.training)


def _trainable(*tensors: Any) -> bool:
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def zero_init(layer: nn.Module) -> None:
    """Set the last gamma of a layer of this module to zero, so that a residual block starts as the identity.

    Args:
        layer: The layer; one without a norm, or with one that has no gamma, stays as it is.
    """
    for name in ('', 'pointwise', 'conv3x3', 'conv1x1'):  # of a separable and of a re-parameterisable convolution
        part = getattr(layer, name, None) if name else layer
        gamma: Any = getattr(getattr(part, 'bn', None), 'weight', None)
        if gamma is not None:
            nn.init.zeros_(gamma)


def down_pool(stride: int = 2, dilation: int = 1) -> nn.Module:
    """The 2×2 max pool that halves a map, in any level of a backbone: also where dilation replaces its stride.

    A pool of stride 1 reads what the one of stride 2 would have read, pixels ``dilation`` apart, at every position;
    what lies outside of the map is never the maximum. An odd map is halved upwards.

    Args:
        stride: 2, or 1 for a level whose stride is replaced by dilation.
        dilation: Distance of the pixels that are compared, for stride 1.

    Returns:
        A module from ``(B, C, H, W)`` to ``(B, C, ceil(H / stride), ceil(W / stride))``.
    """
    if stride > 1:
        return nn.MaxPool2d(2, stride, ceil_mode=True)
    return nn.Sequential(OrderedDict(
        pad=nn.ConstantPad2d((0, dilation, 0, dilation), float('-inf')),
        pool=nn.MaxPool2d(2, 1, dilation=dilation),
    ))


class SamePad(nn.Module):
    """The zeros that TensorFlow's ``padding='same'`` puts around a map before a 3×3 convolution of stride 2.

    On an even side there is none before the map and one behind it, on an odd side one on each. The convolution behind
    this one pads nothing itself. Behind an even side there are two here: the second is never read, and the size is one
    sum whatever the side, also for compilers that leave it open.

    Where dilation replaces the stride, the convolution reads at each position what the one of stride 2 would have read.
    timm's ``Conv2dSame`` pads as TensorFlow would pad a convolution of stride 1, which moves the map by a pixel.

    Input ``(B, C, H, W)``, output ``(B, C, H + 2 · dilation, W + 2 · dilation)``.
    """

    def __init__(self, dilation: int = 1) -> None:
        """
        Args:
            dilation: Distance of the points of the convolution's kernel.
        """
        super().__init__()
        self.dilation = dilation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pad the map."""
        both = 2 * self.dilation
        # Of a map whose strides were replaced, every dilation-th pixel is one of the original's.
        top = self.dilation * ((x.shape[2] + self.dilation - 1) // self.dilation % 2)
        left = self.dilation * ((x.shape[3] + self.dilation - 1) // self.dilation % 2)
        return F.pad(x, (left, both - left, top, both - top))

    def extra_repr(self) -> str:
        """Show the dilation in the printed model."""
        return f'dilation={self.dilation}'


class ChannelSlice(nn.Module):
    """A range of the channels: ``(B, C, H, W)`` to ``(B, stop - start, H, W)``."""

    def __init__(self, start: int, stop: int) -> None:
        """
        Args:
            start: First channel.
            stop: Channel behind the last one.
        """
        super().__init__()
        self.start = start
        self.stop = stop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take the channels."""
        return x[:, self.start:self.stop]

    def extra_repr(self) -> str:
        """Show the range in the printed model."""
        return f'{self.start}, {self.stop}'


class PartialShortcut(nn.Module):
    """Adds a block's input to its output, also where the two differ, without a parameter.

    An input of fewer channels is added to the first channels of the output, one of more gives its first; where the
    block strides, the input is sampled at every stride-th point. That is Darknet's shortcut.

    Paper: `Enriching Variety of Layer-wise Learning Information by Gradient Combination` (partial residual networks),
    ICCV Workshops 2019

    Output and input of the block ``(B, out_chs, H', W')`` and ``(B, in_chs, H, W)``, with ``H' = ceil(H / stride)``.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1) -> None:
        """
        Args:
            in_chs: Channels of the block's input.
            out_chs: Channels of its output.
            stride: Stride of the block.
        """
        super().__init__()
        self.missing_chs = out_chs - in_chs
        self.stride = stride

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add the block's input ``x`` to its output ``y``."""
        if self.stride > 1:
            x = x[:, :, ::self.stride, ::self.stride]
        if self.missing_chs != 0:
            x = F.pad(x, (0, 0, 0, 0, 0, self.missing_chs))
        return y + x

    def extra_repr(self) -> str:
        """Show what differs in the printed model."""
        return f'missing_chs={self.missing_chs}, stride={self.stride}'


class SeparableConv(nn.Sequential):
    """A depthwise k×k and a pointwise 1×1 convolution, each with its own normalisation and activation.

    Input ``(B, in_chs, H, W)``, output ``(B, out_chs, H', W')`` with ``H' = ceil(H / stride)``.

    Paper: `MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications`,
    https://arxiv.org/abs/1704.04861
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            kernel_size: int = 3,
            stride: int = 1,
            dilation: int = 1,
            drop_layer: Optional[Callable[[], nn.Module]] = None,
            **layer_kwargs: Any,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            kernel_size: Side of the depthwise kernel.
            stride: Stride of the depthwise convolution.
            dilation: Spacing of the depthwise kernel's points.
            drop_layer: Creates what drops parts of the map behind the last normalisation.
            **layer_kwargs: ``act_layer``, ``norm_layer``, ``device`` and ``dtype`` of both :class:`ConvNormAct`.
        """
        super().__init__(OrderedDict(
            depthwise=ConvNormAct(
                in_chs, in_chs, kernel_size, stride=stride, dilation=dilation, groups=in_chs, **layer_kwargs),
            pointwise=ConvNormAct(in_chs, out_chs, 1, drop_layer=drop_layer, **layer_kwargs),
        ))


class RepConv(nn.Module):
    """A 3×3 and a 1×1 convolution side by side in training, one 3×3 convolution after :meth:`fuse`.

    ``act(bn(conv3x3(x)) + alpha · bn(conv1x1(x)))``, without an identity branch.

    Papers: `RepVGG: Making VGG-style ConvNets Great Again`, https://arxiv.org/abs/2101.03697, and, for alpha, the
    PP-YOLOE+ release of `PP-YOLOE: An evolved version of YOLO`, https://arxiv.org/abs/2203.16250

    Input ``(B, in_chs, H, W)``, output ``(B, out_chs, H', W')`` with ``H' = ceil(H / stride)``.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            kernel_size: int = 3,
            stride: int = 1,
            dilation: int = 1,
            alpha: bool = False,
            act_layer: ActLayer = nn.SiLU,
            norm_layer: NormLayer = nn.BatchNorm2d,
            drop_layer: Optional[Callable[[], nn.Module]] = None,
            device: Optional[Union[torch.device, str]] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            kernel_size: 3.
            stride: Stride of both convolutions.
            dilation: Dilation of the 3×3 convolution.
            alpha: Learn the weight of the 1×1 branch.
            act_layer: Activation behind the sum, none if None.
            norm_layer: Normalisation of each branch.
            drop_layer: Creates what drops parts of the map between the sum and the activation.
            device: Where to create the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If the kernel is not 3×3.
        """
        super().__init__()
        if kernel_size != 3:
            raise ValueError(f'kernel_size={kernel_size} cannot be: the branches are 3×3 and 1×1.')
        kwargs: Dict[str, Any] = dict(
            stride=stride, act_layer=None, norm_layer=norm_layer, device=device, dtype=dtype)
        self.conv3x3 = ConvNormAct(in_chs, out_chs, 3, dilation=dilation, **kwargs)
        self.conv1x1 = ConvNormAct(in_chs, out_chs, 1, **kwargs)
        self.alpha = nn.Parameter(torch.ones(1, device=device, dtype=dtype)) if alpha else None
        self.drop = drop_layer() if drop_layer is not None else nn.Identity()
        self.act = create_act(act_layer) if act_layer is not None else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, in_chs, H, W)``."""
        y = self.conv1x1(x)
        if self.alpha is not None:
            y = y * self.alpha
        return self.act(self.drop(self.conv3x3(x) + y))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Fold both branches, their batch norms and alpha into one 3×3 convolution, whichever mode the module is in.

        timm's ``reparameterize_model`` calls this.

        Returns:
            An ``nn.Sequential`` of the convolution and the activation, or this module if its norms cannot be folded.
        """
        bn3x3, bn1x1 = getattr(self.conv3x3, 'bn', None), getattr(self.conv1x1, 'bn', None)
        if any(getattr(bn, 'running_mean', None) is None for bn in (bn3x3, bn1x1)):
            return self
        fused = fold_batch_norm(self.conv3x3.conv, bn3x3)
        point = fold_batch_norm(self.conv1x1.conv, bn1x1)
        with torch.no_grad():
            alpha: Any = 1. if self.alpha is None else self.alpha
            fused.weight += nn.functional.pad(point.weight * alpha, (1, 1, 1, 1))
            fused.bias += point.bias * alpha
        fused.weight.requires_grad_(_trainable(fused.weight, point.weight, alpha))
        fused.bias.requires_grad_(_trainable(fused.bias, point.bias, alpha))
        return nn.Sequential(OrderedDict(conv=fused, drop=self.drop, act=self.act)).train(self.training)


class SpatialPyramidPool(nn.Module):
    """Max pools of 5×5, 9×9 and 13×13 between two 1×1 convolutions, as the detectors end their backbones (SPP, SPPF).

    Inside of a neck's stage, where the channels have been reduced already, the first convolution is missing.

    Three 5×5 pools in a row give exactly the maxima of the three sizes, for less.

    Paper: `Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition`,
    https://arxiv.org/abs/1406.4729, in the form of `YOLOv3`'s successors.

    Input ``(B, in_chs, H, W)``, output ``(B, out_chs, H, W)``.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            shortcut: bool = False,
            reduce: bool = True,
            act_layer: ActLayer = nn.SiLU,
            entry_act_layer: ActLayer = None,
            **layer_kwargs: Any,
    ) -> None:
        """
        Args:
            in_chs: Input channels; half as many are pooled, unless nothing is reduced.
            out_chs: Output channels, equal to ``in_chs`` if there is a shortcut.
            shortcut: Add the input.
            reduce: Halve the channels before the pools.
            act_layer: Activation of the last convolution.
            entry_act_layer: Activation of the first one, none if None.
            **layer_kwargs: ``norm_layer``, ``device`` and ``dtype`` of both :class:`ConvNormAct`.
        """
        super().__init__()
        pooled_chs = in_chs // 2 if reduce else in_chs
        self.conv1 = ConvNormAct(
            in_chs, pooled_chs, act_layer=entry_act_layer, **layer_kwargs) if reduce else nn.Identity()
        # A module each: what follows a map through the modules (attribution, hooks) takes no module twice.
        self.pool5, self.pool9, self.pool13 = (nn.MaxPool2d(5, stride=1, padding=2) for _ in range(3))
        self.conv2 = ConvNormAct(pooled_chs * 4, out_chs, act_layer=act_layer, **layer_kwargs)
        self.shortcut = shortcut and in_chs == out_chs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, in_chs, H, W)``."""
        y = self.conv1(x)
        y5 = self.pool5(y)
        y9 = self.pool9(y5)
        y = self.conv2(torch.cat([y, y5, y9, self.pool13(y9)], dim=1))
        return y + x if self.shortcut else y


class ConvHead(ClassifierHead):
    """timm's classifier head behind a 1×1 convolution, as the classifying forms of the YOLO networks have it.

    Input ``(B, in_features, H, W)``, output ``(B, num_classes)``; the convolution stays if the classifier goes.
    """

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            pool_type: str = 'avg',
            drop_rate: float = 0.,
            hidden_size: int = 1280,
            act_layer: ActLayer = nn.SiLU,
            norm_layer: NormLayer = nn.BatchNorm2d,
            device: Optional[Union[torch.device, str]] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        """
        Args:
            in_features: Channels of the input.
            num_classes: Classes, 0 for the pooled features.
            pool_type: timm's pooling name, ``''`` for none.
            drop_rate: Dropout before the classifier.
            hidden_size: Channels behind the convolution.
            act_layer: Activation of the convolution.
            norm_layer: Normalisation of the convolution.
            device: Where to create the parameters.
            dtype: Type of the parameters.
        """
        super().__init__(hidden_size, num_classes, pool_type, drop_rate, device=device, dtype=dtype)
        self.conv = ConvNormAct(
            in_features, hidden_size, act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)

    def reset(
            self,
            num_classes: int,
            pool_type: Optional[str] = None,
            reset_other: bool = False,
            in_features: Optional[int] = None,
            device: Optional[Union[torch.device, str]] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        """Replace the classifier, and never the convolution.

        Args:
            num_classes: New number of classes, 0 for none.
            pool_type: New pooling; None keeps the one there is.
            reset_other: Without effect.
            in_features: Without effect, the convolution stays.
            device: Where to create the classifier, by default where the head is.
            dtype: Type of the classifier's parameters, by default the head's.
        """
        super().reset(num_classes, pool_type, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Classify ``(B, in_features, H, W)``."""
        x = self.drop(self.global_pool(self.conv(x)))
        return x if pre_logits else self.fc(x)
