"""Scribble: a few strokes, or a piece of another picture, drawn where the edit is to be.

The edit starts from the scribbled picture, noised to a middle level, and makes of it what the
prompt says (Blended Diffusion, Avrahami et al. 2022, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor

from inlay import ConfigError, InputError, Needs, Plugin, Result, Run, hookimpl, open_image
from inlay_plugins import masks


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
        self.strokes = [_stroke(s, f"{where}.strokes[{i}]") for i, s in enumerate(cfg.strokes)]
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
        (height, width), where = size, f"plugins.{self.name}.picture"
        paper, touched = Image.new("RGB", (width, height)), Image.new("L", (width, height))
        if self.cfg.picture:
            piece = open_image(self.cfg.picture, where)
            piece = piece.crop(_pixels(self.cfg.cut, piece.size))
            left, top, right, bottom = masks.box(mask, size)
            place = (left, top, right + 1, bottom + 1)
            place = place if self.cfg.box is None else _pixels(self.cfg.box, (width, height))
            there = (place[2] - place[0], place[3] - place[1])
            paper.paste(piece.resize(there, Image.Resampling.LANCZOS), place[:2])
            touched.paste(255, place)
        for colour, thick, points in self.strokes:
            line, radius = [(x * width, y * height) for x, y in points], thick * min(size) / 2
            for sheet, ink in ((paper, colour), (touched, 255)):
                pen = ImageDraw.Draw(sheet)
                pen.line(line, ink, max(round(2 * radius), 1))
                for x, y in line:  # round ends and corners
                    pen.ellipse((x - radius, y - radius, x + radius, y + radius), ink)
        drawn = torch.from_numpy(np.asarray(paper) / 255).permute(2, 0, 1)[None]
        return drawn, torch.from_numpy(np.asarray(touched) / 255)[None, None]

    @hookimpl
    def inlay_final(self, result: Result) -> None:
        if result.images:
            result.images["scribble"] = self.picture


def _stroke(said: Any, where: str) -> tuple[tuple[int, ...], float, list[Any]]:
    """Colour, width and points of a stroke. Raises ConfigError."""
    try:
        known = {"colour": "black", "width": 0.1, **said}
        points, width = [tuple(p) for p in known.pop("points")], float(known.pop("width"))
        colour = ImageColor.getrgb(known.pop("colour"))[:3]
        if known or not points or width <= 0 or any(not 0 <= v <= 1 for p in points for v in p):
            raise ValueError
        return colour, width, [(x, y) for x, y in points]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        fix = "Write {colour: red, width: 0.1, points: [[0.2, 0.5], [0.6, 0.5]]}, 0 to 1."
        raise ConfigError(f"{said!r} is no stroke", where=where, fix=fix) from error


def _pixels(box: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Shares of a picture of `size` (width, height) as its pixels, at least one."""
    left, top = round(box[0] * size[0]), round(box[1] * size[1])
    return left, top, max(round(box[2] * size[0]), left + 1), max(round(box[3] * size[1]), top + 1)
