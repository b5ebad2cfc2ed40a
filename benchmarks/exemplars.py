"""Sections of the results page: a hole is filled with what an exemplar shows.

How alike is a matter of guidance: Paint by Example sweeps it, and draws the same tasks with
several seeds, to see how much its pictures differ while they show the same object.
"""

from __future__ import annotations

from argparse import Namespace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import comparison
import numpy as np
import plots
import torch
from PIL import Image
from torch import Tensor

import inlay
from inlay_bench import intervals, report
from inlay_bench.intervals import Interval
from inlay_bench.metrics import pixels
from inlay_config import config
from inlay_config.images import save
from inlay_toybox.detector import Detector
from inlay_toybox.quality.exemplars import ExemplarItem, exemplar_items
from inlay_toybox.quality.shares import THRESHOLD

PAINT = "exemplar_toybox"
SCALES = (1.0, 2.0, 3.0, 5.0, 8.0)
SEEDS = 4
FILLING = (PAINT, "paste_colour", "paste_poisson", "paste", "twin")
IDENTITY = ("identity", "colour", "likeness", "region_clip", "copied", "psnr_around")
SHEET = {"input": "input", "Paint by Example": PAINT, "paste": "paste"}


def filling(args: Namespace) -> str:
    """The model beside pasting the object, which knows its outline in the exemplar."""
    few = max(1, args.items // 2)
    summary = comparison.evaluate("toybox-exemplar", FILLING, few)
    save(comparison.sheet(summary, SHEET), comparison.OUT / "exemplars.png")
    lines = comparison.means(summary, {name: name for name in FILLING}, IDENTITY)
    return "\n".join([*lines, "", f"* {few} items."])


def guidance(args: Namespace) -> str:
    """Likeness over the guidance scale, and what several seeds differ in at each."""
    few = max(1, args.items // 5)
    rows = [f"{PAINT}@guidance={scale:g}" for scale in SCALES]
    summary = comparison.evaluate("toybox-exemplar", rows, few, "exemplar-guidance")
    spread = [diversity(scale, max(1, few // 5)) for scale in SCALES]
    measured = {row.method: row.values for row in summary.rows}
    curves = {
        title: [(scale, measured[row][key]) for scale, row in zip(SCALES, rows, strict=True)]
        for title, key in (("class and colour", "likeness"), ("CLIP score", "region_clip"))
    }
    curves["1 - SSIM of seeds"] = [(s, d) for s, (d, _) in zip(SCALES, spread, strict=True)]
    plot = plots.panels(curves, "guidance scale").quantize(32)
    save(plot, comparison.ROOT / "docs" / "pictures" / "exemplar-guidance.png")
    table = [
        [f"{scale:g}", *(_shown(points[i][1]) for points in curves.values()), f"{spread[i][1]:.2f}"]
        for i, scale in enumerate(SCALES)
    ]
    lines = report.table(["guidance", *curves, "class kept by all seeds"], table)
    note = f"* {few} items; seeds: {SEEDS} of each of the first {max(1, few // 5)}."
    return "\n".join([*lines, "", note])


def diversity(scale: float, n: int) -> tuple[Interval, float]:
    """1 - SSIM in the hole of pictures that differ in their seed alone, and the share of tasks of
    which every picture shows the exemplar's class there."""
    exp, detector = config.load(PAINT), Detector.from_pretrained()
    values, kept = [], []
    with TemporaryDirectory() as folder:
        for item in exemplar_items(n):
            item.exemplar.save(shown := Path(folder) / "exemplar.png")
            session = inlay.Session(exp.model, {"exemplar": {"image": str(shown)}})
            asked = {"image": item.picture, "steps": exp.steps}
            asked["mask"] = Image.fromarray(item.region)
            drawn = session.run(n=SEEDS, guidance=scale, seed=1, **asked).images["edit"]
            hole = torch.from_numpy(item.region)[None, None]
            pairs = combinations(drawn.split(1), 2)
            values.append(1 - np.mean([float(pixels.ssim(a, b, hole)) for a, b in pairs]))
            kept.append(_all_show(drawn, item, detector))
    return intervals.interval(np.array(values), intervals.draws(n)), float(np.mean(kept))


def _all_show(drawn: Tensor, item: ExemplarItem, detector: Detector) -> bool:
    for seen in detector.detect(drawn, THRESHOLD):
        inside = [
            name
            for name, mask in zip(seen.classes, seen.masks.numpy(), strict=True)
            if 2 * (mask & item.region).sum() >= mask.sum() > 0
        ]
        if item.name not in inside:
            return False
    return True


def _shown(value: Interval) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"
