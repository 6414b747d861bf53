"""The same network in other forms, of which the hardware likes one better than another.

Each function takes a network whose batch norms are folded and returns a copy that computes the same up to rounding, or
None if there is nothing to change. Which form is the faster one differs from machine to machine, and is measured.
"""
import copy
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..cross_stage import ComposedStage

__all__ = ['FORMS', 'join_partitions', 'regroup', 'split_merges']

GROUP_WIDTH = 32  # channels that a matrix unit takes at a time in bfloat16


def regroup(model: nn.Module, width: int = GROUP_WIDTH) -> Optional[nn.Module]:
    """Make one group of several narrow ones, with zeros where they do not meet.

    ResNeXt's groups of four channels leave most of a matrix unit idle. The wider groups take more operations and less
    time.

    Args:
        model: The network.
        width: Channels of the new groups.

    Returns:
        The network with wider groups, or None if it has no narrow ones. Depthwise convolutions stay as they are.
    """

    def change(conv: nn.Module) -> Optional[nn.Module]:
        if not isinstance(conv, nn.Conv2d) or conv.groups == 1:
            return None
        in_chs, out_chs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
        together = max(width // max(in_chs, out_chs), 1)
        while conv.groups % together:
            together -= 1
        if in_chs == 1 or together == 1:
            return None
        wide = _empty_conv(conv, conv.in_channels, conv.out_channels, conv.groups // together)
        weight = conv.weight.new_zeros(wide.out_channels, wide.in_channels // wide.groups, *conv.kernel_size)
        for i in range(together):
            rows = weight.view(wide.groups, together, out_chs, -1, *conv.kernel_size)[:, i]
            rows[:, :, i * in_chs:(i + 1) * in_chs] = conv.weight.view(
                wide.groups, together, out_chs, in_chs, *conv.kernel_size)[:, i]
        return _with_weights(wide, weight, conv.bias)

    return _changed(model, change)


def join_partitions(model: nn.Module) -> Optional[nn.Module]:
    """Compute both branches' 1×1 convolutions of a cross stage as one, which reads the stage's input once.

    Args:
        model: The network.

    Returns:
        The network with joint partitions, or None if no stage has two convolutions with the same activation.
    """

    def change(stage: nn.Module) -> Optional[nn.Module]:
        if not isinstance(stage, ComposedStage):
            return None
        entry, bypass = _pointwise(stage.entry), _pointwise(stage.bypass)
        if entry is None or bypass is None or repr(entry[1]) != repr(bypass[1]):
            return None
        stage.entry = JointPartition((entry[0], bypass[0]), entry[1])
        stage.bypass = nn.Identity()
        return JointStage(stage)

    return _changed(model, change)


def split_merges(model: nn.Module) -> Optional[nn.Module]:
    """Merge by the sum of two 1×1 convolutions, one of each branch, and so without the concatenation.

    Args:
        model: The network.

    Returns:
        The network with split merges, or None if no stage merges by a convolution.
    """

    def change(stage: nn.Module) -> Optional[nn.Module]:
        if not isinstance(stage, ComposedStage):
            return None
        merge, bypass = _pointwise(stage.merge), _pointwise(stage.bypass)
        if merge is None or bypass is None:
            return None
        stage.merge = SumMerge(merge[0], merge[1], merge[0].in_channels - bypass[0].out_channels)
        return SplitStage(stage)

    return _changed(model, change)


FORMS: Dict[str, Callable[[nn.Module], Optional[nn.Module]]] = {
    'regroup': regroup, 'join_partitions': join_partitions, 'split_merges': split_merges}


class JointPartition(nn.Module):
    """Two 1×1 convolutions of one map as one: ``(B, C, H, W)`` to both results."""

    def __init__(self, convs: Sequence[nn.Conv2d], act: nn.Module) -> None:
        """
        Args:
            convs: The convolutions.
            act: What follows each.
        """
        super().__init__()
        self.chs = [conv.out_channels for conv in convs]
        joint = _empty_conv(convs[0], convs[0].in_channels, sum(self.chs), 1)
        self.conv = _with_weights(
            joint, torch.cat([conv.weight for conv in convs]), torch.cat([_bias(conv) for conv in convs]))
        self.act = act

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Convolve and split."""
        entry, bypass = self.act(self.conv(x)).split(self.chs, dim=1)
        return entry, bypass


class JointStage(nn.Module):
    """A cross stage behind a :class:`JointPartition`."""

    def __init__(self, stage: ComposedStage) -> None:
        """
        Args:
            stage: Its ``entry`` is the joint partition.
        """
        super().__init__()
        self.partition = stage.entry
        self.blocks = stage.blocks
        self.transition = stage.transition
        self.merge = stage.merge

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Partition, transform, merge."""
        entry, bypass = self.partition(x)
        return self.merge(torch.cat([self.transition(self.blocks(entry)), bypass], dim=1))


class SumMerge(nn.Module):
    """``conv(cat([y, x]))`` as ``conv_y(y) + conv_x(x)``."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module, blocks_chs: int) -> None:
        """
        Args:
            conv: The merge's 1×1 convolution.
            act: What follows it.
            blocks_chs: Channels that come from the blocks; the others bypass them.
        """
        super().__init__()
        y, x = conv.weight.split([blocks_chs, conv.in_channels - blocks_chs], dim=1)
        self.conv_y = _with_weights(_empty_conv(conv, y.shape[1], conv.out_channels, 1), y.contiguous(), conv.bias)
        self.conv_x = _with_weights(_empty_conv(conv, x.shape[1], conv.out_channels, 1), x.contiguous(), None)
        self.act = act

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Merge what comes from the blocks, ``y``, with what bypassed them, ``x``."""
        return self.act(self.conv_y(y) + self.conv_x(x))


class SplitStage(nn.Module):
    """A cross stage that ends in a :class:`SumMerge`."""

    def __init__(self, stage: ComposedStage) -> None:
        """
        Args:
            stage: Its ``merge`` is the sum.
        """
        super().__init__()
        self.entry = stage.entry
        self.bypass = stage.bypass
        self.blocks = stage.blocks
        self.transition = stage.transition
        self.merge = stage.merge

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Partition, transform, merge."""
        return self.merge(self.transition(self.blocks(self.entry(x))), self.bypass(x))


def _changed(
        model: nn.Module,
        change: Callable[[nn.Module], Optional[nn.Module]],
) -> Optional[nn.Module]:
    """A copy in which every module is replaced for which ``change`` gives another, or None if it gives none."""
    model = copy.deepcopy(model)
    changed = False
    with torch.no_grad():
        for parent in reversed(list(model.modules())):  # what stands within a stage before the stage itself
            for name, child in list(parent.named_children()):
                new = change(child)
                if new is not None:
                    setattr(parent, name, new.eval())
                    changed = True
    return model if changed else None


def _pointwise(layer: nn.Module) -> Optional[Tuple[nn.Conv2d, nn.Module]]:
    """The convolution and what follows it, of a layer that is a plain 1×1 convolution with or without activation."""
    children = list(layer.children()) if type(layer) is nn.Sequential else [layer]
    conv, rest = children[0] if children else None, children[1:]
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.groups != 1:
        return None
    if any(isinstance(m, nn.Conv2d) for r in rest for m in r.modules()):
        return None
    return conv, nn.Sequential(*rest)


def _bias(conv: nn.Conv2d) -> torch.Tensor:
    return conv.bias if conv.bias is not None else conv.weight.new_zeros(conv.out_channels)


def _empty_conv(conv: nn.Conv2d, in_chs: int, out_chs: int, groups: int) -> nn.Conv2d:
    kwargs: Dict[str, Any] = dict(
        kernel_size=conv.kernel_size, stride=conv.stride, padding=conv.padding, dilation=conv.dilation)
    return nn.Conv2d(in_chs, out_chs, groups=groups, device='meta', **kwargs)


def _with_weights(conv: nn.Conv2d, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> nn.Conv2d:
    conv.weight = nn.Parameter(weight)
    conv.bias = None if bias is None else nn.Parameter(bias.clone())
    return conv
