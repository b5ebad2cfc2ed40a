"""A proportion with its counts, and scenes that no recipe trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from inlay_toybox import world
from inlay_toybox.training import UNSEEN

THRESHOLD = 0.3
"""Score from which a detection counts."""

OVERLAP = 0.5
"""Intersection over union from which a detection matches an object."""

PROMPTS, SCENES, INSERTIONS = 1_000_000, 2_000_000, 3_000_000
EXEMPLARS, IMITATIONS, INSTRUCTIONS = 4_000_000, 5_000_000, 6_000_000
"""First seeds of the sets of scenes, counted from ``UNSEEN``."""

STRIDE = 10_000_000
"""Between the first seeds of two sets of tasks."""


@dataclass
class Share:
    """A proportion with its counts."""

    hits: int = 0
    total: int = 0

    def add(self, hit: bool) -> None:
        self.hits, self.total = self.hits + int(hit), self.total + 1

    @property
    def value(self) -> float:
        return self.hits / self.total if self.total else float("nan")

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.hits}/{self.total})"


def unseen_scenes(n: int, first: int, count: int | None = None) -> Iterator[world.Scene]:
    """Scenes beyond all training seeds with at least one object; held-out pairs may occur."""
    seed, left = UNSEEN + first, n
    while left:
        scene = world.sample(seed, held_out=True, count=count)
        seed += 1
        if scene.things:
            left -= 1
            yield scene
