"""MimicBrush: a hole in the picture is filled with what fits there of another one, found by the
model itself (Chen et al. 2024).

A reference U-Net reads the exemplar at the step's own time, once for all pictures; keys and values
that the imitative U-Net's self-attention makes of it stand beside its own, in the middle and on the
way up, in rows that see the exemplar; null rows see nothing of it:

    h + mix A(x; [x; r]) + (1 - mix) A(x; x)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from inlay import (
    AttnEdits,
    ConfigError,
    Held,
    InputError,
    ModelError,
    Needs,
    Plugin,
    Result,
    Run,
    Step,
    hookimpl,
    open_image,
)
from inlay_plugins import depths, masks

FAMILY, SMALLEST, GIVEN = "mimicbrush", 8, "kv:exemplar"


class Imitation(Plugin):
    """Consumes the picture and the mask of the hole, which is where it is 0.5 or more. Publishes
    `kv:exemplar`, keys and values by site. The manifest has the exemplar's hash."""

    @dataclass
    class Config:
        """image: path of the exemplar. mask: a board key. mix: see above; 0.5 as published, 1 is
        the paper's equation 1. posterior: mode of the autoencoder, or a sample, as published.
        keep_shape: what fills the hole keeps the depth that is there. depth: of the picture: a grey
        picture, an .npy `h w`, or a depth model of transformers by folder or name; without
        keep_shape a model is shown nothing, as published, and no file is read. depth_mean: of that
        model's input, published or right. bank: GiB spent to read an exemplar once for all runs.
        """

        image: str = ""
        mask: str = "mask:user"
        mix: float = 0.5
        posterior: Literal["mode", "sample"] = "mode"
        keep_shape: bool = False
        depth: str = ""
        depth_mean: Literal["published", "right"] = "published"
        bank: float = 2.0

    def __init__(self, cfg: Any = None, name: str = "") -> None:
        super().__init__(cfg, name)
        self.bank, self.spent = dict[tuple[str, float], dict[str, Held]](), 0

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, where = self.cfg, f"plugins.{need.owner}"
        if not cfg.image:
            fix = "Give a picture's path."
            raise ConfigError("there is no exemplar", where=f"{where}.image", fix=fix)
        if not 0 <= cfg.mix <= 1:
            raise ConfigError(f"{cfg.mix} is no share", where=f"{where}.mix", fix="Use 0 to 1.")
        if cfg.keep_shape and not cfg.depth:
            problem, fix = "keep_shape needs the picture's depth", "Give a file or a model."
            raise ConfigError(problem, where=f"{where}.depth", fix=fix)
        self.picture = open_image(cfg.image, f"{where}.image")
        if min(self.picture.size) < SMALLEST:
            size = "x".join(map(str, self.picture.size))
            problem, fix = f"an exemplar of {size} pixels shows nothing", f"Use {SMALLEST} or more."
            raise InputError(problem, where=f"{where}.image", fix=fix)
        need.consume("image:source")
        need.consume(cfg.mask)
        need.publish(GIVEN)
        sites = need.select(kind=["self"], block=["mid", "up"])
        need.edit("append", "edit/text", sites, from_=GIVEN)
        if cfg.mix < 1:
            need.edit("mix", "edit/text", sites, from_="edit/text")

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        self.backbone = backbone = cast(Any, run.backbone)
        if backbone.name != FAMILY:
            problem, fix = f"{backbone.name} has no reference U-Net", "Use MimicBrush's weights."
            raise ModelError(problem, where=f"plugins.{self.name}", fix=fix)
        self.hole = (run.board[self.cfg.mask] >= 0.5).float()
        if not bool(self.hole.any()):
            problem, fix = "the mask is empty: nothing is to be filled", "Paint the place white."
            raise InputError(problem, where=f"plugins.{self.name}", fix=fix)
        self.shown = pil_to_tensor(self.picture)[None] / 255
        square = masks.frame(self.shown, (max(self.picture.size),) * 2)[0]
        self.prompt = backbone.exemplar(to_pil_image(square))
        for branch in (b for b in run.conds if b.startswith("edit/") and b != "edit/null"):
            embeds = self.prompt.to(run.device, run.dtype)
            run.conds[branch] = replace(run.conds[branch], embeds=embeds)

        self.depth = self._depth(run) if backbone.takes_depth else None

    def _depth(self, run: Run) -> Tensor:
        """The map `1 1 h w`; zeros where the shape is free and no model is there."""
        cfg, where = self.cfg, f"plugins.{self.name}.depth"
        if cfg.depth and not Path(cfg.depth).is_file():
            found = depths.load(cfg.depth, where)
            picture = to_pil_image(run.board["image:source"][0].cpu())
            return depths.estimate(
                found, picture, cfg.depth_mean == "published", not cfg.keep_shape
            )
        if not cfg.keep_shape:
            return torch.zeros(1, 1, *run.size)
        return masks.resize_bilinear(depths.of_file(cfg.depth, where), run.size)

    @hookimpl
    def inlay_begin(self, run: Run) -> None:
        backbone, grid = self.backbone, run.backbone.grid(run.size)
        names = ("exemplar", "background") if self.cfg.posterior == "sample" else ()
        shape = (1, backbone.channels, *grid)
        drawn = {name: run.noise(f"{self.name}/{name}", shape) for name in names}
        shown = masks.frame(self.shown, run.size).to(run.device)
        self.z = backbone.posterior(shown, drawn.get("exemplar"))
        around = run.board["image:source"] * (1 - self.hole)  # black, as trained
        parts = [F.interpolate(self.hole, grid).to(self.z)]
        parts.append(backbone.posterior(around, drawn.get("background")))
        if self.depth is not None:
            parts.append(backbone.shape_of(self.depth, grid))
        self.further = torch.cat(parts, 1)
        pixels = b"".join(x.float().cpu().numpy().tobytes() for x in (self.z, self.prompt))
        self.digest = hashlib.sha256(pixels).hexdigest()

    @hookimpl
    def inlay_pre_step(self, run: Run, step: Step) -> None:
        """What is read depends on exemplar and time alone: one row for all pictures and runs."""
        key = self.digest, float(step.t)
        if step.pass_ == "edit" and "edit" in step.lanes:
            known = self.bank.get(key)
            if known is None:
                known = self.backbone.read(self.z, step.t, self.prompt, self.cfg.mix)
                size = sum(t.numel() * t.element_size() for h in known.values() for t in h[:2])
                if self.spent + size <= self.cfg.bank * 2**30:
                    self.bank[key], self.spent = known, self.spent + size
            run.board[GIVEN] = known

    @hookimpl
    def inlay_attention(self, edits: AttnEdits) -> None:
        edits.on("edit/text").append(GIVEN)
        if self.cfg.mix < 1:
            edits.on("edit/text").mix("edit/text", "all", 1 - self.cfg.mix)

    @hookimpl
    def inlay_inputs(self, kwargs: dict[str, Any]) -> None:
        sample = kwargs["sample"]
        kwargs["sample"] = torch.cat([sample, self.further.expand(len(sample), -1, -1, -1)], 1)

    @hookimpl
    def inlay_final(self, run: Run, result: Result) -> None:
        run.board[GIVEN] = {}  # its tensors are of no use to anybody
        pixels = repr(self.picture.size).encode() + self.picture.tobytes()
        result.record["exemplar"] = {"sha256": hashlib.sha256(pixels).hexdigest()}
