"""Which edits may meet at one site, step, branch and query: the conflict table.

Edits that meet either compose by the algebra or are refused before the first forward, unless the
experiment says who wins: `resolve: [{site: "*", winner: plugin}]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import combinations, combinations_with_replacement, product

from inlay_config.errors import ConfigError, PlanConflict

from .algebra import How, Key, Op, Probe, Span, lane_of

KINDS = (
    "align", "scale", "bias", "gain", "map", "mix", "route qk", "route kv", "append join",
    "append sum", "append side", "identity", "patch", "probe",
)  # fmt: skip
UNLESS_SAME = {  # fine when one plugin says both
    frozenset(pair): reason
    for pair, reason in (
        (("map",), "both move attention between the same keys"),
        (("map", "mix"), "both move attention between the same keys"),
        (("mix",), "both take the map of another branch"),
        (("mix", "route qk"), "both take the map of another branch"),
        (("append sum",), "both sum foreign keys into the same ones"),
    )
}
UNLESS_EQUAL = {  # fine when both say the same
    frozenset(["align"]): "they take the statistics of different branches",
    frozenset(["route qk"]): "they take the maps of different branches",
    frozenset(["route kv"]): "they take the content of different branches",
}
NO_MAP = "the map is replaced by the identity, which nothing else can change"
ALONE = "a patch is exclusive"
REFUSED = {
    frozenset(("identity", kind)): NO_MAP
    for kind in KINDS
    if kind not in ("scale", "route kv", "identity", "patch", "probe")
} | {frozenset(("patch", kind)): ALONE for kind in KINDS}


@dataclass(frozen=True)
class DeclaredEdit:
    """An edit that `plugin` may emit at `sites` in `steps` of a pass."""

    plugin: str
    op: Op
    lane: str
    sites: frozenset[str]
    steps: frozenset[int]
    from_: str = ""
    how: How = ""
    queries: Span = "all"
    keys: Span = "all"
    pass_: str = "edit"

    @property
    def key(self) -> Key:
        names = (self.plugin, self.op, self.lane, self.from_, self.how)
        return Key(*names, self.queries, self.keys)

    @property
    def kind(self) -> str:
        return f"{self.op} {self.how}".strip()


def by_place(edits: Iterable[DeclaredEdit]) -> dict[tuple[str, str, int], set[Key]]:
    """(pass, site, step) -> what is declared there."""
    found: dict[tuple[str, str, int], set[Key]] = {}
    for e in edits:
        for place in product((e.pass_,), e.sites, e.steps):
            found.setdefault(place, set()).add(e.key)
    return found


def verdict(a: str, b: str) -> str:
    """ "composes", or when it does not and why: a cell of the table in docs/compose.md."""
    pair = frozenset((a, b))
    for table, unless in ((REFUSED, ""), (UNLESS_SAME, "one plugin"), (UNLESS_EQUAL, "equal")):
        if pair in table:
            return f"refused{unless and ' unless ' + unless}: {table[pair]}"
    return "composes"


def table() -> dict[tuple[str, str], str]:
    """Every pair of kinds and its verdict."""
    return {pair: verdict(*pair) for pair in combinations_with_replacement(KINDS, 2)}


def clash(a: DeclaredEdit, b: DeclaredEdit) -> str:
    """Why these two cannot meet; "" when they compose."""
    pair = frozenset((a.kind, b.kind))
    if pair in UNLESS_EQUAL and a.from_ == b.from_:
        return ""
    if pair in UNLESS_SAME and a.plugin == b.plugin:
        return ""
    return REFUSED.get(pair) or UNLESS_SAME.get(pair) or UNLESS_EQUAL.get(pair, "")


def settle(
    edits: Sequence[DeclaredEdit], probes: Iterable[Probe], rules: Sequence[Mapping[str, str]]
) -> tuple[tuple[DeclaredEdit, ...], tuple[DeclaredEdit, ...]]:
    """(kept, dropped) after the rules {site, winner} of `resolve`.

    Raises PlanConflict, naming site, step, lane and both plugins, for a clash that no rule settles,
    and ConfigError for a rule that settles nothing.
    """
    lost: dict[DeclaredEdit, set[str]] = {}
    used: set[int] = set()
    for a, b in _meeting(edits):
        reason = clash(a, b)
        for site in sorted(a.sites & b.sites) if reason else ():
            fits = [i for i, rule in enumerate(rules) if fnmatchcase(site, rule["site"])]
            fits = [i for i in fits if rules[i]["winner"] in (a.plugin, b.plugin)]
            if not fits or a.plugin == b.plugin:
                where = f"site {site}, step {min(a.steps & b.steps)}, lane {b.lane}"
                what = f"{a.plugin} ({a.kind}) and {b.plugin} ({b.kind}) meet: {reason}"
                raise PlanConflict(what, where=where, fix=REMEDY.format(winner=a.plugin))
            used.add(fits[0])
            loser = b if rules[fits[0]]["winner"] == a.plugin else a
            lost.setdefault(loser, set()).add(site)
    for i in set(range(len(rules))) - used:
        fix = "Remove it, or see `inlay plan` for who acts where."
        raise ConfigError("settles no conflict", where=f"resolve[{i}]", fix=fix)
    kept = tuple(replace(e, sites=e.sites - lost.get(e, set())) for e in edits)
    check_patches(kept, probes)
    return kept, tuple(replace(e, sites=frozenset(sites)) for e, sites in lost.items())


REMEDY = (
    "Separate their windows or sites, remove one, or write "
    "`resolve: [{{site: '*', winner: {winner}}}]`."
)


def _meeting(edits: Sequence[DeclaredEdit]) -> Iterator[tuple[DeclaredEdit, DeclaredEdit]]:
    """Pairs that share a pass, site, step, branch and query."""
    for a, b in combinations(edits, 2):
        branches = a.lane == b.lane or lane_of(a.lane) == b.lane or a.lane == lane_of(b.lane)
        queries = a.queries == b.queries or "all" in (a.queries, b.queries)
        if a.pass_ == b.pass_ and branches and queries and a.sites & b.sites and a.steps & b.steps:
            yield a, b


def check_patches(edits: Iterable[DeclaredEdit], probes: Iterable[Probe]) -> None:
    """Nobody can read the map that a patch does not make."""
    for e, p in product([e for e in edits if e.op == "patch" and e.pass_ == "edit"], probes):
        sites, steps = e.sites & p.sites, e.steps & p.steps
        if sites and steps and e.lane in (p.branch, lane_of(p.branch)):
            where = f"site {min(sites)}, step {min(steps)}, branch {p.branch}"
            problem = f"{p.plugin} reads the map that {e.plugin} (patch) replaces"
            raise PlanConflict(problem, where=where, fix="Separate their windows or sites.")
