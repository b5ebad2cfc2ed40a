"""Frames: alpha and sigma at one evaluation, and how prediction, x0 and noise convert there.

x = alpha * x0 + sigma * eps holds for VP, VE and flow models alike (architecture study, C.6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Frame:
    """alpha, sigma: 0-d float32. predicts: what the model's output means."""

    alpha: Tensor
    sigma: Tensor
    space: Literal["vp", "ve", "flow"]
    predicts: str  # epsilon | v_prediction | sample | flow

    @property
    def signal(self) -> Tensor:
        """Share of the picture in x, 0..1: alpha of the same mixture at unit variance."""
        return self.alpha / (self.alpha**2 + self.sigma**2).sqrt()

    def shown(self, x: Tensor) -> Tensor:
        """x as the model sees it: at unit variance where sigma is unbounded."""
        return x / (self.sigma**2 + 1).sqrt() if self.space == "ve" else x

    def x0(self, pred: Tensor, x: Tensor) -> Tensor:
        """Clean estimate; channels beyond those of x (a learned variance) are not looked at. With
        eps it is unbounded at alpha = 0."""
        a, s, pred = self.alpha, self.sigma, pred[:, : x.shape[1]]
        if self.predicts == "sample":
            return pred
        if self.predicts == "flow":
            return x - s * pred
        if self.predicts == "epsilon":
            return (x - s * pred) / a
        norm = a**2 + s**2  # v of the unit-variance x: 1 in VP, 1 + sigma² in VE
        return (a * x - s * norm.sqrt() * pred) / norm

    def pred(self, x0: Tensor, x: Tensor) -> Tensor:
        """The model output that means `x0` at `x`; inverse of `x0(pred, x)`."""
        a, s = self.alpha, self.sigma
        if self.predicts == "sample":
            return x0
        if self.predicts == "flow":
            return (x - x0) / s
        if self.predicts == "epsilon":
            return (x - a * x0) / s
        norm = a**2 + s**2
        return (a * x - norm * x0) / (s * norm.sqrt())

    def eps(self, x0: Tensor, x: Tensor) -> Tensor:
        return (x - self.alpha * x0) / self.sigma

    def noise(self, x0: Tensor, eps: Tensor) -> Tensor:
        """x at this noise level."""
        return self.alpha * x0 + self.sigma * eps
