"""Latent blending: after listed steps the source's latent is put back outside a mask.

z_edit <- m·z_edit + (1 - m)·z_source (Add-it, section 3.4; Blended Diffusion does it at all steps).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from inlay import Needs, Plugin, Run, Step, Window, hookimpl
from inlay_plugins import masks
from inlay_plugins.schedules import step_index


class LatentBlend(Plugin):
    """Consumes the mask and `trajectory:source`."""

    @dataclass
    class Config:
        """steps: each a step, or a window [first, last]; []: never. mask: a board key, 1 = the
        edit's: mask:subject, or mask:user of the caller.

        background: noised is the source exactly at the next noise level, without an evaluation;
        lane, as published, is where the solver takes the source lane, whose rows then live there.
        mode: fixed keeps soft edges of a resized mask; reference counts cells above 0.01 fully.
        """

        steps: list[Any] = field(default_factory=lambda: [0.5])
        background: Literal["noised", "lane"] = "noised"
        mask: str = "mask:subject"
        mode: Literal["fixed", "reference"] = "fixed"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        total, where = need.request.steps, f"plugins.{need.owner}.steps"
        self.steps: set[int] = set()
        for item in self.cfg.steps:
            if isinstance(item, int | float):
                self.steps.add(step_index(item, total, where))
            elif (window := Window.parse(item, where)) is not None:
                self.steps |= set(window.steps(total, where))
        if self.steps:
            need.consume(self.cfg.mask)
            need.consume("trajectory:source")
            if self.cfg.background == "lane":
                need.lane("source", active=self.steps)

    @hookimpl
    def inlay_post_step(self, run: Run, step: Step) -> None:
        acting = step.pass_ == "edit" and step.index in self.steps and step.last_eval
        if not acting or "edit" not in step.lanes:  # an edit that is not alive will be overwritten
            return
        grid, mask = run.backbone.grid(run.size), run.board[self.cfg.mask]
        if self.cfg.mode == "reference":
            mask = masks.resize_bilinear(mask, grid)
            mask = mask.masked_fill(mask > 0.01, 1.0)
        else:
            mask = masks.resize(mask, grid)
        keep = run.backbone.from_grid(mask).to(run.device, run.dtype)
        if self.cfg.background == "lane":
            source = step.x_next["source"]
        else:
            source = run.board["trajectory:source"](step, 1)
        step.x_next["edit"] = keep * step.x_next["edit"] + (1 - keep) * source
