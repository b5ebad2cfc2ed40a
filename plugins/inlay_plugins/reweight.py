"""Make words of the prompt louder or quieter (Prompt-to-Prompt, section 3.2: re-weighting).

Multiplies the picture's attention to the words' tokens at every site that holds the text. A weight
of 0 silences a word, a negative one pushes away from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from inlay import AttnEdits, ConfigError, Needs, Plugin, Run, Window, hookimpl


class Reweight(Plugin):
    """Scales columns of the attention map of the lane `edit`, under its prompt alone."""

    @dataclass
    class Config:
        """words: words of prompt.edit and their weights, {dog: 2, grass: 0.5}.
        active: when, [first, last] step or progress. renorm: attention sums to one again, which
        only positive weights allow; published: not.
        """

        words: dict[str, float] = field(default_factory=dict)
        active: Any = field(default_factory=lambda: [0.0, 1.0])
        renorm: bool = False

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, where = self.cfg, f"plugins.{need.owner}"
        if not cfg.words:
            raise ConfigError("no words to weigh", where=f"{where}.words", fix="{dog: 2}")
        if cfg.renorm and min(cfg.words.values()) <= 0:
            raise ConfigError(f"{cfg.words} holds a weight of 0 or less", where=f"{where}.words",
                              fix="Use positive weights, or renorm: false.")  # fmt: skip
        if window := Window.parse(cfg.active, f"{where}.active"):
            sites = need.select(kind=["cross", "joint"])
            need.edit("scale", "edit/text", sites, window, queries="image", keys="text")
        for word in cfg.words:
            need.word(f"{need.owner}/{word}", "edit/text", word, "words")

    @hookimpl
    def inlay_attention(self, run: Run, edits: AttnEdits) -> None:
        for word, weight in self.cfg.words.items():
            tokens = run.words[f"{self.name}/{word}"]
            edits.on("edit/text", "image").scale(tokens, weight, self.cfg.renorm)
