"""Intel's inference engine."""
import io
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..machine import native_precisions
from ..quantize import quantize
from .base import Arrangement, Backend, Outputs, Recent, missing, split_batch, stream_arrangements

__all__ = ['OpenVino']


class OpenVino(Backend):
    """Intel's inference engine, with streams of images that stay on a core of their own."""

    name = 'openvino'
    cost = 5.
    isolated = True

    def __init__(self, model: Any, precision: str) -> None:
        """
        Args:
            model: An ``openvino.Model`` of dynamic batch, height and width.
            precision: What it shall compute in.
        """
        self.model = model
        self.precision = precision

    @classmethod
    def unavailable(cls, device: torch.device) -> Optional[str]:
        """It computes on the CPU."""
        if device.type != 'cpu':
            return f'it computes on the CPU, and the model is on {device}'
        return missing('openvino')

    @classmethod
    def precisions(cls, device: torch.device) -> Tuple[str, ...]:
        """All that the CPU has."""
        return native_precisions(device)

    @classmethod
    def forms(cls, device: torch.device) -> Tuple[str, ...]:
        """Those that spare it reading, and fill matrix units."""
        return ('regroup', 'join_partitions', 'split_merges')

    @classmethod
    def prepare(
            cls,
            model: nn.Module,
            example: torch.Tensor,
            precision: str,
            calibration: Sequence[torch.Tensor] = (),
    ) -> Dict[str, bytes]:
        """Trace; int8 by fake quantisation."""
        if precision == 'int8':
            model = quantize(model, calibration)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter('ignore')  # of the tracer, about sizes that are looked at
            traced = torch.jit.trace(model, example[:1], check_trace=False, strict=False)
            buffer = io.BytesIO()
            torch.jit.save(traced, buffer)
        return {'traced.pt': buffer.getvalue()}

    @classmethod
    def finish(cls, prepared: Dict[str, bytes], precision: str, shape: Sequence[int]) -> 'OpenVino':
        """Convert the traced network."""
        import openvino

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter('ignore')
            traced = torch.jit.load(io.BytesIO(prepared['traced.pt']))
            return cls(openvino.convert_model(traced, example_input=torch.zeros(1, *shape[1:])), precision)

    def arrangements(self, batch: int, threads: int) -> List[Arrangement]:
        """Streams with images of their own, and all threads on the batch."""
        return stream_arrangements(batch, threads)

    def runner(self, arrangement: Arrangement, threads: int) -> '_OpenVinoRunner':
        """Compile for the chunks of the arrangement, for others when they come."""
        return _OpenVinoRunner(self, arrangement, threads)

    def parts(self) -> Dict[str, bytes]:
        """OpenVINO's own two files."""
        import openvino

        with tempfile.TemporaryDirectory(prefix='cspnet-timm-') as folder:
            openvino.serialize(self.model, str(Path(folder, 'model.xml')))
            return {name: Path(folder, name).read_bytes() for name in ('model.xml', 'model.bin')}

    @classmethod
    def from_parts(cls, parts: Dict[str, bytes], precision: str, shape: Sequence[int]) -> 'OpenVino':
        """Read the two files."""
        import numpy as np
        import openvino

        weights = openvino.Tensor(np.frombuffer(parts['model.bin'], np.uint8))
        return cls(openvino.Core().read_model(model=parts['model.xml'], weights=weights), precision)


class _OpenVinoRunner:
    def __init__(self, converted: OpenVino, arrangement: Arrangement, threads: int) -> None:
        self.converted = converted
        self.arrangement = arrangement
        self.threads = threads
        self.lock = threading.Lock()
        self.compiled: Recent[List[Any]] = Recent(self._requests)  # requests by streams and the chunk's shape

    def _requests(self, streams: int, shape: Tuple[int, ...]) -> List[Any]:
        import openvino

        model = self.converted.model.clone()
        model.reshape(list(shape))
        half = 'bfloat16' in native_precisions(torch.device('cpu')) and self.converted.precision != 'float32'
        compiled = openvino.Core().compile_model(model, 'CPU', {
            'INFERENCE_PRECISION_HINT': 'bf16' if half else 'f32',
            'NUM_STREAMS': str(streams), 'INFERENCE_NUM_THREADS': str(self.threads),
        })
        return [compiled.create_infer_request() for _ in range(2 * streams)]

    def __call__(self, x: torch.Tensor) -> Outputs:
        import openvino

        images = x.detach().contiguous().numpy()
        streams, sizes = split_batch(len(x), self.arrangement)
        outputs: Outputs = []
        running: Dict[int, List[Any]] = {}  # by a part's images: requests in the order in which they were started
        start = 0
        with self.lock:
            try:
                for size in sizes:
                    part = images[start:start + size]
                    requests = self.compiled(streams, part.shape)
                    if not outputs:
                        outputs = [
                            torch.empty(len(x), *port.shape[1:])
                            for port in requests[0].get_compiled_model().outputs
                        ]
                    started = running.setdefault(size, [])
                    request = requests[len(started) % len(requests)]
                    request.wait()
                    request.set_input_tensor(openvino.Tensor(part, shared_memory=True))
                    for j, output in enumerate(outputs):
                        view = output[start:start + size].numpy()
                        request.set_output_tensor(j, openvino.Tensor(view, shared_memory=True))
                    request.start_async()
                    started.append(request)
                    start += size
            finally:
                for started in running.values():
                    for request in started:
                        request.wait()
        return outputs
