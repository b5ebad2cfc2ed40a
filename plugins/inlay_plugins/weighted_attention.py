"""Weighted extended attention: the edit attends to the source's image tokens too (Add-it, eq. 2).

K = [gamma_p·K_edit[text]; gamma_t·K_edit[image]; gamma_s·K_source[image]], V joined unweighted:
gamma scales logits. The source is computed as if alone. Joint blocks (FLUX) and self-attention
(U-Net) are extended; cross-attention holds no image keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from inlay import AttnEdits, AttnSite, ConfigError, Needs, Plugin, Run, Step, Window, hookimpl
from inlay_plugins import balance
from inlay_plugins.schedules import Schedule, step_index


@dataclass
class Windows:
    """Steps per kind of block, [first, last] or progress; null: never. A kind the model has not is
    not asked for. The paper: 0..10 and 0..20 of 30.
    """

    double: Any = field(default_factory=lambda: [0.0, 0.35])
    single: Any = field(default_factory=lambda: [0.0, 0.68])
    unet: Any = field(default_factory=lambda: [0.0, 0.68])


@dataclass
class Auto:
    """Where gamma: auto is found, and for what: target / source = balance for the prompt's queries
    (the paper's section 3.2 says 1, its code 1.05). step: index or progress; before it gamma is
    `start`. Needs blocks that hold the prompt (FLUX, SD3)."""

    step: Any = 5
    start: float = 1.05
    balance: float = 1.05
    low: float = 1.0
    high: float = 1.2
    xtol: float = 0.01


class WeightedAttention(Plugin):
    """Needs a lane `source` (source_trajectory), which lives where the edit attends to it."""

    @dataclass
    class Config:
        """gamma: the paper's scale, of prompt and target alike; gamma_p, gamma_t: each by itself
        (null: gamma); gamma_s: of the source. A number, {start, end} or knots [[step, value], …];
        gamma: auto is found in step auto.step, so that the prompt looks at both alike.

        mode: reference steps once more along the step before while gamma: auto is found.

        combine: join concatenates the keys. sum attends once, to image keys and values
        w_s·source + w_t·edit with w_s = gamma_s/(gamma_s + gamma_t) and w_t = 1 - w_s.
        """

        gamma: Any = 1.05
        gamma_s: Any = 1.0
        gamma_p: Any = None
        gamma_t: Any = None
        combine: Literal["join", "sum"] = "join"
        windows: Windows = field(default_factory=Windows)
        auto: Auto = field(default_factory=Auto)
        mode: Literal["fixed", "reference"] = "fixed"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, where = self.cfg, f"plugins.{need.owner}"
        self.scales: dict[str, Schedule] = {}
        self.searched: tuple[AttnSite, ...] = ()
        if cfg.gamma == "auto":
            self._declare_search(need)
        for role, value in (("s", cfg.gamma_s), ("p", cfg.gamma_p), ("t", cfg.gamma_t)):
            key, value = (f"gamma_{role}", value) if value is not None else ("gamma", cfg.gamma)
            value = cfg.auto.start if value == "auto" else value
            self.scales[role] = Schedule.parse(value, need.request.steps, f"{where}.{key}")
        for kind, sites in _extended(need):
            path = f"{where}.windows.{kind}"
            if (window := Window.parse(getattr(cfg.windows, kind), path)) is not None:
                steps = window.steps(need.request.steps, path)
                need.edit("gain", "edit", sites, steps)
                shared = {"from_": "source", "how": cfg.combine, "keys": "image"}
                need.edit("append", "edit", sites, steps, **shared)

    def _declare_search(self, need: Needs) -> None:
        where, cfg = f"plugins.{need.owner}", self.cfg
        self.at = step_index(cfg.auto.step, need.request.steps, f"{where}.auto.step")
        self.searched = tuple(s for s in need.sites if s.kind == "joint" and s.block == "double")
        given = [key for key in ("gamma_p", "gamma_t") if getattr(cfg, key) is not None]
        for problem, fix in (
            (not self.searched and "no block of this model holds the prompt", "Give a number."),
            (given and f"{given[0]} says what gamma: auto is to find", "Leave it out."),
            (cfg.combine == "sum" and "gamma: auto weighs two sets of keys", "Use combine: join."),
        ):
            if problem:
                raise ConfigError(problem, where=f"{where}.gamma", fix=fix)
        need.evaluations(1 + balance.EVALUATIONS * need.request.n)
        need.publish("scale:gamma")

    @hookimpl
    def inlay_pre_step(self, run: Run, step: Step) -> None:
        """The search sees the latents of this step, after the plugins above moved them."""
        if self.searched and step.pass_ == "edit" and step.index == self.at and step.last_eval:
            cfg = self.cfg.auto
            bracket = (cfg.low, cfg.high)
            found = balance.gamma_of(run, step, self.searched, cfg.balance, bracket, cfg.xtol)
            run.board["scale:gamma"] = found
            self.scales |= dict.fromkeys("pt", Schedule(((0.0, found),)))

    @hookimpl
    def inlay_combine(self, step: Step, lane: str) -> Tensor | None:
        """As published, the prediction of the step in which gamma is found is lost."""
        again = self.searched and self.cfg.mode == "reference" and step.index == self.at
        return self.outputs[lane] if again and step.pass_ == "edit" else None

    @hookimpl
    def inlay_post_step(self, step: Step) -> None:
        self.outputs: dict[str, Tensor] = dict(step.output) if self.searched else {}

    @hookimpl
    def inlay_attention(self, run: Run, step: Step, site: AttnSite, edits: AttnEdits) -> None:
        source, prompt, target = (self.scales[role](step.progress) for role in "spt")
        on = edits.on("edit")
        if self.cfg.combine == "sum":
            share = source / (source + target)
            on.append("source", "image", gain=share, how="sum", own=1 - share)
        elif site.kind == "joint" and prompt == target:
            on.gain("all", target)
        else:
            on.gain("image", target)
        if site.kind == "joint" and (self.cfg.combine == "sum" or prompt != target):
            on.gain("text", prompt)
        if self.cfg.combine == "join":
            on.append("source", "image", gain=source)


def _extended(need: Needs) -> Iterator[tuple[str, frozenset[str]]]:
    """(kind of block, its sites) that this model has."""
    for kind in ("double", "single"):
        if any(site.block == kind for site in need.sites):
            yield kind, need.select(kind=["joint"], block=[kind])
    if any(site.kind == "self" for site in need.sites):
        yield "unet", need.select(kind=["self"])
