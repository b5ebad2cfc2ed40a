"""`make quality`: how good the toybox's models and Add-it are, over scenes nobody trained on.

Prints tables and writes them into docs/results.md between its markers. The models' figures are
kept in outputs/toybox by their weights, insertions in outputs/quality by the harness (`inlay eval`)
with a report each: what was measured once is not measured again. `quality.py --n 200 --items 200`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import localisers
from PIL import Image

from inlay.cli.run import hush_loading_bars
from inlay_bench import methods, pictures, report, runner, tasks
from inlay_bench.records import OtherIdentity
from inlay_bench.report import Summary
from inlay_bench.terminal import Progress
from inlay_config import config
from inlay_config.images import open_image, save
from inlay_toybox.quality import figures

ROOT = Path(__file__).parents[1]
OUT = ROOT / "outputs" / "quality"
PAGE = ROOT / "docs" / "results.md"
TASKS = {
    "toybox-affordance": ("addit", "addit_paste", "t2i", "twin", "elsewhere"),
    "toybox-additing": ("addit", "t2i"),
}
SHEET = ("input", "t2i", "addit", "addit_paste")


def main() -> None:
    """Measure what is not measured yet, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="scenes of each figure of a model")
    parser.add_argument("--items", type=int, default=200, help="items of the insertion task")
    args = parser.parse_args()
    hush_loading_bars()
    show("models", model_table(args.n))
    for task, rows in TASKS.items():
        drawn = task == "toybox-additing"  # its inputs cost as much as an insertion
        summary = evaluate(task, rows, max(1, args.items // 4) if drawn else args.items)
        show(task, "\n".join(insertion_tables(summary)))
        if task == "toybox-affordance":
            save(sheet(summary), OUT / "insertion.png")
    show("localisers", localisers.table(max(1, args.items // 4)))
    print(f"\nwritten to {PAGE.relative_to(ROOT)}; pictures in {OUT.relative_to(ROOT)}")


def model_table(n: int) -> str:
    """Every figure of every shipped model beside its aim."""
    rows = [
        (f"toybox/{name}" if i == 0 else "", figure.label, figure.value, figure.aim)
        for name in figures.shipped()
        for i, figure in enumerate(figures.figures(name, n, ROOT / figures.KEPT))
    ]
    return "\n".join(report.table(("model", "measured", "value", "aim"), rows))


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


def show(name: str, text: str) -> None:
    """Print a table and put it between `<!-- name -->` and `<!-- /name -->` of the results page."""
    print(f"\n{text}")
    page = PAGE.read_text(encoding="utf-8")
    block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    page = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _: block, page, flags=re.S)
    PAGE.write_text(page, encoding="utf-8")


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


if __name__ == "__main__":
    main()
