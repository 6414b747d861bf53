"""Down the levels and up again: the neck of a detector, the pyramid behind its backbone, in one file.

    down  t[i] = stage(cat([enlarge(reduce(t[i + 1])), lateral(x[i])]))
    up    p[i] = stage(cat([halve(p[i - 1]), t[i]]))

with the backbone's maps ``x`` and the neck's maps ``p``, level 0 the finest: on both walks, every level is what comes
from its neighbour beside what it has itself, through a cross stage. Where the walks cross, a level also reads the finer
one of the walk before, halved:

    down  t[i] = stage(cat([x[i], halve(x[i - 1]), enlarge(t[i + 1])]))
    up    p[i] = stage(cat([t[i], halve(t[i - 1]), halve(p[i - 1])]))

Papers: `Feature Pyramid Networks for Object Detection`, https://arxiv.org/abs/1612.03144, for the way down; `Path
Aggregation Network for Instance Segmentation` (PANet), https://arxiv.org/abs/1803.01534, for the way up; `YOLOv4:
Optimal Speed and Accuracy of Object Detection`, https://arxiv.org/abs/2004.10934, for concatenation in place of sums;
`GiraffeDet: A Heavy-Neck Paradigm for Object Detection`, https://arxiv.org/abs/2202.04256, and `DAMO-YOLO: A Report on
Real-Time Object Detection Design`, https://arxiv.org/abs/2211.15444, for walks that cross.
"""
import itertools
from typing import Any, Callable, Dict, List, Optional, Sequence, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from .blocks import DarkBlock
from .cross_stage import CrossStage
from .layers import ActLayer, ConvNormAct, NormLayer

__all__ = ['BottomUp', 'CrossingDown', 'CrossingPaths', 'CrossingUp', 'PathAggregation', 'TopDown']


def _or_identity(module: Optional[nn.Module]) -> nn.Module:
    return module if module is not None else nn.Identity()


class TopDown(nn.Module):
    """A level on the way down: the coarser level enlarged to the size of this one, beside it, through a stage.

    Nearest neighbours, to the size that this level has, so that odd maps can enter as well.

    Input ``(B, C1, H', W')`` and ``(B, C2, H, W)``, output ``(B, out_chs, H, W)``.
    """

    def __init__(
            self,
            stage: nn.Module,
            reduce: Optional[nn.Module] = None,
            lateral: Optional[nn.Module] = None,
    ) -> None:
        """
        Args:
            stage: Behind the concatenation [coarser level, this one].
            reduce: On the coarser level, before it is enlarged.
            lateral: On this level, before the concatenation.
        """
        super().__init__()
        self.reduce = _or_identity(reduce)
        self.lateral = _or_identity(lateral)
        self.stage = stage

    def forward(self, coarser: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Merge a coarser map into a level's own."""
        x = self.lateral(x)
        coarser = F.interpolate(self.reduce(coarser), size=x.shape[2:], mode='nearest')
        return self.stage(torch.cat([coarser, x], dim=1))


class BottomUp(nn.Module):
    """A level on the way up: the finer level at half its size, beside what came down to this one, through a stage.

    Input ``(B, C1, H, W)`` and ``(B, C2, H', W')``, output ``(B, out_chs, H', W')``, where the convolution that halves
    makes ``H'`` of ``H``.
    """

    def __init__(self, stage: nn.Module, down: nn.Module) -> None:
        """
        Args:
            stage: Behind the concatenation [finer level, this one].
            down: Halves the finer level.
        """
        super().__init__()
        self.down = down
        self.stage = stage

    def forward(self, finer: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Merge a finer map into a level's own."""
        return self.stage(torch.cat([self.down(finer), x], dim=1))


class PathAggregation(nn.Module):
    """The two walks, of any modules; ``nn.Identity`` is a legal choice for ``top`` and for each of ``outputs``.

    Input: a list of maps, the finest first, each half the size of the one before it, as timm's ``features_only`` gives
    them. Output: a list of as many maps of the same sizes.

    Example:
        >>> import timm, torch
        >>> from cspnet_timm import PathAggregation
        >>> backbone = timm.create_model('resnet18', features_only=True, out_indices=(2, 3, 4))
        >>> neck = PathAggregation.for_channels(backbone.feature_info.channels(), [64, 128, 256])
        >>> [tuple(p.shape) for p in neck(backbone(torch.zeros(1, 3, 64, 64)))]
        [(1, 64, 8, 8), (1, 128, 4, 4), (1, 256, 2, 2)]
    """

    def __init__(
            self,
            top_down: Sequence[nn.Module],
            bottom_up: Sequence[nn.Module] = (),
            top: Optional[nn.Module] = None,
            outputs: Optional[Sequence[nn.Module]] = None,
    ) -> None:
        """
        Args:
            top_down: A :class:`TopDown` for each level but the coarsest, the coarsest of them first.
            bottom_up: A :class:`BottomUp` for each level but the finest, the finest of them first; none for a pyramid
                that only goes down.
            top: On the coarsest map, before the walk down.
            outputs: On each map of the result, the finest first.

        Raises:
            ValueError: If the levels of the parts do not agree.
        """
        super().__init__()
        num_levels = len(top_down) + 1
        for name, given, allowed in (
            ('bottom_up', len(bottom_up), (0, num_levels - 1)),
            ('outputs', num_levels if outputs is None else len(outputs), (num_levels,)),
        ):
            if given not in allowed:
                raise ValueError(
                    f'{name} has {given} entries, but {len(top_down)} of top_down make {num_levels} levels, for which '
                    f'there are {" or ".join(map(str, allowed))}.'
                )
        self.num_levels = num_levels
        self.top = _or_identity(top)
        self.top_down = nn.ModuleList(top_down)
        self.bottom_up = nn.ModuleList(bottom_up)
        self.outputs = nn.ModuleList(outputs if outputs is not None else [nn.Identity() for _ in range(num_levels)])

    @classmethod
    def for_channels(
            cls,
            in_chs: Sequence[int],
            out_chs: Optional[Union[int, Sequence[int]]] = None,
            stage: Optional[Callable[[int, int], nn.Module]] = None,
            depth: int = 1,
            act_layer: ActLayer = nn.SiLU,
            norm_layer: NormLayer = nn.BatchNorm2d,
            device: Optional[Union[torch.device, str]] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> 'PathAggregation':
        """A neck for the levels of a backbone, this package's, timm's or another.

        1×1 convolutions bring every map to its level's width where it has another, 3×3 convolutions halve.

        Args:
            in_chs: Channels of the backbone's maps, the finest first.
            out_chs: Channels of the neck's maps, one number for all levels or one for each; by default ``in_chs``.
            stage: Called with the channels that go in and come out, returns the module of one level; by default a
                :class:`~cspnet_timm.CrossStage` of ``depth`` Darknet blocks without shortcuts, as YOLOv5 and YOLOX
                have it in their necks.
            depth: Blocks of each default stage.
            act_layer: Activation of the convolutions and of the default stage.
            norm_layer: Normalisation of the convolutions and of the default stage.
            device: Where to create the parameters.
            dtype: Type of the parameters.

        Returns:
            The neck.

        Raises:
            ValueError: If there are fewer than two levels, ``out_chs`` are not as many, or channels are not positive.
        """
        widths = [out_chs] * len(in_chs) if isinstance(out_chs, int) else list(in_chs if out_chs is None else out_chs)
        if len(in_chs) < 2 or len(widths) != len(in_chs) or min(*in_chs, *widths) < 1:
            raise ValueError(
                f'in_chs={list(in_chs)} and out_chs={widths} cannot be: a neck has two levels or more, and a positive '
                'number of channels for each.'
            )
        layers: Dict[str, Any] = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)

        def project(chs: int, width: int) -> Optional[nn.Module]:
            return None if chs == width else ConvNormAct(chs, width, **layers)

        def default_stage(chs: int, width: int) -> nn.Module:
            return CrossStage(
                chs, width,
                blocks=lambda c: nn.Sequential(*[DarkBlock(c, c, shortcut=False, **layers) for _ in range(depth)]),
                fusion='first',
                **layers,
            )

        stage = stage or default_stage
        pairs = list(itertools.pairwise(widths))  # of a level and the coarser one
        return cls(
            [TopDown(stage(2 * fine, fine), project(coarse, fine), project(chs, fine))
             for chs, (fine, coarse) in zip(in_chs[-2::-1], reversed(pairs))],
            [BottomUp(stage(fine + coarse, coarse), ConvNormAct(fine, fine, 3, stride=2, **layers))
             for fine, coarse in pairs],
            top=project(in_chs[-1], widths[-1]),
        )

    def forward(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        """Walk down and up the levels.

        Args:
            maps: ``(B, C_i, H / 2^i, W / 2^i)`` for each level i, the finest first.

        Returns:
            As many maps of the same sizes.

        Raises:
            ValueError: If there are more or fewer maps than levels.
        """
        self._check(maps)
        x = self.top(maps[-1])
        down = [x]
        for node in self.top_down:
            x = node(x, maps[self.num_levels - 1 - len(down)])
            down.append(x)
        up = [x]
        for node in self.bottom_up:
            x = node(x, down[self.num_levels - 1 - len(up)])
            up.append(x)
        if len(self.bottom_up) == 0:
            up = down[::-1]
        return self._outputs(up)

    def _check(self, maps: List[torch.Tensor]) -> None:
        if not torch.jit.is_scripting() and len(maps) != self.num_levels:
            raise ValueError(f'{len(maps)} maps were given to a neck of {self.num_levels} levels.')

    def _outputs(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        pyramid: List[torch.Tensor] = []
        for output in self.outputs:
            pyramid.append(output(maps[len(pyramid)]))
        return pyramid

    def apart(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        """Those of the result that have parameters of their own, which the coarsest map does not depend on.

        Args:
            maps: What :meth:`forward` gave, without the coarsest.

        Returns:
            Some of them.
        """
        only_down = len(self.bottom_up) == 0
        return [y for y, output in zip(maps, self.outputs) if only_down or not isinstance(output, nn.Identity)]

    @torch.jit.ignore
    def prune(self, levels: Sequence[int]) -> None:
        """Remove what the given levels of the result do not need.

        Levels beyond the coarsest of them are gone; those before it that are not among them give no map of any use.

        Args:
            levels: The levels to keep, counted from the finest.
        """
        only_down = len(self.bottom_up) == 0
        for i, output in enumerate(self.outputs):
            if i not in levels:
                self.outputs[i] = nn.Identity().train(output.training)
        del self.outputs[max(levels) + 1:]
        if only_down:
            for j in range(self.num_levels - 1 - min(levels), len(self.top_down)):
                self.top_down[j] = _Coarser().train(self.training)
        else:
            del self.bottom_up[max(levels):]


class CrossingDown(nn.Module):
    """A level on the way down, beside the backbone's finer level halved and the coarser one enlarged, through a stage.

    Input ``(B, C, H, W)`` and, but for the finest level, ``(B, C1, H', W')``; but for the coarsest,
    ``(B, C2, H'', W'')``. Output ``(B, out_chs, H, W)``.
    """

    def __init__(self, stage: nn.Module, down: Optional[nn.Module] = None) -> None:
        """
        Args:
            stage: Behind the concatenation [this level, finer one, coarser one].
            down: Halves the finer level; the finest of all has none.
        """
        super().__init__()
        self.down = _or_identity(down)
        self.stage = stage

    def forward(
            self,
            x: torch.Tensor,
            finer: Optional[torch.Tensor] = None,
            coarser: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Merge the maps of the neighbours into a level's own."""
        maps = [x]
        if finer is not None:
            maps.append(self.down(finer))
        if coarser is not None:
            maps.append(F.interpolate(coarser, size=x.shape[2:], mode='nearest'))
        return self.stage(torch.cat(maps, dim=1))


class CrossingUp(nn.Module):
    """A level on the way up, beside the finer level of either walk halved, through a stage.

    Input ``(B, C, H, W)``, ``(B, C1, H', W')`` and, but for the second finest level, ``(B, C2, H', W')``; output
    ``(B, out_chs, H, W)``. The finest level is the same in both walks.
    """

    def __init__(self, stage: nn.Module, down: nn.Module, across: Optional[nn.Module] = None) -> None:
        """
        Args:
            stage: Behind the concatenation [this level, finer one of the way down, finer one].
            down: Halves the finer level.
            across: Halves the finer level of the way down; the second finest of all has none.
        """
        super().__init__()
        self.across = _or_identity(across)
        self.down = down
        self.stage = stage

    def forward(self, x: torch.Tensor, finer: torch.Tensor, across: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Merge the maps of the neighbours into a level's own."""
        maps = [x]
        if across is not None:
            maps.append(self.across(across))
        maps.append(self.down(finer))
        return self.stage(torch.cat(maps, dim=1))


class CrossingPaths(PathAggregation):
    """The two walks where each also reads the finer levels of what was before it: the backbone, or the way down.

    ``top`` is a :class:`CrossingDown` of the coarsest level, ``top_down`` are those of the others, and ``bottom_up``
    :class:`CrossingUp`. Input and output as of :class:`PathAggregation`.
    """

    def forward(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        """Walk down and up the levels, with arguments, result and error of :meth:`PathAggregation.forward`."""
        self._check(maps)
        x = self.top(maps[-1], maps[-2])
        down = [x]
        for node in self.top_down:
            i = self.num_levels - 1 - len(down)
            finer: Optional[torch.Tensor] = None
            if i > 0:
                finer = maps[i - 1]
            x = node(maps[i], finer, x)
            down.append(x)
        up = [x]
        for node in self.bottom_up:
            i = len(up)
            across: Optional[torch.Tensor] = None
            if i > 1:
                across = down[self.num_levels - i]
            x = node(down[self.num_levels - 1 - i], x, across)
            up.append(x)
        return self._outputs(up)


class _Coarser(nn.Module):
    """Stands for a level that pruning has removed."""

    def forward(self, coarser: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return coarser
