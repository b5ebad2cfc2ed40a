"""The report as one HTML page: tables with intervals, then the first items side by side."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from math import isnan
from typing import TYPE_CHECKING

from inlay_bench import curve
from inlay_bench.intervals import Interval
from inlay_bench.measures import Column
from inlay_bench.methods import SANITY
from inlay_bench.pictures import path_of

if TYPE_CHECKING:
    from inlay_bench.report import Row, Summary
    from inlay_bench.tasks import Item

SHOWN = 24  # items with pictures
BAR = 84  # width of an interval's drawing, px
SIDE = 128  # of a picture on the page, px
ARROWS = {"higher": "↑", "lower": "↓", "": ""}

STYLE = """
:root { --ink: #1c1c1e; --soft: #6b6b70; --line: #e3e3e6; --paper: #fff; --mark: #2f6fb2;
  --bad: #b3402e; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececee; --soft: #9a9aa2; --line: #333338;
  --paper: #17171a; --mark: #7fb2e8; --bad: #e58a78; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1200px; margin: 40px auto 80px; padding: 0 24px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 16px; margin: 40px 0 8px; }
p { margin: 4px 0; max-width: 78ch; }
.soft, small, figcaption, th, dd, li { color: var(--soft); }
small { display: block; font-size: 12px; white-space: nowrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 500; font-size: 13px; text-align: left; padding: 4px 18px 6px 0; }
td { padding: 9px 18px 7px 0; border-top: 1px solid var(--line); vertical-align: top; }
tr.sanity td { color: var(--soft); }
td b { font-weight: 600; }
td svg { display: block; margin: 3px 0 1px; }
.scroll { overflow-x: auto; }
ul { padding-left: 18px; margin: 8px 0; }
details { margin: 10px 0 0; } summary { cursor: pointer; color: var(--soft); font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; margin: 8px 0; }
dt { font-weight: 500; } dd { margin: 0; max-width: 78ch; }
code { font: 13px ui-monospace, monospace; }
.item { border-top: 1px solid var(--line); padding: 14px 0; }
.item > p { margin: 0 0 8px; }
.row { display: flex; flex-wrap: wrap; gap: 14px; }
figure { margin: 0; width: 128px; }
figure img { width: 128px; height: 128px; object-fit: contain; image-rendering: pixelated;
  border-radius: 3px; display: block; background: var(--line); }
figcaption { font-size: 12px; line-height: 1.35; margin-top: 5px; }
figcaption b { color: var(--ink); font-weight: 500; display: block; }
.bad { color: var(--bad); }
"""


def html(summary: Summary) -> str:
    """The page, complete in itself; the same records give the same bytes."""
    return "\n".join(_page(summary)) + "\n"


def _page(summary: Summary) -> Iterator[str]:
    from inlay_bench.report import notes

    done = summary.evaluation
    title = escape(done.task.name)
    yield "<!doctype html>"
    yield f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<style>{STYLE}</style></head><body>"
    yield f"<h1>{title}</h1>"
    counted = f"{len(done.items)} items, seed {done.seed}"
    yield f'<p>{escape(_sentence(done.task.summary))} <span class="soft">{counted}</span></p>'
    if done.series and done.task.curve:
        yield from curve.draw(summary)
    for name, columns in summary.groups.items():
        yield f"<h2>{escape(name)}</h2>"
        yield from _table(summary, columns)
        yield from _legend(columns)
    yield "<h2>How to read this</h2><ul>"
    yield f"<li>Small and grey: the {_level()} interval, and the difference to "
    yield f"<code>{escape(summary.baseline)}</code> on items that both have, in bold where its "
    yield "interval is on one side of zero.</li>"
    yield from (f"<li>{_with_code(note)}</li>" for note in notes(summary))
    yield "</ul>"
    yield from _failures(summary)
    yield f"<h2>The first {min(SHOWN, len(done.items))} items, not selected</h2>"
    for item in done.items[:SHOWN]:
        yield from _item(summary, item)
    yield "</body></html>"


# tables ----------------------------------------------------------------------------------------


def _table(summary: Summary, columns: Sequence[Column]) -> Iterator[str]:
    heads = "".join(f"<th>{escape(c.title)} {ARROWS[c.better]}</th>" for c in columns)
    yield f'<div class="scroll"><table><tr><th></th>{heads}</tr>'
    for row in summary.rows:
        kind = ' class="sanity"' if row.method in SANITY else ""
        below = f"{row.seconds:.1f} s per item" if row.seconds >= 0.05 else ""
        if row.failed:
            below += f'<br><span class="bad">{row.failed} failed</span>'
        cells = "".join(_cell(summary, row, column) for column in columns)
        head = f"<b>{escape(row.method)}</b><small>{below}</small>"
        yield f"<tr{kind}><td>{head}</td>{cells}</tr>"
    yield "</table></div>"


def _legend(columns: Sequence[Column]) -> Iterator[str]:
    """What each column of a table says, folded."""
    yield "<details><summary>What the columns say</summary><dl>"
    for column in columns:
        yield f"<dt>{escape(column.title)}</dt><dd>{_with_code(_sentence(column.about))}</dd>"
    yield "</dl></details>"


def _cell(summary: Summary, row: Row, column: Column) -> str:
    value = row.values[column.key]
    if not value.n:
        return "<td>–</td>"
    digits = column.digits
    gap = row.differences.get(column.key)
    if isnan(value.low):  # of all pictures together
        shown = f"<small>{gap.mean:+.{digits}f}</small>" if gap and gap.n else ""
        return f"<td><b>{value.mean:.{digits}f}</b>{shown}</td>"
    low, high = _range(summary, column)
    some = f" of {value.n}" if value.n < len(summary.evaluation.items) else ""
    text = f"<b>{value.mean:.{digits}f}</b>{_bar(value, low, high)}"
    text += f"<small>{value.low:.{digits}f} – {value.high:.{digits}f}{some}</small>"
    if gap and gap.n:
        shown = f"{gap.mean:+.{digits}f}"
        shown = f"<b>{shown}</b>" if gap.low > 0 or gap.high < 0 else shown
        text += f"<small>{shown} ({gap.low:+.{digits}f}, {gap.high:+.{digits}f})</small>"
    return f"<td>{text}</td>"


def _range(summary: Summary, column: Column) -> tuple[float, float]:
    """The axis that all rows of a column share."""
    values = [row.values[column.key] for row in summary.rows if row.values[column.key].n]
    low, high = min(v.low for v in values), max(v.high for v in values)
    return low, high if high > low else low + 1.0


def _bar(value: Interval, low: float, high: float) -> str:
    """A dot at the mean and a line over the interval, on the column's axis."""

    def place(x: float) -> float:
        return 4 + (BAR - 8) * (x - low) / (high - low)

    left, mean, right = (place(x) for x in (value.low, value.mean, value.high))
    axis = f'<path d="M4 5H{BAR - 4}" stroke="var(--line)"/>'
    line = f'<path d="M{left:.1f} 5H{right:.1f}" stroke="var(--mark)" stroke-width="2"/>'
    dot = f'<circle cx="{mean:.1f}" cy="5" r="3" fill="var(--mark)"/>'
    return f'<svg width="{BAR}" height="10" aria-hidden="true">{axis}{line}{dot}</svg>'


def _failures(summary: Summary) -> Iterator[str]:
    """Which items failed, and why."""
    done = summary.evaluation
    failed = [
        (method, item.id, done.records[method][item.id])
        for method in done.methods
        for item in done.items
        if done.records[method][item.id]["state"] == "failed"
    ]
    if failed:
        yield f"<h2>{len(failed)} failed</h2><ul>"
        for method, item, record in failed:
            yield f"<li><code>{escape(method)} {item}</code> {escape(record['error'])}</li>"
        yield "</ul>"


# pictures --------------------------------------------------------------------------------------


def _item(summary: Summary, item: Item) -> Iterator[str]:
    """The input and every method's picture, what was measured below."""
    done = summary.evaluation
    texts = item.texts
    said = f"{escape(texts.get('source', ''))} → <b>{escape(texts.get('target', ''))}</b>"
    unseen = " · held-out pair" if item.facts.get("held_out") else ""
    yield f'<div class="item"><p><code>{item.id}</code> {said}'
    yield f'<span class="soft">{unseen}</span></p><div class="row">'
    yield _figure(summary, "input", item, "")
    for name in item.given:
        yield _figure(summary, f"given-{name}", item, "")
    for method in done.methods:
        if method != "copy":
            record = done.records[method][item.id]
            below = _below(summary, record["numbers"]) if record["state"] == "done" else ""
            failed = '<span class="bad">failed</span>' if record["state"] == "failed" else ""
            yield _figure(summary, method, item, below + failed)
    yield "</div></div>"


def _figure(summary: Summary, method: str, item: Item, below: str) -> str:
    path = path_of(summary.evaluation.folder, method, item.id)
    image = f'<div style="height:{SIDE}px"></div>'
    if path.is_file():
        data = base64.b64encode(path.read_bytes()).decode()
        image = f'<img alt="{escape(method)}" src="data:image/png;base64,{data}">'
    title = escape(method.removeprefix("given-"))
    return f"<figure>{image}<figcaption><b>{title}</b>{below}</figcaption></figure>"


def _below(summary: Summary, numbers: dict[str, float | None]) -> str:
    """The words of what is so, and numbers that have a unit: `found, placed, 31.2 dB`."""
    words = []
    for column in summary.columns:
        value = numbers.get(column.key)
        if value is not None and column.mark and value >= 1:
            words.append(column.mark)
        elif value is not None and column.flag and value < 1:
            words.append(column.flag)
        elif value is not None and column.unit:
            words.append(f"{value:.{column.digits}f} {column.unit}")
    return escape(", ".join(words))


# words -----------------------------------------------------------------------------------------


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def _level() -> str:
    from inlay_bench.intervals import LEVEL

    return f"{LEVEL:.0%}"


def _with_code(text: str) -> str:
    """Escaped, `names` in backquotes set as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
