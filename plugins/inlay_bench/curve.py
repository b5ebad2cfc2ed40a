"""Rows that are settings of one method, as a curve of one number against another."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inlay_bench.report import Summary

WIDTH, HEIGHT, EDGE = 560, 380, 52  # px
COLOURS = ("#2f6fb2", "#b3402e", "#3d8f52", "#8a5fb0", "#b07a1e", "#3a8f94")
Point = tuple[str, float, float]


def points(summary: Summary) -> dict[str, list[Point]]:
    """By series: the setting, and the means of the task's two columns; a row that is no setting of
    anything is a series of its own. Rows without both numbers are left out."""
    across, up = summary.evaluation.task.curve
    found: dict[str, list[Point]] = {}
    for row in summary.rows:
        x, y = row.values[across], row.values[up]
        if x.n and y.n:
            series = summary.evaluation.series.get(row.method, "")
            setting = row.method.removeprefix(f"{series}-") if series else ""
            found.setdefault(series or row.method, []).append((setting, x.mean, y.mean))
    return found


def draw(summary: Summary) -> Iterator[str]:
    """A heading and an SVG for the page; nothing where no row has both numbers."""
    found = points(summary)
    if not found:
        return
    across, up = (_title(summary, key) for key in summary.evaluation.task.curve)
    xs = _range([x for line in found.values() for _, x, _ in line])
    ys = _range([y for line in found.values() for _, _, y in line])

    def place(x: float, y: float) -> tuple[float, float]:
        wide, tall = WIDTH - 2 * EDGE, HEIGHT - 2 * EDGE
        left = EDGE + wide * (x - xs[0]) / (xs[1] - xs[0])
        return left, HEIGHT - EDGE - tall * (y - ys[0]) / (ys[1] - ys[0])

    yield f"<h2>{escape(up)} against {escape(across)}</h2>"
    yield f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" font-size="12" fill="var(--soft)">'
    bottom, right = HEIGHT - EDGE, WIDTH - EDGE
    yield f'<path d="M{EDGE} {EDGE}V{bottom}H{right}" fill="none" stroke="var(--line)"/>'
    yield f'<text x="{right}" y="{HEIGHT - 14}" text-anchor="end">{escape(across)}</text>'
    yield f'<text x="{EDGE}" y="{EDGE - 12}">{escape(up)}</text>'
    for x in xs:
        left = place(x, ys[0])[0]
        yield f'<text x="{left:.1f}" y="{bottom + 16}" text-anchor="middle">{x:.3f}</text>'
    for y in ys:
        top = place(xs[0], y)[1] + 4
        yield f'<text x="{EDGE - 6}" y="{top:.1f}" text-anchor="end">{y:.3f}</text>'
    for i, (name, line) in enumerate(found.items()):
        colour = COLOURS[i % len(COLOURS)]
        spots = [place(x, y) for _, x, y in line]
        way = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        yield f'<path d="M{way}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        for (x, y), (setting, _, _) in zip(spots, line, strict=True):
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
            yield f'<text x="{x + 6:.1f}" y="{y - 5:.1f}">{escape(setting)}</text>'
        x, y = spots[-1]
        yield f'<text x="{x + 6:.1f}" y="{y + 14:.1f}" fill="{colour}">{escape(name)}</text>'
    yield "</svg>"


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _title(summary: Summary, key: str) -> str:
    return next(column.title for column in summary.columns if column.key == key)
