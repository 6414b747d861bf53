"""The forms of a neck that several families share: how wide its nodes are, and where it reduces."""
import itertools
import re
from collections import OrderedDict
from functools import partial
from typing import Callable, List, Optional, Sequence

import torch.nn as nn

from ..backbone import LevelArgs, Neck, StateDict
from ..layers import ActLayer, ConvNormAct
from ..naming import Rule, rename_keys
from ..neck import BottomUp, PathAggregation, TopDown

__all__ = ['keeping_neck', 'lateral_neck', 'reducing_neck', 'rename_reducing_neck']

Stage = Callable[[int, int, LevelArgs], nn.Module]  # of the channels that go in and come out


def _reducing(
        chs: List[int],
        args: LevelArgs,
        stage: Stage,
        conv: Callable[..., nn.Module],
        out_chs: Optional[int],
) -> nn.Module:
    top_down: List[nn.Module] = [TopDown(stage(2 * chs[0], chs[0], args))]
    for fine, width in itertools.pairwise(chs[:-1]):
        # The reduction ends a level, and is no part of the step down, because the way up reads what it gives.
        top_down.insert(0, TopDown(nn.Sequential(OrderedDict(
            csp=stage(2 * width, width, args), reduce=ConvNormAct(width, fine, **args.layers)))))
    bottom_up = [
        BottomUp(stage(2 * fine, coarse, args), conv(fine, fine, 3, stride=2, **args.layers))
        for fine, coarse in itertools.pairwise(chs)
    ]
    outputs = None if out_chs is None else [conv(width, out_chs, 3, **args.layers) for width in chs]
    return PathAggregation(top_down, bottom_up, top=ConvNormAct(chs[-1], chs[-2], **args.layers), outputs=outputs)


def reducing_neck(
        chs: Sequence[int],
        stage: Stage,
        conv: Callable[..., nn.Module] = ConvNormAct,
        out_chs: Optional[int] = None,
) -> Neck:
    """The neck of YOLOv5, YOLOX and RTMDet: 1×1 convolutions reduce a level to the width of the finer one.

    The way up reads what they give.

    Args:
        chs: Channels of the backbone's levels, the finest first.
        stage: Called with the channels of a node's concatenation and of its output, and the arguments of the layers.
        conv: The 3×3 convolutions.
        out_chs: Channels of all maps, which a last 3×3 convolution gives; without one if None.

    Returns:
        The neck.
    """
    build = partial(_reducing, stage=stage, conv=conv, out_chs=out_chs)
    return Neck(build, tuple(chs) if out_chs is None else (out_chs,) * len(chs))


def rename_reducing_neck(state_dict: StateDict) -> StateDict:
    """Rename the nodes of such a neck from MMDetection's and MMYOLO's names to this package's.

    Args:
        state_dict: Tensors, those of the neck by ``neck.<node>.<name>``.

    Returns:
        The same with this package's nodes.
    """
    rules: List[Rule] = [
        (r'^neck\.(downsamples|downsample_layers)\.(\d)\.', r'neck.bottom_up.\2.down.'),
        (r'^neck\.bottom_up_(blocks|layers)\.(\d)\.', r'neck.bottom_up.\2.stage.'),
        (r'^neck\.out_(convs|layers)\.(\d)\.', r'neck.outputs.\2.'),
    ]
    numbers = [int(m[1]) for m in (re.match(r'neck\.top_down_(?:blocks|layers)\.(\d)\.', k) for k in state_dict) if m]
    last = max(numbers, default=1)
    if any(k.startswith('neck.top_down_blocks.') for k in state_dict):  # MMDetection's
        rules += [
            (r'^neck\.reduce_layers\.0\.', 'neck.top.'),
            (r'^neck\.reduce_layers\.(\d)\.', lambda m: f'neck.top_down.{int(m[1]) - 1}.stage.reduce.'),
            (rf'^neck\.top_down_blocks\.{last}\.', f'neck.top_down.{last}.stage.'),
            (r'^neck\.top_down_blocks\.(\d)\.', r'neck.top_down.\1.stage.csp.'),
        ]
    else:
        rules += [
            (rf'^neck\.reduce_layers\.{last + 1}\.', 'neck.top.'),
            (rf'^neck\.top_down_layers\.{last}\.', f'neck.top_down.{last}.stage.'),
            (r'^neck\.top_down_layers\.(\d)\.0\.', r'neck.top_down.\1.stage.csp.'),
            (r'^neck\.top_down_layers\.(\d)\.1\.', r'neck.top_down.\1.stage.reduce.'),
        ]
    return rename_keys(state_dict, rules)


def _keeping(
        chs: List[int],
        args: LevelArgs,
        out_chs: Sequence[int],
        stage: Stage,
        last: Stage,
        top: Optional[Callable[[int, LevelArgs], nn.Module]],
        down: Callable[[int, int, LevelArgs], nn.Module],
        down_chs: Sequence[int],
) -> nn.Module:
    widths = [*out_chs[:-1], chs[-1]]  # on the way down, whose coarsest level is the backbone's
    return PathAggregation(
        [TopDown(stage(coarse + own, fine, args))
         for own, fine, coarse in reversed(list(zip(chs[:-1], widths, widths[1:])))],
        [BottomUp((stage if i < len(chs) - 1 else last)(mid + own, coarse, args), down(fine, mid, args))
         for i, (fine, mid, own, coarse) in enumerate(zip(out_chs, down_chs, widths[1:], out_chs[1:]), start=1)],
        top=None if top is None else top(chs[-1], args),
    )


def _conv(in_chs: int, out_chs: int, args: LevelArgs) -> nn.Module:
    return ConvNormAct(in_chs, out_chs, 3, stride=2, **args.layers)


def keeping_neck(
        out_chs: Sequence[int],
        stage: Stage,
        last: Optional[Stage] = None,
        top: Optional[Callable[[int, LevelArgs], nn.Module]] = None,
        down: Callable[[int, int, LevelArgs], nn.Module] = _conv,
        down_chs: Optional[Sequence[int]] = None,
) -> Neck:
    """The neck of YOLOv8, YOLOv9, YOLO11 and YOLO26, which reduces nothing before it enlarges.

    Args:
        out_chs: Channels of the maps, the finest first.
        stage: Called with the channels of a node's concatenation and of its output, and the arguments of the layers.
        last: The same for the coarsest level on the way up.
        top: Called with the channels of the coarsest level, which it keeps, and the arguments; none if None.
        down: Halves a level: called with the channels that go in and come out.
        down_chs: Channels that come out of it, by default those that go in.

    Returns:
        The neck.
    """
    build = partial(
        _keeping, out_chs=out_chs, stage=stage, last=last or stage, top=top, down=down,
        down_chs=out_chs[:-1] if down_chs is None else down_chs)
    return Neck(build, tuple(out_chs))


def _lateral(
        chs: List[int],
        args: LevelArgs,
        widths: Sequence[int],
        stage: Stage,
        top: Stage,
) -> nn.Module:
    pairs = list(itertools.pairwise(widths))  # of a level and the coarser one
    return PathAggregation(
        [TopDown(stage(2 * fine, fine, args), ConvNormAct(coarse, fine, **args.layers),
                 ConvNormAct(own, fine, **args.layers))
         for own, (fine, coarse) in reversed(list(zip(chs, pairs)))],
        [BottomUp(stage(2 * coarse, coarse, args), _conv(fine, coarse, args)) for fine, coarse in pairs],
        top=top(chs[-1], widths[-1], args),
        outputs=[ConvNormAct(width, 2 * width, 3, **args.layers) for width in widths],
    )


def lateral_neck(
        chs: Sequence[int],
        stage: Stage,
        top: Stage,
        act_layer: ActLayer = None,
) -> Neck:
    """The neck of YOLOv4 and its like: 1×1 convolutions bring a level and the coarser one to one width.

    Every map ends in a 3×3 convolution to twice the level's channels, which what detects reads.

    Args:
        chs: Channels of the levels within the neck, the finest first; the maps have twice as many.
        stage: Called with the channels of a node's concatenation and of its output, and the arguments of the layers.
        top: The same for the coarsest level on the way down.
        act_layer: Activation, the backbone's if None.

    Returns:
        The neck.
    """
    return Neck(partial(_lateral, widths=tuple(chs), stage=stage, top=top), tuple(2 * c for c in chs), act_layer)
