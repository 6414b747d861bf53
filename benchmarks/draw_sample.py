"""Draws ``docs/sample.jpg``, the street scene that README and tests use: ``python benchmarks/draw_sample.py``."""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 640, 480
HORIZON = 260


def _gradient(top: tuple, bottom: tuple, height: int) -> np.ndarray:
    ramp = np.linspace(0, 1, height)[:, None, None]
    return np.broadcast_to(np.array(top) * (1 - ramp) + np.array(bottom) * ramp, (height, WIDTH, 3))


def _tree(draw: ImageDraw.ImageDraw, x: int, base: int, size: int, rng: np.random.Generator) -> None:
    draw.rectangle((x - size // 12, base - size, x + size // 12, base), fill=(92, 64, 42))
    for _ in range(60):
        dx, dy = rng.normal(0, size / 4.5, 2)
        r = rng.uniform(size / 14, size / 7)
        green = int(rng.uniform(80, 150))
        cx, cy = x + dx, base - size * 1.15 + dy
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=(green // 3, green, green // 4))


def _car(draw: ImageDraw.ImageDraw, x: int, y: int, size: int, colour: tuple) -> None:
    h = size // 4
    draw.ellipse((x - 4, y - 4, x + size + 4, y + h // 2), fill=(40, 40, 44))
    draw.rounded_rectangle((x, y - h, x + size, y), h // 4, fill=colour)
    roof = [(x + size * .18, y - h), (x + size * .3, y - 2 * h), (x + size * .7, y - 2 * h), (x + size * .86, y - h)]
    draw.polygon(roof, fill=colour)
    draw.polygon([(a + (6 if i < 2 else -6), b + (4 if i in (1, 2) else 0)) for i, (a, b) in enumerate(roof)],
                 fill=(170, 205, 225))
    draw.line((x + size * .5, y - 2 * h, x + size * .5, y - h), fill=colour, width=4)
    for wheel in (.22, .78):
        cx, r = x + size * wheel, h * .42
        draw.ellipse((cx - r, y - r, cx + r, y + r), fill=(25, 25, 25))
        draw.ellipse((cx - r / 2, y - r / 2, cx + r / 2, y + r / 2), fill=(180, 180, 185))


def _house(draw: ImageDraw.ImageDraw, x: int, width: int, height: int, wall: tuple, roof: tuple) -> None:
    top, base = HORIZON + 40 - height, HORIZON + 40
    draw.rectangle((x, top, x + width, base), fill=wall)
    for row in range(top + 6, base, 8):
        draw.line((x, row, x + width, row), fill=tuple(c - 12 for c in wall))
    draw.polygon([(x - 12, top), (x + width // 2, top - height // 2), (x + width + 12, top)], fill=roof)
    for i in range(3):
        for j in range(height // 60):
            left, upper = x + width * (2 * i + 1) // 7, top + 16 + 52 * j
            right, lower, middle = left + width // 7, upper + 30, left + width // 14
            draw.rectangle((left, upper, right, lower), fill=(225, 235, 200), outline=(70, 60, 60), width=2)
            draw.line((middle, upper, middle, lower), fill=(70, 60, 60), width=2)


def draw() -> Image.Image:
    """Draw the scene; the same every time."""
    rng = np.random.default_rng(0)
    sky = _gradient((96, 150, 220), (210, 228, 240), HORIZON)
    ground = _gradient((120, 140, 84), (88, 112, 60), HEIGHT - HORIZON)
    image = Image.fromarray(np.concatenate([sky, ground]).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    pen.ellipse((520, 30, 580, 90), fill=(255, 240, 180))
    for cx, cy in ((120, 70), (330, 50), (430, 120)):
        for _ in range(14):
            dx, dy, r = rng.normal(0, 36), rng.normal(0, 8), rng.uniform(10, 24)
            pen.ellipse((cx + dx - r, cy + dy - r, cx + dx + r, cy + dy + r), fill=(246, 248, 250))
    ridge = [(x, HORIZON - 40 - 30 * np.sin(x / 90) - 14 * np.sin(x / 31)) for x in range(0, WIDTH + 8, 8)]
    pen.polygon([(0, HORIZON + 8), *ridge, (WIDTH, HORIZON + 8)], fill=(112, 142, 120))
    _house(pen, 40, 150, 150, (196, 150, 120), (130, 60, 50))
    _house(pen, 230, 110, 110, (214, 206, 190), (80, 84, 100))
    pen.polygon([(0, HEIGHT), (0, 400), (WIDTH, 330), (WIDTH, HEIGHT)], fill=(92, 92, 98))
    for i in range(9):
        x = 20 + i * 76
        y = 448 - i * 6
        pen.polygon([(x, y), (x + 40, y - 4), (x + 40, y + 2), (x, y + 6)], fill=(232, 228, 210))
    _tree(pen, 430, 330, 90, rng)
    _tree(pen, 590, 320, 120, rng)
    _car(pen, 70, 440, 180, (190, 40, 44))
    _car(pen, 380, 396, 120, (44, 84, 160))
    image = image.filter(ImageFilter.GaussianBlur(0.8))
    noise = rng.normal(0, 7, (HEIGHT, WIDTH, 1)) + rng.normal(0, 4, (HEIGHT, WIDTH, 3))
    return Image.fromarray(np.clip(np.asarray(image, dtype=np.float64) + noise, 0, 255).astype(np.uint8))


if __name__ == '__main__':
    draw().save(Path(__file__).with_name('sample.jpg'), quality=88)
