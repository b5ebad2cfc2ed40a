"""Needs -> Plan: everything that can be decided before the first forward, and every conflict that can be seen there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from .errors import ConfigError, PlanConflict
from .events import AttnSite, Branch, Lane, Plugin, Probe, Window

if TYPE_CHECKING:
    from .backbones import Backbone

Active = Window | Iterable[int] | None


@dataclass(frozen=True)
class Request:
    """What was asked for, without tensors: the arguments of `Session.run` that decide the plan. size: (height, width) px."""

    prompt: dict[str, str]
    steps: int
    size: tuple[int, int]
    n: int = 1
    seed: int = 0
    guidance: float | dict[str, float] = 3.5
    true_cfg: float = 1.0
    inputs: tuple[str, ...] = ()  # board keys the caller provides: image:source, mask:user
    skip_dead_rows: bool = True

    def guidance_of(self, lane: str) -> float:
        return self.guidance.get(lane, 3.5) if isinstance(self.guidance, dict) else self.guidance


@dataclass(frozen=True)
class DeclaredEdit:
    """An edit a plugin may emit at `sites` in `steps` of a pass."""

    plugin: str
    op: str
    lane: str
    from_: str
    how: str
    sites: frozenset[str]
    steps: frozenset[int]
    pass_: str


@dataclass(frozen=True)
class PassPlan:
    """One run of the loop: its lanes, rows and groups (branches evaluated in one model call). make_scheduler None: the session's."""

    name: str
    lanes: tuple[Lane, ...]
    branches: tuple[Branch, ...]
    groups: tuple[tuple[str, ...], ...]
    make_scheduler: Callable[[Any], Any] | None = None

    def rows(self, step: int) -> int:
        alive = {lane.name for lane in self.lanes if step in lane.steps}
        return sum(b.n for b in self.branches if b.lane in alive)


class Needs:
    """Handed to `inlay_declare`. `request` says what was asked for, `sites` what the model offers, `owner` who is declaring."""

    def __init__(self, request: Request, sites: tuple[AttnSite, ...], owner: str, plan: _Draft) -> None:
        self.request, self.sites, self.owner, self._draft = request, sites, owner, plan

    @property
    def steps(self) -> int:
        return self.request.steps

    def active(self, window: Active) -> frozenset[int]:
        """Step indices of a window, None: the whole run. Raises ConfigError when it lies outside the run."""
        if window is None:
            return frozenset(range(self.steps))
        return frozenset(window.steps(self.steps, f"plugins.{self.owner}") if isinstance(window, Window) else window)

    def select(self, kind: Iterable[str] = ("self", "cross", "joint"), block: Iterable[str] | None = None,
               depth: tuple[float, float] = (0.0, 1.0)) -> frozenset[str]:  # fmt: skip
        """Names of sites by kind, block and depth (0..1). Raises ConfigError when nothing matches."""
        found = frozenset(s.name for s in self.sites if s.kind in kind and (block is None or s.block in block) and depth[0] <= s.depth <= depth[1])
        if not found:
            raise ConfigError(f"no attention site with kind {list(kind)}, block {block}, depth {depth}", where=f"plugins.{self.owner}",
                              fix=f"This model has kinds {sorted({s.kind for s in self.sites})}, blocks {sorted({s.block for s in self.sites})}.")  # fmt: skip
        return found

    def pass_(self, name: str, scheduler: Callable[[Any], Any] | None = None) -> None:
        """A pass before the edit; `scheduler` builds its solver from the session's (inversion)."""
        self._draft.merge("pass", name, {"scheduler": scheduler}, self.owner)

    def lane(self, name: str, pass_: str = "edit", active: Active = None, **fields: Any) -> None:
        """A trajectory: prompt, n, seed, guidance, start, follows, keep (see Lane). `active`: steps in which its rows must be evaluated."""
        self._draft.merge("lane", (pass_, name), fields, self.owner)
        if active is not None:
            self._draft.alive.setdefault((pass_, name), set()).update(self.active(active))

    def edit(self, op: Literal["scale", "gain", "append"], lane: str, sites: frozenset[str], active: Active = None, from_: str = "",
             how: str = "join", pass_: str = "edit") -> None:  # fmt: skip
        """An edit that will be emitted on `lane` (or "lane/role") at `sites` inside `active`."""
        self._draft.edits.append(DeclaredEdit(self.owner, op, lane, from_, how, sites, self.active(active), pass_))

    def probe(self, name: str, branch: str, read: Literal["columns", "rows", "mass"], sites: frozenset[str], active: Active = None,
              word: str | tuple[int, ...] = ()) -> None:  # fmt: skip
        """Attention of `branch` towards `word` of its prompt, found afterwards in step.probes[name][site]."""
        self._draft.probes.append(Probe(name, self.owner, branch, read, sites, self.active(active), word))

    def publish(self, key: str) -> None:
        if key in self._draft.published:
            raise PlanConflict(f"{key!r} is published by {self._draft.published[key]} and by {self.owner}", where="board",
                               fix="Remove one of the two plugins.")  # fmt: skip
        self._draft.published[key] = self.owner

    def consume(self, key: str) -> None:
        self._draft.consumed.append((self.owner, key, self.owner if key in self._draft.published else ""))

    def combine(self, lane: str) -> None:
        """This plugin alone turns the predictions of `lane` into one output."""
        self._draft.merge("combine", lane, {"owner": self.owner}, self.owner)


@dataclass
class _Draft:
    """What was declared so far."""

    fields: dict[tuple[str, Any], dict[str, Any]] = field(default_factory=dict)
    owners: dict[tuple[str, Any], list[str]] = field(default_factory=dict)
    alive: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    edits: list[DeclaredEdit] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    published: dict[str, str] = field(default_factory=dict)
    consumed: list[tuple[str, str, str]] = field(default_factory=list)

    def merge(self, what: str, key: Any, fields: dict[str, Any], owner: str) -> None:
        """Equal declarations merge; unequal ones raise with both owners."""
        known = self.fields.setdefault((what, key), {})
        for name, value in fields.items():
            if name in known and known[name] != value:
                first = self.owners[what, key][0]
                raise PlanConflict(f"{what} {key} wants {name}={known[name]!r} for {first} and {value!r} for {owner}", where=what,
                                   fix="Make the two plugins' options agree, or remove one.")  # fmt: skip
            known[name] = value
        self.owners.setdefault((what, key), []).append(owner)


@dataclass(frozen=True)
class Plan:
    """The decided run. `str(plan)` is the table `inlay plan` prints."""

    request: Request
    backbone: str
    order: tuple[str, ...]
    passes: tuple[PassPlan, ...]
    sites: dict[str, tuple[str, ...]]
    edits: tuple[DeclaredEdit, ...]
    probes: tuple[Probe, ...]
    publishes: dict[str, str]
    events: dict[str, tuple[str, ...]]
    memory: dict[str, int]

    def __hash__(self) -> int:
        return id(self)

    @lru_cache(maxsize=None)  # noqa: B019  (a plan lives as long as its run)
    def allowed(self, pass_: str, site: str, step: int) -> frozenset[tuple[str, str, str, str]]:
        """(plugin, op, lane, from) of the edits that may be emitted here."""
        return frozenset((e.plugin, e.op, e.lane, e.from_) for e in self.edits if e.pass_ == pass_ and site in e.sites and step in e.steps)

    def windows(self, pass_: str) -> dict[str, frozenset[int]]:
        """Steps in which each plugin's edits and probes act."""
        steps: dict[str, frozenset[int]] = {}
        for declared in (*self.edits, *(self.probes if pass_ == "edit" else ())):
            if getattr(declared, "pass_", "edit") == pass_:
                steps[declared.plugin] = steps.get(declared.plugin, frozenset()) | declared.steps
        return steps

    @property
    def evaluations(self) -> dict[str, int]:
        """Forward units per pass: one unit = one row for one step."""
        return {p.name: sum(p.rows(i) for i in range(self.request.steps)) for p in self.passes}

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True, default=str).encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        return {
            "backbone": self.backbone, "size": list(self.request.size), "steps": self.request.steps, "n": self.request.n, "order": list(self.order),
            "passes": [{"name": p.name, "calls": [list(g) for g in p.groups], "lanes": [
                {"name": lane.name, "prompt": lane.prompt, "n": lane.n, "seed": lane.seed, "guidance": lane.guidance, "start": lane.start,
                 "steps": _ranges(lane.steps), "owners": list(lane.owners)} for lane in p.lanes]} for p in self.passes],
            "edits": [{"plugin": e.plugin, "op": e.op, "lane": e.lane, "from": e.from_, "how": e.how, "sites": len(e.sites),
                       "steps": _ranges(e.steps)} for e in self.edits],
            "probes": [{"name": p.name, "plugin": p.plugin, "branch": p.branch, "read": p.read, "word": p.word, "sites": sorted(p.sites),
                        "steps": _ranges(p.steps)} for p in self.probes],
            "sites": {name: list(plugins) for name, plugins in self.sites.items()}, "publishes": self.publishes,
            "events": {name: list(plugins) for name, plugins in self.events.items()},
            "evaluations": self.evaluations, "conflicts": [], "memory": self.memory,
        }  # fmt: skip

    def __str__(self) -> str:
        r = self.request
        lines = [f"{self.backbone}  {r.size[1]}x{r.size[0]} px  {r.steps} steps  n={r.n}  plan {self.digest}", ""]
        for p in self.passes:
            lines.append(f"pass {p.name}: {self.evaluations[p.name]} forward units; calls " + " + ".join("[" + ", ".join(g) + "]" for g in p.groups))
            lines += [f"  lane {ln.name:<10} prompt={ln.prompt} n={ln.n} seed={ln.seed} guidance={ln.guidance:g} steps {_ranges(ln.steps)}"
                      f"  ({', '.join(ln.owners)})" for ln in p.lanes]  # fmt: skip
        lines += ["", f"attention: {len(self.sites)} sites subscribed"]
        lines += [f"  {e.plugin}: {e.op} on {e.lane}{' from ' + e.from_ + ' (' + e.how + ')' if e.from_ else ''} at {len(e.sites)} sites, steps {_ranges(e.steps)}"
                  for e in self.edits]  # fmt: skip
        lines += [f"  {p.plugin}: probe {p.name} reads {p.read} of {p.word or 'text'!r} on {p.branch} at {len(p.sites)} sites, steps {_ranges(p.steps)}"
                  for p in self.probes]  # fmt: skip
        lines += ["", "order of plugins per event"] + [f"  {name:<10} {' -> '.join(plugins)}" for name, plugins in self.events.items() if plugins]
        lines += ["", "board: " + (", ".join(f"{k} ({v})" for k, v in self.publishes.items()) or "empty"), "conflicts: none",
                  "memory: " + ", ".join(f"{k} {_bytes(v)}" for k, v in self.memory.items())]  # fmt: skip
        return "\n".join(lines)


def make_plan(plugins: dict[str, Plugin], declare: Callable[[str, Needs], None], events: dict[str, tuple[str, ...]], request: Request,
              backbone: Backbone) -> Plan:  # fmt: skip
    """Let every plugin declare, in order; merge; check. Raises PlanConflict or ConfigError before anything heavy happens."""
    draft = _Draft()
    Needs(request, backbone.sites, "core", draft).lane("edit", prompt="edit", n=request.n, seed=request.seed)
    draft.published.update(dict.fromkeys(request.inputs, "input"))
    for name in plugins:
        declare(name, Needs(request, backbone.sites, name, draft))
    _check_order(plugins, draft)
    passes = tuple(_pass(name, draft, request, backbone) for name in _pass_names(draft))
    lanes = {(p.name, lane.name): lane for p in passes for lane in p.lanes}
    edits = tuple(_clip(e, lanes) for e in draft.edits)
    _check_edits(edits)
    probes = tuple(replace(p, steps=p.steps & frozenset(lanes["edit", p.branch.split("/")[0]].steps)) for p in draft.probes)
    subscribers: dict[str, list[str]] = {}
    for declared in (*edits, *probes):
        for site in sorted(declared.sites):
            if declared.plugin not in subscribers.setdefault(site, []):
                subscribers[site].append(declared.plugin)
    sites = {s.name: tuple(subscribers[s.name]) for s in backbone.sites if s.name in subscribers}
    memory = backbone.memory(request.size, max((p.rows(i) for p in passes for i in range(request.steps)), default=0), bool(edits), len(probes))
    return Plan(request, backbone.name, tuple(plugins), passes, sites, edits, probes, dict(draft.published), events, memory)


def _pass_names(draft: _Draft) -> list[str]:
    names = [key for what, key in draft.fields if what == "pass"]
    return [*names, "edit"] if "edit" not in names else names


def _pass(name: str, draft: _Draft, request: Request, backbone: Backbone) -> PassPlan:
    everything, lanes = frozenset(range(request.steps)), []
    declared = {key[1]: fields for (what, key), fields in draft.fields.items() if what == "lane" and key[0] == name}
    alive: dict[str, frozenset[int]] = {}
    for lane, fields in declared.items():
        wanted = draft.alive.get((name, lane))
        alive[lane] = frozenset(wanted) if wanted is not None else frozenset() if fields.get("follows") else everything
    for e in draft.edits:  # a lane that others attend to lives while they do
        source = e.from_.split("/")[0]
        if e.pass_ == name and source:
            if source not in declared:
                raise PlanConflict(f"{e.plugin} attends to lane {source!r}, which nobody declares", where=f"pass {name}",
                                   fix="Add a plugin that provides it (source_trajectory).")  # fmt: skip
            alive[source] |= e.steps & alive[e.lane.split("/")[0]]
    for lane, fields in declared.items():
        steps = alive[lane]
        if not fields.get("follows") and steps:  # solved by itself: it cannot skip a step once it runs
            steps = frozenset(range(min(steps), request.steps))
        if not request.skip_dead_rows:
            steps = everything
        given = {"prompt": "edit", "n": 1, "seed": request.seed, **{k: v for k, v in fields.items() if v is not None}}
        given.setdefault("guidance", request.guidance_of(lane))
        if given["prompt"] not in request.prompt:
            raise ConfigError(f"lane {lane!r} needs a {given['prompt']} prompt", where=f"prompt.{given['prompt']}", fix="Give one.")
        lanes.append(Lane(name=lane, steps=tuple(sorted(steps)), owners=tuple(dict.fromkeys(draft.owners["lane", (name, lane)])), **given))
    lanes.sort(key=lambda lane: lane.name == "edit")  # sources first: a stable row order, whoever declared first
    branches: list[Branch] = []
    for ln in lanes:
        if backbone.cfg_scale(ln.guidance, request.true_cfg) > 1:
            branches.append(Branch(f"{ln.name}/null", ln.name, "null", "negative", ln.n))
        branches.append(Branch(f"{ln.name}/text", ln.name, "text", ln.prompt, ln.n))
    make = draft.fields.get(("pass", name), {}).get("scheduler")
    return PassPlan(name, tuple(lanes), tuple(branches), backbone.groups(branches), make)


def _clip(e: DeclaredEdit, lanes: dict[tuple[str, str], Lane]) -> DeclaredEdit:
    lane = lanes.get((e.pass_, e.lane.split("/")[0]))
    if lane is None:
        raise PlanConflict(f"{e.plugin} edits lane {e.lane!r}, which nobody declares", where=f"pass {e.pass_}", fix="Declare it with need.lane.")
    return replace(e, steps=e.steps & frozenset(lane.steps))


def _check_edits(edits: tuple[DeclaredEdit, ...]) -> None:
    """how="sum" rewrites own keys: two of them on one site and lane do not commute (conflict table, append sum)."""
    for i, a in enumerate(edits):
        for b in edits[:i]:
            shared, steps = a.sites & b.sites, a.steps & b.steps
            if a.how == b.how == "sum" and a.lane == b.lane and shared and steps and a.plugin != b.plugin:
                raise PlanConflict(f"{b.plugin} and {a.plugin} both sum keys into {a.lane}", where=f"site {min(shared)}, step {min(steps)}",
                                   fix="Use combine: join for one of them, or separate their windows or sites.")  # fmt: skip


def _check_order(plugins: dict[str, Plugin], draft: _Draft) -> None:
    order = list(plugins)
    for owner, key, ready in draft.consumed:
        publisher = draft.published.get(key)
        if publisher is None:
            raise PlanConflict(f"{owner} needs {key!r}, which nobody publishes", where=f"plugins.{owner}",
                               fix=f"Published: {sorted(draft.published) or 'nothing'}.")  # fmt: skip
        if not ready and publisher in order:
            raise PlanConflict(f"{owner} needs {key!r} from {publisher}, which comes later", where=f"plugins.{owner}",
                               fix=f"Put {publisher} above {owner}.")  # fmt: skip
    for name, plugin in plugins.items():
        for other in getattr(plugin, "after", ()):
            if other in order and order.index(other) > order.index(name):
                raise PlanConflict(f"{name} must come after {other}", where="plugins", fix=f"Put {other} above {name}.")
        for other in getattr(plugin, "before", ()):
            if other in order and order.index(other) < order.index(name):
                raise PlanConflict(f"{name} must come before {other}", where="plugins", fix=f"Put {name} above {other}.")


def _ranges(steps: Iterable[int]) -> str:
    """`0-3, 7` from step indices."""
    parts: list[list[int]] = []
    for i in sorted(steps):
        if parts and parts[-1][1] == i - 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "none"


def _bytes(n: int) -> str:
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
