"""The outcome of a study on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inlay_bench.intervals import Interval
from inlay_bench.study.score import Score

TITLES = {"2afc": "share won ↑", "rank": "mean rank ↓", "likert": "mean rating ↑"}


def show(score: Score) -> None:
    """Methods, pairs, agreement."""
    console = Console(highlight=False)
    rows = Table("method", TITLES[score.design], "items", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in score.rows:
        rows.add_row(escape(row.method), escape(_shown(row.value)), str(row.value.n))
    console.print(rows)
    rating = score.design == "likert"
    pairs = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("pair", "won/lost/tied", "rated higher by" if rating else "preferred"):
        pairs.add_column(head, no_wrap=True)
    if not rating:
        pairs.add_column("Wilson", no_wrap=True)
    for pair in score.pairs:
        counts = f"{pair.wins}/{pair.losses}/{pair.ties}"
        cells = [f"{pair.a} : {pair.b}", counts, _shown(pair.estimate, "+" if rating else "")]
        if pair.wilson:
            cells.append(f"[{pair.wilson[0]:.3f}, {pair.wilson[1]:.3f}]")
        pairs.add_row(*(escape(cell) for cell in cells))
    console.print(pairs)
    counted = f"{score.votes} votes of {len(score.voters)} voters, {score.unanswered} left open"
    console.print(f"{counted}; 95 % intervals")
    if score.agreement:
        alpha = score.agreement.alpha
        told = "undefined: all answers are the same" if alpha is None else f"{alpha:.3f}"
        console.print(
            f"Krippendorff's alpha {told}; {score.agreement.share:.3f} of "
            f"{score.agreement.pairs} pairs of answers are the same"
        )


def _shown(value: Interval, sign: str = "") -> str:
    """`0.550 [0.450, 0.650]`."""
    return f"{value.mean:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"
