"""FlowEdit (Kulikov et al. 2024): from picture to picture along the difference of two velocities.

The source is noised anew before each step; the edit stands beside it, as far away as it has come,
and both are carried one step in one batch. Of that only their new distance is kept (Algorithm 1).
No inversion. Any solver of one evaluation per step will do; the method speaks of Euler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay import ConfigError, Frame, Needs, Plugin, Run, Step, hookimpl


class FlowEdit(Plugin):
    """Consumes `latent:source`; publishes `start:edit`. Lanes `flow_source`, and one more pair for
    each further noise. What blends the edit's latent afterwards stands below."""

    before = ("latent_blend", "pixel_blend", "local_blend")

    @dataclass
    class Config:
        """n_max: steps that are made, the last ones; a number, or a share of the run. Fewer keep
        more of the picture. n_min: of them, how many last ones draw freely from the prompt. n_avg:
        noises per step whose velocities are averaged. guidance, true_cfg: of the source, null is
        the run's; published: guidance 1.5 and 5.5 for FLUX, 3.5 and 13.5 for SD3 (33 of 50 steps).
        """

        n_max: Any = 24 / 28
        n_min: Any = 0
        n_avg: int = 1
        guidance: float | None = None
        true_cfg: float | None = None

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, total, where = self.cfg, need.request.steps, f"plugins.{need.owner}"
        longest, free = (
            round(n * total) if isinstance(n, float) else n for n in (cfg.n_max, cfg.n_min)
        )
        if not (0 <= free < longest <= total and cfg.n_avg >= 1):
            problem = f"n_max {cfg.n_max}, n_min {cfg.n_min}, n_avg {cfg.n_avg} make no steps"
            fix = f"Use 0 <= n_min < n_max <= {total} (or shares of it) and n_avg >= 1."
            raise ConfigError(problem, where=where, fix=fix)
        need.consume("latent:source")
        need.publish("start:edit")
        self.start, self.free = total - longest, total - free
        together = range(self.start, self.free)
        numbers = ["", *(f"_{k}" for k in range(2, cfg.n_avg + 1))]
        self.pairs = [(f"edit{k}", f"flow_source{k}") for k in numbers]
        scales = {"guidance": cfg.guidance, "true_cfg": cfg.true_cfg}
        fields: dict[str, Any] = {"n": need.request.n, "follows": True, "keep": False}
        for edit, source in self.pairs:
            need.lane(source, active=together, prompt="source", **fields, **scales)
            if edit != "edit":
                need.lane(edit, active=together, prompt="edit", **fields)
        need.lane("edit", active=range(self.start, total))

    @hookimpl
    def inlay_begin(self) -> None:
        self.pending = True

    @hookimpl
    def inlay_pre_step(self, run: Run, step: Step) -> None:
        if self.pending and step.pass_ == "edit" and step.index == self.start:
            self.pending = False
            self.clean = run.board["latent:source"]
            step.x.update(self._placed(run, step.frame, step.eval, torch.zeros_like(self.clean)))
            run.board["start:edit"] = step.x["edit"]

    @hookimpl
    def inlay_post_step(self, run: Run, step: Step) -> None:
        if step.pass_ != "edit" or not self.start <= step.index < self.free or not step.last_eval:
            return
        apart = [step.x_next[edit] - step.x_next[source] for edit, source in self.pairs]
        mean = torch.stack(apart).mean(0)
        step.x_next.update(self._placed(run, step.next_frame, step.eval + 1, mean))
        if step.index == step.total - 1:  # some schedules end above sigma 0
            step.x_next["edit"] = self.clean + mean

    def _placed(self, run: Run, frame: Frame, at: int, apart: Tensor) -> dict[str, Tensor]:
        """The latents of all pairs: the source under fresh noise, the edit that far from it."""
        placed = {}
        for edit, source in self.pairs:
            shape = run.x_T["edit", "edit"].shape
            placed[source] = frame.noise(self.clean, run.noise(f"{self.name}/{source}/{at}", shape))
            placed[edit] = placed[source] + apart
        return placed
