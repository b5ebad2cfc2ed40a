"""Experiments: YAML in one schema, layered by `extends` and overrides, checked before torch loads.

An experiment names registered plugins and models only: no key imports code, no resolver runs.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from inlay_config.errors import ConfigError

MAX_YAML_BYTES = 1 << 20
TEXT_KEYS = ("prompt.source", "prompt.edit", "prompt.negative", "subject")  # never read as YAML

COMPILE = ("backend", "dynamic", "fullgraph", "mode", "options", "recompile_limit", "regional")


@dataclass
class Prompt:
    """One prompt per lane, and the negative prompt that true CFG pushes away from."""

    source: str = ""
    edit: str = ""
    negative: str = ""


@dataclass
class Inputs:
    """Pictures to work on; relative paths start at the current folder."""

    image: str | None = None
    mask: str | None = None


@dataclass
class Gradient:
    """What is done with the gradient of the summed losses of all plugins, per picture."""

    apply: str = "x0"  # x0: move the clean estimate by sigma²/alpha; mean: the next latent by Sigma
    through: str | None = None  # model or x0 for all losses; null: as each plugin says
    scale: float = 1.0
    normalize: bool = False  # to unit root mean square
    clip: float | None = None  # largest L2 norm
    alpha_min: float = 0.1  # no loss while x holds less of the picture: x0 means nothing
    on_nonfinite: str = "raise"  # or skip the step
    checkpoint: bool = False  # recompute activations: less memory, more time

    def __post_init__(self) -> None:
        for key, known in (
            ("apply", ("x0", "mean")),
            ("through", (None, "model", "x0")),
            ("on_nonfinite", ("raise", "skip")),
        ):
            if (value := getattr(self, key)) not in known:
                fix = f"Use {' or '.join(str(k or 'null') for k in known)}."
                raise ConfigError(f"{value!r} cannot be used", where=f"gradient.{key}", fix=fix)


@dataclass
class Stored:
    """Lanes recorded in a file and replayed from it: see `inlay_attention.Store`."""

    path: str | None = None  # null: nothing is stored
    device: str = "cpu"
    dtype: str | None = None  # of keys and values; null is the model's
    budget: Any = "2 GiB"
    sites: str = ""  # a pattern of site names to keep besides those that edits take from
    steps: Any = None  # a window for them


@dataclass
class Experiment:
    """Everything a run depends on."""

    model: str = "toybox/flux"  # a name from `inlay models`, a folder, or a hub name
    revision: str | None = None  # a hub commit; branches move
    scheduler: str | None = None  # a diffusers class; null keeps the model's own
    dtype: str = "float32"
    device: str = "auto"
    offload: str = "none"
    compile: Any = False  # true, or torch.compile's options, and regional: true for blocks alone
    seed: int = 0
    steps: int = 28
    guidance: Any = 3.5  # one scale, or {lane: scale}
    true_cfg: float = 1.0
    size: Any = None  # pixels: null (the picture's, else the model's), a side, or [height, width]
    n: int = 1
    prompt: Prompt = field(default_factory=Prompt)
    subject: str = ""
    input: Inputs = field(default_factory=Inputs)
    plugins: dict[str, Any] = field(default_factory=dict)  # name: options, in execution order
    resolve: list[dict[str, str]] = field(default_factory=list)  # {site, winner} where edits clash
    gradient: Gradient = field(default_factory=Gradient)
    store: Stored = field(default_factory=Stored)
    ladder: list[dict[str, Any]] = field(default_factory=list)  # what to try next (docs/scenes.md)
    scene: list[dict[str, Any]] = field(default_factory=list)  # objects to insert one by one
    out: str | None = None

    def __post_init__(self) -> None:
        scales = self.guidance.values() if isinstance(self.guidance, dict) else [self.guidance]
        sides = self.size if isinstance(self.size, list) else [self.size, self.size]
        whole = [type(side) is int and side > 0 for side in sides]
        for key, good, want in (
            ("steps", self.steps >= 1, "1 or more"),
            ("n", self.n >= 1, "1 or more"),
            ("seed", 0 <= self.seed < 2**63, "0 to 2**63 - 1"),
            ("guidance", all(type(s) in (int, float) and s >= 0 for s in scales), "0 or more"),
            ("true_cfg", self.true_cfg >= 0, "0 or more"),
            ("size", whole == [True, True] or self.size is None, "a side, [height, width] or null"),
            ("dtype", re.fullmatch("float32|b?float16", self.dtype), "float32, float16, bfloat16"),
            ("device", re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device), "auto, cpu or cuda"),
            ("compile", _compiles(self.compile), f"true, false or some of {', '.join(COMPILE)}"),
            ("offload", self.offload in ("none", "model", "sequential"), "none, model, sequential"),
        ):
            if not good:
                value = getattr(self, key)
                raise ConfigError(f"{value!r} cannot be used", where=key, fix=f"It must be {want}.")
        for i, rule in enumerate(self.resolve):
            if set(rule) != {"site", "winner"}:
                fix = "Write {site: '*', winner: plugin}."
                raise ConfigError(f"{rule} is no rule", where=f"resolve[{i}]", fix=fix)


def _compiles(asked: Any) -> bool:
    return isinstance(asked, bool) or (isinstance(asked, dict) and asked.keys() <= set(COMPILE))


def load(
    name: str | Path, overrides: Iterable[str] = (), layer: Mapping[str, Any] | None = None
) -> Experiment:
    """The experiment of a packaged name (`addit`) or a YAML file, `layer` (plain data) and then
    `key=value` over it."""
    above = [("", OmegaConf.create(dict(layer)))] if layer else []
    return _build([*_layers(_find(str(name))), *above, *map(_override, overrides)])


def over(experiment: Experiment, layer: Mapping[str, Any]) -> Experiment:
    """Plain data over an experiment, key by key."""
    layers = [to_dict(experiment), dict(layer)]
    return _build([("", OmegaConf.create(values)) for values in layers])


def from_dict(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> Experiment:
    """The experiment of plain data, such as a manifest's; `from_dict(to_dict(e)) == e`."""
    return _build([("", OmegaConf.create(dict(values))), *map(_override, overrides)])


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """Plain data that YAML and JSON hold."""
    return asdict(experiment)


def data_path(name: str) -> Path:
    """`registry.yaml`, `experiments`: beside the package in a wheel, at the root of a clone."""
    beside = Path(__file__).parent / name
    return beside if beside.exists() else Path(__file__).parents[2] / name


def experiments() -> list[str]:
    """Names of the packaged experiments and of the presets among them."""
    root = data_path("experiments")
    found = [path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml")]
    return sorted(name for name in found if not name.startswith("train/"))  # those are recipes


def expand_presets(plugins: Mapping[str, Any], exp: Experiment | None = None) -> dict[str, Any]:
    """An entry named like a preset becomes that fragment's plugins, its options merged in.

    References such as ${subject} are to `exp`, an empty experiment if there is none.
    """
    expanded: dict[str, Any] = {}
    known = experiments()
    for name, values in plugins.items():
        where, group = f"plugins.{name}", {name: values}
        if not isinstance(values, Mapping | None):
            raise ConfigError(f"{values!r} is no mapping of options", where=where)
        if f"presets/{name}" in known:
            fragment = read_yaml(data_path("experiments") / "presets" / f"{name}.yaml").plugins
            merged = _merge(fragment, OmegaConf.create(dict(values or {})), where)
            around = replace(exp, plugins={}) if exp else Experiment()
            context = OmegaConf.merge(OmegaConf.structured(around), {"plugins": merged})
            options: Any = OmegaConf.to_container(context.plugins, resolve=True)
            group = {k: v for k, v in options.items() if v is not None}
        for key in expanded.keys() & group.keys():
            fix = f"Name the second otherwise and write `use: {key}` under it."
            raise ConfigError(f"plugin '{key}' is listed twice", where=where, fix=fix)
        expanded |= group
    return expanded


def parse_plugin_config(cls: type, values: Mapping[str, Any] | None, where: str) -> Any:
    """An instance of the plugin's nested `Config`; unknown keys, wrong types are refused."""
    schema = OmegaConf.structured(cls.Config)  # type: ignore[attr-defined]
    options = OmegaConf.create({str(k): v for k, v in (values or {}).items() if k != "use"})
    return _to_object(_merge(schema, options, where), where)


def read_yaml(path: Path) -> DictConfig:
    """A YAML mapping, read safely: no tag builds objects, no alias explodes, no key comes twice."""
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ValueError(f"more than {MAX_YAML_BYTES >> 20} MiB")
        if not isinstance(node := OmegaConf.load(path), DictConfig):
            raise ValueError("not a mapping of keys to values")
        return node
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"cannot be read: {message}", where=str(path)) from error


def suggest(name: str, known: Iterable[Any]) -> str:
    """`Did you mean 'x'?`, or the list of what is known."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(names)}."


def _find(name: str, beside: Path = Path()) -> Path:
    if name in experiments():
        return data_path("experiments") / f"{name}.yaml"
    path = beside / name
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    raise ConfigError(f"no experiment '{name}'", fix=suggest(Path(name).stem, experiments()))


def _layers(path: Path, children: tuple[Path, ...] = ()) -> Iterator[tuple[str, DictConfig]]:
    """The file and what it extends, oldest first."""
    if path.resolve() in children:
        raise ConfigError("this experiment extends itself", where=str(path))
    layer = read_yaml(path)
    if parent := layer.pop("extends", None):
        yield from _layers(_find(str(parent), path.parent), (*children, path.resolve()))
    yield str(path), layer


def _override(text: str) -> tuple[str, DictConfig]:
    key, equals, value = text.partition("=")
    if not (equals and re.fullmatch(r"[\w-]+(\.[\w-]+)*", key)):
        raise ConfigError(f"'{text}' is not an override", fix="Write key=value, such as seed=3.")
    layer = OmegaConf.create()
    try:
        if key in TEXT_KEYS:
            OmegaConf.update(layer, key, value)
        else:
            layer.merge_with_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"'{value}' is not a YAML value", where=key, fix="Quote it.") from error
    return "", layer


def _build(layers: Iterable[tuple[str, DictConfig]]) -> Experiment:
    config: DictConfig = OmegaConf.structured(Experiment)
    for file, layer in layers:
        for key in layer.keys() & {"prompt", "input", "plugins", "store", "gradient"}:
            if not isinstance(layer[key], DictConfig):
                raise ConfigError("must be a mapping", where=_join(file, key), fix="{key: value}")
        listed, config = config.plugins.keys(), _merge(config, layer, file)
        for name in [name for name, options in config.plugins.items() if options is None]:
            if name not in listed:
                where = _join(file, f"plugins.{name}")
                raise ConfigError("null drops a plugin, none is listed", where=where, fix="Use {}.")
            del config.plugins[name]
    experiment: Experiment = _to_object(config, "")
    experiment.plugins = expand_presets(experiment.plugins, experiment)
    return experiment


def _merge(base: DictConfig, layer: DictConfig, where: str) -> DictConfig:
    """`layer` over `base`, after a look for what experiments may not hold."""
    for key, value in _leaves(OmegaConf.to_container(layer)):
        if key.endswith("_target_") or "${" in re.sub(r"\$\{[\w.]+\}", "", str(value)):
            fix = "Name a registered plugin; only plain references such as ${steps} are followed."
            raise ConfigError("this could run code", where=_join(where, key), fix=fix)
        if key in TEXT_KEYS and isinstance(value, bool):
            raise ConfigError(f"{value} is not text", where=_join(where, key), fix="Quote it.")
    with _located(where):
        return OmegaConf.merge(base, layer)  # type: ignore[return-value]


def _to_object(config: DictConfig, where: str) -> Any:
    """The dataclass instance: references resolved, every number finite."""
    with _located(where):
        for key, value in _leaves(OmegaConf.to_container(config, resolve=True)):
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{value} is not a finite number", where=_join(where, key))
        return OmegaConf.to_object(config)


@contextmanager
def _located(where: str) -> Iterator[None]:
    """OmegaConf's errors as ours, with the YAML path."""
    try:
        yield
    except ConfigKeyError as error:
        path, known = _join(where, error.full_key), error.parent_node or ()
        raise ConfigError("unknown key", where=path, fix=suggest(error.key, known)) from error
    except (OmegaConfBaseException, TypeError) as error:
        path = _join(where, getattr(error, "full_key", ""))
        raise ConfigError(str(error).splitlines()[0], where=path) from error


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict | list | tuple):
        yield path, node
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _leaves(value, _join(path, str(key)))


def _join(where: str, key: Any) -> str:
    separator = ": " if where.endswith((".yaml", ".yml")) else "."
    return separator.join(filter(None, (where, key)))
