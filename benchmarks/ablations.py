"""Section of the results page: Add-it without one of its parts, and with other values of two.

On the first items of `toybox-affordance`; every row is a variant of the experiment `addit`.
"""

from __future__ import annotations

from argparse import Namespace

import comparison
import plots
from PIL import Image

from inlay_bench.report import Summary
from inlay_config import config
from inlay_config.images import save

PARTS = {
    "Add-it": "addit",
    "no extended attention": "addit@weighted_attention=null",
    "no structure transfer": "addit@structure_transfer=null",
    "no blending": "addit@latent_blend=null",
    "combine: sum": "addit@weighted_attention.combine=sum",
}
SWEEPS = {
    "gamma": ("weighted_attention.gamma", (1.0, 1.05, 1.15, 1.3, 1.5)),
    "structure step": ("structure_transfer.step", (0.0, 0.07, 0.14, 0.25, 0.4)),
}
SHOWN = ("inclusion", "affordance_all", "psnr", "psnr_strict", "clip_out")
PLOTTED = {"inclusion": "inclusion", "affordance": "affordance_all", "background, dB": "psnr"}


def section(args: Namespace) -> str:
    """A fifth of the items; the plots are written beside the pictures of the task."""
    few, lines = max(1, args.items // 5), []
    sweeps = {title: swept(option, values) for title, (option, values) in SWEEPS.items()}
    rows = {**PARTS, **{name: name for sweep in sweeps.values() for name in sweep.values()}}
    named = list(dict.fromkeys(rows.values()))
    summary = comparison.evaluate("toybox-affordance", named, few, "ablations")
    lines += comparison.means(summary, PARTS, SHOWN)
    others = [name for name in PARTS.values() if name != "addit"]
    lines += ["", "*Add-it less the row without the part*", ""]
    lines += comparison.differences(summary, "addit", others, SHOWN)
    for title, sweep in sweeps.items():
        labels = {f"{title} {value:g}": name for value, name in sweep.items()}
        lines += ["", *comparison.means(summary, labels, SHOWN)]
        save(plot(summary, title, sweep), comparison.OUT / f"sweep-{title.split()[0]}.png")
    return "\n".join([*lines, "", f"* The first {few} items of `toybox-affordance`."])


def swept(option: str, values: tuple[float, ...]) -> dict[float, str]:
    """Value -> variant; the value that `addit` has is `addit` itself."""
    plugin, key = option.split(".")
    own = config.load("addit").plugins[plugin].get(key)
    return {value: "addit" if value == own else f"addit@{option}={value}" for value in values}


def plot(summary: Summary, title: str, sweep: dict[float, str]) -> Image.Image:
    """Three small plots with intervals."""
    rows = {row.method: row for row in summary.rows}
    return plots.panels(
        {
            label: [(x, rows[name].values[key]) for x, name in sweep.items()]
            for label, key in PLOTTED.items()
        },
        title,
    )
