"""MagicBrush (Zhang et al., 2023): edits of photographs with a true picture after each.

Single turn: each turn begins with the true picture before it. The input of a later turn in the
multi-turn setting is a method's own picture, which items that stand alone cannot be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inlay_bench.benchmarks import files
from inlay_bench.benchmarks.frame import Frame
from inlay_bench.benchmarks.words import new_phrase
from inlay_bench.tasks import Item, provider

NAME = "MagicBrush"
COLUMNS = (
    "img_id",
    "turn_index",
    "instruction",
    "source_global_caption",
    "target_global_caption",
    "target_local_caption",
    "source_img",
    "target_img",
)


@provider("magicbrush")
def magicbrush(seed: int, data: str = "", first: bool = False, side: int = 512) -> Iterator[Item]:
    """All turns in the set's order.

    data: the unpacked folder of the test split (`edit_sessions.json`, `images/`, the two files of
    descriptions), or a folder or hub name of Parquet files that hold the captions as well. first:
    each session's first turn alone. Raises InputError for files of another layout, a missing
    picture or description.
    """
    root = files.root_of(data, NAME, ["*.parquet"])
    turns = _folder(root) if (root / "edit_sessions.json").is_file() else _parquet(root)
    for i, (name, turn, texts, before, after) in enumerate(turns):
        if first and turn > 1:
            continue
        where = f"{NAME}, item {name}"
        source, target = files.picture(before, where), files.picture(after, where)
        frame = Frame(source.size, side)
        yield _item(name, texts, frame.picture(source), frame.picture(target), seed + i)


Turn = tuple[str, int, dict[str, str], Any, Any]


def _folder(root: Path) -> Iterator[Turn]:
    """Turns of the unpacked folder: pictures lie in `images/ID/`."""
    said = {
        kind: _by_file(files.read_json(root / f"{kind}_descriptions.json"))
        for kind in ("global", "local")
    }
    for session, turns in files.read_json(root / "edit_sessions.json").items():
        for number, turn in enumerate(turns, 1):
            name = f"{session}-{number}"
            where = f"{root / 'edit_sessions.json'}, {name}"
            before, after, instruction = files.values(
                turn, ("input", "output", "instruction"), where
            )
            words = {file: said["global"].get(file, "") for file in (before, after)}
            source, target = files.values(words, (before, after), f"{NAME}, descriptions of {name}")
            texts = {"source": source, "target": target, "instruction": instruction}
            texts["local"] = said["local"].get(after) or target
            yield name, number, texts, *(root / "images" / session / f for f in (before, after))


def _by_file(descriptions: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """From session -> file -> words to file -> words."""
    return {file: words for inner in descriptions.values() for file, words in inner.items()}


def _parquet(root: Path) -> Iterator[Turn]:
    if not any(root.rglob("*.parquet")):
        raise files.wrong_layout(root, NAME, "edit_sessions.json and no Parquet file")
    for row in files.rows(files.parquet_files(root, "*.parquet", NAME), COLUMNS):
        name = f"{row['img_id']}-{row['turn_index']}"
        keys = ("source_global_caption", "target_global_caption")
        source, target = files.values(row, keys, f"{NAME}, item {name}")
        texts = {"source": source, "target": target, "instruction": row["instruction"]}
        texts["local"] = row["target_local_caption"] or target
        yield name, int(row["turn_index"]), texts, row["source_img"], row["target_img"]


def _item(
    name: str, texts: dict[str, str], source: Image.Image, target: Image.Image, seed: int
) -> Item:
    texts["subject"] = new_phrase(texts["source"], texts["target"])
    return Item(name, source, texts, seed, truth={"target": np.array(target)})
