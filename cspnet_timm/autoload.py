"""Registers the models when timm is imported, so that nobody has to import this package.

torch loads the entry points of the group ``torch.backends`` at the end of ``import torch``, and this package has one
there: :func:`install`. It puts a hook on the import of ``timm.models`` that imports :mod:`cspnet_timm.families` once
timm's own models are there. Whatever goes wrong in between becomes one warning; ``import torch`` and ``import timm``
never fail for it. ``CSPNET_TIMM_AUTOLOAD=0`` turns the entry point off; ``import cspnet_timm`` works regardless.

This module runs while torch is only half imported, in every process that uses torch: the standard library's cheapest
modules are all it may import.
"""
import os
import sys

__all__ = ['install', 'register']

_PACKAGE = __name__.partition('.')[0]
_TARGET = 'timm.models'

TYPE_CHECKING = False  # as typing's, which costs time to import
if TYPE_CHECKING:
    from typing import Any, Optional, Sequence


def register() -> None:
    """Register every model of this package with timm, now; importing the package does it by itself.

    Raises:
        ImportError: If timm, or something that the models need of it, is missing.
    """
    from importlib import import_module

    # timm first, and whole: were it imported from within a module of this package, its hook would import that module
    # half-made.
    import_module(_TARGET)
    import_module(f'{_PACKAGE}.families')


def install() -> None:
    """Entry point that torch calls at the end of its own import: have the models registered along with timm's."""
    try:
        disabled = os.environ.get('CSPNET_TIMM_AUTOLOAD', '1').strip().lower() in ('0', 'false', 'no', 'off')
        if not disabled and f'{_PACKAGE}.families' not in sys.modules and not _watching():
            sys.meta_path.insert(0, _Finder())
        if _is_loaded(_PACKAGE) and not is_command():
            # torch has imported the package to get here, which has registered nothing. Forget it, so that the user's
            # own import of it runs, and does.
            for name in [m for m in sys.modules if m == _PACKAGE or m.startswith(f'{_PACKAGE}.')]:
                del sys.modules[name]
    except Exception as error:  # torch would turn it into a failure of `import torch`
        _warn(error)


def torch_is_importing() -> bool:
    """Whether this code runs within ``import torch``, as the entry point does."""
    return 'torch' in sys.modules and not _is_loaded('torch')


def is_command() -> bool:
    """Whether this process is the package's own command, ``cspnet-timm`` or ``python -m cspnet_timm``."""
    program = (getattr(sys, 'argv', None) or [''])[0]
    if program == '-m':  # as it is until Python has found what to run
        return _PACKAGE in sys.orig_argv
    return os.path.basename(program).startswith('cspnet-timm')


def _is_loaded(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, '__spec__', None), '_initializing', False)


def _watching() -> bool:
    return any(getattr(finder, 'cspnet_timm_hook', False) for finder in sys.meta_path)


def _warn(error: BaseException) -> None:
    import warnings

    message = (
        f'cspnet_timm: its models are not registered with timm ({type(error).__name__}: {error}). '
        'Set CSPNET_TIMM_AUTOLOAD=0 to silence this.'
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings are errors here, and an error is what must not come of this
        sys.stderr.write(f'{message}\n')


class _Finder:
    """Finds ``timm.models`` as the other finders do, and has the models registered once it has been executed."""

    cspnet_timm_hook = True

    def find_spec(self, name: str, path: 'Optional[Sequence[str]]' = None, target: 'Any' = None) -> 'Any':
        if name != _TARGET:
            return None
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, 'find_spec', None)
            spec = find_spec(name, path, target) if finder is not self and find_spec is not None else None
            if spec is not None:
                self._hook(spec.loader)
                return spec
        return None

    def _hook(self, loader: 'Any') -> None:
        try:
            execute = loader.exec_module

            def exec_module(module: 'Any') -> None:
                execute(module)
                if module.__name__ == _TARGET:
                    self._loaded()

            # On the loader found, so that the spec keeps a loader of its own kind: pickling, reloading, inspection
            # and resources go on as if there were no hook.
            loader.exec_module = exec_module
        except Exception as error:
            _warn(error)

    def _loaded(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            try:
                register()
            except Exception as error:
                _warn(error)
