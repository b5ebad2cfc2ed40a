"""What a study shows: pictures by method and item, from folders of `inlay eval` or of pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from inlay_bench.methods import SANITY
from inlay_bench.pictures import path_of
from inlay_config.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class Material:
    """What can be compared.

    methods: in the order given. items: those of which every method has a picture, sorted.
    pictures: by method and item. inputs, texts: by item, where there are any. left_out: items that
    some method lacks.
    """

    methods: list[str]
    items: list[str]
    pictures: dict[tuple[str, str], Path]
    inputs: dict[str, Path]
    texts: dict[str, str]
    left_out: list[str]


@dataclass(frozen=True)
class Source:
    """One method's pictures by item."""

    folder: Path
    method: str
    pictures: dict[str, Path]


def gather(
    folders: Sequence[Path],
    methods: Sequence[str] = (),
    inputs: Path | None = None,
    captions: Path | None = None,
) -> Material:
    """What the folders hold. A folder of `inlay eval` brings each of its methods, any other folder
    of pictures is one method, called as it is.

    methods: these alone; else all but the sanity rows of `inlay eval`. inputs: a folder of the
    pictures before. captions: JSON, item to text. Raises InputError: no folder, no picture, fewer
    than two methods, no common item, a picture that was recorded and is gone.
    """
    found = [source for folder in folders for source in _sources(folder, methods)]
    names = _names(found)
    if missing := [name for name in methods if name not in names]:
        fix = f"There are {', '.join(names)}."
        raise InputError(f"no method '{missing[0]}'", where="--methods", fix=fix)
    if len(found) < 2:
        fix = "Give a second folder, or one of `inlay eval` with several methods."
        raise InputError(f"only {', '.join(names) or 'nothing'} to vote on", where="study", fix=fix)
    every = sorted({item for source in found for item in source.pictures})
    items = [item for item in every if all(item in source.pictures for source in found)]
    if not items:
        counted = ", ".join(
            f"{name} has {sorted(source.pictures)[0]} and {len(source.pictures) - 1} more"
            for name, source in zip(names, found, strict=True)
        )
        fix = "Pictures are matched by file name."
        raise InputError(f"no item is in all of them: {counted}", where="study", fix=fix)
    before = _pictures(inputs) if inputs else {}
    texts: dict[str, str] = {}
    for folder in reversed(folders) if not inputs else ():
        before |= _pictures(path_of(folder, "input", "-").parent, needed=False)
    for folder in folders:
        texts |= _texts(folder)
    if captions:
        texts |= _captions(captions)
    return Material(
        methods=names,
        items=items,
        pictures={
            (name, item): source.pictures[item]
            for name, source in zip(names, found, strict=True)
            for item in items
        },
        inputs={item: before[item] for item in items if item in before},
        texts={item: texts[item] for item in items if item in texts},
        left_out=[item for item in every if item not in items],
    )


def _sources(folder: Path, methods: Sequence[str]) -> list[Source]:
    if not folder.is_dir():
        raise InputError(f"there is no folder '{folder}'", where="study")
    books = sorted(folder.glob("*.jsonl"))
    if not (folder / "pictures").is_dir() or not books:
        name = folder.resolve().name
        return [] if methods and name not in methods else [Source(folder, name, _pictures(folder))]
    asked = [b for b in books if (b.stem in methods if methods else b.stem not in SANITY)]
    return [Source(folder, book.stem, _recorded(folder, book)) for book in asked]


def _recorded(folder: Path, book: Path) -> dict[str, Path]:
    """The pictures that a file of records says are there; `copy` is the input itself."""
    found = {}
    for item in _done(book):
        path = path_of(folder, book.stem, item)
        if not path.is_file():
            fix = "Run `inlay eval` again: it draws what is missing."
            raise InputError(f"the picture of item '{item}' is gone", where=str(path), fix=fix)
        found[item] = path
    return found


def _done(book: Path) -> list[str]:
    """Items that a file of records has done, as the file's last lines say."""
    states: dict[str, str] = {}
    for number, line in enumerate(book.read_text(encoding="utf-8").splitlines()[1:], 2):
        try:
            record = json.loads(line)
            states[record["item"]] = record["state"]
        except (ValueError, TypeError, KeyError) as error:
            fix = "Run `inlay eval` again: it sets torn lines aside."
            raise InputError(f"line {number} is no record", where=str(book), fix=fix) from error
    return [item for item, state in states.items() if state == "done"]


def _pictures(folder: Path, needed: bool = True) -> dict[str, Path]:
    """Pictures of a folder by stem. Raises InputError for none, and for two of one stem."""
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES)
    if needed and not paths:
        kinds = ", ".join(SUFFIXES)
        raise InputError("there are no pictures in it", where=str(folder), fix=f"Of {kinds}.")
    for one, other in pairwise(paths):
        if one.stem == other.stem:
            fix = "Keep one of them."
            problem = f"{one.name} and {other.name} are of one item"
            raise InputError(problem, where=str(folder), fix=fix)
    return {path.stem: path for path in paths}


def _texts(folder: Path) -> dict[str, str]:
    """What was asked for, as `inlay eval` wrote it down."""
    path = folder / "items.json"
    if not path.is_file():
        return {}
    said = _json(path)
    return {item: str(texts.get("target", "")) for item, texts in said.items()}


def _captions(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise InputError(f"there is no file '{path}'", where="--captions")
    return {str(item): str(text) for item, text in _json(path).items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"is not JSON: {error}", where=str(path)) from error
    if not isinstance(content, dict):
        raise InputError("must be an object: item to text", where=str(path))
    return content


def _names(found: Sequence[Source]) -> list[str]:
    """A name for each; with its folder where two methods are called the same."""
    plain = [source.method for source in found]
    full = [f"{source.folder.resolve().parent.name}/{source.method}" for source in found]
    inside = [f"{source.folder.resolve().name}/{source.method}" for source in found]
    for names in (plain, inside, full):
        if len(set(names)) == len(names):
            return names
    fix = "Give every folder a name of its own."
    raise InputError("two folders are called the same", where="study", fix=fix)
