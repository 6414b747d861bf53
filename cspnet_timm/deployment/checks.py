"""What is asked before any work is done."""
from typing import Any

import torch

from .backends import BACKENDS
from .machine import describe, native_precisions
from .report import DeployError

__all__ = ['check_input', 'require']


def check_input(name: str, x: Any) -> None:
    """Raise a ValueError, in which it has this name, unless it is a float tensor ``(B, C, H, W)``."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f'{name} must be a tensor (B, C, H, W), not {type(x).__name__}.')
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f'{name} must be a float tensor (B, C, H, W), not {x.dtype} of shape {tuple(x.shape)}.')


def require(backend: str, precision: str, device: torch.device) -> None:
    """Raise a DeployError unless the backend is there, and the device has the precision (any for ``'auto'``)."""
    reason = BACKENDS[backend].unavailable(device)
    if reason is not None:
        raise DeployError(f'backend={backend!r} cannot be used: {reason.rstrip(".")}.')
    if precision == 'auto':
        return
    if precision not in native_precisions(device):
        raise DeployError(
            f'precision={precision!r} cannot be had: this machine ({describe(device)["device"]}) computes in '
            f'{", ".join(native_precisions(device))}.')
    allowed = BACKENDS[backend].precisions(device)
    if precision not in allowed:
        raise DeployError(
            f'precision={precision!r} cannot be had of backend={backend!r}, which computes in {", ".join(allowed)}; '
            f'{", ".join(n for n, b in BACKENDS.items() if precision in b.precisions(device)) or "none"} can.')
