"""Exemplar attention: what fills a mask looks at another picture while it is drawn; no training.

The exemplar is a lane of its own that follows its picture through the noise levels (as a source
does by interpolation); its keys and values stand beside the edit's own, in one softmax, for queries
inside the mask, as those of a reference do in StyleAligned (Hertz et al. 2023). Only rows with the
prompt look at it, so that guidance makes more of what it gives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from inlay import (
    AttnEdits,
    AttnSite,
    ConfigError,
    InputError,
    Needs,
    Plugin,
    Run,
    Step,
    Window,
    hookimpl,
    open_image,
)
from inlay_plugins import masks

LANE, SMALLEST, NEVER = "exemplar", 8, 60.0  # logits: e^-60 of the weight


class ExemplarAttention(Plugin):
    """Declares the lane `exemplar`; consumes the mask."""

    @dataclass
    class Config:
        """image: path of the exemplar. mask: a board key; queries where it is 0.5 or more look at
        the exemplar, others do not. place: where it is seen: in the mask's box, the picture around
        it, or in the whole frame. prompt: which one it is read under. scale, shift: of the logits
        of its keys, logits · scale + shift. active: when; beyond, the edit smooths what it took.
        depth: where, shares of the attention sites from the input on. seed: of its noise, whatever
        the run's.
        """

        image: str = ""
        mask: str = "mask:user"
        place: Literal["box", "frame"] = "box"
        prompt: Literal["edit", "source", "negative"] = "edit"
        scale: float = 1.0
        shift: float = 0.0
        active: Any = field(default_factory=lambda: [0.0, 0.85])
        depth: list[float] = field(default_factory=lambda: [0.0, 1.0])
        seed: int = 6311

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, where = self.cfg, f"plugins.{need.owner}"
        if not cfg.image:
            fix = "Give a picture's path."
            raise ConfigError("there is no exemplar", where=f"{where}.image", fix=fix)
        if cfg.scale <= 0:
            problem = f"{cfg.scale} turns the exemplar's logits around"
            raise ConfigError(problem, where=f"{where}.scale", fix="Use more than 0.")
        picture = open_image(cfg.image, f"{where}.image")
        if min(picture.size) < SMALLEST:
            size = "x".join(map(str, picture.size))
            problem, fix = f"an exemplar of {size} pixels shows nothing", f"Use {SMALLEST} or more."
            raise InputError(problem, where=f"{where}.image", fix=fix)
        self.picture = pil_to_tensor(picture)[None] / 255
        need.consume(cfg.mask)
        window = Window.parse(cfg.active, f"{where}.active")
        asked = {"prompt": cfg.prompt, "seed": cfg.seed, "guidance": 1.0, "true_cfg": 1.0}
        need.lane(LANE, follows=True, keep=False, **asked)
        joint = any(site.kind == "joint" for site in need.sites)
        first, last = cfg.depth
        sites = need.select(kind=["joint" if joint else "self"], depth=(first, last))
        shared = {"queries": "image", "keys": "image", "from_": LANE}
        need.edit("append", "edit/text", sites, window, **shared)
        need.edit("bias", "edit/text", sites, window, queries="image")

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        self.inside = (run.board[self.cfg.mask] >= 0.5).float()
        if not bool(self.inside.any()):
            problem, fix = "the mask is empty: nothing may look", "Paint the place white."
            raise InputError(problem, where=f"plugins.{self.name}", fix=fix)
        shown = run.board.get("image:source")
        if self.cfg.place == "frame" or shown is None:
            shown = masks.frame(self.picture, run.size).to(run.device)
        else:
            left, top, right, bottom = masks.box(self.inside, run.size)
            fitted = masks.resize_bicubic(self.picture, (bottom + 1 - top, right + 1 - left))
            shown = shown.clone()
            shown[..., top : bottom + 1, left : right + 1] = fitted.to(shown)
        self.clean = run.backbone.encode_image(shown)
        self.grid, self.biases = run.backbone.grid(run.size), dict[int, Tensor]()

    @hookimpl
    def inlay_pre_step(self, run: Run, step: Step) -> None:
        if step.pass_ == "edit" and LANE in step.lanes:
            step.x[LANE] = step.frame.noise(self.clean, run.x_T["edit", LANE])

    @hookimpl
    def inlay_attention(self, site: AttnSite, edits: AttnEdits) -> None:
        on = edits.on("edit/text", "image")
        on.append(LANE, "image", gain=self.cfg.scale)
        on.bias("all", self._own(site.scale))

    def _own(self, scale: int) -> Tensor:
        """Bias `n 1` of the edit's own keys, by query: a softmax knows differences only."""
        if scale not in self.biases:
            height, width = (-(-side // scale) for side in self.grid)
            looks = masks.resize(self.inside, (height, width)).flatten()[:, None] >= 0.5
            self.biases[scale] = torch.where(looks, -self.cfg.shift, NEVER)
        return self.biases[scale]
