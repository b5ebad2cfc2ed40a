"""A user's own affordance set, in the terms of Add-it's (Tewel et al., 2024), which is unreleased.

`items.json` is a list of objects: image (a file beside it), src_prompt, tgt_prompt, subject_token
(words of tgt_prompt), boxes (left, top, right, bottom in pixels of the image, where the object may
stand), and if wanted id, instruction, seed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from inlay_bench.benchmarks import files
from inlay_bench.benchmarks.frame import Frame
from inlay_bench.tasks import Item, provider
from inlay_config.errors import InputError
from inlay_config.images import safe_join

NAME = "affordance set"


@provider("affordance-set")
def affordance_set(seed: int, data: str = "", side: int = 512) -> Iterator[Item]:
    """Items in the file's order.

    data: the folder of `items.json` (or a hub name). Raises InputError for an entry that lacks a
    key, a missing picture, a subject that the prompt does not say, boxes that are none.
    """
    root = files.root_of(data, NAME, ["*"])
    path = root / "items.json"
    if not path.is_file():
        raise files.wrong_layout(root, NAME, "items.json")
    for i, entry in enumerate(files.read_json(path, list)):
        where = f"{path}, entry {i}"
        keys = ("image", "src_prompt", "tgt_prompt", "subject_token")
        image, before, after, subject = map(str, files.values(entry, keys, where))
        if not re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", after, flags=re.IGNORECASE):
            raise InputError(f"'{subject}' is not in '{after}'", where=where)
        picture = files.picture(safe_join(root, image), where)
        frame = Frame(picture.size, side)
        boxes = frame.boxes(_boxes(entry.get("boxes"), picture.size, where))
        if not boxes:
            fix = "Draw one inside the central square, or set the option side=0."
            raise InputError("all its boxes are cropped away", where=where, fix=fix)
        yield Item(
            id=str(entry.get("id") or image.rpartition("/")[2].rpartition(".")[0]),
            picture=frame.picture(picture),
            texts={
                "source": before,
                "target": after,
                "subject": subject,
                "instruction": str(entry.get("instruction") or ""),
            },
            seed=int(entry.get("seed", seed + i)),
            facts={"boxes": boxes},
        )


def _boxes(given: Any, size: tuple[int, int], where: str) -> list[list[float]]:
    """Boxes inside a picture. Raises InputError for one that is none."""
    for box in given if isinstance(given, list) and given else [given]:
        try:
            left, top, right, bottom = (float(value) for value in box)
            sound = 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        except (TypeError, ValueError):
            sound = False
        if not sound:
            fix = "Give left, top, right, bottom in pixels."
            problem = f"{box} is no box in a picture of {size[0]}x{size[1]}"
            raise InputError(problem, where=where, fix=fix)
    return given
