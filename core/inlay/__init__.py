"""inlay: a plugin-based research framework for editing pictures with diffusion models.

The one public import. Names load when first used, since `inlay --help` must not need torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay_attention import AttnEdits, Held, Rows, project_kv  # isort: skip
    from inlay_config.errors import ConfigError, InlayError, InputError, ModelError  # isort: skip
    from inlay_config.errors import PlanConflict, PluginError, SeamMissed, Stopped  # isort: skip
    from inlay_config.images import open_image  # isort: skip
    from inlay_config.registry import read_checkpoint, resolve_model  # isort: skip
    from inlay_guest import attach, denoiser  # isort: skip

    from .backbones.levels import tabulate
    from .backbones.text import Cond
    from .cli.experiment import run
    from .events import AttnSite, Lane, Plugin, Result, Step, Window
    from .frames import Frame
    from .hookspecs import hookimpl
    from .plan import Needs, Plan
    from .session import Run, Session

__all__ = [
    "AttnEdits", "AttnSite", "Cond", "ConfigError", "Frame", "Held", "InlayError", "InputError",
    "Lane", "ModelError", "Needs", "Plan", "PlanConflict", "Plugin", "PluginError", "Result",
    "Rows", "Run", "SeamMissed", "Session", "Step", "Stopped", "Window", "attach", "denoiser",
    "hookimpl", "open_image", "project_kv", "read_checkpoint", "resolve_model", "run", "tabulate",
]  # fmt: skip
HOMES = "hookspecs frames events plan session backbones.levels backbones.text cli.experiment"


def __getattr__(name: str) -> Any:
    homes = [f"inlay_config.{home}" for home in ("errors", "images", "registry")]
    homes += ["inlay_attention", *(f"inlay.{home}" for home in HOMES.split()), "inlay_guest"]
    for home in homes if name in __all__ else ():
        if name in (names := vars(import_module(home))):
            return names[name]
    raise AttributeError(f"module 'inlay' has no attribute {name!r}")
