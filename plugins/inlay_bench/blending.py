"""Edits inside a mask: the toybox's scenes with a box where an object may be, and what is measured.

The judge is a CLIP that no method is guided by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from inlay_bench.exemplars import region_of, within
from inlay_bench.measures import MARGIN, Column, Evidence, Numbers, grown, measure, number
from inlay_bench.metrics import pixels, seam
from inlay_bench.providers import toybox_exemplar
from inlay_bench.tasks import Item, provider

INSIDE, OUTSIDE = "Inside the mask", "Outside the mask, and across its border"


@provider("toybox-blending")
def toybox_blending(seed: int, repeats: int = 1) -> Iterator[Item]:
    """Unseen scenes with a box where an object may be, and its words. repeats: items of each scene,
    which differ in the run's seed."""
    from inlay_toybox.classes import BY_NAME

    for item in toybox_exemplar(seed):
        name, words = str(item.facts["class"]), item.texts["subject"]
        article = BY_NAME[name].article if words == name else "a"
        texts = {**item.texts, "phrase": f"{article} {words}"}
        for k in range(repeats):
            told = f"{item.id}-{k}" if repeats > 1 else item.id
            yield replace(item, id=told, texts=texts, seed=item.seed * repeats + k)


@measure(
    "inside-object",
    INSIDE,
    Column("inside", "inclusion", "the detector finds an object of the class, at least half of it "
           "inside the mask", mark="found"),
    Column("other", "another", "there is none, but an object of another class", better="lower"),
    networks=("detector",),
)  # fmt: skip
def object_inside(e: Evidence) -> Numbers:
    names = within(e)[0]
    found = e.item.facts["class"] in names
    return {"inside": float(found), "other": float(bool(names) and not found)}


@measure(
    "inside-clip",
    INSIDE,
    Column("clip_inside", "CLIP score", "cosine of the object's words and the picture, grey "
           "outside the mask"),
    networks=("judge",),
)  # fmt: skip
def clip_inside(e: Evidence) -> Numbers:
    judge = e.networks["judge"]
    seen = judge.images(torch.where(region_of(e), e.picture, 0.5))
    return {"clip_inside": float(seen[0] @ judge.texts([e.item.texts["phrase"]])[0])}


@measure(
    "outside-equal",
    OUTSIDE,
    Column("equal", "equal", f"no pixel that is further than {MARGIN} from the mask, where a "
           "feather ends, differs from the input's in any bit", digits=2),
    Column("psnr_beyond", "PSNR, dB", f"of these pixels; {pixels.CEILING:g} = equal", digits=1),
)  # fmt: skip
def outside(e: Evidence) -> Numbers:
    rest = ~grown(region_of(e))[None, None]
    equal = torch.equal(e.source * rest, e.picture * rest)
    return {"equal": float(equal), "psnr_beyond": number(pixels.psnr(e.source, e.picture, rest))}


@measure(
    "seam",
    OUTSIDE,
    Column("seam", "seam", "mean step of the picture across the mask's border, over that of its "
           "surroundings; the row `copy` says what the scenes' own edges make of it",
           better="lower", digits=2),
)  # fmt: skip
def across_the_border(e: Evidence) -> Numbers:
    return {"seam": number(seam.ratio(e.picture, region_of(e)))}
