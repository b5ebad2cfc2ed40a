"""Section of the results page: edits inside a mask, by the task `toybox-blending` of `inlay eval`.

Rows differ in options, in what they are given and in how many items they are worth, so each has a
folder of its own under outputs/quality/blending: what was measured once is not measured again.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from itertools import combinations

import comparison
import numpy as np
import torch
from PIL import Image

from inlay_bench import intervals, methods, networks, pictures, report, runner, tasks
from inlay_bench.measures import Column
from inlay_bench.methods import Edit, Method
from inlay_bench.metrics import perceptual
from inlay_bench.records import OtherIdentity
from inlay_bench.runner import Evaluation
from inlay_bench.tasks import Item, Task
from inlay_bench.terminal import Progress
from inlay_config.images import open_image, save, to_tensor

OUT = comparison.OUT / "blending"
STEPS = "steps=30"  # of 60 that the experiments in pixels ship with, for half the time
WORD = 'plugins.clip_guidance.prompts="${prompt.edit} with the word bus"'


@dataclass(frozen=True)
class Row:
    """A line of the table. name: of its folder. title: in the table. method: an experiment, `copy`
    or `twin`. overrides: over the experiment. share: of the items. given: see Task."""

    name: str
    title: str
    method: str
    overrides: tuple[str, ...] = ()
    share: float = 1.0
    given: tuple[str, ...] = ()


PLAIN = Row("algorithm-2", "Algorithm 2", "blended_diffusion", (STEPS,))
BARE = Row("no-augmentations", "… without augmentations", "blended_diffusion",
           (STEPS, "plugins.extending_augmentations=null"))  # fmt: skip
LATENT = Row("latent", "Blended Latent Diffusion", "blended_latent_diffusion")
ROWS = (
    PLAIN,
    BARE,
    Row("pasted", "… not blended, pasted at the end", "blended_diffusion",
        (STEPS, "plugins.latent_blend=null"), 0.25),
    Row("word", "… the prompt asks for a written word", "blended_diffusion", (STEPS, WORD), 0.25),
    Row("image", "… led by a picture of the object", "blended_image_guided", (STEPS,), 0.25,
        ("clip_guidance.images", "rank.images")),
    Row("algorithm-1-100", "Algorithm 1, λ = 100", "local_clip_guidance",
        (STEPS, "plugins.background_loss.l2=100"), 0.25),
    Row("algorithm-1", "Algorithm 1, λ = 1000", "local_clip_guidance", (STEPS,)),
    Row("algorithm-1-10000", "Algorithm 1, λ = 10000", "local_clip_guidance",
        (STEPS, "plugins.background_loss.l2=10000"), 0.25),
    LATENT,
    Row("optimisation", "a latent, optimised by CLIP", "latent_optimisation", (), 0.25),
    Row("twin", "the true picture", "twin"),
    Row("copy", "the input", "copy"),
)  # fmt: skip
SEEDS, SCENES = 4, 0.075  # runs of each scene for diversity; scenes, of the items
OTHERS = ("no-augmentations", "pasted", "algorithm-1", "latent")
SHEET = ("algorithm-2", "no-augmentations", "algorithm-1", "pasted", "latent", "twin")


def section(args: Namespace) -> str:
    """Every row, its differences to Algorithm 2, and how much runs of one scene differ."""
    done = {row: evaluate(row, max(1, round(args.items * row.share))) for row in ROWS}
    save(sheet(done), OUT.with_suffix(".png"))
    several = {row: evaluate(row, max(1, round(args.items * SCENES)), SEEDS)
               for row in (PLAIN, BARE, LATENT)}  # fmt: skip
    said = report.notes(report.summarise(done[PLAIN]))
    return "\n".join([*means(done), "", *comparisons(done), "", *diversities(several), "",
                      *(f"* {note}" for note in said)])  # fmt: skip


def evaluate(row: Row, n: int, repeats: int = 1) -> Evaluation:
    """A row's records over n scenes, `repeats` runs of each."""
    task = tasks.load("toybox-blending")
    if row.given:
        task = replace(task, given={**task.given, "exemplar": list(row.given)})
    if repeats > 1:
        task = replace(task, data=replace(task.data, options={"repeats": repeats}))
    out = OUT / (row.name if repeats == 1 else f"{row.name}-seeds")
    with Progress(quiet=False) as progress:
        given = {"n": n * repeats, "callback": progress.update}
        try:
            return runner.evaluate(task, [method_of(row, task)], out, **given)
        except OtherIdentity as changed:
            print(changed)
            return runner.evaluate(task, [method_of(row, task)], out, remeasure=True, **given)


def method_of(row: Row, task: Task) -> Method:
    """What draws a row's pictures."""
    if row.method in ("copy", "twin"):
        return {m.name: m for m in methods.build(["twin"], task)}[row.method]
    method = Edit(row.method, task, row.overrides, methods.Pipelines())
    method.name = row.name
    return method


def means(done: dict[Row, Evaluation]) -> list[str]:
    """The table of all rows."""
    columns = columns_of(done)
    lines = []
    for row, evaluation in done.items():
        drawn = intervals.draws(len(evaluation.items))
        found = [intervals.interval(values(evaluation, c.key), drawn) for c in columns]
        cells = [report.shown(value, c) for value, c in zip(found, columns, strict=True)]
        lines.append((row.title, str(len(evaluation.items)), *cells))
    return report.table(("", "items", *(c.title for c in columns)), lines)


def comparisons(done: dict[Row, Evaluation]) -> list[str]:
    """What Algorithm 2 is ahead by, item by item."""
    columns, rows = columns_of(done), [r for r in done if r.name in OTHERS]
    lines = []
    for row in rows:
        n = min(len(done[row].items), len(done[PLAIN].items))
        drawn, cells = intervals.draws(n), []
        for column in columns:
            ours, theirs = (values(done[r], column.key)[:n] for r in (PLAIN, row))
            cells.append(report.shown(intervals.difference(ours, theirs, drawn), column, True))
        lines.append((row.title.removeprefix("… "), str(n), *cells))
    head = ("Algorithm 2 less", "items", *(c.title for c in columns))
    return report.table(head, lines)


def diversities(several: dict[Row, Evaluation]) -> list[str]:
    """How far runs of one scene are apart, among pictures that have the object."""
    network, lines = networks.lpips(), []
    for row, evaluation in several.items():
        right = evaluation.records[evaluation.methods[0]]
        scenes: dict[str, list[Item]] = {}
        for item in evaluation.items:
            if right[item.id].get("numbers", {}).get("inside"):
                scenes.setdefault(item.id.partition("-")[0], []).append(item)
        pairs = [pair for items in scenes.values() for pair in combinations(items, 2)]
        apart = [distance(evaluation, network, *pair) for pair in pairs]
        shown = f"{np.mean(apart):.3f}" if apart else "–"
        count = sum(map(len, scenes.values()))
        total = len(evaluation.items)
        lines.append((row.title.removeprefix("… "), f"{count} of {total}", str(len(pairs)), shown))
    head = ("runs of one scene", "with the object", "pairs", "LPIPS inside the mask")
    return report.table(head, lines)


def distance(evaluation: Evaluation, network: networks.Distance, one: Item, other: Item) -> float:
    """LPIPS of two runs inside the mask, 0 = equal."""
    name, mask = evaluation.methods[0], one.truth["region"]
    first, second = (
        to_tensor(open_image(pictures.path_of(evaluation.folder, name, item.id)))
        for item in (one, other)
    )
    where = torch.from_numpy(mask)[None, None]
    return float(perceptual.lpips(network, first, second, where))


def columns_of(done: dict[Row, Evaluation]) -> list[Column]:
    return [column for measure in done[PLAIN].measures.values() for column in measure.columns]


def values(evaluation: Evaluation, key: str) -> intervals.Values:
    """A number of every item of the only method."""
    return report.column_of(evaluation, evaluation.methods[0], key)


def sheet(done: dict[Row, Evaluation], items: int = 12, columns: int = 2) -> Image.Image:
    """The first items, each a line: the input, then `SHEET`; the mask's border is drawn nowhere."""
    rows = [(row, evaluation) for name in SHEET for row, evaluation in done.items()
            if row.name == name]  # fmt: skip
    lines = []
    for item in done[PLAIN].items[:items]:
        line = [item.picture]
        for _, evaluation in rows:
            path = pictures.path_of(evaluation.folder, evaluation.methods[0], item.id)
            line.append(open_image(path) if path.is_file() else None)
        lines.append(line)
    side = lines[0][0].width
    width, height = len(lines[0]) * (side + 2) + 6, -(-len(lines) // columns) * (side + 4)
    canvas = Image.new("RGB", (columns * width, height), "white")
    for i, line in enumerate(lines):
        for k, tile in enumerate(line):
            if tile is not None:
                canvas.paste(
                    tile, (i % columns * width + k * (side + 2), i // columns * (side + 4))
                )
    return canvas.resize((canvas.width * 2, canvas.height * 2), Image.Resampling.NEAREST)
