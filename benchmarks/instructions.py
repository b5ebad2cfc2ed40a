"""Sections of the results page: a picture changed by an instruction.

`tradeoff` is InstructPix2Pix's figure 8 on scenes whose true edit is known: how much the picture
changes the right way against how much of it stays, over the scale of the picture.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import comparison
from PIL import Image, ImageDraw

from inlay_bench import curve
from inlay_bench.report import Summary
from inlay_config.images import save

ROWS = ("instruct", "sdedit_sd")
COLUMNS = ("carried_out", "direction_fixed", "image_fixed", "direction_coded", "image_coded",
           "psnr_strict")  # fmt: skip
WIDTH, HEIGHT, EDGE = 420, 300, 44  # pixels of the figure
COLOURS = ((30, 90, 170), (180, 60, 40), (60, 140, 80))


def tradeoff(args: Namespace) -> str:
    """One row per scale of the picture, or strength, and the curves through them."""
    few = max(1, args.items // 10)
    summary = comparison.evaluate("toybox-tradeoff", ROWS, few)
    save(figure(summary), comparison.OUT / "tradeoff.png")
    rows = {row.method: row.method for row in summary.rows if row.method not in ("copy", "vae")}
    lines = comparison.means(summary, rows, COLUMNS)
    return "\n".join([*lines, "", f"* {few} items, guidance and steps as the experiments ship."])


def figure(summary: Summary) -> Image.Image:
    """The series of a summary in the plane of its task's two columns."""
    lines = {k: v for k, v in curve.points(summary).items() if len(v) > 1}
    across, up = (
        comparison.columns_of(summary, [k])[0].title for k in summary.evaluation.task.curve
    )
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    xs, ys = (_ends([p[i] for line in lines.values() for p in line]) for i in (1, 2))

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - xs[0]) / (xs[1] - xs[0]) * (WIDTH - 2 * EDGE)
        return EDGE + right, HEIGHT - EDGE - (y - ys[0]) / (ys[1] - ys[0]) * (HEIGHT - 2 * EDGE)

    pen.line([(EDGE, EDGE), (EDGE, HEIGHT - EDGE), (WIDTH - EDGE, HEIGHT - EDGE)], fill="grey")
    for x, y in zip(xs, ys, strict=True):
        pen.text((place(x, y)[0] - 10, HEIGHT - EDGE + 4), f"{x:.2f}", fill="black")
        pen.text((6, place(x, y)[1] - 6), f"{y:.2f}", fill="black")
    pen.text((EDGE, HEIGHT - 18), f"{across} similarity", fill="black")
    pen.text((6, 12), f"{up} similarity", fill="black")
    for colour, (name, line) in zip(COLOURS, lines.items(), strict=False):
        spots = [place(x, y) for _, x, y in line]
        pen.line(spots, fill=colour, width=2)
        for (x, y), (setting, _, _) in zip(spots, line, strict=True):
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
            pen.text((x + 5, y - 12), setting, fill=colour)
        pen.text((spots[-1][0] + 5, spots[-1][1] + 3), name, fill=colour)
    return image


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
