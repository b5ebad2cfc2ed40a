"""Extrapolate: draw on beyond a border of the picture, in a window of the model's own size.

Text-guided extrapolation as in Blended Diffusion (Avrahami et al. 2022, section 5): the picture is
shifted, what is new mirrors it, and is inpainted. A scene of several runs goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from inlay import ConfigError, Needs, Plugin, Result, Run, hookimpl
from inlay_plugins import masks


class Extrapolate(Plugin):
    """Stands before all that look at the picture. Replaces `image:source` by the window, and at the
    end the edit by the whole picture with what is new; the pixels that were there stay, bit for
    bit. Publishes `mask:new`, 1 = what is to be drawn, at last of the whole picture, and
    `box:picture`: left, top, right, bottom of what was there in the window, in pixels of the run.
    Where no picture was given all is new.
    """

    before = ("source_trajectory", "sdedit", "region", "latent_blend", "paste_back", "rank")

    @dataclass
    class Config:
        """side: where the picture is to grow. share: of the window that is new; more where the
        picture is smaller than the rest of it. The window has the run's shape, and the whole height
        or width of the picture.
        """

        side: Literal["left", "right", "top", "bottom"] = "right"
        share: float = 0.5

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        if not 0 < self.cfg.share < 1:
            where = f"plugins.{need.owner}.share"
            raise ConfigError(f"{self.cfg.share} is no share", where=where, fix="Use 0.5.")
        self.acts = "image:original" in need.request.inputs
        need.publish("mask:new")
        if self.acts:
            need.publish("box:picture")

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        if not self.acts:
            run.board["mask:new"] = torch.ones(1, 1, *run.size, device=run.device)
            return
        original, across = run.board["image:original"], self.cfg.side in ("left", "right")
        self.axis, first = (-1 if across else -2), self.cfg.side in ("left", "top")
        known, other = original.shape[self.axis], original.shape[-3 - self.axis]
        ratio = run.size[self.axis] / run.size[-3 - self.axis]
        length = max(round(other * ratio), 2)  # of the window, in pixels of the picture
        new = length - min(max(round(length * (1 - self.cfg.share)), 1), known)
        places = torch.arange(-new, known) if first else torch.arange(known + new)
        folded = places % (2 * known)
        mirrored = torch.where(folded < known, folded, 2 * known - 1 - folded)
        self.canvas = original.index_select(self.axis, mirrored)
        self.fresh = torch.zeros_like(self.canvas[:, :1])
        self.fresh.narrow(self.axis, 0 if first else known, new).fill_(1)
        self.window = (0 if first else known + new - length, length)
        run.board["box:picture"] = self._kept(new if first else 0, known, run.size)
        run.board["image:original"] = self.canvas
        like, mask = run.board["image:source"], self._seen(self.fresh)
        run.board["image:source"] = masks.resize_bicubic(self._seen(self.canvas), run.size).to(like)
        run.board["mask:new"] = masks.resize(mask, run.size).to(like)

    @hookimpl
    def inlay_final(self, run: Run, result: Result) -> None:
        if not self.acts or "edit" not in result.images:
            return
        edit = result.images["edit"].cpu().float()
        whole = self.canvas.repeat(len(edit), 1, 1, 1)
        drawn = masks.resize_bicubic(edit, self._seen(whole).shape[-2:])
        fresh = self._seen(self.fresh) > 0
        self._seen(whole).copy_(torch.where(fresh, drawn, self._seen(whole)))
        result.images["edit"], run.board["mask:new"] = whole, self.fresh

    def _kept(self, start: int, known: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The box, in a window of `size`, of what lies from `start` on in the canvas."""
        begin, length = self.window
        scale = size[self.axis] / length
        low = round(max(start - begin, 0) * scale)
        high = round(min(start + known - begin, length) * scale)
        return (low, 0, high, size[0]) if self.axis == -1 else (0, low, size[1], high)

    def _seen(self, canvas: Tensor) -> Tensor:
        """The window of `b c h w`, in place."""
        return canvas.narrow(self.axis, *self.window)
