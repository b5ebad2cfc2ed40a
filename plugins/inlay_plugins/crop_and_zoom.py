"""Crop and zoom: the model works on a box around a small mask, enlarged, and what it draws goes
back into the whole picture, at its own resolution.

A mask of few latent cells leaves a model no room to draw; models for holes saw none below 2 % of a
picture in training (Paint by Example, section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay import ConfigError, Needs, Plugin, Result, Run, hookimpl
from inlay_plugins import masks


class CropAndZoom(Plugin):
    """Stands before all that look at the picture, and acts last: to the others the box is the whole
    picture. Replaces the pictures and `mask:user` at the start; at the end puts pictures, masks and
    maps into the whole. Publishes `box:crop`: left, top, right, bottom in pixels of the picture as
    it came. A mask that no box of the run's shape holds leaves the picture whole.
    """

    @dataclass
    class Config:
        """margin: around the mask, in shares of its longer side. zoom: enlarged at most so much, 1
        leaves the picture whole. feather: passes of a 3x3 Gaussian [1 2 1]/4 over what is put back,
        so many pixels wide. keep: what is put back, the mask or all of the box.
        """

        margin: float = 0.5
        zoom: float = 8.0
        feather: int = 10
        keep: Literal["mask", "box"] = "mask"

    before = ("letterbox", "source_trajectory", "sdedit", "region", "subject_mask",
              "regional_prompts", "latent_blend", "pixel_blend", "paste_back", "rank",
              "background_loss", "clip_guidance", "instruct", "presence", "exemplar",
              "imitation", "exemplar_attention", "reconstruct_background", "scribble")  # fmt: skip

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, where = self.cfg, f"plugins.{need.owner}"
        for key, good, want in (
            ("margin", cfg.margin >= 0, "0 or more"),
            ("zoom", cfg.zoom >= 1, "1 or more"),
            ("feather", cfg.feather >= 0, "0 or more"),
        ):
            if not good:
                problem = f"{getattr(cfg, key)!r} cannot be used"
                raise ConfigError(problem, where=f"{where}.{key}", fix=f"Use {want}.")
        need.consume("image:original")
        need.consume("image:mask")
        need.publish("box:crop")

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        board, keys = run.board, ("image:source", "image:original", "image:mask", "mask:user")
        self.whole = {key: board[key] for key in keys}
        rows, columns = board["image:original"].shape[-2:]
        self.mask = masks.resize(board["image:mask"].float(), (rows, columns))
        self.box = left, top, right, bottom = masks.around(
            self.mask[0, 0] >= 0.5, run.size, self.cfg.margin, self.cfg.zoom
        )
        board["box:crop"] = self.box
        if self.box == (0, 0, columns, rows):
            return
        board["image:original"] = board["image:original"][..., top:bottom, left:right]
        board["image:mask"] = self.mask[..., top:bottom, left:right]
        shown = masks.resize_bicubic(board["image:original"], run.size)
        board["image:source"] = shown.to(board["image:source"])
        inside = masks.resize(board["image:mask"], run.size)
        board["mask:user"] = inside.to(board["mask:user"])

    @hookimpl(trylast=True)
    def inlay_final(self, run: Run, result: Result) -> None:
        original = self.whole["image:original"].cpu().float()
        rows, columns = original.shape[-2:]
        if self.box == (0, 0, columns, rows):
            return
        box = self._placed(torch.ones(1, 1, 1, 1), rows, columns)
        alpha = box if self.cfg.keep == "box" else (self.mask >= 0.5).cpu().float()
        for _ in range(self.cfg.feather):
            alpha = masks.blur(alpha)
        alpha = alpha * box
        for lane, picture in result.images.items():
            drawn = self._placed(picture.cpu().float(), rows, columns)
            mixed = alpha * drawn + (1 - alpha) * original
            result.images[lane] = torch.where(alpha > 0, mixed, original)
        for key, value in list(run.board.items()):
            if key.startswith(("mask:", "map:")):
                run.board[key] = self._placed(value, rows, columns)
        for key, value in self.whole.items():
            run.board[key] = value

    def _placed(self, picture: Tensor, rows: int, columns: int) -> Tensor:
        """`b c h w` of any size, at the box's size and place in a picture that is 0 elsewhere."""
        left, top, right, bottom = self.box
        size = (bottom - top, right - left)
        colours = picture.shape[1] == 3
        fitted = masks.resize_bicubic(picture, size) if colours else masks.resize(picture, size)
        return F.pad(fitted, (left, columns - right, top, rows - bottom))
