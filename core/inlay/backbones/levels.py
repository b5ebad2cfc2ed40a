"""The noise levels of a scheduler as frames, and the noise that a DDPM step adds between two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from inlay_config.errors import ModelError

from ..frames import Frame
from .schedulers import TESTED, is_flow, steps_of

if TYPE_CHECKING:
    from .base import Backbone


def of_run(
    scheduler: Any, backbone: Backbone, steps: int, size: tuple[int, int]
) -> list[tuple[int, Frame]]:
    """(the user's step, Frame) of every evaluation of a run at this size. Raises ModelError, as
    `tabulate` does."""
    base = copy.deepcopy(scheduler)
    backbone.set_timesteps(base, steps, None, size)
    return list(zip(steps_of(base, steps), tabulate(base), strict=False))


def frames(scheduler: Any, device: torch.device) -> Callable[[int], Frame]:
    """Frame of an evaluation; tabulated when first asked, so nobody pays who does not ask."""
    table: list[Frame] = []

    def frame_at(i: int) -> Frame:
        for f in () if table else tabulate(scheduler):
            table.append(replace(f, alpha=f.alpha.to(device), sigma=f.sigma.to(device)))
        return table[i]

    return frame_at


def tabulate(scheduler: Any) -> list[Frame]:
    """Frames of every evaluation and of the end; a pass's own solver may bring `frames`.

    Levels are read from `sigmas` or `alphas_cumprod` of a copy whose timesteps are set and whose
    begin index is not (with it set, noising returns the first level at every timestep), and checked
    against the scheduler's own noising. Raises ModelError when they disagree (KDPM2's half-steps).
    """
    if hasattr(scheduler, "frames"):
        return list(scheduler.frames)
    s = copy.deepcopy(scheduler)
    timesteps, flow = s.timesteps.cpu(), is_flow(s)
    predicts = "flow" if flow else getattr(s.config, "prediction_type", "epsilon")
    sigmas, space = getattr(s, "sigmas", None), "vp"
    if sigmas is not None and len(sigmas) == len(timesteps) + 1:
        levels = sigmas.cpu().float()
        alphas = 1 - levels if flow else 1 / (levels**2 + 1).sqrt()
        if not flow and float(getattr(s, "init_noise_sigma", 1)) == 1:
            levels = levels * alphas
        elif not flow:
            space, alphas = "ve", torch.ones_like(levels)
    elif getattr(s, "alphas_cumprod", None) is not None and not flow:
        final = torch.as_tensor(getattr(s, "final_alpha_cumprod", 1.0)).reshape(1)
        cumprod = torch.cat([s.alphas_cumprod.cpu()[timesteps.long()], final]).float()
        alphas, levels = cumprod.sqrt(), (1 - cumprod).sqrt()
    else:
        problem = f"{type(s).__name__} has neither a sigma per timestep nor alphas_cumprod"
        raise ModelError(problem, where="scheduler", fix=f"Use one of {TESTED}.")
    _check(s, timesteps, alphas, levels)
    kind: Literal["vp", "ve", "flow"] = "flow" if flow else "ve" if space == "ve" else "vp"
    return [Frame(a, v, kind, predicts) for a, v in zip(alphas, levels, strict=True)]


def _check(s: Any, timesteps: Tensor, alphas: Tensor, levels: Tensor) -> None:
    """Compare with the scheduler's noising at each timestep that occurs once."""
    name, one, zero = type(s).__name__, torch.ones(1, 1), torch.zeros(1, 1)
    if name == "FlowMatchHeunDiscreteScheduler" or not (
        hasattr(s, "scale_noise") or hasattr(s, "add_noise")
    ):  # Heun's scale_noise ignores t; a pass's own solver has no noising
        return
    for i, t in enumerate(s.timesteps):
        at = t.reshape(1)
        if int((timesteps == t.cpu()).sum()) > 1:
            continue
        if hasattr(s, "scale_noise"):
            said = float(s.scale_noise(one, at, zero)), float(s.scale_noise(zero, at, one))
        else:
            said = float(s.add_noise(one, zero, at)), float(s.add_noise(zero, one, at))
        table = float(alphas[i]), float(levels[i])
        if any(abs(a - b) > 1e-4 * max(1.0, b) for a, b in zip(said, table, strict=True)):
            problem = f"{name} noises step {i} with {said}, its table says {table}"
            raise ModelError(problem, where="scheduler", fix=f"Use one of {TESTED}.")


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
