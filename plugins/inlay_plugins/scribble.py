"""Scribble: a few strokes, or a piece of another picture, drawn where the edit is to be.

The edit starts from the scribbled picture, noised to a middle level, and makes of it what the
prompt says (Blended Diffusion, Avrahami et al. 2022, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from inlay import ConfigError, InputError, Needs, Plugin, Result, Run, hookimpl, open_image
from inlay_plugins import masks, strokes


class Scribble(Plugin):
    """Consumes `latent:source` and the mask; publishes `latent:scribbled`, from which
    structure_transfer starts by `guide: latent:scribbled`. The picture is kept as `scribble`.
    """

    @dataclass
    class Config:
        """strokes: {colour, width, points: [[x, y], ...]}, in shares of the picture, the width of
        its shorter side; one point is a dot. picture: a file, drawn below them; cut: the part of
        it, box: where it goes, as left, top, right, bottom; null: the mask's box. mask: a board
        key, 1 = the edit's. outside: strokes that leave the mask are refused, or cut off.
        """

        strokes: list[Any] = field(default_factory=list)
        picture: str = ""
        cut: list[float] = field(default_factory=lambda: [0.0, 0.0, 1.0, 1.0])
        box: list[float] | None = None
        mask: str = "mask:user"
        outside: Literal["refuse", "cut"] = "refuse"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, where = self.cfg, f"plugins.{need.owner}"
        if not (cfg.strokes or cfg.picture):
            fix = "Give strokes, or a picture to take a piece of."
            raise ConfigError("there is nothing to draw", where=where, fix=fix)
        self.strokes = [
            strokes.parsed(said, f"{where}.strokes[{i}]") for i, said in enumerate(cfg.strokes)
        ]
        for key in ("cut", "box"):
            if (box := getattr(cfg, key)) is not None and not masks.is_box(box):
                fix = "Give left, top, right, bottom in 0..1."
                raise ConfigError(f"{box} is no box", where=f"{where}.{key}", fix=fix)
        need.consume("latent:source")
        need.consume(cfg.mask)
        need.publish("latent:scribbled")

    @hookimpl
    def inlay_begin(self, run: Run, pass_: str) -> None:
        if pass_ != "edit":
            return
        source, where = run.board.get("image:source"), f"plugins.{self.name}"
        if source is None:
            source = run.backbone.decode(run.board["latent:source"], run.size)
        mask = masks.resize(run.board[self.cfg.mask].float(), run.size)[:1].to(source) > 0
        drawn, covered = (layer.to(source) for layer in self.draw(run.size, mask))
        inside, total = int((covered * mask).sum()), int(covered.sum())
        if not inside or (inside < total and self.cfg.outside == "refuse"):
            problem = (
                f"{total - inside} of {total} drawn pixels are outside the mask {self.cfg.mask}"
            )
            fix = f"Move them, widen the mask, or set {where}.outside=cut."
            raise InputError(problem, where=where, fix=fix)
        self.picture = torch.where(covered * mask > 0, drawn, source.float())
        run.board["latent:scribbled"] = run.backbone.encode_image(self.picture)

    def draw(self, size: tuple[int, int], mask: Tensor) -> tuple[Tensor, Tensor]:
        """What is drawn, `1 3 h w` in 0..1, and where, `1 1 h w`, at the picture's size; mask: of
        the same size, whose box a piece without one of its own fills."""
        sheet = strokes.Sheet(size)
        if self.cfg.picture:
            piece = open_image(self.cfg.picture, f"plugins.{self.name}.picture")
            piece = piece.crop(strokes.pixels(self.cfg.cut, piece.size))
            left, top, right, bottom = masks.box(mask, size)
            place = (left, top, right + 1, bottom + 1)
            if self.cfg.box is not None:
                place = strokes.pixels(self.cfg.box, sheet.paper.size)
            sheet.paste(piece, place)
        for stroke in self.strokes:
            sheet.draw(stroke)
        return sheet.tensors()

    @hookimpl
    def inlay_final(self, result: Result) -> None:
        if result.images:
            result.images["scribble"] = self.picture
