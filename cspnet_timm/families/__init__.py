"""One file per family of networks; importing this package registers all of them with timm.

A file is named after the network, not after this package: timm files models under the last part of the module's name,
and ``timm.list_models(module=…)`` gives all that are filed there, whoever registered them. So a file has a name of
timm's only where its networks are timm's too (``cspnet``, ``cspnext``), which timm's own tests then go through.
"""
import importlib
import pkgutil

from ._builder import WEIGHTS, WeightsInfo

__all__ = ['WEIGHTS', 'WeightsInfo']

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith('_'):
        importlib.import_module(f'{__name__}.{_module.name}')
