"""Weighted extended attention: the edit attends to the source's image tokens too (Add-it, eq. 2).

K = [gamma_p·K_edit[text]; gamma_t·K_edit[image]; gamma_s·K_source[image]], V joined unweighted:
gamma scales logits. The source is computed as if alone. Joint blocks (FLUX) and self-attention
(U-Net) are extended; cross-attention holds no image keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from inlay import AttnEdits, AttnSite, Needs, Plugin, Run, Step, Window, hookimpl
from inlay_plugins.schedules import Schedule


@dataclass
class Windows:
    """Steps per kind of block, [first, last] or progress; null: never. A kind the model has not is
    not asked for. The paper: 0..10 and 0..20 of 30.
    """

    double: Any = field(default_factory=lambda: [0.0, 0.35])
    single: Any = field(default_factory=lambda: [0.0, 0.68])
    unet: Any = field(default_factory=lambda: [0.0, 0.68])


class WeightedAttention(Plugin):
    """Needs a lane `source` (source_trajectory), which lives where the edit attends to it."""

    @dataclass
    class Config:
        """gamma: the paper's scale, of prompt and target alike; gamma_p, gamma_t: each by itself
        (null: gamma); gamma_s: of the source. A number, {start, end} or knots [[step, value], …].

        combine: join concatenates the keys. sum attends once, to image keys and values
        w_s·source + w_t·edit with w_s = gamma_s/(gamma_s + gamma_t) and w_t = 1 - w_s.
        """

        gamma: Any = 1.05
        gamma_s: Any = 1.0
        gamma_p: Any = None
        gamma_t: Any = None
        combine: Literal["join", "sum"] = "join"
        windows: Windows = field(default_factory=Windows)

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, where = self.cfg, f"plugins.{need.owner}"
        self.scales = {}
        for role, value in (("s", cfg.gamma_s), ("p", cfg.gamma_p), ("t", cfg.gamma_t)):
            key, value = (f"gamma_{role}", value) if value is not None else ("gamma", cfg.gamma)
            self.scales[role] = Schedule.parse(value, need.request.steps, f"{where}.{key}")
        for kind, sites in _extended(need):
            path = f"{where}.windows.{kind}"
            if (window := Window.parse(getattr(cfg.windows, kind), path)) is not None:
                steps = window.steps(need.request.steps, path)
                need.edit("gain", "edit", sites, steps)
                shared = {"from_": "source", "how": cfg.combine, "keys": "image"}
                need.edit("append", "edit", sites, steps, **shared)

    @hookimpl
    def inlay_attention(self, run: Run, step: Step, site: AttnSite, edits: AttnEdits) -> None:
        source, prompt, target = (self.scales[role](step.progress) for role in "spt")
        on = edits.on("edit")
        if self.cfg.combine == "sum":
            share = source / (source + target)
            on.append("source", "image", gain=share, how="sum", own=1 - share)
        elif site.kind == "joint" and prompt == target:
            on.gain("all", target)
        else:
            on.gain("image", target)
        if site.kind == "joint" and (self.cfg.combine == "sum" or prompt != target):
            on.gain("text", prompt)
        if self.cfg.combine == "join":
            on.append("source", "image", gain=source)


def _extended(need: Needs) -> Iterator[tuple[str, frozenset[str]]]:
    """(kind of block, its sites) that this model has."""
    for kind in ("double", "single"):
        if any(site.block == kind for site in need.sites):
            yield kind, need.select(kind=["joint"], block=[kind])
    if any(site.kind == "self" for site in need.sites):
        yield "unet", need.select(kind=["self"])
