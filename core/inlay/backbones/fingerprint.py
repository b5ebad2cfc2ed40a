"""Short names by which a model, a scheduler or a tensor is known again."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn


def model(denoiser: nn.Module) -> str:
    """The class and a digest of a few numbers of every weight."""
    few = [p.detach().flatten()[:8] for p in denoiser.parameters()]
    return f"{type(denoiser).__name__} {digest(torch.cat(few))}"


def scheduler(solver: Any) -> str:
    """The class and a digest of its configuration."""
    settings = repr(sorted((key, str(value)) for key, value in solver.config.items()))
    return f"{type(solver).__name__} {hashlib.sha256(settings.encode()).hexdigest()[:12]}"


def digest(x: Tensor) -> str:
    """Twelve hexadecimal digits of all values."""
    return hashlib.sha256(x.detach().float().cpu().numpy().tobytes()).hexdigest()[:12]
