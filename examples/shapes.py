"""Drawn images for the examples, instead of a data set that would have to be downloaded.

:func:`draw_dataset` writes a folder of one shape per image, to classify; :class:`Scenes` has several shapes in each
image, with their boxes to detect and their masks to segment.
"""
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from torchvision.utils import make_grid

from cspnet_timm.files import replaced_file

SIZE = 64
CLASSES = (  # shape, texture, half of the image
    ('disc', 'rows', 'left'), ('disc', 'rows', 'right'), ('disc', 'columns', 'left'), ('disc', 'columns', 'right'),
    ('square', 'rows', 'left'), ('square', 'rows', 'right'), ('square', 'columns', 'left'),
    ('square', 'columns', 'right'), ('triangle', 'rows', None), ('triangle', 'columns', None),
)
OUTLINES = {  # corners on the unit circle around the shape's centre; None for the circle itself
    'disc': None,
    'square': (45, 135, 225, 315),
    'triangle': (270, 30, 150),
}
SHAPES = tuple(OUTLINES)


def draw_figure(
        shape: str,
        texture: str,
        x: float,
        y: float,
        radius: float,
        size: int,
        rng: np.random.Generator,
) -> Tuple[Image.Image, np.ndarray]:
    """Draw a shape, turned by up to ten degrees, and stripes.

    Args:
        shape: A key of :data:`OUTLINES`.
        texture: ``'rows'`` or ``'columns'``, the direction of the stripes.
        x: Centre, from the left.
        y: Centre, from the top.
        radius: Of the shape.
        size: Of the image, on each side.
        rng: What decides on the angle and the stripes.

    Returns:
        The mask of the shape, 255 within, and which of all pixels are on a light stripe, ``(size, size)``.
    """
    mask = Image.new('L', (size, size))
    corners = OUTLINES[shape]
    if corners is None:
        ImageDraw.Draw(mask).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        turn = rng.uniform(-10, 10)
        points = [
            (x + radius * 1.2 * math.cos(math.radians(a + turn)), y + radius * 1.2 * math.sin(math.radians(a + turn)))
            for a in corners
        ]
        ImageDraw.Draw(mask).polygon(points, fill=255)
    period = rng.integers(4, 7)
    along = np.arange(size)[:, None] if texture == 'rows' else np.arange(size)[None]
    return mask, np.broadcast_to((along + rng.integers(period)) % period < period / 2, (size, size))


def draw(shape: str, texture: str, half: Optional[str], rng: np.random.Generator) -> Image.Image:
    """Draw one image: a striped shape before a noisy ground.

    Args:
        shape: A key of :data:`OUTLINES`.
        texture: ``'rows'`` or ``'columns'``, the direction of the stripes.
        half: ``'left'`` or ``'right'``, where the centre is; None for anywhere.
        rng: What decides on size, place, angle and colours.

    Returns:
        The image, :data:`SIZE` pixels on each side.
    """
    radius = rng.uniform(9, 14)
    low, high = {'left': (radius, SIZE / 2 - 4), 'right': (SIZE / 2 + 4, SIZE - radius)}.get(
        half or '', (radius, SIZE - radius))
    x, y = rng.uniform(low, high), rng.uniform(radius, SIZE - radius)
    mask, stripes = draw_figure(shape, texture, x, y, radius, SIZE, rng)
    light, dark, ground = rng.uniform((130, 0, 40), (255, 100, 200), (3, 3)).T
    figure = np.where(stripes[..., None], light, dark)
    image = np.where(np.asarray(mask)[..., None] > 0, figure, ground) + rng.normal(0, 15, (SIZE, SIZE, 3))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def draw_dataset(root: Path, counts: Dict[str, int], seed: int = 0) -> None:
    """Draw a folder of images as timm reads it: ``root/split/class/number.png``.

    Args:
        root: The folder.
        counts: Images per split, the classes in turn.
        seed: Of the drawing; no image of one split is in another.
    """
    for i, (split, count) in enumerate(counts.items()):
        rng = np.random.default_rng([seed, i])
        for n in tqdm(range(count), desc=f'Drawing {split}'):
            label = n % len(CLASSES)
            folder = root / split / f'{label}_{"_".join(filter(None, CLASSES[label]))}'
            folder.mkdir(parents=True, exist_ok=True)
            draw(*CLASSES[label], rng).save(folder / f'{n}.png')


class Scenes(Dataset):
    """Images of one to four striped shapes of any size and place, none before another, on a noisy ground.

    An item is the image, ``(3, size, size)`` from 0 to 1, and its target as torchvision's detectors take it:
    ``boxes``, ``(N, 4)`` of left, top, right and bottom, and ``labels``, ``(N,)``, from 1 in the order of
    :data:`SHAPES`. The target also has the ``mask`` of the labels, ``(size, size)``, 0 for the ground.
    """

    def __init__(self, count: int, size: int = 96, seed: int = 0) -> None:
        """
        Args:
            count: How many images.
            size: Of the images, on each side.
            seed: Of the drawing; no two seeds have an image in common.
        """
        self.items = [self._draw(size, np.random.default_rng([seed, i])) for i in tqdm(range(count), desc='Drawing')]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        return self.items[index]

    @staticmethod
    def _draw(size: int, rng: np.random.Generator) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        image = np.broadcast_to(rng.uniform(40, 200, 3), (size, size, 3))
        labels = np.zeros((size, size), int)
        boxes: List[Any] = []
        names: List[int] = []
        for _ in range(rng.integers(1, 5)):
            radius, label = rng.uniform(0.09, 0.2) * size, int(rng.integers(len(SHAPES)))
            x, y = rng.uniform(radius, size - radius, 2)
            texture = ('rows', 'columns')[rng.integers(2)]
            mask, stripes = draw_figure(SHAPES[label], texture, x, y, radius, size, rng)
            light, dark = rng.uniform((130, 0), (255, 100), (3, 2)).T
            inside = np.asarray(mask) > 0
            if labels[inside].any():  # the place is taken
                continue
            labels[inside] = label + 1
            image = np.where(inside[..., None], np.where(stripes[..., None], light, dark), image)
            boxes.append(mask.getbbox())
            names.append(label + 1)
        image = (image + rng.normal(0, 15, image.shape)).clip(0, 255) / 255
        return torch.tensor(image, dtype=torch.float32).permute(2, 0, 1).contiguous(), {
            'boxes': torch.tensor(boxes, dtype=torch.float32), 'labels': torch.tensor(names),
            'mask': torch.tensor(labels),
        }


def write_images(images: List[torch.Tensor], path: Path, columns: int) -> None:
    """Write images side by side into one file, which appears complete or not at all.

    Args:
        images: Of one size, ``(3, H, W)`` of bytes.
        path: The PNG.
        columns: Images per row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = make_grid(images, columns, padding=4, pad_value=255).permute(1, 2, 0).numpy()
    with replaced_file(path) as temporary:
        Image.fromarray(grid).save(temporary, 'png', optimize=True)
