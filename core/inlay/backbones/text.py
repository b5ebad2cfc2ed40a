"""Prompt tokens as text: what a word's token indices are found in."""

from __future__ import annotations

from typing import Any

from inlay_config.errors import InputError

from ..events import Cond


def pieces(tokenizer: Any, prompt: str, length: int) -> list[str]:
    """Text pieces in the order of the embedding's rows, special tokens included.

    Raises InputError when the prompt does not fit into `length` tokens.
    """
    ids = tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
    if len(ids) > length:
        problem = f"the prompt has {len(ids)} tokens, the model takes {length}: {prompt[:80]!r}"
        raise InputError(problem, where="prompt", fix="Shorten it.")
    return list(tokenizer.convert_ids_to_tokens(ids))


def find(cond: Cond, word: str | tuple[int, ...]) -> tuple[int, ...]:
    """Indices of all pieces of the first occurrence of `word` (whole words, any case), or as given.

    Raises InputError when the prompt does not hold it.
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
    fix = "Use the very words of prompt.edit (whole words, singular or plural as written)."
    raise InputError(f"{word!r} is not in the prompt {text.strip()!r}", where="subject", fix=fix)
