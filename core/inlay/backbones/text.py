"""Prompt tokens as text: what a word's token indices are found in."""

from __future__ import annotations

from typing import Any

from ..errors import InputError


def pieces(tokenizer: Any, prompt: str, length: int) -> list[str]:
    """Text pieces in the order of the embedding's rows, special tokens included. Raises InputError when the prompt does not fit."""
    ids = tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
    if len(ids) > length:
        raise InputError(f"the prompt has {len(ids)} tokens, the model takes {length}: {prompt[:80]!r}", where="prompt", fix="Shorten it.")
    return list(tokenizer.convert_ids_to_tokens(ids))
