"""Guidance by one of diffusers' guiders: what they make of a text and a null prediction.

Adaptive projected guidance (Sadat et al. 2024), CFG-Zero* (Fan et al. 2025), tangential damping
CFG (Kwon et al. 2025), frequency-decoupled guidance (Sadat et al. 2025) and others are classes of
`diffusers.guiders` that are functions of these two predictions, and of what they saw before.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from diffusers import guiders
from torch import Tensor

from inlay import ConfigError, Needs, Plugin, Run, Step, hookimpl

TWO = ["pred_cond", "pred_uncond"]
PICTURES = ("FrequencyDecoupledGuidance",)  # its pyramid wants latents `b c h w`
MATRICES = ("MagnitudeAwareGuidance",)  # its norm wants two axes beside the batch


def pure() -> dict[str, type]:
    """Guiders by name that ask for the two predictions alone, and change no model meanwhile."""
    plain = guiders.BaseGuidance.prepare_models
    return {
        name: cls
        for name, cls in vars(guiders).items()
        if getattr(cls, "_input_predictions", None) == TWO and cls.prepare_models is plain
    }


class Guider(Plugin):
    """Combines the predictions of every lane that has a null branch (a scale above 1)."""

    @dataclass
    class Config:
        """name: a class of diffusers.guiders. options: of its constructor; guidance_scale is the
        lane's own unless it is given here.
        """

        name: str = "AdaptiveProjectedGuidance"
        options: dict[str, Any] = field(default_factory=dict)

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        name, where = self.cfg.name, f"plugins.{need.owner}"
        known = pure()
        if name not in known:
            asked = getattr(getattr(guiders, name, None), "_input_predictions", None)
            more = [p for p in asked or () if p not in TWO]
            problem = f"no guider {name!r} of diffusers"
            if asked:
                what = f"the prediction {more[0]}" if more else "a changed model"
                problem = f"{name} needs {what}: no function of two predictions"
            raise ConfigError(problem, where=f"{where}.name", fix=f"One of {', '.join(known)}.")
        self.cls, self.guiders = known[name], dict[str, Any]()
        wanted = inspect.signature(self.cls).parameters
        for option in self.cfg.options:
            if option not in wanted:
                fix = f"It has {', '.join(wanted)}."
                raise ConfigError("unknown key", where=f"{where}.options.{option}", fix=fix)
        self._make(1.0, f"{where}.options")

    @hookimpl
    def inlay_begin(self) -> None:
        self.guiders.clear()  # some remember the steps before

    @hookimpl
    def inlay_combine(
        self, run: Run, step: Step, lane: str, text: Tensor, null: Tensor | None, scale: float
    ) -> Tensor | None:
        if null is None:
            return None
        if lane not in self.guiders:
            self.guiders[lane] = self._make(scale, f"plugins.{self.name}.options")
        guider = self.guiders[lane]
        guider.set_state(step.index, step.total, step.t)
        packed = self.cfg.name in PICTURES and text.dim() == 3
        flat = self.cfg.name in MATRICES and text.dim() > 3
        pair = tuple(
            run.backbone.unpack(p, run.size) if packed else p.flatten(2) if flat else p
            for p in (text, null)
        )
        combined: Tensor = guider(guider.prepare_inputs({"noise_pred": pair})).pred
        return run.backbone.pack(combined) if packed else combined.view_as(text)

    def _make(self, scale: float, where: str) -> Any:
        """The guider, at a lane's scale where it has one and none is given."""
        scaled = "guidance_scale" in inspect.signature(self.cls).parameters
        options = ({"guidance_scale": scale} if scaled else {}) | self.cfg.options
        try:
            return self.cls(**options)
        except (TypeError, ValueError) as error:
            raise ConfigError(" ".join(str(error).split()), where=where) from error
