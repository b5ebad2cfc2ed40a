"""The test set of Emu Edit (Sheynin et al., 2023), class "add", as Add-it is measured on it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

from inlay_bench.benchmarks import files
from inlay_bench.benchmarks.frame import Frame
from inlay_bench.benchmarks.words import new_phrase
from inlay_bench.tasks import Item, provider
from inlay_config.errors import InputError

NAME = "Emu-Edit test set"
TEXTS = ("idx", "task", "split", "instruction", "input_caption", "output_caption")
PLACEHOLDER = 3  # a pair of captions that this many items share describes none of them
log = logging.getLogger(__name__)


@provider("emu-edit")
def emu_edit(
    seed: int,
    data: str = "",
    split: str = "validation",
    kind: str = "add",
    noisy: bool = False,
    side: int = 512,
) -> Iterator[Item]:
    """Items of one class in the set's order.

    data: a folder with the set's Parquet files, or its hub name. split: validation or test. kind:
    add, remove, local, texture, background, global, style. noisy: keep items whose captions are
    equal or shared by three or more; they are left out, and counted on stderr, otherwise. The
    subject is what only the second caption says. Raises InputError for files of another layout, no
    item of the class, a missing picture.
    """
    root = files.root_of(data, NAME, [f"*{split}-*.parquet"])
    found = files.parquet_files(root, f"{split}-*.parquet", NAME)
    mine = [row for row in files.rows(found, TEXTS) if row["task"] == kind]
    if not mine:
        fix = "Its classes are add, remove, local, texture, background, global, style."
        raise InputError(f"no item of the class '{kind}'", where=str(root), fix=fix)
    shared = Counter((row["input_caption"], row["output_caption"]) for row in mine)
    out = {
        row["idx"]
        for row in mine
        if row["input_caption"] == row["output_caption"]
        or shared[row["input_caption"], row["output_caption"]] >= PLACEHOLDER
    }
    if out and not noisy:
        log.warning(
            "%s: %d of %d items are left out, their captions are equal or placeholders",
            NAME, len(out), len(mine),
        )  # fmt: skip
    for row in files.rows(found, (*TEXTS, "image")):
        if row["task"] == kind and (noisy or row["idx"] not in out):
            where = f"{NAME}, item {row['idx']}"
            before, after = files.values(row, ("input_caption", "output_caption"), where)
            image = files.picture(row["image"], where)
            texts = {"source": before, "target": after, "subject": new_phrase(before, after)}
            texts["instruction"] = row["instruction"]
            picture = Frame(image.size, side).picture(image)
            yield Item(str(row["idx"]), picture, texts, seed + int(row["idx"]))
