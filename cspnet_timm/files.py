"""Files and folders that appear complete or not at all."""
import contextlib
import os
import shutil
import stat
import uuid
from pathlib import Path
from typing import Iterator, Union

__all__ = ['replaced_file', 'replaced_folder']


def _beside(path: Path) -> Path:
    """A free name beside the path, of the same kind by its suffix, and not longer than file systems allow."""
    return path.with_name(f'.{path.stem[:32]}.{uuid.uuid4().hex[:8]}{path.suffix[:16]}')


@contextlib.contextmanager
def replaced_file(path: Union[str, Path]) -> Iterator[Path]:
    """Write a file under another name beside its place, and put it there when the block ends without an error.

    A file that is there is replaced in one step and keeps its permissions; a link is followed, and what it points to is
    replaced. What is no regular file, such as ``/dev/stdout``, is written to as it is.

    Args:
        path: The file.

    Yields:
        The name to write to.

    Raises:
        OSError: If it cannot be written; the file is as it was then.
    """
    path = Path(os.path.realpath(Path(path).expanduser()))
    if path.exists() and not path.is_file():
        if path.is_dir():
            raise IsADirectoryError(f'{path} is a folder, not a file.')
        yield path
        return
    temporary = _beside(path)
    try:
        yield temporary
        if path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(path: Union[str, Path], overwrite: bool = False) -> Iterator[Path]:
    """Fill a folder under another name beside its place, and put it there when the block ends without an error.

    Args:
        path: The folder.
        overwrite: Replace one that is there and not empty; it is put back if its place cannot be taken.

    Yields:
        The new and empty folder to fill.

    Raises:
        OSError: If it cannot be written, or there is a folder that is not empty, be it only by then; what was there is
            as it was.
    """
    path = Path(os.path.realpath(Path(path).expanduser()))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f'{path} is a file, not a folder.')
    temporary, previous = _beside(path), _beside(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()  # not every system renames onto an empty folder
        if path.exists():
            if not overwrite:
                raise FileExistsError(f'{path} is not empty.')
            path.rename(previous)
        try:
            temporary.rename(path)
        except OSError:
            if previous.exists():
                previous.rename(path)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
