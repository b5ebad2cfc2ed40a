"""Differences of pictures, pixel by pixel: L1, L2, PSNR, SSIM, over the picture or inside a mask.

`x`, `y`: pictures `b 3 h w` in 0..1. `where`: `1 1 h w` or `b 1 h w`, bool, the pixels that count
(the background, say); all of them by default. One number per picture, NaN where nothing counts.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

CEILING = 99.0  # dB: equal pictures have infinitely many


def mean_inside(values: Tensor, where: Tensor | None) -> Tensor:
    """Mean of `values` (`b c h w`) over channels and the pixels that count: `b`."""
    if where is None:
        return values.mean((1, 2, 3))
    counted = where.to(values).expand(len(values), 1, *values.shape[2:])
    inside = torch.where(counted > 0, values, 0).sum((1, 2, 3))
    return inside / (counted.sum((1, 2, 3)) * values.shape[1])


def alike_outside(x: Tensor, y: Tensor, where: Tensor | None) -> Tensor:
    """`y` with the pixels of `x` where nothing counts, so that windows across the mask's edge see
    no difference from beyond it."""
    return y if where is None else torch.where(where.bool(), y, x)


def l1(x: Tensor, y: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean absolute difference, 0..1, 0 = equal."""
    return mean_inside((x - y).abs(), where)


def l2(x: Tensor, y: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean squared difference, 0..1, 0 = equal."""
    return mean_inside((x - y).square(), where)


def psnr(x: Tensor, y: Tensor, where: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio, dB, peak 1; `CEILING` at most, for equal pictures."""
    error = l2(x.double(), y.double(), where)
    return (-10 * error.clamp(min=1e-30).log10()).clamp(max=CEILING)


def ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity at every pixel and channel, `b 3 h w`, -1..1 (Wang et al., 2004;
    Gaussian window of 11 with sigma 1.5, borders mirrored; torchmetrics)."""
    _, maps = structural_similarity_index_measure(
        x, y, data_range=1.0, reduction="none", return_full_image=True
    )
    return maps


def ssim(x: Tensor, y: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean of `ssim_map` over the pixels that count, -1..1, 1 = equal.

    With `where` the pictures are first made alike elsewhere (`alike_outside`).
    """
    return mean_inside(ssim_map(x, alike_outside(x, y, where)), where)


def magicbrush(made: Image.Image, target: Image.Image) -> tuple[float, float]:
    """L1 and L2 as MagicBrush measures them (Zhang et al., 2023), 0..1: the picture is first
    brought to the target's size by Pillow's own resize (bicubic)."""
    resized = made.convert("RGB").resize(target.size)
    pictures = [np.asarray(p, np.float64) / 255 for p in (resized, target.convert("RGB"))]
    gap = pictures[0] - pictures[1]
    return float(np.abs(gap).mean()), float(np.square(gap).mean())
