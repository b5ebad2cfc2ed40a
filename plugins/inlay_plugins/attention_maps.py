"""Where the picture looks at each word: heat maps on the board, and so on the contact sheet.

Changes nothing; the maps are the image tokens' attention to all pieces of a word, mean over heads
and over the sites with the most tokens (as Prompt-to-Prompt, section 3, and DAAM show them).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay import ConfigError, Needs, Plugin, Run, Step, hookimpl
from inlay_plugins import masks


class AttentionMaps(Plugin):
    """Publishes `map:WORD` `b 1 h w` in 0..1, the mean over the run, and `map:WORD at STEP`."""

    @dataclass
    class Config:
        """words: of prompt.edit. steps: single steps to show as well. scale: tokens per side are
        the latent grid divided by it; 0: the finest sites of the model.
        """

        words: list[str] = field(default_factory=list)
        steps: list[int] = field(default_factory=list)
        scale: int = 0

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, where, total = self.cfg, f"plugins.{need.owner}", need.request.steps
        if not cfg.words:
            raise ConfigError("no words to look for", where=f"{where}.words", fix="[dog]")
        if outside := [step for step in cfg.steps if not 0 <= step < total]:
            problem = f"steps {outside} are outside a run of {total}"
            raise ConfigError(problem, where=f"{where}.steps")
        holding = need.select(kind=["cross", "joint"])
        sites = [site for site in need.sites if site.name in holding]
        self.scale = cfg.scale or min(site.scale for site in sites)
        names = frozenset(site.name for site in sites if site.scale == self.scale)
        if not names:
            known = sorted({site.scale for site in sites})
            raise ConfigError(f"no site of scale {cfg.scale}", where=f"{where}.scale",
                              fix=f"This model has {known}.")  # fmt: skip
        for word in cfg.words:
            need.probe(f"{need.owner}/{word}", "edit/text", word, names, where="words")
            for name in (word, *(f"{word} at {step}" for step in cfg.steps)):
                need.publish(f"map:{name}")

    @hookimpl
    def inlay_begin(self) -> None:
        self.sums: dict[str, Tensor] = {}

    @hookimpl
    def inlay_post_step(self, run: Run, step: Step) -> None:
        for word in self.cfg.words:
            read = step.probes.get(f"{self.name}/{word}", {})
            if not read:
                continue
            seen = torch.stack([columns.float().sum(2) for columns in read.values()]).mean(0)
            self.sums[word] = seen + self.sums.get(word, torch.zeros_like(seen))
            if step.index in self.cfg.steps:
                run.board[f"map:{word} at {step.index}"] = self._picture(seen, run)

    @hookimpl
    def inlay_final(self, run: Run) -> None:
        for word, total in self.sums.items():
            run.board[f"map:{word}"] = self._picture(total, run)

    def _picture(self, seen: Tensor, run: Run) -> Tensor:
        """`b n` as `b 1 h w`, stretched to 0..1."""
        height, width = (-(-side // self.scale) for side in run.backbone.grid(run.size))
        return masks.minmax(seen.reshape(-1, 1, height, width)).nan_to_num(0.0)  # constant: 0
