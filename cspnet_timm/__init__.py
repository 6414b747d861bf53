"""Cross Stage Partial (CSP) backbones for timm.

Installing this package registers its models with timm, and so does importing it: ``timm.list_models('cspnet_*')``.
This module also runs while torch is being imported (see ``autoload``), and then does nothing of the kind.
"""
from typing import TYPE_CHECKING, Any, List

from . import autoload
from .autoload import register

if TYPE_CHECKING:
    from . import hub
    from .backbone import BackboneCfg, CspBackbone, Level, LevelArgs, Neck
    from .cross_stage import ComposedStage, CrossStage
    from .deployment import deploy
    from .neck import BottomUp, CrossingDown, CrossingPaths, CrossingUp, PathAggregation, TopDown

__version__ = '0.1.0'
__all__ = [
    'BackboneCfg', 'BottomUp', 'ComposedStage', 'CrossStage', 'CrossingDown', 'CrossingPaths', 'CrossingUp',
    'CspBackbone', 'Level', 'LevelArgs', 'Neck', 'PathAggregation', 'TopDown', 'deploy', 'hub', 'register',
]

_PUBLIC = {
    'BackboneCfg': 'backbone',
    'BottomUp': 'neck',
    'ComposedStage': 'cross_stage',
    'CrossStage': 'cross_stage',
    'CrossingDown': 'neck',
    'CrossingPaths': 'neck',
    'CrossingUp': 'neck',
    'CspBackbone': 'backbone',
    'Level': 'backbone',
    'LevelArgs': 'backbone',
    'Neck': 'backbone',
    'PathAggregation': 'neck',
    'TopDown': 'neck',
    'deploy': 'deployment',
}
_MODULES = ('hub',)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC and name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    if name in _MODULES:
        return import_module(f'{__name__}.{name}')
    value = getattr(import_module(f'{__name__}.{_PUBLIC[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted(set(globals()) | set(__all__))


# The command registers the models when it needs them, and answers at once where it does not.
if not autoload.torch_is_importing() and not autoload.is_command():
    register()
