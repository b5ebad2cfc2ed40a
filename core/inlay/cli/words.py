"""Words that plugins look for in the prompts, found before anything is loaded where that can be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from inlay.backbones import Backbone
from inlay.backbones.text import Cond, find
from inlay.plan import Plan
from inlay_config.errors import ModelError


@dataclass(frozen=True)
class Word:
    """branch: whose prompt; tokens: where it stands there, None: unchecked, since no tokenizer of
    the model is on this machine."""

    branch: str
    word: str
    tokens: tuple[int, ...] | None

    def __str__(self) -> str:
        said = "unchecked, the model's tokenizer is not on this machine"
        if self.tokens is not None:
            said = f"tokens {', '.join(map(str, self.tokens))}"
        return f"  {self.word!r} in the prompt of {self.branch}: {said}"


def find_words(plan: Plan, backbone: Backbone) -> list[Word]:
    """Every word once. Raises InputError for one that its prompt does not hold."""
    prompts = {b.name: plan.request.prompt[b.cond] for p in plan.passes for b in p.branches}
    found = dict[tuple[str, str], Word]()
    for branch, word, where in plan.words.values():
        if not isinstance(word, str):
            continue
        try:
            told = Cond(torch.empty(0), tokens=backbone.pieces(prompts[branch]))
            tokens = find(told, word, where)
        except ModelError:
            tokens = None
        found[branch, word] = Word(branch, word, tokens)
    return list(found.values())


def words_table(words: list[Word]) -> str:
    """What `inlay plan` prints below the plan; "" without words."""
    return "\n".join(["words", *map(str, words)]) if words else ""


def words_data(words: list[Word]) -> list[dict[str, Any]]:
    """The same for `inlay plan --json`."""
    return [asdict(word) | {"checked": word.tokens is not None} for word in words]
