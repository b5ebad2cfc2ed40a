"""The objects' pictures: Fluent Emoji 3-D sprites, cropped, recoloured and resized, with a cache.

Resizing dominates the cost of a scene, and sizes repeat, so each (class, colour, size, flip, tilt)
is resized once per process.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from inlay_toybox.classes import BY_NAME

FOLDER = Path(__file__).parent / "sprites"
HUES = {"red": 0.99, "blue": 0.60, "green": 0.36}


@cache
def _original(name: str, colour: str | None) -> Image.Image:
    """The sprite of a class, cropped to its opaque box: RGBA."""
    toy = BY_NAME[name]
    with Image.open(FOLDER / f"{toy.sprite}.webp") as file:
        image = file.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    if colour is None:
        return image
    if colour not in toy.colours:
        raise ValueError(
            f"a {name} has no colour {colour!r}; its colours: {', '.join(toy.colours)}"
        )
    return _recolour(image, toy.hue, HUES[colour])


def _recolour(image: Image.Image, paint: float, hue: float) -> Image.Image:
    """Move the hues within 0.09 of ``paint`` to ``hue``, keeping windows, wheels and shading."""
    h, s, v = (np.asarray(c, np.float32) / 255 for c in image.convert("RGB").convert("HSV").split())
    distance = np.abs((h - paint + 0.5) % 1.0 - 0.5)
    painted = (distance < 0.09) & (s > 0.35)
    h = np.where(painted, (h - paint + hue) % 1.0, h)
    hsv = np.stack([h, s, v], -1)
    rgb = Image.fromarray((hsv * 255).round().astype(np.uint8), "HSV").convert("RGB")
    rgb.putalpha(image.getchannel("A"))
    return rgb


@lru_cache(maxsize=20_000)
def sprite(
    name: str, colour: str | None, side: int, flip: bool = False, tilt: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The object's pixels at a given size.

    Args:
        name: a class name.
        colour: an adjective of that class, or None for the sprite's own colours.
        side: longer side in pixels.
        flip: mirror left to right.
        tilt: rotation in degrees, counter-clockwise.

    Returns:
        Premultiplied colour, float32 ``[h, w, 3]`` in 0..1, and opacity, float32 ``[h, w, 1]``.
    """
    image = _original(name, colour)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if tilt:
        image = image.rotate(tilt, Image.Resampling.BICUBIC, expand=True)
        image = image.crop(image.getbbox())
    scale = side / max(image.size)
    width, height = (max(1, round(n * scale)) for n in image.size)
    rgba = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), np.float32) / 255
    alpha = rgba[..., 3:]
    return rgba[..., :3] * alpha, alpha


def aspect(name: str) -> float:
    """Width over height of a class's sprite."""
    width, height = _original(name, None).size
    return width / height
