"""Partition, transform, merge: the cross stage partial network in one file.

    out = merge(cat([transition(blocks(entry(x))), bypass(x)]))

Every network of this package is that sentence with other modules in it.

Paper: `CSPNet: A New Backbone that can Enhance Learning Capability of CNN`, https://arxiv.org/abs/1911.11929
"""
from typing import Any, Callable, Dict, Optional, Union

import torch
import torch.nn as nn
from timm.models import checkpoint, checkpoint_seq

from .layers import ActLayer, ChannelSlice, ConvNormAct, NormLayer

__all__ = ['ComposedStage', 'CrossStage']

FUSIONS = ('csp', 'first', 'last')
PARTITIONS = ('conv', 'split')
BYPASSES = ('conv', 'identity')


class ComposedStage(nn.Module):
    """The sentence itself, of any five modules; ``nn.Identity`` is a legal choice for each.

    Both branches read the stage's whole input; a plain split of the channels is a
    :class:`~cspnet_timm.layers.ChannelSlice` at the head of each. The order of the concatenation is [blocks, bypass],
    where a merge follows: whatever order a released network has, the input channels of its merge are put into this one
    when its weights are loaded. Where nothing follows, the order is that of the map itself, and can be asked for.

    Input ``(B, in_chs, H, W)``; the output is what ``merge`` makes of the concatenation.
    """

    bypass_first: torch.jit.Final[bool]

    def __init__(
            self,
            blocks: nn.Module,
            entry: Optional[nn.Module] = None,
            bypass: Optional[nn.Module] = None,
            transition: Optional[nn.Module] = None,
            merge: Optional[nn.Module] = None,
            bypass_first: bool = False,
    ) -> None:
        """
        Args:
            blocks: What the stage computes.
            entry: Leads from the input to the blocks.
            bypass: Leads from the input around the blocks.
            transition: Behind the blocks, before the concatenation.
            merge: Behind the concatenation.
            bypass_first: Concatenate [bypass, blocks].
        """
        super().__init__()
        self.bypass_first = bypass_first
        self.entry = entry if entry is not None else nn.Identity()
        self.blocks = blocks
        self.transition = transition if transition is not None else nn.Identity()
        self.bypass = bypass if bypass is not None else nn.Identity()
        self.merge = merge if merge is not None else nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Partition, transform, merge."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self._checkpointed(x)
        return self._merge(self.transition(self.blocks(self.entry(x))), self.bypass(x))

    def _merge(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.merge(torch.cat([x, y] if self.bypass_first else [y, x], dim=1))

    @torch.jit.ignore
    def _checkpointed(self, x: torch.Tensor) -> torch.Tensor:
        # A part at a time: the stages at a network's beginning hold most of its maps, and one whole is too much.
        y = checkpoint(self.entry, x)
        y = checkpoint_seq(self.blocks, y) if isinstance(self.blocks, nn.Sequential) else checkpoint(self.blocks, y)
        y = checkpoint(self.transition, y)
        return checkpoint(self._merge, y, checkpoint(self.bypass, x))


class CrossStage(ComposedStage):
    """A cross stage of any block, by the paper's choices: partial ratio, partition and fusion.

    With ``hidden_chs`` channels behind the partition and γ the partial ratio, ``γ · hidden_chs`` of them bypass the
    blocks and the others, half of them at γ = 0.5, go through.

    - ``fusion='csp'``: 1×1 convolutions behind the blocks and behind the concatenation, as CSPResNet, CSPResNeXt and
      CSPDarknet have them (the paper's Fig. 3b).
    - ``fusion='first'``: one behind the concatenation alone. With the two of the partition this is the form of three
      convolutions (C3) of YOLOv5, YOLOX, RTMDet and timm's ``cs3`` networks (Fig. 3c).
    - ``fusion='last'``: one behind the blocks alone (Fig. 3d).

    Input ``(B, in_chs, H, W)``, output ``(B, out_chs, H, W)``.

    Examples:
        >>> import torch, torch.nn as nn
        >>> from cspnet_timm import CrossStage
        >>> stage = CrossStage(64, 128, blocks=lambda chs: nn.Conv2d(chs, chs, 3, padding=1), partial_ratio=0.25)
        >>> stage(torch.zeros(1, 64, 8, 8)).shape
        torch.Size([1, 128, 8, 8])
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            blocks: Callable[[int], nn.Module],
            partial_ratio: float = 0.5,
            fusion: str = 'csp',
            partition: str = 'conv',
            bypass: Optional[str] = None,
            hidden_chs: Optional[int] = None,
            transition_chs: Optional[int] = None,
            merge: bool = True,
            act_layer: ActLayer = nn.SiLU,
            norm_layer: NormLayer = nn.BatchNorm2d,
            device: Optional[Union[torch.device, str]] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        """
        Args:
            in_chs: Channels of the stage's input.
            out_chs: Channels of its output.
            blocks: Called with the number of channels that enter the blocks, returns the module that transforms them.
                If it gives another number of channels than it takes, it says so in an attribute ``out_chs``.
            partial_ratio: γ, the fraction of the channels that bypasses the blocks, between 0 and 1 exclusive.
            fusion: ``'csp'``, ``'first'`` or ``'last'``, see above.
            partition: ``'conv'``, one 1×1 convolution of the whole input per branch, or ``'split'``, the input's own
                channels, of which the first γ bypass.
            bypass: ``'conv'`` or ``'identity'``; by default a convolution unless the partition is a split. Beside
                ``partition='conv'`` the identity bypasses the whole input.
            hidden_chs: Channels behind the partition, both branches together; by default ``out_chs``, and always
                ``in_chs`` for a split.
            transition_chs: Channels behind the transition of fusion ``'csp'``; by default those that enter the blocks.
            merge: False leaves the concatenation as it is, for what merges it to stand outside, behind a pool for
                instance; ``out_chs`` is then its channels.
            act_layer: Activation of the stage's own convolutions.
            norm_layer: Normalisation of the stage's own convolutions.
            device: Where to create the parameters.
            dtype: Type of the parameters.

        Raises:
            TypeError: If ``blocks`` is a module, or makes none.
            ValueError: If a choice is unknown, γ is outside (0, 1), or the widths leave a branch without channels.
        """
        if isinstance(blocks, nn.Module) or not callable(blocks):
            raise TypeError(
                f'blocks={type(blocks).__name__} is no function: pass one that makes a module of a width, '
                'such as lambda chs: nn.Conv2d(chs, chs, 3, padding=1). Of modules that exist, make a ComposedStage.'
            )
        for name, value, allowed in (('fusion', fusion, FUSIONS), ('partition', partition, PARTITIONS)):
            if value not in allowed:
                raise ValueError(f'{name}={value!r} is unknown, choose one of {", ".join(map(repr, allowed))}.')
        if bypass is None:
            bypass = 'conv' if partition == 'conv' else 'identity'
        elif bypass not in BYPASSES:
            raise ValueError(f'bypass={bypass!r} is unknown, choose one of {", ".join(map(repr, BYPASSES))}.')
        if not 0. < partial_ratio < 1.:
            raise ValueError(
                f'partial_ratio={partial_ratio} is outside (0, 1): it is the fraction of the channels that bypasses '
                'the blocks, and neither branch may be empty.'
            )
        if partition == 'split':
            if hidden_chs not in (None, in_chs):
                raise ValueError(f'hidden_chs={hidden_chs} cannot be: a split has the {in_chs} channels of its input.')
            hidden_chs = in_chs
        elif hidden_chs is None:
            hidden_chs = out_chs
        bypass_chs = round(partial_ratio * hidden_chs)
        entry_chs = hidden_chs - bypass_chs
        if bypass_chs < 1 or entry_chs < 1:
            raise ValueError(
                f'{hidden_chs} channels cannot be split at partial_ratio={partial_ratio}: {bypass_chs} would bypass '
                f'the blocks and {entry_chs} would enter them, and neither may be less than 1.'
            )
        if transition_chs is not None and fusion != 'csp':
            raise ValueError(f'transition_chs={transition_chs} is for fusion=\'csp\', not for fusion={fusion!r}.')

        kwargs: Dict[str, Any] = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        if partition == 'conv':
            entry: nn.Module = ConvNormAct(in_chs, entry_chs, **kwargs)
            around: nn.Module = ConvNormAct(in_chs, bypass_chs, **kwargs) if bypass == 'conv' else nn.Identity()
            if bypass == 'identity':
                bypass_chs = in_chs
        else:
            entry = ChannelSlice(bypass_chs, in_chs)
            around = ChannelSlice(0, bypass_chs)
            if bypass == 'conv':
                around = nn.Sequential(around, ConvNormAct(bypass_chs, bypass_chs, **kwargs))

        transform = blocks(entry_chs)
        if not isinstance(transform, nn.Module):
            raise TypeError(f'blocks({entry_chs}) returned {type(transform).__name__}, and not a module.')
        block_chs = getattr(transform, 'out_chs', entry_chs)
        transition = None
        if fusion == 'csp':
            transition_chs = transition_chs or entry_chs
            transition = ConvNormAct(block_chs, transition_chs, **kwargs)
            block_chs = transition_chs
        elif fusion == 'last':
            if out_chs <= bypass_chs:
                raise ValueError(
                    f'out_chs={out_chs} leaves nothing for the blocks at fusion=\'last\': '
                    f'{bypass_chs} channels bypass them (partial_ratio={partial_ratio}).'
                )
            transition = ConvNormAct(block_chs, out_chs - bypass_chs, **kwargs)
        last = None
        if merge and fusion != 'last':
            last = ConvNormAct(block_chs + bypass_chs, out_chs, **kwargs)
        elif fusion != 'last' and out_chs != block_chs + bypass_chs:
            raise ValueError(
                f'out_chs={out_chs} cannot be: merge=False leaves {block_chs} channels of the blocks and {bypass_chs} '
                'that bypass them.'
            )
        super().__init__(transform, entry=entry, bypass=around, transition=transition, merge=last)
        self.out_chs = out_chs
