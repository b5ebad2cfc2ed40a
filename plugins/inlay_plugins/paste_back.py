"""Paste back: the edited picture goes into the original one, at its resolution, inside a soft mask.

Latents are coarse, and a VAE's round trip changes every pixel; outside the mask and its feather the
result is the original, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inlay import ConfigError, Needs, Plugin, Result, Run, hookimpl
from inlay_plugins import masks


class PasteBack(Plugin):
    """Consumes the mask. Acts when a picture was given: a generated source has no original."""

    @dataclass
    class Config:
        """feather: width in pixels of the original of the ramp outside the mask; null: one cell of
        the mask. mask: a board key, 1 = the edit's. blur: passes of a 3x3 Gaussian over the mask
        instead, rounded to bytes: MimicBrush has 10, of image:mask.
        """

        feather: int | None = None
        mask: str = "mask:subject"
        blur: int = 0

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        for name in ("feather", "blur"):
            if (value := getattr(self.cfg, name)) is not None and value < 0:
                where = f"plugins.{need.owner}.{name}"
                raise ConfigError(f"{value} cannot be used", where=where, fix="Use 0 or more.")
        self.acts = "image:original" in need.request.inputs
        if self.acts:
            need.consume(self.cfg.mask)

    @hookimpl
    def inlay_final(self, run: Run, result: Result) -> None:
        if not self.acts or "edit" not in result.images:
            return
        original, mask = run.board["image:original"], run.board[self.cfg.mask].cpu().float()
        size = original.shape[-2:]
        cell = max(large / small for large, small in zip(size, mask.shape[-2:], strict=True))
        pixels = round(max(cell, 1)) if self.cfg.feather is None else self.cfg.feather
        inside = (masks.resize(mask, size) >= 0.5).float()
        alpha = inside if self.cfg.blur else masks.feather(inside, pixels)
        for _ in range(self.cfg.blur):
            alpha = (255 * masks.blur(alpha) + 0.5).floor() / 255
        edited = masks.resize_bicubic(result.images["edit"].cpu().float(), size)
        mixed = alpha * edited + (1 - alpha) * original
        result.images["edit"] = torch.where(alpha > 0, mixed, original)
