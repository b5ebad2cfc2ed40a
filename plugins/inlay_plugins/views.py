"""What losses look at: the picture that a lane is becoming, and the part of it that is meant.

No hooks. Pictures are `n 3 h w` in about -1..1, in float32, in the graph of the step.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from inlay import InputError, Run, Step
from inlay_plugins import masks

View = Literal["blended", "x0"]


def view(run: Run, step: Step, lane: str, kind: View) -> Tensor:
    """The picture of a lane: x0, the clean estimate, or blended, as published (Blended Diffusion).

    blended: s·x0 + (1 - s)·x of the unit-variance x, s its noise level: the estimate early on, when
    x is all noise, and what is there later, when the estimate no longer follows x.
    """
    x0 = step.x0[lane]
    if kind == "blended":
        alpha, sigma = step.frame.alpha, step.frame.sigma
        norm = (alpha**2 + sigma**2).sqrt()
        share = sigma / norm
        x0 = share * x0 + (1 - share) * step.x[lane] / norm
    return run.backbone.pixels(x0, run.size).float()


def region(run: Run, key: str, like: Tensor) -> Tensor:
    """The mask of a board key at the size of the picture `like`, `b 1 h w` in 0..1, 1 = the edit's;
    grey counts in part. "": the whole picture. Raises InputError for a mask without any white."""
    if not key:
        return like.new_ones(1, 1, *like.shape[-2:])
    mask = masks.resize(run.board[key].to(like.device).float(), like.shape[-2:])
    if not mask.any():
        raise InputError("the mask is black everywhere, so nothing is to be edited", where=key,
                         fix="Paint white what may change.")  # fmt: skip
    return mask
