"""Sections of the results page: a hole is filled with what an exemplar shows.

One table of every method that can, one of regions that have a single right answer, by their kind.
How alike is a matter of guidance: Paint by Example sweeps it, and draws the same tasks with
several seeds, to see how much its pictures differ while they show the same object.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import comparison
import numpy as np
import plots
import torch
from exemplar_batches import Bench, shown
from PIL import Image
from torch import Tensor

from inlay_bench import intervals, methods, report, tasks
from inlay_bench.intervals import Interval, Values
from inlay_bench.measures import Column
from inlay_bench.metrics import pixels
from inlay_bench.pictures import path_of
from inlay_config.images import open_image, save, to_pil, to_tensor
from inlay_toybox import path
from inlay_toybox.quality import conditioned
from inlay_toybox.quality.figures import digest

PAINT, MIMIC = "Paint by Example", "MimicBrush"
TRUE, INPUT = "the true picture", "the input"
GUIDED = "@steps=30@clip_guidance.scale=300"  # as the page's section on blending has it
IMAGE = f"blended_image_guided{GUIDED}"
PASTED = {
    "paste, colours moved (for DCCF)": "paste_colour",
    "paste, Poisson": "paste_poisson",
    "paste": "paste",
    TRUE: "twin",
}
UNTRAINED = {
    "Blended Diffusion (image)": IMAGE,
    "exemplar attention, untrained": "exemplar_attention",
}
BY_WORDS = {
    "Blended Diffusion (text)": f"blended_diffusion{GUIDED}",
    "inpainting (text)": "blended/inpaint",
}
BESIDE = ((MIMIC, PAINT), *((PAINT, other) for other in (*UNTRAINED, *PASTED, *BY_WORDS)))
MEASURED = ("exemplar-identity", "texture", "region-clip", "copied", "around-object")
IDENTITY = ("identity", "colour", "likeness", "texture", "region_clip", "copied", "psnr_around")
TRUTH = ("likeness", "texture", "psnr_true", "ssim_true", "lpips_true")
RIGHT = ("exemplar-identity", "texture", "true-region", "true-region-lpips")
PICTURES = comparison.ROOT / "docs" / "pictures"
SHOWN = 8  # items of the sheet

SCALES, SEEDS = (1.0, 2.0, 5.0, 8.0), 4
SWEPT = {"likeness": "class and colour", "region_clip": "CLIP score"}

Rows = dict[str, dict[str, Values]]
"""Label -> column -> a number per item."""


def trained(bench: Bench, n: int) -> dict[str, Tensor]:
    """What both models draw as they ship, by label, `n 3 h w`."""
    name = f"mimicbrush-{bench.name}-{digest(path('mimicbrush'))}"
    return {PAINT: painted(bench, 5.0, 0, n), MIMIC: bench.drawn(conditioned.imitated, name, n)}


def painted(bench: Bench, scale: float, seed: int, n: int) -> Tensor:
    """Pictures of the first n items by Paint by Example."""
    name = f"paint-by-example-{bench.name}-{digest(path('paint-by-example'))}-{scale:g}-{seed}"
    return bench.drawn(partial(conditioned.painted, guidance=scale, seed=seed), name, n)


def filling(args: Namespace) -> str:
    """The models beside pasting the object, which knows its outline in the exemplar, and beside
    methods without training."""
    few = max(4, args.items * 2 // 5)
    task = replace(tasks.load("toybox-exemplar"), sets=[])
    told = replace(task, name=f"{task.name}-by-words", given={"mask": ["mask"]},
                   run_with={"clip_guidance": {"prompt.edit": "subject"}})  # fmt: skip
    bench = Bench(task.name, few, MEASURED)
    drawn = trained(bench, few)
    rows = {label: bench.numbers(pictures) for label, pictures in drawn.items()}
    for asked, group in ((task, UNTRAINED | PASTED), (told, BY_WORDS)):
        done = comparison.evaluate(asked, list(group.values()), few).evaluation
        for label, said in group.items():
            name = methods.name_of(said)
            rows[label] = {key: report.column_of(done, name, key) for key in IDENTITY}
            if said in (IMAGE, "paste"):
                drawn[label] = _read([path_of(done.folder, name, item.id) for item in done.items])
    sheet(bench, drawn).save(PICTURES / "exemplars" / "all.webp", quality=70)
    columns = bench.columns(IDENTITY)
    return "\n".join([*means(rows, columns), "", *differences(rows, BESIDE, columns)])


def means(rows: Rows, columns: Sequence[Column]) -> list[str]:
    """A line for each label."""
    lines = []
    for label, values in rows.items():
        n = len(values[columns[0].key])
        cells = [intervals.interval(values[c.key], intervals.draws(n)) for c in columns]
        lines.append([label, str(n), *map(report.shown, cells, columns)])
    return report.table(["", "items", *(column.title for column in columns)], lines)


def differences(
    rows: Rows, pairs: Sequence[tuple[str, str]], columns: Sequence[Column]
) -> list[str]:
    """What one row is ahead of another by, on the items that both have."""
    lines = []
    for one, other in pairs:
        both = rows[one], rows[other]
        n = min(len(values[columns[0].key]) for values in both)
        drawn, cells = intervals.draws(n), []
        for column in columns:
            gap = intervals.difference(*(values[column.key][:n] for values in both), drawn)
            cells.append(report.shown(gap, column, sign=True))
        lines.append([f"{one} − {other}", str(n), *cells])
    return report.table(["item by item", "items", *(column.title for column in columns)], lines)


def sheet(bench: Bench, drawn: Mapping[str, Tensor]) -> Image.Image:
    """The first items, nothing selected, two a line: the hole, the exemplar, `drawn`, the truth."""
    rows = []
    for i, item in enumerate(bench.items[:SHOWN]):
        hole = np.where(item.region[..., None], 128, np.array(item.picture)).astype(np.uint8)
        shown = item.exemplar.resize(item.picture.size, Image.Resampling.BICUBIC)
        made = [np.array(to_pil(pictures[i, None])[0]) for pictures in drawn.values()]
        rows.append(np.concatenate([hole, np.array(shown), *made, item.truth], 1))
    pairs = [np.concatenate(rows[i : i + 2], 1) for i in range(0, len(rows), 2)]
    tiles = Image.fromarray(np.concatenate(pairs))
    return tiles.resize((2 * tiles.width, 2 * tiles.height), Image.Resampling.NEAREST)


def _read(files: Sequence[Path]) -> Tensor:
    return torch.cat([to_tensor(open_image(file)) for file in files[:SHOWN]])


def imitating(args: Namespace) -> str:
    """Half an object, or its colour, by a reference: against the one right picture."""
    few = max(4, args.items // 5)
    bench = Bench("toybox-imitation", few, RIGHT)
    inputs, truth = (
        torch.from_numpy(np.stack([np.array(part) for part in parts])).permute(0, 3, 1, 2) / 255
        for parts in ([i.picture for i in bench.items], [i.truth for i in bench.items])
    )
    drawn = {**trained(bench, few), INPUT: inputs, TRUE: truth}
    numbers = {label: bench.numbers(pictures) for label, pictures in drawn.items()}
    columns, lines = bench.columns(TRUTH), []
    for kind in ("part", "texture"):
        chosen = [item.kind == kind for item in bench.items]
        rows = {f"{kind}: {label}": {key: found[chosen] for key, found in values.items()}
                for label, values in numbers.items()}  # fmt: skip
        gaps = differences(rows, [(f"{kind}: {MIMIC}", f"{kind}: {PAINT}")], columns)
        lines += [*means(rows, columns), "", *gaps, ""]
    return "\n".join(lines).rstrip()


def guidance(args: Namespace) -> str:
    """Likeness over the guidance scale, what is gained item by item, and what several seeds differ
    in at each while they show the exemplar's class."""
    n = max(4, args.items // 5)
    bench = Bench("toybox-exemplar", n, ("exemplar-identity", "region-clip"))
    several = max(1, n // 5)
    numbers, spread = dict[float, dict[str, Values]](), dict[float, tuple[Interval, int]]()
    for scale in SCALES:
        seeds = [painted(bench, scale, seed, several if seed else n) for seed in range(SEEDS)]
        numbers[scale] = bench.numbers(seeds[0])
        spread[scale] = diversity(bench, [drawn[:several] for drawn in seeds])
    drawn, least = intervals.draws(n), numbers[SCALES[0]]
    curves = {
        title: [(s, intervals.interval(numbers[s][key], drawn)) for s in SCALES]
        for key, title in SWEPT.items()
    }
    curves["1 - SSIM of seeds"] = [(s, value) for s, (value, _) in spread.items() if value.n]
    plot = plots.panels(curves, "guidance scale").quantize(32)
    save(plot, PICTURES / "exemplar-guidance.png")
    lines = []
    for i, scale in enumerate(SCALES):
        cells = [f"{scale:g}"]
        for key, title in SWEPT.items():
            gained = intervals.difference(numbers[scale][key], least[key], drawn)
            cells += [shown(curves[title][i][1]), shown(gained, sign=True) if i else ""]
        kept = f"{spread[scale][1]} of {several}"
        lines.append([*cells, shown(spread[scale][0]), kept])
    head = [word for title in SWEPT.values() for word in (title, "more than at 1")]
    table = report.table(["guidance", *head, "1 − SSIM of seeds", "class in every seed"], lines)
    note = f"* {n} items; {SEEDS} seeds of each of the first {several}: pairs of pictures that both"
    return "\n".join([*table, "", f"{note} show the exemplar's class, in the hole."])


def diversity(bench: Bench, seeds: Sequence[Tensor]) -> tuple[Interval, int]:
    """1 - SSIM in the hole of two pictures that differ in their seed alone and both show the
    exemplar's class there; and of how many items every picture shows it."""
    items = bench.items[: len(seeds[0])]
    right = [
        [item.name in names for item, names in zip(items, found, strict=True)]
        for found in (conditioned.inside(items, pictures) for pictures in seeds)
    ]
    apart = np.full(len(items), np.nan)
    for i, item in enumerate(items):
        hole = torch.from_numpy(item.region)[None, None]
        showing = [drawn[i, None] for drawn, shows in zip(seeds, right, strict=True) if shows[i]]
        if pairs := [1 - float(pixels.ssim(a, b, hole)) for a, b in combinations(showing, 2)]:
            apart[i] = np.mean(pairs)
    kept = sum(all(shows) for shows in zip(*right, strict=True))
    return intervals.interval(apart, intervals.draws(len(items))), kept
