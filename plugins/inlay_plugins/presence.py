"""Presence: is the subject in the picture? Asked while it is still in the making, and at the end.

Add-it may leave the picture as it was. Such a run can be told at the step that blends: the clean
estimate already shows the object by then, or never will.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay import ConfigError, Needs, Plugin, Result, Run, Step, Stopped, hookimpl
from inlay_plugins import clips, detection
from inlay_plugins.schedules import step_index

THRESHOLDS = {"clip": 0.0, "grounding_dino": 0.4}


class Presence(Plugin):
    """Publishes `presence:scores`, one per picture of the edit; the manifest has them as well, and
    the `best`: of the pictures that show the subject the one that fits prompt.edit best.

    With `stop`, raises Stopped at its step when no picture shows the subject, for a ladder to try
    something else (docs/scenes.md). loaded: a Clip or GroundingDino made in code.
    """

    @dataclass
    class Config:
        """detector: clip scores how much nearer a picture is to prompt.edit than to prompt.source,
        a difference of cosines; grounding_dino the surest box of the `subject`, in 0..1. model: a
        folder or hub name; "": the toybox's CLIP, the published Grounding-DINO. threshold: the
        least score of a picture that shows the subject; null: 0 for clip, 0.4 for grounding_dino.
        step: where the clean estimate is looked at, if stop: end there a run without the subject.
        """

        detector: Literal["clip", "grounding_dino"] = "clip"
        model: str = ""
        subject: str = ""
        threshold: float | None = None
        step: Any = 0.5
        stop: bool = False

    def __init__(self, cfg: Any = None, name: str = "", loaded: Any = None) -> None:
        super().__init__(cfg, name)
        self.loaded = loaded

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, where = self.cfg, f"plugins.{need.owner}"
        self.step = step_index(cfg.step, need.request.steps, f"{where}.step")
        self.least = THRESHOLDS[cfg.detector] if cfg.threshold is None else cfg.threshold
        if cfg.detector == "grounding_dino" and not cfg.subject:
            raise ConfigError("no words to look for", where=f"{where}.subject", fix="Give them.")
        if cfg.detector == "clip" and not need.request.prompt["source"]:
            raise ConfigError("CLIP needs a text without the subject", where="prompt.source",
                              fix="Say what the picture shows before the edit.")  # fmt: skip
        need.publish("presence:scores")

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        """A missing network is told before the first step; networks stay for the next run."""
        if self.loaded is None:
            name, device = self.cfg.model, str(run.device)
            if self.cfg.detector == "clip":
                self.loaded = clips.load(name or "toybox/clip", device)
            else:
                self.loaded = detection.grounding_dino(name or detection.GROUNDING_DINO, device)

    @hookimpl
    def inlay_post_step(self, run: Run, step: Step) -> None:
        here = (step.pass_, step.index, step.last_eval) == ("edit", self.step, True)
        if not (here and self.cfg.stop and "edit" in step.lanes and run.backbone.decodes):
            return
        scores, _ = self.look(run, run.backbone.decode(step.x0["edit"].detach(), run.size))
        if max(scores) < self.least:
            seen = ", ".join(f"{score:.2f}" for score in scores)
            problem = f"no picture shows the subject at step {step.index} (scores {seen})"
            told = {"where": f"plugins.{self.name}", "fix": "Try another seed, or a ladder."}
            raise Stopped(problem, scores=scores, step=step.index, **told)

    @hookimpl
    def inlay_final(self, run: Run, result: Result) -> None:
        if "edit" in result.images:
            scores, fits = self.look(run, result.images["edit"])
            run.board["presence:scores"] = torch.tensor(scores)
            best = max(range(len(fits)), key=lambda k: (scores[k] >= self.least, fits[k]))
            present = max(scores) >= self.least
            result.record["presence"] = {"scores": scores, "present": present, "best": best}

    @torch.no_grad()
    def look(self, run: Run, pictures: Tensor) -> tuple[list[float], list[float]]:
        """Scores of pictures `n 3 h w` in 0..1, and how well each fits the whole prompt.edit: where
        the source was lost, scores are high too."""
        if self.cfg.detector == "grounding_dino":
            found = [self.loaded.surest(p, self.cfg.subject, 0.0) for p in pictures.float()]
            scores = [surest[0] if surest else 0.0 for surest in found]
            return scores, scores
        side = [self.loaded.side] * 2
        square = F.interpolate(pictures.float(), side, mode="bilinear", antialias=True)
        texts = self.loaded.texts([run.prompts["edit"], run.prompts["source"]])
        edit, source = (self.loaded.images(square.clamp(0, 1)) @ texts.T).unbind(1)
        return (edit - source).tolist(), edit.tolist()
