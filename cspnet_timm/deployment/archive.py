"""A deployed network: calling it, writing it into one file, reading that file with suspicion."""
import json
import math
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, NoReturn, Optional, Tuple, Union

import torch

from ..files import replaced_file
from .backends import BACKENDS, Arrangement, Backend, Runner
from .checks import check_input, require
from .machine import PRECISIONS
from .report import DeployError, Report, first_line

__all__ = ['Deployed']

FORMAT = 1


class Deployed:
    """A network made ready to run; called like the model that it was made from.

    Input ``(B, C, H, W)`` of any B, with C, H and W of the example; the output is the model's, a tensor or a list of
    tensors, in float32. It is for inference: nothing has a gradient.

    Attributes:
        report: What was chosen, and what was measured.
    """

    def __init__(self, converted: Backend, runner: Runner, report: Report, single: bool, device: torch.device) -> None:
        """
        Args:
            converted: The network as its backend has it.
            runner: What runs it.
            report: What was measured.
            single: The model returns a tensor, not a list.
            device: Where the input has to be.
        """
        self.report = report
        self.device = device
        self._converted = converted
        self._runner = runner
        self._single = single

    def __call__(self, x: torch.Tensor) -> Union[torch.Tensor, List[torch.Tensor]]:
        """Run the network.

        Args:
            x: Images ``(B, C, H, W)``, in floating point.

        Returns:
            What the model returns.

        Raises:
            ValueError: If the input has another shape than the example but for its batch, or is elsewhere.
        """
        check_input('The input', x)
        expected = tuple(self.report.shape[1:])
        if tuple(x.shape[1:]) != expected or not len(x):
            raise ValueError(
                f'The input has the shape {tuple(x.shape)}, but this network was deployed for (B, '
                f'{", ".join(map(str, expected))}) with any B of at least 1; deploy it again for another size.')
        if x.device.type != self.device.type:
            raise ValueError(f'The input is on {x.device}, but this network was deployed for {self.device}.')
        outputs = _apart_from(x, self._runner(x.float()))
        return outputs[0] if self._single else outputs

    def __repr__(self) -> str:
        """The report."""
        return f'Deployed({self.report})'

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse ``copy`` and ``pickle``: what runs the network has threads, and memory of its own.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f'A network deployed to {self.report.backend!r} cannot be copied or pickled, it has threads and memory of '
            'its own: write it with .save(path), and read that with deploy.load(path), in this process or another.')

    def save(self, path: Union[str, Path]) -> None:
        """Write everything into one file, from which :meth:`load` starts without a model and without tracing.

        Args:
            path: The file; one that exists is replaced when the new one is whole.
        """
        meta = dict(format=FORMAT, single=self._single, device=self.device.type, report=asdict(self.report))
        with replaced_file(path) as temporary, zipfile.ZipFile(temporary, 'w', zipfile.ZIP_STORED) as archive:
            archive.writestr('deploy.json', json.dumps(meta, indent=1))
            for name, content in self._converted.parts().items():
                archive.writestr(name, content)

    @staticmethod
    def load(
            path: Union[str, Path],
            *,
            threads: Optional[int] = None,
            allow_code: bool = False,
    ) -> 'Deployed':
        """Load what :meth:`save` wrote.

        Args:
            path: The file.
            threads: Threads that compute, by default as many as it was deployed for, but no more than there are.
            allow_code: Also load a file that holds machine code or a program of PyTorch's, which runs as you. Only for
                files that you made yourself; those of the other backends hold none.

        Returns:
            The network; its ``report`` tells of the machine that it was measured on.

        Raises:
            DeployError: If the file is damaged, holds code that is not allowed, or needs a library or an arithmetic
                that is not there.
            FileNotFoundError: If there is no such file.
        """
        meta, parts = _read(Path(path))
        report = meta['report']
        backend = BACKENDS[report.backend]
        device = torch.device(meta['device'])
        if backend.runs_code and not allow_code:
            raise DeployError(
                f'{path}: holds a program of the backend {report.backend!r}, which runs as you. If you made the file '
                'yourself, pass allow_code=True; files of the backends '
                f'{" and ".join(repr(n) for n, b in BACKENDS.items() if not b.runs_code)} are data alone.')
        require(report.backend, report.precision, device)
        threads = threads or min(report.threads, torch.get_num_threads())
        try:
            converted = backend.from_parts(parts, report.precision, report.shape)
            runner = converted.runner(Arrangement.parse(report.arrangement), threads)
            deployed = Deployed(converted, runner, report, meta['single'], device)
            deployed(torch.zeros(report.shape, device=device))
        except Exception as error:  # each library has its own
            raise DeployError(f'{path}: {report.backend} cannot load it: {first_line(error)}') from error
        return deployed


def _apart_from(x: torch.Tensor, outputs: List[torch.Tensor]) -> List[torch.Tensor]:
    """The outputs, each with memory of its own, also where the network returns its input, or one map twice."""
    taken = {x.untyped_storage().data_ptr()}
    found = []
    for y in outputs:
        place = y.untyped_storage().data_ptr()
        found.append(y.clone() if place in taken else y)
        taken.add(place)
    return found


def _read(path: Path) -> Tuple[Dict[str, Any], Dict[str, bytes]]:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            for info in infos:
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
                    raise DeployError(f'{path}: the entry {info.filename!r} is compressed or larger than the file.')
            if sum(info.file_size for info in infos) > size:
                raise DeployError(f'{path}: its entries are larger together than the file of {size} bytes.')
            parts = {info.filename: archive.read(info) for info in infos}  # read whole, and its checksum compared
        meta = json.loads(parts.pop('deploy.json'))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError) as error:
        raise DeployError(f'{path}: is no file that Deployed.save wrote, or is damaged: {error}') from error
    version = meta.get('format') if isinstance(meta, dict) else None
    if version != FORMAT:
        raise DeployError(f'{path}: has the format {version!r}, this version of cspnet_timm reads {FORMAT}.')
    try:
        report = Report(**meta['report'])
        valid = (
            report.backend in BACKENDS and report.precision in PRECISIONS and meta['device'] in ('cpu', 'cuda')
            and isinstance(meta['single'], bool) and isinstance(report.threads, int) and 0 < report.threads < 1 << 16
            and len(report.shape) == 4 and all(isinstance(n, int) and 0 < n < 1 << 16 for n in report.shape)
            and math.prod(report.shape) < 1 << 31
            and all(isinstance(n, (int, float)) for n in (report.milliseconds, report.original_milliseconds))
            and isinstance(report.forms, list) and all(isinstance(form, str) for form in report.forms)
            and isinstance(report.differences, list) and report.differences
            and all(isinstance(d, (int, float)) for d in report.differences)
            and isinstance(report.higher, list) and all(isinstance(name, str) for name in report.higher)
            and isinstance(report.held_back, int)
        )
        Arrangement.parse(report.arrangement)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeployError(f'{path}: its description is damaged: {error!r}') from error
    if not valid:
        raise DeployError(
            f'{path}: its description is not valid: backend {report.backend!r}, precision {report.precision!r}, shape '
            f'{report.shape!r}, {report.threads!r} threads, device {meta["device"]!r}.')
    return {**meta, 'report': report}, parts
