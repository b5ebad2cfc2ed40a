"""How a lane's predictions become one model output when no plugin says otherwise."""

from __future__ import annotations

from torch import Tensor

from .hookspecs import hookimpl


@hookimpl(trylast=True)
def inlay_combine(text: Tensor, null: Tensor | None, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6) in diffusers' order of operations."""
    return text if null is None else null + scale * (text - null)
