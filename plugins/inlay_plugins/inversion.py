"""Solvers from clean to noise over the levels of a scheduler, with the interface of a scheduler.

euler      predictor, and an endpoint corrector repeated at will (Add-it's inverter)
ddim       the slope at x under the level above, as in diffusers' DDIMInverseScheduler
rf_solver  the explicit midpoint, two evaluations per step (RF-Solver, Wang et al. 2024)
fireflow   the same with the last step's midpoint slope reused, one evaluation (Deng et al. 2024)

The slope is the velocity of a flow model and the noise of a diffusion model. No hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inlay import ConfigError, Frame, tabulate


class Inverter:
    """Euler from clean to noise: a predictor and `iterations` - 1 correctors, the same step from
    the same start with the slope at the point predicted before.

    levels: Frame of each level, clean first. timesteps, frames: of each evaluation, and of the end.
    order: evaluations per step. Raises ConfigError for a scheduler with several evaluations per
    step, which has no path of levels to go back on.
    """

    def __init__(self, base: Any, iterations: int = 1) -> None:
        self.levels: list[Frame] = tabulate(base)[::-1]
        repeated = len(base.timesteps.unique()) < len(base.timesteps)
        if repeated or self.levels[0].predicts == "sample":
            problem = f"{type(base).__name__} cannot be inverted"
            fix = "Use one that evaluates a step once: DDIM, Euler, DPM++ or FlowMatchEuler."
            raise ConfigError(problem, where="scheduler", fix=fix)
        self.steps, up = len(base.timesteps), base.timesteps.flip(0)
        self.times = torch.cat([torch.zeros_like(up[:1]), up])  # of each level
        ends = [k + (part > 0) for k in range(self.steps) for part in range(iterations)]
        self.order, self.timesteps = iterations, self.times[ends]
        self.frames = [self.levels[k] for k in [*ends, self.steps]]
        self._evaluation = 0

    def scale_model_input(self, x: Tensor, t: Tensor) -> Tensor:
        """Variance-exploding models see unit variance."""
        frame = self.frames[self._evaluation]
        return x / (frame.sigma**2 + 1).sqrt() if frame.space == "ve" else x

    def step(
        self, output: Tensor, t: Tensor, x: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """One evaluation: from the start of the step, along the slope found at x."""
        here, step = self.frames[self._evaluation], self._evaluation // self.order
        if self._evaluation % self.order == 0:
            self._start = x.float()
        low, high = self.levels[step : step + 2]
        self._evaluation += 1
        output, x = output.float(), x.float()
        if here.predicts == "flow":
            return (self._start + (high.sigma - low.sigma) * output,)
        known = here.predicts == "epsilon" or here.sigma == 0  # v at sigma 0 is the noise
        noise = output if known else here.eps(here.x0(output, x), x)
        return (high.noise((self._start - low.sigma * noise) / low.alpha, noise),)


class DdimInverter(Inverter):
    """Evaluates x as though it were at the end of the step already. Raises ConfigError for a flow
    model, whose Euler inversion needs no such guess."""

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        if self.levels[0].predicts == "flow":
            fix = "Use invert, rf_solver or fireflow."
            raise ConfigError("ddim inverts diffusion models", where="scheduler", fix=fix)
        self.timesteps = self.times[1:]


class MidpointInverter(Inverter):
    """x + Δσ·v(x + Δσ/2·v, halfway). reuse: v is the slope halfway through the step before, so that
    all steps but the first take one evaluation. Raises ConfigError unless the model is a flow."""

    def __init__(self, base: Any, reuse: bool) -> None:
        super().__init__(base)
        if self.levels[0].predicts != "flow":
            fix = "Use invert or ddim."
            raise ConfigError("midpoint solvers invert flow models", where="scheduler", fix=fix)
        self.order = 1 if reuse else 2
        starts = {0} if reuse else set(range(self.steps))
        self._places = [(k, half) for k in range(self.steps) for half in (False, True)
                        if half or k in starts]  # fmt: skip
        middle = (self.times[1:] + self.times[:-1]) / 2
        self.timesteps = torch.stack([(middle if h else self.times)[k] for k, h in self._places])
        self.frames = [self._frame(k, half) for k, half in self._places] + [self.levels[-1]]

    def _frame(self, k: int, half: bool) -> Frame:
        low, high = self.levels[k : k + 2]
        sigma = (low.sigma + high.sigma) / 2
        return Frame(1 - sigma, sigma, "flow", "flow") if half else low

    def scale_model_input(self, x: Tensor, t: Tensor) -> Tensor:
        """x is where the step starts; the model may be asked halfway through it."""
        k, half = self._places[self._evaluation]
        low, high = self.levels[k : k + 2]
        return (x + (high.sigma - low.sigma) / 2 * self._slope).to(x.dtype) if half else x

    def step(
        self, output: Tensor, t: Tensor, x: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """x stays where it is until the slope halfway is known."""
        k, half = self._places[self._evaluation]
        low, high = self.levels[k : k + 2]
        self._evaluation, self._slope = self._evaluation + 1, output.float()
        return (x.float() + (high.sigma - low.sigma) * self._slope if half else x,)


Solver = tuple[Callable[[Any], Inverter], Callable[[int], int]]
"""What makes the solver of a scheduler, and its evaluations for a number of steps."""


def solvers(iterations: int) -> dict[str, Solver]:
    """By name; iterations: of `invert`."""
    return {
        "invert": (lambda base: Inverter(base, iterations), lambda steps: steps * iterations),
        "ddim": (DdimInverter, lambda steps: steps),
        "rf_solver": (lambda base: MidpointInverter(base, False), lambda steps: 2 * steps),
        "fireflow": (lambda base: MidpointInverter(base, True), lambda steps: steps + 1),
    }
