"""Sections of the results page: a picture changed by an instruction.

`insertion` puts the models that are told "add a dog" beside the methods that are given captions.
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

TOLD = ("instruct", "magicbrush", "erasedraw")
BEGUN = "erasedraw@source_trajectory.seed=4@sdedit.strength=1"
GIVEN = ("addit", "addit_sd")
SHOWN = ("inclusion", "held_out", "affordance", "affordance_all", "contact", "clip_direction",
         "psnr", "lpips")  # fmt: skip
COMPARED = ("inclusion", "affordance_all", "contact", "clip_direction", "psnr", "lpips")
SHEET = {"input": "input", "instruct": "instruct", "magicbrush": "magicbrush",
         "erasedraw": "erasedraw", "begun from it": BEGUN, "Add-it": "addit"}  # fmt: skip

ROWS = ("instruct", "sdedit_sd")
COLUMNS = ("carried_out", "direction_fixed", "image_fixed", "direction_coded", "image_coded",
           "psnr_strict")  # fmt: skip
ALONG = ("carried_out", "direction_fixed", "image_fixed", "psnr_strict")
STEPS = ((1, 1.4), (1.4, 1.8), (1.8, 2.2), (1, 2.2))  # scales of the picture that are compared
WIDTH, HEIGHT, EDGE = 420, 300, 44  # pixels of the figure
COLOURS = ((30, 90, 170), (180, 60, 40), (60, 140, 80))


def insertion(args: Namespace) -> str:
    """Instructions on items of the insertion task, and how the pictures differ from Add-it's, from
    each other's, and from those that begin with noise over the picture, as in training, in place of
    noise alone."""
    few = max(1, args.items // 8)
    rows = (*TOLD, BEGUN, *GIVEN)
    summary = comparison.evaluate("toybox-affordance", rows, few, "instructions")
    save(comparison.sheet(summary, SHEET), comparison.OUT / "instructions.png")
    pairs = [(ours, other) for other in GIVEN for ours in TOLD]
    pairs += [*((ours, "instruct") for ours in TOLD[1:]), (BEGUN, "erasedraw")]
    lines = comparison.means(summary, {f"`{name}`": name for name in rows}, SHOWN)
    lines += ["", f"* The first {few} items.", "", "*Item by item*", ""]
    return "\n".join([*lines, *_differences(summary, pairs, COMPARED)])


def _differences(
    summary: Summary, pairs: Sequence[tuple[str, str]], keys: Sequence[str]
) -> list[str]:
    """One table of differences of pairs of methods."""
    tables = [comparison.differences(summary, a, [b], keys) for a, b in pairs]
    return [*tables[0], *(table[-1] for table in tables[1:])]


def tradeoff(args: Namespace) -> str:
    """One row per scale of the picture, or strength, and the curves through them."""
    few = max(1, args.items // 8)
    summary = comparison.evaluate("toybox-tradeoff", ROWS, few)
    save(figure(summary), comparison.OUT / "tradeoff.png")
    rows = {row.method: row.method for row in summary.rows if row.method not in ("copy", "vae")}
    lines = comparison.means(summary, rows, COLUMNS)
    lines += ["", f"* {few} items, guidance and steps as the experiments ship.", ""]
    pairs = [(f"instruct-{high}", f"instruct-{low}") for low, high in STEPS]
    return "\n".join([*lines, "*Scene by scene*", "", *_differences(summary, pairs, ALONG)])


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
