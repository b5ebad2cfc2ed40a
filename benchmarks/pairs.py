"""Interleaved pairs: two ways to do one thing, timed in turn, so that a busy machine slows both.

Seconds are the processor time of this process on one thread: neighbours do not count.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[1] / "outputs" / "bench"


def ratio(
    benchmark: Any, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int
) -> dict[str, float]:
    """Median seconds of both and the median ratio ours/theirs of the pairs, in turns."""
    times: list[tuple[float, float]] = []

    def pair() -> None:
        order = (ours, theirs) if len(times) % 2 else (theirs, ours)
        spent = {}
        for work in order:
            begun = time.process_time()
            work()
            spent[work] = time.process_time() - begun
        times.append((spent[ours], spent[theirs]))

    benchmark.pedantic(pair, rounds=rounds, warmup_rounds=1)
    times = times[1:]  # the warm-up
    return {
        "ours": statistics.median(a for a, _ in times),
        "theirs": statistics.median(b for _, b in times),
        "ratio": statistics.median(a / b for a, b in times),
    }


def report(name: str, what: str, aim: str, value: float, met: bool, **more: float) -> None:
    """Write one line of benchmarks/README.md; report.py collects them."""
    OUT.mkdir(parents=True, exist_ok=True)
    line = {"what": what, "aim": aim, "value": value, "met": met, **more}
    (OUT / f"{name}.json").write_text(json.dumps(line, indent=1))
