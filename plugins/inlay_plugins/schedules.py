"""Options that speak of steps: one step, where image-to-image starts, and a number that changes
over the steps. No hooks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inlay import ConfigError, Frame


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


def img2img_start(
    strength: float | None,
    sigma: float | None,
    levels: Sequence[tuple[int, Frame]],
    total: int,
    where: str,
) -> int:
    """The first step of image-to-image, of a run of `total` whose evaluations are `levels`.

    strength: the share of steps that are made, counted as diffusers does (up for a flow model, else
    down); half where both are None. sigma: the first step at this noise or below. Raises
    ConfigError for both, where no step is left, and where `levels` are not known.
    """
    if strength is not None and sigma is not None:
        problem = "strength and sigma both say where to start"
        raise ConfigError(problem, where=where, fix="Give one of them.")
    if not levels:
        fix = "Run it in a session of its own."
        raise ConfigError("the noise levels are not known beforehand", where=where, fix=fix)
    if sigma is not None:
        found = [step for step, frame in levels if float(frame.sigma) <= sigma + 1e-6]
        if not found:
            last = float(levels[-1][1].sigma)
            fix = f"The last one starts at {last:.3g}: raise sigma, or steps."
            raise ConfigError(
                f"no step starts at {sigma} or below", where=f"{where}.sigma", fix=fix
            )
        return found[0]
    made = total * (0.5 if strength is None else strength)
    if not 1 <= made <= total:
        problem = f"{strength} of {total} steps is no step at all, or too many"
        fix = f"Use {1 / total:.2g} to 1.0, or more steps."
        raise ConfigError(problem, where=f"{where}.strength", fix=fix)
    return int(total - made) if levels[0][1].space == "flow" else total - int(made)


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
