"""Rank: of several pictures the one nearest to the prompt comes first, by CLIP.

Blended Diffusion (section 5) and Blended Latent Diffusion draw many candidates and show the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay import Needs, Plugin, Result, Run, hookimpl
from inlay_plugins import clips, views


class Rank(Plugin):
    """Sorts the edit's pictures and latents, nearest first, and keeps all of them. Publishes
    `rank:scores`, their distances `n` in the new order, and `rank:order`, where each was before;
    both are in the manifest. loaded: see clip_guidance.
    """

    @dataclass
    class Config:
        """prompts, images, clips, distance: see clip_guidance. scope: what CLIP sees: the mask's
        inside, the whole image, or both, averaged. mask: a board key. antialias: when pictures
        shrink to CLIP's side. batch: pictures at once.

        mode: fixed shows CLIP what it was trained on, grey outside the mask; reference leaves out
        its normalisation, as published, and is black outside.
        """

        prompts: Any = ""
        images: Any = field(default_factory=list)
        clips: list[str] = field(default_factory=lambda: ["toybox/clip"])
        distance: Literal["spherical", "cosine"] = "spherical"
        scope: Literal["mask", "image", "both"] = "mask"
        mask: str = "mask:user"
        antialias: bool = True
        batch: int = 32
        mode: Literal["fixed", "reference"] = "fixed"

    def __init__(self, cfg: Any = None, name: str = "", loaded: Sequence[clips.Clip] = ()) -> None:
        super().__init__(cfg, name)
        self.loaded = loaded

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        asked, where = (self.cfg.prompts, self.cfg.images), f"plugins.{need.owner}"
        self.texts, self.files = clips.asked(*asked, need.request.prompt["edit"], where)
        if self.cfg.scope != "image":
            need.consume(self.cfg.mask)
        need.publish("rank:scores")
        need.publish("rank:order")

    @hookimpl
    def inlay_final(self, run: Run, result: Result) -> None:
        if "edit" not in result.images:  # a pipeline without an autoencoder
            return
        pictures, mask = result.images["edit"], None
        if self.cfg.scope != "image":
            mask = views.region(run, self.cfg.mask, pictures)
        scores = self.scores(pictures, mask, str(run.device))
        order = scores.argsort(stable=True)
        result.images["edit"] = pictures[order.to(pictures.device)]
        result.latents["edit"] = result.latents["edit"][order.to(run.device)]
        run.board["rank:scores"], run.board["rank:order"] = scores[order], order
        result.record["rank"] = {"scores": scores[order].tolist(), "order": order.tolist()}

    def scores(self, pictures: Tensor, mask: Tensor | None, device: str = "cpu") -> Tensor:
        """Distances `n` of pictures `n 3 h w` in 0..1; mask `b 1 h w`, None: the whole image."""
        fixed, models = self.cfg.mode == "fixed", self.loaded
        models = models or [clips.load(name, device) for name in self.cfg.clips]
        shown = [pictures] if self.cfg.scope in ("image", "both") else []
        if mask is not None:
            shown.append(pictures * mask + (0.5 * (1 - mask) if fixed else 0))
        total = torch.zeros(len(pictures))
        for model in models:
            target = clips.Target.of(model, self.texts, self.files, f"plugins.{self.name}.images")
            for seen in shown:
                for i, batch in enumerate(seen.split(self.cfg.batch)):
                    square = F.interpolate(batch.float(), [model.side] * 2, mode="bilinear",
                                           antialias=self.cfg.antialias)  # fmt: skip
                    far = target.distances(model.images(square, fixed), self.cfg.distance)
                    total[i * self.cfg.batch :][: len(batch)] += far.cpu()
        return total / (len(models) * len(shown))
