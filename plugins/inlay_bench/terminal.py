"""An evaluation on the terminal: progress while it runs, the means when it is done."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from inlay_bench.report import Summary

ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}


class Progress:
    """One bar per method on stderr; where that is no terminal, a line when a method is done."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.live = not quiet and self.console.is_terminal
        self.bar = Bars(
            TextColumn("{task.description:14}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.live,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.bar.stop()

    def update(self, method: str, done: int, items: int, note: str) -> None:
        """Item `done` of a method begins, or all are done."""
        if method not in self.tasks:
            self.tasks[method] = self.bar.add_task(method, total=items, note="")
        self.bar.update(self.tasks[method], completed=done, note=note)
        if not self.live and done == items:
            self.console.print(f"{method}: {items} items")


def show(summary: Summary) -> None:
    """The means, a table per group of columns."""
    console = Console(highlight=False)
    for title, columns in summary.groups.items():
        heads = (f"{c.title}{ARROWS[c.better]}" for c in columns)
        table = Table("method", *heads, box=box.SIMPLE_HEAD, title=title, title_justify="left")
        for row in summary.rows:
            values = [(row.values[c.key], c.digits) for c in columns]
            cells = [f"{v.mean:.{digits}f}" if v.n else "–" for v, digits in values]
            table.add_row(row.method, *cells)
        console.print(table)
    for row in summary.rows:
        if row.failed:
            console.print(
                f"{row.method} failed on {row.failed} items; --retry failed does them again"
            )
    for name, why in summary.evaluation.absent.items():
        console.print(f"{name} was left out: {why}")
