"""Section of the results page: Add-it without one of its parts, and with other values of two.

Every row is a variant of the experiment `addit`, on the first items of `toybox-affordance`.
"""

from __future__ import annotations

from argparse import Namespace

import comparison
import plots
import seeds
from PIL import Image

from inlay_bench import intervals, tasks
from inlay_config import config
from inlay_config.images import save

PARTS = {
    "no extended attention": "addit@weighted_attention=null",
    "no structure transfer": "addit@structure_transfer=null",
    "no blending": "addit@latent_blend=null",
    "combine: sum": "addit@weighted_attention.combine=sum",
}
SWEEPS = {
    "gamma": ("weighted_attention.gamma", (1.0, 1.05, 1.15, 1.3, 1.5)),
    "structure step": ("structure_transfer.step", (0.0, 0.07, 0.14, 0.25, 0.4)),
}
SHOWN = ("inclusion", "affordance", "affordance_all", "contact", "psnr")
PLOTTED = {"inclusion": "inclusion", "affordance": "affordance_all", "background, dB": "psnr"}


def section(args: Namespace) -> str:
    """Tables; the plots are written where the pictures are."""
    bench = seeds.Bench(tasks.load("toybox-affordance"), args.scenes)
    lines = seeds.table(bench, {"Add-it": "addit", **PARTS}, SHOWN)
    lines += ["", "*Add-it less the row without the part*", ""]
    lines += seeds.differences(bench, "addit", PARTS, SHOWN)
    for title, (option, values) in SWEEPS.items():
        sweep = swept(option, values)
        rows = {f"{title} {value:g}": said for value, said in sweep.items()}
        lines += ["", *seeds.table(bench, rows, SHOWN)]
        save(plot(bench, title, sweep), comparison.OUT / f"sweep-{title.split()[0]}.png")
    return "\n".join([*lines, "", f"* {len(bench.items)} {seeds.NOTE}."])


def swept(option: str, values: tuple[float, ...]) -> dict[float, str]:
    """Value -> variant; the value that `addit` has is `addit` itself."""
    plugin, key = option.split(".")
    own = config.load("addit").plugins[plugin].get(key)
    return {value: "addit" if value == own else f"addit@{option}={value}" for value in values}


def plot(bench: seeds.Bench, title: str, sweep: dict[float, str]) -> Image.Image:
    """Three small plots with intervals."""
    drawn = intervals.draws(len(bench.items))
    rows = {value: bench.row(said) for value, said in sweep.items()}
    curves = {
        label: [(value, intervals.interval(row[key], drawn)) for value, row in rows.items()]
        for label, key in PLOTTED.items()
    }
    return plots.panels(curves, title)
