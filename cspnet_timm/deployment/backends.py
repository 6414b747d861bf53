"""What runs a network: PyTorch itself, its compiler, OpenVINO, ONNX Runtime, and the engine of this package.

A backend is made from a model, which it converts into a form of its own that needs no Python class any more and can be
written to a file. From that it makes runners, for an arrangement of streams and chunks: many maps stay in the cache
when every core has images of its own, and few images at a time.
"""
import abc
import contextlib
import copy
import importlib.util
import io
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, ClassVar, Dict, Iterator, List, Optional, Sequence, Tuple, Type

import safetensors.torch
import torch
import torch.nn as nn

from . import native
from .machine import cpp_compiler, native_precisions
from .quantize import quantize

__all__ = ['BACKENDS', 'Arrangement', 'Backend', 'Runner']

Outputs = List[torch.Tensor]
Runner = Callable[[torch.Tensor], Outputs]

TORCH_TYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


@dataclass(frozen=True)
class Arrangement:
    """How a batch is laid out over the machine.

    Attributes:
        streams: Parts of the batch that are computed at the same time, each on its share of the threads.
        chunk: Images in a part.
    """

    streams: int
    chunk: int

    def __str__(self) -> str:
        return f'{self.streams} × {self.chunk}'


class Backend(abc.ABC):
    """A converted network.

    Attributes:
        name: What users call it.
        searches: Converting is cheap enough, and promising enough, to try other forms of a network.
        runs_code: What it saves is machine code, not data.
    """

    name: ClassVar[str]
    searches: ClassVar[bool] = True
    runs_code: ClassVar[bool] = False

    @classmethod
    def unavailable(cls, device: torch.device) -> Optional[str]:
        """Why it cannot be used on the device, None if it can."""
        return None

    @classmethod
    @abc.abstractmethod
    def precisions(cls, device: torch.device) -> Tuple[str, ...]:
        """The precisions it has on the device."""

    @classmethod
    @abc.abstractmethod
    def convert(
            cls,
            model: nn.Module,
            example: torch.Tensor,
            precision: str,
            calibration: Sequence[torch.Tensor] = (),
    ) -> 'Backend':
        """Convert a model.

        Args:
            model: In eval mode, batch norms folded; it returns a tensor or a list of tensors, in float32.
            example: ``(B, C, H, W)``.
            precision: One of its precisions.
            calibration: Batches ``(B, C, H, W)`` that int8 takes its scales from.
        """

    def arrangements(self, batch: int, threads: int) -> List[Arrangement]:
        """Arrangements worth trying for a batch, the most promising one first."""
        return [Arrangement(1, batch)]

    @abc.abstractmethod
    def runner(self, arrangement: Arrangement, threads: int) -> Runner:
        """A callable from a float32 batch ``(B, C, H, W)`` of any B to the outputs in float32.

        Args:
            arrangement: Streams and chunk.
            threads: Threads that compute.
        """

    @abc.abstractmethod
    def parts(self) -> Dict[str, bytes]:
        """What :meth:`from_parts` needs, by file name."""

    @classmethod
    @abc.abstractmethod
    def from_parts(cls, parts: Dict[str, bytes], precision: str, shape: Sequence[int]) -> 'Backend':
        """Take a converted network from what :meth:`parts` gave.

        Args:
            parts: Contents by file name.
            precision: As it was converted.
            shape: Shape of the example.
        """


def _missing(*libraries: str) -> Optional[str]:
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f'{", ".join(missing)} is not installed: pip install "cspnet-timm[deploy]"'


def _as_list(outputs: Any) -> Outputs:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stream_arrangements(batch: int, threads: int) -> List[Arrangement]:
    """Every thread with images of its own, all at once or a few at a time, and all threads on the whole batch."""
    found = []
    for streams in dict.fromkeys((threads, max(threads // 4, 1), 1)):
        streams = min(streams, batch)
        share = -(-batch // streams)
        for chunk in (share, -(-share // 2)) if streams > 1 else (share,):
            arrangement = Arrangement(streams, chunk)
            if arrangement not in found:
                found.append(arrangement)
    return found


class _Adapted(nn.Module):
    """The model in the precision and memory format of the device's units, float32 in and out."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> Outputs:
        x = x.to(dtype=self.dtype, memory_format=torch.channels_last)
        return [y.float() for y in _as_list(self.model(x))]


def _graphed(call: Runner, x: torch.Tensor) -> Runner:
    """Capture a call on a GPU as a CUDA graph, for inputs of the same shape."""
    static = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # whatever tunes itself does so before the capture
            call(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(static)

    def run(x: torch.Tensor) -> Outputs:
        static.copy_(x)
        graph.replay()
        return [y.clone() for y in outputs]

    return run


class _TorchRunner:
    """Calls a PyTorch callable, on a GPU as one CUDA graph per shape; a fixed batch is filled up."""

    def __init__(self, call: Callable[[torch.Tensor], Any], threads: int, batch: Optional[int]) -> None:
        self.call = call
        self.threads = threads
        self.batch = batch
        self.graphs: Dict[Tuple[int, ...], Runner] = {}

    def _plain(self, x: torch.Tensor) -> Outputs:
        return _as_list(self.call(x))

    def _run(self, x: torch.Tensor) -> Outputs:
        if x.device.type != 'cuda':
            return self._plain(x)
        shape = tuple(x.shape)
        if shape not in self.graphs:
            self.graphs[shape] = _graphed(self._plain, x)
        return self.graphs[shape](x)

    def __call__(self, x: torch.Tensor) -> Outputs:
        with torch.inference_mode(), _torch_threads(self.threads):
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


class Eager(Backend):
    """PyTorch, an operation at a time: channels last, in the precision asked for."""

    name = 'eager'
    searches = False
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
    def convert(
            cls,
            model: nn.Module,
            example: torch.Tensor,
            precision: str,
            calibration: Sequence[torch.Tensor] = (),
    ) -> 'Eager':
        """Copy the model in its precision and memory format."""
        adapted = _Adapted(copy.deepcopy(model), TORCH_TYPES[precision]).eval()

        def program() -> bytes:
            buffer = io.BytesIO()
            torch.export.save(_export(adapted, example, dynamic=True), buffer)
            return buffer.getvalue()

        return cls(adapted, program)

    def runner(self, arrangement: Arrangement, threads: int) -> Runner:
        """The network under ``inference_mode``."""
        return _TorchRunner(self.call, threads, batch=None)

    def parts(self) -> Dict[str, bytes]:
        """The exported program."""
        return {'program.pt2': self.program()}

    @classmethod
    def from_parts(cls, parts: Dict[str, bytes], precision: str, shape: Sequence[int]) -> 'Eager':
        """Load the exported program."""
        program = parts['program.pt2']
        return cls(torch.export.load(io.BytesIO(program)).module(), lambda: program)


def _export(model: nn.Module, example: torch.Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    if dynamic and len(example) == 1:
        example = torch.cat([example, example])  # a size of one would be taken for a constant
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=shapes)


class Inductor(Backend):
    """``torch.compile`` ahead of time: weights frozen and packed, kernels tuned; CUDA graphs on a GPU."""

    name = 'inductor'
    searches = False
    runs_code = True

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
        return Eager.precisions(device)

    @classmethod
    def convert(
            cls,
            model: nn.Module,
            example: torch.Tensor,
            precision: str,
            calibration: Sequence[torch.Tensor] = (),
    ) -> 'Inductor':
        """Export and compile, for the example's batch."""
        adapted = _Adapted(copy.deepcopy(model), TORCH_TYPES[precision]).eval()
        program = _export(adapted, example, dynamic=False)
        with tempfile.TemporaryDirectory(prefix='cspnet-timm-') as folder:
            path = torch._inductor.aoti_compile_and_package(
                program, package_path=str(Path(folder, 'network.pt2')),
                inductor_configs={'freezing': True, 'max_autotune': example.device.type == 'cuda'})
            return cls(Path(path).read_bytes(), len(example))

    def runner(self, arrangement: Arrangement, threads: int) -> Runner:
        """The compiled network."""
        return _TorchRunner(self.call, threads, self.batch)

    def parts(self) -> Dict[str, bytes]:
        """The package."""
        return {'network.pt2': self.package}

    @classmethod
    def from_parts(cls, parts: Dict[str, bytes], precision: str, shape: Sequence[int]) -> 'Inductor':
        """Load the package."""
        return cls(parts['network.pt2'], shape[0])


class OpenVino(Backend):
    """Intel's inference engine, with streams of images that stay on a core of their own."""

    name = 'openvino'

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
        return _missing('openvino')

    @classmethod
    def precisions(cls, device: torch.device) -> Tuple[str, ...]:
        """All that the CPU has."""
        return native_precisions(device)

    @classmethod
    def convert(
            cls,
            model: nn.Module,
            example: torch.Tensor,
            precision: str,
            calibration: Sequence[torch.Tensor] = (),
    ) -> 'OpenVino':
        """Trace and convert; int8 by fake quantisation."""
        import openvino

        if precision == 'int8':
            model = quantize(model, calibration)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter('ignore')  # of the tracer, about sizes that are looked at
            return cls(openvino.convert_model(model, example_input=example[:1]), precision)

    def arrangements(self, batch: int, threads: int) -> List[Arrangement]:
        """Streams with images of their own, and all threads on the batch."""
        return _stream_arrangements(batch, threads)

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
        self.compiled: Dict[Tuple[int, ...], List[Any]] = {}  # requests by streams and the chunk's shape

    def _requests(self, streams: int, shape: Tuple[int, ...]) -> List[Any]:
        import openvino

        key = (streams, *shape)
        if key not in self.compiled:
            model = self.converted.model.clone()
            model.reshape(list(shape))
            half = 'bfloat16' in native_precisions(torch.device('cpu')) and self.converted.precision != 'float32'
            compiled = openvino.Core().compile_model(model, 'CPU', {
                'INFERENCE_PRECISION_HINT': 'bf16' if half else 'f32',
                'NUM_STREAMS': str(streams), 'INFERENCE_NUM_THREADS': str(self.threads),
            })
            self.compiled[key] = [compiled.create_infer_request() for _ in range(2 * streams)]
        return self.compiled[key]

    def __call__(self, x: torch.Tensor) -> Outputs:
        import openvino

        x = x.detach().contiguous()
        streams = min(self.arrangement.streams, len(x))
        chunk = min(self.arrangement.chunk, -(-len(x) // streams))
        images = x.numpy()
        outputs: Outputs = []
        with self.lock:
            running: List[Any] = []
            try:
                for i, start in enumerate(range(0, len(x), chunk)):
                    part = images[start:start + chunk]
                    requests = self._requests(streams, part.shape)
                    if not outputs:
                        outputs = [
                            torch.empty(len(x), *port.shape[1:])
                            for port in requests[0].get_compiled_model().outputs
                        ]
                    request = requests[i % len(requests)]
                    request.wait()
                    request.set_input_tensor(openvino.Tensor(part, shared_memory=True))
                    for j, output in enumerate(outputs):
                        view = output[start:start + chunk].numpy()
                        request.set_output_tensor(j, openvino.Tensor(view, shared_memory=True))
                    request.start_async()
                    running.append(request)
            finally:
                for request in running:
                    request.wait()
        return outputs


class OnnxRuntime(Backend):
    """ONNX Runtime, float32 on the CPU."""

    name = 'onnxruntime'
    searches = False

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
        return _missing('onnx', 'onnxscript', 'onnxruntime')

    @classmethod
    def precisions(cls, device: torch.device) -> Tuple[str, ...]:
        """float32: it has no other convolutions."""
        return ('float32',)

    @classmethod
    def convert(
            cls,
            model: nn.Module,
            example: torch.Tensor,
            precision: str,
            calibration: Sequence[torch.Tensor] = (),
    ) -> 'OnnxRuntime':
        """Export with PyTorch's exporter, for any batch."""
        program = _export(model, example, dynamic=True)
        with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix='cspnet-timm-') as folder:
            warnings.simplefilter('ignore')
            path = Path(folder, 'model.onnx')
            torch.onnx.export(program, (), path, dynamo=True, verbose=False, external_data=False)
            return cls(path.read_bytes())

    def arrangements(self, batch: int, threads: int) -> List[Arrangement]:
        """Streams with images of their own, and all threads on the batch."""
        return _stream_arrangements(batch, threads)

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


class Native(Backend):
    """This package's own engine, for processors with AVX-512: cross stages without copies, cheap activations."""

    name = 'native'
    searches = False  # it has its own forms of a network, and its own arrangement of a batch

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
    def convert(
            cls,
            model: nn.Module,
            example: torch.Tensor,
            precision: str,
            calibration: Sequence[torch.Tensor] = (),
    ) -> 'Native':
        """Read the network's layers; for int8, and what its maps hold."""
        plan = native.lower(model, example)
        return cls(native.calibrate(plan, calibration) if precision == 'int8' else plan)

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


BACKENDS: Dict[str, Type[Backend]] = {b.name: b for b in (Native, OpenVino, OnnxRuntime, Inductor, Eager)}
