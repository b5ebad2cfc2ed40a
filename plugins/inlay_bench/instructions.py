"""Measures of edits by instruction: was it carried out, and how much else changed."""

from __future__ import annotations

import numpy as np

from inlay_bench.measures import MEANING, THRESHOLD, Column, Evidence, Numbers, measure, number
from inlay_bench.metrics import clip, pixels
from inlay_config.images import to_pil, to_tensor

DONE = "The instruction"
KINDS = ("add", "remove", "replace", "recolour", "light")


@measure(
    "carried-out",
    DONE,
    Column("carried_out", "carried out", "the detector finds what the instruction adds, in its "
           "colour, and not what it removes; light: the picture is nearer to the true one than the "
           "input is", mark="done"),
    *(Column(f"carried_out_{kind}", kind, "likewise, of instructions of this kind")
      for kind in KINDS),
    networks=("detector",),
)  # fmt: skip
def carried_out(e: Evidence) -> Numbers:
    kind = e.item.facts["kind"]
    done = float(_nearer(e) if kind == "light" else _seen(e))
    return {"carried_out": done} | {f"carried_out_{k}": done if k == kind else None for k in KINDS}


def _nearer(e: Evidence) -> bool:
    from PIL import Image

    true = to_tensor(Image.fromarray(e.item.truth["target"]))
    return bool(pixels.l2(true, e.picture) < pixels.l2(true, e.source))


def _seen(e: Evidence) -> bool:
    """Whether what was added is there, in its colour, and what was removed is not."""
    from inlay_toybox.classes import BY_NAME
    from inlay_toybox.quality.exemplars import right_colour

    found = e.networks["detector"].detect(e.picture, THRESHOLD)[0]
    if set(found.classes) & set(e.item.facts["removed"]):
        return False
    image = np.asarray(to_pil(e.picture)[0])
    for name, colour in e.item.facts["added"]:
        if name not in found.classes:
            return False
        body = found.masks[found.classes.index(name)].numpy()
        if BY_NAME[name].colours and not right_colour(image, body, name, colour):
            return False
    return True


@measure(
    "ip2p",
    MEANING,
    Column("direction_fixed", "direction", "cosine of the pictures' and the captions' change"),
    Column("image_fixed", "image", "cosine of the pictures before and after"),
    Column("direction_coded", "direction, as coded", "likewise, with the released evaluation's "
           "slip: pictures in -1..1 where CLIP expects 0..1; to compare with its figures alone"),
    Column("image_coded", "image, as coded", "likewise"),
    networks=("judge",),
)  # fmt: skip
def tradeoff(e: Evidence) -> Numbers:
    """The two axes of InstructPix2Pix's figures (Brooks et al., 2023), as meant and as coded."""
    judge, numbers = e.networks["judge"], dict[str, float | None]()
    before, after = [e.item.texts["source"]], [e.item.texts["target"]]
    for name, prepare in (("fixed", clip.published), ("coded", clip.as_coded)):
        seen = clip.similarities(judge, e.source, e.picture, before, after, prepare)
        numbers |= {
            f"direction_{name}": number(seen.direction),
            f"image_{name}": number(seen.image),
        }
    return numbers
