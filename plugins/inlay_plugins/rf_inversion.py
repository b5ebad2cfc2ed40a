"""RF-Inversion (Rout et al. 2024): to noise and back, steered at both ends.

Up, the velocity is mixed with the one that leads to a noise drawn beforehand, so that the end is
likely under the model (equation 8); down, with the one that leads back to the picture (equation
15). A velocity that leads to a point is a prediction that says so: with it the same holds for
diffusion models, whose noise prediction is mixed with that noise.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from inlay import ConfigError, Frame, Needs, Plugin, Run, Step, Window, hookimpl
from inlay_plugins.inversion import Inverter
from inlay_plugins.schedules import Schedule


class RFInversion(Plugin):
    """Consumes `latent:source`; publishes `start:edit`. The way up is a pass of its own, with the
    lane `inverted`."""

    @dataclass
    class Config:
        """gamma: 0..1 on the way up, 0 is plain inversion, 1 leads to the noise straight. eta: 0..1
        on the way down, a number or a schedule, inside `active`; more keeps more of the picture.
        prompt, guidance: of the way up; published: the empty prompt, which `negative` is unless the
        run has one, and guidance 0 (FLUX's embedded one; there is no classifier-free guidance).
        """

        gamma: float = 0.5
        eta: Any = 0.9
        active: Any = field(default_factory=lambda: [0.0, 0.25])
        prompt: Literal["negative", "source"] = "negative"
        guidance: float = 0.0

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, total, where = self.cfg, need.request.steps, f"plugins.{need.owner}"
        self.eta = Schedule.parse(cfg.eta, total, f"{where}.eta")
        for name, most in (("gamma", cfg.gamma), ("eta", max(v for _, v in self.eta.knots))):
            if not 0 <= most <= 1:
                problem = f"{most} is outside 0..1"
                raise ConfigError(problem, where=f"{where}.{name}", fix="Use a share.")
        window = Window.parse(cfg.active, f"{where}.active")
        self.active = need.active(window) if window else frozenset[int]()
        need.consume("latent:source")
        need.publish("start:edit")
        need.pass_(need.owner, Inverter)
        fields: dict[str, Any] = {"n": need.request.n, "seed": need.request.seed, "keep": False}
        fields |= {"prompt": cfg.prompt, "guidance": cfg.guidance, "true_cfg": 1.0}
        need.lane("inverted", need.owner, **fields)

    @hookimpl
    def inlay_begin(self, run: Run, pass_: str, x: dict[str, Tensor]) -> None:
        if pass_ == self.name:
            self.clean = run.board["latent:source"]
            x["inverted"] = self.clean.expand_as(x["inverted"])
        elif pass_ == "edit":
            run.board["start:edit"] = x["edit"] = run.finals[self.name]["inverted"]

    @hookimpl(wrapper=True)
    def inlay_combine(self, run: Run, step: Step, lane: str) -> Generator[None, Tensor, Tensor]:
        output = yield
        if step.pass_ != self.name:
            return output
        up = towards(step.frame, step.x[lane], run.x_T[step.pass_, lane])
        return output + self.cfg.gamma * (up - output)

    @hookimpl
    def inlay_denoised(self, step: Step) -> None:
        if step.pass_ == "edit" and step.index in self.active:
            x0 = step.x0["edit"]
            step.x0["edit"] = x0 + self.eta(step.progress) * (self.clean - x0)


def towards(frame: Frame, x: Tensor, noise: Tensor) -> Tensor:
    """The prediction at x that means this noise; at sigma 0 too, where any x0 would be x."""
    if frame.predicts == "flow":
        return (noise - x) / frame.alpha
    if frame.predicts == "epsilon" or frame.sigma == 0:
        return noise
    return frame.pred((x - frame.sigma * noise) / frame.alpha, x)
