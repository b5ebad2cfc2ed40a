"""An evaluation: every method over every item of a task, recorded, then reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from inlay_bench import measures
from inlay_bench import methods as all_methods
from inlay_bench.measures import MEASURES, Measure
from inlay_bench.methods import Method
from inlay_bench.records import Record, Records, locked, on_disk
from inlay_bench.tasks import Item, Task
from inlay_config import manifest
from inlay_config.errors import ModelError
from inlay_config.images import open_image, save

Callback = Callable[[str, int, int, str], None]
"""(method, items done, items, note)"""


@dataclass
class Evaluation:
    """What was measured. records[method][item]: the last record. absent: measure -> why it was
    left out. networks: name -> {name, digest}. failed[method]: items without a picture."""

    task: Task
    items: list[Item]
    methods: list[str]
    measures: dict[str, Measure]
    networks: dict[str, dict[str, str]]
    absent: dict[str, str]
    records: dict[str, dict[str, Record]]
    seed: int
    folder: Path
    identities: dict[str, dict[str, Any]] = field(default_factory=dict)


def evaluate(
    task: Task,
    names: Sequence[str],
    out: Path,
    n: int | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
    retry_failed: bool = False,
    restart: bool = False,
    callback: Callback | None = None,
) -> Evaluation:
    """Run what is not recorded yet in `out`, then return all of it.

    Raises InputError when `out` holds records of something else or cannot be written to,
    ConfigError for unknown names. A method that raises on an item is recorded and counted.
    """
    methods = all_methods.build(names, task, overrides)
    items = task.items(n or task.n, seed)
    networks, absent = load_networks(task)
    chosen = {name: MEASURES[name] for name in task.measures if name not in absent}
    with locked(out):
        identities = {m.name: identity(task, m, networks, absent, seed) for m in methods}
        books = {
            m.name: Records(out / f"{m.name}.jsonl", identities[m.name], restart) for m in methods
        }
        sources = Sources(task, out, overrides)
        for method in methods:
            book = books[method.name]
            for i, item in enumerate(items):
                if book.done(item.id, retry_failed):
                    continue
                if callback:
                    callback(method.name, i, len(items), item.texts.get("target", item.id))
                book.append(attempt(method, item, sources, out, chosen, networks))
            if callback:
                callback(method.name, len(items), len(items), "")
    return Evaluation(
        task=task,
        items=items,
        methods=[m.name for m in methods],
        measures=chosen,
        networks={k: {"name": v.name, "digest": v.digest} for k, v in networks.items()},
        absent=absent,
        records={name: book.latest for name, book in books.items()},
        seed=seed,
        folder=out,
        identities=identities,
    )


def attempt(
    method: Method,
    item: Item,
    sources: Sources,
    out: Path,
    chosen: Mapping[str, Measure],
    networks: Mapping[str, Any],
) -> Record:
    """One item by one method: its picture on disk, then its record. What the method raises is the
    record of a failed item; a disk that cannot be written to ends the evaluation."""
    source = sources(item)
    started = time.perf_counter()
    try:
        picture = method(item, source)
        seconds = time.perf_counter() - started
        seen = measures.evidence(item, source, picture, networks)
        numbers: dict[str, float | None] = {}
        for each in chosen.values():
            numbers |= each.function(seen)
    except Exception as error:  # a method under test may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return {"item": item.id, "state": "failed", "error": reason}
    store(picture, picture_path(out, method.name, item.id))
    return {"item": item.id, "state": "done", "seconds": round(seconds, 3), "numbers": numbers}


class Sources:
    """The inputs of items, on disk beside the results: given, or drawn once by the task's model."""

    def __init__(self, task: Task, out: Path, overrides: Sequence[str]) -> None:
        self.out = out
        self.draw = all_methods.drawer(task, overrides) if task.inputs == "drawn" else None

    def __call__(self, item: Item) -> Image.Image:
        path = picture_path(self.out, "input", item.id)
        if self.draw is None:
            assert item.picture is not None  # the task has looked
            if not path.is_file():
                store(item.picture, path)
            return item.picture
        if not path.is_file():
            store(self.draw(item, Image.new("RGB", (1, 1))), path)
        return open_image(path)


def picture_path(out: Path, method: str, item: str) -> Path:
    """Where the picture of an item lies."""
    return out / "pictures" / method / f"{item}.png"


def store(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all. Raises InputError when the disk is full."""
    with on_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save(picture, path)


def load_networks(task: Task) -> tuple[dict[str, Any], dict[str, str]]:
    """The networks behind a task's measures by name, and the measures that must do without, with
    the reason."""
    found, missing = dict[str, Any](), dict[str, str]()
    for name in dict.fromkeys(net for m in task.measures for net in MEASURES[m].networks):
        try:
            found[name] = measures.NETWORKS[name]()
        except (ModelError, KeyError) as error:
            missing[name] = str(error)
    absent = {
        m: missing[net] for m in task.measures for net in MEASURES[m].networks if net in missing
    }
    return found, absent


def identity(
    task: Task,
    method: Method,
    networks: Mapping[str, Any],
    absent: Mapping[str, str],
    seed: int,
) -> dict[str, Any]:
    """Everything that the records of a method depend on."""
    plain = {k: v for k, v in vars(task).items() if k not in ("n", "summary", "notes", "data")}
    return {
        "task": {**plain, "data": vars(task.data)},
        "seed": seed,
        **method.identity,
        "networks": {name: f"{net.name} {net.digest}" for name, net in networks.items()},
        "left out": sorted(absent),
        "versions": {name: version(name) for name in manifest.PACKAGES},
    }


def default_folder(task: Task) -> Path:
    """`outputs/eval/TASK`."""
    return Path("outputs") / "eval" / task.name
