"""An evaluation: every method over every item of a task, recorded, then reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from inlay_bench import measures
from inlay_bench.measures import MEASURES, Measure
from inlay_bench.methods import Method
from inlay_bench.records import DiskError, Record, Records, locked, on_disk, set_aside
from inlay_bench.tasks import Item, Task
from inlay_config import manifest
from inlay_config.errors import InputError, ModelError
from inlay_config.images import open_image, save

Callback = Callable[[str, int, int, str], None]
"""(method, items done, items, note)"""


@dataclass
class Evaluation:
    """What was measured. records[method][item]: the last record. measures, absent: those taken, and
    why others were left out. networks: name -> {name, digest}. identities: by method."""

    task: Task
    items: list[Item]
    methods: list[str]
    measures: dict[str, Measure]
    networks: dict[str, dict[str, str]]
    absent: dict[str, str]
    records: dict[str, dict[str, Record]]
    seed: int
    folder: Path
    identities: dict[str, dict[str, Any]]


def evaluate(
    task: Task,
    methods: Sequence[Method],
    out: Path,
    n: int | None = None,
    seed: int = 0,
    draw: Method | None = None,
    retry_failed: bool = False,
    restart: bool = False,
    callback: Callback | None = None,
) -> Evaluation:
    """Run what is not recorded yet in `out`, then return all of it.

    draw: of a task whose inputs are drawn (`methods.drawer`). A method that raises on an item is
    recorded and counted. Raises InputError when `out` holds records of something else, DiskError
    when it cannot be written to.
    """
    items = task.items(n or task.n, seed)
    networks, absent = load_networks(task)
    chosen = {name: MEASURES[name] for name in task.measures if name not in absent}
    fixed = identity(task, networks, absent, seed, draw)
    with locked(out):
        if restart:
            set_aside(out)
        identities = {m.name: {**fixed, **m.identity} for m in methods}
        books = {m.name: Records(out / f"{m.name}.jsonl", identities[m.name]) for m in methods}
        sources = Sources(out, draw)
        for method in methods:
            book = books[method.name]
            for i, item in enumerate(items):
                if book.done(item.id, retry_failed):
                    check_input(item, book)
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
    record: Record = {"item": item.id, "state": "failed"}
    try:
        source = sources(item)
        record["input"] = manifest.hash_image(source)[:12]
        started = time.perf_counter()
        picture = method(item, source)
        seconds = time.perf_counter() - started
        store(picture, picture_path(out, method.name, item.id))
        seen = measures.evidence(item, source, picture, networks)
        numbers: dict[str, float | None] = {}
        for each in chosen.values():
            numbers |= each.function(seen)
    except DiskError:
        raise
    except Exception as error:  # a method under test may raise anything
        return {**record, "error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    return {**record, "state": "done", "seconds": round(seconds, 3), "numbers": numbers}


def check_input(item: Item, book: Records) -> None:
    """Raise InputError when an item was recorded with another input than it has now."""
    then = book.latest[item.id].get("input")
    if item.picture is not None and then not in (None, manifest.hash_image(item.picture)[:12]):
        fix = "Choose another --out, or give --restart to set what is there aside."
        where = f"{book.path}, item {item.id}"
        raise InputError("its input has changed since it was recorded", where=where, fix=fix)


class Sources:
    """The inputs of items, on disk beside the results: given, or drawn once."""

    def __init__(self, out: Path, draw: Method | None) -> None:
        self.out, self.draw = out, draw

    def __call__(self, item: Item) -> Image.Image:
        path = picture_path(self.out, "input", item.id)
        if path.is_file() and item.picture is None:
            return open_image(path)
        picture = item.picture
        if picture is None:
            if self.draw is None:
                raise InputError("it has no picture", where=f"item {item.id}")
            picture = self.draw(item, Image.new("RGB", (1, 1)))
        store(picture, path)
        return picture


def picture_path(out: Path, method: str, item: str) -> Path:
    """Where the picture of an item lies."""
    return out / "pictures" / method / f"{item}.png"


def store(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all. Raises DiskError when there is no room."""
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
            missing[name] = str(error).replace(str(Path.home()), "~")
    absent = {
        m: missing[net] for m in task.measures for net in MEASURES[m].networks if net in missing
    }
    return found, absent


def identity(
    task: Task,
    networks: Mapping[str, Any],
    absent: Mapping[str, str],
    seed: int,
    draw: Method | None,
) -> dict[str, Any]:
    """What records depend on beside their method."""
    beside = ("n", "summary", "notes")  # they change no record
    return {
        "task": {k: v for k, v in asdict(task).items() if k not in beside},
        "seed": seed,
        "inputs": draw.identity if draw else "given",
        "networks": {name: f"{net.name} {net.digest}" for name, net in networks.items()},
        "left out": sorted(absent),
        "versions": {name: version(name) for name in manifest.PACKAGES},
    }


def default_folder(task: Task) -> Path:
    """`outputs/eval/TASK`."""
    return Path("outputs") / "eval" / task.name
