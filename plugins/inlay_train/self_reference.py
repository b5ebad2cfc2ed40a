"""Paint by Example's training pairs, from pictures with boxes alone (Yang et al. 2023, section 3).

An object is its own reference: it is cut out as the exemplar and what it covered becomes a hole.
So that it cannot be copied back, the exemplar is flipped, turned, blurred and bent, and half of the
holes are no boxes.

Boxes are (left, top, right, bottom) in pixels, right and bottom exclusive; pictures are float32
`3 h w` in 0..1, masks `1 h w` with 1 in the hole. Every draw comes from the generator given.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from inlay_train.encoded import LATER

Box = tuple[int, int, int, int]

AREA = (0.02, 0.8)
"""Share of the picture that a box must have to be an exemplar."""

SMOOTH = 50 / 224
"""Deviation of the Gaussian that smooths an elastic transform, as a share of the side."""

SAMPLES = 20
"""Points on each of a hole's four curves."""


@dataclass
class Settings:
    """Published numbers, for pictures of 512 pixels and exemplars of 224.

    Attributes:
        grow: pixels that the exemplar's box grows on each side, inside the picture.
        rotate: degrees, to either side, one time in two. bend: how far the three points of the
            random affine map move, as a share of the exemplar's side, three times in ten. blur:
            share of exemplars that are blurred; kernels: sides of the kernel in pixels.
        elastic: how far a pixel of a bent exemplar moves before these moves are smoothed, as a
            share of its side; the smoothing leaves hundredths of it. still: leave exemplars as
            they are, for comparison.
        curved: share of holes that are not boxes. free: share of the space beside a box by which a
            hole may exceed it. jitter: pixels that a point of a curve moves, at least one.
        crop: whether a square around the hole is cut out, and not the whole picture squashed.
    """

    grow: int = 10
    rotate: float = 20.0
    bend: float = 50 / 224
    blur: float = 0.3
    kernels: tuple[int, ...] = (3, 5, 7)
    curved: float = 0.5
    free: float = 0.4
    jitter: int = 5
    crop: bool = True
    elastic: float = field(default=1 / 224, metadata=LATER)
    still: bool = field(default=False, metadata=LATER)


@dataclass(frozen=True)
class Pair:
    """What one object gives: picture `3 s s`, mask `1 s s` of the hole, exemplar `3 e e`."""

    picture: Tensor
    mask: Tensor
    exemplar: Tensor


def fits(box: Box, width: int, height: int) -> bool:
    """Whether a box is neither too small to be seen nor nearly all of the picture."""
    area = (box[2] - box[0]) * (box[3] - box[1]) / (width * height)
    return AREA[0] <= area <= AREA[1]


def grown(box: Box, pixels: int, width: int, height: int) -> Box:
    """A box that is larger on each side, inside the picture."""
    left, top, right, bottom = box
    return (
        max(0, left - pixels),
        max(0, top - pixels),
        min(width, right + pixels),
        min(height, bottom + pixels),
    )


def extended(box: Box, width: int, height: int, rng: np.random.Generator, free: float) -> Box:
    """A box that exceeds another by a random part of the space beside it, at most `free` of it."""
    spaces = box[0], box[1], width - box[2], height - box[3]
    left, top, right, bottom = (int(rng.integers(int(free * s) + 1)) for s in spaces)
    return box[0] - left, box[1] - top, box[2] + right, box[3] + bottom


def outline(
    box: Box, wide: Box, rng: np.random.Generator, jitter: int
) -> list[tuple[float, float]]:
    """Points of four quadratic Bézier curves from corner to corner of `box`, pulled towards the
    sides of `wide`, each point moved by 1 to `jitter` pixels along both axes: `4 SAMPLES` pairs.
    """
    left, top, right, bottom = box
    middle = (left + right) / 2, (top + bottom) / 2
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)], float)
    pulls = np.array(
        [(middle[0], wide[1]), (wide[2], middle[1]), (middle[0], wide[3]), (wide[0], middle[1])]
    )
    u = np.arange(SAMPLES)[None, :, None] / SAMPLES
    ends = np.roll(corners, -1, 0)
    curves = (
        (1 - u) ** 2 * corners[:, None] + 2 * u * (1 - u) * pulls[:, None] + u**2 * ends[:, None]
    )
    moves = rng.integers(1, jitter + 1, curves.shape) * rng.choice([-1, 1], curves.shape)
    return [(float(x), float(y)) for x, y in (curves + moves).reshape(-1, 2)]


def hole(
    box: Box, width: int, height: int, rng: np.random.Generator, settings: Settings
) -> tuple[Tensor, Box]:
    """A mask `1 h w` over an object, and the extended box that holds it."""
    wide = extended(box, width, height, rng, settings.free)
    canvas = Image.new("L", (width, height))
    pen = ImageDraw.Draw(canvas)
    if rng.random() < settings.curved:
        pen.polygon(outline(box, wide, rng, settings.jitter), fill=1)
    else:
        pen.rectangle((wide[0], wide[1], wide[2] - 1, wide[3] - 1), fill=1)
    return torch.from_numpy(np.array(canvas, np.float32))[None], wide


def window(wide: Box, width: int, height: int, rng: np.random.Generator) -> Box:
    """A square of the shorter side that contains the hole, made smaller by a random inset; the
    whole picture where the hole does not fit into such a square.
    """
    side = min(width, height)
    if max(wide[2] - wide[0], wide[3] - wide[1]) > side:
        return 0, 0, width, height
    left = int(rng.integers(max(0, wide[2] - side), min(wide[0], width - side) + 1))
    top = int(rng.integers(max(0, wide[3] - side), min(wide[1], height - side) + 1))
    margins = wide[0] - left, wide[1] - top, left + side - wide[2], top + side - wide[3]
    inset = int(rng.integers(int(0.6 * min(margins)) + 1))
    return left + inset, top + inset, left + side - inset, top + side - inset


def augmented(exemplar: Tensor, side: int, rng: np.random.Generator, settings: Settings) -> Tensor:
    """An exemplar `3 h w` squashed to `3 side side`, then flipped, turned, blurred, and bent by an
    elastic transform: an affine map and a smooth field of moves."""
    flat = TF.resize(exemplar, [side, side], antialias=True)
    if settings.still:
        return flat.clamp(0, 1)
    turn = np.deg2rad(rng.uniform(-1, 1) * settings.rotate) * (rng.random() < 0.5)
    turned = np.array(
        [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0]], np.float32
    )
    if rng.random() < 0.5:
        turned[:, 0] *= -1
    flat = _warped(flat, turned)
    if rng.random() < settings.blur:
        flat = TF.gaussian_blur(flat, [int(rng.choice(settings.kernels))] * 2)
    if rng.random() < 0.3:
        flat = _warped(flat, _bent(rng, settings.bend))
        if settings.elastic:
            flat = _warped(
                flat, np.eye(2, 3, dtype=np.float32), _moves(side, rng, settings.elastic)
            )
    return flat.clamp(0, 1)


def _bent(rng: np.random.Generator, reach: float) -> np.ndarray:
    """The affine map `2 3`, in coordinates of -1..1, that moves three points two thirds of a side
    apart by up to `reach` sides along both axes.
    """
    anchors = np.array([(1, 1), (1, -1), (-1, -1)], float) * 2 / 3
    moved = anchors + 2 * reach * rng.uniform(-1, 1, (3, 2))
    return np.linalg.solve(np.column_stack([moved, np.ones(3)]), anchors).T.astype(np.float32)


def _moves(side: int, rng: np.random.Generator, reach: float) -> np.ndarray:
    """Smooth moves `side side 2` across and down, in coordinates of -1..1 (Simard et al. 2003)."""
    loose = 2 * reach * rng.uniform(-1, 1, (2, side, side))
    smooth = [gaussian_filter(moves, SMOOTH * side) for moves in loose]
    return np.stack(smooth, -1).astype(np.float32)


def _warped(picture: Tensor, matrix: np.ndarray, moves: np.ndarray | None = None) -> Tensor:
    """A picture where each pixel shows what lies at `matrix` times its place, and `moves` from
    there, mirrored beyond the borders.
    """
    theta = torch.from_numpy(np.ascontiguousarray(matrix))[None]
    grid = F.affine_grid(theta, [1, *picture.shape], align_corners=True)
    if moves is not None:
        grid = grid + torch.from_numpy(moves)
    return F.grid_sample(picture[None], grid, "bilinear", "reflection", align_corners=True)[0]


def make(
    picture: Tensor,
    box: Box,
    side: int,
    shown: int,
    rng: np.random.Generator,
    settings: Settings,
    finer: Tensor | None = None,
) -> Pair:
    """The pair of one object in a picture `3 h w`: sides `side` of the picture, `shown` of the
    exemplar. Masks are soft where the resized hole has its edge.

    finer: the picture some whole number of times larger, from which the exemplar is cut out.
    """
    height, width = picture.shape[-2:]
    shown_in = picture if finer is None else finer
    more = shown_in.shape[-1] // width
    left, top, right, bottom = (more * s for s in grown(box, settings.grow, width, height))
    exemplar = augmented(shown_in[:, top:bottom, left:right], shown, rng, settings)
    mask, wide = hole(box, width, height, rng, settings)
    if settings.crop:
        left, top, right, bottom = window(wide, width, height, rng)
        picture, mask = (t[:, top:bottom, left:right] for t in (picture, mask))
    if picture.shape[-2:] != (side, side):
        picture, mask = (TF.resize(t, [side, side], antialias=False) for t in (picture, mask))
    return Pair(picture, mask, exemplar)
