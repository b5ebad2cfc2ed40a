"""Checkpoints: one safetensors file, written beside the last one and renamed, so that a kill or a
full disk leaves the last one whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inlay_config.errors import InputError
from inlay_config.images import whole
from inlay_train.recipe import TrainingError

NAME = "checkpoint.safetensors"
Weights = dict[str, nn.Parameter]


def write(
    folder: Path,
    step: int,
    weights: Weights,
    average: list[Tensor],
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
) -> Path:
    """Write weights, their average, the optimizer's state, the step and `facts` (plain data).

    Random numbers need none: they are a function of seed and step. Raises TrainingError when there
    is no room; the checkpoint before stays.
    """
    state = optimizer.state_dict()["state"]
    tensors = {f"weights.{name}": p.detach() for name, p in weights.items()}
    tensors |= {f"average.{name}": a for name, a in zip(weights, average, strict=True)}
    for index, values in state.items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    file = folder / NAME
    try:
        with whole(file) as partial:
            save_file(tensors, partial, {"step": str(step), "facts": json.dumps(facts)})
            descriptor = os.open(partial, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except (OSError, SafetensorError) as error:
        fix = _last(file) + " Make room and go on with --resume."
        raise TrainingError(
            f"no checkpoint could be written in step {step}: {error}", where=str(file), fix=fix
        ) from error
    return file


def read(
    folder: Path, weights: Weights, average: list[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]]:
    """Put back what `write` wrote -> step and facts; (0, {}) where nothing was written.

    Raises InputError for a damaged file and for one of another model.
    """
    file = folder / NAME
    if not file.exists():
        return 0, {}
    try:
        with safe_open(file, "pt") as stored:
            told = stored.metadata()
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        step, facts = int(told["step"]), json.loads(told["facts"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        fix = "Delete it to begin anew."
        raise InputError(f"damaged: {error}", where=str(file), fix=fix) from error
    _check(tensors, weights, file)
    with torch.no_grad():
        for (name, parameter), mean in zip(weights.items(), average, strict=True):
            parameter.copy_(tensors[f"weights.{name}"])
            mean.copy_(tensors[f"average.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "optimizer":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step, facts


def last(folder: Path) -> str:
    """A sentence about the checkpoint that is there."""
    return _last(folder / NAME)


def _last(file: Path) -> str:
    if not file.exists():
        return "There is no checkpoint yet."
    with safe_open(file, "pt") as stored:
        return f"The last good checkpoint is of step {stored.metadata()['step']}."


def _check(tensors: dict[str, Tensor], weights: Weights, file: Path) -> None:
    stored = {n.partition(".")[2]: t.shape for n, t in tensors.items() if n.startswith("weights.")}
    wanted = {name: parameter.shape for name, parameter in weights.items()}
    if stored != wanted:
        name = sorted(set(stored.items()) ^ set(wanted.items()))[0][0]
        problem = f"of another model: {name} is {stored.get(name)}, not {wanted.get(name)}"
        raise InputError(problem, where=str(file), fix="Choose another --out.")
