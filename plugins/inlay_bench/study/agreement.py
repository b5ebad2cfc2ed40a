"""How far voters agree: Krippendorff's alpha, and the plain share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class Agreement:
    """alpha: 1 = complete, 0 = as by chance, below = worse; None when all answers are the same.
    share: of pairs of voters on one question who gave the same answer, 0..1. pairs: how many."""

    alpha: float | None
    share: float
    pairs: int


def agreement(units: Iterable[Mapping[str, float]], scale: float = 0.0) -> Agreement | None:
    """Agreement over questions, each voter's answer by voter (Krippendorff, 2011).

    scale: of ratings, their range: answers differ by the square of their distance (interval data).
    0: answers are the same or not (nominal data). None when no question has two answers.
    """

    def gap(a: float, b: float) -> float:
        return ((a - b) / scale) ** 2 if scale else float(a != b)

    answered = [list(unit.values()) for unit in units if len(unit) > 1]
    if not answered:
        return None
    pairs = [pair for values in answered for pair in combinations(values, 2)]
    pooled = [value for values in answered for value in values]
    observed = sum(
        2 * sum(gap(a, b) for a, b in combinations(values, 2)) / (len(values) - 1)
        for values in answered
    ) / len(pooled)
    # Over all pairs of answers, by how often each value was given.
    counts = {value: pooled.count(value) for value in set(pooled)}
    apart = sum(counts[a] * counts[b] * gap(a, b) for a in counts for b in counts)
    expected = apart / (len(pooled) * (len(pooled) - 1))
    same = sum(a == b for a, b in pairs) / len(pairs)
    return Agreement(1 - observed / expected if expected else None, same, len(pairs))
