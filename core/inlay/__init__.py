"""inlay: a plugin-based research framework for editing pictures with diffusion models.

The one public import. Names load when first used, since `inlay --help` must not need torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbones.schedulers import tabulate
    from .edits import AttnEdits
    from .errors import (
        ConfigError,
        InlayError,
        InputError,
        ModelError,
        PlanConflict,
        PluginError,
        SeamMissed,
    )
    from .events import AttnSite, Cond, Lane, Plugin, Result, Rows, Step, Window
    from .frames import Frame
    from .hookspecs import hookimpl
    from .plan import Needs, Plan
    from .session import Run, Session, run

__all__ = [
    "AttnEdits", "AttnSite", "Cond", "ConfigError", "Frame", "InlayError", "InputError", "Lane",
    "ModelError", "Needs", "Plan", "PlanConflict", "Plugin", "PluginError", "Result", "Rows", "Run",
    "SeamMissed", "Session", "Step", "Window", "hookimpl", "run", "tabulate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    homes = ("errors", "hookspecs", "events", "frames", "edits", "plan", "session",
             "backbones.schedulers")  # fmt: skip
    for home in homes if name in __all__ else ():
        module = import_module(f"inlay.{home}")
        if name in vars(module):
            return vars(module)[name]
    raise AttributeError(f"module 'inlay' has no attribute {name!r}")
