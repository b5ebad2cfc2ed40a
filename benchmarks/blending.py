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
from PIL import Image, ImageDraw

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
MILD, SET, STRONG = (
    ("steps=30", f"plugins.clip_guidance.scale={scale}") for scale in (100, 300, 1000)
)
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


UNWARPED = "plugins.extending_augmentations=null"
PLAIN = Row("algorithm-2", "Algorithm 2, guided by 300", "blended_diffusion", SET)
BARE = Row("unwarped", "… no augmentations", "blended_diffusion", (*SET, UNWARPED))
LATENT = Row("latent", "Blended Latent Diffusion", "blended_latent_diffusion")
ROWS = (
    PLAIN,
    BARE,
    Row("pasted", "… not blended, pasted at the end", "blended_diffusion",
        (*SET, "plugins.latent_blend=null"), 0.5),
    Row("word", "… the prompt asks for a written word", "blended_diffusion", (*SET, WORD), 0.5),
    Row("image", "… led by a picture of the object", "blended_image_guided", SET, 0.5,
        ("clip_guidance.images", "rank.images")),
    Row("mild", "Algorithm 2, guided by 100", "blended_diffusion", MILD),
    Row("mild-unwarped", "… no augmentations", "blended_diffusion", (*MILD, UNWARPED)),
    Row("strong", "Algorithm 2, guided by 1000", "blended_diffusion", STRONG),
    Row("strong-unwarped", "… no augmentations", "blended_diffusion", (*STRONG, UNWARPED)),
    Row("algorithm-1-100", "Algorithm 1, λ = 100", "local_clip_guidance",
        (*SET, "plugins.background_loss.l2=100"), 0.5),
    Row("algorithm-1", "Algorithm 1, λ = 1000", "local_clip_guidance", SET),
    Row("algorithm-1-10000", "Algorithm 1, λ = 10000", "local_clip_guidance",
        (*SET, "plugins.background_loss.l2=10000"), 0.5),
    LATENT,
    Row("optimisation", "a latent, optimised by CLIP", "latent_optimisation", (), 0.5),
    Row("twin", "the true picture", "twin"),
    Row("copy", "the input", "copy"),
)  # fmt: skip
SEEDS, SCENES = 4, 0.03  # runs of each scene for diversity; scenes, of the items
PAIRS = (
    ("mild", "mild-unwarped", "guided by 100: augmentations"),
    ("algorithm-2", "unwarped", "guided by 300: augmentations"),
    ("strong", "strong-unwarped", "guided by 1000: augmentations"),
    ("algorithm-2", "pasted", "blending, beside pasting at the end"),
    ("algorithm-2", "algorithm-1", "Algorithm 2, beside Algorithm 1"),
    ("algorithm-2", "latent", "Algorithm 2, beside Blended Latent Diffusion"),
)
"""Two rows, and what the first has that the second has not."""
SHEET = {
    "Alg. 2": "algorithm-2",
    "by 1000": "strong",
    "no augm.": "strong-unwarped",
    "pasted": "pasted",
    "Alg. 1": "algorithm-1",
    "latent": "latent",
    "true": "twin",
}


def section(args: Namespace) -> str:
    """Every row, what is gained by what, and how much runs of one scene differ."""
    items = args.items * 2 // 5
    done = {row: evaluate(row, max(1, round(items * row.share))) for row in ROWS}
    save(sheet(done), OUT.with_suffix(".png"))
    several = {row: evaluate(row, max(1, round(items * SCENES)), SEEDS)
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
    """What one row is ahead of another by, item by item."""
    columns, named = columns_of(done), {row.name: evaluation for row, evaluation in done.items()}
    lines = []
    for ours, theirs, label in PAIRS:
        both = named[ours], named[theirs]
        n = min(len(evaluation.items) for evaluation in both)
        drawn, cells = intervals.draws(n), []
        for column in columns:
            a, b = (values(evaluation, column.key)[:n] for evaluation in both)
            cells.append(report.shown(intervals.difference(a, b, drawn), column, True))
        lines.append((label, str(n), *cells))
    return report.table(("gained by", "items", *(c.title for c in columns)), lines)


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


def sheet(done: dict[Row, Evaluation], items: int = 6, columns: int = 2) -> Image.Image:
    """The first items, nothing selected, each a line of the input and `SHEET`, twice as large."""
    named = {row.name: evaluation for row, evaluation in done.items()}
    folders = {title: (named[name].folder, name) for title, name in SHEET.items()}
    folders = {"input": (done[PLAIN].folder, "input"), **folders}
    shown = done[PLAIN].items[:items]
    side = shown[0].truth["region"].shape[0] + comparison.GAP
    width = len(folders) * side + 3 * comparison.GAP
    height = -(-len(shown) // columns) * side + comparison.HEAD
    canvas = Image.new("RGB", (2 * columns * width, 2 * height), "white")
    pen = ImageDraw.Draw(canvas)
    for k, (title, (folder, name)) in enumerate(folders.items()):
        for i, item in enumerate(shown):
            x, y = i % columns * width + k * side, comparison.HEAD + i // columns * side
            pen.text((2 * x + 2, 4), title, fill="black")
            path = pictures.path_of(folder, name, item.id)
            if path.is_file():
                tile = open_image(path)
                tile = tile.resize((2 * tile.width, 2 * tile.height), Image.Resampling.NEAREST)
                canvas.paste(tile, (2 * x, 2 * y))
    return canvas
