"""Affordance: is the new object where such an object may be? (Tewel et al., Add-it, 2024)

An object counts as well placed when at least half of its area lies in an allowed region. The
published sentence, "inside a ground-truth box", reads in two ways, and both are here: `single` asks
for one box that holds half of the object, `union` for all boxes together. Boxes are
left, top, right, bottom in pixels, `n 4`; shares are 0..1.

Pictures in which no new object was found have no affordance (None). `average` says what they count
as, and how many there were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

THRESHOLD = 0.5


@dataclass(frozen=True)
class Affordance:
    """A benchmark's score.

    Attributes:
        score: mean over all pictures, those without an object counting 0; 0..1.
        found_only: mean over pictures with an object; NaN when there is none.
        empty: pictures without an object. total: all pictures.
    """

    score: float
    found_only: float
    empty: int
    total: int


def single(objects: Tensor, allowed: Tensor) -> Tensor:
    """Share of each object's box inside the allowed box that holds most of it: float64 `n`."""
    shared = _overlaps(objects, allowed)
    most = shared.amax(1) if len(allowed) else shared.new_zeros(len(objects))
    return most / _areas(objects)


def union(objects: Tensor, allowed: Tensor) -> Tensor:
    """Share of each object's box inside all allowed boxes together: float64 `n`.

    Exact for any real coordinates: the plane is cut at every edge of an allowed box.
    """
    boxes = allowed.double()
    x, y = (boxes[:, axis::2].flatten().unique() for axis in (0, 1))
    if len(x) < 2 or len(y) < 2:
        return objects.new_zeros(len(objects), dtype=torch.float64)
    cells = _cells(x, y)
    centres = (cells[:, :2] + cells[:, 2:]) / 2
    inside = (centres[:, None] >= boxes[None, :, :2]) & (centres[:, None] <= boxes[None, :, 2:])
    covered = cells[inside.all(2).any(1)]
    return _overlaps(objects, covered).sum(1) / _areas(objects)


def by_masks(objects: Tensor, allowed: Tensor) -> Tensor:
    """Share of each object's pixels (bool `n h w`) inside the allowed pixels (bool `h w`): float64
    `n`; 0 for an empty object."""
    area = objects.sum((1, 2)).double()
    return (objects & allowed).sum((1, 2)).double() / area.clamp(min=1)


def picture_score(shares: Tensor, threshold: float = THRESHOLD) -> float | None:
    """Share of a picture's new objects that are well placed, 0..1; None without an object."""
    return float((shares >= threshold).double().mean()) if len(shares) else None


def average(scores: Sequence[float | None]) -> Affordance:
    """A benchmark's score from those of its pictures."""
    found = [score for score in scores if score is not None]
    total = sum(found)
    return Affordance(
        score=total / len(scores) if scores else float("nan"),
        found_only=total / len(found) if found else float("nan"),
        empty=len(scores) - len(found),
        total=len(scores),
    )


def boxes_of(region: np.ndarray, coverage: float = 0.9, limit: int = 8) -> Tensor:
    """A region (bool `h w`) as boxes, as an annotator would draw them: float64 `n 4`.

    The largest box inside the region, then the largest inside what is left, until `coverage` of the
    region is covered or there are `limit` boxes. No box reaches outside the region.
    """
    left = region.astype(bool).copy()
    boxes: list[tuple[int, int, int, int]] = []
    while len(boxes) < limit and left.sum() > (1 - coverage) * region.sum():
        x0, y0, x1, y1 = _largest_box(left)
        left[y0:y1, x0:x1] = False
        boxes.append((x0, y0, x1, y1))
    return torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)


def _largest_box(region: np.ndarray) -> tuple[int, int, int, int]:
    """The box of most pixels that are all True: left, top, right, bottom (exclusive)."""
    height, width = region.shape
    best, found = 0, (0, 0, 0, 0)
    for top in range(height):
        open_columns = np.logical_and.accumulate(region[top:], 0)
        # Length of the run of open columns that ends at each column.
        steps = np.arange(1, width + 1)
        runs = steps - np.maximum.accumulate(np.where(open_columns, 0, steps), 1)
        areas = runs * np.arange(1, height - top + 1)[:, None]
        row, column = np.unravel_index(int(areas.argmax()), areas.shape)
        if areas[row, column] > best:
            best = int(areas[row, column])
            right = int(column) + 1
            found = (right - int(runs[row, column]), top, right, top + int(row) + 1)
    return found


def _cells(x: Tensor, y: Tensor) -> Tensor:
    """Boxes between neighbouring coordinates: `(len(x) - 1) * (len(y) - 1)` of them."""
    low, high = (torch.cartesian_prod(x[part], y[part]) for part in (slice(-1), slice(1, None)))
    return torch.cat([low, high], 1)


def _overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Area shared by each pair of boxes: float64 `n m`."""
    a, b = a.double(), b.double()
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low).clamp(min=0).prod(-1)


def _areas(boxes: Tensor) -> Tensor:
    """Float64 `n`; a box without extent has a tiny area, so that its share is 0."""
    return (boxes[:, 2:] - boxes[:, :2]).double().clamp(min=0).prod(-1).clamp(min=1e-12)
