"""Rows that frozen networks have seen once, where they are the most of a training's work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import default_collate

from inlay_config.errors import InputError
from inlay_config.images import whole
from inlay_train.recipe import Data, Sample

Rows = dict[str, Tensor]

LATER = {"later": True}
"""Of a field that settings did not have at first. Rows that were encoded before are still known
where it is 0, which must mean as before."""


def told(settings: Any) -> dict[str, Any]:
    """A dataclass as the identity of encoded rows names it."""
    values = asdict(settings)
    absent = {f.name for f in fields(settings) if f.metadata == LATER and not values[f.name]}
    return {name: value for name, value in values.items() if name not in absent}


class Encoded:
    """Rows of tensors by name, float16 in memory. A row that could not be drawn stays broken."""

    def __init__(self, rows: Rows, broken: dict[int, str]) -> None:
        self.rows, self.broken = rows, broken

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        if index in self.broken:
            raise InputError("cannot be read", where=self.broken[index])
        return {name: rows[index].float() for name, rows in self.rows.items()}


@torch.no_grad()
def encode(
    data: Data, encoder: Callable[[Sample], Rows], file: Path, identity: str, chunk: int = 32
) -> Encoded:
    """Draw every row once and encode it, or read them back from `file` where it has the same
    `identity`. encoder: a batch of rows to tensors `b …`.
    """
    if file.exists():
        with safe_open(file, "pt") as stored:
            told = stored.metadata() or {}
            if told.get("identity") == identity:
                rows = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                known = json.loads(told["broken"])
                return Encoded(rows, {int(index): name for index, name in known.items()})
    parts, broken = list[Rows](), dict[int, str]()
    for first in range(0, len(data), chunk):
        drawn = list[Sample]()
        for index in range(first, min(first + chunk, len(data))):
            drawn.append(row(data, index, broken))
        parts.append({k: v.half().cpu() for k, v in encoder(default_collate(drawn)).items()})
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        save_file(rows, partial, {"identity": identity, "broken": json.dumps(broken)})
    return Encoded(rows, broken)


def row(data: Data, index: int, broken: dict[int, str]) -> Sample:
    """A row, or in place of a broken one, which is noted, the next that can be drawn."""
    for further in range(len(data)):
        at = (index + further) % len(data)
        try:
            return data.draw(at, np.random.default_rng([at, 4]))
        except InputError as error:
            if not further:
                broken[index] = str(error)
            last = error
    raise InputError("not one row can be read", where=last.where) from last
