"""The outcome of a study on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from inlay_bench.intervals import Interval
from inlay_bench.study.score import Score

TITLES = {"2afc": "share won ↑", "rank": "mean rank ↓", "likert": "mean rating ↑"}


def show(score: Score) -> None:
    """Methods, pairs, agreement."""
    console = Console(highlight=False)
    rating = score.design == "likert"
    rows = Table("method", TITLES[score.design], "95 %", "items", box=box.SIMPLE_HEAD)
    for row in score.rows:
        rows.add_row(row.method, f"{row.value.mean:.3f}", _bounds(row.value), str(row.value.n))
    console.print(rows)
    heads = ("rated higher by", "95 %") if rating else ("preferred", "95 %", "Wilson 95 %")
    pairs = Table("", "against", "won", "lost", "tied", *heads, box=box.SIMPLE_HEAD)
    for pair in score.pairs:
        counts = (str(count) for count in (pair.wins, pair.losses, pair.ties))
        sign = "+" if rating else ""
        cells = [f"{pair.estimate.mean:{sign}.3f}", _bounds(pair.estimate, sign)]
        if pair.wilson:
            cells.append(f"{pair.wilson[0]:.3f} – {pair.wilson[1]:.3f}")
        pairs.add_row(pair.a, pair.b, *counts, *cells)
    console.print(pairs)
    console.print(
        f"{score.votes} votes of {len(score.voters)} voters, {score.unanswered} left open"
    )
    if score.agreement:
        alpha = score.agreement.alpha
        told = "undefined: all answers are the same" if alpha is None else f"{alpha:.3f}"
        console.print(
            f"Krippendorff's alpha {told}; {score.agreement.share:.3f} of "
            f"{score.agreement.pairs} pairs of answers are the same"
        )


def _bounds(value: Interval, sign: str = "") -> str:
    return f"{value.low:{sign}.3f} – {value.high:{sign}.3f}"
