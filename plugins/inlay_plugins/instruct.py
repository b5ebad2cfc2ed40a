"""InstructPix2Pix: the prompt is an instruction, and the model sees the picture that it changes
(Brooks et al. 2023).

Three predictions are mixed by two scales (eq. 3), s_T = the lane's guidance, s_I = `image_scale`:

    e = e(0, "") + s_I (e(picture, "") - e(0, "")) + s_T (e(picture, text) - e(picture, ""))

Rows: text (picture and instruction), image (picture alone), null (neither). A row whose weight in
that sum is zero is not evaluated: null where s_I = 1, image where s_I = s_T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay import ConfigError, ModelError, Needs, Plugin, Rows, Run, Step, hookimpl

FAMILY = "instruct-pix2pix"


class Instruct(Plugin):
    """Consumes the picture; every lane's rows see it, null rows see zeros."""

    @dataclass
    class Config:
        """image_scale: how closely the picture is followed, published: 1.5, of use: 1 to 2.2; 1
        takes two rows of three."""

        image_scale: float = 1.5

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        need.consume("image:source")
        guidance, pictured = need.request.guidance, self.cfg.image_scale
        self.text = guidance.get("edit", 3.5) if isinstance(guidance, Mapping) else guidance
        if not pictured >= 0:
            where, fix = f"plugins.{need.owner}.image_scale", "It must be 0 or more."
            raise ConfigError(f"{pictured!r} cannot be used", where=where, fix=fix)
        if pictured != self.text:
            need.branch("edit", "image", "negative")
        if pictured != 1:
            need.branch("edit", "null", "negative")

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        backbone: Any = run.backbone
        if backbone.name != FAMILY:
            problem = f"{backbone.name} does not see a picture beside its latent"
            fix = "Use timbrooks/instruct-pix2pix, or a model that was tuned from it."
            raise ModelError(problem, where=f"plugins.{self.name}", fix=fix)
        self.picture: Tensor = backbone.picture(run.board["image:source"])

    @hookimpl
    def inlay_inputs(self, rows: Rows, kwargs: dict[str, Any]) -> None:
        sample = kwargs["sample"]
        seen = self.picture.repeat(len(sample), 1, 1, 1)
        for branch in rows:
            if branch.endswith("/null"):
                seen[rows[branch]] = 0
        kwargs["sample"] = torch.cat([sample, seen], 1)

    @hookimpl
    def inlay_combine(
        self, step: Step, lane: str, text: Tensor, null: Tensor | None
    ) -> Tensor | None:
        if lane != "edit":
            return None
        image, by_text, by_image = step.preds.get("edit/image"), self.text, self.cfg.image_scale
        if image is None:  # one scale for both
            return text if null is None else null + by_text * (text - null)
        if null is None:
            return image + by_text * (text - image)
        return null + by_text * (text - image) + by_image * (image - null)
