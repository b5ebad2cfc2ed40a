"""Pictures of the tasks with exemplars, ten in a batch and kept on disk, and their numbers: for
tables whose rows differ in a setting or in weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import comparison
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inlay_bench import measures, runner, tasks
from inlay_bench.intervals import Interval, Values
from inlay_bench.measures import MEASURES, Column
from inlay_config.images import to_pil, whole
from inlay_toybox.quality.conditioned import Draw
from inlay_toybox.quality.exemplars import ExemplarItem, exemplar_items, imitation_items

OUT = comparison.OUT / "exemplar-batches"
ITEMS = {"toybox-exemplar": exemplar_items, "toybox-imitation": imitation_items}


class Bench:
    """The first n items of a task, as a model is given them and as they are measured, and the
    networks that look at pictures, loaded once. chosen: measures, fewer than the task's."""

    def __init__(self, name: str, n: int, chosen: Sequence[str]) -> None:
        self.name, task = name, tasks.load(name)
        self.items: list[ExemplarItem] = list(ITEMS[name](n))
        self.known = task.items(n, 0)
        self.chosen = [MEASURES[measure] for measure in chosen]
        self.networks, _ = runner.load_networks(replace(task, measures=list(chosen), sets=[]))

    def drawn(self, draw: Draw, name: str, n: int | None = None) -> Tensor:
        """Pictures `n 3 h w` in 0..1 of the first n items, outside the hole the input's; drawn
        where no file of this name has them."""
        items = self.items[:n]
        path = OUT / f"{name}-{len(items)}.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            made = (draw(items) * 255).round().byte().contiguous()
            with whole(path) as partial:
                save_file({"pictures": made}, partial)
        made = load_file(path)["pictures"].float() / 255
        holes, inputs = (
            torch.from_numpy(np.stack([np.array(part) for part in parts]))
            for parts in ([i.region for i in items], [i.picture for i in items])
        )
        return torch.where(holes[:, None], made, inputs.permute(0, 3, 1, 2) / 255)

    def columns(self, keys: Sequence[str]) -> list[Column]:
        """Columns by their keys, in that order."""
        known = {c.key: c for measure in self.chosen for c in measure.columns}
        return [known[key] for key in keys]

    def numbers(self, pictures: Tensor) -> dict[str, Values]:
        """Column -> a number per picture, of the first items; NaN where one does not apply."""
        rows = []
        for item, picture in zip(self.known, to_pil(pictures), strict=False):
            assert item.picture is not None
            seen = measures.evidence(item, item.picture, picture, self.networks)
            rows.append({k: v for each in self.chosen for k, v in each.function(seen).items()})
        return {key: np.array([row[key] for row in rows], np.float64) for key in rows[0]}


def shown(value: Interval, digits: int = 3, sign: bool = False) -> str:
    """A mean with its interval."""
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{value.mean:{form}} [{value.low:{form}}, {value.high:{form}}]"
