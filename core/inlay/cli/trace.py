"""What a run spends its time on: hook calls by event and plugin, attention by site, model calls.

`INLAY_TRACE=1` prints every hook call as it returns; `inlay run --profile` writes the table.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from inlay_attention import Seam, SiteProgram

if TYPE_CHECKING:
    from inlay.session import Session


@dataclass
class Tracer:
    """spent: (what, who) -> [calls, seconds]: an event and a plugin, "site" and its name, "model"
    and the denoiser's class. Model calls hold the time of their sites, which cannot be told apart
    in a compiled model. echo: print hook calls."""

    echo: bool = field(default_factory=lambda: os.environ.get("INLAY_TRACE") == "1")
    spent: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    @classmethod
    def asked_for(cls) -> Tracer | None:
        """A tracer when the environment says so."""
        return tracer if (tracer := cls()).echo else None

    @contextmanager
    def watch(self, session: Session, seam: Seam) -> Iterator[None]:
        """Time everything that happens inside; what is wrapped for it is restored."""
        hooks = session.manager.hook
        events = [name for name in vars(hooks) if name.startswith("inlay_")]
        impls = [(e, impl) for e in events for impl in getattr(hooks, e).get_hookimpls()]
        kept = [impl.function for _, impl in impls]
        for event, impl in impls:
            impl.function = self._timed(
                impl.function, event.removeprefix("inlay_"), impl.plugin_name
            )
        backbone: Any = session.backbone
        name = type(backbone.denoiser).__name__
        backbone.denoise = self._timed(backbone.denoise, "model", name)
        seam.watch = self._site
        try:
            yield
        finally:
            for (_, impl), function in zip(impls, kept, strict=True):
                impl.function = function
            del backbone.denoise
            seam.watch = None

    def table(self) -> str:
        """A Markdown table, what took longest first."""
        lines = ["| what | who | calls | seconds | per call, ms |", "|---|---|---|---|---|"]
        for (what, who), (n, seconds) in sorted(self.spent.items(), key=lambda row: -row[1][1]):
            each = 1000 * seconds / n
            lines.append(f"| {what} | {who} | {n:.0f} | {seconds:.3f} | {each:.3f} |")
        return "\n".join(lines) + "\n"

    def _site(self, site: str, program: SiteProgram) -> Callable[..., Any]:
        return self._timed(program, "site", site)

    def _timed(self, function: Callable[..., Any], what: str, who: str) -> Callable[..., Any]:
        if inspect.isgeneratorfunction(function):  # a wrapper: what it waits for is not its own

            def wrapper(*args: Any) -> Any:
                self._add(what, who, 0.0)
                return (yield from function(*args))

            return wrapper

        def timed(*args: Any, **options: Any) -> Any:
            started = _now()
            try:
                return function(*args, **options)
            finally:
                self._add(what, who, _now() - started)

        return timed

    def _add(self, what: str, who: str, seconds: float) -> None:
        row = self.spent.setdefault((what, who), [0, 0.0])
        row[0], row[1] = row[0] + 1, row[1] + seconds
        if self.echo and what not in ("site", "model"):
            print(f"{what:10s} {who:24s} {1000 * seconds:9.3f} ms", file=sys.stderr)


def _now() -> float:
    """Seconds, after what is queued on an accelerator is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
