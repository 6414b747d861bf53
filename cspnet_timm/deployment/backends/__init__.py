"""What runs a network: PyTorch itself, its compiler, OpenVINO, ONNX Runtime, and the engine of this package.

A backend is made from a model, which it converts into a form of its own that needs no Python class any more and can be
written to a file. From that it makes runners, for an arrangement of streams and chunks: many maps stay in the cache
when every core has images of its own, and few images at a time. ``base`` says what a backend is; each has a file.
"""
from typing import Dict, Type

from .base import TORCH_TYPES, Arrangement, Backend, Runner
from .eager import Eager
from .inductor import Inductor, InductorTuned
from .native import Native
from .onnxruntime import OnnxRuntime
from .openvino import OpenVino

__all__ = ['BACKENDS', 'TORCH_TYPES', 'Arrangement', 'Backend', 'Runner']

BACKENDS: Dict[str, Type[Backend]] = {
    b.name: b for b in (Native, OpenVino, OnnxRuntime, Inductor, InductorTuned, Eager)}
