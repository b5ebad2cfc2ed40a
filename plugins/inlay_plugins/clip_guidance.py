"""CLIP guidance: the gradient of the distance between picture and prompt, inside a mask.

Blended Diffusion (Avrahami et al. 2022, Algorithms 1 and 2): the loss is taken of the clean
estimate blended with the noisy picture, through the model, in pixels or through the autoencoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay import ConfigError, Needs, Plugin, Run, Step, Window, hookimpl
from inlay_plugins import clips, views


class ClipGuidance(Plugin):
    """Consumes the mask, and `augment:clip` if a plugin above publishes it.

    loaded: Clips in place of those named in `clips`, for an instance made in code.
    """

    @dataclass
    class Config:
        """scale: of the loss, summed over pictures; published: 1000. prompts: text, texts, or text:
        weight; "": prompt.edit. images: picture files, or file: weight. clips: averaged. mask: a
        board key, 1 = the edit's; "": the whole picture. active: when, in every `every`-th step.

        through: model follows the gradient through the denoiser, as published; x0 stops at the
        clean estimate, for a fraction of the memory. view: what CLIP sees, see `views.view`.
        """

        scale: float = 1000.0
        prompts: Any = ""
        images: Any = field(default_factory=list)
        clips: list[str] = field(default_factory=lambda: ["toybox/clip"])
        distance: Literal["spherical", "cosine"] = "spherical"
        mask: str = "mask:user"
        active: Any = field(default_factory=lambda: [0.0, 1.0])
        every: int = 1
        through: Literal["model", "x0"] = "model"
        view: Literal["blended", "x0"] = "blended"

    def __init__(self, cfg: Any = None, name: str = "", loaded: Sequence[clips.Clip] = ()) -> None:
        super().__init__(cfg, name)
        self.loaded = loaded

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, where = self.cfg, f"plugins.{need.owner}"
        prompt = need.request.prompt["edit"]
        self.texts, self.files = clips.asked(cfg.prompts, cfg.images, prompt, where)
        if cfg.every < 1 or not (cfg.clips or self.loaded):
            raise ConfigError("every is 1 or more, and at least one clip is named", where=where)
        window = Window.parse(cfg.active, f"{where}.active")
        if window is None or not cfg.scale:
            return
        steps = window.steps(need.request.steps, f"{where}.active")[:: cfg.every]
        need.grad("edit", active=steps, through=cfg.through)
        if cfg.mask:
            need.consume(cfg.mask)

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        self.models = self.loaded or [clips.load(name, str(run.device)) for name in self.cfg.clips]
        where = f"plugins.{self.name}.images"
        self.targets = [clips.Target.of(m, self.texts, self.files, where) for m in self.models]

    @hookimpl
    def inlay_begin(self, run: Run, pass_: str, x: dict[str, Tensor]) -> None:
        self.rng = run.rng(self.name, "augment")

    @hookimpl
    def inlay_objective(self, run: Run, step: Step, lane: str) -> Tensor | None:
        if lane != "edit":
            return None
        picture = views.view(run, step, lane, self.cfg.view)
        mask, loss = views.region(run, self.cfg.mask, picture), torch.zeros(len(picture))
        loss = loss.to(picture)
        for model, target in zip(self.models, self.targets, strict=True):
            if (augment := run.board.get("augment:clip")) is not None:
                seen = augment(picture, mask, model.side, self.rng)
            else:
                seen = F.adaptive_avg_pool2d(picture * mask, model.side)
            far = target.distances(model.images(seen / 2 + 0.5), self.cfg.distance)
            loss = loss + far.view(-1, len(picture)).mean(0)
        return self.cfg.scale * loss / len(self.models)
