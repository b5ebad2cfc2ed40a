"""Perceptual distance of pictures `b 3 h w` in 0..1, over the picture or inside a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from inlay_bench.metrics.pixels import alike_outside, mean_inside

if TYPE_CHECKING:
    from inlay_bench.networks import Distance


def lpips(network: Distance, x: Tensor, y: Tensor, where: Tensor | None = None) -> Tensor:
    """LPIPS (Zhang et al., 2018): `b`, 0 = equal, seldom above 1.

    where: `1 1 h w` or `b 1 h w`, bool, the pixels that count. With it, the pictures are first made
    alike elsewhere, and the value is the mean of the spatial map over those pixels (its layers
    resized bilinearly), NaN where nothing counts. Without it, the published mean over each layer.
    """
    if where is None:
        return network.distances(x, y)
    return mean_inside(network.maps(x, alike_outside(x, y, where)), where)
