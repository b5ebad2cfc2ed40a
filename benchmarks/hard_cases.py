"""Section of the results page: what the papers say Add-it is bad at, as rows.

Hard kinds are the task `toybox-affordance` with other items (`--data kind=terse`).
"""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence

import comparison
import numpy as np
import seeds

from inlay_bench import intervals, measures, pictures, report, tasks
from inlay_bench.report import Summary
from inlay_config.images import open_image
from inlay_toybox.classes import BY_NAME

SHOWN = ("inclusion", "affordance", "affordance_all", "psnr")
KINDS = {
    "": "the usual items, detailed captions",
    "terse": "terse captions: the ground and the new object alone",
    "crowded": "3 objects there already, a caption of 4 that training never had",
    "again": "a second object of the class that is there",
}
COLUMNS = 4  # of a picture, in which objects are counted


def section(args: Namespace) -> str:
    """The main comparison's items in groups, and items of every hard kind."""
    given, drawn = args.items, max(1, args.items // 4)
    parts = [crowds(given), kinds(args.scenes), real_or_drawn(drawn), sides(args.scenes)]
    return "\n".join([*(line for part in parts for line in (*part, "")), *placement(given)])


def crowds(n: int) -> list[str]:
    """The items of the main comparison by how many objects are there already."""
    main = comparison.evaluate("toybox-affordance", ("addit", "twin"), n, "hard-cases")
    there = [len(item.facts["things"]) for item in main.evaluation.items]
    groups = {str(k): [i for i, held in enumerate(there) if held == k] for k in sorted(set(there))}
    lines = [row(main, title, chosen) for title, chosen in groups.items()]
    columns = comparison.columns_of(main, SHOWN)
    return report.table(["objects there already", "items", *(c.title for c in columns)], lines)


def kinds(n: int) -> list[str]:
    """Items of each hard kind beside the usual ones."""
    lines = []
    for kind, title in KINDS.items():
        task = tasks.load("toybox-affordance")
        tasks.adapt(task, [f"kind={kind}"] if kind else [])
        task.name = "-".join(filter(None, ("toybox", kind or "affordance")))
        bench = seeds.Bench(task, n)
        *head, line = seeds.table(bench, {title: "addit"}, SHOWN)
        lines.append(line)
    return [*head, *lines, "", f"* {n} {seeds.NOTE}."]


def row(summary: Summary, title: str, chosen: Sequence[int]) -> list[str]:
    """Means of `addit` over some items."""
    drawn, cells = intervals.draws(len(chosen)), []
    for column in comparison.columns_of(summary, SHOWN):
        values = report.column_of(summary.evaluation, "addit", column.key)[list(chosen)]
        cells.append(report.shown(intervals.interval(values, drawn), column))
    return [title, str(len(chosen)), *cells]


def real_or_drawn(n: int) -> list[str]:
    """The same captions over a picture that is given and one that the model drew itself."""
    keys = ("inclusion", "contact", "clip_direction", "psnr")
    lines = []
    for name, title in (
        ("toybox-affordance", "the picture is given"),
        ("toybox-additing", "the model drew it"),
    ):
        seen = comparison.evaluate(name, ("addit",), n, f"hard-cases-{name}")
        found = next(r for r in seen.rows if r.method == "addit").values
        columns = comparison.columns_of(seen, keys)
        lines.append([title, *(report.shown(found[c.key], c) for c in columns)])
    text = report.table(["source", *(c.title for c in columns)], lines)
    return [*text, "", f"* The first {n} items."]


def sides(n: int) -> list[str]:
    """Left of and right of, in turns."""
    bench = seeds.Bench(tasks.load("toybox-beside"), n)
    text = seeds.table(
        bench, {"“left of”, “right of”": "addit"}, ("inclusion", "affordance", "side")
    )
    return [*text, "", f"* {n} {seeds.NOTE}."]


def placement(n: int) -> list[str]:
    """Entropy of the column of the picture in which a class's objects stand, over scenes."""
    names = ("addit", "twin")
    summary = comparison.evaluate("toybox-affordance", names, n, "hard-cases")
    seen = {name: stands(summary, name) for name in names}
    both = [c for c in BY_NAME if all(len(seen[name].get(c, ())) >= 4 for name in names)]
    values = {name: {c: entropy(seen[name][c]) for c in both} for name in names}
    lines = []
    for habitat in ("land", "water", "sky"):
        here = [c for c in both if BY_NAME[c].habitat == habitat]
        if here:
            shown = (f"{np.mean([values[name][c] for c in here]):.2f}" for name in names)
            lines.append([f"mean of {len(here)} classes, {habitat}", *shown])
    least = sorted(both, key=lambda c: values["addit"][c] - values["twin"][c])[:5]
    lines += [[c, *(f"{values[name][c]:.2f}" for name in names)] for c in least]
    head = [f"entropy of the column, of {np.log2(COLUMNS):g} bits", "addit", "true scenes"]
    return [*report.table(head, lines), "", "* Of single classes the five that fall short most."]


def stands(summary: Summary, method: str) -> dict[str, list[int]]:
    """Class -> columns of the surest new objects' centres."""
    done, networks = summary.evaluation, {"detector": measures.detector()}
    found = defaultdict[str, list[int]](list)
    for item in done.items:
        path = pictures.path_of(done.folder, method, item.id)
        if not path.is_file():
            continue
        seen = measures.evidence(item, item.picture, open_image(path), networks).found.boxes
        if len(seen):
            centre = float(seen[0, [0, 2]].mean()) / item.picture.width
            found[item.facts["class"]].append(min(int(centre * COLUMNS), COLUMNS - 1))
    return found


def entropy(columns: list[int]) -> float:
    """Of the frequencies, in bits."""
    shares = np.bincount(columns, minlength=COLUMNS) / len(columns)
    return float(-sum(p * np.log2(p) for p in shares if p))
