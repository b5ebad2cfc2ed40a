"""How well each localiser masks what Add-it inserts, with the toybox's models.

One run per item without blending, so that no mask changes the picture; the masks are those of the
middle of the run, the object is the one that the toybox's detector finds in the finished picture.
"""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict

import numpy as np
import torch

import inlay
from inlay_bench import intervals, report
from inlay_config import config
from inlay_plugins import masks
from inlay_toybox.detector import Detector
from inlay_toybox.quality.insertion import InsertionItem, insertion_items
from inlay_toybox.quality.shares import THRESHOLD

SAM2 = {"segmenter": "toybox/sam2"}
ROWS = {
    "attention": {"localiser": "attention"},
    "difference": {"localiser": "difference"},
    "box": {"localiser": "box", **SAM2},
    "points": {"localiser": "points", **SAM2},
    "points, map: difference": {"localiser": "points", "map": "difference", **SAM2},
    "mask": {"localiser": "mask", **SAM2},
    "mask, map: difference": {"localiser": "mask", "map": "difference", **SAM2},
}


def section(args: Namespace) -> str:
    """A tenth of the items: what the seven masks of one run cost is the run."""
    return table(max(1, args.items // 10))


def table(n: int = 50) -> str:
    """Overlap of each localiser's mask with the object, over items with an object."""
    found, tried = defaultdict[str, list[float]](list), list(insertion_items(n, seed=3))
    detector, experiment = Detector.from_pretrained(), config.load("addit")
    plugins = {k: v for k, v in experiment.plugins.items() if "mask" not in k and "blend" not in k}
    options = {"guidance": experiment.guidance, "true_cfg": experiment.true_cfg}
    finders = {
        f"find_{i}": {"use": "subject_mask", "key": str(i), **row}
        for i, row in enumerate(ROWS.values())
    }
    session = inlay.Session("toybox/flux", plugins | finders)
    for seed, item in enumerate(tried):
        for name in finders:
            session.plugins[name].cfg.subject = item.subject
        prompt = {"source": item.source_caption, "edit": item.target_caption}
        result = session.run(prompt, item.picture, seed=seed, steps=experiment.steps, **options)
        body = inserted(detector, result.images["edit"], item)
        for i, row in enumerate(ROWS if body is not None else ()):
            seen = masks.resize_bilinear(result.board[f"mask:{i}"], body.shape)[0, 0] >= 0.5
            found[row].append(float((seen & body).sum() / (seen | body).sum()))
    with_object = len(found["attention"])
    drawn = intervals.draws(with_object)
    lines = []
    for row, overlaps in found.items():
        values = np.array(overlaps)
        mean = intervals.interval(values, drawn)
        shown = f"{mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]"
        lines.append((row, shown, f"{np.median(values):.3f}", f"{(values >= 0.5).mean():.2f}"))
    head = ("localiser", "mean overlap (IoU)", "median", "at least a half")
    note = f"* {n} items, in {with_object} of which the detector finds the object."
    return "\n".join([*report.table(head, lines), "", note])


def inserted(detector: Detector, picture: torch.Tensor, item: InsertionItem) -> torch.Tensor | None:
    """The pixels bool `h w` of the surest object of the item's class; None where there is none."""
    seen = detector.detect(picture, THRESHOLD)[0]
    mine = [mask for mask, name in zip(seen.masks, seen.classes, strict=True) if name == item.name]
    return mine[0] if mine else None
