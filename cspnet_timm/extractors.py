"""What ``features_only=True`` gives: timm's extractors, which take weights under any names as the backbone itself does.

A whole network's file or state dict loads into an extractor of some of its levels: the levels that were left out, and
the head, are passed over.
"""
from typing import Any, Dict, List, Mapping

import torch
import torch.nn as nn
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureListNet

from .backbone import CspBackbone, TakesAnyNames

__all__ = ['DictFeatures', 'GetterFeatures', 'ListFeatures', 'PyramidFeatures', 'PyramidFeaturesDict', 'extractor',
           'network_of']


class _Levels(TakesAnyNames):
    """Some of a network's levels, which keep what they were built from: files are read by it."""

    def __init__(self, model: CspBackbone, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.cfg = model.cfg


class DictFeatures(_Levels, FeatureDictNet):
    """Maps by their number, made as timm's ``FeatureDictNet``. Input ``(B, in_chans, H, W)``."""


class ListFeatures(_Levels, FeatureListNet):
    """A list of maps, made as timm's ``FeatureListNet``. Input ``(B, in_chans, H, W)``."""


class GetterFeatures(FeatureGetterNet):
    """A list of maps by ``forward_intermediates`` of the network, which it keeps as ``model``."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As :meth:`~cspnet_timm.backbone.TakesAnyNames.load_state_dict`, with or without ``model.`` before the names.

        Args:
            state_dict: The tensors.
            strict: As there.
            assign: Likewise.

        Returns:
            PyTorch's named tuple of missing and unexpected keys, those of the network.

        Raises:
            CheckpointError: If they are another network's, or not enough.
        """
        network: Any = self.model
        return network.load_state_dict(state_dict, strict=strict, assign=assign)


class PyramidFeatures(GetterFeatures):
    """timm's extractor for networks whose maps come from other places than a row of children: one with a neck.

    As timm's ``FeatureListNet``, it checkpoints, and can be told by ``return_layers`` to give other maps for a while.

    Input ``(B, in_chans, H, W)``, output a list of maps.
    """

    __jit_unused_properties__ = ['return_layers']

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As :meth:`CspBackbone.set_grad_checkpointing`."""
        self.model.set_grad_checkpointing(enable)

    @property
    def return_layers(self) -> Dict[str, str]:
        """The maps that are given: the names of their modules, and their numbers."""
        names = [info['module'] for info in self.feature_info.info]
        return {names[i]: str(i) for i in self._indices()}

    @return_layers.setter
    def return_layers(self, layers: Dict[str, str]) -> None:
        names = [info['module'] for info in self.feature_info.info]
        self.out_indices = tuple(sorted(names.index(name) for name in layers))

    def _indices(self) -> List[int]:
        indices: Any = self.out_indices
        return list(indices)


class PyramidFeaturesDict(PyramidFeatures):
    """The same as a dict of maps by their number, as timm's ``FeatureDictNet`` has it."""

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Compute the maps."""
        maps = self.model.forward_intermediates(x, indices=self.out_indices, intermediates_only=True)
        return {str(index): y for index, y in zip(self._indices(), maps)}


_CLASSES = {'list': ListFeatures, 'dict': DictFeatures, 'getter': GetterFeatures}
_CLASSES_OF_PYRAMIDS = {'list': PyramidFeatures, 'dict': PyramidFeaturesDict, 'getter': GetterFeatures}


def extractor(feature_cls: Any, has_neck: bool) -> Any:
    """The class for what ``feature_cls`` of ``timm.create_model`` names.

    Args:
        feature_cls: A name or a class.
        has_neck: Whether the network has one.

    Returns:
        A class of this module, or what was given where timm has it alone: its hooks and graphs, which take weights
        under their own names only.
    """
    classes: Dict[Any, Any] = dict(_CLASSES_OF_PYRAMIDS if has_neck else _CLASSES)
    classes.update({FeatureListNet: classes['list'], FeatureDictNet: classes['dict']})
    classes[FeatureGetterNet] = classes['getter']
    return classes.get(feature_cls.lower() if isinstance(feature_cls, str) else feature_cls, feature_cls)


def network_of(model: nn.Module) -> Any:
    """What of a model loads weights under any names: itself, the network in an extractor, or None.

    Args:
        model: Any model.

    Returns:
        A :class:`~cspnet_timm.backbone.TakesAnyNames`.
    """
    model = model.model if isinstance(model, GetterFeatures) else model
    return model if isinstance(model, TakesAnyNames) else None
