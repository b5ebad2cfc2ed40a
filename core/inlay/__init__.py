"""inlay: a plugin-based research framework for editing pictures with diffusion models. This is the one public import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .edits import AttnEdits
    from .errors import ConfigError, InlayError, InputError, ModelError, PlanConflict, PluginError, SeamMissed
    from .events import AttnSite, Cond, Lane, ModelCall, Plugin, Preds, Result, Step, Window
    from .frames import Frame
    from .hookspecs import hookimpl
    from .plan import Needs, Plan
    from .session import Run, Session, run

_HOME = {
    "edits": ("AttnEdits",),
    "errors": ("ConfigError", "InlayError", "InputError", "ModelError", "PlanConflict", "PluginError", "SeamMissed"),
    "events": ("AttnSite", "Cond", "Lane", "ModelCall", "Plugin", "Preds", "Result", "Step", "Window"),
    "frames": ("Frame",),
    "hookspecs": ("hookimpl",),
    "plan": ("Needs", "Plan"),
    "session": ("Run", "Session", "run"),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_WHERE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Load on first use: `inlay --help` must not import torch."""
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(f"inlay.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'inlay' has no attribute {name!r}")
