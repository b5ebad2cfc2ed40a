"""Latent optimisation: no diffusion model draws; Adam moves the autoencoder's latent down the
losses of the plugins above.

The baseline of Paint by Word (Bau et al. 2021) and VQGAN-CLIP (Crowson et al. 2022): CLIP's loss
and a background loss edit inside a mask, but nothing keeps the picture a likely one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from inlay import ConfigError, Frame, ModelError, Needs, Plugin, Result, Run, Step, hookimpl
from inlay_plugins import masks


class LatentOptimisation(Plugin):
    """Consumes `latent:source` and the mask; publishes `start:edit`. The edit asks the denoiser for
    nothing; the manifest has the number of iterations and the first and last loss.
    """

    after = ("clip_guidance", "background_loss", "range_loss")
    before = ("paste_back", "rank")

    @dataclass
    class Config:
        """iterations, rate: of Adam. start: inside the mask, the source, or noise of the source's
        mean and deviation. mask: a board key, 1 = the edit's: latents outside stay the source's;
        "": all move, and a background loss alone holds the rest.
        """

        iterations: int = 200
        rate: float = 0.05
        start: Literal["source", "noise"] = "source"
        mask: str = "mask:user"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        for key in ("iterations", "rate"):
            if (value := getattr(self.cfg, key)) <= 0:
                where = f"plugins.{need.owner}.{key}"
                raise ConfigError(f"{value} moves nothing", where=where, fix="Use more than 0.")
        need.consume("latent:source")
        if self.cfg.mask:
            need.consume(self.cfg.mask)
        need.publish("start:edit")
        need.lane("edit", active=())

    @hookimpl
    def inlay_begin(self, run: Run, pass_: str, x: dict[str, Tensor]) -> None:
        self.losses = [g.plugin for g in run.plan.grads if g.lane == "edit"]
        if not self.losses:
            raise ConfigError("there is no loss to go down", where=f"plugins.{self.name}",
                              fix="Put clip_guidance above it.")  # fmt: skip
        if pass_ != "edit":
            return
        source = run.board["latent:source"].float().expand_as(x["edit"])
        keep = torch.ones(())
        if self.cfg.mask:
            grid = masks.resize(run.board[self.cfg.mask].float(), run.backbone.grid(run.size))
            keep = run.backbone.from_grid(grid).to(source)
        start = source
        if self.cfg.start == "noise":
            noise = run.noise(f"{self.name}/start", source.shape).float()
            start = source.mean() + source.std() * noise
        run.board["start:edit"] = keep * start + (1 - keep) * source
        moved, self.said = start.clone().requires_grad_(), list[float]()
        adam = torch.optim.Adam([moved], lr=self.cfg.rate)
        for i in range(self.cfg.iterations):
            with torch.enable_grad():
                loss = self.loss(run, i, keep * moved + (1 - keep) * source)
            (moved.grad,) = torch.autograd.grad(loss, moved)
            adam.step()
            self.said.append(float(loss))
            if not moved.isfinite().all():
                fix = "Lower its rate, or the losses' scales."
                raise ModelError("it went out of bounds", where=f"plugins.{self.name}", fix=fix)
        self.found = (keep * moved + (1 - keep) * source).detach()

    def loss(self, run: Run, i: int, z: Tensor) -> Tensor:
        """What the plugins above say of a clean latent."""
        clean = Frame(torch.ones(()), torch.zeros(()), "vp", "sample")
        now = torch.zeros((), dtype=torch.long)
        total = self.cfg.iterations
        step = Step("edit", i, i, total, now, True, ("edit",), lambda at: clean, {"edit": z})
        step.x0.offer("edit", z)
        said = [run.hook_of("inlay_objective", name) for name in self.losses]
        return torch.stack(
            [t.sum() for ask in said for t in ask(run=run, step=step, lane="edit")]
        ).sum()

    @hookimpl
    def inlay_final(self, run: Run, result: Result) -> None:
        result.latents["edit"] = self.found.to(run.dtype)
        if run.backbone.decodes:
            result.images["edit"] = run.backbone.decode(result.latents["edit"], run.size)
        ends = [self.said[0], self.said[-1]]
        result.record[self.name] = {"iterations": len(self.said), "loss": ends}
