"""A native inference engine for CPUs with AMX: maps and weights in bfloat16, sums in float32.

:func:`lower` reads a network into a :class:`Plan`, which is data and can be kept in a file; :class:`NativeEngine` runs
it.
"""
from .build import unavailable
from .engine import NativeEngine
from .lowering import lower
from .plan import Plan, UnsupportedNetwork

__all__ = ['NativeEngine', 'Plan', 'UnsupportedNetwork', 'lower', 'unavailable']
