"""The store: tensors that one run leaves for later ones, in memory or in a safetensors file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inlay_config.errors import ConfigError, InputError

UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(eq=False)
class Store:
    """Empty, it records; with something in it, it is replayed.

    path: a file, read where it exists and written by the run that records. device: where tensors
    wait. dtype: of queries, keys and values; null is the model's, and exact. budget: bytes, or a
    text such as "2 GiB". sites, steps: record more than this run's edits take: a pattern of site
    names, a window. Raises ConfigError for options that cannot work, InputError for a broken file.
    """

    path: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    budget: int | str = "2 GiB"
    sites: str = ""
    steps: Any = None
    facts: dict[str, str] = field(default_factory=dict, init=False)
    tensors: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        parts = re.fullmatch(r"([\d.]+) *([KMG]?i?B?)", str(self.budget), re.IGNORECASE)
        if not parts or parts[2].upper() not in UNITS:
            fix = 'Write bytes, or a text such as "2 GiB".'
            raise ConfigError(f"{self.budget!r} is no size", where="store.budget", fix=fix)
        self.limit = int(float(parts[1]) * UNITS[parts[2].upper()])
        if self.dtype not in (None, "float32", "float16", "bfloat16"):
            fix = "Use float32, float16, bfloat16 or null."
            raise ConfigError(f"{self.dtype!r} cannot be used", where="store.dtype", fix=fix)
        if self.path and Path(self.path).exists():
            try:
                with safe_open(self.path, "pt", device=self.device) as file:
                    self.facts = json.loads((file.metadata() or {})["inlay"])
                    self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                problem = f"{self.path} is no store: {' '.join(str(error).split())}"
                fix = "Give another path, or delete it to record anew."
                raise InputError(problem, where="store.path", fix=fix) from error

    def waiting(self, tensor: Tensor, cast: bool = True) -> Tensor:
        """A copy of its own, where and as tensors wait; cast: to the store's dtype."""
        dtype = getattr(torch, self.dtype) if self.dtype and cast else tensor.dtype
        return tensor.detach().to(self.device, dtype, copy=True).contiguous()

    def fill(self, facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
        """What a run recorded, once it is complete; on disk it appears whole or not at all."""
        self.facts, self.tensors = dict(facts), dict(tensors)
        if self.path:
            path = Path(self.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                save_file(self.tensors, beside, metadata={"inlay": json.dumps(self.facts)})
                beside.replace(path)
            except (OSError, SafetensorError) as error:
                beside.unlink(missing_ok=True)
                fix = "Free space or give another path; the result itself is kept."
                raise InputError(
                    f"cannot be written: {error}", where="store.path", fix=fix
                ) from error
