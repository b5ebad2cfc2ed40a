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
        return torch.logsumexp(self.joint(features), 0)

    def joint(self, features: Tensor) -> Tensor:
        """Log-likelihood of vectors `n d` and a Gaussian together: float64 `k n`."""
        x, dimensions = features.double(), features.shape[1]
        roots, failed = torch.linalg.cholesky_ex(self.covariances.double())
        if failed.any():
            which = failed.nonzero().flatten().tolist()
            raise ValueError(f"the covariances {which} are not positive definite")
        constant = dimensions * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
        each = []
        for root, mean in zip(roots, self.means.double(), strict=True):
            white = torch.linalg.solve_triangular(root, (x - mean).T, upper=False)
            volume = root.diagonal().log().sum()
            each.append(-0.5 * (white.square().sum(0) + constant) - volume)
        return torch.stack(each) + self.weights.double().log()[:, None]


def fit(
    features: Tensor, components: int = 20, seed: int = 0, iterations: int = 100, tol: float = 1e-3
) -> Mixture:
    """A mixture fitted to vectors `n d` by expectation and maximisation (Dempster et al., 1977),
    from k-means++; 1e-6 is added to variances. It ends when the mean log-likelihood gains less than
    `tol`. Raises ValueError for fewer vectors than components.
    """
    x = features.double()
    n, d = x.shape
    if n < components:
        raise ValueError(f"{components} Gaussians need as many pictures or more, there are {n}")
    mine = torch.nn.functional.one_hot(_clusters(x, components, seed), components).double()
    before = -torch.inf
    ridge = 1e-6 * torch.eye(d, dtype=x.dtype)
    for _ in range(iterations):
        weight = mine.sum(0) + 10 * torch.finfo(x.dtype).eps
        means = (mine.T @ x) / weight[:, None]
        spread = torch.stack([_scatter(x - m, s) for m, s in zip(means, mine.T, strict=True)])
        spread = spread / weight[:, None, None]
        mixture = Mixture(weight / n, means, spread + ridge)
        each = mixture.joint(x)
        likely = torch.logsumexp(each, 0)
        mine = (each - likely).exp().T
        if float(likely.mean()) - before < tol:
            break
        before = float(likely.mean())
    return mixture


def _scatter(gaps: Tensor, share: Tensor) -> Tensor:
    """Sum of outer products `d d` of vectors `n d`, weighed by `n`."""
    return (gaps * share[:, None]).T @ gaps


def _clusters(x: Tensor, k: int, seed: int, rounds: int = 50) -> Tensor:
    """The nearest of k centres for each vector, by k-means (Lloyd, 1982) from vectors that are far
    from each other (k-means++, Arthur and Vassilvitskii, 2007)."""
    generator = torch.Generator().manual_seed(seed)
    centres = x[torch.randint(len(x), (1,), generator=generator)]
    for _ in range(k - 1):
        far = torch.cdist(x, centres).amin(1).square() + torch.finfo(x.dtype).tiny
        centres = torch.cat([centres, x[torch.multinomial(far, 1, generator=generator)]])
    nearest = torch.cdist(x, centres).argmin(1)
    for _ in range(rounds):
        one = torch.nn.functional.one_hot(nearest, k).to(x)
        filled = one.sum(0) > 0
        centres = torch.where(
            filled[:, None], one.T @ x / one.sum(0).clamp(min=1)[:, None], centres
        )
        moved = torch.cdist(x, centres).argmin(1)
        if torch.equal(moved, nearest):
            break
        nearest = moved
    return nearest


def quality_score(mixture: Mixture, features: Tensor, whole_batches: bool = False) -> float:
    """`100 * mean(clip(log-likelihood / 300, 0, 1))`, 0..100.

    whole_batches: as published, what does not fill a batch of 50 is left out. NaN without vectors.
    """
    n = len(features) // BATCH * BATCH if whole_batches else len(features)
    likely = mixture.log_likelihood(features[:n])
    return float(100 * (likely / FULL).clamp(0, 1).mean())
