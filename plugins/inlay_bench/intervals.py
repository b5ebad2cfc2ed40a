"""Means with bootstrap confidence intervals, paired over items (Efron and Tibshirani, 1993).

Every column and every method of a report is resampled with the same draws of items, so differences
between methods are differences on the same items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
RESAMPLES, LEVEL = 10_000, 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over `n` items and its percentile interval; NaN without items."""

    mean: float
    low: float
    high: float
    n: int


def draws(items: int, seed: int = 0, resamples: int = RESAMPLES) -> Values:
    """How often each item is drawn in each resample: `resamples items`, rows add up to `items`."""
    chance = np.full(items, 1 / items)
    return np.random.default_rng(seed).multinomial(items, chance, resamples).astype(np.float64)


def interval(values: Values, drawn: Values, level: float = LEVEL) -> Interval:
    """The mean of `values` over items (NaN: does not apply) with its interval.

    A resample in which no value applies is left out.
    """
    valid = np.isfinite(values)
    if not valid.any():
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    counts = drawn @ valid
    sums = drawn @ np.where(valid, values, 0.0)
    means = sums[counts > 0] / counts[counts > 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values[valid].mean()), float(low), float(high), int(valid.sum()))


def difference(a: Values, b: Values, drawn: Values, level: float = LEVEL) -> Interval:
    """The mean of `a - b` over items where both apply, with its interval."""
    return interval(a - b, drawn, level)
