"""Mutual self-attention (MasaCtrl, Cao et al. 2023, section 3.2): the edit keeps its own layout and
asks the source for the content.

From `step` on, in the deeper half of the model, the edit's image queries read the source's keys
and values in place of their own; the prompt stays the edit's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from inlay import AttnEdits, Needs, Plugin, Window, hookimpl


class MutualSelfAttention(Plugin):
    """Needs a lane `source` (source_trajectory), which lives where the edit asks it."""

    @dataclass
    class Config:
        """active: when; published: from step 4 of 50 on. depth: where, shares of the attention
        sites from the input on; published: the decoder."""

        active: Any = None
        depth: Any = None

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        where = f"plugins.{need.owner}"
        window = Window.parse(self.cfg.active or [0.08, 1.0], f"{where}.active")
        first, last = self.cfg.depth or (0.5, 1.0)
        if window is None:
            return
        joint = any(site.kind == "joint" for site in need.sites)
        sites = need.select(kind=["joint" if joint else "self"], depth=(first, last))
        taken = {"from_": "source", "how": "kv", "queries": "image", "keys": "image"}
        need.edit("route", "edit", sites, window, **taken)

    @hookimpl
    def inlay_attention(self, edits: AttnEdits) -> None:
        edits.on("edit", "image").route(kv="source", keys="image")
