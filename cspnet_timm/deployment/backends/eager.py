"""PyTorch itself, an operation at a time."""
import copy
from typing import Any, Callable, Dict, Sequence, Tuple

import torch
import torch.nn as nn

from ..machine import native_precisions
from .base import GPU_FORMS, TORCH_TYPES, Arrangement, Backend, Runner
from .torch_runner import Adapted, TorchRunner, export, load_program, program_bytes

__all__ = ['Eager']


class Eager(Backend):
    """PyTorch, an operation at a time: channels last, in the precision asked for."""

    name = 'eager'
    cost = 1.
    runs_code = True

    def __init__(self, call: Callable[[torch.Tensor], Any], program: Callable[[], bytes]) -> None:
        """
        Args:
            call: The network.
            program: Gives what is saved.
        """
        self.call = call
        self.program = program

    @classmethod
    def precisions(cls, device: torch.device) -> Tuple[str, ...]:
        """Those of floating point."""
        return tuple(p for p in native_precisions(device) if p in TORCH_TYPES)

    @classmethod
    def forms(cls, device: torch.device) -> Tuple[str, ...]:
        """On a GPU those of the compiler."""
        return GPU_FORMS if device.type == 'cuda' else ()

    @classmethod
    def convert(
            cls,
            model: nn.Module,
            example: torch.Tensor,
            precision: str,
            calibration: Sequence[torch.Tensor] = (),
    ) -> 'Eager':
        """Copy the model in its precision and memory format; it is exported when it is saved, and not before."""
        adapted = Adapted(copy.deepcopy(model), TORCH_TYPES[precision]).eval()
        return cls(adapted, lambda: program_bytes(export(adapted, example, dynamic=True)))

    def runner(self, arrangement: Arrangement, threads: int) -> Runner:
        """The network without gradients."""
        return TorchRunner(self.call, threads, batch=None)

    def parts(self) -> Dict[str, bytes]:
        """The exported program."""
        return {'program.pt2': self.program()}

    @classmethod
    def from_parts(cls, parts: Dict[str, bytes], precision: str, shape: Sequence[int]) -> 'Eager':
        """Load the exported program."""
        program = parts['program.pt2']
        return cls(load_program(program).module(), lambda: program)
