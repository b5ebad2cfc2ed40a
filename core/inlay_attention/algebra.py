"""The edit algebra: what can be said about an attention site, as data.

With P = softmax(Q Kᵀ / √d + mask) of a branch's rows, out = P V:
  align     Q, K ← AdaIN(Q, Q'): mean and deviation over tokens, per head and channel, of another's
  route     qk: P of another branch; kv: its keys and values, or its values when qk is another's
  append    keys of others too. join: beside the own ones, in one softmax; side: in a softmax of
            their own, added; sum: in place of the own ones, K ← own·K + g·K', V likewise
  gain      logits[:, keys] ← g·logits[:, keys]
  bias      logits[:, keys] += b
  scale     P[:, keys] ← w·P[:, keys]; renorm: rows sum to one again
  map       P[:, keys] ← P[:, keys] M
  mix       P[:, keys] ← α·(P' M)[:, keys] + (1 - α)·P[:, keys], P' of another branch
  identity  P ← I
  patch     a function in place of all of it
They act in this order whatever order they were said in, except that scale multiplies what map and
mix made of the columns. P' is the other branch's map before any edit of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from inlay_config.errors import PluginError

Span = Literal["all", "text", "image"]
Keys = Span | tuple[int, ...]
Number = float | Tensor
How = Literal["", "qk", "kv", "join", "sum", "side"]
Op = Literal["align", "route", "append", "gain", "bias", "scale", "map", "mix", "identity", "patch"]


class Held(NamedTuple):
    """Keys and values `b h m d` that come from no row of the call, queries and bias where known."""

    k: Tensor | None = None
    v: Tensor | None = None
    q: Tensor | None = None
    mask: Tensor | None = None


class Key(NamedTuple):
    """What an edit is declared as, before its numbers are known."""

    plugin: str
    op: Op
    target: str
    from_: str = ""
    how: How = ""
    queries: Span = "all"
    keys: Span = "all"

    def covers(self, other: Key) -> bool:
        """Whether what is declared so allows `other`: the same, or some of its queries or keys."""
        spans = ((self.queries, other.queries), (self.keys, other.keys))
        return self[:5] == other[:5] and all(a in ("all", b) for a, b in spans)


@dataclass(frozen=True, eq=False, slots=True)
class Edit:
    """One operation on one branch at one site; keys: a span, or indices of text tokens.
    value: the gain, weight, bias, α or function; matrix: M; from_: a branch, or the name ("kind:x")
    of keys and values that are given; how: what a route takes, how keys are appended."""

    op: Op
    plugin: str
    branch: str
    queries: Span = "all"
    keys: Keys = "all"
    value: Any = 1.0
    matrix: Tensor | None = None
    renorm: bool = False
    from_: str = ""
    how: How = ""
    own: Number = 1.0

    @property
    def neutral(self) -> bool:
        """Whether it is known to change nothing; nobody looks into tensors."""
        idle = {"gain": 1, "scale": 1, "bias": 0, "mix": 0}.get(self.op)
        idle = 0 if self.how == "side" else idle
        return idle is not None and isinstance(self.value, int | float) and self.value == idle

    def with_tensors(self) -> Edit:
        """With its numbers as 0-d tensors of its own."""
        value, own = (
            torch.tensor(float(x)) if isinstance(x, int | float) else x
            for x in (self.value, self.own)
        )
        return replace(self, value=value, own=own)


@dataclass
class AttnEdits:
    """Collects the edits of a site: `edits.on("edit").gain("image", 1.05)`; operations chain.
    allowed: what is declared here; dropped: what lost to another plugin; branches: those that are
    evaluated."""

    allowed: Collection[Key]
    where: str
    branches: tuple[str, ...]
    owner: str = ""
    target: str = "edit"
    queries: Span = "all"
    by_branch: dict[str, list[Edit]] = field(default_factory=dict)
    dropped: Collection[Key] = ()

    def on(self, target: str, queries: Span = "all") -> AttnEdits:
        """A lane (all its branches) or one branch such as "edit/text", and which of its queries."""
        return replace(self, target=target, queries=queries)

    def scale(self, keys: Keys, weight: Number, renorm: bool = False) -> AttnEdits:
        """Multiply columns of P by `weight`: a number, or one per key `m`. renorm: rows sum to one
        again, so weights are > 0."""
        return self._add("scale", keys=keys, value=weight, renorm=renorm)

    def gain(self, keys: Keys, gain: Number) -> AttnEdits:
        """Multiply the logits of `keys` by `gain` (Add-it's gamma): a number, or one per key."""
        return self._add("gain", keys=keys, value=gain)

    def bias(self, keys: Keys, bias: Number) -> AttnEdits:
        """Add to the logits of `keys`: a number, `m`, `n m`, or what broadcasts over `b h n m`."""
        return self._add("bias", keys=keys, value=bias)

    def align(self, from_: str, keys: Span = "all") -> AttnEdits:
        """Queries and keys of these tokens take mean and deviation (over the tokens, per head and
        channel) of another lane or branch: AdaIN, as in StyleAligned (Hertz et al. 2023, eq. 4)."""
        return self._add("align", from_, keys=keys)

    def map(self, keys: Keys, matrix: Tensor) -> AttnEdits:
        """P[:, keys] ← P[:, keys] M, matrix `m m`: attention paid to key i counts for key j."""
        return self._add("map", keys=keys, matrix=matrix)

    def route(self, qk: str = "", kv: str = "", keys: Keys = "all") -> AttnEdits:
        """Take the map (queries and keys), or the content (values, and keys unless qk gives them),
        of another lane or branch; other keys than `keys` stay the own ones."""
        edits = self._add("route", qk, how="qk", keys=keys) if qk else self
        return edits._add("route", kv, how="kv", keys=keys) if kv else edits

    def append(
        self, from_: str, keys: Span = "all", gain: Number = 1.0, how: How = "join",
        own: Number = 1.0,
    ) -> AttnEdits:  # fmt: skip
        """See `keys` of another lane, or given keys and values, too. join: beside the own ones,
        their logits × gain; side: a second softmax, its output × gain, added; sum: in their place,
        K ← own·K + gain·K' and V likewise."""
        return self._add("append", from_, keys=keys, value=gain, how=how, own=own)

    def mix(self, from_: str, keys: Keys, alpha: Number, matrix: Tensor | None = None) -> AttnEdits:
        """P[:, keys] ← α·(P' M)[:, keys] + (1 - α)·P[:, keys], P' of another lane or branch; alpha
        in 0..1: a number, or one per key."""
        return self._add("mix", from_, keys=keys, value=alpha, matrix=matrix)

    def identity(self) -> AttnEdits:
        """P ← I: every query gets its own value (perturbed-attention guidance)."""
        return self._add("identity")

    def patch(self, function: Callable[..., Tensor]) -> AttnEdits:
        """`function(q, k, v, mask, attend)` in place of attention, for one branch: q `b h n d`, k
        and v `b h m d` -> `b h n d`; `attend(q, k, v, mask)` is SDPA. Nothing else may edit it."""
        return self._add("patch", value=function)

    def _add(self, op: Op, from_: str = "", how: How = "", **fields: Any) -> AttnEdits:
        """Record for each branch; what comes from a lane comes from the same role, else its
        text."""
        keys: Keys = fields.get("keys", "all")
        span: Span = "text" if isinstance(keys, tuple) else keys
        key = Key(self.owner, op, self.target, from_, how, self.queries, span)
        if not any(declared.covers(key) for declared in self.allowed):
            what = f"{op} on {self.target}{from_ and ' from ' + from_}{how and f' ({how})'}"
            what += f", {self.queries} queries, {span} keys"
            fix = "Declare it with need.edit(...) for this site and window."
            problem = f"{self.owner} emitted an undeclared edit: {what}"
            raise PluginError(problem, where=self.where, fix=fix)
        for branch in () if any(d.covers(key) for d in self.dropped) else self.branches:
            if self.target in (branch, lane_of(branch)):
                twin = f"{lane_of(from_)}/{(from_ if '/' in from_ else branch).split('/')[1]}"
                twin = twin if twin in self.branches else f"{lane_of(from_)}/text"
                twin = from_ if ":" in from_ or not from_ else twin  # a colon: a key of the board
                edit = Edit(op, self.owner, branch, self.queries, from_=twin, how=how, **fields)
                self.by_branch.setdefault(branch, []).append(edit)
        return self


@dataclass(frozen=True, slots=True)
class Probe:
    """A declared reading of attention probabilities, averaged over heads, of `branch` at `sites`.
    columns: P[image rows, tokens of word] `b n t`; rows: P[tokens of word, image columns] `b t n`;
    mass: P[image rows, tokens of word] summed over the tokens, `b n 1`. It sees every edit of the
    logits and keys, and the map before scale, map and mix.
    """

    name: str
    plugin: str
    branch: str
    read: Literal["columns", "rows", "mass"]
    sites: frozenset[str]
    steps: frozenset[int]
    word: str | tuple[int, ...]


class Rows(dict[str, slice]):
    """Rows of one model call by branch: nobody counts them by hand."""

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> Rows:
        rows, start = cls(), 0
        for branch, n in counts.items():
            rows[branch], start = slice(start, start + n), start + n
        return rows

    def runs(self, edited: Collection[str]) -> Iterator[tuple[slice, str | None]]:
        """Batch order: (rows, branch) of an edited branch, (rows, None) of a run of others."""
        begin = end = 0
        for branch, rows in self.items():
            if branch in edited:
                if begin < rows.start:
                    yield slice(begin, rows.start), None
                yield rows, branch
                begin = rows.stop
            end = rows.stop
        if begin < end:
            yield slice(begin, end), None


def lane_of(branch: str) -> str:
    """The lane "edit" of the branch "edit/text"."""
    return branch.split("/")[0]
