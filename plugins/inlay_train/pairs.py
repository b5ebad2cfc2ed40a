"""Edit pairs as a folder: pictures before and after, and the instruction that leads from one to the
other.

`metadata.jsonl` has one object a line: `original_image_file_name`, `edited_image_file_name`,
`edit_prompt`, and what else is known (prompts, similarities). It is the layout of an image folder
of the library `datasets`, with the column names of the published InstructPix2Pix data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from inlay_config.errors import InputError
from inlay_config.images import save

METADATA = "metadata.jsonl"
BEFORE, AFTER, WORDS = "original_image", "edited_image", "edit_prompt"


@dataclass(frozen=True)
class Triplet:
    """What a picture shows, how it is to be changed, and what it shows then."""

    before: str
    instruction: str
    after: str


def triplets(where: str, n: int, seed: int) -> Iterator[Triplet]:
    """`toybox`: captions of the toybox's edits; else a file of JSON lines with `input`, `edit` and
    `output`, as published with InstructPix2Pix, from its beginning.

    Raises InputError for a file that is not there, and for a line that lacks a key.
    """
    if where == "toybox":
        from inlay_toybox import edits

        for i in range(n):
            edit = edits.draw(seed + i)
            yield Triplet(edit.before.caption, edit.instruction, edit.after.caption)
        return
    for line in list(_lines(Path(where), ("input", "edit", "output")))[:n]:
        yield Triplet(line["input"].strip(), line["edit"].strip(), line["output"].strip())


def append(
    folder: Path, name: str, before: Image.Image, after: Image.Image, facts: Mapping[str, Any]
) -> None:
    """Add a pair. facts: `edit_prompt` and what else is known; written last, so that a line has its
    pictures."""
    files = {BEFORE: f"{name}-before.png", AFTER: f"{name}-after.png"}
    save(before, folder / files[BEFORE])
    save(after, folder / files[AFTER])
    line = {f"{kind}_file_name": file for kind, file in files.items()} | dict(facts)
    with (folder / METADATA).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


def read(folder: Path) -> list[tuple[Path, Path, str]]:
    """Pairs of a folder: picture before, picture after, instruction. No picture is opened.

    Raises InputError for a folder without metadata, and for a line that lacks a key.
    """
    keys = (f"{BEFORE}_file_name", f"{AFTER}_file_name", WORDS)
    found = _lines(folder / METADATA, keys)
    return [(folder / line[keys[0]], folder / line[keys[1]], line[WORDS]) for line in found]


def _lines(file: Path, keys: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Objects of a file of JSON lines that all have `keys`."""
    if not file.is_file():
        fix = f"One JSON object a line is wanted, with {', '.join(keys)}."
        raise InputError("there is no such file", where=str(file), fix=fix)
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            yield {**line, **{key: str(line[key]) for key in keys}}
        except (ValueError, KeyError, TypeError) as error:
            problem = f"no object with {', '.join(keys)}: {error}"
            raise InputError(problem, where=f"{file}, line {number}") from error
