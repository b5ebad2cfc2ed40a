"""Strokes of a pen and pieces of pictures on a sheet that knows where it was touched. No hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor

from inlay import ConfigError


@dataclass(frozen=True)
class Stroke:
    """colour: red, green, blue in bytes; width: in shares of the sheet's shorter side; points: x, y
    in shares of the sheet; one is a dot."""

    colour: tuple[int, ...]
    width: float
    points: list[tuple[float, float]]


def parsed(said: Any, where: str) -> Stroke:
    """A stroke from {colour, width, points}. Raises ConfigError."""
    try:
        known = {"colour": "black", "width": 0.1, **said}
        points, width = [tuple(p) for p in known.pop("points")], float(known.pop("width"))
        colour = ImageColor.getrgb(known.pop("colour"))[:3]
        if known or not points or width <= 0 or any(not 0 <= v <= 1 for p in points for v in p):
            raise ValueError
        return Stroke(colour, width, [(x, y) for x, y in points])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        fix = "Write {colour: red, width: 0.1, points: [[0.2, 0.5], [0.6, 0.5]]}, 0 to 1."
        raise ConfigError(f"{said!r} is no stroke", where=where, fix=fix) from error


def pixels(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Shares of a picture of `size` (width, height) as its pixels, at least one."""
    left, top = round(box[0] * size[0]), round(box[1] * size[1])
    return left, top, max(round(box[2] * size[0]), left + 1), max(round(box[3] * size[1]), top + 1)


class Sheet:
    """Black paper of `size` (h, w), and where something lies on it."""

    def __init__(self, size: tuple[int, int]) -> None:
        height, width = size
        self.paper = Image.new("RGB", (width, height))
        self.touched = Image.new("L", (width, height))

    def paste(self, piece: Image.Image, place: tuple[int, int, int, int]) -> None:
        """A picture, scaled to fill left, top, right, bottom in pixels."""
        there = (place[2] - place[0], place[3] - place[1])
        self.paper.paste(piece.resize(there, Image.Resampling.LANCZOS), place[:2])
        self.touched.paste(255, place)

    def draw(self, stroke: Stroke) -> None:
        """A line with round ends and corners."""
        width, height = self.paper.size
        line = [(x * width, y * height) for x, y in stroke.points]
        radius = stroke.width * min(width, height) / 2
        for sheet, ink in ((self.paper, stroke.colour), (self.touched, 255)):
            pen = ImageDraw.Draw(sheet)
            pen.line(line, ink, max(round(2 * radius), 1))
            for x, y in line:
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), ink)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """What is drawn, `1 3 h w` in 0..1, and where, `1 1 h w`."""
        drawn = torch.from_numpy(np.asarray(self.paper) / 255).permute(2, 0, 1)[None]
        return drawn, torch.from_numpy(np.asarray(self.touched) / 255)[None, None]
