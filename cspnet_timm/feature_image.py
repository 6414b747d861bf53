"""Images of feature maps: what ``cspnet-timm features`` writes."""
from typing import Any, Dict, List, Sequence

import torch
from PIL import Image, ImageDraw

__all__ = ['feature_image', 'most_varied_channels']

_TILE = 224
_MARGIN = 8
_CAPTION = 30
# Dark blue over green to yellow, as light as the value is large: it survives a grey printer and colour blindness.
_COLOURS = torch.tensor([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])


def _colour(channel: torch.Tensor) -> Image.Image:
    low, high = channel.min(), channel.max()
    position = (channel - low) / (high - low).clamp_min(1e-12) * (len(_COLOURS) - 1)
    index = position.floor().long().clamp(max=len(_COLOURS) - 2)
    part = (position - index)[..., None]
    rgb = _COLOURS[index] * (1 - part) + _COLOURS[index + 1] * part
    return Image.fromarray(rgb.round().to(torch.uint8).numpy())


def most_varied_channels(features: torch.Tensor, count: int) -> List[int]:
    """The channels that vary most over the image, by their standard deviation.

    Args:
        features: One level's feature map ``(C, H, W)``.
        count: How many.

    Returns:
        Their indices, the one that varies most first.
    """
    deviation = features.float().flatten(1).std(dim=1, correction=0)
    return deviation.topk(min(count, len(deviation))).indices.tolist()


def feature_image(
        image: Image.Image,
        features: Sequence[torch.Tensor],
        infos: Sequence[Dict[str, Any]],
        channels_per_side: int = 2,
) -> Image.Image:
    """Draw an image, and beside it the channels of each level that vary most over it.

    Args:
        image: The image as the network sees it.
        features: One feature map ``(C, H, W)`` per level.
        infos: The levels' entries of ``feature_info``.
        channels_per_side: Each level shows the square of this many channels.

    Returns:
        The drawing.
    """
    tiles = [(image.convert('RGB').resize((_TILE, _TILE)), 'input')]
    side = _TILE // channels_per_side
    for level, info in zip(features, infos):
        tile = Image.new('RGB', (_TILE, _TILE), 'white')
        for i, channel in enumerate(most_varied_channels(level, channels_per_side ** 2)):
            small = _colour(level[channel].float().cpu()).resize((side - 2, side - 2), Image.Resampling.NEAREST)
            tile.paste(small, (i % channels_per_side * side + 1, i // channels_per_side * side + 1))
        tiles.append((tile, f'{info["module"]}: stride {info["reduction"]}, {info["num_chs"]} channels'))
    width = _MARGIN + len(tiles) * (_TILE + _MARGIN)
    drawing = Image.new('RGB', (width, _MARGIN + _TILE + _CAPTION), 'white')
    draw = ImageDraw.Draw(drawing)
    for i, (tile, caption) in enumerate(tiles):
        left = _MARGIN + i * (_TILE + _MARGIN)
        drawing.paste(tile, (left, _MARGIN))
        draw.text((left + 2, _MARGIN + _TILE + 8), caption, fill='black')
    return drawing
