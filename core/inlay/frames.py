"""Frames: what alpha and sigma are at each evaluation of a scheduler, and how prediction, x0 and noise convert.

x = alpha * x0 + sigma * eps holds at every evaluation, for VP, VE and flow schedulers (architecture study C.6).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import ModelError

Space = Literal["vp", "ve", "flow"]


@dataclass(frozen=True, slots=True)
class Frame:
    """alpha, sigma: 0-d float32. predicts: what the model's output means in this frame."""

    alpha: Tensor
    sigma: Tensor
    space: Space
    predicts: Literal["epsilon", "v_prediction", "sample", "flow"]

    def x0(self, pred: Tensor, x: Tensor) -> Tensor:
        """Clean estimate from the model's output. eps needs alpha > 0: at alpha = 0 it is unbounded."""
        a, s = self.alpha, self.sigma
        if self.predicts == "sample":
            return pred
        if self.predicts == "flow":
            return x - s * pred
        if self.predicts == "epsilon":
            return (x - s * pred) / a
        # v = (a·eps - s·x0) / hypot(a, s) of the unit-variance x: written so that it holds in VP (hypot 1) and VE (a 1)
        return (a * x - s * (a**2 + s**2).sqrt() * pred) / (a**2 + s**2)

    def pred(self, x0: Tensor, x: Tensor) -> Tensor:
        """Model output that means `x0` at `x`; the inverse of `x0(pred, x)`."""
        a, s = self.alpha, self.sigma
        if self.predicts == "sample":
            return x0
        if self.predicts == "flow":
            return (x - x0) / s
        if self.predicts == "epsilon":
            return (x - a * x0) / s
        return (a * x - (a**2 + s**2) * x0) / (s * (a**2 + s**2).sqrt())

    def eps(self, x0: Tensor, x: Tensor) -> Tensor:
        return (x - self.alpha * x0) / self.sigma

    def noise(self, x0: Tensor, eps: Tensor) -> Tensor:
        """x at this noise level."""
        return self.alpha * x0 + self.sigma * eps


def tabulate(scheduler: Any) -> list[Frame]:
    """Frames of every evaluation plus the one after the last, from a copy of a scheduler whose timesteps are set
    and whose begin index is not (with it set, noising returns the first level for every timestep).

    Levels are read from `sigmas` or `alphas_cumprod` and checked against the scheduler's own noising at each distinct timestep.
    Raises ModelError for a scheduler whose levels cannot be tabulated (interpolated half-steps such as KDPM2).
    """
    s = copy.deepcopy(scheduler)
    name, config = type(s).__name__, s.config
    timesteps = s.timesteps.cpu()
    flow = hasattr(s, "scale_noise") or getattr(config, "use_flow_sigmas", False)
    predicts = "flow" if flow else getattr(config, "prediction_type", "epsilon")
    sigmas = getattr(s, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(timesteps) + 1:
        level = sigmas.cpu().float()
        space: Space = "flow" if flow else "ve" if float(torch.as_tensor(s.init_noise_sigma)) != 1.0 else "vp"
        alphas = 1 - level if flow else torch.ones_like(level) if space == "ve" else 1 / (level**2 + 1).sqrt()
        levels = level if space != "vp" else level * alphas
    elif getattr(s, "alphas_cumprod", None) is not None and not flow:
        final = getattr(s, "final_alpha_cumprod", torch.tensor(1.0))
        cumprod = torch.cat([s.alphas_cumprod.cpu()[timesteps.long()], torch.as_tensor(final).reshape(1)]).float()
        space, alphas, levels = "vp", cumprod.sqrt(), (1 - cumprod).sqrt()
    else:
        raise ModelError(f"{name} has neither one sigma per timestep nor alphas_cumprod", where="scheduler",
                         fix="Use DDIM, DDPM, Euler, Euler ancestral, DPM++ multistep, UniPC, PNDM or FlowMatchEuler.")  # fmt: skip
    _check(s, timesteps, alphas, levels, name)
    return [Frame(a, v, space, predicts) for a, v in zip(alphas, levels, strict=True)]


def _check(s: Any, timesteps: Tensor, alphas: Tensor, levels: Tensor, name: str) -> None:
    """Compare with the scheduler's own noising wherever a timestep occurs once (a repeated one is ambiguous to it)."""
    noising = getattr(s, "scale_noise", None) or getattr(s, "add_noise", None)
    if noising is None or type(s).__name__ == "FlowMatchHeunDiscreteScheduler":  # its scale_noise ignores t
        return
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    for i, t in enumerate(s.timesteps):
        if int((timesteps == t.cpu()).sum()) > 1:
            continue
        at = t.reshape(1)
        mean = noising(one, at, zero) if hasattr(s, "scale_noise") else noising(one, zero, at)
        std = noising(zero, at, one) if hasattr(s, "scale_noise") else noising(zero, one, at)
        if abs(float(mean) - float(alphas[i])) > 1e-4 or abs(float(std) - float(levels[i])) > 1e-4 * max(1.0, float(levels[i])):
            raise ModelError(f"{name} noises step {i} with ({float(mean):.4f}, {float(std):.4f}), its table says "
                             f"({float(alphas[i]):.4f}, {float(levels[i]):.4f})", where="scheduler",
                             fix="This scheduler's half-steps have no frame; use Euler, DDIM, UniPC or FlowMatchEuler.")  # fmt: skip
