"""What a recipe is: models, data and a loss; and what the loop around it can be told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from inlay_config.errors import ConfigError, InlayError

Sample = dict[str, Any]
"""Of tensors, numbers and strings by name: one row of a batch, where tensors are stacked."""


class TrainingError(InlayError):
    """Training cannot go on: no finite loss, no room for a checkpoint."""


class Data(Protocol):
    """What is trained on. `draw` may raise InputError for a picture that cannot be read: it is
    counted, and another row takes its place."""

    def __len__(self) -> int: ...

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        """Row `index`, augmented by `rng` and nothing else, so that every run sees the same."""


@dataclass
class Training:
    """The loop. steps: updates of the weights in the whole run. batch: rows per process and
    backward pass; accumulate: backward passes per update. rate: of AdamW; warmup: steps in which it
    rises; decay: share of the run, at its end, in which it falls to nothing. clip: largest norm of
    the gradient. ema: decay of the averaged weights, (1 + n) / (10 + n) where that is less.
    precision: fp32, bf16, fp16. checkpoint, report: steps between two. workers: of the data, in
    processes."""

    steps: int = 10_000
    batch: int = 32
    accumulate: int = 1
    rate: float = 1e-4
    warmup: int = 0
    decay: float = 0.0
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.9999
    precision: str = "fp32"
    checkpoint: int = 500
    report: int = 50
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        whole = ("steps", "batch", "accumulate", "checkpoint", "report")
        wanted: list[tuple[str, bool, str]] = [
            *((key, getattr(self, key) >= 1, "1 or more") for key in whole),
            *((key, getattr(self, key) >= 0, "0 or more") for key in ("warmup", "workers", "seed")),
            ("rate", self.rate > 0, "above 0"),
            ("clip", self.clip > 0, "above 0"),
            ("decay", 0 <= self.decay <= 1, "0 to 1"),
            ("ema", 0 <= self.ema < 1, "at least 0 and below 1"),
            ("precision", self.precision in ("fp32", "bf16", "fp16"), "fp32, bf16 or fp16"),
        ]
        for key, good, want in wanted:
            if not good:
                value, fix = getattr(self, key), f"It must be {want}."
                raise ConfigError(f"{value!r} cannot be used", where=f"train.{key}", fix=fix)


class Recipe(nn.Module, ABC):
    """Models as submodules; those parameters are trained that ask for a gradient.

    A subclass has a dataclass `Config` of its own, with a field `train`; its YAML is checked
    against it.
    """

    @dataclass
    class Config:
        train: Training = field(default_factory=Training)

    cfg: Any

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg

    @abstractmethod
    def data(self, out: Path) -> Data:
        """What is trained on; `out` is for what is made of it once."""

    @abstractmethod
    def forward(self, batch: Sample) -> Tensor:
        """The loss, a scalar. Random numbers are torch's own, which are seeded before."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the models, whose weights are then the averaged ones, as a folder that stock
        libraries load."""

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def freeze(modules: Iterable[nn.Module]) -> None:
    """Take modules out of training."""
    for module in modules:
        module.requires_grad_(False).eval()
