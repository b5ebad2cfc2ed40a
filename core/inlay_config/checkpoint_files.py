"""Tensors of a published checkpoint file, and no code of it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from inlay_config.errors import ModelError

PROGRAMS = ("pytorch_lightning.", "lightning.")


class Left:
    """Stands for an object of a training program, such as a callback's state: nothing runs."""

    def __init__(self, *given: object, **named: object) -> None:
        pass


def read(path: Path, fix: str) -> dict[str, Any]:
    """What a ``.safetensors`` or any pickled file holds: tensors by name, or tables of them.

    Nothing but tensors is unpickled; what a training program (Lightning) left beside them becomes
    `Left`. Raises ModelError that names the file and says `fix`.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with safe_globals(_inert(path)):
            state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        missing = "Check the path; checkpoints are not part of a repository."
        raise ModelError("there is no such file", where=str(path), fix=missing) from error
    except pickle.UnpicklingError as error:
        problem = "it holds Python objects beside tensors, or is no checkpoint; nothing was run"
        raise ModelError(problem, where=str(path), fix=fix) from error
    except Exception as error:  # what is no pickle fails in any way it likes
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(f"cannot be read: {reason}", where=str(path), fix=fix) from error
    if not isinstance(state, dict):
        raise ModelError("it is not a table of tensors", where=str(path), fix=fix)
    return state


def _inert(path: Path) -> list[Any]:
    """Names of training programs in a checkpoint, each to be read as `Left`."""
    try:
        named = get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, OSError):  # an old file, or no checkpoint: `read` tells
        return []
    return [(Left, name) for name in named if name.startswith(PROGRAMS)]
