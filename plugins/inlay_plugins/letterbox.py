"""Letterbox: a picture of any shape inside a frame of the size that was asked for, and out again.

Without it a picture is squashed to the run's size. Where no size is asked for, the run has the
picture's own shape, up to a token, and the frame is hardly wider; a model that knows squares alone
wants `size` and this plugin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from inlay import Needs, Plugin, Result, Run, hookimpl
from inlay_plugins import masks


class Letterbox(Plugin):
    """Stands before all that look at the picture. Replaces `image:source` and `mask:user` at the
    start; at the end cuts the frame off pictures, masks and maps. Publishes `box:picture`: left,
    top, right, bottom of the picture in the frame, in pixels. Acts when a picture was given.
    """

    @dataclass
    class Config:
        """fill: the bars repeat the picture's edge, or are white. resize: smooth is bicubic,
        antialiased, and the mask by area; plain, as MimicBrush does it, is bilinear, the mask by
        its nearest pixel, and the frame is enlarged before it is cut off.
        """

        fill: Literal["edge", "white"] = "edge"
        resize: Literal["smooth", "plain"] = "smooth"

    before = ("source_trajectory", "sdedit", "region", "subject_mask", "regional_prompts",
              "latent_blend", "pixel_blend", "paste_back", "rank", "background_loss", "scribble",
              "clip_guidance", "instruct", "presence", "exemplar", "imitation",
              "exemplar_attention", "reconstruct_background")  # fmt: skip

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        self.acts = "image:original" in need.request.inputs
        if self.acts:
            need.publish("box:picture")

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        if not self.acts:
            return
        original, (height, width) = run.board["image:original"], run.size
        self.box = left, top, right, bottom = masks.inside(original.shape[-2:], run.size)
        tall, wide = bottom - top, right - left
        run.board["box:picture"] = self.box
        plain = self.cfg.resize == "plain"
        if (tall, wide) == (height, width) and not plain:
            return
        bars = (left, width - right, top, height - bottom)
        if plain:
            shown = masks.resize_bilinear(original, (tall, wide))
        else:
            shown = masks.resize_bicubic(original, (tall, wide))
        shown = shown.to(run.board["image:source"])
        edge = self.cfg.fill == "edge"
        framed = F.pad(shown, bars, mode="replicate") if edge else F.pad(shown, bars, value=1.0)
        run.board["image:source"] = framed
        if "mask:user" in run.board:
            mask = run.board["mask:user"]
            if plain:
                exact = run.board["image:mask"].to(mask)
                mask = F.interpolate(exact, (tall, wide), mode="nearest-exact")
            run.board["mask:user"] = F.pad(masks.resize(mask, (tall, wide)), bars)

    @hookimpl
    def inlay_final(self, run: Run, result: Result) -> None:
        if not self.acts or self.box == (0, 0, run.size[1], run.size[0]):
            return
        for lane, picture in result.images.items():
            if self.cfg.resize == "plain":
                result.images[lane] = self._enlarged(picture, run.board["image:original"].shape)
            else:
                result.images[lane] = self._cut(picture, run.size)
        for key, value in list(run.board.items()):
            if key == "image:source" or key.startswith(("mask:", "map:")):
                run.board[key] = self._cut(value, run.size)

    def _cut(self, picture: Any, size: tuple[int, int]) -> Tensor:
        """The part of `b c h w`, of any size, that lies in the box."""
        left, top, right, bottom = self.box
        return masks.resize(picture, size)[..., top:bottom, left:right]

    @staticmethod
    def _enlarged(picture: Tensor, original: Sequence[int]) -> Tensor:
        """A framed picture with the frame enlarged until it holds the original, and cut off."""
        rows, columns = original[-2:]
        scale = max(rows / picture.shape[-2], columns / picture.shape[-1])
        size = [
            max(round(side * scale), own)
            for side, own in zip(picture.shape[-2:], (rows, columns), strict=True)
        ]
        top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
        return masks.resize_bilinear(picture, size)[..., top : top + rows, left : left + columns]
