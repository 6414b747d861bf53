"""PyTorch's compiler, ahead of time."""
import copy
import importlib.util
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..machine import cpp_compiler, native_precisions
from .base import GPU_FORMS, TORCH_TYPES, Arrangement, Backend, Runner
from .torch_runner import Adapted, TorchRunner, export, load_program, program_bytes

__all__ = ['Inductor', 'InductorTuned']


class Inductor(Backend):
    """``torch.compile`` ahead of time: weights frozen and packed; CUDA graphs on a GPU."""

    name = 'inductor'
    cost = 60.
    runs_code = True
    isolated = True
    imports = ('torch._inductor.codecache',)  # which compiles PyTorch's headers once, longer than a small network takes
    options: ClassVar[Dict[str, Any]] = {'freezing': True}

    def __init__(self, package: bytes, batch: int) -> None:
        """
        Args:
            package: What the compiler wrote.
            batch: The batch that it was compiled for.
        """
        self.package = package
        self.batch = batch
        self.folder = tempfile.TemporaryDirectory(prefix='cspnet-timm-')  # the library is mapped from a file in it
        path = Path(self.folder.name, 'network.pt2')
        path.write_bytes(package)
        self.call = torch._inductor.aoti_load_package(str(path))

    @classmethod
    def unavailable(cls, device: torch.device) -> Optional[str]:
        """It compiles C++ on a CPU, and Triton on a GPU."""
        if device.type == 'cpu' and cpp_compiler() is None:
            return 'there is no C++ compiler (g++ or clang++) on the path'
        if device.type == 'cuda' and importlib.util.find_spec('triton') is None:
            return 'triton is not installed'
        return None

    @classmethod
    def precisions(cls, device: torch.device) -> Tuple[str, ...]:
        """Those of floating point."""
        return tuple(p for p in native_precisions(device) if p in TORCH_TYPES)

    @classmethod
    def forms(cls, device: torch.device) -> Tuple[str, ...]:
        """On a GPU those that read less, and feed the matrix units from the image on; a CPU compiles for too long."""
        return GPU_FORMS if device.type == 'cuda' else ()

    @classmethod
    def prepare(
            cls,
            model: nn.Module,
            example: torch.Tensor,
            precision: str,
            calibration: Sequence[torch.Tensor] = (),
    ) -> Dict[str, bytes]:
        """Export for the example's batch."""
        adapted = Adapted(copy.deepcopy(model), TORCH_TYPES[precision]).eval()
        return {'program.pt2': program_bytes(export(adapted, example, dynamic=False))}

    @classmethod
    def finish(cls, prepared: Dict[str, bytes], precision: str, shape: Sequence[int]) -> 'Inductor':
        """Compile."""
        program = load_program(prepared['program.pt2'])
        with tempfile.TemporaryDirectory(prefix='cspnet-timm-') as folder, torch.no_grad():
            path = torch._inductor.aoti_compile_and_package(
                program, package_path=str(Path(folder, 'network.pt2')), inductor_configs=dict(cls.options))
            return cls(Path(path).read_bytes(), shape[0])

    def runner(self, arrangement: Arrangement, threads: int) -> Runner:
        """The compiled network."""
        return TorchRunner(self.call, threads, self.batch)

    def parts(self) -> Dict[str, bytes]:
        """The package."""
        return {'network.pt2': self.package}

    @classmethod
    def from_parts(cls, parts: Dict[str, bytes], precision: str, shape: Sequence[int]) -> 'Inductor':
        """Load the package."""
        return cls(parts['network.pt2'], shape[0])


class InductorTuned(Inductor):
    """The same with the products tuned: minutes for a network, which paid for none that was measured."""

    name = 'inductor_tuned'
    cost = 600.
    on_request = True
    options = {'freezing': True, 'max_autotune': True}
