"""Vectors of images, for search, clustering and the like: one per image and level, into Parquet files.

    python examples/embed.py images --model cspnet_small --pretrained --out vectors
    python examples/embed.py 'shards/{000..099}.tar' --model cspnet_small --pretrained --out vectors

The input is a folder of images, or a WebDataset: tar files, named one by one or by braces. The output is a folder of
Parquet files, one per ``--rows`` images, with a column ``key`` and one column of float32 vectors per level, the mean of
its feature map. What is written stays: the same command, given again, goes on with the images that are missing. An
image that cannot be read is named and passed over. ``--ray`` spreads the work over the machines of a Ray cluster, or
over this one.

It needs ``pip install pyarrow``, for tar files also ``webdataset``, for ``--ray`` also ``'ray[data]'``.
"""
import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

import numpy as np
import timm
import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from timm.data import create_transform, resolve_data_config

from cspnet_timm.features import find_images
from cspnet_timm.files import replaced_file

ENDINGS = ('jpg', 'jpeg', 'png', 'webp', 'bmp', 'gif', 'tif', 'tiff')
Item = Tuple[str, bytes]


class Embedder:
    """A network, and what makes vectors of encoded images; Ray creates one per process."""

    def __init__(self, options: Dict[str, Any]) -> None:
        """
        Args:
            options: ``model``, ``pretrained``, ``levels`` and ``device``, as the command line has them.
        """
        torch.manual_seed(0)
        self.device = options['device']
        self.model: Any = timm.create_model(
            options['model'], pretrained=options['pretrained'], features_only=True, out_indices=options['levels'])
        self.model.eval().to(self.device)
        self.columns = self.model.feature_info.module_name()
        self.transform = create_transform(**resolve_data_config({}, model=self.model))

    @torch.inference_mode()
    def embed(self, items: Sequence[Item]) -> Tuple[List[str], Dict[str, torch.Tensor]]:
        """Compute the vectors of a batch.

        Args:
            items: Key and encoded image of each.

        Returns:
            The keys of those that could be read, and per level their vectors ``(B, C)``.
        """
        keys, images = [], []
        for key, content in items:
            try:
                with Image.open(io.BytesIO(content)) as image:
                    images.append(self.transform(image.convert('RGB')))
            except Exception as error:  # Pillow raises almost anything on damaged files
                tqdm.write(f'{key}: passed over, it cannot be read as an image ({error}).', file=sys.stderr)
                continue
            keys.append(key)
        if not keys:
            return [], {}
        maps = self.model(torch.stack(images).to(self.device))
        return keys, {name: level.mean((2, 3)).float().cpu() for name, level in zip(self.columns, maps)}

    def __call__(self, batch: Dict[str, Any]) -> Dict[str, Any]:
        """The same for Ray Data: ``key`` and ``bytes`` in, ``key`` and the levels out."""
        keys, vectors = self.embed(list(zip(batch['key'], batch['bytes'])))
        return {'key': keys, **{name: list(vectors[name].numpy()) if keys else [] for name in self.columns}}


def read_folder(folder: Path, done: Set[str]) -> Iterator[Item]:
    """The images of a folder, by their paths in it."""
    for path in find_images([folder]):
        key = path.relative_to(folder).as_posix()
        if key not in done:
            yield key, path.read_bytes()


def read_shards(urls: str, done: Set[str]) -> Iterator[Item]:
    """The images of a WebDataset, by the names that they have in it."""
    try:
        import webdataset
    except ImportError as error:
        raise SystemExit('tar files need webdataset: pip install webdataset') from error
    shards = webdataset.WebDataset(urls, shardshuffle=False, handler=webdataset.warn_and_continue, empty_check=False)
    for sample in shards:
        ending = next((ending for ending in ENDINGS if ending in sample), None)
        if ending is not None and sample['__key__'] not in done:
            yield sample['__key__'], sample[ending]


def batches(items: Iterable[Item], size: int) -> Iterator[List[Item]]:
    """Group what is read."""
    batch: List[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def write(folder: Path, number: int, keys: List[str], vectors: Dict[str, torch.Tensor]) -> None:
    """Write one Parquet file, whole or not at all.

    Args:
        folder: Where to.
        number: Of the file.
        keys: Of the images.
        vectors: Per level ``(B, C)``.
    """
    import pyarrow
    import pyarrow.parquet

    columns: Dict[str, Any] = {'key': pyarrow.array(keys, pyarrow.string())}
    for name, values in vectors.items():
        flat = pyarrow.array(values.flatten().numpy())
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
    with replaced_file(folder / f'{number:06d}.parquet') as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)


def read_done(folder: Path, options: Dict[str, Any]) -> Tuple[Set[str], int]:
    """What an earlier run has left.

    Args:
        folder: The output.
        options: What the vectors are made with; those of an earlier run must be the same.

    Returns:
        The keys that are done, and the number of the next file.
    """
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    about = folder / '_embed.json'  # Parquet's readers pass over names that begin so
    if about.exists() and (before := json.loads(about.read_text())) != options:
        raise SystemExit(f'{folder}: was begun with {before}, and not with {options}: choose another --out')
    with replaced_file(about) as temporary:
        temporary.write_text(json.dumps(options))
    files = sorted(folder.rglob('*.parquet'))
    keys = {key for file in files for key in pyarrow.parquet.read_table(file, columns=['key'])['key'].to_pylist()}
    return keys, 1 + max((int(file.stem) for file in files if file.stem.isdigit()), default=-1)


def embed_here(args: argparse.Namespace, items: Iterable[Item], options: Dict[str, Any], number: int) -> int:
    """Embed in this process; returns how many images."""
    embedder, count = Embedder({**options, 'device': args.device}), 0
    keys: List[str] = []
    parts: List[Dict[str, torch.Tensor]] = []

    def flush() -> None:
        nonlocal keys, parts, number
        if keys:
            write(args.out, number, keys, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
            number, keys, parts = number + 1, [], []

    with tqdm(unit='image') as bar:
        for batch in batches(items, args.batch_size):
            found, vectors = embedder.embed(batch)
            if found:
                keys, count = keys + found, count + len(found)
                parts.append(vectors)
            bar.update(len(batch))
            if len(keys) >= args.rows:
                flush()
    flush()
    return count


def embed_on_ray(args: argparse.Namespace, items: Iterable[Item], options: Dict[str, Any], number: int) -> int:
    """Embed on a Ray cluster, one process per ``--ray``; returns how many images.

    Ray Data schedules, and starts again what a machine has lost; it is fed with ``--rows`` images at a time.
    """
    try:
        import ray
    except ImportError as error:
        raise SystemExit("--ray needs Ray: pip install 'ray[data]'") from error
    count = 0
    on_gpu = args.device.startswith('cuda')
    with tqdm(unit='image') as bar:
        for part in batches(items, args.rows):
            data = ray.data.from_items([{'key': key, 'bytes': content} for key, content in part])
            rows = data.map_batches(
                Embedder, fn_constructor_args=[{**options, 'device': args.device}], batch_size=args.batch_size,
                compute=ray.data.ActorPoolStrategy(size=args.ray), num_gpus=1 if on_gpu else 0).take_all()
            if rows:
                columns = [name for name in rows[0] if name != 'key']
                write(args.out, number, [row['key'] for row in rows], {
                    name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in columns})
            number, count = number + 1, count + len(rows)
            bar.update(len(part))
    return count


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Embed what is missing.

    Args:
        argv: The command line's arguments, by default those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('images', help='a folder of images, or tar files of a WebDataset such as "{000..099}.tar"')
    parser.add_argument('--model', default='cspnet_small', help='also local-dir:FOLDER or hf-hub:USER/NAME')
    parser.add_argument('--pretrained', action='store_true', help='with the model\'s weights')
    parser.add_argument('--levels', type=int, nargs='+', default=[3, 4], help='which levels, from 0 to 4')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--rows', type=int, default=4096, help='images per file, which is written at once')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--ray', type=int, metavar='N', help='N processes of a Ray cluster, one GPU each if there are')
    parser.add_argument('--out', type=Path, default=Path('vectors'), help='folder; what is in it is not done again')
    args = parser.parse_args(argv)
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        parser.exit(1, 'Parquet files need pyarrow: pip install pyarrow\n')

    options = dict(model=args.model, pretrained=args.pretrained, levels=args.levels)
    folder = Path(args.images)
    if not args.images.endswith('.tar') and not folder.is_dir():
        parser.error(f'{args.images} is neither a folder nor tar files')
    done, number = read_done(args.out, options)
    if done:
        print(f'{len(done)} images are done already')
    items = read_folder(folder, done) if folder.is_dir() else read_shards(args.images, done)
    count = (embed_on_ray if args.ray else embed_here)(args, items, options, number)
    print(f'{count} images -> {args.out}')


if __name__ == '__main__':
    main()
