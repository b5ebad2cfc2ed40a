"""Sky, scenery and ground: the empty scene, and which pixels are sky, land or water.

Everything is drawn in fractions of the picture's side, so one backdrop looks the same at 64 and
128 px.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from inlay_toybox.classes import WATER

Rgb = tuple[float, float, float]

_NEAR: dict[str, Rgb] = {
    "grass": (0.36, 0.66, 0.25),
    "sand": (0.93, 0.80, 0.55),
    "snow": (0.94, 0.96, 0.99),
    "road": (0.42, 0.42, 0.45),
    "lake": (0.20, 0.50, 0.60),
    "sea": (0.08, 0.36, 0.66),
}
_FAR: dict[str, Rgb] = {
    "grass": (0.58, 0.78, 0.42),
    "sand": (0.85, 0.70, 0.46),
    "snow": (0.80, 0.87, 0.95),
    "road": (0.52, 0.52, 0.55),
    "lake": (0.48, 0.70, 0.74),
    "sea": (0.30, 0.60, 0.80),
}
_SCENERY: dict[str, Rgb] = {
    "grass": (0.38, 0.58, 0.45),
    "sand": (0.72, 0.50, 0.34),
    "snow": (0.58, 0.68, 0.80),
    "road": (0.24, 0.44, 0.26),
    "lake": (0.26, 0.44, 0.30),
    "sea": (0.30, 0.60, 0.80),
}
_HEIGHT = {"grass": 0.11, "sand": 0.11, "snow": 0.14, "road": 0.09, "lake": 0.10, "sea": 0.0}
_HORIZON = {"grass": 0.51, "sand": 0.51, "snow": 0.51, "road": 0.50, "lake": 0.49, "sea": 0.46}
_BANK: dict[str, Rgb] = {
    "road": (0.45, 0.68, 0.34),
    "lake": (0.42, 0.66, 0.30),
    "sea": (0.92, 0.81, 0.58),
}
_TEXTURE = {"grass": 0.04, "sand": 0.025, "snow": 0.015, "road": 0.015, "lake": 0.04, "sea": 0.05}
_SKY: tuple[Rgb, Rgb] = ((0.38, 0.64, 0.94), (0.80, 0.91, 0.99))
_DUSK: tuple[Rgb, Rgb] = ((0.42, 0.32, 0.58), (0.99, 0.66, 0.38))
DUSK_LIGHT = np.array([1.0, 0.82, 0.70], np.float32)


@dataclass(frozen=True)
class Look:
    """The numbers that set one empty scene apart from another; all in fractions of the picture."""

    horizon: float
    bank: float
    waves: tuple[float, float, float, float]
    roll: float
    brightness: float

    @classmethod
    def draw(cls, rng: np.random.Generator, ground: str) -> Look:
        u = rng.random(8)
        return cls(
            horizon=_HORIZON[ground] + 0.06 * u[0],
            bank=(0.80 if ground in WATER else 0.88) + 0.05 * u[1],
            waves=(u[2], u[3], 1.0 + u[4], 2.5 + 2.0 * u[5]),
            roll=u[6],
            brightness=0.95 + 0.08 * u[7],
        )


@dataclass(frozen=True)
class Zones:
    """Where things may be: boolean ``[size, size]`` each; scenery and banks belong to none of
    them.
    """

    sky: np.ndarray
    land: np.ndarray
    water: np.ndarray


def stand(ground: str, look: Look) -> tuple[float, float]:
    """Top and bottom edge of the strip on which land or water objects may stand, as fractions."""
    if ground == "road":
        return look.horizon + 0.05, look.bank + 0.02
    return look.horizon, look.bank if ground in WATER else 0.98


@cache
def _texture(ground: str, size: int) -> np.ndarray:
    """A tile ``[size, 2 * size, 1]`` of mean 0 and deviation 1 that wraps around horizontally."""
    noise = np.random.default_rng(7).standard_normal((128, 256)).astype(np.float32)
    width, height = (9, 1) if ground in WATER else (3, 3)
    noise = np.sum([np.roll(noise, k, 1) for k in range(width)], axis=0) / width
    noise = np.sum([np.roll(noise, k, 0) for k in range(height)], axis=0) / height
    tile = Image.fromarray(noise).resize((2 * size, size), Image.Resampling.BOX)
    noise = np.asarray(tile, np.float32)
    return ((noise - noise.mean()) / noise.std())[..., None]


@cache
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres: columns ``[1, size]`` and rows ``[size, 1]`` in 0..1."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    return line[None], line[:, None]


def _ramp(top: Rgb, bottom: Rgb, at: np.ndarray) -> np.ndarray:
    """Colours between two, ``[n, 1, 3]``, for positions ``[n, 1]`` in 0..1."""
    start, end = np.array(top, np.float32), np.array(bottom, np.float32)
    return start + (end - start) * np.clip(at, 0.0, 1.0)[..., None]


def _ridge(ground: str, look: Look, x: np.ndarray) -> np.ndarray:
    """Row of the scenery's upper edge for every column, ``[1, size]``."""
    a, b, low, high = look.waves
    if ground == "snow":
        shape = 0.5 + 0.5 * np.abs((x * high + a) % 2.0 - 1.0) * np.sin(3.0 * x * low + b) ** 2
    else:
        shape = 0.65 + 0.25 * np.sin(6.28 * (low * x + a)) + 0.10 * np.sin(6.28 * (high * x + b))
    return look.horizon - _HEIGHT[ground] * shape


def draw(ground: str, sunset: bool, look: Look, size: int) -> tuple[np.ndarray, Zones]:
    """The empty scene.

    Args:
        ground: one of the six grounds.
        sunset: dusk instead of day.
        look: its numbers.
        size: side of the picture in pixels.

    Returns:
        Float32 ``[size, size, 3]`` in 0..1 (a fresh array) and the zones.
    """
    x, y = _grid(size)
    soft = 1.0 / size
    top, horizon = _ridge(ground, look, x), look.horizon
    image = np.repeat(_ramp(*(_DUSK if sunset else _SKY), y / horizon), size, axis=1)
    roll = int(look.roll * 2 * size)
    tile = np.roll(_texture(ground, size), roll, 1)[:, :size] * _TEXTURE[ground]
    depth = (y - horizon) / (1.0 - horizon)
    floor = _ramp(_FAR[ground], _NEAR[ground], depth) * look.brightness
    floor = floor + tile * np.clip(depth + 0.25, 0.0, 1.0)[..., None]
    wave = look.waves[0] * 6.28
    near = look.bank + 0.015 * np.sin(5.0 * x + wave)
    if ground == "road":
        line = (np.abs(y - (horizon + look.bank) / 2 - 0.03) < 0.012) & (
            (x * 5 + look.roll) % 1 < 0.6
        )
        floor = np.where(line[..., None], np.float32(0.92), floor)
        verge = np.array(_BANK[ground], np.float32) * look.brightness
        kerb = np.clip((y - horizon - 0.045) / soft, 0.0, 1.0)[..., None]
        floor = verge + (floor - verge) * kerb
    if ground in _BANK:
        shore = np.clip((y - near) / soft + 0.5, 0.0, 1.0)[..., None]
        floor = floor + (np.array(_BANK[ground], np.float32) * look.brightness - floor) * shore
    scenery = np.array(_SCENERY[ground], np.float32) * look.brightness
    light = DUSK_LIGHT if sunset else np.float32(1.0)
    below = np.clip((y - horizon) / soft + 0.5, 0.0, 1.0)[..., None]
    earth = (scenery + (floor - scenery) * below) * light
    cover = np.clip((y - top) / soft + 0.5, 0.0, 1.0)[..., None]
    image += (earth - image) * cover
    sky = y + 0.0 * x < top
    upper, lower = stand(ground, look)
    strip = (y >= upper) & ((y <= near) if ground in WATER else (y <= lower + 0.02 + 0.0 * x))
    none = np.zeros_like(sky)
    wet = ground in WATER
    return image, Zones(sky=sky, land=none if wet else strip, water=strip if wet else none)
