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

ANEW = "Record anew: give another path, or delete this one."
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
    _facts: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _fresh: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _size: int = field(default=0, init=False, repr=False)

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
                raise InputError(problem, where="store.path", fix=ANEW) from error

    def open(self, facts: Mapping[str, str]) -> None:
        """A run begins. Raises InputError where it differs from the one that was recorded."""
        self._facts, self._fresh, self._size = dict(facts), {}, 0
        for name, known in self.facts.items():
            if known != facts.get(name):
                problem = f"recorded with {name} {known}, this run has {facts.get(name, 'none')}"
                raise InputError(problem, where="store", fix=ANEW)

    def get(self, key: str) -> Tensor:
        """Raises InputError for what was not recorded."""
        if key not in self.tensors:
            raise InputError(f"it holds no {key}", where="store", fix=ANEW)
        return self.tensors[key]

    def put(self, key: str, tensor: Tensor, cast: bool = False) -> None:
        """Keep a copy; cast: to the store's dtype. Raises ConfigError when the budget is spent."""
        dtype = getattr(torch, self.dtype) if self.dtype and cast else tensor.dtype
        self._fresh[key] = tensor.detach().to(self.device, dtype, copy=True).contiguous()
        self._size += self._fresh[key].nbytes
        self.afford(self._size)

    def afford(self, size: int) -> None:
        """Raises ConfigError when `size` bytes are more than the budget."""
        if size > self.limit:
            problem = f"{size:,} bytes are more than the budget of {self.limit:,}"
            fix = "Raise it, set store.dtype: bfloat16, or let edits act at fewer sites and steps."
            raise ConfigError(problem, where="store.budget", fix=fix)

    def close(self) -> None:
        """The run that records is complete; on disk its store appears whole or not at all."""
        self.facts, self.tensors = self._facts, self._fresh
        if self.path:
            path = Path(self.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                save_file(self.tensors, beside, metadata={"inlay": json.dumps(self.facts)})
                beside.replace(path)
            except (OSError, SafetensorError) as error:
                beside.unlink(missing_ok=True)
                fix = "Free space, or give another path."
                problem = f"cannot be written: {error}"
                raise InputError(problem, where="store.path", fix=fix) from error
