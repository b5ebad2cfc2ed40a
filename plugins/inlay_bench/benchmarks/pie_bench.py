"""PIE-Bench (Ju et al., 2024) and PIE-Bench++: photographs and paintings with the region to edit.

Type 2 is "add object". Prompts mark what differs with brackets; they are taken off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inlay_bench.benchmarks import files
from inlay_bench.benchmarks.frame import Frame
from inlay_bench.benchmarks.words import new_phrase
from inlay_bench.tasks import Item, provider
from inlay_config.errors import InputError

NAME = "PIE-Bench"
SIDE = 512  # of its pictures and masks
KEYS = ("image_path", "original_prompt", "editing_prompt", "editing_type_id", "mask")
COLUMNS = ("id", "source_prompt", "target_prompt", "mask", "image")


@provider("pie-bench")
def pie_bench(
    seed: int, data: str = "", types: Sequence[int] = (2,), side: int = SIDE
) -> Iterator[Item]:
    """Items in the order of the set.

    data: the unpacked folder (`mapping_file.json`, `annotation_images/`), or a folder or hub name
    of PIE-Bench++'s Parquet files (`2_add_object_80/...`). types: 0 to 9. Raises InputError for
    files of another layout, no item of these types, a missing picture, a mask that cannot be read.
    """
    root = files.root_of(data, NAME, [f"{kind}_*/*.parquet" for kind in types])
    entries = _folder(root, types) if (root / "mapping_file.json").is_file() else _rows(root, types)
    for i, (name, before, after, mask, held) in enumerate(entries):
        where = f"{NAME}, item {name}"
        image = files.picture(held, where)
        frame = Frame(image.size, side)
        source, marked = plain(before), after
        target = plain(marked)
        texts = {"source": source, "target": target, "subject": _marked(marked, source)}
        region = frame.mask(decode(mask, where))
        yield Item(name, frame.picture(image), texts, seed + i, truth={"mask": region})


def plain(prompt: str) -> str:
    """A prompt without brackets: `a [red] car` is `a red car`."""
    return " ".join(re.sub(r"[\[\]]", " ", prompt).split())


def decode(code: Any, where: str) -> np.ndarray:
    """A mask, bool `512 512`, from runs of (start, length) in reading order; a frame of one pixel
    is always in it, as published.

    Raises InputError for anything else.
    """
    try:
        runs = [int(n) for n in (code.split() if isinstance(code, str) else code)]
        if len(runs) % 2 or min(runs, default=0) < 0:
            raise ValueError(f"{len(runs)} numbers")
    except (TypeError, ValueError, AttributeError) as error:
        problem = f"its mask is no list of starts and lengths: {error}"
        raise InputError(problem, where=where) from error
    mask = np.zeros((SIDE, SIDE), bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        mask.reshape(-1)[start : start + length] = True
    mask[[0, -1]] = mask[:, [0, -1]] = True
    return mask


def _marked(prompt: str, source: str) -> str:
    """What the brackets of the second prompt hold, else what only it says."""
    found = re.findall(r"\[([^\]]+)\]", prompt)
    return plain(max(found, key=len)) if found else new_phrase(source, plain(prompt))


def _folder(root: Path, types: Sequence[int]) -> Iterator[tuple[str, str, str, Any, Any]]:
    path = root / "mapping_file.json"
    wanted = {str(kind) for kind in types}
    count = 0
    for name, entry in files.read_json(path).items():
        where = f"{path}, {name}"
        image, before, after, kind, mask = files.values(entry, KEYS, where)
        if str(kind) in wanted:
            count += 1
            yield name, before, after, mask, root / "annotation_images" / image
    if not count:
        raise InputError(f"no item of the types {', '.join(sorted(wanted))}", where=str(path))


def _rows(root: Path, types: Sequence[int]) -> Iterator[tuple[str, str, str, Any, Any]]:
    folders = sorted(p for kind in types for p in root.glob(f"{kind}_*") if p.is_dir())
    if not folders:
        wanted = " or ".join(f"{kind}_*/" for kind in types)
        raise files.wrong_layout(root, NAME, f"mapping_file.json and no {wanted}")
    found = [path for f in folders for path in files.parquet_files(f, "*.parquet", NAME)]
    for row in files.rows(found, COLUMNS):
        where = f"{NAME}++, item {row['id']}"
        before, after, mask = files.values(row, ("source_prompt", "target_prompt", "mask"), where)
        yield str(row["id"]), before, after, mask, row["image"]
