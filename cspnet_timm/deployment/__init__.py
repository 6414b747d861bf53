"""From a model to the fastest callable on this machine: :func:`deploy`.

``forms`` rewrites a network into others that compute the same, ``quantize`` into one that computes with eight bits,
``backends`` hands it to what runs it, ``machine`` knows what the hardware can do, ``contract`` compares with the model,
``search`` measures and chooses, ``report`` says what was chosen, and ``archive`` keeps it in a file. The modules know
layers and stages, and no family.
"""
from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:
    from .archive import Deployed
    from .report import DeployError, Report
    from .search import deploy

__all__ = ['DeployError', 'Deployed', 'Report', 'deploy']

_PUBLIC = {'DeployError': 'report', 'Deployed': 'archive', 'Report': 'report', 'deploy': 'search'}


def __getattr__(name: str) -> Any:  # a process that only tries a backend does without timm
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    return getattr(import_module(f'{__name__}.{_PUBLIC[name]}'), name)


def __dir__() -> List[str]:
    return sorted(set(globals()) | set(__all__))
