"""Four seeds of each item in one batch, in bfloat16: a third of what as many runs cost.

For tables of many rows. One line per item lies in outputs/quality/seeds, in a file that is named by
everything the pictures depend on; a number of an item is the mean over its seeds.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import comparison
import numpy as np

from inlay_bench import intervals, measures, report
from inlay_bench.intervals import Values
from inlay_bench.measures import MEASURES, Column
from inlay_bench.methods import Edit, Pipelines
from inlay_bench.pictures import digest, digest_of
from inlay_bench.tasks import Item, Task

OUT = comparison.OUT / "seeds"
SEEDS = 4
MEASURED = ("inclusion", "affordance", "contact", "background", "footprint")
NOTE = "items, four seeds each in one batch, in bfloat16; intervals are over items"


class Bench:
    """The first n items of a task, and the networks that look at pictures, loaded once."""

    def __init__(self, task: Task, n: int) -> None:
        self.task, self.items = task, task.items(n, 0)
        self.chosen = {name: MEASURES[name] for name in (*MEASURED, *({"side"} & {*task.measures}))}
        self.networks = {"detector": measures.detector()}
        self.pipelines = Pipelines()

    def columns(self, keys: tuple[str, ...]) -> list[Column]:
        """Columns by their keys, in that order."""
        known = {c.key: c for measure in self.chosen.values() for c in measure.columns}
        return [known[key] for key in keys]

    def row(self, said: str) -> dict[str, Values]:
        """Column -> a number per item, of an experiment or a variant; what is missing is made."""
        edit = Edit(said, self.task, ["dtype=bfloat16"], self.pipelines)
        of = {"task": asdict(self.task)["data"], "seeds": SEEDS, **edit.identity}
        path = OUT / f"{self.task.name}-{edit.name}-{digest(of)}.jsonl"
        known = _read(path)
        rows = []
        for item in self.items:
            asked = digest({"picture": digest_of(item.picture), "texts": dict(item.texts)})
            if asked not in known:
                known[asked] = self._numbers(edit, item)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps({"item": asked, "numbers": known[asked]}) + "\n")
            rows.append(known[asked])
        keys = [column.key for measure in self.chosen.values() for column in measure.columns]
        return {key: np.array([row[key] for row in rows], np.float64) for key in keys}

    def _numbers(self, edit: Edit, item: Item) -> dict[str, float | None]:
        """Means over the seeds to which a number applies."""
        seen: dict[str, list[float]] = {}
        for picture in edit.several(item, item.picture, SEEDS):
            evidence = measures.evidence(item, item.picture, picture, self.networks)
            for measure in self.chosen.values():
                for key, value in measure.function(evidence).items():
                    seen.setdefault(key, []).extend([] if value is None else [value])
        return {key: float(np.mean(values)) if values else None for key, values in seen.items()}


def table(bench: Bench, rows: dict[str, str], keys: tuple[str, ...]) -> list[str]:
    """Means with intervals, a line for each label; rows: label -> what is run."""
    columns, drawn = bench.columns(keys), intervals.draws(len(bench.items))
    lines = []
    for label, said in rows.items():
        values = bench.row(said)
        lines.append(
            [label, *(report.shown(intervals.interval(values[c.key], drawn), c) for c in columns)]
        )
    return report.table(["", *(c.title for c in columns)], lines)


def differences(
    bench: Bench, ours: str, others: dict[str, str], keys: tuple[str, ...]
) -> list[str]:
    """A table of `ours` less each other, item by item, with intervals."""
    columns, drawn = bench.columns(keys), intervals.draws(len(bench.items))
    base, lines = bench.row(ours), []
    for label, said in others.items():
        other = bench.row(said)
        gaps = [intervals.difference(base[c.key], other[c.key], drawn) for c in columns]
        cells = [report.shown(gap, c, sign=True) for gap, c in zip(gaps, columns, strict=True)]
        lines.append([label, *cells])
    return report.table(["", *(c.title for c in columns)], lines)


def _read(path: Path) -> dict[str, dict[str, float | None]]:
    """Digest of an item -> its numbers; a line that a kill has torn is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["item"]: record["numbers"] for record in whole}
