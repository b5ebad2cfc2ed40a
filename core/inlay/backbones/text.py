"""Encoded prompts, and their tokens as text: what a word's token indices are found in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay_config.errors import InputError, ModelError


@dataclass
class Cond:
    """An encoded prompt: embeds `1 t c`, pooled `1 c` or None, the text piece of each row, and the
    model's own mask of its padding `1 t` or None."""

    embeds: Tensor
    pooled: Tensor | None = None
    tokens: list[str] = field(default_factory=list)
    mask: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Cond:
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, embeds=self.embeds.to(device, dtype), pooled=pooled, mask=mask)


def even(conds: dict[str, Cond]) -> tuple[dict[str, Cond], dict[str, int]]:
    """Prompts of branches padded with zeros to one length, and the true lengths where attention
    has to be kept from the padding: none for equal prompts, and where the model masks it itself."""
    most = max((cond.embeds.shape[1] for cond in conds.values()), default=0)
    padded, lengths = dict[str, Cond](), dict[str, int]()
    for branch, cond in conds.items():
        missing = most - cond.embeds.shape[1]
        mask = None if cond.mask is None else F.pad(cond.mask, (0, missing))
        padded[branch] = replace(cond, embeds=F.pad(cond.embeds, (0, 0, 0, missing)), mask=mask)
        if cond.mask is None:
            lengths[branch] = most - missing
    return padded, lengths if len(set(lengths.values())) > 1 else {}


def pieces(tokenizer: Any, prompt: str, length: int, cut: bool = False) -> list[str]:
    """Text pieces in the order of the embedding's rows, special tokens included.

    Raises InputError when the prompt does not fit into `length` tokens, unless it is to be `cut`,
    and ModelError without a tokenizer.
    """
    if tokenizer is None:
        raise ModelError("this pipeline has no tokenizer", where="model", fix="Load it with one.")
    limit = {"truncation": True, "max_length": length} if cut else {"truncation": False}
    ids = tokenizer(prompt, verbose=False, **limit)["input_ids"]
    if len(ids) > length:
        problem = f"the prompt has {len(ids)} tokens, the model takes {length}: {prompt[:80]!r}"
        raise InputError(problem, where="prompt", fix="Shorten it.")
    return list(tokenizer.convert_ids_to_tokens(ids))


def find(cond: Cond, word: str | tuple[int, ...], where: str = "prompt") -> tuple[int, ...]:
    """Indices of all pieces of the first occurrence of `word` (whole words, any case), or as given.

    Raises InputError, with the YAML path of the word, when the prompt does not hold it.
    """
    if not isinstance(word, str):
        return word
    text, owner = "", list[int]()
    for i, piece in enumerate(cond.tokens):
        clean = piece.replace("</w>", " ").replace("▁", " ").replace("Ġ", " ")
        text, owner = text + clean, owner + [i] * len(clean)
    wanted, folded, start = " ".join(word.split()).lower(), text.lower(), -1
    while wanted and (start := folded.find(wanted, start + 1)) >= 0:
        stop = start + len(wanted)
        if not (folded[max(start - 1, 0) : start].isalnum() or folded[stop : stop + 1].isalnum()):
            return tuple(dict.fromkeys(owner[start:stop]))
    fix = "Use the very words of the prompt (whole words, singular or plural as written)."
    raise InputError(f"{word!r} is not in the prompt {text.strip()!r}", where=where, fix=fix)
