"""Paint by Example: a hole in the picture is filled with what an exemplar shows (Yang et al. 2023).

The exemplar is squeezed into one token, CLIP's class token through the model's own mapper (section
3.2), so that it cannot be copied; a learned vector is its null prompt, and `guidance` says how
similar the result is to be. The model sees [z, z around the hole, where the picture is kept].

A softmax over one key is 1: cross-attention is W_out W_v c, the same for every query, and is
computed as such.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay import (
    ConfigError,
    InputError,
    ModelError,
    Needs,
    Plugin,
    Result,
    Run,
    hookimpl,
    open_image,
)

FAMILY, SMALLEST = "paint-by-example", 8


class Exemplar(Plugin):
    """Consumes the picture and the mask of the hole, which is where it is above 0.5. The manifest
    has the exemplar's hash."""

    @dataclass
    class Config:
        """image: path of the exemplar. fit: squash it to CLIP's square, as trained, or crop the
        middle out, as diffusers does. mask: a board key. resize: of the mask to the latent grid,
        bilinear, as trained, or nearest, as diffusers does. posterior: sample of the autoencoder,
        as published, or its mode. bias: cross-attention without queries, where nobody edits it.
        """

        image: str = ""
        fit: Literal["squash", "crop"] = "squash"
        mask: str = "mask:user"
        resize: Literal["bilinear", "nearest"] = "bilinear"
        posterior: Literal["sample", "mode"] = "sample"
        bias: bool = True

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        where = f"plugins.{need.owner}.image"
        if not self.cfg.image:
            raise ConfigError("there is no exemplar", where=where, fix="Give a picture's path.")
        self.picture = open_image(self.cfg.image, where)
        if min(self.picture.size) < SMALLEST:
            size = "x".join(map(str, self.picture.size))
            problem = f"an exemplar of {size} pixels shows nothing"
            raise InputError(problem, where=where, fix=f"Use {SMALLEST} pixels a side or more.")
        need.consume("image:source")
        need.consume(self.cfg.mask)

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        self.backbone = backbone = cast(Any, run.backbone)
        if backbone.name != FAMILY:
            problem = f"{backbone.name} takes no exemplar"
            fix = "Use Fantasy-Studio/Paint-by-Example, or a model that was tuned from it."
            raise ModelError(problem, where=f"plugins.{self.name}", fix=fix)
        self.keep = (1 - run.board[self.cfg.mask] >= 0.5).float()
        if bool(self.keep.all()):
            problem, fix = "the mask is empty: nothing is to be filled", "Paint the place white."
            raise InputError(problem, where=f"plugins.{self.name}", fix=fix)
        token = backbone.exemplar(self.picture, self.cfg.fit == "squash")
        for branch in (b for b in run.conds if b.startswith("edit/") and b != "edit/null"):
            embeds = token.to(run.device, run.dtype)
            run.conds[branch] = replace(run.conds[branch], embeds=embeds)
        cross = {site.name for site in run.backbone.sites if site.kind == "cross"}
        spared = self.cfg.bias and not run.seam.compiled
        backbone.without_queries(cross - run.sites if spared else ())

    @hookimpl
    def inlay_begin(self, run: Run, pass_: str, x: dict[str, Tensor]) -> None:
        lane = "edit" if "edit" in x else next(iter(x))
        drawn = run.generators[pass_, lane] if self.cfg.posterior == "sample" else None
        z = self.backbone.around(run.board["image:source"], self.keep, drawn)
        mode = self.cfg.resize
        kept = F.interpolate(self.keep, z.shape[-2:], mode=mode)
        self.further = torch.cat([z, kept.to(z)], 1)

    @hookimpl
    def inlay_inputs(self, kwargs: dict[str, Any]) -> None:
        sample = kwargs["sample"]
        further = self.further.expand(len(sample), -1, -1, -1)
        kwargs["sample"] = torch.cat([sample, further], 1)

    @hookimpl
    def inlay_final(self, result: Result) -> None:
        self.backbone.without_queries(())
        pixels = repr(self.picture.size).encode() + self.picture.tobytes()
        result.record["exemplar"] = {"sha256": hashlib.sha256(pixels).hexdigest()}
