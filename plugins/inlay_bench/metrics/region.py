"""Similarity of the edited region with an exemplar (Yang et al., Paint by Example, 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from inlay_bench.networks import Encoder

Mode = Literal["fixed", "reference"]


def region_score(
    encoder: Encoder, edited: Tensor, mask: Tensor, exemplar: Tensor, mode: Mode = "fixed"
) -> float:
    """Cosine of the cropped region and the exemplar, times 100: -100..100.

    Args:
        encoder: sees squares of its side; the crop is squashed to it bilinearly without
            antialiasing, as published.
        edited: `1 3 h w` in 0..1.
        mask: bool `h w`, the edited region; raises ValueError when it is empty.
        exemplar: `1 3 h w` in 0..1. Its preparation is part of the published number: squashed to
            the encoder's side by Pillow's bicubic filter (`PIL.Image.resize`). A picture of another
            size is squashed here, antialiased.
        mode: see `crop`.
    """
    size = (encoder.side, encoder.side)
    left, top, right, bottom = crop(mask, mode)
    region = F.interpolate(edited[..., top:bottom, left:right], size, mode="bilinear")
    if exemplar.shape[-2:] != size:
        exemplar = F.interpolate(exemplar, size, mode="bicubic", antialias=True).clamp(0, 1)
    return float(100 * F.cosine_similarity(encoder.images(region), encoder.images(exemplar)))


def crop(mask: Tensor, mode: Mode = "fixed") -> tuple[int, int, int, int]:
    """Left, top, right, bottom (exclusive) of a mask, bool `h w`.

    `fixed`: its bounding box. `reference`: the published crop, from the first to the last masked
    pixel in reading order, both ends exclusive at the far side: a rectangle loses its last row and
    column, another shape is cut by where its first and last rows happen to lie.
    Raises ValueError when nothing is masked, or the published crop is empty.
    """
    pixels = mask.nonzero()
    if not len(pixels):
        raise ValueError("the mask is empty: there is no region to compare")
    if mode == "fixed":
        (top, left), (bottom, right) = pixels.amin(0).tolist(), (pixels.amax(0) + 1).tolist()
    else:
        (top, left), (bottom, right) = pixels[0].tolist(), pixels[-1].tolist()
    if right <= left or bottom <= top:
        raise ValueError("the published crop of this mask is empty; use the mode 'fixed'")
    return left, top, right, bottom
