"""This package's own engine."""
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import safetensors.torch
import torch
import torch.nn as nn

from .. import native
from .base import Arrangement, Backend, Runner

__all__ = ['Native']


class Native(Backend):
    """This package's own engine, for processors with AVX-512: cross stages without copies, cheap activations."""

    name = 'native'
    mixes = True
    cost = 3.

    def __init__(self, plan: native.Plan) -> None:
        """
        Args:
            plan: The network as a list of layers; computed in int8 if it has ranges.
        """
        self.plan = plan

    @classmethod
    def unavailable(cls, device: torch.device) -> Optional[str]:
        """It computes on a CPU with AVX-512 and VNNI, and is compiled when it is first used."""
        if device.type != 'cpu':
            return f'it computes on the CPU, and the model is on {device}'
        return native.unavailable()

    @classmethod
    def precisions(cls, device: torch.device) -> Tuple[str, ...]:
        """Bytes, and bfloat16 where the processor multiplies it."""
        return ('bfloat16', 'int8') if native.has_bfloat16() else ('int8',)

    @classmethod
    def cost_of(cls, precision: str) -> float:
        """In int8 weights are fitted."""
        return 20. if precision == 'int8' else cls.cost

    @classmethod
    def convert(
            cls,
            model: nn.Module,
            example: torch.Tensor,
            precision: str,
            calibration: Sequence[torch.Tensor] = (),
    ) -> 'Native':
        """Read the network's layers; for int8 also what its maps hold, and make good what rounding does to them."""
        if precision != 'int8':
            return cls(native.lower(model, example))
        plan = native.calibrate(native.lower(model, example, torch.float32), calibration)
        return cls(native.correct(plan, calibration))

    @classmethod
    def convert_within(
            cls,
            model: nn.Module,
            example: torch.Tensor,
            precision: str,
            calibration: Sequence[torch.Tensor],
            error: Callable[[Backend], float],
            bound: float,
    ) -> 'Native':
        """Leave maps in bfloat16, those that cost most first."""
        plan = native.calibrate(native.lower(model, example, torch.float32), calibration)
        return cls(native.within(plan, calibration, lambda plan: error(cls(plan)), bound))

    @property
    def higher(self) -> List[str]:
        """What the modules of these names give is kept in bfloat16."""
        names = [self.plan.names[v - 1] for v in self.plan.halves if v <= len(self.plan.names)]
        return list(dict.fromkeys(name.removeprefix('model.') for name in names))

    def arrangements(self, batch: int, threads: int) -> List[Arrangement]:
        """The engine's own: a thread takes images, or all take a part of one."""
        streams = min(batch, threads)
        return [Arrangement(streams, -(-batch // streams))]

    def runner(self, arrangement: Arrangement, threads: int) -> Runner:
        """The engine."""
        return native.NativeEngine(self.plan, threads, 'bfloat16' if self.plan.ranges is None else 'int8')

    def parts(self) -> Dict[str, bytes]:
        """The layers, and their weights."""
        description, tensors = self.plan.to_bytes()
        return {'plan.json': description.encode(), 'weights.safetensors': safetensors.torch.save(tensors)}

    @classmethod
    def from_parts(cls, parts: Dict[str, bytes], precision: str, shape: Sequence[int]) -> 'Native':
        """Read the layers, and check them."""
        tensors = safetensors.torch.load(parts['weights.safetensors'])
        return cls(native.Plan.from_bytes(parts['plan.json'].decode(), tensors))
