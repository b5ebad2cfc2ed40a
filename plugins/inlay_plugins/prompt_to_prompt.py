"""Prompt-to-Prompt (Hertz et al. 2023): the edit takes over the attention maps of the source, which
is drawn beside it from prompt.source and the same noise.

replace      word by word: a new word gets the map of the one in its place
refine       token by token: what both prompts have in common keeps its map, new words get their own
reweight     the whole map; and with each, words of the edit louder or quieter

Maps are edited as P M, which is linear in the values: none is ever made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from inlay import AttnEdits, AttnSite, ConfigError, Needs, Plugin, Run, Step, hookimpl
from inlay_plugins import alignment


class PromptToPrompt(Plugin):
    """Provides the lane `source`, unless another plugin does; the lane `edit` is edited under its
    prompt. Publishes `columns:edit`: step index -> the alignment.Columns made there.

    On joint attention the picture's attention to the text and to itself are edited as apart.
    """

    @dataclass
    class Config:
        """cross_replace: when attention to the text is the source's, shares of the run: 0.8 (until
        there), [0.2, 0.8], or by words of prompt.edit {default: 1.0, lion: 0.4}. self_replace: when
        attention of the picture to itself is, at sites of at most `self_tokens` tokens; published:
        16² for SD at 512 pixels, 32² with null-text inversion.
        weights: of words of prompt.edit, {snowy: 3}, while cross_replace acts; negative push away.
        alignment: reference keeps a published slip of replace, see alignment.by_words.
        """

        edit: Literal["replace", "refine", "reweight"] = "replace"
        cross_replace: Any = 0.8
        self_replace: Any = 0.4
        self_tokens: int = 256
        weights: dict[str, float] = field(default_factory=dict)
        alignment: Literal["fixed", "reference"] = "fixed"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, total, where = self.cfg, need.request.steps, f"plugins.{need.owner}"
        asked, path = cfg.cross_replace, f"{where}.cross_replace"
        by_word = dict(asked) if hasattr(asked, "items") else {"default": asked}
        self.default = _steps(by_word.pop("default", 1.0), total + 1, path)  # as published
        self.by_word = {w: _steps(window, total + 1, path) for w, window in by_word.items()}
        self.own = _steps(cfg.self_replace, total, f"{where}.self_replace")
        for option, words in (("cross_replace", self.by_word), ("weights", cfg.weights)):
            for word in words:
                need.word(f"{need.owner}/{word}", "edit/text", word, option)
        need.lane("source", prompt="source", n=need.request.n)
        need.publish("columns:edit")
        every = {step for window in (self.default, *self.by_word.values()) for step in window}
        every &= set(range(total))
        options = {"queries": "image"}
        holding = need.select(kind=["cross", "joint"])
        need.edit("mix", "edit/text", holding, every, from_="source", keys="text", **options)
        if cfg.weights:
            need.edit("scale", "edit/text", holding, every, keys="text", **options)
        grid = need.request.grid
        self.sites = {
            s.name: s
            for s in need.sites
            if s.kind != "cross" and _tokens(s, grid) <= cfg.self_tokens
        }
        if self.own and not self.sites:
            least = min((_tokens(s, grid) for s in need.sites if s.kind != "cross"), default=0)
            problem, fix = f"no self-attention of at most {cfg.self_tokens} tokens", f"Use {least}."
            raise ConfigError(problem, where=f"{where}.self_tokens", fix=fix)
        routed = frozenset(s.name for s in self.sites.values() if s.kind == "self")
        mixed = frozenset(self.sites) - routed
        cross = frozenset(s.name for s in need.sites if s.kind == "cross")
        for sites, steps in ((routed, self.own), (cross, every)):
            if sites:
                need.edit("route", "edit/text", sites, steps, from_="source", how="qk", **options)
        if mixed:
            need.edit("mix", "edit/text", mixed, self.own, from_="source", keys="image", **options)

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        cfg, edit = self.cfg, run.conds["edit/text"]
        pieces, length = (run.conds["source/text"].tokens, edit.tokens), edit.embeds.shape[1]
        if cfg.edit == "replace":
            self.aligned = alignment.by_words(*pieces, length, cfg.alignment)
        elif cfg.edit == "refine":
            self.aligned = alignment.by_tokens(*pieces, length)
        else:
            self.aligned = alignment.identity(length)
        self.weight = torch.ones(length)
        for word, weight in cfg.weights.items():
            self.weight[list(run.words[f"{self.name}/{word}"])] = weight
        self.words = {word: list(run.words[f"{self.name}/{word}"]) for word in self.by_word}
        self.in_place = torch.equal(self.aligned.matrix, torch.eye(length))
        self.matrix = self.aligned.matrix.to(run.device, run.dtype)
        run.board["columns:edit"] = self.columns

    def columns(self, step: int) -> alignment.Columns:
        """What is made of the attention to the text in this step."""
        active = torch.full_like(self.weight, float(step in self.default))
        for word, tokens in self.words.items():
            active[tokens] = float(step in self.by_word[word])
        weight = torch.where(active > 0, self.weight, 1.0)
        return alignment.Columns(self.aligned.matrix, active * self.aligned.known, weight)

    @hookimpl
    def inlay_pre_step(self, run: Run, step: Step) -> None:
        made = self.columns(step.index)
        self.taken, self.all_taken = bool(made.share.any()), bool(made.share.all())
        self.weighed = bool((made.weight != 1).any())
        self.share, self.weighing = (t.to(run.device, run.dtype) for t in (made.share, made.weight))

    @hookimpl
    def inlay_attention(self, run: Run, step: Step, site: AttnSite, edits: AttnEdits) -> None:
        on = edits.on("edit/text", "image")
        if site.kind == "cross" and self.all_taken and self.in_place:
            on.route(qk="source")  # the same, and costs nothing
        elif site.kind != "self" and self.taken:
            on.mix("source", "text", self.share, None if self.in_place else self.matrix)
        if site.kind != "self" and self.weighed:
            on.scale("text", self.weighing)
        if site.name in self.sites and step.index in self.own:
            if site.kind == "self":
                on.route(qk="source")
            else:
                on.mix("source", "image", 1.0)


def _tokens(site: AttnSite, grid: tuple[int, int]) -> int:
    """The picture's tokens at a site."""
    return math.prod(math.ceil(side / site.scale) for side in grid)


def _steps(share: Any, total: int, where: str) -> range:
    """Steps of a window in shares of `total`, rounded down as published: 0.4 or [0.1, 0.4]."""
    pair = [0.0, share] if isinstance(share, int | float) else list(share or [0.0, 0.0])
    good = len(pair) == 2 and all(isinstance(edge, int | float) for edge in pair)
    if not good or not 0 <= pair[0] <= pair[1] <= 1:
        fix = "Give a share of the run such as 0.8, or [first, last]."
        raise ConfigError(f"{share!r} is no window of shares", where=where, fix=fix)
    return range(*(int(edge * total + 1e-9) for edge in pair))
