"""Names to plugin classes and models: registry.yaml for what ships here, entry points for others.

Listing imports nothing; a plugin's module is imported when a run uses it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from inlay_config.config import data_path, parse_plugin_config, read_yaml, suggest
from inlay_config.errors import ConfigError, ModelError, PluginError


def plugins() -> dict[str, dict[str, Any]]:
    """Plugins by name: class (`module:Class`), summary, needs, tested, maturity, source.

    Ours come first, and no third party's entry point (group `inlay`) can take a name of ours.
    """
    listed = {name: {**entry, "source": "inlay"} for name, entry in _shipped()["plugins"].items()}
    for point in sorted(entry_points(group="inlay")):
        source = point.dist.name if point.dist else ""
        listed.setdefault(point.name, {"class": point.value, "source": source})
    return listed


def plugin_class(name: str, where: str = "") -> type:
    """Import and return the class registered as `name`; `where` is the YAML path for the error."""
    entry = _shipped()["plugins"].get(name)  # ours first: others take a search
    if entry is None and (entry := (known := plugins()).get(name)) is None:
        path = where or f"plugins.{name}"
        raise ConfigError(f"no plugin '{name}'", where=path, fix=suggest(name, known))
    module, _, attribute = entry["class"].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        fix = f"Reinstall {entry.get('source', 'inlay') or 'its package'}."
        raise PluginError(
            f"cannot be imported: {error}", where=f"plugin {name}", fix=fix
        ) from error


def build(name: str, options: Mapping[str, Any] | None) -> Any:
    """The plugin listed as `name` (or as its option `use`), its options parsed."""
    where = f"plugins.{name}"
    cls = plugin_class(str((options or {}).get("use", name)), where)
    return cls(parse_plugin_config(cls, options, where), name)


def models() -> dict[str, dict[str, Any]]:
    """Models that ship with the package: name -> family, summary, and where its folder is found."""
    return _shipped()["models"]


def downloads() -> dict[str, dict[str, Any]]:
    """What can be fetched: name -> function ("module:function"), summary, licence."""
    return _shipped()["downloads"]


def fetch(name: str) -> Path:
    """Fetch the weights registered as `name`; where they are."""
    if name not in downloads():
        raise ModelError(f"nothing to fetch is called '{name}'", fix=suggest(name, downloads()))
    module, _, function = downloads()[name]["function"].partition(":")
    return Path(getattr(importlib.import_module(module), function)())


def resolve_model(name: str, where: str = "model", holds: str = "model_index.json") -> str:
    """The folder of a shipped or local model, or a hub name (`owner/name`), for `from_pretrained`,
    or a checkpoint file of Stable Diffusion's original program.

    where: the YAML path for errors; holds: the file that makes a folder one of these, config.json
    for a single network. Raises ModelError for an unknown name, a folder without that file, and
    pickled weights.
    """
    if name in models():
        module, _, function = models()[name]["path"].partition(":")
        finder = getattr(importlib.import_module(module), function)
        try:
            folder = Path(finder(models()[name]["argument"]))
        except OSError as error:  # some are unpacked into the cache
            fix = "Make room there, or set INLAY_CACHE to a folder that can be written to."
            raise ModelError(f"'{name}' has no place: {error}", where=where, fix=fix) from error
    elif Path(name).is_dir():
        folder = Path(name)
    elif holds == "model_index.json" and Path(name).is_file():
        if Path(name).suffix in (".ckpt", ".pt", ".safetensors"):
            return name
        fix = "Give a folder of diffusers, a hub name, or a checkpoint (.safetensors, .ckpt)."
        raise ModelError(f"'{name}' is no model", where=where, fix=fix)
    elif re.fullmatch(r"(?!toybox/)\w[\w.-]*/\w[\w.-]*", name):
        return name
    else:
        raise ModelError(f"no model '{name}'", where=where, fix=suggest(name, models()))
    if not (folder / holds).is_file():
        fix = f"Give a folder written by save_pretrained that holds {holds}."
        raise ModelError(f"no {holds} in '{folder}'", where=where, fix=fix)
    for part in folder.glob("*/") if holds == "model_index.json" else (folder,):
        kinds = {file.suffix for file in part.iterdir()}
        if ".safetensors" not in kinds and kinds & {".bin", ".ckpt", ".pt", ".pth"}:
            fix = "Convert the weights: a pickle can run code and is never loaded."
            raise ModelError(f"'{part}' is not safetensors", where=where, fix=fix)
    return str(folder)


def read_checkpoint(path: Path, fix: str) -> dict[str, Any]:
    """Tensors by name, or tables of them, of a safetensors or pickled file, and nothing else of it:
    see `checkpoint_files.read`. Raises ModelError that names the file and says `fix`."""
    from inlay_config import checkpoint_files  # which imports torch

    return checkpoint_files.read(path, fix)


@cache
def _shipped() -> dict[str, dict[str, Any]]:
    return OmegaConf.to_container(read_yaml(data_path("registry.yaml")))  # type: ignore[return-value]
