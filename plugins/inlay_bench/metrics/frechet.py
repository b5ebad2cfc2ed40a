"""Fréchet distance of two sets of pictures, from Gaussians fitted to their features.

With the features of `networks.inception` it is the FID (Heusel et al., 2017); with a CLIP encoder's
it is what Paint by Example (Yang et al., 2023) publishes under that name. The two are not
comparable. Features are not kept: `Statistics` runs over them in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Statistics:
    """Count, mean and scatter of vectors `n d`, updated batch by batch (Chan et al., 1979)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: Tensor) -> Statistics:
        """Take in vectors `b d`; returns itself."""
        new = features.detach().cpu().double()
        if not len(new):
            return self
        mean = new.mean(0)
        scatter = (new - mean).T @ (new - mean)
        if self.n:
            n, gap = self.n + len(new), mean - self.mean
            scatter += self.scatter + gap.outer(gap) * (self.n * len(new) / n)
            mean = self.mean + gap * (len(new) / n)
        self.n, self.mean, self.scatter = self.n + len(new), mean, scatter
        return self

    @property
    def covariance(self) -> Tensor:
        """`d d`, divided by n - 1. Raises ValueError for fewer than two vectors."""
        if self.n < 2:
            raise ValueError(f"a covariance needs two pictures or more, there are {self.n}")
        return self.scatter / (self.n - 1)


def distance(a: Statistics, b: Statistics) -> float:
    """`|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))` of two Gaussians (Dowson & Landau, 1982):
    0 = equal, no upper limit.

    The trace of the root is the sum of the roots of the eigenvalues of `A^(1/2) B A^(1/2)`. That
    is symmetric: singular covariances (fewer pictures than dimensions) need no regularisation.
    Raises ValueError for fewer than two pictures.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * _roots(values)) @ vectors.T
    shared = _roots(torch.linalg.eigvalsh(root @ b.covariance @ root)).sum()
    gap = (a.mean - b.mean).square().sum()
    return float(gap + a.covariance.trace() + b.covariance.trace() - 2 * shared)


def _roots(eigenvalues: Tensor) -> Tensor:
    """Roots `d`, 0 for what is rounding: its root would be a hundred million times larger."""
    noise = eigenvalues.amax() * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return torch.where(eigenvalues > noise, eigenvalues, 0.0).clamp(min=0).sqrt()


def collect(embed: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Statistics:
    """Statistics of pictures, batch by batch. `embed` is `inception().features` for an FID, or an
    encoder's `images` for a CLIP-Fréchet distance (of unit vectors, so 0..4)."""
    statistics = Statistics()
    for x in batches:
        statistics.update(embed(x))
    return statistics
