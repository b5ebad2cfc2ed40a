"""The noise that a DDPM step adds, from the frames alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..frames import Frame


def variance(kind: str, here: Frame, after: Frame, output: Tensor, like: Tensor) -> Tensor:
    """Σ of the step between two frames (Ho et al. 2020, eq. 7), by the scheduler's variance_type.

    A learned one is read from the channels of `output` behind those of `like` (Nichol & Dhariwal
    2021, eq. 15) and has the shape of `like`; others are 0-d. The last step adds no noise: 0.
    """
    if not after.sigma:
        return torch.zeros_like(here.sigma)
    large = 1 - (here.alpha / after.alpha) ** 2
    small = (large * (after.sigma / here.sigma) ** 2).clamp_min(1e-20)
    if "learned" not in kind:
        return large if "large" in kind else small
    said = output[:, like.shape[1] :].float()
    if kind == "learned":
        return said.exp()
    share = (said + 1) / 2
    return torch.exp(share * large.log() + (1 - share) * small.log())
