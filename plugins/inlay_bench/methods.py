"""Methods under test: experiments by name or YAML file, and the sanity rows `copy` and `vae`.

A method turns an item into a picture. Pipelines are loaded once and shared between methods of the
same model; an experiment keeps its session from item to item.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from inlay_bench.tasks import Item, Task
from inlay_config import config, manifest, registry
from inlay_config.config import Experiment
from inlay_config.errors import ConfigError
from inlay_config.images import to_pil, to_tensor

if TYPE_CHECKING:
    from PIL import Image

SANITY = ("copy", "vae")  # rows of every report
RUN = ("guidance", "true_cfg", "size", "steps")


class Method(Protocol):
    """Something that edits pictures."""

    @property
    def name(self) -> str:
        """Names its row, its records and its pictures."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything its pictures depend on, as JSON holds it."""

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


class Copy:
    """The input, untouched: what a method that does nothing scores."""

    name = "copy"
    identity: dict[str, Any] = {"method": "the input, untouched"}  # noqa: RUF012  never written to

    def __call__(self, item: Item, source: Image.Image) -> Image.Image:
        return source


class RoundTrip:
    """The input through the autoencoder of the task's model: the best that a latent method can do
    where it changes nothing."""

    name = "vae"

    def __init__(self, exp: Experiment, pipelines: Pipelines) -> None:
        self.exp, self.pipelines = exp, pipelines
        place = {key: getattr(exp, key) for key in ("model", "dtype", "revision")}
        self.identity = {"method": "autoencoder round trip", **place, **weights_of(exp)}

    def __call__(self, item: Item, source: Image.Image) -> Image.Image:
        import torch

        from inlay import backbones

        backbone = backbones.adapt(self.pipelines(self.exp))
        with torch.no_grad():
            latent = backbone.encode_image(to_tensor(source))
            return to_pil(backbone.decode(latent, (source.height, source.width)))[0]


class Edit:
    """An experiment; what the item says takes the place of its prompts, subject, picture and seed.

    path: as `inlay run` takes it. overrides: over the experiment, for every item.
    """

    def __init__(
        self, path: str, task: Task, overrides: Sequence[str], pipelines: Pipelines
    ) -> None:
        self.path, self.task, self.overrides = path, task, tuple(overrides)
        self.name = Path(path).stem if path.endswith((".yaml", ".yml")) else path.replace("/", "-")
        self.pipelines = pipelines
        self.exp = config.load(path, self.overrides)
        self._session: tuple[Any, Any] = (None, None)
        resolved = config.to_dict(self.exp)
        for mine in ("input", "out", "seed", "n", "prompt", "subject"):  # an item's, or no matter
            del resolved[mine]
        self.identity = {"method": resolved, **weights_of(self.exp)}

    def __call__(self, item: Item, source: Image.Image) -> Image.Image:
        words = [f"{key}={item.texts[text]}" for key, text in self.task.run.items()]
        exp = config.load(self.path, [*self.overrides, *words])
        for plugin, option in self.task.seeds.items():
            if plugin in exp.plugins:
                exp.plugins[plugin] = {**(exp.plugins[plugin] or {}), option: item.seed}
        asked = {key: getattr(exp, key) for key in RUN}
        prompts = config.to_dict(exp)["prompt"]
        given = source if self.task.inputs == "given" else None
        result = self._session_of(exp).run(prompts, given, **asked, seed=item.seed)
        return to_pil(result.images["edit"])[0]

    def _session_of(self, exp: Experiment) -> Any:
        """The session of the last item, or a new one where an option has changed."""
        from inlay import Session

        options, session = self._session
        if session is None or options != exp.plugins:
            session = Session(self.pipelines(exp), exp.plugins, exp.scheduler)
            self._session = (exp.plugins, session)
        return session


def build(names: Sequence[str], task: Task, overrides: Sequence[str] = ()) -> list[Method]:
    """The methods of `names` in order, then the sanity rows that were not among them.

    Raises ConfigError for an unknown experiment, and for two methods of one name.
    """
    pipelines = Pipelines()
    shipped = config.from_dict({"model": task.model}, [w for w in overrides if _of_model(w)])
    known: dict[str, Any] = {"copy": Copy, "vae": lambda: RoundTrip(shipped, pipelines)}
    made: dict[str, Method] = {}
    for name in [*names, *(row for row in SANITY if row not in names)]:
        method = known[name]() if name in known else Edit(name, task, overrides, pipelines)
        if method.name in made:
            fix = "Give every experiment a file name of its own."
            raise ConfigError(f"two methods are called '{method.name}'", where="methods", fix=fix)
        made[method.name] = method
    return list(made.values())


def drawer(task: Task, overrides: Sequence[str] = ()) -> Edit:
    """What draws the inputs of a task whose items have none: text to image, nothing else."""
    plain = Task(run={"prompt.edit": "source"}, inputs="drawn", model=task.model, name=task.name)
    return Edit("t2i", plain, [f"model={task.model}", *overrides], Pipelines())


def weights_of(exp: Experiment) -> dict[str, str]:
    """The digest of a local model's weights; of a hub name, nothing beyond its revision."""
    folder = registry.resolve_model(exp.model)
    return {"weights": manifest.hash_weights(folder)} if Path(folder).is_dir() else {}


def _of_model(override: str) -> bool:
    return override.split("=")[0] in ("model", "dtype", "device", "offload", "revision")
