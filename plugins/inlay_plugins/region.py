"""Region: where the picture is to be edited, as a mask that plugins below use.

A box, or the caller's mask; inverted, an object's mask is that of its background (Blended
Diffusion's background replacement).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from inlay import ConfigError, InputError, Needs, Plugin, Run, hookimpl
from inlay_plugins import masks


class Region(Plugin):
    """Publishes `mask:region`, `1 1 h w` in 0..1 at the picture's size; black everywhere is an
    error."""

    @dataclass
    class Config:
        """box: left, top, right, bottom as shares of the picture, where the caller gives no mask.
        Then, in this order: threshold: values above it are 1, others 0; null keeps grey, 0 is
        Blended Diffusion's rule, by which the darkest grey is the edit's. grow: pixels added all
        around, negative ones taken away. invert: swap inside and outside.
        """

        box: list[float] = field(default_factory=lambda: [0.25, 0.25, 0.75, 0.75])
        threshold: float | None = None
        grow: int = 0
        invert: bool = False

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        threshold, where = self.cfg.threshold, f"plugins.{need.owner}"
        if threshold is not None and not 0 <= threshold < 1:
            fix = "Use 0 for every grey, 0.5 for the brighter half."
            raise ConfigError(f"{threshold} is outside 0..1", where=f"{where}.threshold", fix=fix)
        if not masks.is_box(box := self.cfg.box):
            fix = "Give left, top, right, bottom in 0..1, such as [0, 0.5, 1, 1]."
            raise ConfigError(f"{box} is no box", where=f"{where}.box", fix=fix)
        need.publish("mask:region")

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        cfg, mask = self.cfg, run.board.get("mask:user")
        if mask is None:
            mask = masks.rectangle(cfg.box, run.size).to(run.device)
        if cfg.threshold is not None:
            mask = (mask > cfg.threshold).float()
        if cfg.grow >= 0:
            mask = masks.dilate(mask, cfg.grow)
        else:
            mask = 1 - masks.dilate(1 - mask, -cfg.grow)
        mask = 1 - mask if cfg.invert else mask
        if not mask.any():
            fix = "Paint white what may change, or look at grow and invert."
            raise InputError("nothing is left to be edited", where=f"plugins.{self.name}", fix=fix)
        run.board["mask:region"] = mask
