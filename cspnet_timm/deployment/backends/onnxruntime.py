"""ONNX Runtime."""
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from .base import Arrangement, Backend, Outputs, Runner, missing, stream_arrangements
from .torch_runner import export, load_program, program_bytes

__all__ = ['OnnxRuntime']


class OnnxRuntime(Backend):
    """ONNX Runtime, float32 on the CPU."""

    name = 'onnxruntime'
    cost = 10.
    isolated = True

    def __init__(self, model: bytes) -> None:
        """
        Args:
            model: The ONNX file.
        """
        self.model = model

    @classmethod
    def unavailable(cls, device: torch.device) -> Optional[str]:
        """It is used on the CPU."""
        if device.type != 'cpu':
            return f'it computes on the CPU, and the model is on {device}'
        return missing('onnx', 'onnxscript', 'onnxruntime')

    @classmethod
    def precisions(cls, device: torch.device) -> Tuple[str, ...]:
        """float32: it has no other convolutions."""
        return ('float32',)

    @classmethod
    def prepare(
            cls,
            model: nn.Module,
            example: torch.Tensor,
            precision: str,
            calibration: Sequence[torch.Tensor] = (),
    ) -> Dict[str, bytes]:
        """Export, for any batch."""
        return {'program.pt2': program_bytes(export(model, example, dynamic=True))}

    @classmethod
    def finish(cls, prepared: Dict[str, bytes], precision: str, shape: Sequence[int]) -> 'OnnxRuntime':
        """Convert with PyTorch's exporter."""
        program = load_program(prepared['program.pt2'])
        with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix='cspnet-timm-') as folder:
            warnings.simplefilter('ignore')
            path = Path(folder, 'model.onnx')
            torch.onnx.export(program, (), path, dynamo=True, verbose=False, external_data=False)
            return cls(path.read_bytes())

    def arrangements(self, batch: int, threads: int) -> List[Arrangement]:
        """Streams with images of their own, and all threads on the batch."""
        return stream_arrangements(batch, threads)

    def runner(self, arrangement: Arrangement, threads: int) -> Runner:
        """A session that several Python threads call."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = max(threads // arrangement.streams, 1)
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(self.model, options, providers=['CPUExecutionProvider'])
        name = session.get_inputs()[0].name
        pool = ThreadPoolExecutor(arrangement.streams)

        def run(x: torch.Tensor) -> Outputs:
            streams = min(arrangement.streams, len(x))
            chunk = min(arrangement.chunk, -(-len(x) // streams))
            parts = [part.contiguous().numpy() for part in x.detach().split(chunk)]
            if len(parts) == 1:
                return [torch.from_numpy(y) for y in session.run(None, {name: parts[0]})]
            results = list(pool.map(lambda part: session.run(None, {name: part}), parts))
            return [torch.cat([torch.from_numpy(y) for y in outputs]) for outputs in zip(*results)]

        return run

    def parts(self) -> Dict[str, bytes]:
        """The ONNX file."""
        return {'model.onnx': self.model}

    @classmethod
    def from_parts(cls, parts: Dict[str, bytes], precision: str, shape: Sequence[int]) -> 'OnnxRuntime':
        """Read the ONNX file."""
        return cls(parts['model.onnx'])
