"""A task of plain coloured squares, methods and a measure that cost nothing: for the harness."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inlay_bench import runner, tasks
from inlay_bench.measures import Column, Evidence, Numbers, measure
from inlay_bench.methods import Method
from inlay_bench.runner import Evaluation
from inlay_bench.tasks import Item, Task, provider


@provider("test-squares")
def squares(
    seed: int, twice: bool = False, empty: bool = False, bare: bool = False
) -> Iterator[Item]:
    """Squares in shades of grey. twice: every id twice. empty: none. bare: without a picture."""
    for i in range(0 if empty else 1000):
        picture = None if bare else Image.new("RGB", (8, 8), (i % 200, seed % 200, 90))
        name = f"{i // 2 if twice else i:04d}"
        yield Item(name, picture, {"source": "a square", "target": f"square {i}"}, seed=i)


@measure(
    "test-brightness",
    "Light",
    Column("brightness", "brightness", "mean of the picture", mark="bright"),
    Column("gain", "gain", "of brightness; null for every third item", digits=2, unit="lm"),
)
def brightness(e: Evidence) -> Numbers:
    gain = float(e.picture.mean() - e.source.mean())
    third = int(e.item.id) % 3 == 0
    return {"brightness": float(e.picture.mean()), "gain": None if third else gain}


class Brighter(Method):
    """Adds light. fails: items on which it raises. pause: seconds it takes."""

    def __init__(
        self, name: str, light: int, fails: Sequence[int] = (), pause: float = 0.0
    ) -> None:
        self.name, self.light, self.fails, self.pause = name, light, fails, pause
        self.identity = {"method": {"light": light}}
        self.asked: list[str] = []

    def __call__(self, item: Item, source: Image.Image) -> Image.Image:
        self.asked.append(item.id)
        time.sleep(self.pause)
        if int(item.id) in self.fails:
            raise RuntimeError(f"cannot light {item.id}")
        noise = np.random.default_rng(item.seed).integers(0, 20)
        return Image.fromarray(
            np.minimum(np.asarray(source) + self.light + noise, 255).astype("u1")
        )


def task(**options: Any) -> Task:
    """The task of squares; `options` of its provider."""
    return Task(
        summary="make squares brighter",
        data=tasks.Data("test-squares", options),
        measures=["test-brightness"],
        name="squares",
    )


def method(name: str, pause: float = 0.0) -> Brighter:
    """plain and brighter work, flaky fails on two of its first ten items."""
    light, fails = {"plain": (10, ()), "brighter": (40, ()), "flaky": (20, (3, 7))}[name]
    return Brighter(name, light, fails, pause)


def evaluate(
    out: Path, n: int = 10, methods: Sequence[str] = ("plain",), pause: float = 0.0, **more: Any
) -> Evaluation:
    """Evaluate by name in `out`."""
    return runner.evaluate(task(), [method(m, pause) for m in methods], out, n, **more)
