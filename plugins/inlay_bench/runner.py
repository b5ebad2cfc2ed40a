"""An evaluation: every method over every item of a task, recorded, then reported."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inlay_bench import measures
from inlay_bench import sets as set_measures
from inlay_bench.measures import MEASURES, Measure, Numbers
from inlay_bench.methods import Method
from inlay_bench.pictures import Sources, Stamp, digest, fingerprint, kept, path_of, store
from inlay_bench.records import DiskError, Record, Records, locked, on_disk, set_aside
from inlay_bench.tasks import Item, Task
from inlay_config import manifest
from inlay_config.errors import InputError, ModelError
from inlay_config.images import whole

Callback = Callable[[str, int, int, str], None]
"""(method, items done, items, note)"""


@dataclass
class Evaluation:
    """What was measured. records[method][item]: the last record. measures, absent: those taken, and
    why others were left out. networks: name -> {name, digest}. identities: by method. sets[method]:
    numbers of all its pictures together. series: of methods that are one setting of something."""

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
    sets: dict[str, Numbers] = field(default_factory=dict)
    series: dict[str, str] = field(default_factory=dict)


def evaluate(
    task: Task,
    methods: Sequence[Method],
    out: Path,
    n: int | None = None,
    seed: int = 0,
    draw: Method | None = None,
    retry_failed: bool = False,
    remeasure: bool = False,
    restart: bool = False,
    callback: Callback | None = None,
) -> Evaluation:
    """Run what is not recorded yet in `out`, then return all of it.

    draw: of a task whose inputs are drawn (`methods.drawer`). retry_failed: do those again.
    remeasure: set the records aside and make them again from the pictures. restart: set everything
    aside. A method that raises on an item is recorded and counted. Raises InputError when `out`
    holds records of something else, DiskError when it cannot be written to.
    """
    items = task.items(n or task.n, seed)
    networks, absent = load_networks(task)
    chosen = {name: MEASURES[name] for name in task.measures if name not in absent}
    with locked(out):
        if restart or remeasure:
            set_aside(out, beside=() if restart else ("pictures",))
        identities = {m.name: identity(task, m, networks, absent, seed, draw) for m in methods}
        books = {m.name: Records(out / f"{m.name}.jsonl", identities[m.name]) for m in methods}
        note_texts(items, out)
        sources = Sources(out, draw, digest(draw.identity) if draw else "")
        for method in methods:
            book, made_by = books[method.name], digest(identities[method.name]["pictures"])
            if not all(book.done(item.id, retry_failed) for item in items):
                method.load()
            for i, item in enumerate(items):
                if book.done(item.id, retry_failed):
                    check_input(item, book)
                    continue
                if callback:
                    callback(method.name, i, len(items), item.texts.get("target", item.id))
                path = path_of(out, method.name, item.id)
                book.append(attempt(method, item, sources, path, made_by, chosen, networks))
            if callback:
                callback(method.name, len(items), len(items), "")
        names = [m.name for m in methods]
        of_sets = set_measures.measure(task, items, names, out, networks, absent, callback)
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
        sets=of_sets,
        series={m.name: m.series for m in methods if m.series},
    )


def note_texts(items: Sequence[Item], out: Path) -> None:
    """Write down the items' texts, for studies and whoever looks at the pictures: `items.json`."""
    path, texts = out / "items.json", {item.id: dict(item.texts) for item in items}
    with on_disk(path), whole(path) as partial:
        partial.write_text(json.dumps(texts, indent=1, ensure_ascii=False), encoding="utf-8")


def attempt(
    method: Method,
    item: Item,
    sources: Sources,
    path: Path,
    made_by: str,
    chosen: Mapping[str, Measure],
    networks: Mapping[str, Any],
) -> Record:
    """One item by one method: its picture in `path`, then its record. What the method raises is the
    record of a failed item; a disk that cannot be written to ends the evaluation."""
    record: Record = {"item": item.id, "state": "failed"}
    try:
        source = sources(item)
        record["input"] = fingerprint(item, source)
        drawn = kept(path, made_by, record["input"])
        if drawn is None:
            started = time.perf_counter()
            drawn = method(item, source), round(time.perf_counter() - started, 3)
            store(drawn[0], path, Stamp(made_by, record["input"], drawn[1]))
        seen = measures.evidence(item, source, drawn[0], networks)
        numbers: dict[str, float | None] = {}
        for each in chosen.values():
            numbers |= each.function(seen)
    except DiskError:
        raise
    except Exception as error:  # a method under test may raise anything
        return {**record, "error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    return {**record, "state": "done", "seconds": drawn[1], "numbers": numbers}


def check_input(item: Item, book: Records) -> None:
    """Raise InputError when an item was recorded with another input than it has now."""
    then = book.latest[item.id].get("input")
    if item.picture is not None and then not in (None, fingerprint(item, item.picture)):
        fix = "Choose another --out, or give --restart to set what is there aside."
        where = f"{book.path}, item {item.id}"
        raise InputError("its input has changed since it was recorded", where=where, fix=fix)


def load_networks(task: Task) -> tuple[dict[str, Any], dict[str, str]]:
    """The networks behind a task's measures by name, and the measures that must do without, with
    the reason."""
    found, missing = dict[str, Any](), dict[str, str]()
    chosen = {m: MEASURES[m].networks for m in task.measures}
    chosen |= {m: set_measures.SETS[m].networks for m in task.sets}
    for name in dict.fromkeys(net for networks in chosen.values() for net in networks):
        try:
            given = [task.networks[name]] if name in task.networks else []
            found[name] = measures.NETWORKS[name](*given)
        except ModelError as error:
            missing[name] = str(error).replace(str(Path.home()), "~")
    absent = {
        m: missing[net] for m, networks in chosen.items() for net in networks if net in missing
    }
    return found, absent


def identity(
    task: Task,
    method: Method,
    networks: Mapping[str, Any],
    absent: Mapping[str, str],
    seed: int,
    draw: Method | None,
) -> dict[str, dict[str, Any]]:
    """Everything that a method's records depend on: what makes its pictures, what measures them."""
    said = asdict(task)
    return {
        "pictures": {
            **{key: said[key] for key in ("name", "data", "inputs", "run", "seeds")},
            **({"given": task.given} if task.given else {}),
            "drawn by": draw.identity if draw else None,
            "seed": seed,
            **method.identity,
            "versions": {name: version(name) for name in manifest.PACKAGES},
        },
        "measures": {
            "named": task.measures,
            "left out": sorted(absent),
            "networks": {name: f"{net.name} {net.digest}" for name, net in networks.items()},
        },
    }


def default_folder(task: Task) -> Path:
    """`outputs/eval/TASK`."""
    return Path("outputs") / "eval" / task.name
