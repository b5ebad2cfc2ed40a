"""The report of an evaluation: numbers as JSON, a Markdown table, one HTML page with pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inlay_bench import intervals, page
from inlay_bench.intervals import Interval, Values
from inlay_bench.measures import Column
from inlay_bench.records import on_disk
from inlay_bench.runner import Evaluation
from inlay_bench.sets import GROUP, SETS
from inlay_config.images import whole


@dataclass(frozen=True)
class Row:
    """A method's line. values: column -> mean and interval. differences: to the baseline, on the
    items that both have. seconds: mean per item. failed: items without a picture."""

    method: str
    values: dict[str, Interval]
    differences: dict[str, Interval]
    seconds: float
    done: int
    failed: int


@dataclass(frozen=True)
class Summary:
    """What all three forms of the report say. groups: title of a table -> its columns. chance: how
    often the true object at a random place is well placed, where that is known."""

    evaluation: Evaluation
    baseline: str
    groups: dict[str, list[Column]]
    rows: list[Row]
    chance: float | None

    @property
    def columns(self) -> list[Column]:
        """All columns, table by table."""
        return [column for columns in self.groups.values() for column in columns]


def summarise(evaluation: Evaluation, baseline: str | None = None) -> Summary:
    """Means, intervals and paired differences; baseline: a method of it, the first by default."""
    reference = baseline or evaluation.methods[0]
    groups: dict[str, list[Column]] = {}
    for measure in evaluation.measures.values():
        groups.setdefault(measure.group, []).extend(measure.columns)
    per_set = [SETS[n].column for n in evaluation.task.sets if n not in evaluation.absent]
    columns = [column for group in groups.values() for column in group]
    drawn = intervals.draws(len(evaluation.items))
    tables = {m: {c.key: column_of(evaluation, m, c.key) for c in columns}
              for m in evaluation.methods}  # fmt: skip
    if per_set:
        groups[GROUP] = per_set
    rows = []
    for method, table in tables.items():
        records = [evaluation.records[method][item.id] for item in evaluation.items]
        done = [r for r in records if r["state"] == "done"]
        paired = {k: intervals.difference(v, tables[reference][k], drawn) for k, v in table.items()}
        values = {k: intervals.interval(v, drawn) for k, v in table.items()}
        for column in per_set:
            mine, theirs = (evaluation.sets[m][column.key] for m in (method, reference))
            values[column.key] = _alone(mine, len(done))
            gap = None if mine is None or theirs is None else mine - theirs
            paired[column.key] = _alone(gap, len(done))
        rows.append(
            Row(
                method=method,
                values=values,
                differences=paired if method != reference else {},
                seconds=sum(r["seconds"] for r in done) / len(done) if done else math.nan,
                done=len(done),
                failed=len(records) - len(done),
            )
        )
    known = [i.facts["chance"] for i in evaluation.items if "chance" in i.facts]
    return Summary(evaluation, reference, groups, rows, float(np.mean(known)) if known else None)


def _alone(value: float | None, n: int) -> Interval:
    """A number of n pictures together: it has no interval."""
    return Interval(
        math.nan if value is None else value, math.nan, math.nan, 0 if value is None else n
    )


def column_of(evaluation: Evaluation, method: str, key: str) -> Values:
    """A number of every item, NaN where it does not apply or the method failed."""
    records = evaluation.records[method]
    numbers = [records[item.id].get("numbers", {}).get(key) for item in evaluation.items]
    return np.array([math.nan if value is None else value for value in numbers], np.float64)


def write(summary: Summary, folder: Path) -> dict[str, Path]:
    """report.json, report.md and report.html in `folder`, each whole or not at all."""
    texts = {
        "json": json.dumps(as_data(summary), indent=1, allow_nan=False) + "\n",
        "md": as_markdown(summary),
        "html": page.html(summary),
    }
    paths = {kind: folder / f"report.{kind}" for kind in texts}
    for kind, text in texts.items():
        with on_disk(paths[kind]), whole(paths[kind]) as partial:
            partial.write_text(text, encoding="utf-8")
    return paths


# JSON ------------------------------------------------------------------------------------------


def as_data(summary: Summary) -> dict[str, Any]:
    """Everything in plain values; null where there is no number."""
    done = summary.evaluation
    return {
        "task": done.task.name,
        "summary": done.task.summary,
        "items": len(done.items),
        "seed": done.seed,
        "baseline": summary.baseline,
        "confidence": intervals.LEVEL,
        "resamples": intervals.RESAMPLES,
        "chance": summary.chance,
        "networks": done.networks,
        "left_out": done.absent,
        "tables": {t: [asdict(column) for column in cs] for t, cs in summary.groups.items()},
        "rows": [
            {
                "method": row.method,
                "done": row.done,
                "failed": row.failed,
                "seconds": _plain(row.seconds),
                "values": {k: _interval(v) for k, v in row.values.items()},
                "differences": {k: _interval(v) for k, v in row.differences.items()},
            }
            for row in summary.rows
        ],
        "identities": done.identities,
    }


def _interval(value: Interval) -> dict[str, float | int | None]:
    return {k: _plain(v) if isinstance(v, float) else v for k, v in asdict(value).items()}


def _plain(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


# Markdown --------------------------------------------------------------------------------------


def as_markdown(summary: Summary) -> str:
    """Two tables, means and differences, and what stands behind them."""
    done = summary.evaluation
    lines = [f"# {done.task.name}", "", f"{done.task.summary} ({len(done.items)} items)"]
    for title, columns in summary.groups.items():
        lines += ["", f"## {title}", "", *group_table(summary, columns)]
        lines += ["", f"Differences to `{summary.baseline}`, on items that both have:", ""]
        lines += group_table(summary, columns, differences=True)
    lines += ["", *(f"* {note}" for note in notes(summary))]
    lines += [f"* **{c.title}** ({t}): {c.about}." for t, cs in summary.groups.items() for c in cs]
    return "\n".join([*lines, ""])


def group_table(
    summary: Summary, columns: Sequence[Column], differences: bool = False
) -> list[str]:
    """Lines of one table: means, or differences to the baseline."""
    lines = []
    for row in summary.rows:
        values = row.differences if differences else row.values
        if values:
            lines.append([row.method, *(shown(values[c.key], c, differences) for c in columns)])
    return table(["method", *(c.title for c in columns)], lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def notes(summary: Summary) -> list[str]:
    """What a reader must know: intervals, networks, what was left out, chance, columns."""
    done = summary.evaluation
    said = [
        f"Means over items with {intervals.LEVEL:.0%} intervals: paired percentile bootstrap, "
        f"{intervals.RESAMPLES:,} resamples of items."
    ]
    said += [f"`{name}` is {net['name']} ({net['digest']})." for name, net in done.networks.items()]
    said += [f"`{name}` was left out: {why}" for name, why in done.absent.items()]
    said += [f"`{r.method}` failed on {r.failed} items." for r in summary.rows if r.failed]
    if summary.chance is not None:
        said.append(
            f"Chance: the true object at a random place is well placed in {summary.chance:.3f}."
        )
    return [*said, *(" ".join(note.split()) for note in done.task.notes)]


def shown(value: Interval, column: Column, sign: bool = False) -> str:
    """`0.942 [0.906, 0.972]`."""
    if not value.n:
        return "–"
    if math.isnan(value.low):
        return f"{value.mean:{'+' if sign else ''}.{column.digits}f}"
    mean, low, high = (
        f"{x:{'+' if sign else ''}.{column.digits}f}" for x in (value.mean, value.low, value.high)
    )
    return f"{mean} [{low}, {high}]"
