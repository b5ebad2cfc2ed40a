"""Maps and masks as pictures `b 1 h w`: smooth, normalise, threshold, widen, soften, resize.

No hooks. Masks hold 0..1, 1 = the edit's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from skimage.filters import threshold_otsu
from torch import Tensor


def blur(maps: Tensor) -> Tensor:
    """3x3 Gaussian, separable [1/4, 1/2, 1/4], mirrored border (edge not repeated); h, w >= 2.

    Computed in float32, returned in the dtype of `maps`.
    """
    taps = torch.tensor([0.25, 0.5, 0.25], device=maps.device)
    wide = F.pad(maps.float(), (1, 1, 1, 1), mode="reflect")
    rows = F.conv2d(wide, taps.view(1, 1, 3, 1))
    return F.conv2d(rows, taps.view(1, 1, 1, 3)).to(maps.dtype)


def minmax(maps: Tensor) -> Tensor:
    """Each map stretched to 0..1. A constant map has no range: NaN, see `is_flat`."""
    low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
    return (maps - low) / (high - low)


def is_flat(maps: Tensor) -> Tensor:
    """`b` bool: maps without anything to threshold, being constant or not finite."""
    values = maps.flatten(1)
    return ~values.isfinite().all(1) | (values.amax(1) <= values.amin(1))


def otsu(maps: Tensor) -> Tensor:
    """1 where a map exceeds its own Otsu threshold (256 bins), else 0; float32."""
    levels = [float(threshold_otsu(m.float().cpu().numpy(), nbins=256)) for m in maps[:, 0]]
    return (maps.float() > torch.tensor(levels, device=maps.device).view(-1, 1, 1, 1)).float()


def points(smooth: Tensor, mask: Tensor, size: Sequence[int]) -> list[tuple[int, int]]:
    """Up to three clicks (x, y) on a picture of `size` (h, w), for a segmenter (Add-it, A.4).

    smooth, mask: one map and its mask `1 1 h w`. Each click is the first maximum of the upsampled
    map; a square of half-side max(box width, box height) // 4 around it is cleared before the next,
    and what peaks below 0.35 of the first is no click.
    """
    found: list[tuple[int, int]] = []
    wide = resize_bilinear(smooth, size)[0, 0].clone()
    left, top, right, bottom = box(mask, size)
    spread = max(right - left, bottom - top) // 4
    first = wide.max()
    while len(found) < 3 and wide.max() >= 0.35 * first:
        y, x = divmod(int(wide.argmax()), wide.shape[1])
        found.append((x, y))
        wide[max(y - spread, 0) : y + spread + 1, max(x - spread, 0) : x + spread + 1] = 0
    return found


def box(mask: Tensor, size: Sequence[int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom: first and last pixels that a mask `1 1 h w`, not empty, touches
    when it is upsampled to `size` (h, w)."""
    rows, columns = (resize_bilinear(mask.float(), size)[0, 0] > 0).nonzero(as_tuple=True)
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


def log_odds(heat: Tensor, mask: Tensor) -> Tensor:
    """A map in 0..1 as the logits that a segmenter takes for a rough mask: positive exactly where
    `mask`, the map above some threshold and neither empty nor full, is 1."""
    level = (heat[mask > 0].min() + heat[mask == 0].max()) / 2
    return heat.logit(eps=1e-3) - level.logit(eps=1e-3)


def is_box(shares: Any) -> bool:
    """Whether these are left, top, right, bottom in 0..1, with something between them."""
    listed = isinstance(shares, Sequence) and len(shares) == 4
    return listed and 0 <= shares[0] < shares[2] <= 1 and 0 <= shares[1] < shares[3] <= 1


def rectangle(shares: Sequence[float], size: Sequence[int]) -> Tensor:
    """A mask `1 1 h w` of `size` (h, w): 1 inside left, top, right, bottom in 0..1."""
    (height, width), (left, top, right, bottom) = size, shares
    mask = torch.zeros(1, 1, height, width)
    rows = slice(round(top * height), round(bottom * height))
    mask[..., rows, round(left * width) : round(right * width)] = 1
    return mask


def dilate(mask: Tensor, cells: int) -> Tensor:
    """Every cell takes the largest value of the square of `cells` around it."""
    size = 2 * cells + 1
    wide = F.max_pool2d(mask, (size, 1), 1, (cells, 0))
    return F.max_pool2d(wide, (1, size), 1, (0, cells))


def around(
    mask: Tensor, size: Sequence[int], margin: float, zoom: float
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom around what is true in a mask `h w`, of the shape of `size` (h, w).

    margin: in shares of the mask's longer side. zoom: the box is at least the largest of its shape
    divided by this. The whole picture where nothing is true, or no such box holds the mask.
    """
    rows, columns = mask.shape
    whole = (0, 0, columns, rows)
    if not mask.any():
        return whole
    y, x = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    left, top, right, bottom = int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1
    shape = size[1] / size[0]
    most, more = min(rows, columns / shape), 2 * margin * max(bottom - top, right - left)
    tall = min(max(bottom - top + more, (right - left + more) / shape, most / zoom), most)
    high, wide = round(tall), round(tall * shape)
    if high < bottom - top or wide < right - left or (zoom == 1 and tall == most):
        return whole
    first = min(max((left + right - wide) // 2, 0), columns - wide)
    upper = min(max((top + bottom - high) // 2, 0), rows - high)
    return first, upper, first + wide, upper + high


def inside(shape: Sequence[int], frame: Sequence[int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a picture of `shape` (h, w) in the middle of a frame (h, w) that
    it touches on two sides."""
    scale = min(frame[0] / shape[0], frame[1] / shape[1])
    tall, wide = (max(round(side * scale), 1) for side in shape)
    left, top = (frame[1] - wide) // 2, (frame[0] - tall) // 2
    return left, top, left + wide, top + tall


def frame(picture: Tensor, size: Sequence[int]) -> Tensor:
    """A picture `b c h w` in 0..1 between white bars in a frame of `size` (h, w)."""
    left, top, right, bottom = inside(picture.shape[-2:], size)
    shown = resize_bicubic(picture, (bottom - top, right - left))
    return F.pad(shown, (left, size[1] - right, top, size[0] - bottom), value=1.0)


def feather(mask: Tensor, pixels: int) -> Tensor:
    """A ramp around the mask: 1 inside, exactly 0 beyond `pixels` (rounded up to even)."""
    radius = math.ceil(pixels / 2)
    wide = F.pad(dilate(mask, radius), (radius,) * 4, mode="replicate")
    rows = F.avg_pool2d(wide, (2 * radius + 1, 1), 1)
    return F.avg_pool2d(rows, (1, 2 * radius + 1), 1).clamp(0, 1)


def resize(mask: Tensor, size: Sequence[int]) -> Tensor:
    """To `size` (h, w): the mean of each cell when shrinking, bilinear when growing."""
    if mask.shape[-2] >= size[0] and mask.shape[-1] >= size[1]:
        return F.adaptive_avg_pool2d(mask, (size[0], size[1]))
    return resize_bilinear(mask, size)


def resize_bilinear(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear without antialiasing, pixel centres aligned."""
    return F.interpolate(mask, size=list(size), mode="bilinear", align_corners=False)


def resize_bicubic(picture: Tensor, size: Sequence[int]) -> Tensor:
    """A picture `b 3 h w` in 0..1 at another size, antialiased when it shrinks."""
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    grown = F.interpolate(picture, size=list(size), mode="bicubic", antialias=True)
    return grown.clamp(0, 1)
