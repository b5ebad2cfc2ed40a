"""Perturbed-attention guidance (Ahn et al. 2024): away from what the model draws when its
self-attention sees nothing but itself.

One more row per picture is evaluated in which the chosen sites' image queries get P ← I; the lane's
output moves by `scale` times the difference (eq. 13), after whatever else combines its predictions.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from inlay import AttnEdits, Needs, Plugin, Step, Window, hookimpl


class Pag(Plugin):
    """Sharper structure without a negative prompt, for one more row per picture."""

    @dataclass
    class Config:
        """scale: of the guidance, 0 or more; published: 3. blocks: of the model, such as mid, up,
        double, single; []: mid where there is one, else the middle third. active: when.
        """

        scale: float = 3.0
        blocks: list[str] = field(default_factory=list)
        active: Any = field(default_factory=lambda: [0.0, 1.0])

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        window = Window.parse(self.cfg.active, f"plugins.{need.owner}.active")
        if window is None or not self.cfg.scale:
            return
        blocks, known = self.cfg.blocks, {site.block for site in need.sites}
        if blocks or "mid" in known:
            sites = need.select(kind=["self", "joint"], block=blocks or ["mid"])
        else:
            sites = need.select(kind=["self", "joint"], depth=(1 / 3, 2 / 3))
        need.branch("edit", need.owner, active=window)
        need.edit("identity", f"edit/{need.owner}", sites, window, queries="image")

    @hookimpl
    def inlay_attention(self, edits: AttnEdits) -> None:
        edits.on(f"edit/{self.name}", "image").identity()

    @hookimpl(wrapper=True)
    def inlay_combine(self, step: Step, lane: str, text: Tensor) -> Generator[None, Tensor, Tensor]:
        output = yield
        perturbed = step.preds.get(f"{lane}/{self.name}")
        return output if perturbed is None else output + self.cfg.scale * (text - perturbed)
