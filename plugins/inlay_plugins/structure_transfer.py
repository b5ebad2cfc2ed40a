"""Structure transfer: at one step the edit becomes the noisy source (Add-it, section 3.3).

z_edit = alpha·x_source + sigma·eps_edit, with the edit's own initial noise. Everything the edit did
before that step is overwritten, so the plan does not compute it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from inlay import Needs, Plugin, Run, Step, hookimpl
from inlay_plugins.schedules import step_index


class StructureTransfer(Plugin):
    """Consumes its guide; publishes `start:edit`, which one plugin alone may set."""

    @dataclass
    class Config:
        """step: index or progress; null: as published, 4 of 30 for a picture, 2 for a generated
        source. Earlier gives the object more freedom, later keeps more of the source. guide: the
        board key of a clean latent, in the source's place: latent:scribbled.
        """

        step: Any = None
        guide: str = "latent:source"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        step = self.cfg.step
        if step is None:
            step = 4 / 30 if "image:source" in need.request.inputs else 2 / 30
        self.step = step_index(step, need.request.steps, f"plugins.{need.owner}.step")
        need.consume(self.cfg.guide)
        need.publish("start:edit")
        need.lane("edit", active=range(self.step, need.request.steps))

    @hookimpl
    def inlay_begin(self, run: Run, pass_: str, x: dict[str, Tensor]) -> None:
        self.pending = True

    @hookimpl
    def inlay_pre_step(self, run: Run, step: Step) -> None:
        if step.pass_ == "edit" and step.index == self.step and self.pending:
            self.pending = False  # a step may have several evaluations
            step.x["edit"] = step.frame.noise(run.board[self.cfg.guide], run.x_T["edit", "edit"])
            run.board["start:edit"] = step.x["edit"]
