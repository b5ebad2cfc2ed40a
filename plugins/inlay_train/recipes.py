"""Recipes by name, and the YAML files that say how they are run."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from inlay_config.config import data_path, parse_plugin_config, read_yaml, suggest
from inlay_config.errors import ConfigError
from inlay_train.recipe import Recipe

RECIPES = {
    "instruct_pix2pix": "inlay_train.instruct_pix2pix:InstructPix2Pix",
    "magicbrush": "inlay_train.magicbrush:MagicBrush",
    "erasedraw": "inlay_train.erasedraw:EraseDraw",
    "paint_by_example": "inlay_train.paint_by_example:PaintByExample",
    "mimicbrush": "inlay_train.mimicbrush:MimicBrush",
}


def listing() -> list[str]:
    """Names of the files that ship here."""
    return sorted(p.stem for p in (data_path("experiments") / "train").glob("*.yaml"))


def recipe_class(name: str) -> type[Recipe]:
    """The class of a recipe; other packages bring theirs by entry points (`inlay.recipes`)."""
    known = {point.name: point.value for point in entry_points(group="inlay.recipes")} | RECIPES
    if name not in known:
        raise ConfigError(f"no recipe '{name}'", where="recipe", fix=suggest(name, known))
    module, _, attribute = known[name].partition(":")
    found: type[Recipe] = getattr(importlib.import_module(module), attribute)
    return found


def load(name: str, overrides: Iterable[str] = ()) -> tuple[type[Recipe], Any]:
    """Class and settings of a shipped name or a YAML file, `key=value` over it.

    Raises ConfigError for an unknown name, key or type.
    """
    path = Path(name)
    if name in listing():
        path = data_path("experiments") / "train" / f"{name}.yaml"
    elif not (path.suffix in (".yaml", ".yml") and path.is_file()):
        raise ConfigError(f"no recipe file '{name}'", fix=suggest(path.stem, listing()))
    values: Any = OmegaConf.to_container(read_yaml(path))
    cls = recipe_class(str(values.pop("recipe", "")))
    words = list(overrides)
    if wrong := [word for word in words if "=" not in word]:
        raise ConfigError(f"'{wrong[0]}' is not an override", fix="Write key=value.")
    merged = OmegaConf.merge(OmegaConf.create(values), OmegaConf.from_dotlist(words))
    options: Any = OmegaConf.to_container(merged)
    return cls, parse_plugin_config(cls, options, path.name)
