"""Latent blending: at listed steps the source's latent is put back outside a mask.

z_edit <- m·z_edit + (1 - m)·z_source (Add-it, section 3.4; Blended Diffusion, Algorithm 2, and
Blended Latent Diffusion do it at all steps). Latents of a pixel model are the pictures themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from inlay import ConfigError, Needs, Plugin, Run, Step, Window, hookimpl
from inlay_plugins import masks
from inlay_plugins.schedules import step_index


class LatentBlend(Plugin):
    """Consumes the mask, and `trajectory:source` or, with noise of its own, `latent:source`."""

    @dataclass
    class Config:
        """steps: each a step, or a window [first, last]; []: never. mask: a board key, 1 = the
        edit's: mask:subject, or mask:user of the caller. shrink: the mask starts that many cells
        wider and loses them until the run's end (BLD, section 4.3: 3), so that thin ones take;
        below 0 narrower, and gains them, as published for an inverted mask. pace: of shrinking;
        published stays with a width one step longer, and may not reach the end.

        background: noised is the source exactly at the next noise level, without an evaluation;
        lane, as published by Add-it, is where the solver takes the source lane, whose rows then
        live there. noise: of a noised background: source, its trajectory's, the same in all steps;
        shared, drawn anew in each step for all pictures (Blended Diffusion); own, for each picture.
        level: next, or current, the level just left, as published: a step too noisy. when: before
        blends what the model is about to see, at its own level (BLD), and leaves the last step's
        result alone.

        mode: fixed keeps soft edges of a resized mask; reference counts cells above 0.01 fully.
        """

        steps: list[Any] = field(default_factory=lambda: [0.5])
        background: Literal["noised", "lane"] = "noised"
        noise: Literal["source", "shared", "own"] = "source"
        level: Literal["next", "current"] = "next"
        when: Literal["after", "before"] = "after"
        mask: str = "mask:subject"
        shrink: int = 0
        pace: Literal["even", "published"] = "even"
        mode: Literal["fixed", "reference"] = "fixed"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, total, where = self.cfg, need.request.steps, f"plugins.{need.owner}.steps"
        self.steps: set[int] = set()
        for item in cfg.steps:
            if isinstance(item, int | float):
                self.steps.add(step_index(item, total, where))
            elif (window := Window.parse(item, where)) is not None:
                self.steps |= set(window.steps(total, where))
        lane, drawn = cfg.background == "lane", cfg.noise != "source"
        if lane and (drawn or cfg.when == "before" or cfg.level != "next"):
            problem = "noise, level and when are of a noised background"
            raise ConfigError(problem, where=f"plugins.{need.owner}", fix="Use background: noised.")
        if self.steps:
            need.consume(cfg.mask)
            need.consume("latent:source" if drawn else "trajectory:source")
            if lane:
                need.lane("source", active=self.steps)

    @hookimpl
    def inlay_pre_step(self, run: Run, step: Step) -> None:
        if self.cfg.when == "before" and self._acts(step):
            step.x["edit"] = self._blend(run, step, step.x["edit"])

    @hookimpl
    def inlay_post_step(self, run: Run, step: Step) -> None:
        if self.cfg.when == "after" and self._acts(step) and step.last_eval:
            step.x_next["edit"] = self._blend(run, step, step.x_next["edit"])

    def _acts(self, step: Step) -> bool:
        """An edit that is not alive yet will be overwritten."""
        return step.pass_ == "edit" and step.index in self.steps and "edit" in step.lanes

    def _blend(self, run: Run, step: Step, x: Tensor) -> Tensor:
        grid, mask = run.backbone.grid(run.size), run.board[self.cfg.mask]
        if self.cfg.mode == "reference":
            mask = masks.resize_bilinear(mask, grid)
            mask = mask.masked_fill(mask > 0.01, 1.0)
        else:
            mask = masks.resize(mask, grid)
        first, stages = min(self.steps), abs(self.cfg.shrink) + 1
        stage = stages * (step.index - first) // (step.total - first)
        if self.cfg.pace == "published":
            stage = (step.index - first) // ((step.total - first) // stages + 1)
        if cells := stages - 1 - stage:  # of all that the mask, or what is around it, touches
            wide, around = (mask > 0).to(mask), (mask < 1).to(mask)
            kept = self.cfg.shrink > 0
            mask = masks.dilate(wide, cells) if kept else 1 - masks.dilate(around, cells)
        keep = run.backbone.from_grid(mask).to(run.device, run.dtype)
        return keep * x + (1 - keep) * self._background(run, step, x)

    def _background(self, run: Run, step: Step, x: Tensor) -> Tensor:
        if self.cfg.background == "lane":
            return step.x_next["source"]
        ahead = int(self.cfg.when == "after" and self.cfg.level == "next")
        if self.cfg.noise == "source":
            return run.board["trajectory:source"](step, ahead)
        count = len(x) if self.cfg.noise == "own" else 1
        noise = run.noise(f"{self.name}/{step.eval}", (count, *x.shape[1:]))
        return step.frame_at(step.eval + ahead).noise(run.board["latent:source"], noise)
