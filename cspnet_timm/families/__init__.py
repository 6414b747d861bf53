"""One file per family of networks; importing this package registers all of them with timm.

A file is named after the network, not after this package: timm files models under the last part of the module's name.
"""
import importlib
import pkgutil

from ._builder import WEIGHTS, WeightsInfo

__all__ = ['WEIGHTS', 'WeightsInfo']

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith('_'):
        importlib.import_module(f'{__name__}.{_module.name}')
