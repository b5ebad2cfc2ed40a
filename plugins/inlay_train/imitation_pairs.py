"""MimicBrush's training data: two views of one scene, and a grid of holes in one of them (Chen et
al. 2024, section 3.3).

Frames of a clip that are neither nearly the same nor nearly unrelated make a pair; of a single
picture two augmented copies do. Holes are cells of a grid; a cell where the views have features in
common is more often one, since there is something to be found for it.

Pictures are float32 `3 h w` in 0..1, masks `1 h w` with 1 in the hole; every draw comes from the
generator given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.color import rgb2gray
from skimage.feature import SIFT, match_descriptors
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

Points = NDArray[np.float64]
"""Places `n 2` in a picture, across and down, in 0..1."""

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})

RENDER = 256
"""Side in pixels of the pictures whose features are matched."""


@dataclass
class Strength:
    """How strongly a view is changed; the paper names the kinds and not the numbers.

    Attributes:
        colour: brightness, contrast and saturation are multiplied by 1 ± this. hue: turned by up
            to this share of the circle. rotate: degrees to either side. scale: least and greatest
            size. project: how far a corner moves inwards, as a share of the side. flip: share of
            views that are mirrored.
    """

    colour: float = 0.4
    hue: float = 0.05
    rotate: float = 30.0
    scale: tuple[float, float] = (0.7, 1.3)
    project: float = 0.2
    flip: float = 0.5


WEAK = Strength(colour=0.1, hue=0.0, rotate=5.0, scale=(0.9, 1.1), project=0.0)
"""For the comparison of weak with strong augmentation."""


def clips(folder: Path) -> list[list[Path]]:
    """The frames of each clip in order of their names: one folder of pictures per clip; a picture
    beside these folders is a clip of its own.
    """
    alone = [[file] for file in _pictures(folder)]
    moving = [_pictures(child) for child in sorted(folder.iterdir()) if child.is_dir()]
    return alone + [frames for frames in moving if frames]


def _pictures(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURES)


def two(frames: list[Path], rng: np.random.Generator) -> tuple[Path, Path]:
    """Two frames of a clip in random order; the same one twice where there is only one."""
    if len(frames) == 1:
        return frames[0], frames[0]
    first, second = rng.choice(len(frames), 2, replace=False)
    return frames[int(first)], frames[int(second)]


def similarity(one: Tensor, other: Tensor, side: int = 128) -> float:
    """SSIM of two pictures `3 h w` in grey, squashed to `side` pixels."""
    greys = [_grey(picture, side) for picture in (one, other)]
    return float(structural_similarity(*greys, data_range=1.0))


def makes_pair(one: Tensor, other: Tensor, low: float = 0.2, high: float = 0.9) -> bool:
    """Whether two frames show the same things from different sides: neither unrelated nor alike."""
    return low <= similarity(one, other) <= high


def matches(source: Tensor, reference: Tensor) -> Points:
    """Where `source` has SIFT features that `reference` has too, both `3 h w` of any size; `0 2`
    where a picture has none.
    """
    found = []
    for picture in (source, reference):
        detector = SIFT(upsampling=1)
        try:
            detector.detect_and_extract(_grey(picture, RENDER))
        except RuntimeError:  # nothing was found
            return np.zeros((0, 2))
        found.append(detector)
    one, other = found
    pairs = match_descriptors(one.descriptors, other.descriptors, max_ratio=0.8, cross_check=True)
    places: Points = (one.keypoints[pairs[:, 0]][:, ::-1] + 0.5) / RENDER
    return places


def grid(
    points: Points,
    side: int,
    rng: np.random.Generator,
    cells: tuple[int, int] = (3, 10),
    matched: float = 0.75,
    plain: float = 0.5,
) -> Tensor:
    """Holes `1 side side`: cells of an N × N grid, N in `cells`, each a hole with probability
    `matched` where it holds a point and `plain` elsewhere. At least one is.
    """
    n = int(rng.integers(cells[0], cells[1] + 1))
    chance = np.full((n, n), plain)
    if len(points):
        across, down = np.clip((points * n).astype(int), 0, n - 1).T
        chance[down, across] = matched
    holes = rng.random((n, n)) < chance
    if not holes.any():
        holes.flat[int(rng.integers(n * n))] = True
    edge = (np.arange(side) * n) // side
    return torch.from_numpy(holes[np.ix_(edge, edge)].astype(np.float32))[None]


def augmented(picture: Tensor, rng: np.random.Generator, how: Strength) -> Tensor:
    """A view `3 h w` with other colours, turned, resized, projected and mirrored, white where it
    shows nothing.
    """
    for change in (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation):
        picture = change(picture, 1 + how.colour * rng.uniform(-1, 1))
    if how.hue:
        picture = TF.adjust_hue(picture, how.hue * rng.uniform(-1, 1))
    angle, size = np.deg2rad(how.rotate * rng.uniform(-1, 1)), rng.uniform(*how.scale)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / size
    if rng.random() < how.flip:
        turn[:, 0] *= -1
    placed = np.eye(3)
    placed[:2, :2] = turn
    return _projected(picture, placed @ _tilt(rng, how.project)).clamp(0, 1)


def _tilt(rng: np.random.Generator, reach: float) -> NDArray[np.float64]:
    """The homography `3 3`, in coordinates of -1..1, that moves the corners inwards by up to
    `reach` of the side: from where a pixel is drawn to where it is taken.
    """
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    moved = corners * (1 - 2 * reach * rng.random((4, 2)))
    rows, values = [], []
    for (x, y), (u, v) in zip(moved, corners, strict=True):
        rows += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
        values += [u, v]
    return np.append(np.linalg.solve(np.array(rows), values), 1.0).reshape(3, 3)


def _projected(picture: Tensor, homography: NDArray[np.float64]) -> Tensor:
    """A picture where each pixel shows what lies at the homography's image of its place."""
    height, width = picture.shape[-2:]
    down, across = torch.meshgrid(
        (torch.arange(height) * 2 + 1) / height - 1,
        (torch.arange(width) * 2 + 1) / width - 1,
        indexing="ij",
    )
    places = torch.stack([across, down, torch.ones_like(down)], -1)
    x, y, w = (places @ torch.from_numpy(homography).float().T).unbind(-1)
    at = torch.stack([x / w, y / w], -1)[None]
    taken = F.grid_sample(1 - picture[None], at, "bilinear", "zeros", align_corners=False)
    return 1 - taken[0]


def squared(picture: Tensor, side: int) -> Tensor:
    """A picture `3 h w` in the middle of a white square, `3 side side`, as the model gets it."""
    height, width = picture.shape[-2:]
    more = max(height, width) - width, max(height, width) - height
    left, top = more[0] // 2, more[1] // 2
    padded = F.pad(picture, (left, more[0] - left, top, more[1] - top), value=1.0)
    if padded.shape[-1] == side:
        return padded
    return TF.resize(padded, [side, side], antialias=True).clamp(0, 1)


def _grey(picture: Tensor, side: int) -> NDArray[np.float64]:
    small = TF.resize(picture, [side, side], antialias=True)
    grey: NDArray[np.float64] = rgb2gray(small.permute(1, 2, 0).double().numpy())
    return grey
