"""The edit algebra: what plugins say about an attention site, and its lowering to fused SDPA calls.

With P = softmax(Q Kᵀ / √d + mask) of a branch's rows:
  scale   P[:, keys] ← w·P[:, keys]              V rows × w; renorm: log w joins the mask
  gain    logits[:, keys] ← g·logits[:, keys]    K rows × g
  append  keys of another branch too             joined to K, V; sum: K ← own·K + g·K', V likewise
  probe   P at a few columns or rows             one SDPA with one-hot V; never an N×N map
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from einops import repeat
from torch import Tensor

from inlay_config.errors import InputError, PluginError

from .events import Probe, Rows, Span

Number = float | Tensor
Keys = Span | tuple[int, ...]
Spans = dict[str, slice]
Sdpa = Callable[..., Tensor]
Pair = tuple[Tensor, Tensor]
Op = Literal["scale", "gain", "append"]
ALL = slice(None)


@dataclass(frozen=True, eq=False, slots=True)
class Edit:
    """One operation on one branch at one site; keys: a span, or indices of text tokens."""

    op: Op
    plugin: str
    branch: str
    queries: Span
    keys: Keys = "all"
    value: Number = 1.0
    renorm: bool = False
    from_: str = ""
    how: Literal["join", "sum"] = "join"
    own: Number = 1.0


@dataclass
class AttnEdits:
    """Builder for `inlay_attention`: `edits.on("edit").gain("image", 1.05)`; operations chain.
    allowed: (plugin, op, target, from) declared for this site and step; branches: alive in it.
    """

    allowed: Collection[tuple[str, str, str, str]]
    where: str
    branches: tuple[str, ...]
    owner: str = ""
    target: str = "edit"
    queries: Span = "all"
    by_branch: dict[str, list[Edit]] = field(default_factory=dict)

    def on(self, target: str, queries: Span = "all") -> AttnEdits:
        """A lane (all its branches) or one branch such as "edit/text", and which of its queries."""
        return replace(self, target=target, queries=queries)

    def scale(self, keys: Keys, weight: Number, renorm: bool = False) -> AttnEdits:
        """Multiply columns of P by `weight` >= 0; renorm: rows sum to one again."""
        return self._add("scale", keys=keys, value=weight, renorm=renorm)

    def gain(self, keys: Keys, gain: Number) -> AttnEdits:
        """Multiply the logits of `keys` by `gain` (Add-it's gamma)."""
        return self._add("gain", keys=keys, value=gain)

    def append(
        self, from_: str, keys: Span, gain: Number = 1.0, how: str = "join", own: Number = 1.0
    ) -> AttnEdits:
        """See `keys` of another lane too. join: beside the own ones, their logits × gain;
        sum: in their place, K ← own·K + gain·K' and V likewise."""
        return self._add("append", from_, keys=keys, value=gain, how=how, own=own)

    def _add(self, op: Op, from_: str = "", **fields: Any) -> AttnEdits:
        """Record for each branch; keys come from the same role of `from_`, else from its text."""
        if (self.owner, op, self.target, from_) not in self.allowed:
            what = f"{op} on {self.target}{from_ and ' from ' + from_}"
            fix = "Declare it with need.edit(...) for this site and window."
            problem = f"{self.owner} emitted an undeclared edit: {what}"
            raise PluginError(problem, where=self.where, fix=fix)
        for branch in self.branches:
            if self.target in (branch, lane_of(branch)):
                twin = f"{lane_of(from_)}/{(from_ if '/' in from_ else branch).split('/')[1]}"
                twin = twin if twin in self.branches else f"{lane_of(from_)}/text"
                edit = Edit(op, self.owner, branch, self.queries, from_=twin, **fields)
                self.by_branch.setdefault(branch, []).append(edit)
        return self


@dataclass
class SiteProgram:
    """What one site computes in one model call in place of SDPA; pure, as checkpointing reruns it.
    spans(queries, keys): token slices of both; words[probe]: text tokens; store[probe][site]: read.
    """

    site: str
    rows: Rows
    edits: dict[str, list[Edit]]
    probes: Sequence[Probe]
    words: dict[str, tuple[int, ...]]
    spans: Callable[[int, int], tuple[Spans, Spans]]
    store: dict[str, dict[str, Tensor]]

    def __call__(
        self, sdpa: Sdpa, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """q `R h n d`, k and v `R h m d` -> `R h n d`. Rows without edits stay untouched, in as few
        calls as they form runs."""
        if enable_gqa:
            k, v = (repeat(t, "b h n d -> b (h g) n d", g=q.shape[1] // k.shape[1]) for t in (k, v))
        if is_causal:
            mask = torch.ones(q.shape[2], k.shape[2], device=q.device).tril().bool()
        mask, options = as_bias(mask, q), {"dropout_p": dropout_p, "scale": scale}
        spans = q_spans, _ = self.spans(q.shape[2], k.shape[2])
        for probe in self.probes:
            span = q_spans.get("image" if probe.read == "columns" else "text", ALL)
            keys = self._keys((k, v), mask, probe.branch, span, spans)
            queries, words = q[self.rows[probe.branch]], self.words[probe.name]
            seen = _read(sdpa, probe, words, queries, keys, spans, scale)
            self.store.setdefault(probe.name, {})[self.site] = seen
        out = []
        for rows, branch in self.rows.runs(self.edits):
            if branch is None:
                out.append(sdpa(q[rows], k[rows], v[rows], _take(mask, rows), **options))
                continue
            parts = []
            for span in self._partition(branch, q_spans):
                keys = self._keys((k, v), mask, branch, span, spans)
                bias = _take(keys.mask, ALL, span)
                parts.append(sdpa(q[rows, :, span], keys.k, keys.v, bias, **options))
            out.append(cat(parts, dim=2))
        return cat(out)

    def _partition(self, branch: str, q_spans: Spans) -> list[slice]:
        """Query slices with one edit list each: all, or the spans in token order."""
        named = {e.queries: e.plugin for e in self.edits[branch] if e.queries != "all"}
        for queries in named.keys() - q_spans.keys():
            problem = f"{named[queries]} edits {queries} queries, which this site has not"
            raise PluginError(problem, where=f"site {self.site}", fix="Declare other sites.")
        return sorted(q_spans.values(), key=lambda s: s.start or 0) if named else [ALL]

    def _keys(
        self, kv: Pair, mask: Tensor | None, branch: str, span: slice, spans: tuple[Spans, Spans]
    ) -> _Keys:
        """Keys that the queries `span` of a branch see: own ones first, appended ones behind."""
        k, v = kv
        rows, total, joined = self.rows[branch], k.shape[2], []
        own_k, own_v, own_mask = k[rows], v[rows], _take(mask, rows)
        edits = sorted(self.edits.get(branch, ()), key=lambda e: (e.op, e.plugin))
        for e in edits:  # sorted: the order of plugins moves no bits
            if e.queries != "all" and spans[0].get(e.queries) != span:
                continue
            at = _index(e.keys, spans[1], total)
            if e.op == "append":
                if e.from_ not in self.rows:
                    problem = f"{e.plugin} appends from {e.from_}, which has no rows in this call"
                    raise PluginError(problem, where=f"site {self.site}")
                source = self.rows[e.from_]
                new_k, new_v = (_expand(t[source][:, :, at], own_k.shape[0]) for t in (k, v))
                if e.how == "join":
                    joined.append((new_k * e.value, new_v, _take(mask, source, ALL, at)))
                else:
                    own_k = _put(own_k, at, own_k[:, :, at] * e.own + new_k * e.value)
                    own_v = _put(own_v, at, own_v[:, :, at] * e.own + new_v * e.value)
            elif e.op == "gain":
                own_k = _put(own_k, at, own_k[:, :, at] * e.value)
            elif e.renorm:
                bias = torch.zeros(total, dtype=k.dtype, device=k.device)
                bias[at] = torch.as_tensor(e.value, dtype=k.dtype, device=k.device).log()
                own_mask = bias[None, None, None] + (0 if own_mask is None else own_mask)
            else:
                own_v = _put(own_v, at, own_v[:, :, at] * e.value)
        if joined and own_mask is not None:  # appended keys keep the mask their source gave them
            more = [k.new_zeros(1, 1, 1, n.shape[2]) if m is None else m for n, _, m in joined]
            shape = torch.broadcast_shapes(*(m.shape[:3] for m in (own_mask, *more)))
            own_mask = torch.cat([m.expand(*shape, -1) for m in (own_mask, *more)], dim=-1)
        own_k = cat([own_k, *(new for new, _, _ in joined)], dim=2)
        own_v = cat([own_v, *(new for _, new, _ in joined)], dim=2)
        return _Keys(own_k, own_v, own_mask)


@dataclass(frozen=True)
class _Keys:
    """Effective keys, values and mask of a branch."""

    k: Tensor
    v: Tensor
    mask: Tensor | None


def _read(
    sdpa: Sdpa, probe: Probe, words: tuple[int, ...], q: Tensor, keys: _Keys,
    spans: tuple[Spans, Spans], scale: float | None,
) -> Tensor:  # fmt: skip
    """One probe, exact under any mask: columns `b n t`, rows `b t n`; memory linear in tokens."""
    (q_spans, k_spans), width, rows = spans, q.shape[3], probe.read == "rows"
    if "text" not in (q_spans if rows else k_spans) or len(words) > width:
        problem = f"cannot read {probe.read} of {len(words)} text tokens at this site"
        fix = "Choose sites that hold the text, and at most as many tokens as a head is wide."
        raise PluginError(problem, where=f"probe {probe.name}", fix=fix)
    at = [(q_spans if rows else k_spans)["text"].start + t for t in words]
    if rows:
        logits = torch.einsum("b h t d, b h n d -> b h t n", q[:, :, at], keys.k)
        bias = _take(keys.mask, ALL, at)
        logits = logits * (scale or width**-0.5) + (0 if bias is None else bias)
        return logits.softmax(-1)[..., k_spans["image"]].mean(1)
    # one-hot values, as wide as a head: a narrower V falls off the fused path
    one_hot = torch.zeros(keys.k.shape[2], width, dtype=q.dtype, device=q.device)
    one_hot[at, range(len(words))] = 1
    values, queries = one_hot.expand(*keys.k.shape[:2], -1, -1), q_spans["image"]
    seen = sdpa(q[:, :, queries], keys.k, values, _take(keys.mask, ALL, queries), scale=scale)
    return seen[..., : len(words)].mean(1)


def lane_of(branch: str) -> str:
    """The lane "edit" of the branch "edit/text"."""
    return branch.split("/")[0]


def as_bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Any SDPA mask as a bias `(R|1) (h|1) (n|1) m`: False -> -inf."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype == torch.bool:
        return like.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
    return mask


def cat(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _index(keys: Keys, spans: Spans, total: int) -> Any:
    if isinstance(keys, str):
        return slice(0, total) if keys == "all" else spans[keys]
    return [spans["text"].start + i for i in keys]


def _put(x: Tensor, at: Any, value: Tensor) -> Tensor:
    """x `b h n d` with tokens `at` replaced; a copy, since other branches share K and V."""
    if isinstance(at, list):
        return x.index_copy(2, torch.tensor(at, device=x.device), value)
    return cat([p for p in (x[:, :, : at.start], value, x[:, :, at.stop :]) if p.shape[2]], dim=2)


def _expand(x: Tensor, n: int) -> Tensor:
    """Rows of a source for the n rows of a branch: one source may serve many pictures."""
    if x.shape[0] not in (1, n):
        problem, fix = f"cannot share {x.shape[0]} source rows with {n} rows", "Use equal n, or 1."
        raise InputError(problem, where="append", fix=fix)
    return x.expand(n, -1, -1, -1)


def _take(mask: Tensor | None, rows: slice, queries: Any = ALL, keys: Any = ALL) -> Tensor | None:
    """Part of a bias that broadcasts over `R h n m`; singleton axes stay."""
    if mask is None:
        return None
    mask = mask[rows] if mask.shape[0] > 1 else mask
    return (mask[:, :, queries] if mask.shape[2] > 1 else mask)[..., keys]
