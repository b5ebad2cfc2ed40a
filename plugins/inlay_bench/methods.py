"""Methods under test: experiments by name or YAML file, and rows to compare with: `copy`, `vae`,
`twin`, `elsewhere`, and those that paste an exemplar (`inlay_bench.pasting`).

A method turns an item into a picture. Pipelines are loaded once and shared between methods of the
same model; an experiment keeps its session from item to item. `addit@true_cfg=4` is a variant: the
experiment with overrides of its own.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from inlay_bench.pasting import PASTES, paste
from inlay_bench.pictures import digest_of
from inlay_bench.tasks import Item, Task
from inlay_config import config, manifest, registry
from inlay_config.config import Experiment
from inlay_config.errors import ConfigError, InputError
from inlay_config.images import to_pil, to_tensor

if TYPE_CHECKING:
    from PIL import Image

SANITY = ("copy", "vae")  # rows of every report
RUN = ("guidance", "true_cfg", "size", "steps")


class Method(ABC):
    """Something that edits pictures.

    name: of its row, its records and its pictures. identity: everything its pictures depend on, as
    JSON holds it. series: what it is one setting of, where a task sweeps over settings.
    """

    name: str
    identity: dict[str, Any]
    series: str = ""

    def load(self) -> None:  # noqa: B027  most need nothing
        """Load what it needs. Raises ModelError, and then no item is tried."""

    @abstractmethod
    def __call__(self, item: Item, source: Image.Image) -> Image.Image:
        """The picture of an item; `source` is the item's input."""


class Pipelines:
    """Pipelines by what decides them, each loaded once."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[Any, ...], Any] = {}

    def __call__(self, exp: Experiment) -> Any:
        from inlay import backbones

        key = (exp.model, exp.dtype, exp.device, exp.offload, exp.revision)
        if key not in self._loaded:
            folder = registry.resolve_model(exp.model)
            self._loaded[key] = backbones.load(folder, *key[1:])
        return self._loaded[key]


class Copy(Method):
    """The input, untouched: what a method that does nothing scores."""

    def __init__(self) -> None:
        self.name, self.identity = "copy", {"method": "the input, untouched"}

    def __call__(self, item: Item, source: Image.Image) -> Image.Image:
        return source


class RoundTrip(Method):
    """The input through the autoencoder of the task's model: the best that a latent method can do
    where it changes nothing."""

    def __init__(self, exp: Experiment, pipelines: Pipelines) -> None:
        self.name, self.exp, self.pipelines = "vae", exp, pipelines
        place = {key: getattr(exp, key) for key in ("model", "dtype", "revision")}
        self.identity = {"method": "autoencoder round trip", **place, **weights_of(exp)}

    def load(self) -> None:
        self.pipelines(self.exp)

    def __call__(self, item: Item, source: Image.Image) -> Image.Image:
        import torch

        from inlay import backbones

        backbone = backbones.adapt(self.pipelines(self.exp))
        with torch.no_grad():
            latent = backbone.encode_image(to_tensor(source))
            return to_pil(backbone.decode(latent, (source.height, source.width)))[0]


class Twin(Method):
    """The true picture with the object, where the item knows it: what a perfect insertion scores.

    elsewhere: the true object moved sideways to a random place, every other pixel the input's: a
    perfect insertion at another place.
    """

    def __init__(self, elsewhere: bool = False) -> None:
        self.name = "elsewhere" if elsewhere else "twin"
        self.elsewhere = elsewhere
        place = "moved sideways" if elsewhere else "in its place"
        self.identity = {"method": f"the true object, {place}"}

    def __call__(self, item: Item, source: Image.Image) -> Image.Image:
        import numpy as np
        from PIL import Image

        if "picture" not in item.truth:
            raise InputError("nobody knows the true picture", where=f"item {item.id}")
        true, footprint = item.truth["picture"], item.truth["footprint"]
        shift = 0
        if self.elsewhere:
            columns = np.flatnonzero(footprint.any(0))
            room = -int(columns.min()), footprint.shape[1] - int(columns.max())
            shift = int(np.random.default_rng(item.seed).integers(*room))
        inside = np.roll(footprint, shift, 1)[..., None]
        return Image.fromarray(np.where(inside, np.roll(true, shift, 1), np.asarray(source)))


class Paste(Method):
    """The exemplar's object pasted into the region, as it is or harmonised; no model."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.identity = {"method": {"paste": name, "version": 1}}

    def __call__(self, item: Item, source: Image.Image) -> Image.Image:
        return paste(item, source, PASTES[self.name])


class Edit(Method):
    """An experiment; what the item says takes the place of its prompts, subject, picture and seed.

    said: as `inlay run` takes it, `variant` of it or not. overrides: over the experiment, for every
    item.
    """

    def __init__(
        self,
        said: str,
        task: Task,
        overrides: Sequence[str],
        pipelines: Pipelines,
        weights: dict[str, str] | None = None,
    ) -> None:
        self.path, own = variant(said)
        self.task, self.overrides = task, (*overrides, *own)
        self.name = name_of(said)
        self.pipelines = pipelines
        self.exp = config.load(self.path, self.overrides)
        self._session: tuple[Any, Any] = (None, None)
        self._folder = TemporaryDirectory(prefix="inlay-eval-")
        resolved = config.to_dict(self.exp)
        for mine in ("input", "out", "seed", "n"):  # an item's, or no matter
            del resolved[mine]
        self.run = dict(task.run)
        for plugin in self.exp.plugins:
            self.run |= task.run_with.get(plugin, {})
        for key in self.run:
            inner, _, last = key.rpartition(".")
            del (resolved[inner] if inner else resolved)[last]
        self.weights = weights_of(self.exp) if weights is None else weights
        self.identity = {"method": resolved, "plugins": _owners(self.exp), **self.weights}
        if self.run != task.run:
            self.identity["run"] = self.run

    def load(self) -> None:
        self.pipelines(self.exp)

    def __call__(self, item: Item, source: Image.Image) -> Image.Image:
        return self.several(item, source, 1)[0]

    def several(self, item: Item, source: Image.Image, n: int) -> list[Image.Image]:
        """n pictures of an item in one batch."""
        words = [f"{key}={item.texts[text]}" for key, text in self.run.items()]
        exp = config.load(self.path, [*self.overrides, *words])
        for plugin, option in self.task.seeds.items():
            if plugin in exp.plugins:
                exp.plugins[plugin] = {**(exp.plugins[plugin] or {}), option: item.seed}
        mask = self._give(exp, item)
        asked = {key: getattr(exp, key) for key in RUN}
        prompts = config.to_dict(exp)["prompt"]
        given = source if self.task.inputs == "given" else None
        result = self._session_of(exp).run(prompts, given, mask, **asked, seed=item.seed, n=n)
        made = to_pil(result.images["edit"])
        # A model that works at another size is measured at the input's.
        return [p if given is None or p.size == given.size else p.resize(given.size) for p in made]

    def _give(self, exp: Experiment, item: Item) -> Image.Image | None:
        """Write an item's further pictures where plugins read them; the mask is returned."""
        mask = None
        for name, places in self.task.given.items():
            for place in places:
                plugin, _, option = place.partition(".")
                if place == "mask":
                    mask = item.given[name]
                elif plugin in exp.plugins:
                    path = Path(self._folder.name) / f"{digest_of(item.given[name])}.png"
                    item.given[name].save(path)
                    exp.plugins[plugin] = {**(exp.plugins[plugin] or {}), option: str(path)}
        return mask

    def _session_of(self, exp: Experiment) -> Any:
        """The session of the last item, or a new one where an option has changed."""
        from inlay import Session

        options, session = self._session
        if session is None or options != exp.plugins:
            pipe = self.pipelines(exp)
            given = {"resolve": exp.resolve, "compile": exp.compile, "gradient": exp.gradient}
            session = Session(pipe, exp.plugins, exp.scheduler, **given)
            self._session = (exp.plugins, session)
        return session


def build(names: Sequence[str], task: Task, overrides: Sequence[str] = ()) -> list[Method]:
    """The methods of `names` in order, then the sanity rows that were not among them.

    Raises ConfigError for an unknown experiment, and for a name that is taken.
    """
    pipelines = Pipelines()
    shipped = config.from_dict({"model": task.model}, [w for w in overrides if _of_model(w)])
    known: dict[str, Callable[[], Method]] = {
        "copy": Copy,
        "vae": lambda: RoundTrip(shipped, pipelines),
        "twin": Twin,
        "elsewhere": lambda: Twin(elsewhere=True),
        **{name: partial(Paste, name) for name in PASTES},
    }

    def edits(name: str) -> list[Method]:
        """An experiment, or one row per value that the task sweeps over."""
        whole = Edit(name, task, overrides, pipelines)
        rows: list[Method] = []
        for value, word in _sweep(whole, task):
            row = Edit(name, task, [*overrides, word], pipelines, whole.weights)
            row.name, row.series = f"{row.name}-{value:g}", row.name
            rows.append(row)
        return rows or [whole]

    made: dict[str, Method] = {}
    sanity = SANITY if shipped.model else ("copy",)
    for name in [*names, *(row for row in sanity if row not in names)]:
        for method in [known[name]()] if name in known else edits(name):
            if method.name in made or method.name == "input":
                fix = "Give every experiment a file name of its own, other than `input`."
                raise ConfigError(f"the name '{method.name}' is taken", where="methods", fix=fix)
            made[method.name] = method
    return list(made.values())


def name_of(said: str) -> str:
    """The name of an experiment's row: of the file, or the experiment's own, and what varies it."""
    path, *own = said.split("@")
    name = Path(path).stem if path.endswith((".yaml", ".yml")) else path
    return "@".join([name, *own]).replace("/", "-")


def variant(said: str) -> tuple[str, list[str]]:
    """The experiment and the overrides of `addit@true_cfg=4@weighted_attention.gamma=1.2`: what is
    no key of an experiment is one of its plugins."""
    path, *own = said.split("@")
    keys = {field.name for field in fields(Experiment)}
    known = (re.split(r"[.=]", word)[0] in keys for word in own)
    return path, [w if top else f"plugins.{w}" for w, top in zip(own, known, strict=True)]


def split(said: str) -> list[str]:
    """The methods of `a,b@steps=[1, 2]`: a comma in brackets is part of a value."""
    return [word for word in re.split(r",(?![^\[{]*[\]}])", said) if word]


def _sweep(edit: Edit, task: Task) -> list[tuple[float, str]]:
    """Values and overrides of the setting that a task sweeps over in an experiment, if any."""
    for setting, values in task.sweep.items():
        if setting.split(".")[1] in edit.exp.plugins:
            return [(value, f"{setting}={value}") for value in values]
    return []


def drawer(task: Task, overrides: Sequence[str] = ()) -> Edit | None:
    """What draws the inputs of a task whose items have none: text to image, nothing else."""
    if task.inputs == "given":
        return None
    plain = Task(run={"prompt.edit": "source"}, inputs="drawn", model=task.model, name=task.name)
    return Edit("t2i", plain, [f"model={task.model}", *overrides], Pipelines())


def weights_of(exp: Experiment) -> dict[str, str]:
    """The digest of a local model's weights; of a hub name, nothing beyond its revision."""
    folder = registry.resolve_model(exp.model)
    return {"weights": manifest.hash_weights(folder)} if Path(folder).exists() else {}


def _owners(exp: Experiment) -> dict[str, str]:
    """The versions of the packages that an experiment's plugins come from."""
    listed = registry.plugins()
    used = [str((options or {}).get("use", name)) for name, options in exp.plugins.items()]
    owners = {listed[name]["source"] for name in used if name in listed}
    return {owner: version(owner) for owner in sorted(owners) if owner}


def _of_model(override: str) -> bool:
    return override.split("=")[0] in ("model", "dtype", "device", "offload", "revision")
