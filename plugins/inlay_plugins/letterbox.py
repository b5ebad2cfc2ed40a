"""Letterbox: a picture of any shape inside a frame of the size that was asked for, and out again.

Without it a picture is squashed to the run's size. Where no size is asked for, the run has the
picture's own shape, up to a token, and the frame is hardly wider; a model that knows squares alone
wants `size` and this plugin.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from inlay import Needs, Plugin, Result, Run, hookimpl
from inlay_plugins import masks


class Letterbox(Plugin):
    """Stands before all that look at the picture. Replaces `image:source` and `mask:user` at the
    start; at the end cuts the frame off pictures, masks and maps. Publishes `box:letterbox`: left,
    top, right, bottom of the picture in the frame, in pixels. Acts when a picture was given.
    """

    before = ("source_trajectory", "sdedit", "region", "subject_mask", "regional_prompts",
              "latent_blend", "pixel_blend", "paste_back", "rank", "background_loss",
              "clip_guidance", "instruct", "presence")  # fmt: skip

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        self.acts = "image:original" in need.request.inputs
        if self.acts:
            need.publish("box:letterbox")

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        if not self.acts:
            return
        original, (height, width) = run.board["image:original"], run.size
        self.box = left, top, right, bottom = masks.inside(original.shape[-2:], run.size)
        tall, wide = bottom - top, right - left
        run.board["box:letterbox"] = self.box
        if (tall, wide) == (height, width):
            return
        bars = (left, width - wide - left, top, height - tall - top)
        shown = masks.resize_bicubic(original, (tall, wide)).to(run.board["image:source"])
        run.board["image:source"] = F.pad(shown, bars, mode="replicate")
        if "mask:user" in run.board:
            run.board["mask:user"] = F.pad(masks.resize(run.board["mask:user"], (tall, wide)), bars)

    @hookimpl
    def inlay_final(self, run: Run, result: Result) -> None:
        if not self.acts or self.box == (0, 0, run.size[1], run.size[0]):
            return
        for lane, picture in result.images.items():
            result.images[lane] = self._cut(picture, run.size)
        for key, value in list(run.board.items()):
            if key == "image:source" or key.startswith(("mask:", "map:")):
                run.board[key] = self._cut(value, run.size)

    def _cut(self, picture: Any, size: tuple[int, int]) -> Tensor:
        """The part of `b c h w`, of any size, that lies in the box."""
        left, top, right, bottom = self.box
        return masks.resize(picture, size)[..., top:bottom, left:right]
