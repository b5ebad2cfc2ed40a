"""Quality score: how likely pictures are under a Gaussian mixture fitted to features of real ones
(Gu et al., GIQA, 2020, as Paint by Example reports it). Computed in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FULL = 300.0  # log-likelihood that scores 100
BATCH = 50


@dataclass(frozen=True)
class Mixture:
    """Gaussians with full covariances.

    Attributes:
        weights: `k`, sum 1. means: `k d`. covariances: `k d d`, positive definite.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def log_likelihood(self, features: Tensor) -> Tensor:
        """Of vectors `n d`: float64 `n`. Raises ValueError for a covariance that is not positive
        definite."""
        roots, failed = torch.linalg.cholesky_ex(self.covariances.double())
        if failed.any():
            which = failed.nonzero().flatten().tolist()
            raise ValueError(f"the covariances {which} are not positive definite")
        gaps = features.double()[None] - self.means.double()[:, None]
        white = torch.linalg.solve_triangular(roots, gaps.mT, upper=False)
        volume = roots.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = features.shape[1] * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
        each = -0.5 * (white.square().sum(1) + constant) - volume[:, None]
        return torch.logsumexp(each + self.weights.double().log()[:, None], 0)


def quality_score(mixture: Mixture, features: Tensor, whole_batches: bool = False) -> float:
    """`100 * mean(clip(log-likelihood / 300, 0, 1))`, 0..100.

    whole_batches: as published, what does not fill a batch of 50 is left out. NaN without vectors.
    """
    n = len(features) // BATCH * BATCH if whole_batches else len(features)
    likely = mixture.log_likelihood(features[:n])
    return float(100 * (likely / FULL).clamp(0, 1).mean())
