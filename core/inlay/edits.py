"""The edit algebra: what plugins say about one attention site, and its lowering to fused SDPA calls.

With P = softmax(Q Kᵀ / √d + mask) of a branch's rows:
  scale   P[:, keys] ← w·P[:, keys]            V rows × w; renorm=True: log w joins the mask
  gain    logits[:, keys] ← g·logits[:, keys]  K rows × g
  append  further keys from another branch     concatenation (how="join"), or K ← own·K + gain·K' (how="sum"), V likewise
  probe   read P at a few columns or rows      one more SDPA with one-hot V, padded to the head width; never an N×N map
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor

from .errors import InlayError, PluginError
from .events import Probe, Rows, Span

Number = float | Tensor
Keys = Span | tuple[int, ...]
Sdpa = Callable[..., Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class Edit:
    """One operation on one branch at one site. `keys`: a span of the branch's tokens, or text token indices."""

    op: Literal["scale", "gain", "append"]
    plugin: str
    branch: str
    queries: Span
    keys: Keys = "all"
    value: Number = 1.0
    renorm: bool = False
    from_: str = ""
    how: Literal["join", "sum"] = "join"
    own: Number = 1.0


class On:
    """`edits.on(lane, queries)`: the operations on the rows of a lane (or of one branch, "edit/text")."""

    def __init__(self, edits: AttnEdits, target: str, queries: Span) -> None:
        self.edits, self.target, self.queries = edits, target, queries

    def scale(self, keys: Keys, weight: Number, renorm: bool = False) -> On:
        """Multiply columns of P by `weight` >= 0; renorm=True makes rows sum to one again."""
        return self._add("scale", keys=keys, value=weight, renorm=renorm)

    def gain(self, keys: Keys, gain: Number) -> On:
        """Multiply the logits of `keys` by `gain` (Add-it's gamma)."""
        return self._add("gain", keys=keys, value=gain)

    def append(self, from_: str, keys: Span, gain: Number = 1.0, how: Literal["join", "sum"] = "join", own: Number = 1.0) -> On:
        """Attend to another lane's keys too. join: concatenated, logits × gain. sum: K ← own·K + gain·K', V likewise."""
        return self._add("append", keys=keys, value=gain, from_=from_, how=how, own=own)

    def _add(self, op: Literal["scale", "gain", "append"], from_: str = "", **fields: Any) -> On:
        self.edits.add(op, self.target, self.queries, from_, fields)
        return self


@dataclass
class AttnEdits:
    """Builder given to `inlay_attention`. `allowed` holds (plugin, op, target, from) declared for this site and step;
    `branches` the branches alive in it. A lane stands for all its branches; each takes keys from the same role of `from_`."""

    allowed: frozenset[tuple[str, str, str, str]]
    where: str
    branches: tuple[str, ...]
    owner: str = ""
    by_branch: dict[str, list[Edit]] = field(default_factory=dict)

    def on(self, target: str, queries: Span = "all") -> On:
        return On(self, target, queries)

    def add(self, op: Literal["scale", "gain", "append"], target: str, queries: Span, from_: str, fields: dict[str, Any]) -> None:
        if (self.owner, op, target, from_) not in self.allowed:
            raise PluginError(f"{self.owner} emitted an undeclared edit: {op} on {target} {from_}", where=self.where,
                              fix="Declare it with need.edit(...) for this site and window.")  # fmt: skip
        for branch in self.branches:
            lane, role = branch.split("/")
            if target in (branch, lane):
                twin = from_ if "/" in from_ or not from_ else f"{from_}/{role}"
                twin = twin if not twin or twin in self.branches else f"{twin.split('/')[0]}/text"
                self.by_branch.setdefault(branch, []).append(Edit(op, self.owner, branch, queries, from_=twin, **fields))


@dataclass
class SiteProgram:
    """What one site computes in one model call. Called by the seam in place of SDPA; handlers are pure (checkpointing reruns them).

    spans: token slices of queries and keys, {"text": …, "image": …}; words: text token indices of each probe.
    """

    where: str
    rows: Rows
    edits: dict[str, list[Edit]]
    probes: Sequence[tuple[Probe, tuple[int, ...]]]
    spans: Callable[[int, int], tuple[dict[str, slice], dict[str, slice]]]
    site: str
    store: dict[str, dict[str, Tensor]]

    def __call__(self, sdpa: Sdpa, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0,
                 is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        """q `R h n d`, k and v `R h m d` -> `R h n d`; rows without edits go through SDPA untouched, in as few calls as there are runs."""
        if enable_gqa:
            k, v = (repeat(x, "b h n d -> b (h g) n d", g=q.shape[1] // k.shape[1]) for x in (k, v))
        if is_causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        q_spans, k_spans = self.spans(q.shape[2], k.shape[2])
        full = slice(0, q.shape[2])
        edited = {b: self.edits[b] for b in self.rows if b in self.edits}
        for probe, tokens in self.probes:
            if probe.branch in self.rows:
                keys = self._keys(q, k, v, mask, probe.branch, edited.get(probe.branch, []), k_spans)
                self.store.setdefault(probe.name, {})[self.site] = _read(sdpa, probe, tokens, q[self.rows[probe.branch]], keys, q_spans, k_spans, scale)
        if not edited:
            return sdpa(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
        out: list[Tensor] = []
        for rows, names in _runs(self.rows, edited):
            if names is None:
                out.append(sdpa(q[rows], k[rows], v[rows], attn_mask=_take(mask, rows, full), dropout_p=dropout_p, scale=scale))
                continue
            parts = []
            for span in _partition(edited[names], q_spans, full):
                acting = [e for e in edited[names] if e.queries == "all" or q_spans.get(e.queries) == span]
                keys = self._keys(q, k, v, mask, names, acting, k_spans)
                bias = _take(keys.mask, slice(None), span)
                parts.append(sdpa(q[rows, :, span], keys.k, keys.v, attn_mask=bias, dropout_p=dropout_p, scale=scale))
            out.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _keys(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, branch: str, edits: list[Edit], spans: dict[str, slice]) -> _Keys:
        """Keys, values and mask of a branch after its edits: own keys first, appended ones behind."""
        rows, joined = self.rows[branch], []
        own_k, own_v, own_mask = k[rows], v[rows], _take(mask, rows, slice(0, q.shape[2]))
        weights: list[tuple[Any, Number, bool]] = []
        for e in sorted(edits, key=lambda e: e.plugin):  # commuting edits in a fixed order: plugin order moves no bits
            if e.op == "append":
                if e.from_ not in self.rows:
                    raise PluginError(f"{e.plugin} appends from {e.from_}, which has no rows in this call", where=self.where,
                                      fix="Both branches must be alive in the step and called together.")  # fmt: skip
                src, at = self.rows[e.from_], _index(e.keys, spans, k.shape[2])
                new = [_expand(x[src][:, :, at], own_k.shape[0]) for x in (k, v)]
                if e.how == "join":
                    joined.append((_times(new[0], e.value), new[1], _take(mask, src, slice(0, q.shape[2]), at)))
                else:
                    own_k = _write(own_k, at, _times(own_k[:, :, at], e.own) + _times(new[0], e.value))
                    own_v = _write(own_v, at, _times(own_v[:, :, at], e.own) + _times(new[1], e.value))
            elif e.op == "gain":
                at = _index(e.keys, spans, k.shape[2])
                own_k = own_k * e.value if at == slice(0, k.shape[2]) else _write(own_k, at, own_k[:, :, at] * e.value)
            else:
                weights.append((_index(e.keys, spans, k.shape[2]), e.value, e.renorm))
        for at, w, renorm in weights:
            if renorm:
                bias = torch.zeros(k.shape[2], dtype=q.dtype, device=q.device)
                bias[at] = torch.as_tensor(w, dtype=q.dtype, device=q.device).log()
                own_mask = bias.expand(1, 1, 1, -1) if own_mask is None else _float(own_mask, q.dtype) + bias
            else:
                own_v = _write(own_v, at, own_v[:, :, at] * w)
        keys = _Keys(own_k, own_v, own_mask, k.shape[2])
        if joined:
            keys = _Keys(torch.cat([keys.k, *(j[0] for j in joined)], 2), torch.cat([keys.v, *(j[1] for j in joined)], 2),
                         _join_masks(keys, [(j[2], j[0].shape[2]) for j in joined], q), k.shape[2])  # fmt: skip
        return keys


@dataclass
class _Keys:
    """Effective keys of a branch: `own` of them are its own, the rest appended."""

    k: Tensor
    v: Tensor
    mask: Tensor | None
    own: int


def _read(sdpa: Sdpa, probe: Probe, tokens: tuple[int, ...], q: Tensor, keys: _Keys, q_spans: dict[str, slice],
          k_spans: dict[str, slice], scale: float | None) -> Tensor:  # fmt: skip
    """One probe: columns `b n t`, rows `b t n`, mass `b 3`; exact, any mask, memory linear in tokens."""
    d = q.shape[3]
    if probe.read == "rows":
        if "text" not in q_spans:
            raise PluginError(f"probe {probe.name} reads rows of text queries, which this site has not", where=str(probe.sites), fix='Use read="columns".')
        at = [q_spans["text"].start + t for t in tokens]
        logits = torch.einsum("b h t d, b h n d -> b h t n", q[:, :, at], keys.k) * (scale or d**-0.5)
        if keys.mask is not None:
            logits = logits + _float(_take(keys.mask, slice(None), at), q.dtype)
        return logits.softmax(-1)[..., k_spans["image"]].mean(1)
    if probe.read == "columns":
        groups = [[k_spans["text"].start + t] for t in tokens]
        queries = q_spans["image"]
    else:
        image = range(k_spans["image"].start, k_spans["image"].stop)
        text = range(k_spans["text"].start, k_spans["text"].stop)
        groups, queries = [list(text), list(image), list(range(keys.own, keys.k.shape[2]))], q_spans["text"]
    if len(groups) > d:
        raise InlayError(f"{len(groups)} tokens do not fit into one probe of head width {d}", where=f"probe {probe.name}", fix="Name fewer words.")
    one_hot = torch.zeros(keys.k.shape[2], d, dtype=q.dtype, device=q.device)  # a narrower V falls off the fused path
    for column, group in enumerate(groups):
        one_hot[group, column] = 1
    value = one_hot.expand(*keys.k.shape[:2], -1, -1)
    seen = sdpa(q[:, :, queries], keys.k, value, attn_mask=_take(keys.mask, slice(None), queries), scale=scale)
    seen = seen[..., : len(groups)].mean(1)
    return seen.mean(1) if probe.read == "mass" else seen


def _runs(rows: Rows, edited: dict[str, list[Edit]]) -> list[tuple[slice, str | None]]:
    """Row slices in batch order: (slice, branch) for an edited branch, (slice, None) for a run of untouched ones."""
    runs: list[tuple[slice, str | None]] = []
    for name in rows:
        if name in edited:
            runs.append((rows[name], name))
        elif runs and runs[-1][1] is None:
            runs[-1] = (slice(runs[-1][0].start, rows[name].stop), None)
        else:
            runs.append((rows[name], None))
    return runs


def _partition(edits: list[Edit], q_spans: dict[str, slice], full: slice) -> list[slice]:
    """Query slices with one edit list each: the whole, or the spans in token order when some edit names one."""
    if all(e.queries == "all" for e in edits):
        return [full]
    missing = [e for e in edits if e.queries != "all" and e.queries not in q_spans]
    if missing:
        raise PluginError(f"{missing[0].plugin} edits {missing[0].queries} queries, which this site has not", where=missing[0].branch,
                          fix="Declare sites of another kind.")  # fmt: skip
    return sorted(q_spans.values(), key=lambda s: s.start)


def _index(keys: Keys, spans: dict[str, slice], total: int) -> Any:
    if keys == "all":
        return slice(0, total)
    if isinstance(keys, str):
        return spans[keys]
    return [spans["text"].start + i for i in keys]


def _write(x: Tensor, at: Any, value: Tensor) -> Tensor:
    """x with columns `at` replaced; a copy, since K and V may be needed by other branches and by autograd."""
    if isinstance(at, slice):
        return torch.cat([x[:, :, : at.start], value, x[:, :, at.stop :]], dim=2)
    return x.index_copy(2, torch.tensor(at, device=x.device), value)


def _times(x: Tensor, factor: Number) -> Tensor:
    return x if isinstance(factor, (int, float)) and factor == 1 else x * factor


def _expand(x: Tensor, n: int) -> Tensor:
    """Rows of a source lane for the `n` rows of a branch: one source may serve many pictures."""
    if x.shape[0] == n:
        return x
    if x.shape[0] != 1:
        raise InlayError(f"cannot share {x.shape[0]} source rows with {n} rows", where="append", fix="Use n = 1 or equal n for the lanes.")
    return x.expand(n, -1, -1, -1)


def _take(mask: Tensor | None, rows: slice, queries: Any, keys: Any = slice(None)) -> Tensor | None:
    """Rows, queries and keys of a broadcastable mask `(R|1) (h|1) (n|1) m`; singleton axes stay."""
    if mask is None:
        return None
    while mask.dim() < 4:
        mask = rearrange(mask, "... -> 1 ...")
    mask = mask[rows] if mask.shape[0] > 1 else mask
    mask = mask[:, :, queries] if mask.shape[2] > 1 else mask
    return mask[..., keys]


def _float(mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    if mask is None:
        return torch.zeros((), dtype=dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask.to(dtype)


def _join_masks(keys: _Keys, joined: list[tuple[Tensor | None, int]], q: Tensor) -> Tensor | None:
    """Mask over own and appended keys; appended keys keep the mask their source gave them."""
    parts = [(keys.mask, keys.own), *joined]
    if all(m is None for m, _ in parts):
        return None
    blank = torch.zeros(1, 1, 1, 1, dtype=q.dtype, device=q.device)
    floats = [_float(m, q.dtype) if m is not None else blank.expand(1, 1, 1, size) for m, size in parts]
    shape = torch.broadcast_shapes(*(f.shape[:3] for f in floats))
    return torch.cat([f.expand(*shape, -1) for f in floats], dim=-1)


