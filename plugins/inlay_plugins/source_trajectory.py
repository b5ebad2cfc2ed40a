"""The source lane: where the source picture is at every noise level (Add-it, Tewel et al. 2024).

regenerate   a pass of its own draws the source from its prompt; its latents are kept
interpolate  a picture, encoded once and mixed with one fixed noise (section 3.5); no evaluation
invert       a picture, carried up the noise levels by Euler's predictor and an endpoint corrector
rf_solver, fireflow, ddim   by one of the solvers of inlay_plugins.inversion

The lane follows that path: it is reset before every forward, so errors of the solver do not add up,
and its rows are evaluated only in steps where somebody attends to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from inlay import ConfigError, Needs, Plugin, Result, Run, Step, hookimpl
from inlay_plugins import inversion

Trajectory = Callable[[Step, int], Tensor]
"""(step, ahead) -> the source's latent `1 …` `ahead` evaluations after the start of this one."""


class SourceTrajectory(Plugin):
    """Publishes `latent:source` (clean, model layout) and `trajectory:source` (a Trajectory).

    latent: a clean latent in place of a picture, for an instance made in code.
    """

    @dataclass
    class Config:
        """provide: auto is interpolate with a picture and regenerate without. seed: of the source's
        noise, whatever the run's seed. guidance: null is 1 for a picture, the run's otherwise.
        fixed_point_iterations: of `invert`, evaluations per step, 1 = no corrector. use_offset:
        move the edit by what the solver misses on the source in the same step.
        """

        provide: Literal[
            "auto", "regenerate", "interpolate", "invert", "rf_solver", "fireflow", "ddim"
        ] = "auto"
        seed: int = 6311
        guidance: float | None = None
        fixed_point_iterations: int = 2
        use_offset: bool = False

    def __init__(self, cfg: Any = None, name: str = "", latent: Tensor | None = None) -> None:
        super().__init__(cfg, name)
        self.latent = latent
        self._kept: list[Tensor] = []

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, where = self.cfg, f"plugins.{need.owner}"
        given = self.latent is not None or "image:source" in need.request.inputs
        self.provide = cfg.provide
        if cfg.provide == "auto":
            self.provide = "interpolate" if given else "regenerate"
        elif cfg.provide != "regenerate" and not given:
            raise ConfigError(f"provide: {cfg.provide} needs a picture", where=f"{where}.provide",
                              fix="Set input.image, or provide: regenerate.")  # fmt: skip
        if cfg.fixed_point_iterations < 1:
            raise ConfigError("less than one evaluation per step", fix="Use 1 or more.",
                              where=f"{where}.fixed_point_iterations")  # fmt: skip
        guidance = cfg.guidance
        if guidance is None and self.provide != "regenerate" and not _names_source(need):
            guidance = 1.0
        lane = {"prompt": "source", "seed": cfg.seed, "guidance": guidance}
        if self.provide == "regenerate":
            need.pass_("source")
            need.lane("source", "source", **lane)
        elif self.provide != "interpolate":
            make, evaluations = inversion.solvers(cfg.fixed_point_iterations)[self.provide]
            need.pass_("invert", make, evaluations(need.request.steps))
            alone: dict[str, Any] = {
                "prompt": "source",
                "guidance": 1.0,
                "true_cfg": 1.0,
                "keep": False,
            }
            need.lane("source", "invert", **alone)
        every = range(need.request.steps) if cfg.use_offset else None
        need.lane("source", active=every, follows=True, keep=False, **lane)
        need.publish("latent:source")
        need.publish("trajectory:source")

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        self._kept.clear()
        if self.latent is not None:
            run.board["latent:source"] = self.latent.to(run.device, run.dtype)
        elif self.provide != "regenerate":
            run.board["latent:source"] = run.backbone.encode_image(run.board["image:source"])

    @hookimpl
    def inlay_begin(self, run: Run, pass_: str, x: dict[str, Tensor]) -> None:
        if "source" in run.finals and "latent:source" not in run.board:  # regenerated
            run.board["latent:source"] = run.finals["source"]["source"]
            self._kept.append(run.board["latent:source"])
        if pass_ == "invert":
            x["source"] = run.board["latent:source"]
            self._kept.append(x["source"])
        elif pass_ == "edit":
            run.board["trajectory:source"] = self._trajectory(run)

    @hookimpl
    def inlay_pre_step(self, run: Run, step: Step) -> None:
        if step.pass_ == "source":
            self._kept.append(step.x["source"])
        elif step.pass_ == "edit" and "source" in step.lanes:
            step.x["source"] = run.board["trajectory:source"](step, 0)

    @hookimpl
    def inlay_post_step(self, run: Run, step: Step) -> None:
        if step.pass_ == "invert" and step.last_eval:
            self._kept.append(step.x_next["source"])
        elif step.pass_ == "edit" and self.cfg.use_offset and "edit" in step.lanes:
            last = step.last_eval and step.index == step.total - 1
            if not (last and self.provide == "interpolate"):  # as published: its list ends there
                exact = run.board["trajectory:source"](step, 1)
                step.x_next["edit"] = step.x_next["edit"] + exact - step.x_next["source"]

    @hookimpl
    def inlay_final(self, run: Run, result: Result) -> None:
        if run.backbone.decodes and "source" not in result.images:
            picture = run.board.get("image:source")
            if picture is None:
                picture = run.backbone.decode(run.board["latent:source"], run.size)
            result.images["source"] = picture

    def _trajectory(self, run: Run) -> Trajectory:
        if self.provide == "interpolate":
            clean, noise = run.board["latent:source"], run.x_T["edit", "source"]
            return lambda step, ahead: step.frame_at(step.eval + ahead).noise(clean, noise)
        path = self._kept if self.provide == "regenerate" else self._kept[::-1]
        return lambda step, ahead: path[step.eval + ahead]


def _names_source(need: Needs) -> bool:
    return isinstance(need.request.guidance, dict) and "source" in need.request.guidance
