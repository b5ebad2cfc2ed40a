"""Shared attention (StyleAligned, Hertz et al. 2023, section 4): every picture is drawn in the
style of one reference.

Queries and keys of a picture are normalised to the reference's (AdaIN, eq. 4), and its queries
attend to the reference's keys and values beside the own ones, in one softmax. Only picture tokens
take part; the reference is computed as if alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from inlay import AttnEdits, ConfigError, Needs, Plugin, Window, hookimpl


class SharedAttention(Plugin):
    """Every picture of the lane `edit` shares the attention of one picture of a reference lane."""

    @dataclass
    class Config:
        """lane: the reference. `reference` is drawn for it, from prompt.source and `seed`, whatever
        the run's seed; another, such as `source` of source_trajectory, must be there.
        active: when. depth: where, shares of the attention sites from the input on; published: all
        self-attention. normalise: queries and keys take the reference's statistics.

        scale, shift: of the logits of the reference's keys, logits · scale + shift. Published: 1
        and 0, for a given picture less: a shift below 0 keeps its content from being copied.
        """

        lane: str = "reference"
        seed: int = 6311
        active: Any = None
        depth: Any = None
        normalise: bool = True
        scale: float = 1.0
        shift: float = 0.0

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, where = self.cfg, f"plugins.{need.owner}"
        if cfg.scale <= 0:
            raise ConfigError(f"{cfg.scale} turns the reference's logits around",
                              where=f"{where}.scale", fix="Use more than 0.")  # fmt: skip
        window = Window.parse(cfg.active or [0.0, 1.0], f"{where}.active")
        first, last = cfg.depth or (0.0, 1.0)
        if cfg.lane == "reference":
            need.lane("reference", prompt="source", seed=cfg.seed)
        joint = any(site.kind == "joint" for site in need.sites)
        sites = need.select(kind=["joint" if joint else "self"], depth=(first, last))
        shared = {"queries": "image", "keys": "image", "from_": cfg.lane}
        if cfg.normalise:
            need.edit("align", "edit", sites, window, **shared)
        need.edit("append", "edit", sites, window, **shared)
        if cfg.shift:
            need.edit("bias", "edit", sites, window, queries="image")

    @hookimpl
    def inlay_attention(self, edits: AttnEdits) -> None:
        cfg, on = self.cfg, edits.on("edit", "image")
        if cfg.normalise:
            on.align(cfg.lane, "image")
        on.append(cfg.lane, "image", gain=cfg.scale)
        if cfg.shift:  # the own keys by as much less: a softmax knows differences only
            on.bias("all", -cfg.shift)
