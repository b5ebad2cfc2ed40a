"""Errors for people: what was wrong, where, and what to do. No traceback is shown for any of these."""

from __future__ import annotations


class InlayError(Exception):
    """A mistake the user can correct: `where: problem. fix`.

    problem: what is wrong, in one clause. where: YAML path, plugin, event, step or site. fix: what to do about it.
    """

    def __init__(self, problem: str, *, where: str = "", fix: str = "") -> None:
        self.problem, self.where, self.fix = problem, where, fix
        sentence = problem if problem.endswith((".", "!", "?")) else f"{problem}."
        super().__init__(f"{where + ': ' if where else ''}{sentence}{' ' + fix if fix else ''}")


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
