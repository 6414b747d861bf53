"""The same network in other forms, of which the hardware likes one better than another.

Each function takes a network whose batch norms are folded and returns a copy that computes the same up to rounding, or
None if there is nothing to change. Which form is the faster one differs from machine to machine, and is measured.
"""
import copy
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..cross_stage import ComposedStage

__all__ = ['FORMS', 'join_partitions', 'regroup', 'space_to_depth', 'split_merges']

PATCH_CHANNELS, PATCH_MULTIPLE = 4, 8  # channels of an image at most, and what those of its patches are filled up to
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

    def change(stage: Any) -> Optional[nn.Module]:
        if not _is_stage(stage):
            return None
        entry, bypass = (_pointwise(branch) for branch in _branches(stage))
        if entry is None or bypass is None or repr(entry[1]) != repr(bypass[1]):
            return None
        return RewrittenStage(stage, partition=JointPartition((entry[0], bypass[0]), entry[1]))

    return _changed(model, change)


def split_merges(model: nn.Module) -> Optional[nn.Module]:
    """Merge by the sum of two 1×1 convolutions, one of each branch, and so without the concatenation.

    Args:
        model: The network.

    Returns:
        The network with split merges, or None if no stage merges by a convolution.
    """

    def change(stage: Any) -> Optional[nn.Module]:
        if not _is_stage(stage):
            return None
        merge = _pointwise(stage.merge.merge if isinstance(stage.merge, CatMerge) else stage.merge)
        if isinstance(stage, RewrittenStage) and isinstance(stage.partition, JointPartition):
            bypass_chs = stage.partition.chs[1]
        else:
            bypass = _pointwise(_branches(stage)[1])
            bypass_chs = bypass[0].out_channels if bypass is not None else 0
        if merge is None or not bypass_chs:
            return None
        return RewrittenStage(stage, merge=SumMerge(*merge, blocks_chs=merge[0].in_channels - bypass_chs))

    return _changed(model, change)


def space_to_depth(model: nn.Module) -> Optional[nn.Module]:
    """Read patches of 2×2 pixels as channels, and convolve these with stride 1 and a kernel half as wide.

    Three channels leave a matrix unit idle, and a stride scatters what it reads; twelve or sixteen channels in a row do
    neither.

    Args:
        model: The network.

    Returns:
        The network with such a stem, or None if no convolution of stride 2 reads four channels or fewer.
    """

    def change(conv: nn.Module) -> Optional[nn.Module]:
        if not isinstance(conv, nn.Conv2d) or conv.in_channels > PATCH_CHANNELS or conv.kernel_size[0] < 2:
            return None
        if conv.stride != (2, 2) or conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != 'zeros':
            return None
        same = conv.kernel_size[0] == conv.kernel_size[1] and conv.padding in ((p, p) for p in range(8))
        return PatchConv(conv) if same else None

    return _changed(model, change)


FORMS: Dict[str, Callable[[nn.Module], Optional[nn.Module]]] = {
    'regroup': regroup, 'join_partitions': join_partitions, 'split_merges': split_merges,
    'space_to_depth': space_to_depth,
}


class PatchConv(nn.Module):
    """A convolution of stride 2 as a rearrangement and a convolution of stride 1.

    Tap ``t`` of a kernel with padding ``p`` reads pixel ``2 i + t - p`` for output ``i``: pixel ``(t - p) mod 2`` of
    patch ``i + floor((t - p) / 2)``.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """
        Args:
            conv: A convolution of stride 2 with a square kernel.
        """
        super().__init__()
        kernel, pad, channels = conv.kernel_size[0], int(conv.padding[0]), conv.in_channels
        self.kernel, self.pad = kernel, pad
        self.before = -(-pad // 2)  # patches that are read before the output's own
        after = max((kernel - 1 - pad) // 2, 2 - self.before, 0)  # at least 3×3, for which units are made
        self.width = self.before + after + 1
        self.symmetric = self.before == after and 2 * pad < kernel
        self.idle = -4 * channels % PATCH_MULTIPLE
        weight = conv.weight.new_zeros(conv.out_channels, channels, 2, 2, self.width, self.width)
        for y in range(kernel):
            for x in range(kernel):
                (dy, ry), (dx, rx) = divmod(y - pad, 2), divmod(x - pad, 2)
                weight[:, :, ry, rx, dy + self.before, dx + self.before] = conv.weight[:, :, y, x]
        weight = nn.functional.pad(weight.flatten(1, 3), (0, 0, 0, 0, 0, self.idle))
        patches = nn.Conv2d(
            weight.shape[1], conv.out_channels, self.width, padding=self.before if self.symmetric else 0, device='meta')
        self.conv = _with_weights(patches, weight.contiguous(), conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``(B, C, H, W)``."""
        height, width = ((n + 2 * self.pad - self.kernel) // 2 + 1 for n in x.shape[-2:])
        if self.symmetric:  # the convolution has the zeros around
            bottom, right, first = x.shape[-2] % 2, x.shape[-1] % 2, 0
        else:
            first = 2 * self.before
            bottom, right = (
                2 * (out + self.width - 1) - first - n for out, n in zip((height, width), x.shape[-2:]))
        if first or bottom or right:
            x = nn.functional.pad(x, (first, right, first, bottom))
        x = nn.functional.pixel_unshuffle(x, 2)
        if self.idle:
            x = nn.functional.pad(x, (0, 0, 0, 0, 0, self.idle))
        return self.conv(x)[..., :height, :width]


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


class Partition(nn.Module):
    """Two branches of one map."""

    def __init__(self, entry: nn.Module, bypass: nn.Module) -> None:
        """
        Args:
            entry: Leads to the blocks.
            bypass: Leads around them.
        """
        super().__init__()
        self.entry = entry
        self.bypass = bypass

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Both results."""
        return self.entry(x), self.bypass(x)


class CatMerge(nn.Module):
    """What follows the concatenation of both branches."""

    def __init__(self, merge: nn.Module) -> None:
        """
        Args:
            merge: Reads the concatenation.
        """
        super().__init__()
        self.merge = merge

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Merge what comes from the blocks, ``y``, with what bypassed them, ``x``."""
        return self.merge(torch.cat([y, x], dim=1))


class RewrittenStage(nn.Module):
    """A cross stage whose partition gives both branches and whose merge takes both, so that each may be another."""

    def __init__(
            self,
            stage: Any,
            partition: Optional[nn.Module] = None,
            merge: Optional[nn.Module] = None,
    ) -> None:
        """
        Args:
            stage: A :class:`~cspnet_timm.cross_stage.ComposedStage`, or one that has been rewritten before.
            partition: Instead of the stage's own.
            merge: Instead of the stage's own.
        """
        super().__init__()
        rewritten = isinstance(stage, RewrittenStage)
        self.partition = partition or (stage.partition if rewritten else Partition(stage.entry, stage.bypass))
        self.blocks = stage.blocks
        self.transition = stage.transition
        self.merge = merge or (stage.merge if rewritten else CatMerge(stage.merge))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Partition, transform, merge."""
        y, x = self.partition(x)
        return self.merge(self.transition(self.blocks(y)), x)


def _is_stage(module: nn.Module) -> bool:
    """Whether it is a stage whose forward the forms can write anew, which concatenate [blocks, bypass]."""
    return isinstance(module, RewrittenStage) or (isinstance(module, ComposedStage) and not module.bypass_first)


def _branches(stage: Any) -> Tuple[nn.Module, nn.Module]:
    """The modules of a stage that lead to its blocks and around them; those of a joint partition are one."""
    parent: Any = stage.partition if isinstance(stage, RewrittenStage) else stage
    return (parent, parent) if isinstance(parent, JointPartition) else (parent.entry, parent.bypass)


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
