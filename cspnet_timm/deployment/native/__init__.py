"""A native inference engine for CPUs with AMX: maps and weights in bfloat16 or in bytes.

:func:`lower` reads a network into a :class:`Plan`, which is data and can be kept in a file; :class:`NativeEngine` runs
it. For bytes :func:`calibrate` first looks at what the maps hold.
"""
from .build import unavailable
from .calibrate import calibrate
from .engine import NativeEngine
from .lowering import lower
from .plan import Plan, UnsupportedNetwork

__all__ = ['NativeEngine', 'Plan', 'UnsupportedNetwork', 'calibrate', 'lower', 'unavailable']
