"""``cspnet-timm download`` and ``verify``: a folder of released weights for machines that reach no host."""
import csv
import fnmatch
import io
import re
from collections import Counter
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from .checkpoints import open_checkpoint
from .families import WEIGHTS
from .files import replaced_file
from .sources import FOLDER_VARIABLE, DownloadError, check_file, fetch_into, sha256_of

__all__ = ['LICENSES', 'SUMS', 'download', 'select', 'verify']

SUMS, LICENSES = 'SHA256SUMS', 'licenses.csv'
COPYLEFT = ('agpl-3.0', 'gpl-3.0')


def select(pattern: str) -> List[str]:
    """Names of the weights that a pattern means.

    Args:
        pattern: A name or part of some, or with ``*``, ``?`` or ``[`` a pattern of the model's name or the whole one.

    Returns:
        Names, ``'architecture.tag'``.
    """
    glob = pattern.lower()
    if glob in WEIGHTS:
        return [glob]
    if not any(c in glob for c in '*?['):
        return sorted(name for name in WEIGHTS if glob in name)
    globs = (glob, f'cspnet_{glob}')
    return sorted(
        name for name in WEIGHTS
        if any(fnmatch.fnmatchcase(word, g) for g in globs for word in (name, name.partition('.')[0])))


def _check_container(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    if checkpoint is not None:
        checkpoint.close()


def _read_sums(folder: Path) -> Dict[str, str]:
    """SHA-256 by file name; what is no line of ``sha256sum``, or names a file elsewhere, is an error."""
    path = folder / SUMS
    sums: Dict[str, str] = {}
    if not path.is_file():
        return sums
    for number, line in enumerate(path.read_text(encoding='utf-8', errors='replace').splitlines(), 1):
        match = re.fullmatch(r'([0-9a-f]{64}) [ *]([^/\\\0]+)', line)
        if match is None or match[2] in ('.', '..'):
            raise DownloadError(f'{path}, line {number}: {line[:80]!r} is no SHA-256 and name of a file here.')
        sums[match[2]] = match[1]
    return sums


def _write(folder: Path, sums: Dict[str, str], rows: Dict[Tuple[str, str], List[str]]) -> None:
    with replaced_file(folder / SUMS) as path:
        path.write_text(''.join(f'{digest}  {name}\n' for name, digest in sorted(sums.items())), encoding='utf-8')
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(_HEADER)
    writer.writerows(row for _, row in sorted(rows.items()))
    with replaced_file(folder / LICENSES) as path:
        path.write_text(text.getvalue(), encoding='utf-8')


_HEADER = ['file', 'weights', 'license', 'license_name', 'license_link', 'stated_by', 'source', 'link']


def _row(file: str, name: str) -> List[str]:
    info = WEIGHTS[name]
    return [file, name, info.license, info.terms.name, info.terms.link, info.terms.stated_by, info.source,
            info.sources[0].link]


def _read_rows(folder: Path) -> Dict[Tuple[str, str], List[str]]:
    path = folder / LICENSES
    if not path.is_file():
        return {}
    with path.open(encoding='utf-8', newline='') as file:
        rows = [row for row in csv.reader(file) if len(row) == len(_HEADER)]
    return {(row[0], row[1]): row for row in rows if row != _HEADER}


def _convert(name: str, folder: Path) -> Path:
    """Load weights as users do, and write the model's own tensors."""
    import timm
    from safetensors.torch import save_file

    target = folder / f'{name}.safetensors'
    info = WEIGHTS[name]
    model = timm.create_model(name, pretrained=True)
    metadata = {'format': 'pt', 'weights': name, 'license': info.terms.label, 'source': info.sources[0].link}
    with replaced_file(target) as path:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, metadata)
    return target


def download(pattern: str, folder: Path, converted: bool = False) -> int:
    """Download every set of weights that a pattern means, and say what is done, and what is not.

    What is there is kept if it is what it should be, so that a run goes on where an earlier one ended. After every file
    ``SHA256SUMS`` and ``licenses.csv`` say what the folder holds.

    Args:
        pattern: As for :func:`select`.
        folder: The folder, which is made.
        converted: Write each network's own tensors as ``<name>.safetensors``, in place of the released files.

    Returns:
        How many could not be had.

    Raises:
        DownloadError: If nothing is meant, or the folder's ``SHA256SUMS`` is damaged.
        OSError: If the folder cannot be written.
    """
    names = select(pattern)
    if not names:
        raise DownloadError(f'no weights match {pattern!r}; `cspnet-timm list` shows all.')
    folder.mkdir(parents=True, exist_ok=True)
    sums, rows = _read_sums(folder), _read_rows(folder)
    done, failed, skipped = 0, 0, Counter[str]()
    for name in names:
        info = WEIGHTS[name]
        if not info.downloads:
            why = f'under {info.terms.label}' if info.license in COPYLEFT else 'to be fetched with a browser'
            skipped[why] += 1
            print(f'{name}: not downloaded, {why}: {info.sources[0].link}')
            continue
        own = folder / f'{name}.safetensors'
        for path in {folder / source.local_name(name) for source in info.downloads}:
            if path.name in sums and path.is_file() and sha256_of(path) != sums[path.name]:
                print(f'{path}: has changed since it was downloaded; removed.')
                path.unlink()
        try:
            if not converted:
                path = fetch_into(name, info.sources, folder, info.terms.label, _check_container)
            elif own.is_file() and sums.get(own.name) == sha256_of(own):
                path = own
            else:
                path = _convert(name, folder)
        except (DownloadError, ValueError) as error:
            failed += 1
            answers = [line for line in str(error).splitlines() if line.startswith('- ')]
            print('\n'.join([f'{name}: failed', *(answers or [str(error)])]))
            continue
        file = path.relative_to(folder).as_posix()
        if '/' not in file:  # else a folder that `convert` has made, which has a card
            sums[file] = sha256_of(path)
            rows[file, name] = _row(file, name)
            _write(folder, sums, rows)
        done += 1
        print(f'{name}: {file}, {path.stat().st_size / 1e6:.1f} MB, {info.terms.label}')
    parts = [f'{done} of {len(names)} are in {folder}']
    parts += [f'{count} not downloaded, {why}' for why, count in sorted(skipped.items())]
    parts += [f'{failed} failed'] if failed else []
    print('; '.join(parts) + '.')
    if done:
        print(f'Where they are wanted: {FOLDER_VARIABLE}={folder.resolve()}')
    return failed


def _known(name: str) -> Optional[str]:
    """Of a file's name, the weights that are released under it."""
    return next((tag for tag, info in WEIGHTS.items() if any(
        source.url and source.filename == name for source in info.sources)), None)


def verify(folder: Path) -> int:
    """Compare the files of a folder with its ``SHA256SUMS``, and with what is known of released files; print each.

    Args:
        folder: The folder.

    Returns:
        How many are missing, or other than they should be.

    Raises:
        DownloadError: If there is no such folder, its ``SHA256SUMS`` is damaged, or there is nothing to verify.
    """
    if not folder.is_dir():
        raise DownloadError(f'{folder}: there is no such folder.')
    sums = _read_sums(folder)
    names = sorted({*sums, *(p.name for p in folder.iterdir() if p.is_file() and _known(p.name))})
    if not names:
        raise DownloadError(f'{folder}: has neither {SUMS} nor a file that is named as a released one.')
    bad = 0
    for name in names:
        path, tag = folder / name, _known(name)
        if not path.is_file():
            verdict = 'missing'
        elif name in sums and sha256_of(path) != sums[name]:
            verdict = f'changed: its SHA-256 is not the one in {SUMS}'
        else:
            verdict = _compare(path, tag)
            if not verdict:
                print(f'{name}: ok' + ('' if name in sums else f', though not in {SUMS}'))
                continue
        bad += 1
        print(f'{name}: {verdict}')
    print(f'{len(names) - bad} of {len(names)} files are as they should be.')
    return bad


def _compare(path: Path, tag: Optional[str]) -> str:
    for source in WEIGHTS[tag].sources if tag else ():
        if source.url and source.filename == path.name:
            try:
                check_file(path, source)
            except DownloadError as error:
                return str(error)
    try:
        _check_container(path)
    except ValueError as error:
        return f'cannot be read: {error}'
    return ''
