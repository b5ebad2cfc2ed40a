"""Where text and picture lie at every attention site of a denoiser nobody described: by trying.

While every attention answers zero, tokens meet nowhere but in the residual stream of their own, so
the queries and keys that move when the prompt is changed are the prompt's, and those that move with
the picture are the picture's, at any depth.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from einops import einsum
from torch import Tensor, nn

from inlay_attention import Seam, attention_modules
from inlay_config.errors import ModelError

PICTURE = re.compile(r"hidden_states|sample|x|latents|img|image|pixel_values")
TEXT = re.compile(r"encoder_hidden_states\w*|\w*(text|txt|prompt|caption|cap_feats|context)\w*")
NEITHER = re.compile(r".*(mask|_ids|image|lens|length|pooled|kwargs)")  # beside the prompt's tokens
READINGS = 8  # numbers that a token's queries, or keys, of all heads are told apart by
Name = Literal["text", "image", "rest"]
Side = tuple[str, Literal["queries", "keys"]]  # of a site


@dataclass(frozen=True)
class SiteSpans:
    """Token slices of queries and keys by name, which cover all of them: "text", "image", and
    "rest", "rest 2" ... of tokens that no input moves (registers, padding of the model's own).

    kind: "cross" where a prompt is read by a picture, "self" where the queries are the keys' kind
    (a picture's, or in a refiner a prompt's), "joint" where both are among the keys.
    """

    kind: Literal["self", "cross", "joint"]
    queries: dict[str, slice]
    keys: dict[str, slice]


@torch.no_grad()
def probe(
    denoiser: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, SiteSpans]:
    """The attention modules that reach `scaled_dot_product_attention` in the call
    `denoiser(*args, **kwargs)`, by path, and their tokens; they hold for calls of equal shapes and
    masks. Three forwards, five where the prompt modulates the picture; nothing is left behind.

    A module without softmax attention (Sana's linear one) never gets there and is no site. Raises
    ModelError where tokens cannot be told apart.
    """
    call = inspect.signature(denoiser.forward).bind(*args, **(kwargs or {}))
    given, where = dict(call.arguments), type(denoiser).__name__
    picture = [name for name, x in given.items() if PICTURE.fullmatch(name) and _holds_tokens(x)]
    beside = [name for name in given if NEITHER.match(name)]
    text = [name for name, x in given.items() if TEXT.fullmatch(name) and _holds_tokens(x)]
    text = [name for name in text if name not in beside]
    if not picture:
        problem = f"takes {', '.join(given)}, and none of them is known for the picture"
        fix = "Name it hidden_states or sample: a tensor of latents or tokens, or a list of them."
        raise ModelError(problem, where=where, fix=fix)

    def moved_by(names: list[str], token: int | None = None) -> dict[Side, Tensor]:
        changed = {name: _changed(given[name], token) for name in names}
        now = _watch(denoiser, call, given | changed)
        off = {at: (now[at] - was).abs().amax(-1) for at, was in stock.items()}
        return {at: off[at] > 1e-5 * was.abs().amax(-1) for at, was in stock.items()}

    stock = _watch(denoiser, call, given)
    if not stock:
        problem = "no attention module reaches scaled_dot_product_attention"
        raise ModelError(problem, where=where, fix='Call model.set_attention_backend("native").')
    with_text, with_picture = moved_by(text), moved_by(picture)
    both = any(bool((with_text[at] & moved).any()) for at, moved in with_picture.items())
    corners = [moved_by(picture, token) for token in (0, -1)] if both else []
    spans: dict[str, list[dict[str, slice]]] = {}
    for (site, side), moved in with_text.items():
        at = site, side
        doubtful = moved & with_picture[at]
        if corners and bool((doubtful & corners[0][at] & corners[1][at]).any()):
            problem = f"{side} move with the prompt and with every part of the picture"
            fix = "Its family needs a backbone of its own."
            raise ModelError(problem, where=f"site {site}", fix=fix)
        named = _spans(f"site {site}, {side}", moved, with_picture[at], bool(text))
        spans.setdefault(site, []).append(named)
    return {site: SiteSpans(_kind(*sides), *sides) for site, sides in spans.items()}


def _holds_tokens(x: Any) -> bool:
    """Whether these are floats `b n c`, pictures, video, or a list with one of them per row."""
    if isinstance(x, list | tuple):
        return bool(x) and all(isinstance(p, Tensor) and p.is_floating_point() for p in x)
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 2


def _changed(x: Any, token: int | None) -> Any:
    """The argument with noise of its own size on it, or on the picture's first (0) or last (-1)
    token alone."""
    if isinstance(x, list | tuple):
        return [_changed(part[None], token)[0] for part in x]
    size = float(x.float().square().mean().sqrt()) or 1.0  # a null prompt may be zeros
    noise = (size * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).to(x)
    if token is None:
        return x + noise
    at = (..., token, token) if x.dim() > 3 else (slice(None), token)
    changed = x.clone()
    changed[at] += noise[at]
    return changed


def _watch(
    denoiser: nn.Module, call: inspect.BoundArguments, given: dict[str, Any]
) -> dict[Side, Tensor]:
    """One forward in which tokens do not mix: readings `R n s` of the queries and keys of each
    site. `forward`, not a call: hooks on the denoiser are the caller's."""
    every = {name: module for name, module in denoiser.named_modules() if name}
    modules, seen = attention_modules(denoiser) or every, dict[Side, Tensor]()

    def program(site: str) -> Callable[..., Tensor]:
        def zero(sdpa: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
            if (site, "keys") in seen:
                problem = "calls scaled_dot_product_attention more than once in a forward"
                fix = "Unload IP-Adapters; a family that attends row by row cannot be edited."
                raise ModelError(problem, where=f"site {site}", fix=fix)
            seen[site, "queries"], seen[site, "keys"] = _read(q), _read(k)
            return q.new_zeros(*q.shape[:3], v.shape[3])

        return zero

    asked = inspect.BoundArguments(call.signature, given)
    with Seam(modules) as seam:
        seam.programs = {site: program(site) for site in modules}  # type: ignore[misc]
        denoiser.forward(*asked.args, **asked.kwargs)
    return seen


def _read(x: Tensor) -> Tensor:
    """`R h n d` -> `R n s`: every token by a few numbers, so that no Q or K is kept."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(x.shape[1], x.shape[3], READINGS, generator=generator).to(x.device)
    return einsum(x.float(), weights, "r h n d, h d s -> r n s")


def _spans(where: str, text: Tensor, picture: Tensor, knows_text: bool) -> dict[str, slice]:
    """Token slices by name, from what moved with what, `R n` each."""
    text = (text & ~picture).any(0)
    picture = picture.any(0)
    if bool((text & picture).any()):
        problem = "a token is the prompt's in one row and the picture's in another"
        fix = "Give every prompt of a call as many tokens, or call once per prompt."
        raise ModelError(problem, where=where, fix=fix)
    if not bool((text | picture).any()) or (not knows_text and not bool(picture.all())):
        problem = "tokens move with no input that is known"
        fix = "Name the prompt's tokens encoder_hidden_states, the picture's hidden_states."
        raise ModelError(problem, where=where, fix=fix)
    if not bool(picture.any()):  # a prompt alone: what does not move is its padding
        return {"text": slice(0, len(text))}
    spans, rests = dict[str, slice](), 0
    for name, at in _runs(text, picture):
        rests += name == "rest"
        unique = f"rest {rests}" if name == "rest" and rests > 1 else name
        if unique in spans:
            problem = f"tokens of the {'prompt' if name == 'text' else 'picture'} are not together"
            raise ModelError(problem, where=where, fix="Edit a model that keeps them together.")
        spans[unique] = at
    return spans


def _runs(text: Tensor, picture: Tensor) -> list[tuple[Name, slice]]:
    """Runs of tokens of one name; padding inside a prompt or a picture belongs to it."""
    moved = zip(text.tolist(), picture.tolist(), strict=True)
    names: list[Name] = ["image" if p else "text" if t else "rest" for t, p in moved]
    runs: list[tuple[Name, slice]] = []
    for name, group in groupby(names):
        start = runs[-1][1].stop if runs else 0
        stop = start + len(list(group))
        if len(runs) > 1 and runs[-1][0] == "rest" and runs[-2][0] == name:
            runs[-2:] = [(name, slice(runs[-2][1].start, stop))]
        else:
            runs.append((name, slice(start, stop)))
    return runs


def _kind(queries: dict[str, slice], keys: dict[str, slice]) -> Literal["self", "cross", "joint"]:
    inputs = ("text", "image")
    if all(name in keys for name in inputs):
        return "joint"
    return "self" if all((n in queries) == (n in keys) for n in inputs) else "cross"
