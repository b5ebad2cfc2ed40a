"""An experiment from its configuration to a plan or a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from inlay import backbones
from inlay.cli import insertion
from inlay.cli.trace import Tracer
from inlay.events import Result
from inlay.plan import Plan
from inlay.session import Session
from inlay_attention import Store
from inlay_config import config, images, registry
from inlay_config.config import Experiment
from inlay_config.errors import ConfigError

RUN = ("guidance", "true_cfg", "size", "n", "steps", "seed")


def run(experiment: str, overrides: Sequence[str] = ()) -> Result:
    """`inlay.run("addit", ["prompt.edit=a dog on the grass"])`: a packaged name or a YAML path.
    Raises ConfigError for a scene, which has several results."""
    from inlay.cli.ladder import climb

    loaded = config.load(experiment, overrides)
    if loaded.scene:
        fix = "Run it on the command line: inlay run NAME --out DIR."
        raise ConfigError("a scene has a result for each object", where="scene", fix=fix)
    return climb(loaded)


def execute(
    exp: Experiment,
    callback: Callable[[dict[str, Any]], None] | None = None,
    tracer: Tracer | None = None,
    pipe: Any = None,
) -> Result:
    """Run an experiment; the result's manifest repeats it. pipe: see `load`, None: loaded here."""
    asked = {key: getattr(exp, key) for key in RUN}
    prompts, pictures = config.to_dict(exp)["prompt"], (exp.input.image, exp.input.mask)
    session = _session(exp, exp.model if pipe is None else pipe, tracer)
    result = session.run(prompts, *pictures, **asked, callback=callback)
    result.record["experiment"] = config.to_dict(exp)
    result.record["folder"] = registry.resolve_model(exp.model)
    return result


def load(exp: Experiment) -> Any:
    """The pipeline of an experiment, for several runs of it."""
    folder = registry.resolve_model(exp.model)
    return backbones.load(folder, exp.dtype, exp.device, exp.offload, exp.revision)


def plan_experiment(exp: Experiment, load_layer: insertion.Load | None = None) -> Plan:
    """The plan of an experiment; no weight is loaded. load_layer: see `insertion.first`."""
    return planned(exp, load_layer)[1]


def planned(exp: Experiment, load_layer: insertion.Load | None = None) -> tuple[Session, Plan]:
    """A session on the bare skeleton of the model, and the plan it made; of a scene, for its first
    object."""
    exp = insertion.first(exp, load_layer)
    pipe = backbones.skeleton(registry.resolve_model(exp.model), exp.revision, exp.dtype)
    given = {kind: path for kind, path in vars(exp.input).items() if path}
    shape = images.open_image(given["image"]).size[::-1] if "image" in given else None
    session = _session(exp, pipe)
    return session, session.plan(exp, shape, list(given))


def _session(exp: Experiment, pipe: Any, tracer: Tracer | None = None) -> Session:
    place: dict[str, Any] = {"dtype": exp.dtype, "device": exp.device, "offload": exp.offload}
    place |= {"revision": exp.revision, "resolve": exp.resolve, "tracer": tracer}
    place |= {"gradient": exp.gradient, "compile": exp.compile}
    place["store"] = Store(**vars(exp.store)) if exp.store.path else None
    return Session(pipe, exp.plugins, exp.scheduler, **place)
