"""What ``cspnet-timm features`` does: find images, choose weights, print and draw each level's feature map."""
import os
import re
import sys
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import tqdm
from PIL import Image
from timm.data import create_transform, resolve_data_config

from .families import WEIGHTS
from .feature_image import feature_image
from .files import replaced_file
from .sources import ANSWER_SECONDS, is_offline

__all__ = ['create_extractor', 'draw_features', 'find_images', 'output_paths']

_FEW = 3  # images of which every level is printed, even where they are drawn


def find_images(paths: Sequence[Union[str, Path]]) -> List[Path]:
    """The images that are named, and those in the folders that are named, each once.

    Args:
        paths: Image files, and folders, which are searched with all that is in them for files whose name ends as that
            of an image does.

    Returns:
        The files.

    Raises:
        FileNotFoundError: If something is not there, or there is no image in a folder.
    """
    found: Dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f'{path}: there is no such image or folder.')
        files = [path]
        if path.is_dir():
            endings = Image.registered_extensions()
            files = sorted(f for f in path.rglob('*') if f.suffix.lower() in endings and f.is_file())
            if not files:
                raise FileNotFoundError(f'{path}: there is no image in this folder.')
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def output_paths(images: Sequence[Path], directory: Path, model: str) -> List[Path]:
    """Where the drawing of each image goes: ``NAME.MODEL.png``.

    Images of the same name keep their ending, and those of several folders the part of their folder that tells them
    apart.

    Args:
        images: The images.
        directory: Where to write.
        model: The model's name.

    Returns:
        One path per image, no two of them equal on any file system.
    """
    of_model = re.sub(r'[^\w.-]+', '_', re.sub(r'^(local-dir|hf-hub):/*', '', model))
    if model.startswith('local-dir:'):
        of_model = Path(model.partition(':')[2]).resolve().name
    same: Dict[str, List[int]] = defaultdict(list)
    for i, image in enumerate(images):
        same[image.stem.casefold()].append(i)
    names: List[Path] = [Path(image.stem) for image in images]
    for indices in same.values():
        if len(indices) == 1:
            continue
        full = [images[i].resolve() for i in indices]
        parents = {path.parent for path in full}
        common = Path(os.path.commonpath(parents))
        endings_differ = len({path.name.casefold() for path in full}) == len(full)
        for i, path in zip(indices, full):
            names[i] = Path(path.name) if endings_differ else path.relative_to(common)
    return [directory / name.with_name(f'{name.name}.{of_model}.png') for name in names]


def _has_weights(name: str) -> bool:
    cfg: Any = timm.get_pretrained_cfg(name)
    return f'{cfg.architecture}.{cfg.tag}' in WEIGHTS


def _silent(repo_id: str) -> str:
    """Why a repository's config does not come from the Hub within seconds; '' if it does, or is there already."""
    repo_id, _, revision = repo_id.partition('@')
    if isinstance(try_to_load_from_cache(repo_id, 'config.json', revision=revision or None), str):
        return ''
    if is_offline():
        return 'HF_HUB_OFFLINE is set'
    url = hf_hub_url(repo_id, 'config.json', revision=revision or None)
    host = urlsplit(url).netloc
    why = [f'{host} does not answer within {ANSWER_SECONDS} s']

    def ask() -> None:
        try:
            get_hf_file_metadata(url, timeout=ANSWER_SECONDS)
        except Exception as error:  # of a network, almost anything
            status = getattr(getattr(error, 'response', None), 'status_code', None)
            why[0] = f'{host} answers {status}' if status else f'{host} cannot be reached'
        else:
            why[0] = ''

    # A thread, because looking up a name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return why[0]


def create_extractor(
        name: str,
        file: Optional[Union[str, Path]] = None,
        pretrained: Optional[bool] = None,
) -> Tuple[Any, str]:
    """A model's feature extractor, with the best weights that are at hand.

    Args:
        name: The model, ``'local-dir:FOLDER'`` or ``'hf-hub:USER/NAME'``.
        file: A file with its weights, of any kind that the package reads.
        pretrained: True for the released weights, False for random ones; by default the released ones if they are on
            this machine or a host that has them answers within seconds.

    Returns:
        The extractor, and what weights it has, in a line.

    Raises:
        ValueError: If it cannot be created; the message says why.
    """
    kwargs: Dict[str, Any] = {}
    source, _, place = name.partition(':') if ':' in name else ('', '', '')
    if source == 'local-dir' and not (Path(place) / 'config.json').is_file():
        raise ValueError(f'{name}: there is no config.json in this folder.')
    if source == 'hf-hub' and (silent := _silent(place)):
        raise ValueError(f'{name}: cannot be downloaded, {silent}.')
    if file is not None:
        if not Path(file).is_file():
            raise ValueError(f'--file {file}: there is no such file.')
        kwargs['pretrained_cfg_overlay'] = {'file': str(file)}
    why_random = ''
    if pretrained is False:
        why_random = 'as asked for'
    elif pretrained is None and not source and file is None and not _has_weights(name):
        why_random = f'there are no others for {name}'
    if not why_random:
        try:
            model: Any = timm.create_model(name, pretrained=True, features_only=True, **kwargs)
        except Exception as error:  # of files and networks, almost anything
            message = f'{name}: {" ".join(str(error).split())}'
            if pretrained or source or file is not None:
                raise ValueError(message[:1000]) from error
            why_random = 'the released ones are not at hand, --pretrained says why'
        else:
            cfg = model.pretrained_cfg
            tag = cfg.get('tag')
            of = file or (name if source else f'{cfg["architecture"]}.{tag}' if tag else name)
            return model.eval(), f'weights of {of}'
    torch.manual_seed(0)  # the same random weights every time
    try:
        return timm.create_model(name, features_only=True).eval(), f'random weights: {why_random}'
    except (RuntimeError, ValueError, OSError, TypeError) as error:
        raise ValueError(f'{name}: {" ".join(str(error).split())}') from error


def draw_features(
        model: Any,
        name: str,
        images: Sequence[Path],
        paths: Sequence[Path],
) -> List[Path]:
    """Print each level of each image, and draw its channels that vary most.

    Args:
        model: timm's feature extractor.
        name: What it is called.
        images: The images; one that cannot be read is named on stderr and passed over.
        paths: Where each one's drawing goes; empty to draw none.

    Returns:
        The images that were read.

    Raises:
        ValueError: If the model does not take images of three channels.
        OSError: If a drawing cannot be written.
    """
    infos = model.feature_info.get_dicts()
    config = resolve_data_config({}, model=model)
    if config['input_size'][0] != 3:
        raise ValueError(f'{name}: takes {config["input_size"][0]} channels, and images are read with three.')
    transform = create_transform(**config)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    many = len(images) > _FEW
    done = []
    for i, file in enumerate(tqdm(images, unit='image', disable=not many or not paths)):
        try:
            with Image.open(file) as image:
                x = transform(image.convert('RGB'))
        except Exception as error:  # Pillow raises almost anything on damaged files
            tqdm.write(f'{file}: passed over, it cannot be read as an image ({error}).', file=sys.stderr)
            continue
        done.append(file)
        with torch.no_grad():
            features = [level[0] for level in model(x[None])]
        if not many or not paths:
            print(f'{file}: {name}, input {tuple(x.shape)}')
            for info, level in zip(infos, features):
                print(
                    f'  {info["module"]:<8} stride {info["reduction"]:>2}  channels {info["num_chs"]:>4}  '
                    f'shape {tuple(level.shape)}'
                )
        if paths:
            pixels = ((x * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
            seen = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            paths[i].parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(paths[i]) as temporary:
                feature_image(seen, features, infos).save(temporary, format='PNG')
            if not many:
                print(f'  -> {paths[i]}')
    return done
