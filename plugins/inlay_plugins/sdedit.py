"""SDEdit (Meng et al. 2022): noise a guide to a middle level, and let the model draw from there.

The guide is a picture (a photograph, or strokes of paint) or one that was drawn before. Outside a
mask it comes back, noised, after each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from inlay import ConfigError, Needs, Plugin, Run, Step, hookimpl
from inlay_plugins import masks
from inlay_plugins.schedules import img2img_start


class SDEdit(Plugin):
    """Consumes `latent:source`, and the mask if one is named; publishes `start:edit`."""

    @dataclass
    class Config:
        """strength: share of the steps that are made, counted as diffusers' image-to-image does
        (a flow model rounds up, others down); null: half; published for strokes: 0.3 to 0.6. sigma:
        in its place, the noise to start from, in the scheduler's units; the first step at or below.
        repeats: the result is the next guide, with other noise; each but the last is a pass.

        mask: a board key, 1 = the edit's; null: the whole picture. grey: of the mask, mix is that
        share of the edit; release is each pixel's own strength, a share of the steps that are made:
        darker pixels are let go later. noise: of the guide around the mask, fixed is the start's,
        fresh drawn in each step, auto is fresh where the solver draws noise itself.

        mode: reference puts back the guide of the level just left, a step too noisy, with fixed
        noise, and so leaves noise in the result (the published code's).
        """

        strength: float | None = None
        sigma: float | None = None
        repeats: int = 1
        mask: str | None = None
        grey: Literal["mix", "release"] = "mix"
        noise: Literal["auto", "fixed", "fresh"] = "auto"
        mode: Literal["fixed", "reference"] = "fixed"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, total, where = self.cfg, need.request.steps, f"plugins.{need.owner}"
        if cfg.repeats < 1:
            raise ConfigError("less than one run", where=f"{where}.repeats", fix="Use 1 or more.")
        need.consume("latent:source")
        need.publish("start:edit")
        if cfg.mask:
            need.consume(cfg.mask)
        self.start = img2img_start(cfg.strength, cfg.sigma, need.request.levels(), total, where)
        made, fields = range(self.start, total), {"prompt": "edit", "n": need.request.n}
        self.passes = [f"{need.owner}_{k}" for k in range(1, cfg.repeats)]
        for k, name in enumerate(self.passes, 1):
            need.pass_(name)
            seed = (need.request.seed + k * 0x9E3779B9) % 2**32  # no neighbouring run's
            need.lane("edit", name, made, seed=seed, keep=False, **fields)
        self.passes.append("edit")
        need.lane("edit", active=made)

    @hookimpl
    def inlay_begin(self) -> None:
        self.pending = True

    @hookimpl
    def inlay_pre_step(self, run: Run, step: Step) -> None:
        if not self._acts(step):
            return
        if step.index == self.start and self.pending:
            self.pending = False  # a step may have several evaluations
            guide = self._guide(run, self.passes.index(step.pass_), step.x["edit"])
            step.x["edit"] = step.frame.noise(guide, run.x_T[step.pass_, "edit"])
            run.board["start:edit"] = step.x["edit"]
        self.drawn = run.generators[step.pass_, "edit"].get_state()

    @hookimpl
    def inlay_post_step(self, run: Run, step: Step) -> None:
        cfg = self.cfg
        if not (cfg.mask and self._acts(step) and step.last_eval):
            return
        keep = self.mask
        if cfg.grey == "release":
            left = (step.total - step.index) / (step.total - self.start)
            keep = (keep >= left - 1e-6).to(keep)
        fresh = cfg.noise == "fresh"
        if cfg.noise == "auto" and cfg.mode == "fixed":
            fresh = not self.drawn.equal(run.generators[step.pass_, "edit"].get_state())
        noise = run.x_T[step.pass_, "edit"]
        if fresh:
            noise = run.noise(f"{self.name}/{step.pass_}/{step.eval}", noise.shape)
        if cfg.mode == "reference":
            around = step.frame.noise(self.clean, noise)
        elif step.index == step.total - 1:  # some schedules end above sigma 0
            around = self.clean
        else:
            around = step.next_frame.noise(self.clean, noise)
        step.x_next["edit"] = keep * step.x_next["edit"] + (1 - keep) * around

    def _acts(self, step: Step) -> bool:
        return step.pass_ in self.passes and step.index >= self.start and "edit" in step.lanes

    def _guide(self, run: Run, repeat: int, x: Tensor) -> Tensor:
        """What this repeat starts from; before the first, guide and mask as latents."""
        if repeat == 0:
            self.clean = run.board["latent:source"]
            if self.cfg.mask:
                latent = run.backbone.unpack(x, run.size)
                mask = masks.resize(run.board[self.cfg.mask], latent.shape[-2:]).to(latent)
                self.mask = run.backbone.pack(mask.expand(len(mask), *latent.shape[1:]))
            return self.clean
        result = run.finals[self.passes[repeat - 1]]["edit"]
        if self.cfg.mask and self.cfg.mode == "reference":
            return self.mask * result + (1 - self.mask) * self.clean
        return result
