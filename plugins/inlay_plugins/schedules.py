"""Options that speak of steps: one step, and a number that changes over the steps. No hooks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inlay import ConfigError


def step_index(value: Any, total: int, where: str) -> int:
    """A step of a run of `total`: an integer is its index, a float progress (0.5: half way).

    Raises ConfigError, naming `where` (a YAML path), when it lies outside the run.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{value!r} is no step", where=where, fix="Give an index or progress.")
    index = value if isinstance(value, int) else math.ceil(value * total - 1e-9)
    if not 0 <= index < total:
        fix = f"Use 0..{total - 1}, or progress from 0.0 to below 1.0."
        raise ConfigError(f"step {value} is outside a run of {total} steps", where=where, fix=fix)
    return index


@dataclass(frozen=True)
class Schedule:
    """A number over the steps: constant, or linear between knots and constant outside them.

    knots: (progress 0..1, value), in order.
    """

    knots: tuple[tuple[float, float], ...]

    @classmethod
    def parse(cls, value: Any, total: int, where: str) -> Schedule:
        """A number; `{start: a, end: b}`, from the first step to the last; or knots `[[at, a], …]`,
        `at` a step index or progress. Raises ConfigError unless all values are finite and >= 0."""
        if isinstance(value, Mapping) and set(value) == {"start", "end"}:
            value = [[0, value["start"]], [total - 1, value["end"]]]
        pairs = value if isinstance(value, list | tuple) else [[0, value]]
        try:
            knots = tuple((at / total if isinstance(at, int) else at, v) for at, v in pairs)
            good = bool(knots) and all(
                math.isfinite(v) and v >= 0 and 0 <= at < 1 for at, v in knots
            )
        except (TypeError, ValueError):
            good = False
        if not good or list(knots) != sorted(knots, key=lambda knot: knot[0]):
            fix = "Give a number >= 0, {start: a, end: b} or [[step, value], ...] in order."
            raise ConfigError(f"{value!r} is no schedule for {total} steps", where=where, fix=fix)
        return cls(knots)

    def __call__(self, progress: float) -> float:
        """The value at `progress` (step.progress)."""
        before = [knot for knot in self.knots if knot[0] <= progress] or [self.knots[0]]
        after = [knot for knot in self.knots if knot[0] > progress] or [before[-1]]
        (a, low), (b, high) = before[-1], after[0]
        return low if b <= a or progress <= a else low + (high - low) * (progress - a) / (b - a)
