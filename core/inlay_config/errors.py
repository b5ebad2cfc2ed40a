"""Errors for people: what was wrong, where, what to do. The CLI shows them without a traceback."""

from __future__ import annotations


class InlayError(Exception):
    """A mistake the user can correct, told as `where: problem. fix`.

    where: YAML path, file, plugin, event, step or site.
    """

    def __init__(self, problem: str, *, where: str = "", fix: str = "") -> None:
        self.problem, self.where, self.fix = problem, where, fix
        place = f"{where}: " if where else ""
        super().__init__(f"{place}{problem.rstrip('.')}.{' ' + fix if fix else ''}")


class ConfigError(InlayError):
    """An experiment, an override or a plugin's options do not fit the schema."""


class PlanConflict(InlayError):
    """Two plugins ask for what cannot be composed; raised before the first step."""


class SeamMissed(InlayError):
    """A subscribed attention site was never reached by the model."""


class InputError(InlayError):
    """A picture, mask, prompt or output folder cannot be used."""


class PluginError(InlayError):
    """A plugin broke its contract (undeclared edit, wrong shape, missing value on the board)."""


class ModelError(InlayError):
    """A model cannot be found, trusted or driven."""


class Stopped(InlayError):
    """A plugin ended a run before its last step, on purpose. scores: how well each picture did, by
    which `inlay.cli.ladder` compares what it has tried; step: where it was."""

    def __init__(self, problem: str, *, scores: list[float], step: int, **told: str) -> None:
        super().__init__(problem, **told)
        self.scores, self.step = scores, step
