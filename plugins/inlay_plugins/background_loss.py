"""Background loss: outside the mask the estimate is held to the source by MSE and LPIPS.

Blended Diffusion, Algorithm 1 (local CLIP-guided diffusion), eq. 6: a trade-off between what the
prompt asks and the background, where Algorithm 2 blends and needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from inlay import Needs, Plugin, Run, Step, Window, hookimpl
from inlay_plugins import views

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Pictures `n 3 h w`, `1 3 h w` in -1..1 -> their distance, `n`."""


class BackgroundLoss(Plugin):
    """Consumes the mask and `latent:source`.

    perceptual: a distance in place of LPIPS, for an instance made in code.
    """

    @dataclass
    class Config:
        """l2, lpips: weights, 0 leaves a part out; published: 10000 and 1000. lpips needs weights:
        `inlay models fetch lpips`. mask: a board key, 1 = the edit's. through, view: see
        clip_guidance.

        mode: fixed compares what both show outside the mask. reference compares with the whole
        source, whose object then shows through at the mask's border, and divides l2 by the number
        of pictures.
        """

        l2: float = 10000.0
        lpips: float = 1000.0
        mask: str = "mask:user"
        active: Any = field(default_factory=lambda: [0.0, 1.0])
        through: Literal["model", "x0"] = "model"
        view: Literal["blended", "x0"] = "blended"
        mode: Literal["fixed", "reference"] = "fixed"

    def __init__(
        self, cfg: Any = None, name: str = "", perceptual: Perceptual | None = None
    ) -> None:
        super().__init__(cfg, name)
        self.perceptual = perceptual

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        window = Window.parse(self.cfg.active, f"plugins.{need.owner}.active")
        if window is None:
            return
        need.consume("latent:source")
        need.consume(self.cfg.mask)
        need.grad("edit", active=window, through=self.cfg.through)

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        if self.cfg.lpips and self.perceptual is None:
            from inlay_bench import networks

            net = networks.lpips("vgg", run.device)
            self.perceptual = lambda x, y: net.distances(x / 2 + 0.5, y / 2 + 0.5)

    @hookimpl
    def inlay_objective(self, run: Run, step: Step, lane: str) -> Tensor | None:
        if lane != "edit":
            return None
        picture = views.view(run, step, lane, self.cfg.view)
        outside = 1 - views.region(run, self.cfg.mask, picture)
        source = run.backbone.pixels(run.board["latent:source"], run.size)
        seen, target = picture * outside, source.to(picture).detach()
        reference = self.cfg.mode == "reference"
        target = target if reference else target * outside
        squares = (seen - target).square().mean((1, 2, 3))
        loss: Tensor = self.cfg.l2 * (squares / len(squares) if reference else squares)
        if self.perceptual is not None and self.cfg.lpips:
            loss = loss + self.cfg.lpips * self.perceptual(seen, target)
        return loss
