"""Stem, levels and head: everything that timm and the libraries around it ask of a backbone, written once.

The taps are direct children of the model and have no dots in their names: ``stem``, ``layer1`` … ``layer4``, at strides
2, 4, 8, 16 and 32. What breaks in detection and segmentation libraries without that is told in ``docs/clients.md``.
"""
import functools
import math
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Set, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import ClassifierHead, DropBlock2d, calculate_drop_path_rates, get_device_dtype
from timm.models import checkpoint, named_apply
from timm.models._features import feature_take_indices

from .cross_stage import ComposedStage
from .fitting import fit, tell_left_out
from .layers import ActLayer, NormLayer, bind_norm_layer
from .naming import StateDict
from .shapes import ShapesAlone

__all__ = ['BackboneCfg', 'CspBackbone', 'Level', 'LevelArgs', 'Neck', 'StateDict', 'TakesAnyNames']

OUTPUT_STRIDES = (8, 16, 32)  # and a network's own, where it goes further
MAX_LEVELS = 6


@dataclass(frozen=True)
class LevelArgs:
    """What the backbone tells a level about its surroundings.

    Attributes:
        stride: Stride that the level applies, 1 if ``output_stride`` has replaced it by dilation.
        first_dilation: Dilation of the convolution that would stride.
        dilation: Dilation of every other convolution.
        drop_path: Drop path rate of each residual block.
        drop_block: Creates the level's DropBlock, None if there is none.
        layers: ``act_layer``, ``norm_layer``, ``device`` and ``dtype``, for every layer to be created with.
        act_replaced: Whether ``act_layer`` is the caller's and not the network's.
    """

    stride: int
    first_dilation: int
    dilation: int
    drop_path: Tuple[float, ...]
    drop_block: Optional[Callable[[], nn.Module]]
    layers: Dict[str, Any]
    act_replaced: bool = False

    def layers_with(self, act_layer: ActLayer) -> Dict[str, Any]:
        """As ``layers``, for layers of the network that have another activation than most.

        Args:
            act_layer: Theirs, None if they are linear. It gives way to an activation that the caller asks for; a layer
                without activation stays without.

        Returns:
            Arguments of the layers.
        """
        if act_layer is None or not self.act_replaced:
            return {**self.layers, 'act_layer': act_layer}
        return self.layers

    def block_kwargs(self, index: int) -> Dict[str, Any]:
        """Arguments of the level's block number ``index``: dilation, drop path, DropBlock and the layers' own."""
        return dict(
            dilation=self.dilation, drop_path=self.drop_path[index], drop_block=self.drop_block, **self.layers)


class _DropPathRates(Tuple[float, ...]):
    """The drop path rates of a level's blocks, which know what was asked of them."""

    used: Set[int]

    def __new__(cls, rates: Iterable[float]) -> '_DropPathRates':
        self = super().__new__(cls, rates)  # type: ignore[type-var]
        self.used = set()
        return self

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            if not 0 <= index < len(self):
                raise ValueError(
                    f'Level(depth={len(self)}) has no residual block {index}: depth must count all that it builds.')
            self.used.add(index)
        return super().__getitem__(index)


class _NoDropPath(Tuple[float, ...]):
    """Drop path rates of a neck, whose blocks have no share in the schedule, however many they are."""

    def __getitem__(self, index: Any) -> Any:
        return 0.


@dataclass(frozen=True)
class Level:
    """One tap of a backbone.

    What is said here of the level, so that it is known before the level is built, is compared with what it builds.

    Attributes:
        build: Called with the input's channels and a :class:`LevelArgs`, returns the module.
        out_chs: Channels of the output.
        stride: 2, or 1 for a level that keeps the size.
        depth: Residual blocks in it, which share in the drop path schedule.
    """

    build: Callable[[int, LevelArgs], nn.Module]
    out_chs: int
    stride: int = 2
    depth: int = 0


@dataclass(frozen=True)
class Neck:
    """The pyramid behind a backbone's last levels.

    Attributes:
        build: Called with the channels of the levels that it reads, the finest first, and a :class:`LevelArgs`, returns
            a module such as :class:`~cspnet_timm.neck.PathAggregation`.
        out_chs: Channels of its maps, the finest first, one for each level that it reads.
        act_layer: Activation, the backbone's if None.
    """

    build: Callable[[List[int], LevelArgs], nn.Module]
    out_chs: Tuple[int, ...]
    act_layer: ActLayer = None


@dataclass(frozen=True)
class BackboneCfg:
    """A network as numbers and builders.

    Attributes:
        levels: The stem and the layers behind it.
        neck: What stands behind the last levels and gives their maps; none if None.
        act_layer: Activation.
        norm_layer: Normalisation.
        bn_eps: Epsilon that the released weights were trained with; no state dict carries it.
        bn_momentum: Momentum, as PyTorch counts it.
        head: Called with ``in_features``, ``num_classes``, ``pool_type``, ``drop_rate``, ``device`` and ``dtype`` by
            keyword (and ``act_layer`` and ``norm_layer`` as ``layers`` has them); timm's ``ClassifierHead`` if None.
        convert: Turns a state dict under other key names into one under this model's; returns others as they are.
        file_layout: How files list the model's tensors that name nothing (Darknet's); None if there are no such files.
    """

    levels: Tuple[Level, ...]
    act_layer: ActLayer = 'silu'
    norm_layer: NormLayer = 'batchnorm2d'
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    head: Optional[Callable[..., nn.Module]] = None
    convert: Optional[Callable[[StateDict, nn.Module], StateDict]] = field(default=None, compare=False)
    file_layout: Optional[Any] = field(default=None, compare=False)
    neck: Optional[Neck] = None

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'BackboneCfg':
        return self

    def __getstate__(self) -> Dict[str, Any]:
        # What a pickled model needs of it to load weights. The builders, often functions without a name, stay behind.
        kept = {name: getattr(self, name) for name in ('bn_eps', 'bn_momentum', 'convert')}
        return {**dict.fromkeys(self.__dict__), 'levels': (), **kept, 'head': self.head and nn.Identity}


class Fitted(Dict[str, torch.Tensor]):
    """A state dict that has been compared with the network that it is for."""

    _metadata: Any = None


class TakesAnyNames(nn.Module):
    """A network of this package, or a part of one, that loads weights under any of the names that frameworks give."""

    _is_fitted = False  # while a state dict is loaded that has been compared with the network

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, under this network's names or under any that a framework gives them.

        Args:
            state_dict: The tensors by name, or what a training script has put around them.
            strict: Everything that the network needs has to be there, and no weights may be left over. Counters and
                the like, a neck and a classifier that the network does not have are passed over.
            assign: Take the tensors themselves in place of their values.

        Returns:
            PyTorch's named tuple of missing and unexpected keys.

        Raises:
            CheckpointError: If they are another network's, or not enough; a ``ValueError`` and a ``RuntimeError``.
        """
        own = self.state_dict()
        if not isinstance(state_dict, Fitted) and all(
                isinstance(state_dict[key], torch.Tensor) for key in own if key in state_dict):
            found = fit(state_dict, self)
            found.check(strict)
            tell_left_out(found)
            others = {} if strict else {key: found.native.tensors[key] for key in found.unexpected}
            fitted = Fitted({**found.state_dict(self), **others})
            fitted._metadata = getattr(state_dict, '_metadata', None)
            state_dict = fitted
        self._is_fitted = True
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self._is_fitted = False

    def _load_from_state_dict(self, state_dict: StateDict, prefix: str, *args: Any) -> None:
        # Of a network within another module, whose names are looked through here; what is missing PyTorch reports.
        given = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
        if given and not self._is_fitted and not given.keys() <= self.state_dict().keys():
            found = fit(given, self)
            if found.tensors:
                kept = found.unexpected if found.native.given else []
                for key in given:
                    del state_dict[prefix + key]
                tensors = {**found.state_dict(self), **{key: given[key] for key in kept}}
                state_dict.update({prefix + key: value for key, value in tensors.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


class CspBackbone(TakesAnyNames):
    """A cross stage partial network: classifier, and feature extractor for detection and segmentation.

    With a neck, the maps of the last levels are the neck's, and its coarsest one is what the head reads.

    Input ``(B, in_chans, H, W)``. Level i of ``forward_intermediates`` and of ``features_only`` is
    ``(B, feature_info[i]['num_chs'], H / r, W / r)`` with ``r = feature_info[i]['reduction']``; the logits are
    ``(B, num_classes)``.
    """

    # Names of what pruning has removed of the neck. An annotation would be one of TorchScript's, which has no sets.
    _pruned = frozenset()  # type: Any

    def __init__(
            self,
            cfg: BackboneCfg,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            output_stride: Optional[int] = None,
            act_layer: ActLayer = None,
            norm_layer: NormLayer = None,
            bn_eps: Optional[float] = None,
            bn_momentum: Optional[float] = None,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            drop_block_rate: float = 0.,
            zero_init_last: bool = False,
            device: Optional[Union[torch.device, str]] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        """
        Args:
            cfg: The network.
            in_chans: Channels of the input.
            num_classes: Classes, 0 for the pooled features.
            global_pool: timm's pooling name: ``'avg'``, ``'max'``, ``'avgmax'``, ``'catavgmax'``, or ``''`` for none.
            output_stride: Largest stride, 8, 16 or 32: the levels behind it keep their size and dilate. By default the
                network's own.
            act_layer: Replaces the network's activation, a class or timm's name.
            norm_layer: Replaces the network's normalisation, a class or timm's name.
            bn_eps: Replaces the network's batch norm epsilon.
            bn_momentum: Replaces the network's batch norm momentum.
            drop_rate: Dropout before the classifier.
            drop_path_rate: Stochastic depth: probability that the last block is left out, per sample; it grows linearly
                from block to block, from zero for the first.
            drop_block_rate: DropBlock in the last two levels, as timm's ResNet does it.
            zero_init_last: Start every residual block as the identity.
            device: Where to create the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If ``output_stride`` is none of 8, 16 and 32, or 8 or 16 with a neck, a classifier is asked for
                without pooling, or a level is not what ``cfg`` says of it.
        """
        super().__init__()
        full_stride = math.prod(level.stride for level in cfg.levels)
        if output_stride is None:
            output_stride = full_stride
        elif output_stride not in (*OUTPUT_STRIDES, full_stride):
            *most, last = sorted({*OUTPUT_STRIDES, max(full_stride, 32)})
            raise ValueError(
                f'output_stride={output_stride} does not exist, choose one of {", ".join(map(str, most))} and {last}.')
        if cfg.neck is not None and output_stride != full_stride:
            raise ValueError(
                f'output_stride={output_stride} cannot be with a neck, each level of which is half the size of the one '
                'before it: use the network without the neck.'
            )
        if not 2 <= len(cfg.levels) <= MAX_LEVELS:
            raise ValueError(f'{len(cfg.levels)} levels cannot be built, a backbone has 2 to {MAX_LEVELS}.')
        _check_pooling(num_classes, global_pool)
        dd = {'device': device, 'dtype': dtype}
        self.cfg = cfg
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info = []  # type: List[Dict[str, Any]]

        layers: Dict[str, Any] = dict(
            act_layer=act_layer or cfg.act_layer,
            norm_layer=bind_norm_layer(
                norm_layer or cfg.norm_layer,
                defaults={'eps': cfg.bn_eps, 'momentum': cfg.bn_momentum},
                overrides={'eps': bn_eps, 'momentum': bn_momentum},
            ),
            **dd,
        )
        depths = [level.depth for level in cfg.levels]
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        chs, reduction, dilation = in_chans, 1, 1
        side = max(2 * full_stride, 64)
        probe = torch.empty(1, in_chans, side, side, device='meta', dtype=dtype)
        for i, (level, drop_path) in enumerate(zip(cfg.levels, drop_paths)):
            first_dilation, stride = dilation, level.stride
            if stride > 1 and reduction >= output_stride:
                dilation *= stride
                stride = 1
            args = LevelArgs(
                stride, first_dilation, dilation, _DropPathRates(drop_path),  # type: ignore[arg-type]
                drop_block=_drop_block(drop_block_rate, levels_behind=len(cfg.levels) - 1 - i),
                layers=layers,
                act_replaced=act_layer is not None,
            )
            name = f'layer{i}' if i else 'stem'
            module = level.build(chs, args)
            probe = _check_level(name, level, args, module, probe)
            self.add_module(name, module)
            chs = level.out_chs
            reduction *= stride
            self.feature_info.append(dict(num_chs=chs, reduction=reduction, module=name))

        if cfg.neck is not None:
            levels = self.feature_info[-len(cfg.neck.out_chs):]
            args = LevelArgs(
                1, 1, 1, _NoDropPath(), drop_block=None,
                layers={**layers, 'act_layer': act_layer or cfg.neck.act_layer or cfg.act_layer},
                act_replaced=act_layer is not None,
            )
            self.neck: Any = cfg.neck.build([info['num_chs'] for info in levels], args)
            for i, (info, chs) in enumerate(zip(levels, cfg.neck.out_chs)):
                info.update(num_chs=chs, module=f'neck.outputs.{i}')

        self.num_features = chs
        head_kwargs: Dict[str, Any] = dict(
            in_features=chs, num_classes=num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        if cfg.head is not None:
            head_kwargs.update(act_layer=layers['act_layer'], norm_layer=layers['norm_layer'])
        self.head: Any = (cfg.head or ClassifierHead)(**head_kwargs)
        self.head_hidden_size = self.head.num_features

        named_apply(functools.partial(_init_weights, zero_init_last=zero_init_last), self)

    @torch.jit.ignore
    def levels(self) -> List[nn.Module]:
        """The stem and the layers behind it, those that pruning has left."""
        names = ('stem', *(f'layer{i}' for i in range(1, len(self.feature_info))))
        return [getattr(self, name) for name in names if hasattr(self, name)]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Union[Dict[str, Any], Callable[[str], Tuple[float, ...]]]:
        """Patterns that group the parameters for layer-wise decay.

        Args:
            coarse: One group per level, not per block.

        Returns:
            A matcher as timm's ``group_parameters`` takes it.
        """
        if coarse:
            return dict(stem=r'^stem', blocks=[(r'^layer(\d+)', None), (r'^neck', (MAX_LEVELS,))])
        # Whatever stands in a level before its blocks is of their first group, what stands behind of their last; a
        # second row of blocks counts on from the first.
        ordinals: Dict[str, Tuple[int, int]] = {}
        for i, level in enumerate(self.levels()):
            block, first = 0, 0
            container: Optional[str] = None
            for name, _ in level.named_parameters():
                match = re.match(r'(.*?)\bblocks\.(\d+)\.', name)
                if match:
                    if match[1] != container:
                        first, container = 0 if container is None else block + 1, match[1]
                    block = first + int(match[2])
                module = f'layer{i}' if i else 'stem'
                ordinals[f'{module}.{name}'] = (i, block)
        if hasattr(self, 'neck'):
            # One group for each node of the walks, in the order in which they run.
            nodes: Dict[str, int] = {}
            for name, _ in self.neck.named_parameters():
                node = re.sub(r'(\.\d+)?\..*', r'\1', name)
                ordinals[f'neck.{name}'] = (MAX_LEVELS, nodes.setdefault(node, len(nodes)))

        def group(name: str) -> Tuple[float, ...]:
            ordinal = ordinals.get(name)
            return (float('inf'),) if ordinal is None else (0,) if ordinal[0] == 0 else (1,) + ordinal

        return group

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks and of stages' parts for the backward pass, and compute the rest again.

        Args:
            enable: Turn it on or off.
        """
        self.grad_checkpointing = enable
        for module in self.modules():
            if isinstance(module, ComposedStage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer, which gives the logits."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: New number of classes, 0 for none.
            global_pool: New pooling; None keeps the one there is, ``''`` leaves the feature maps unpooled.

        Raises:
            ValueError: If there are classes, and the pooling passed is ``''``; the model is as it was then.
        """
        if global_pool is not None:  # timm's tests add classes to what was created without pooling
            _check_pooling(num_classes, global_pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Compute the features and the levels' outputs on the way.

        Args:
            x: Images ``(B, in_chans, H, W)``.
            indices: The last n levels if an int, the named ones if a sequence, all if None.
            norm: Without effect, there is no final normalisation.
            stop_early: Stop at the last level that is asked for.
            output_fmt: ``'NCHW'``.
            intermediates_only: Return the list alone.

        Returns:
            The last features and the list of the levels' outputs, or that list alone.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        intermediates: List[torch.Tensor] = []
        if torch.jit.is_scripting():
            outputs = self._scripted_levels(x)
            take_indices, _ = feature_take_indices(len(outputs), indices)
            for i, x in enumerate(outputs):
                if i in take_indices:
                    intermediates.append(x)
        else:
            num_maps = self._num_maps()
            take_indices, max_index = feature_take_indices(num_maps, indices)
            maps = self._maps(x, max_index + 1 if stop_early else num_maps)
            for i, x in enumerate(maps):
                if i in take_indices:
                    intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove what the given levels do not need.

        Args:
            indices: The last n levels if an int, else the levels to keep.
            prune_norm: Without effect, there is no final normalisation.
            prune_head: Remove the head also if the last level stays.

        Returns:
            The levels' indices, counted from the first.
        """
        num_levels, num_maps, first = len(self.levels()), self._num_maps(), self._first_of_neck()
        take_indices, max_index = feature_take_indices(num_maps, indices)
        prune_end = max_index < num_maps - 1
        if max_index >= first:
            whole = {f'neck.{name}' for name in self.neck.state_dict()}
            self.neck.prune([i - first for i in take_indices if i >= first])
            self._pruned |= whole - {f'neck.{name}' for name in self.neck.state_dict()}
        else:
            for i in range(max_index + 1, num_levels):
                delattr(self, f'layer{i}')
            if hasattr(self, 'neck'):
                del self.neck
        self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            # A head with layers of its own would keep them, and they would never get a gradient.
            self.head = ClassifierHead(
                self.num_features, 0, pool_type='', drop_rate=self.drop_rate).train(self.training)
            self.reset_classifier(0, '')
        return take_indices

    def _scripted_levels(self, x: torch.Tensor) -> List[torch.Tensor]:
        # TorchScript cannot look a child up by name, but decides hasattr while it compiles.
        outputs = [self.stem(x)]
        if hasattr(self, 'layer1'):
            outputs.append(self.layer1(outputs[-1]))
        if hasattr(self, 'layer2'):
            outputs.append(self.layer2(outputs[-1]))
        if hasattr(self, 'layer3'):
            outputs.append(self.layer3(outputs[-1]))
        if hasattr(self, 'layer4'):
            outputs.append(self.layer4(outputs[-1]))
        if hasattr(self, 'layer5'):
            outputs.append(self.layer5(outputs[-1]))
        if hasattr(self, 'neck'):
            first = len(outputs) - self.neck.num_levels
            outputs = outputs[:first] + self.neck(outputs[first:])
        return outputs

    @torch.jit.ignore
    def _first_of_neck(self) -> int:
        """Index of the first map that the neck gives, the number of the levels if there is none."""
        num_levels = len(self.levels())
        return num_levels - self.neck.num_levels if hasattr(self, 'neck') else num_levels

    @torch.jit.ignore
    def _num_maps(self) -> int:
        """How many maps there are, of the levels before the neck and of the neck, that pruning has left."""
        return self._first_of_neck() + len(self.neck.outputs) if hasattr(self, 'neck') else len(self.levels())

    @torch.jit.ignore
    def _maps(self, x: torch.Tensor, num: int) -> Iterator[torch.Tensor]:
        """The first maps, one after the other: of the levels before the neck, and of the neck."""
        levels, first = self.levels(), self._first_of_neck()
        with_neck = num > first
        inner: List[torch.Tensor] = []
        for i, level in enumerate(levels if with_neck else levels[:num]):
            x = _checkpointed(level, x) if self.grad_checkpointing else level(x)
            if i < first:
                yield x
            else:
                inner.append(x)
        if with_neck:
            yield from self.neck(inner)[:num - first]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the last level's output.

        Args:
            x: Images ``(B, in_chans, H, W)``.

        Returns:
            Features ``(B, num_features, H', W')``.
        """
        if torch.jit.is_scripting():
            return self._scripted_levels(x)[-1]
        maps = self._maps(x, self._num_maps())
        if not hasattr(self, 'neck'):
            for y in maps:
                x = y
            return x
        *others, x = maps
        if self.training:
            # What gives the other maps alone has no part in this one, but DistributedDataParallel waits for a gradient
            # of every parameter.
            for y in self.neck.apart(others[self._first_of_neck():]):
                x = x + 0. * y.mean()
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify.

        Args:
            x: Features ``(B, num_features, H', W')``.
            pre_logits: Stop before the classifier.

        Returns:
            Logits ``(B, num_classes)``, or ``(B, head_hidden_size)`` before them.
        """
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify images ``(B, in_chans, H, W)``: ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))


def _check_pooling(num_classes: int, global_pool: str) -> None:
    if num_classes > 0 and not global_pool:
        raise ValueError(
            f'global_pool=\'\' gives feature maps, which num_classes={num_classes} cannot classify: '
            'pass num_classes=0, or a pooling such as \'avg\'.'
        )


def _check_level(name: str, level: Level, args: LevelArgs, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compare a level with what is said of it, by its shapes alone, and return what it makes of ``x``."""
    unused = set(range(level.depth)) - args.drop_path.used  # type: ignore[attr-defined]
    if unused:
        raise ValueError(
            f'{name}: Level(depth={level.depth}) has residual blocks that it does not build: {sorted(unused)}.')
    # What ShapesAlone leaves out may have its tensors anywhere: of most levels there are no others.
    tensors = {
        key: torch.empty_like(value, device='meta')
        for prefix, part in module.named_modules() if type(part) not in (nn.Conv2d, nn.BatchNorm2d)
        for key, value in (*part.named_parameters(prefix, recurse=False), *part.named_buffers(prefix, recurse=False))
        if not value.is_meta}
    module.eval()
    with torch.no_grad(), ShapesAlone(convolutions=False):
        y = torch.func.functional_call(module, tensors, (x,)) if tensors else module(x)
    module.train()
    expected = (1, level.out_chs, *(-(-side // args.stride) for side in x.shape[2:]))
    if tuple(y.shape) != expected:
        raise ValueError(
            f'{name}: Level(out_chs={level.out_chs}, stride={level.stride}) makes {expected} of {tuple(x.shape)}, but '
            f'what it builds makes {tuple(y.shape)}.'
        )
    return y


def _checkpointed(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(module, ComposedStage):
        return module(x)  # which checkpoints its parts
    if type(module) is nn.Sequential:
        for child in module:
            x = _checkpointed(child, x)
        return x
    return checkpoint(module, x)


def _drop_block(rate: float, levels_behind: int) -> Optional[Callable[[], nn.Module]]:
    if not rate or levels_behind > 1:
        return None
    block_size, gamma_scale = ((3, 1.), (5, 0.25))[levels_behind]
    return functools.partial(DropBlock2d, drop_prob=rate, block_size=block_size, gamma_scale=gamma_scale)


def _init_weights(module: nn.Module, name: str, zero_init_last: bool = False) -> None:
    if any(p.is_meta for p in module.parameters(recurse=False)):
        return  # there are no values, and to compute none of them takes half the time of creating the network
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, mean=0.0, std=0.01)
        nn.init.zeros_(module.bias)
    elif zero_init_last and hasattr(module, 'zero_init_last'):
        module.zero_init_last()
