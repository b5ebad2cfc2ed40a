"""Section of the results page: what the parts of Paint by Example and of MimicBrush are for.

Each row is a miniature that is trained as the first of its table but for one part; running this
file trains those that are not there (`make ablations`, resumable), the section measures those that
are. They are trained for a few hundred steps: a difference says in which direction a part acts,
where its interval leaves zero out.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import comparison
import torch
from exemplar_batches import Bench
from PIL import Image
from torch import Tensor

import inlay
from inlay import backbones
from inlay_bench import intervals, report
from inlay_bench.intervals import Interval, Values
from inlay_bench.measures import Column
from inlay_config import config
from inlay_toybox.quality import conditioned
from inlay_toybox.quality.exemplars import ExemplarItem
from inlay_toybox.quality.figures import digest
from inlay_train import exemplar_prompts, recipes, trainer

ENCODED = "encoded.safetensors"
OUT = comparison.ROOT / "outputs" / "train" / "ablations"


@dataclass(frozen=True)
class Row:
    """A miniature. name: of its folder. title: what it is trained without, or otherwise. words:
    over the recipe of its table. rows_of: the row that is trained on the same rows. draw: (items,
    folder) -> pictures `n 3 h w`."""

    name: str
    title: str
    words: tuple[str, ...] = ()
    rows_of: str = ""
    draw: Callable[[list[ExemplarItem], Path], Tensor] | None = None


@dataclass(frozen=True)
class Table:
    """Rows of one recipe, the first as it is. words: over the recipe, for all of them. task,
    measures: what is measured. columns: title -> key."""

    recipe: str
    words: tuple[str, ...]
    rows: tuple[Row, ...]
    task: str
    measures: tuple[str, ...]
    columns: Mapping[str, str]
    draw: Callable[[list[ExemplarItem], Path], Tensor]


def filled(items: list[ExemplarItem], folder: Path, told: bool = False) -> Tensor:
    """What a Paint by Example draws, item by item, since longer prompts are none of the stock
    pipeline's. told: by the object's words, not by the exemplar."""
    pipe, exp, drawn = backbones.load(str(folder)), config.load("exemplar_toybox"), []
    with TemporaryDirectory() as place:
        for i, item in enumerate(items):
            item.exemplar.save(path := Path(place) / f"{i}.png")
            session = inlay.Session(pipe, {"exemplar": {"image": str(path)}})
            if told:
                exemplar_prompts.speak(pipe, item.subject)
            asked = {"image": item.picture, "mask": Image.fromarray(item.region)}
            made = session.run(**asked, steps=exp.steps, guidance=exp.guidance, seed=i)
            drawn.append(made.images["edit"].float().cpu())
    return torch.cat(drawn)


WEAK = ("changes.reference.colour=0.0", "changes.reference.rotate=0.0",
        "changes.reference.scale=[1.0, 1.0]", "changes.reference.project=0.0")  # fmt: skip
TABLES = (
    Table(
        "toybox_paint_by_example",
        ("data.toybox=6000", "train.steps=1200"),
        (
            Row("paint", "Paint by Example"),
            Row("copying", "all of CLIP's tokens, no augmentation",
                ("prompt=tokens", "pairs.still=true")),
            Row("no-prior", "from random weights", ("prior=false",), "paint"),
            Row("words", "the object's words in place of its picture", ("prompt=text",),
                draw=partial(filled, told=True)),
        ),
        "toybox-exemplar",
        ("exemplar-identity", "texture", "region-clip", "copied"),
        {"class": "identity", "class and colour": "likeness", "texture": "texture",
         "CLIP score": "region_clip", "copied": "copied"},
        filled,
    ),
    Table(
        "toybox_mimicbrush",
        ("data.toybox=3000", "data.single=0.3", "data.objects=0.5", "data.silhouettes=0.3",
         "data.zoom=0.6", "train.steps=500"),
        (
            Row("mimic", "MimicBrush, three in ten of single scenes"),
            Row("plain-grids", "holes that do not care what both views show",
                ("masks.matched=0.5",)),
            Row("singles", "single scenes alone", ("data.single=1.0",)),
            Row("weak", "weak augmentation", WEAK),
            Row("clip-alone", "no reference U-Net, CLIP alone", ("mix=0.0",), "mimic",
                partial(conditioned.imitated, reads=False)),
        ),
        "toybox-imitation",
        ("true-region", "true-region-lpips", "exemplar-identity"),
        {"PSNR, dB": "psnr_true", "SSIM": "ssim_true", "LPIPS": "lpips_true", "colour": "colour"},
        conditioned.imitated,
    ),
)  # fmt: skip


def train(table: Table, row: Row) -> None:
    """Train a row's model, from its last checkpoint on."""
    out = OUT / row.name
    if row.rows_of:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(OUT / row.rows_of / ENCODED, out / ENCODED)
    recipe, settings = recipes.load(table.recipe, [*table.words, *row.words])
    print(f"{row.name}: {table.recipe} {' '.join(row.words)}", flush=True)
    trainer.train(recipe(settings), out, resume=True, told=partial(print, flush=True))


def is_trained(row: Row) -> bool:
    return (OUT / row.name / "model").is_dir()


def section(args: Namespace) -> str:
    """What each row that is trained has, and what the recipe as it is has more, item by item."""
    few, lines = max(1, args.items * 3 // 25), list[str]()
    for table in TABLES:
        if is_trained(table.rows[0]):
            lines += [*compared(table, Bench(table.task, few, table.measures)), ""]
    absent = [row.title for table in TABLES for row in table.rows if not is_trained(row)]
    notes = [f"* {few} items."]
    if absent:
        notes.append(f"* Not trained (`make ablations`): {'; '.join(absent)}.")
    return "\n".join([*lines, *notes])


def compared(table: Table, bench: Bench) -> list[str]:
    """A table of means, and of what its first row has more than each other."""
    columns = bench.columns(list(table.columns.values()))
    drawn, lines, first = intervals.draws(len(bench.items)), list[list[str]](), dict[str, Values]()
    for row in filter(is_trained, table.rows):
        numbers = bench.numbers(_pictures(table, row, bench))
        cells = [intervals.interval(numbers[c.key], drawn) for c in columns]
        lines.append([row.title, *map(report.shown, cells, columns)])
        if first:
            gaps = [intervals.difference(first[c.key], numbers[c.key], drawn) for c in columns]
            lines.append(["… the first row has more", *map(_gained, gaps, columns)])
        first = first or numbers
    return report.table(["trained", *table.columns], lines)


def _pictures(table: Table, row: Row, bench: Bench) -> Tensor:
    folder = OUT / row.name / "model"
    draw = partial(row.draw or table.draw, folder=folder)
    return bench.drawn(draw, f"{row.name}-{digest(folder)}")


def _gained(gap: Interval, column: Column) -> str:
    """A difference; one whose interval holds zero says nothing of the direction."""
    told = report.shown(gap, column, sign=True)
    return told if gap.low > 0 or gap.high < 0 else f"{told}, not established"


if __name__ == "__main__":
    for table in TABLES:
        for row in table.rows:
            if not is_trained(row):
                train(table, row)
