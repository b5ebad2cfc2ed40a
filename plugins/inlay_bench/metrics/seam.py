"""Whether a mask's border shows: how steep a picture is across it, against its surroundings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVEL = 1 / 255


def ratio(x: Tensor, mask: Tensor, around: int = 4) -> Tensor:
    """The mean step between neighbours on two sides of the mask's border, divided by that between
    neighbours within `around` pixels of it that do not cross it: `b`, 1 where the border is like
    what surrounds it.

    x: pictures `b 3 h w` in 0..1. mask: bool `h w`. Steps are absolute differences, in rows and
    columns, averaged over channels; one level of 8 bits is added to both means, so that a flat
    picture scores 1. NaN for a mask without a border.
    """
    within = border(mask, around)
    across, beside = [], []
    for axis in (-1, -2):
        n = x.shape[axis] - 1
        first, second = (mask.narrow(axis, i, n) for i in (0, 1))
        near = within.narrow(axis, 0, n) & within.narrow(axis, 1, n)
        step = (x.narrow(axis, 1, n) - x.narrow(axis, 0, n)).abs().mean(1)
        across.append(step[:, first != second])
        beside.append(step[:, (first == second) & near])
    crossing, other = (torch.cat(parts, 1).mean(1) for parts in (across, beside))
    return (crossing + LEVEL) / (other + LEVEL)


def border(mask: Tensor, width: int) -> Tensor:
    """Pixels bool `h w` on either side of a mask's border, at most `width` from the other side."""
    inside = mask[None, None].float()
    size = 2 * width + 1
    wide, narrow = (F.max_pool2d(m, size, 1, width) for m in (inside, 1 - inside))
    return (wide * narrow)[0, 0].bool()
