"""Edits of attention as data, and the seam through which they reach any model that calls SDPA.

Knows nothing of plugins, plans or loops: `AttnEdits` collects edits by branch, `SiteProgram` lowers
those of one site to fused calls, `Seam` runs programs inside an unmodified model.
"""

from .algebra import AttnEdits, Edit, Held, How, Key, Keys, Op, Probe, Rows, Span, lane_of
from .lowering import SiteProgram, calls, cat
from .seam import Seam, attention_modules, project_kv
from .store import Store

__all__ = [
    "AttnEdits", "Edit", "Held", "How", "Key", "Keys", "Op", "Probe", "Rows", "Seam",
    "SiteProgram", "Span", "Store", "attention_modules", "calls", "cat", "lane_of", "project_kv",
]  # fmt: skip
