"""Range loss: the clean estimate is pushed back where it leaves what a picture can show, -1..1.

As in Blended Diffusion's code: guidance would otherwise please CLIP with colours that do not exist.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from inlay import Needs, Plugin, Run, Step, Window, hookimpl
from inlay_plugins import views


class RangeLoss(Plugin):
    """The mean square of what is outside the range, of the unblended estimate."""

    @dataclass
    class Config:
        """scale: of the loss; published: 50. limit: half the range; published: 1. active: when.
        through: see clip_guidance."""

        scale: float = 50.0
        limit: float = 1.0
        active: Any = field(default_factory=lambda: [0.0, 1.0])
        through: Literal["model", "x0"] = "model"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        window = Window.parse(self.cfg.active, f"plugins.{need.owner}.active")
        if window is not None and self.cfg.scale:
            need.grad("edit", active=window, through=self.cfg.through)

    @hookimpl
    def inlay_objective(self, run: Run, step: Step, lane: str) -> Tensor | None:
        if lane != "edit":
            return None
        picture = views.view(run, step, lane, "x0")
        beyond = picture - picture.clamp(-self.cfg.limit, self.cfg.limit)
        return self.cfg.scale * beyond.square().mean((1, 2, 3))
