"""Which tokens of one prompt stand for which of another (Prompt-to-Prompt, section 3.2). No hooks.

Prompts are lists of their tokens' text pieces, special tokens included (`Cond.tokens`); an
alignment also covers the padding behind them, up to `length` tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from inlay import InputError

Mode = Literal["fixed", "reference"]
SPECIAL = re.compile(r"<[^>]*>|\[[A-Z]+\]|")  # begin, end and padding


@dataclass(frozen=True)
class Alignment:
    """matrix `m m`: 1, or a share, where token i of the source stands for token j of the edit, so
    that maps of the source become maps of the edit as P M; known `m`: 1 where j has such an i."""

    matrix: Tensor
    known: Tensor


@dataclass(frozen=True)
class Columns:
    """What becomes of the text's columns of the edit's map in one step, all per token `m`:
    P[:, j] <- weight_j (share_j (P' M)[:, j] + (1 - share_j) P[:, j]), P' the source's map."""

    matrix: Tensor
    share: Tensor
    weight: Tensor

    def sources(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """The source's tokens that these of the edit are made of."""
        used = self.matrix[:, list(tokens)] != 0
        return tuple(used.any(1).nonzero().flatten().tolist())

    def __call__(
        self, own: Tensor, tokens: Sequence[int], theirs: Tensor, sources: Sequence[int]
    ) -> Tensor:
        """Columns `b n t` of the edit's `tokens` after the edit, from those before it and from the
        source's columns `b n s` of `sources`."""
        at, rows = list(tokens), list(sources)
        share, weight = self.share[at].to(own), self.weight[at].to(own)
        taken = theirs @ self.matrix[rows][:, at].to(own)
        return weight * (share * taken + (1 - share) * own)


def words(pieces: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
    """The words of a prompt and the tokens of each. A word ends at CLIP's `</w>`, and before a
    piece that begins with a space (`▁`, `Ġ`)."""
    found: list[tuple[str, tuple[int, ...]]] = []
    inside = False
    for i, piece in enumerate(pieces):
        text = piece.removesuffix("</w>")
        if SPECIAL.fullmatch(text):
            inside = False
            continue
        if inside and text[0] not in "▁Ġ":
            word, tokens = found.pop()
            found.append((word + text, (*tokens, i)))
        else:
            found.append((text.lstrip("▁Ġ"), (i,)))
        inside = not piece.endswith("</w>")
    return found


def identity(length: int) -> Alignment:
    """Every token stands for itself."""
    return Alignment(torch.eye(length), torch.ones(length))


def by_words(
    source: Sequence[str], edit: Sequence[str], length: int, mode: Mode = "fixed"
) -> Alignment:
    """Word by word: the k-th word of the source stands for the k-th of the edit; of two words with
    different token counts, every token of the one for an equal share of every token of the other.

    mode: what follows the last differing word moves along when the counts differ; published
    (reference), it does not, and every later token gets the map of a neighbour.
    Raises InputError unless both prompts have as many words.
    """
    ours, theirs = words(edit), words(source)
    if len(ours) != len(theirs):
        told = [" ".join(word for word, _ in listed) for listed in (theirs, ours)]
        raise InputError(
            f"{told[1]!r} has {len(ours)} words and {told[0]!r} has {len(theirs)}, and replace "
            "puts word in place of word",
            where="prompt.edit",
            fix="Use as many words, or edit: refine.",
        )
    matrix, i, j = torch.zeros(length, length), 0, 0
    for (word, tokens), (other, sources) in zip(ours, theirs, strict=True):
        if word == other:
            continue
        for k in range(tokens[0] - j):
            matrix[min(i + k, sources[0] - 1), j + k] = 1
        i, j = sources[-1] + 1, tokens[-1] + 1
        if len(tokens) == len(sources):
            matrix[sources, tokens] = 1
        else:
            matrix[sources[0] : i, tokens[0] : j] = 1 / len(tokens)
    if mode == "reference":
        rest = torch.arange(j, j + length - max(i, j))
        matrix[rest, rest] = 1
    else:
        rest = torch.arange(length - j)
        matrix[(i + rest).clamp(max=length - 1), j + rest] = 1
    return Alignment(matrix, torch.ones(length))


def by_tokens(source: Sequence[str], edit: Sequence[str], length: int) -> Alignment:
    """The longest common subsequence of tokens (Needleman and Wunsch 1970: match 1, mismatch -1,
    gap 0; ties: skip a token of the edit, then one of the source). Others have no counterpart."""
    best = [[0] * (len(edit) + 1) for _ in range(len(source) + 1)]
    for i, theirs in enumerate(source, 1):
        for j, ours in enumerate(edit, 1):
            match = best[i - 1][j - 1] + (1 if theirs == ours else -1)
            best[i][j] = max(best[i][j - 1], best[i - 1][j], match)
    matrix, i, j = torch.zeros(length, length), len(source), len(edit)
    while i and j:
        if best[i][j] == best[i][j - 1]:
            j -= 1
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            matrix[i, j] = 1
    padding = torch.arange(len(edit), length)
    matrix[padding, padding] = 1
    return Alignment(matrix, matrix.sum(0))
