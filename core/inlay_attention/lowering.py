"""Lowering: the edits of a site become as few fused attention calls as they allow.

Every operation of the algebra is linear in V or moves logits through K and the mask, so a branch's
queries are answered by one softmax (two for mix and side) over changed K, V and mask; answers of
equal shape share one call. No N x N map is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import einsum, repeat
from torch import Tensor

from inlay_config.errors import InputError, PluginError

from .algebra import Edit, Held, Op, Probe, Rows

Spans = dict[str, slice]
Sdpa = Callable[..., Tensor]
ALL = slice(None)
ORDER: tuple[Op, ...] = (
    "align", "route", "append", "gain", "bias", "scale", "map", "mix", "identity", "patch",
)  # fmt: skip


@dataclass(frozen=True)
class _Read:
    """One softmax: queries `b h n d` over keys and values `b h m d` under a bias on the logits."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None


@dataclass
class SiteProgram:
    """What one site computes in one model call in place of SDPA; pure, as checkpointing reruns it.
    spans(queries, keys): token slices of both; words[probe]: text tokens; store[probe][site]: read;
    given[name]: what comes from no row: keys and values under a name, or a branch that is replayed;
    lengths[branch]: text tokens that are not padding, where branches differ; keep[branch]: which of
    q, k, v the program leaves in held[branch].
    """

    site: str
    rows: Rows
    edits: dict[str, list[Edit]]
    probes: Sequence[Probe]
    words: Mapping[str, tuple[int, ...]]
    spans: Callable[[int, int], tuple[Spans, Spans]]
    store: dict[str, dict[str, Tensor]]
    given: Mapping[str, Held] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    keep: Mapping[str, str] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)

    def __call__(
        self, sdpa: Sdpa, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """q `R h n d`, k and v `R h m d` -> `R h n d`. Rows without edits stay untouched."""
        if enable_gqa:
            k, v = (repeat(t, "b h n d -> b (h g) n d", g=q.shape[1] // k.shape[1]) for t in (k, v))
        if is_causal:
            mask = torch.ones(q.shape[2], k.shape[2], device=q.device).tril().bool()
        spans = self.spans(q.shape[2], k.shape[2])
        whole = _Read(q, k, v, self._padding(as_bias(mask, q), q, spans[1]))
        for name, wanted in self.keep.items():
            known = {part: getattr(whole, part)[self.rows[name]] for part in wanted}
            self.held[name] = Held(**known, mask=_take(whole.mask, self.rows[name]))
        for probe in self.probes:
            name = "text" if probe.read == "rows" else "image"
            seen = self._own(whole, probe.branch, spans[0].get(name, ALL), spans)
            read = _probe(sdpa, probe, self.words[probe.name], seen, spans, scale)
            self.store.setdefault(probe.name, {})[self.site] = read

        def attend(r: _Read) -> Tensor:
            return sdpa(r.q, r.k, r.v, r.mask, dropout_p=dropout_p, scale=scale)

        answers: list[list[list[_Read | Tensor]]] = []  # what is summed, by run of rows and span
        for rows, branch in self.rows.runs(self.edits):
            if branch is None:
                answers.append([[_Read(q[rows], k[rows], v[rows], _take(whole.mask, rows))]])
                continue
            parts = self._partition(branch, spans[0])
            answers.append([self._answer(whole, branch, at, spans, attend) for at in parts])
        outputs = iter(_grouped(attend, [r for run in answers for part in run for r in part]))
        return cat([cat([sum_of([next(outputs) for _ in p]) for p in run], 2) for run in answers])

    def reduced(self) -> SiteProgram | None:
        """Without edits that are known to change nothing; None when nothing is left to do."""
        edits = {b: [e for e in listed if not e.neutral] for b, listed in self.edits.items()}
        edits = {branch: listed for branch, listed in edits.items() if listed}
        acts = edits or self.probes or self.keep or self.lengths
        return replace(self, edits=edits) if acts else None

    def with_tensors(self) -> SiteProgram:
        """With every number a 0-d tensor of its own: what is compiled holds for other numbers."""
        return replace(
            self, edits={b: [e.with_tensors() for e in listed] for b, listed in self.edits.items()}
        )

    def _partition(self, branch: str, q_spans: Spans) -> list[slice]:
        """Query slices with one edit list each: all, or the spans in token order."""
        named = {e.queries: e.plugin for e in self.edits[branch] if e.queries != "all"}
        for queries in named.keys() - q_spans.keys():
            problem = f"{named[queries]} edits {queries} queries, which this site has not"
            raise PluginError(problem, where=f"site {self.site}", fix="Declare other sites.")
        return sorted(q_spans.values(), key=lambda s: s.start or 0) if named else [ALL]

    def _acting(self, branch: str, at: slice, q_spans: Spans) -> list[Edit]:
        """Edits of these queries, sorted: the order of plugins moves no bits."""
        listed = self.edits.get(branch, ())
        here = [e for e in listed if e.queries == "all" or q_spans.get(e.queries) == at]
        return sorted(here, key=lambda e: (ORDER.index(e.op), e.plugin))

    def _own(self, whole: _Read, branch: str, at: slice, spans: tuple[Spans, Spans]) -> _Read:
        """What the queries `at` of a branch read: routed, summed, with gains and biases; joined
        keys behind the own ones. Values are not edited."""
        edits, n = self._acting(branch, at, spans[0]), whole.q[self.rows[branch]].shape[0]
        read, routed = self._of(whole, branch, n, at, edits), {e.how for e in edits}
        if any(e.op == "align" for e in edits):
            q, k = self._aligned(whole, branch, n, edits, spans)
            read = replace(read, q=q[:, :, at], k=k)
        for e in (e for e in edits if e.op == "route"):
            new, keys = self._of(whole, e.from_, n, at, edits), _index(e.keys, spans[1], read.k)
            if new.k.shape[2] != read.k.shape[2]:
                raise self._problem(e, "takes the map of other keys than the own ones")
            if e.how == "kv":
                read = replace(read, v=_put(read.v, keys, new.v[:, :, keys]))
            if e.how == "qk" or "qk" not in routed:
                mask = _put_mask(read, keys, new.mask)
                read = replace(read, k=_put(read.k, keys, new.k[:, :, keys]), mask=mask)
            if e.how == "qk":
                read = replace(read, q=new.q)
        joined: list[_Read] = []
        for e in edits:
            keys = _index(e.keys, spans[1], read.k)
            if e.op == "append" and e.how != "side":
                new = self._of(whole, e.from_, n, at, edits, keys)
                if e.how == "join":
                    joined.append(replace(new, k=new.k * e.value))
                    continue
                read = replace(
                    read,
                    k=_put(read.k, keys, read.k[:, :, keys] * e.own + new.k * e.value),
                    v=_put(read.v, keys, read.v[:, :, keys] * e.own + new.v * e.value),
                )
            elif e.op == "gain":
                gained = read.k[:, :, keys] * _per_key(e.value)
                read = replace(read, k=_put(read.k, keys, gained))
            elif e.op == "bias" or (e.op == "scale" and e.renorm):
                value = torch.as_tensor(e.value, dtype=whole.q.dtype, device=whole.q.device)
                if e.queries == "all" and value.dim() > 1 and value.shape[-2] > 1:
                    value = value[..., at, :]
                read = replace(
                    read, mask=_add(read, keys, value.log() if e.op == "scale" else value)
                )
        return _join(read, joined)

    def _answer(
        self, whole: _Read, branch: str, at: slice, spans: tuple[Spans, Spans],
        attend: Callable[[_Read], Tensor],
    ) -> list[_Read | Tensor]:  # fmt: skip
        """What is to be added up for the queries `at` of a branch: softmaxes, or what is known."""
        edits = self._acting(branch, at, spans[0])
        own, total = self._own(whole, branch, at, spans), whole.k.shape[2]
        n, v = own.q.shape[0], own.v
        more: list[_Read | Tensor] = []
        for e in edits:
            keys = _index(e.keys, spans[1], whole.k)
            if e.op == "scale" and not e.renorm:
                v = _put(v, keys, v[:, :, keys] * _per_key(e.value))
            elif e.op == "map":
                v = _put(v, keys, _mapped(e.matrix, v[:, :, keys]))
            elif e.op == "mix":
                other = self._of(whole, e.from_, n, at, edits)
                alpha = torch.as_tensor(e.value, dtype=v.dtype, device=v.device)
                theirs = _mapped(e.matrix, v[:, :, keys] * _per_key(alpha))
                theirs = _put(torch.zeros_like(v[:, :, :total]), keys, theirs)
                more.append(replace(other, v=theirs))
                v = _put(v, keys, v[:, :, keys] * _per_key(1 - alpha))
            elif e.op == "append" and e.how == "side":
                new = self._of(whole, e.from_, n, at, edits, keys)
                more.append(replace(new, q=own.q, v=new.v * e.value))
        first: list[_Read | Tensor] = [replace(own, v=v)]
        if any(e.op == "identity" for e in edits):
            first = [v[:, :, at]]
        for e in edits:
            if e.op == "patch":

                def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
                    return attend(_Read(q, k, v, mask))

                return [e.value(own.q, own.k, own.v, own.mask, plain)]
        return [*first, *more]

    def _aligned(
        self, whole: _Read, branch: str, n: int, edits: Sequence[Edit], spans: tuple[Spans, Spans]
    ) -> tuple[Tensor, Tensor]:
        """All queries and keys of a branch: statistics are those of a whole span, whichever of its
        queries are asked for."""
        own = self._of(whole, branch, n, ALL, edits)
        sides = [own.q, own.k]
        for e in (e for e in edits if e.op == "align"):
            other = self._of(whole, e.from_, n, ALL, edits)
            for i, (theirs, named) in enumerate(zip((other.q, other.k), spans, strict=True)):
                if e.keys != "all" and e.keys not in named:
                    raise self._problem(e, f"needs queries and keys of the {e.keys}")
                x, tokens = sides[i], _index(e.keys, named, sides[i])
                sides[i] = _put(x, tokens, _adain(x[:, :, tokens], theirs[:, :, tokens]))
        return sides[0], sides[1]

    def _of(
        self, whole: _Read, name: str, n: int, at: slice, edits: Sequence[Edit], keys: Any = ALL
    ) -> _Read:
        """The queries `at` and the keys of a branch, or keys that are given, for n rows."""
        if name in self.given:
            held = self.given[name]
            known = next(t for t in held if t is not None)  # what no edit takes may be anything
            q, k, v = (_expand(known if t is None else t, n) for t in (held.q, held.k, held.v))
            if ":" in name:  # keys and values of no span of this site
                return _Read(k, k, v)
            mask = _take(held.mask, ALL, at, keys)
            return _Read(q[:, :, at], k[:, :, keys], v[:, :, keys], mask)
        if name not in self.rows:
            wanting = next(e for e in edits if e.from_ == name)
            raise self._problem(wanting, f"takes from {name}, which has no rows in this call")
        rows = self.rows[name]
        q, k, v = (_expand(t[rows], n) for t in (whole.q, whole.k, whole.v))
        mask = _take(whole.mask, rows, at, keys)
        return _Read(q[:, :, at], k[:, :, keys], v[:, :, keys], mask)

    def _padding(self, mask: Tensor | None, q: Tensor, k_spans: Spans) -> Tensor | None:
        """The bias that hides each branch's padding of the text."""
        if not self.lengths or "text" not in k_spans:
            return mask
        text, total = k_spans["text"], max(s.stop for s in k_spans.values())
        bias = q.new_zeros(q.shape[0], 1, 1, total)
        for branch, length in self.lengths.items():
            bias[self.rows[branch], ..., text.start + length : text.stop] = float("-inf")
        return bias if mask is None else bias + mask

    def _problem(self, edit: Edit, what: str) -> PluginError:
        return PluginError(f"{edit.plugin}: {edit.op} {what}", where=f"site {self.site}")


def calls(program: SiteProgram, q: Sequence[int], k: Sequence[int]) -> list[tuple[int, int, int]]:
    """(rows, queries, keys) of every SDPA call that a program makes on tensors of these shapes
    `R h n d`, `R h m d`; nothing is computed."""
    made = []

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **_: Any) -> Tensor:
        made.append((q.shape[0], q.shape[2], k.shape[2]))
        return q.new_empty(*q.shape[:3], v.shape[3])

    with torch.device("meta"):
        program(sdpa, torch.empty(*q), torch.empty(*k), torch.empty(*k))
    return made


def _grouped(attend: Callable[[_Read], Tensor], jobs: Sequence[_Read | Tensor]) -> list[Tensor]:
    """Every answer in order; softmaxes of equal shape and maskedness share one call."""
    outputs = [job if isinstance(job, Tensor) else job.q for job in jobs]
    groups: dict[tuple[int, int, bool], list[tuple[int, _Read]]] = {}
    for i, job in enumerate(jobs):
        if isinstance(job, _Read):
            shape = (job.q.shape[2], job.k.shape[2], job.mask is None)
            groups.setdefault(shape, []).append((i, job))
    for members in groups.values():
        if len(members) == 1:
            ((i, read),) = members
            outputs[i] = attend(read)
            continue
        counts = [r.q.shape[0] for _, r in members]
        q, k, v = (cat([getattr(r, name) for _, r in members]) for name in "qkv")
        masks = [r.mask.expand(r.q.shape[0], -1, -1, -1) for _, r in members if r.mask is not None]
        common = torch.broadcast_shapes(*(m.shape[1:] for m in masks)) if masks else ()
        mask = cat([m.expand(-1, *common) for m in masks]) if masks else None
        for (i, _), out in zip(members, attend(_Read(q, k, v, mask)).split(counts), strict=True):
            outputs[i] = out
    return outputs


def _probe(
    sdpa: Sdpa, probe: Probe, words: tuple[int, ...], read: _Read, spans: tuple[Spans, Spans],
    scale: float | None,
) -> Tensor:  # fmt: skip
    """One probe, exact under any mask: columns `b n t`, rows `b t n`; memory linear in tokens."""
    (q_spans, k_spans), width, rows = spans, read.q.shape[3], probe.read == "rows"
    if "text" not in (q_spans if rows else k_spans) or len(words) > width:
        problem = f"cannot read {probe.read} of {len(words)} text tokens at this site"
        fix = "Choose sites that hold the text, and at most as many tokens as a head is wide."
        raise PluginError(problem, where=f"probe {probe.name}", fix=fix)
    if rows:
        logits = einsum(read.q[:, :, words], read.k, "b h t d, b h n d -> b h t n")
        bias = _take(read.mask, ALL, words)
        logits = logits * (scale or width**-0.5) + (0 if bias is None else bias)
        return logits.softmax(-1)[..., k_spans["image"]].mean(1)
    # one-hot values, as wide as a head: a narrower V falls off the fused path
    columns = [0] * len(words) if probe.read == "mass" else list(range(len(words)))
    one_hot = torch.zeros(read.k.shape[2], width, dtype=read.q.dtype, device=read.q.device)
    one_hot[[k_spans["text"].start + t for t in words], columns] = 1
    values = one_hot.expand(*read.k.shape[:2], -1, -1)
    out = sdpa(read.q, read.k, values, read.mask, scale=scale)
    return out[..., : max(columns) + 1].mean(1)


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


def sum_of(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _join(read: _Read, joined: list[_Read]) -> _Read:
    """`joined` keys behind the own ones; each keeps the mask that its source gave it."""
    if not joined:
        return read
    every, mask = [read, *joined], read.mask
    if any(r.mask is not None for r in every):
        masks = [
            read.k.new_zeros(1, 1, 1, r.k.shape[2]) if r.mask is None else r.mask for r in every
        ]
        shape = torch.broadcast_shapes(*(m.shape[:3] for m in masks))
        mask = torch.cat([m.expand(*shape, -1) for m in masks], dim=-1)
    return _Read(read.q, cat([r.k for r in every], 2), cat([r.v for r in every], 2), mask)


def _add(read: _Read, keys: Any, value: Tensor) -> Tensor:
    """The mask with `value` added at `keys`; value: 0-d, `m`, `n m`, or `(b|1) (h|1) (n|1) m`."""
    value = value[(None,) * (4 - value.dim())]
    bias = read.k.new_zeros(*value.shape[:3], read.k.shape[2])
    bias[..., keys] = value
    return bias if read.mask is None else bias + read.mask


def _put_mask(read: _Read, keys: Any, mask: Tensor | None) -> Tensor | None:
    """The mask with the part at `keys` taken from another one."""
    if read.mask is None and mask is None:
        return None
    open_ = read.k.new_zeros(1, 1, 1, read.k.shape[2])
    own, new = (open_ if m is None else m for m in (read.mask, mask))
    shape = torch.broadcast_shapes(own.shape, new.shape)
    out = own.expand(shape).clone()
    out[..., keys] = new.expand(shape)[..., keys]
    return out


def _index(keys: Any, spans: Spans, k: Tensor) -> Any:
    if isinstance(keys, str):
        return slice(0, k.shape[2]) if keys == "all" else spans[keys]
    return [spans["text"].start + i for i in keys]


def _put(x: Tensor, at: Any, value: Tensor) -> Tensor:
    """x `b h m d` with tokens `at` replaced; a copy, since other branches share K and V."""
    if isinstance(at, list):
        return x.index_copy(2, torch.tensor(at, device=x.device), value)
    return cat([p for p in (x[:, :, : at.start], value, x[:, :, at.stop :]) if p.shape[2]], dim=2)


def _per_key(value: Any) -> Any:
    """A number, or one per key as a column `m 1`."""
    return value[..., None] if isinstance(value, Tensor) and value.dim() else value


def _mapped(matrix: Tensor | None, v: Tensor) -> Tensor:
    """M V: `m k`, `b h k d` -> `b h m d`."""
    return v if matrix is None else einsum(matrix.to(v), v, "m k, b h k d -> b h m d")


def _adain(x: Tensor, y: Tensor) -> Tensor:
    """x `b h n d` with the mean and deviation over tokens of y `b h m d`."""
    deviation = (y.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    spread = (x.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    return (x - x.mean(2, True)) / spread * deviation + y.mean(2, True)


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
