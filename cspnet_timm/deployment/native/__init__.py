"""A native inference engine for CPUs with AVX-512: maps and weights in bfloat16 or in bytes.

:func:`lower` reads a network into a :class:`Plan`, which is data and can be kept in a file; :class:`NativeEngine` runs
it. For bytes :func:`calibrate` first looks at what the maps hold.
"""
from .build import has_bfloat16, unavailable
from .calibrate import calibrate
from .correcting import correct
from .engine import NativeEngine
from .lowering import lower
from .mixing import within
from .plan import Plan, UnsupportedNetwork

__all__ = [
    'NativeEngine', 'Plan', 'UnsupportedNetwork', 'calibrate', 'correct', 'has_bfloat16', 'lower', 'unavailable',
    'within',
]
