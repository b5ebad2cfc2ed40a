"""Batches that are a function of seed and step, whatever was drawn before: a resumed run sees what
an uninterrupted one would have seen, with any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from inlay_config.errors import InputError
from inlay_train.recipe import Data, Sample, Training

TRIES = 50
"""Rows in a row that may be broken before the data count as unusable."""
Row = tuple[int, int, int]
"""Index, step, place in the step's batch."""


def rows(length: int, cfg: Training, first: int, process: int, processes: int) -> Iterator[Row]:
    """Rows of one process from backward pass `first` on, without end: every epoch is a shuffle of
    its own, split evenly between the processes."""
    wide = cfg.batch * processes
    epoch, order = -1, np.zeros(0, int)
    for number in range(first * wide, 2**62, wide):
        for place in range(process * cfg.batch, (process + 1) * cfg.batch):
            if (number + place) // length != epoch:
                epoch = (number + place) // length
                order = np.random.default_rng([cfg.seed, 0, epoch]).permutation(length)
            yield int(order[(number + place) % length]), number // wide, place


class Drawn(Dataset[Sample]):
    """Rows of `data`, each with its own random numbers; broken ones are replaced and named under
    `broken`."""

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, row: Any) -> Sample:
        index, step, place = row
        broken = []
        for further in range(TRIES):
            rng = np.random.default_rng([self.seed, 1, step, place, further])
            try:
                sample = self.data.draw((index + further) % len(self.data), rng)
            except InputError as error:
                broken.append(str(error))
                last = error
            else:
                return {**sample, "broken": broken}
        problem = f"{TRIES} rows in a row cannot be read, the last: {last.problem}"
        raise InputError(problem, where=last.where) from last


def _collate(samples: list[Sample]) -> Sample:
    broken = [name for sample in samples for name in sample.pop("broken")]
    return {**default_collate(samples), "broken": broken}


def loader(
    data: Data, cfg: Training, first: int, process: int = 0, processes: int = 1
) -> DataLoader[Sample]:
    """Batches from backward pass `first` on, without end. Raises InputError for no data."""
    if not len(data):
        raise InputError("there is nothing to train on", where="data")
    return DataLoader(
        Drawn(data, cfg.seed),
        cfg.batch,
        sampler=rows(len(data), cfg, first, process, processes),
        num_workers=cfg.workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )
