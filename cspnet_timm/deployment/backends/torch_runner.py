"""What both backends of PyTorch share: precision, export, and a runner that is one CUDA graph per size on a GPU."""
import contextlib
import io
from typing import Any, Callable, Iterator, Optional

import torch
import torch.nn as nn

from .base import Outputs, Recent, Runner, as_list, torch_threads

__all__ = ['Adapted', 'TorchRunner', 'export', 'load_program', 'program_bytes']


class Adapted(nn.Module):
    """The model in the precision and memory format of the device's units, float32 in and out."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """
        Args:
            model: The model, which is changed.
            dtype: What it computes in.
        """
        super().__init__()
        self.model = model.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> Outputs:
        """Convert, compute, convert back."""
        x = x.to(dtype=self.dtype, memory_format=torch.channels_last)
        return [y.float() for y in as_list(self.model(x))]


def export(model: nn.Module, example: torch.Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    """Export a model, for any batch or for the example's alone."""
    if dynamic and len(example) == 1:
        example = torch.cat([example, example])  # a size of one would be taken for a constant
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=shapes)


def program_bytes(program: torch.export.ExportedProgram) -> bytes:
    """An exported program as a file's content."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def load_program(content: bytes) -> torch.export.ExportedProgram:
    """What :func:`program_bytes` wrote."""
    return torch.export.load(io.BytesIO(content))


@contextlib.contextmanager
def _ordinary() -> Iterator[None]:
    """No gradient, and yet tensors as any other, also where the caller is in ``torch.inference_mode()``."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Graph:
    """A call captured on a GPU as a CUDA graph, for inputs of one shape: conversion, network, conversion back."""

    def __init__(self, call: Runner, x: torch.Tensor) -> None:
        self.static = torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # whatever tunes itself does so before the capture
                call(self.static)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = call(self.static)

    def __call__(self, x: torch.Tensor) -> Outputs:
        self.static.copy_(x)
        self.graph.replay()
        return [y.clone() for y in self.outputs]


class TorchRunner:
    """Calls a PyTorch callable, on a GPU as one CUDA graph per shape; a fixed batch is filled up."""

    def __init__(self, call: Callable[[torch.Tensor], Any], threads: int, batch: Optional[int]) -> None:
        """
        Args:
            call: The network.
            threads: Threads that compute.
            batch: The batch that it takes, None if it takes any.
        """
        self.call = call
        self.threads = threads
        self.batch = batch
        self.graphs: Recent[_Graph] = Recent(self._captured)

    def _captured(self, shape: torch.Size, device: torch.device) -> _Graph:
        return _Graph(self._plain, torch.zeros(shape, device=device))

    def _plain(self, x: torch.Tensor) -> Outputs:
        return as_list(self.call(x))

    def _run(self, x: torch.Tensor) -> Outputs:
        if x.device.type != 'cuda':
            return self._plain(x)
        with self.graphs.lock:  # the graph's memory is one for all callers
            return self.graphs(x.shape, x.device)(x)

    def __call__(self, x: torch.Tensor) -> Outputs:
        """Run any batch."""
        with _ordinary(), torch_threads(self.threads):
            x = x.detach()
            if self.batch is None:
                return self._run(x)
            x = x.contiguous()  # as the example was, which the compiler has taken for granted
            if len(x) == self.batch:
                return self._run(x)
            parts = []
            for part in x.split(self.batch):
                missing = self.batch - len(part)
                if missing:
                    part = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
                parts.append(self._run(part))
            return [torch.cat(outputs)[:len(x)] for outputs in zip(*parts)]
