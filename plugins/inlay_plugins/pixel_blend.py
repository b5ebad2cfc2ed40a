"""Pixel blending: at listed steps the clean estimate is decoded, the source is put back outside the
mask at full resolution, and the picture is encoded and noised again.

The tail of Blended Latent Diffusion's code (`percentage_of_pixel_blending`): finer than a latent's
cells, for a decoding and an encoding in each of the steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from inlay import Needs, Plugin, Run, Step, Window, hookimpl
from inlay_plugins import views


class PixelBlend(Plugin):
    """Consumes the mask and `latent:source`, of which a source that was generated is decoded."""

    @dataclass
    class Config:
        """active: when; published: the last steps. mask: a board key, 1 = the edit's. level: of the
        new noise: next, or current, the level just left, as published.
        """

        active: Any = field(default_factory=lambda: [0.7, 1.0])
        mask: str = "mask:user"
        level: Literal["next", "current"] = "next"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        where = f"plugins.{need.owner}.active"
        window = Window.parse(self.cfg.active, where)
        self.steps = range(0) if window is None else window.steps(need.request.steps, where)
        if self.steps:
            need.consume(self.cfg.mask)
            need.consume("latent:source")

    @hookimpl
    def inlay_post_step(self, run: Run, step: Step) -> None:
        here = step.pass_ == "edit" and step.index in self.steps and step.last_eval
        if not here or "edit" not in step.lanes:
            return
        picture = run.backbone.pixels(step.x0["edit"], run.size).float() / 2 + 0.5
        source, mask = run.board.get("image:source"), views.region(run, self.cfg.mask, picture)
        if source is None:
            source = run.backbone.pixels(run.board["latent:source"], run.size) / 2 + 0.5
        mixed = mask * picture + (1 - mask) * source.to(picture)
        clean, frame = run.backbone.encode_image(mixed), step.frame
        if self.cfg.level == "next":
            frame = step.next_frame
        step.x_next["edit"] = frame.noise(clean, run.noise(f"{self.name}/{step.eval}", clean.shape))
