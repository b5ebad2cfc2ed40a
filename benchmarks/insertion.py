"""Sections of the results page: Add-it over the tasks of `inlay eval`, by the harness.

Records, pictures and a report of each lie in outputs/quality/TASK: what was measured once is not
measured again.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from PIL import Image

from inlay_bench import methods, pictures, report, runner, tasks
from inlay_bench.records import OtherIdentity
from inlay_bench.report import Summary
from inlay_bench.terminal import Progress
from inlay_config import config
from inlay_config.images import open_image, save

OUT = Path(__file__).parents[1] / "outputs" / "quality"
AFFORDANCE = ("addit", "addit_paste", "t2i", "twin", "elsewhere")
ADDITING = ("addit", "t2i")
SHEET = ("input", "t2i", "addit", "addit_paste")


def affordance(args: Namespace) -> str:
    """Insertion into rendered scenes, whose every right place is known."""
    summary = evaluate("toybox-affordance", AFFORDANCE, args.items)
    save(sheet(summary), OUT / "insertion.png")
    return "\n".join(insertion_tables(summary))


def additing(args: Namespace) -> str:
    """Insertion into pictures that the model draws itself; its inputs cost as much again."""
    summary = evaluate("toybox-additing", ADDITING, max(1, args.items // 4))
    return "\n".join(insertion_tables(summary))


def evaluate(name: str, rows: tuple[str, ...], n: int) -> Summary:
    """What `inlay eval NAME --methods ROWS` does; records of another state of the code or of other
    weights are set aside, pictures that the change does not touch are kept."""
    task, out = tasks.load(name), OUT / name
    made, draw = methods.build(rows, task), methods.drawer(task)
    with Progress(quiet=False) as progress:
        try:
            done = runner.evaluate(task, made, out, n, draw=draw, callback=progress.update)
        except OtherIdentity as changed:
            print(changed)
            done = runner.evaluate(
                task, made, out, n, draw=draw, remeasure=True, callback=progress.update
            )
    summary = report.summarise(done)
    report.write(summary, out)
    return summary


def insertion_tables(summary: Summary) -> list[str]:
    """The report's tables of means, and what a reader must know of them."""
    lines = []
    for title, columns in summary.groups.items():
        lines += [f"*{title}*", "", *report.group_table(summary, columns), ""]
    lines += [f"* {len(summary.evaluation.items)} items."]
    lines += [f"* {note}" for note in report.notes(summary)]
    plugins = config.load("addit").plugins
    plugins["subject_mask"].pop("subject")  # the item's own
    options = json.dumps({name: values for name, values in plugins.items() if values})
    return [*lines, f"* Options of `addit` other than the plugins' defaults: `{options}`."]


def sheet(summary: Summary, items: int = 12, columns: int = 3) -> Image.Image:
    """The first items, each a line of `SHEET`, twice as large."""
    done = summary.evaluation
    shown = [item.id for item in done.items[:items]]
    paths = [[pictures.path_of(done.folder, row, item) for row in SHEET] for item in shown]
    tiles = [[open_image(path) for path in line if path.is_file()] for line in paths]
    side = tiles[0][0].width
    width, lines = len(SHEET) * (side + 2) + 6, -(-len(tiles) // columns)
    canvas = Image.new("RGB", (columns * width, lines * (side + 4)), "white")
    for i, line in enumerate(tiles):
        for k, tile in enumerate(line):
            canvas.paste(tile, (i % columns * width + k * (side + 2), i // columns * (side + 4)))
    return canvas.resize((canvas.width * 2, canvas.height * 2), Image.Resampling.NEAREST)
