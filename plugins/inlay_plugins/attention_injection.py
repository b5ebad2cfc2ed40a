"""Attention injection (Shin et al. 2025): Prompt-to-Prompt for diffusion transformers. The edit's
picture looks where the source's does.

In the first fifth of the steps the queries and keys of the picture's tokens are those of a source
that is drawn beside the edit, from prompt.source and the same noise; values and the text stay the
edit's. Prompts need not be alike, and nothing is aligned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from inlay import AttnEdits, Needs, Plugin, Window, hookimpl


class AttentionInjection(Plugin):
    """Provides the lane `source`, unless another plugin does. Of joint attention the picture's
    queries are answered so; of a U-Net self-attention."""

    @dataclass
    class Config:
        """active: when. depth: where, shares of the attention sites from the input on; published:
        all, and the first 38 of 57 (FLUX.1-schnell) or 30 of 38 for models of few steps.
        """

        active: Any = 0.2
        depth: Any = None

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        window = Window.parse(self.cfg.active, f"plugins.{need.owner}.active")
        need.lane("source", prompt="source", n=need.request.n)
        if window is None:
            return
        first, last = self.cfg.depth or (0.0, 1.0)
        joint = any(site.kind == "joint" for site in need.sites)
        sites = need.select(kind=["joint" if joint else "self"], depth=(first, last))
        taken = {"from_": "source", "how": "qk", "queries": "image", "keys": "image"}
        need.edit("route", "edit", sites, window, **taken)

    @hookimpl
    def inlay_attention(self, edits: AttnEdits) -> None:
        edits.on("edit", "image").route(qk="source", keys="image")
