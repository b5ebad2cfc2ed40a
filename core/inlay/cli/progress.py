"""The progress of a run, on stderr: pass, step, sigma, seconds per step, active plugins."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Draws the events of a run; where stderr is no terminal, one line per pass."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.live = not quiet and self.console.is_terminal
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}  {task.fields[note]}"),
            console=self.console,
            disable=not self.live,
        )
        self.tasks: dict[str, TaskID] = {}
        self.began = 0.0

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.bar.stop()

    def update(self, event: Mapping[str, Any]) -> None:
        """kind "pass", "step" or "done"; pass, step (from 0), steps, sigma, active plugins."""
        if event["kind"] == "pass":
            self.began = time.perf_counter()
            name = event["pass"]
            self.tasks[name] = self.bar.add_task(name, total=event["steps"], note="")
        elif event["kind"] == "step":
            done = event["step"] + 1
            pace = (time.perf_counter() - self.began) / done
            note = f"sigma {event['sigma']:.3f}  {pace:.2f} s/step  {' '.join(event['active'])}"
            self.bar.update(self.tasks[event["pass"]], completed=done, note=note)
            if not self.live and done == event["steps"]:
                self.console.print(f"{event['pass']}: {done} steps, {pace:.2f} s/step")
