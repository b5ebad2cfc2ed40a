"""Rows of the harness side by side: evaluated where records are kept, as tables, as pictures.

Records and pictures of each task lie in outputs/quality/TASK: what was measured once is not
measured again, whichever section asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from inlay_bench import intervals, methods, pictures, report, runner, tasks
from inlay_bench.measures import Column
from inlay_bench.records import OtherIdentity
from inlay_bench.report import Summary
from inlay_bench.tasks import Task
from inlay_bench.terminal import Progress
from inlay_config.images import open_image

ROOT = Path(__file__).parents[1]
OUT = ROOT / "outputs" / "quality"
GAP, HEAD = 2, 12  # pixels between tiles, of a column's title


def evaluate(task: Task | str, rows: Sequence[str], n: int, section: str = "") -> Summary:
    """What `inlay eval TASK --methods ROWS` does; records of another state of the code or of other
    weights are set aside, pictures that the change does not touch are kept.

    section: where its report is written, below `OUT`; beside the task's records by default.
    """
    task = tasks.load(task) if isinstance(task, str) else task
    made, draw, out = methods.build(rows, task), methods.drawer(task), OUT / task.name
    with Progress(quiet=False) as progress:
        try:
            done = runner.evaluate(task, made, out, n, draw=draw, callback=progress.update)
        except OtherIdentity as changed:
            print(changed)
            done = runner.evaluate(
                task, made, out, n, draw=draw, remeasure=True, callback=progress.update
            )
    summary = report.summarise(done)
    place = OUT / (section or task.name)
    place.mkdir(parents=True, exist_ok=True)
    report.write(summary, place)
    return summary


def columns_of(summary: Summary, keys: Sequence[str]) -> list[Column]:
    """Columns by their keys, in that order."""
    known = {column.key: column for column in summary.columns}
    return [known[key] for key in keys]


def means(summary: Summary, labels: Mapping[str, str], keys: Sequence[str]) -> list[str]:
    """A table of some columns, a line for each label; labels: label -> method."""
    columns, rows = columns_of(summary, keys), {row.method: row for row in summary.rows}
    lines = [
        [label, *(report.shown(rows[name].values[c.key], c) for c in columns)]
        for label, name in labels.items()
    ]
    return report.table(["", *(c.title for c in columns)], lines)


def differences(
    summary: Summary, ours: str, others: Sequence[str], keys: Sequence[str]
) -> list[str]:
    """A table of `ours` less each other, item by item, with intervals."""
    columns, done = columns_of(summary, keys), summary.evaluation
    drawn = intervals.draws(len(done.items))
    lines = []
    for other in others:
        cells = []
        for column in columns:
            a, b = (report.column_of(done, name, column.key) for name in (ours, other))
            cells.append(report.shown(intervals.difference(a, b, drawn), column, sign=True))
        lines.append([f"{ours} − {other}", *cells])
    return report.table(["", *(c.title for c in columns)], lines)


def sheet(
    summary: Summary, rows: Mapping[str, str], items: int = 8, columns: int = 2
) -> Image.Image:
    """The first items, nothing selected, each a line of the methods `rows` (title -> name; `input`
    is one of them), twice as large."""
    done = summary.evaluation
    side = open_image(pictures.path_of(done.folder, "input", done.items[0].id)).width
    shown = done.items[:items]
    width, height = len(rows) * (side + GAP) + 3 * GAP, -(-len(shown) // columns) * (side + GAP)
    canvas = Image.new("RGB", (2 * columns * width, 2 * (height + HEAD)), "white")
    pen = ImageDraw.Draw(canvas)
    for k, (title, name) in enumerate(rows.items()):
        for group in range(columns):
            pen.text((2 * (group * width + k * (side + GAP)) + 2, 4), title, fill="black")
        for i, item in enumerate(shown):
            path = pictures.path_of(done.folder, name, item.id)
            if path.is_file():
                tile = open_image(path).resize((2 * side, 2 * side), Image.Resampling.NEAREST)
                x, y = i % columns * width + k * (side + GAP), HEAD + i // columns * (side + GAP)
                canvas.paste(tile, (2 * x, 2 * y))
    return canvas
