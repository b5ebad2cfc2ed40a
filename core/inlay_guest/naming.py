"""Whose row is it: the rows of a model call are found among the prompts that the call encoded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from inlay import Cond, InputError, ModelError, Rows
from inlay.backbones.text import find

REMEDY = (
    "Give prompts, not embeddings that the pipeline changes; let prompt and negative prompt "
    "differ; or use inlay.Session, which makes the rows itself."
)


class Prompts:
    """What `encode_prompt` returned during one call of a pipeline, by branch.

    rows[branch]: an embedding `t c` per row of the batch; text[branch]: the prompt as it was given;
    tokens[branch]: the text pieces of the first row, in the order of its embedding.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.rows: dict[str, list[Tensor]] = {}
        self.text: dict[str, str] = {}
        self.tokens: dict[str, list[str]] = {}
        self._known: list[tuple[Tensor, int, Rows]] = []

    def record(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`encode_prompt(...)`, written down. It returns the prompt's embedding first and, unless
        the negative prompt has a call of its own, then that of the negative one."""
        given = inspect.signature(encode).bind(*args, **kwargs).arguments
        with self._listening() as heard:
            encoded = encode(*args, **kwargs)
        found = [rows for part in _parts(encoded) if (rows := _rows(part))]
        if not found:
            return encoded
        width, names = found[0][0].shape[1], ["prompt", "negative_prompt"]
        if self.rows and width != self.rows["edit/text"][0].shape[1]:
            return encoded  # a second encoder's; the first one's rows are named already
        found = [rows for rows in found if rows[0].shape[1] == width][:2]
        branches = [b for b in ("edit/text", "edit/null") if b not in self.rows]
        for turn, (branch, rows) in enumerate(zip(branches, found, strict=False)):
            words = given.get(names[turn] if len(found) > 1 else "prompt")
            words = words[0] if isinstance(words, list | tuple) and words else words
            self.rows[branch], self.text[branch] = rows, words or ""
            said = {name: calls[turn] for name, calls in heard.items() if len(calls) > turn}
            self.tokens[branch] = self._pieces(said, rows[0], self.text[branch])
        return encoded

    def cond(self, branch: str) -> Cond:
        """The first row of a branch as a condition."""
        return Cond(self.rows[branch][0][None], None, self.tokens.get(branch, []))

    def name(self, arguments: Mapping[str, Any]) -> Rows:
        """The rows of a denoiser call by branch. Raises ModelError where they cannot be told."""
        text = {name: value for name, value in arguments.items() if _rows(value)}
        for value in sorted(text, key=lambda name: name != "encoder_hidden_states"):
            if rows := self._match(text[value]):
                return rows
        if not self.rows and text.keys() <= {next(iter(arguments))}:  # a model without prompts
            return Rows.of({"edit/text": batch(arguments)})
        problem = "no argument of this call holds the embeddings that encode_prompt returned"
        raise ModelError(problem, where="rows", fix=REMEDY)

    def _match(self, value: Any) -> Rows | None:
        """Rows by branch when `value` is made of recorded embeddings, remembered while it lives."""
        for known, version, rows in self._known:
            if known is value and known._version == version:
                return rows
        names = [self._owner(row) for row in _rows(value)]
        if "" in names or not names:
            return None
        runs = [(name, len(list(run))) for name, run in groupby(names)]
        if len(runs) > len(dict(runs)):
            order = ", ".join(name for name, _ in runs)
            raise ModelError(f"rows are not side by side: {order}", where="rows", fix=REMEDY)
        for name, count in runs:
            if count != len(self.rows[name]):
                problem = f"{count} rows of {name} in one call for {len(self.rows[name])} pictures"
                raise ModelError(problem, where="rows", fix=REMEDY)
        rows = Rows.of(dict(runs))
        if isinstance(value, Tensor):
            self._known.append((value, value._version, rows))
        return rows

    def _owner(self, row: Tensor) -> str:
        """The branch whose embedding this is; "" for none."""
        owners = [name for name, rows in self.rows.items() if any(_same(row, r) for r in rows)]
        if len(owners) > 1:
            problem = f"{' and '.join(owners)} have the same embedding and cannot be told apart"
            raise ModelError(problem, where="rows", fix=REMEDY)
        return owners[0] if owners else ""

    @contextmanager
    def _listening(self) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
        """Token ids `b t` and first output of every call of every text encoder."""
        heard: dict[str, list[tuple[Tensor, Tensor]]] = {}
        with ExitStack() as stack:
            for name, module in self.pipe.components.items():
                if name.startswith("text_encoder") and isinstance(module, nn.Module):

                    def hear(_: Any, args: Any, given: Any, out: Any, name: str = name) -> None:
                        ids = given.get("input_ids", args[0] if args else None)
                        if isinstance(ids, Tensor) and ids.dim() == 2:
                            heard.setdefault(name, []).append((ids, out[0]))

                    hook = module.register_forward_hook(hear, with_kwargs=True)
                    stack.callback(hook.remove)
            yield heard

    def _pieces(
        self, heard: Mapping[str, tuple[Tensor, Tensor]], row: Tensor, prompt: str
    ) -> list[str]:
        """Text pieces behind an embedding `t c`: of the encoder whose output it is, or that is as
        long; of several, one behind the other (SD3); or the end of a longer one, whose template was
        cut off. What a template puts around the prompt is emptied: words are the prompt's."""
        said: dict[int, list[str]] = {}
        for name, (ids, out) in heard.items():
            tokenizer: Any = getattr(self.pipe, name.replace("text_encoder", "tokenizer"), None)
            if hasattr(tokenizer, "convert_ids_to_tokens"):
                pieces = tokenizer.convert_ids_to_tokens(ids[0].tolist())
                if _same(row, out[0]):
                    said = {len(row): pieces}
                    break
                said.setdefault(len(pieces), pieces)
        joined = [piece for pieces in said.values() for piece in pieces]
        pieces = said.get(len(row)) or joined[-len(row) :]
        if len(pieces) != len(row):
            return []
        try:
            inside = set(find(Cond(row[None], None, pieces), prompt))
        except InputError:  # the tokenizer respells it
            return pieces
        return [piece if i in inside else "" for i, piece in enumerate(pieces)]


def batch(arguments: Mapping[str, Any]) -> int:
    """Rows of a denoiser call: of its first argument, a tensor or a list of one per row."""
    return len(next(iter(arguments.values())))


def _parts(encoded: Any) -> list[Any]:
    return list(encoded) if isinstance(encoded, tuple) else [encoded]


def _rows(value: Any) -> list[Tensor]:
    """The rows `t c` of a batch of embeddings: a tensor `b t c`, or a list of them; else []."""
    if isinstance(value, Tensor):
        return list(value) if value.dim() == 3 and value.is_floating_point() else []
    if isinstance(value, list | tuple) and value:
        fits = all(isinstance(v, Tensor) and v.dim() == 2 for v in value)
        return list(value) if fits and value[0].is_floating_point() else []
    return []


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b.to(a))
