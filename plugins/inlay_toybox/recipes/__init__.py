"""Recipes of the models, by name: each module trains one model within a number of minutes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay_toybox import path


@dataclass(frozen=True)
class Recipe:
    """Where a recipe is and which shipped model it goes on from.

    Attributes:
        function: ``module:function`` in this package.
        start: folder below ``models/`` whose weights ``--resume`` trains further when ``--out`` has
            no state.
    """

    function: str
    start: str

    @property
    def model(self) -> Path:
        """The shipped model's folder in its stock layout, whether there already or not."""
        name, *part = self.start.split("/")
        return path(name).joinpath(*part)

    def load(self) -> Callable[..., Path]:
        """The function ``train(minutes, out, device, …)``, which returns the model's folder."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)


RECIPES: dict[str, Recipe] = {
    "vae": Recipe("vae:train", "flux/vae"),
    "flux": Recipe("flux:train", "flux"),
    "distil": Recipe("distil:train", "flux"),
    "detector": Recipe("detector:train", "detector"),
    "sd": Recipe("sd:train", "sd"),
    "clip": Recipe("clip:train", "clip"),
    "judge": Recipe("judge:train", "judge"),
    "ddpm": Recipe("ddpm:train", "ddpm"),
    "sam2": Recipe("sam2:train", "sam2"),
}


def accepted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments that a recipe's signature takes."""
    names = inspect.signature(function).parameters
    return {key: value for key, value in offered.items() if key in names}
