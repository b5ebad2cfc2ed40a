"""COCOEE, the set of Paint by Example (Yang et al., 2023): photographs of COCO with a box to fill,
and an exemplar for it.

`GT_3500/ID_GT.png`, `Ref_3500/ID_ref.png`, `Mask_bbox_3500/ID_mask.png`; ID has twelve digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from inlay_bench.benchmarks import files
from inlay_bench.benchmarks.frame import Frame
from inlay_bench.tasks import Item, provider
from inlay_config.errors import InputError

NAME = "COCOEE"
FOLDERS = {"picture": "GT_3500", "exemplar": "Ref_3500", "mask": "Mask_bbox_3500"}
SUFFIX = {"picture": "_GT", "exemplar": "_ref", "mask": "_mask"}


@provider("coco-exemplar")
def coco_exemplar(seed: int, data: str = "", side: int = 512) -> Iterator[Item]:
    """Items in the order of their numbers.

    data: the unpacked folder, or a hub name. Raises InputError for files of another layout, a
    picture without exemplar or mask, a mask that is empty.
    """
    root = files.root_of(data, NAME, [f"{folder}/*.png" for folder in FOLDERS.values()])
    if absent := [folder for folder in FOLDERS.values() if not (root / folder).is_dir()]:
        raise files.wrong_layout(root, NAME, absent[0])
    places = sorted((root / FOLDERS["picture"]).glob(f"*{SUFFIX['picture']}.png"))
    if not places:
        raise files.wrong_layout(root / FOLDERS["picture"], NAME, f"ID{SUFFIX['picture']}.png")
    for i, place in enumerate(places):
        name = place.stem.removesuffix(SUFFIX["picture"])
        yield _item(root, name, side, seed + i)


def _item(root: Path, name: str, side: int, seed: int) -> Item:
    where = f"{NAME}, item {name}"
    paths = {kind: root / FOLDERS[kind] / f"{name}{SUFFIX[kind]}.png" for kind in FOLDERS}
    picture, exemplar, drawn = (files.picture(paths[k], where) for k in FOLDERS)
    frame = Frame(picture.size, side)
    region = frame.mask(np.asarray(drawn.convert("L").resize(picture.size)) > 127)
    if not region.any():
        problem, fix = "its mask is empty", "Give option side=0, if it lies at the border."
        raise InputError(problem, where=where, fix=fix)
    return Item(
        id=name,
        picture=frame.picture(picture),
        texts={"source": "", "target": ""},
        seed=seed,
        truth={"region": region, "picture": np.array(frame.picture(picture))},
        given={"mask": Image.fromarray(region.astype(np.uint8) * 255), "exemplar": exemplar},
    )
