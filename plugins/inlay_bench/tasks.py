"""Tasks: what is asked of a method, item by item, and what is measured of its pictures.

A task is a YAML file that names a registered provider of items, the prompts that a run gets from an
item, and registered measures. Nothing in it imports code.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from inlay_config.config import read_yaml, suggest
from inlay_config.errors import ConfigError, InputError, PluginError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

FOLDER = Path(__file__).parent / "tasks"
SETTINGS = ("prompt.source", "prompt.edit", "prompt.negative", "subject")


@dataclass(frozen=True)
class Item:
    """One item of a task.

    id: letters, digits, dot, dash; unique in the task. picture: the input; None when the task's
    model draws it from `texts["source"]` with `seed`. texts: by name (source, target, subject).
    truth: bool arrays `h w` by name (allowed, footprint, mask), whatever is known. facts: plain
    values by name (class, held_out, chance, things ...). seed: of the run. given: further pictures
    that a method gets, by name (mask, exemplar).
    """

    id: str
    picture: Image.Image | None
    texts: Mapping[str, str]
    seed: int
    truth: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Image.Image] = field(default_factory=dict)


Provider = Callable[..., Iterator[Item]]
"""(seed, **options) -> items without end or as many as there are; the same seed, the same items."""
PROVIDERS: dict[str, Provider] = {}


def provider(name: str) -> Callable[[Provider], Provider]:
    """Register a source of items that a task's YAML can name."""

    def register(function: Provider) -> Provider:
        PROVIDERS[name] = function
        return function

    return register


@dataclass
class Data:
    """Where items come from: a registered provider and its options."""

    provider: str = "???"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Task:
    """A task as its YAML says it.

    summary: one line. data: see there. inputs: "given" (an item has a picture) or "drawn" (the
    task's model draws it from the source text and the item's seed). model: draws such inputs and
    makes the round trip of the row `vae`; "" leaves that row out.

    run: setting of a run -> name of an item's text. run_with: plugin -> the same, over `run`, in
    methods that list that plugin. given: an item's further picture -> where it goes: `mask`, or
    `PLUGIN.OPTION` where a method lists that plugin. seeds: plugin -> its option that is the item's
    seed, likewise. sweep: setting -> its values: a method that lists its plugin becomes one row per
    value. curve: two columns, across and up, in which such rows are a curve.

    networks: which one stands for a name that measures look through, by folder or hub name.
    measures: by name, in the order of the report. sets: measures of all pictures together. real:
    folder of the pictures that sets are compared with; "" takes the items' true ones. n: items when
    `--n` is not given. notes: what the report says beside the numbers.
    """

    summary: str = "???"
    data: Data = field(default_factory=Data)
    inputs: str = "given"
    model: str = "toybox/flux"
    run: dict[str, str] = field(default_factory=dict)
    run_with: dict[str, dict[str, str]] = field(default_factory=dict)
    sweep: dict[str, list[float]] = field(default_factory=dict)
    curve: list[str] = field(default_factory=list)
    given: dict[str, list[str]] = field(default_factory=dict)
    seeds: dict[str, str] = field(default_factory=dict)
    networks: dict[str, str] = field(default_factory=dict)
    measures: list[str] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    real: str = ""
    n: int = 100
    notes: list[str] = field(default_factory=list)
    name: str = ""

    def items(self, n: int, seed: int) -> list[Item]:
        """The first n items. Raises InputError for none, and for two of one id."""
        where = f"task {self.name}"
        try:
            found = PROVIDERS[self.data.provider](seed, **self.data.options)
        except TypeError as error:
            raise ConfigError(str(error), where=f"{where}: data.options") from error
        items = list(islice(found, n))
        if not items:
            fix = "Look at the options of its data."
            raise InputError("it has no items", where=where, fix=fix)
        seen: set[str] = set()
        for item in items:
            if not re.fullmatch(r"[\w][\w.-]{0,80}", item.id):
                fix = "Use letters, digits, dots and dashes."
                raise InputError(f"'{item.id}' is no item id", where=where, fix=fix)
            if item.id in seen:
                fix = "Give every item its own id."
                raise InputError(f"two items are called '{item.id}'", where=where, fix=fix)
            if self.inputs == "given" and item.picture is None:
                fix = "Give it one, or let the task say `inputs: drawn`."
                raise InputError(f"item '{item.id}' has no picture", where=where, fix=fix)
            seen.add(item.id)
        return items


def names() -> list[str]:
    """Tasks that ship here."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def listing() -> dict[str, dict[str, Any]]:
    """The shipped tasks by name: summary, items, measures."""
    read = {name: read_yaml(FOLDER / f"{name}.yaml") for name in names()}
    return {
        name: {"summary": task.summary, "items": task.n, "measures": list(task.measures)}
        for name, task in read.items()
    }


def load(name: str) -> Task:
    """A task by name or YAML file. Raises ConfigError for what it does not know."""
    path = FOLDER / f"{name}.yaml" if name in names() else Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise ConfigError(f"no task '{name}'", fix=suggest(path.stem, names()))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Task), read_yaml(path))
        task = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0], where=str(path)) from error
    assert isinstance(task, Task)
    task.name = path.stem
    _check(task, str(path))
    return task


def adapt(task: Task, data: Sequence[str] = (), networks: Sequence[str] = ()) -> None:
    """Put what the command line says into a task.

    data: where its files are, or `option=value` of its provider, or `real=FOLDER` of the task.
    networks: `name=where`. Raises ConfigError for a network without a place, and for what the task
    does not know.
    """
    for word in data:
        option, equals, value = word.partition("=")
        if equals and option == "real":
            task.real = value
            continue
        named = equals and option.isidentifier()
        try:
            task.data.options |= {option: yaml.safe_load(value)} if named else {"data": word}
        except yaml.YAMLError as error:
            problem = f"'{value}' is no value: {' '.join(str(error).split())}"
            raise ConfigError(problem, where=f"--data {option}") from error
    for word in networks:
        name, equals, where = word.partition("=")
        if not (equals and where):
            fix = "Say NAME=FOLDER, or NAME=OWNER/MODEL."
            raise ConfigError(f"'{word}' says no place", where="--network", fix=fix)
        task.networks[name] = where
    _check(task, f"task {task.name}")


def _check(task: Task, where: str) -> None:
    from inlay_bench.measures import MEASURES, NETWORKS
    from inlay_bench.sets import SETS

    register_all()
    settings = [*task.run, *(key for over in task.run_with.values() for key in over)]
    known: tuple[tuple[str, list[str], Any], ...] = (
        ("data.provider", [task.data.provider], PROVIDERS),
        ("inputs", [task.inputs], ("given", "drawn")),
        ("run", settings, SETTINGS),
        ("networks", list(task.networks), NETWORKS),
        ("measures", task.measures, MEASURES),
        ("sets", task.sets, SETS),
    )
    for key, given, allowed in known:
        for name in given:
            if name not in allowed:
                raise ConfigError(
                    f"no '{name}'", where=f"{where}: {key}", fix=suggest(name, allowed)
                )
    if task.n < 1 or not task.measures:
        key = "n" if task.n < 1 else "measures"
        raise ConfigError("must be one or more", where=f"{where}: {key}")


def register_all() -> None:
    """Import what registers providers and measures: ours, and the modules that other packages name
    in the entry point group `inlay.bench`. Raises PluginError for one that cannot be imported."""
    for ours in ("providers", "exemplars", "blending", "instructions", "benchmarks"):
        importlib.import_module(f"inlay_bench.{ours}")
    for point in sorted(entry_points(group="inlay.bench")):
        try:
            point.load()
        except Exception as error:  # another package's module may raise anything
            owner = point.dist.name if point.dist else "its package"
            problem = f"cannot be imported: {type(error).__name__}: {error}"
            fix = f"Reinstall {owner}, or remove it."
            where = f"entry point {point.name} ({point.value})"
            raise PluginError(problem, where=where, fix=fix) from error
