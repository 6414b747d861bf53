"""What every backend is: a converted network that makes runners and can be written to a file."""
import abc
import contextlib
import importlib.util
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Dict, Generic, Hashable, Iterator, List, Optional, Sequence, Tuple, TypeVar

import torch
import torch.nn as nn

__all__ = [
    'GPU_FORMS', 'TORCH_TYPES', 'Arrangement', 'Backend', 'Outputs', 'Recent', 'Runner', 'as_list', 'missing',
    'split_batch', 'stream_arrangements', 'torch_threads',
]

Outputs = List[torch.Tensor]
Runner = Callable[[torch.Tensor], Outputs]

TORCH_TYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
GPU_FORMS = ('space_to_depth', 'join_partitions', 'split_merges')
KEPT = 8  # compiled forms of one network that a runner keeps: those of the sizes that it was given last

T = TypeVar('T')


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

    @classmethod
    def parse(cls, text: str) -> 'Arrangement':
        """Read what ``str`` wrote.

        Raises:
            ValueError: If it is something else.
        """
        streams, chunk = (int(n) for n in text.split('×'))
        if not 0 < streams < 1 << 16 or not 0 < chunk < 1 << 16:
            raise ValueError(f'{text!r} is no arrangement of streams and images')
        return cls(streams, chunk)


class Backend(abc.ABC):
    """A converted network.

    It is made from a model in two steps. :meth:`prepare` reads the model, by PyTorch alone and in the process that has
    it; :meth:`finish` hands what was read to the library or the compiler, in any process.

    Attributes:
        name: What users call it.
        runs_code: What it saves is machine code, not data.
        isolated: It compiles machine code that this package has not tested: :meth:`finish` and the first run belong
            in a process of their own.
        on_request: It takes too long to be tried unless it is asked for by name.
        mixes: It can leave a part of an int8 network in a higher precision: :meth:`convert_within`.
        cost: About how many seconds a candidate takes for a hundred convolutions, for what is said of it beforehand.
        imports: Modules that decide while they are imported where they keep what later calls find again: beside the
            system's temporary files, and not in the folder of a candidate, which is removed.
    """

    name: ClassVar[str]
    runs_code: ClassVar[bool] = False
    isolated: ClassVar[bool] = False
    on_request: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    cost: ClassVar[float] = 5.
    imports: ClassVar[Tuple[str, ...]] = ()

    @classmethod
    def unavailable(cls, device: torch.device) -> Optional[str]:
        """Why it cannot be used on the device, None if it can."""
        return None

    @classmethod
    @abc.abstractmethod
    def precisions(cls, device: torch.device) -> Tuple[str, ...]:
        """The precisions it has on the device."""

    @classmethod
    def cost_of(cls, precision: str) -> float:
        """Its cost in a precision."""
        return cls.cost

    @classmethod
    def forms(cls, device: torch.device) -> Tuple[str, ...]:
        """The forms of a network that are cheap and promising enough to be tried on the device."""
        return ()

    @classmethod
    def prepare(
            cls,
            model: nn.Module,
            example: torch.Tensor,
            precision: str,
            calibration: Sequence[torch.Tensor] = (),
    ) -> Dict[str, bytes]:
        """Read a model into files of which the converted network can be made without it.

        Args:
            model: In eval mode, batch norms folded; it returns a tensor or a list of tensors, in float32.
            example: ``(B, C, H, W)``.
            precision: One of its precisions.
            calibration: Batches ``(B, C, H, W)`` that int8 takes its scales from.

        Returns:
            Contents by file name.
        """
        raise NotImplementedError(f'{cls.name} converts in one step.')

    @classmethod
    def finish(cls, prepared: Dict[str, bytes], precision: str, shape: Sequence[int]) -> 'Backend':
        """Convert what :meth:`prepare` gave.

        Args:
            prepared: Contents by file name.
            precision: As it was prepared.
            shape: Shape of the example.
        """
        return cls.from_parts(prepared, precision, shape)

    @classmethod
    def convert(
            cls,
            model: nn.Module,
            example: torch.Tensor,
            precision: str,
            calibration: Sequence[torch.Tensor] = (),
    ) -> 'Backend':
        """Convert a model in this process; the arguments are those of :meth:`prepare`."""
        return cls.finish(cls.prepare(model, example, precision, calibration), precision, example.shape)

    @classmethod
    def convert_within(
            cls,
            model: nn.Module,
            example: torch.Tensor,
            precision: str,
            calibration: Sequence[torch.Tensor],
            error: Callable[['Backend'], float],
            bound: float,
    ) -> 'Backend':
        """Convert a model in this process, as much of it in the precision as an error allows.

        Args:
            model: As for :meth:`prepare`, like the next three.
            example: ``(B, C, H, W)``.
            precision: ``'int8'``.
            calibration: Batches ``(B, C, H, W)``.
            error: Of a converted network.
            bound: What it shall not exceed.

        Returns:
            A network that keeps the bound, or if none does, the one with the least error.
        """
        raise NotImplementedError(f'{cls.name} has one precision for all layers.')

    @property
    def higher(self) -> List[str]:
        """Of an int8 network the modules whose results stay in a higher precision."""
        return []

    def arrangements(self, batch: int, threads: int) -> List[Arrangement]:
        """Arrangements worth trying for a batch, the most promising one first."""
        return [Arrangement(1, batch)]

    @abc.abstractmethod
    def runner(self, arrangement: Arrangement, threads: int) -> Runner:
        """A callable from a float32 batch ``(B, C, H, W)`` of any B to the outputs in float32.

        The outputs are ordinary tensors, which no later call changes, and no number of batch sizes makes the runner
        keep more than a few compiled forms.

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


class Recent(Generic[T]):
    """The few things that were asked for last, made when they are asked for and not there."""

    def __init__(self, make: Callable[..., T], most: int = KEPT) -> None:
        """
        Args:
            make: Makes one of its key.
            most: How many are kept.
        """
        self.make = make
        self.most = most
        self.kept: OrderedDict[Tuple[Hashable, ...], T] = OrderedDict()
        self.lock = threading.RLock()

    def __call__(self, *key: Hashable) -> T:
        """The one of a key."""
        with self.lock:
            if key not in self.kept:
                while len(self.kept) >= self.most:  # before, so that no more than the most are there at a time
                    self.kept.popitem(last=False)
                self.kept[key] = self.make(*key)
            self.kept.move_to_end(key)
            return self.kept[key]


def split_batch(batch: int, arrangement: Arrangement) -> Tuple[int, List[int]]:
    """Cut any batch into parts of few sizes, so that few forms have to be compiled whatever batches come.

    Args:
        batch: Images.
        arrangement: What a batch of the example's size would be cut into.

    Returns:
        How many streams to use, and the images of each part: those of the arrangement or a power of two below.
    """
    def allowed(n: int, most: int) -> int:
        return most if n >= most else 1 << (n.bit_length() - 1)

    streams = allowed(batch, arrangement.streams)
    sizes: List[int] = []
    if streams < arrangement.streams:
        return streams, [1] * batch
    share, left = -(-batch // streams), batch
    while left:
        sizes.append(allowed(min(share, left), arrangement.chunk))
        left -= sizes[-1]
    return streams, sizes


def missing(*libraries: str) -> Optional[str]:
    """Which libraries are not installed, and how to have them; None if all are."""
    names = [name for name in libraries if importlib.util.find_spec(name) is None]
    if not names:
        return None
    return f'{", ".join(names)} is not installed: pip install {" ".join(names)}'


def as_list(outputs: Any) -> Outputs:
    """What a model returns, as a list."""
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch compute with so many threads."""
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stream_arrangements(batch: int, threads: int) -> List[Arrangement]:
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
