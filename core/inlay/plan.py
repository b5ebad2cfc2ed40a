"""Needs -> Plan: all that can be decided, and every conflict that can be seen, before a forward."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from inlay_attention import Key, Op, Probe, lane_of
from inlay_attention.conflicts import DeclaredEdit, by_place, settle
from inlay_config.config import Gradient
from inlay_config.errors import ConfigError, PlanConflict

from .events import AttnSite, Branch, Lane, Plugin, Window
from .frames import Frame
from .kv import stored
from .objectives import DeclaredGrad

if TYPE_CHECKING:
    from .backbones import Backbone

Active = Window | Iterable[int] | None
Through = Literal["model", "x0"]
Word = tuple[str, str | tuple[int, ...], str]


@dataclass(frozen=True)
class Request:
    """What was asked for. size, grid: (height, width) px and tokens; inputs: board keys given;
    resolve: who wins where two edits clash; replays: a store answers for all lanes but the edit;
    levels(): (step, Frame) of every evaluation, tabulated when asked; guided(lane): whether it has
    classifier-free guidance."""

    prompt: Mapping[str, str]
    steps: int
    size: tuple[int, int]
    grid: tuple[int, int]
    n: int = 1
    seed: int = 0
    guidance: float | Mapping[str, float] = 3.5
    true_cfg: float = 1.0
    inputs: tuple[str, ...] = ()
    skip_dead_rows: bool = True
    resolve: tuple[Mapping[str, str], ...] = ()
    replays: bool = False
    gradient: Gradient = field(default_factory=Gradient)
    levels: Callable[[], list[tuple[int, Frame]]] = list
    guided: Callable[[str], bool] = bool

    def scale(self, lane: str) -> float:
        """The guidance of a lane."""
        return self.guidance.get(lane, 3.5) if isinstance(self.guidance, Mapping) else self.guidance


@dataclass(frozen=True)
class PassPlan:
    """One run of the loop. groups: branches per model call; scheduler: builds its own solver, of so
    many `evaluations` in all (0: one per step)."""

    name: str
    lanes: tuple[Lane, ...]
    branches: tuple[Branch, ...]
    groups: tuple[tuple[str, ...], ...]
    scheduler: Callable[[Any], Any] | None = None
    evaluations: int = 0

    def rows(self, step: int) -> int:
        """Rows of the model batch in a step."""
        return sum(b.n for b in self.branches if step in b.steps and not b.replayed)


@dataclass(frozen=True, eq=False)
class Plan:
    """The decided run; `str(plan)` is the table that `inlay plan` prints.
    words[name]: (branch, word, the YAML path that says it), to be found in its prompt."""

    request: Request
    backbone: str
    order: tuple[str, ...]
    passes: tuple[PassPlan, ...]
    sites: dict[str, tuple[str, ...]]
    edits: tuple[DeclaredEdit, ...]
    dropped: tuple[DeclaredEdit, ...]
    probes: tuple[Probe, ...]
    grads: tuple[DeclaredGrad, ...]
    on_request: dict[str, int]
    words: dict[str, Word]
    publishes: dict[str, str]
    events: dict[str, tuple[str, ...]]
    memory: dict[str, int]

    @cached_property
    def allowed(self) -> dict[tuple[str, str, int], set[Key]]:
        """(pass, site, step) -> the edits that may be emitted there."""
        return by_place((*self.edits, *self.dropped))

    @cached_property
    def lost(self) -> dict[tuple[str, str, int], set[Key]]:
        """(pass, site, step) -> the edits that are emitted there and lose to another plugin's."""
        return by_place(self.dropped)

    @property
    def evaluations(self) -> dict[str, int]:
        """Forward units (one row in one evaluation) per pass, and what plugins may ask for."""
        steps = self.request.steps
        units = {p: sum(map(p.rows, range(steps))) for p in self.passes}
        solved = {p.name: n * (p.evaluations or steps) // steps for p, n in units.items()}
        return solved | {f"asked for by {name}": n for name, n in self.on_request.items()}

    @property
    def digest(self) -> str:
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        from .cli.tables import plan_table

        return plan_table(self)


class Needs:
    """What `inlay_declare` says it with; `request` and `sites` are there to be read."""

    def __init__(self, owner: str, request: Request, sites: tuple[AttnSite, ...], draft: Draft):
        self.owner, self.request, self.sites, self._draft = owner, request, sites, draft

    def active(self, window: Active) -> frozenset[int]:
        """Steps of a window; None: the whole run. Raises ConfigError when it lies outside."""
        if isinstance(window, Window):
            return frozenset(window.steps(self.request.steps, f"plugins.{self.owner}"))
        return frozenset(range(self.request.steps) if window is None else window)

    def select(
        self,
        kind: Iterable[str] = ("self", "cross", "joint"),
        block: Iterable[str] | None = None,
        depth: tuple[float, float] = (0.0, 1.0),
    ) -> frozenset[str]:
        """Names of the sites of these kinds, blocks, depths. Raises ConfigError for none."""
        near = (s for s in self.sites if depth[0] <= s.depth <= depth[1] and s.kind in kind)
        found = frozenset(s.name for s in near if block is None or s.block in block)
        if not found:
            known = sorted({(s.kind, s.block) for s in self.sites})
            problem = f"no attention site of kind {kind}, block {block}, depth {depth}"
            fix = f"This model has {known}."
            raise ConfigError(problem, where=f"plugins.{self.owner}", fix=fix)
        return found

    def pass_(
        self, name: str, scheduler: Callable[[Any], Any] | None = None, evaluations: int = 0
    ) -> None:
        """A pass before the edit. scheduler: makes its solver, of the session's (see PassPlan)."""
        fields = {"scheduler": scheduler, "evaluations": evaluations}
        self._draft.merge("pass", name, fields, self.owner)

    def lane(self, name: str, pass_: str = "edit", active: Active = None, **fields: Any) -> None:
        """A trajectory (fields: see Lane). active: steps in which its rows must be evaluated."""
        self._draft.merge("lane", (pass_, name), fields, self.owner)
        if active is not None:
            self._draft.alive.setdefault((pass_, name), set()).update(self.active(active))

    def branch(
        self, lane: str, role: str, cond: str = "", active: Active = None, pass_: str = "edit"
    ) -> None:
        """One more row per picture of `lane`: its prediction is step.preds["lane/role"]. cond: the
        prompt it is under, the lane's own by default."""
        self._draft.merge("branch", (pass_, lane, role), {"cond": cond}, self.owner)
        self._draft.called.setdefault((pass_, lane, role), set()).update(self.active(active))

    def word(self, name: str, branch: str, word: str | tuple[int, ...], where: str = "") -> None:
        """Text tokens to be found in the prompt of `branch`: run.words[name]. where: the option
        that holds the word, for errors."""
        self._draft.words[name] = (branch, word, f"plugins.{self.owner}.{where}".rstrip("."))

    def edit(
        self, op: Op, lane: str, sites: frozenset[str], active: Active = None, **fields: Any
    ) -> None:
        """An edit that will be emitted on `lane` (or "lane/role") at `sites` inside `active`;
        fields: from_, how (join, sum, side; a route: qk or kv), queries and keys (spans), pass_."""
        fields = ({"how": "join"} if op == "append" else {}) | fields
        edit = DeclaredEdit(self.owner, op, lane, sites, self.active(active), **fields)
        self._draft.edits.append(edit)

    def probe(
        self, name: str, branch: str, word: str | tuple[int, ...], sites: frozenset[str],
        active: Active = None, read: Literal["columns", "rows", "mass"] = "columns",
        where: str = "",
    ) -> None:  # fmt: skip
        """Attention between `branch`'s picture and `word` of its prompt (or these text tokens; see
        `word`), found in step.probes[name][site]."""
        probe = Probe(name, self.owner, branch, read, sites, self.active(active), word)
        self._draft.probes.append(probe)
        self.word(name, branch, word, where)

    def grad(self, lane: str, active: Active = None, through: Through = "model") -> None:
        """A loss of `lane` will be said in `active`. through: the model, or x0 alone, which spares
        the model's backward and takes its prediction as it is."""
        self._draft.grads.append(DeclaredGrad(self.owner, lane, self.active(active), through))

    def evaluations(self, rows: int) -> None:
        """Rows that will be asked for by run.evaluate, at most, in the whole run."""
        self._draft.on_request[self.owner] = rows

    def publish(self, key: str) -> None:
        """A board key that this plugin, and no other, will write."""
        first = self._draft.published.setdefault(key, self.owner)
        if first != self.owner:
            problem = f"{key!r} is published by {first} and by {self.owner}"
            raise PlanConflict(problem, where="board", fix="Remove one of the two plugins.")

    def consume(self, key: str) -> None:
        """A board key that an earlier plugin (or the caller) provides."""
        self._draft.consumed.append((self.owner, key))


@dataclass
class Draft:
    """What was declared so far, with its owners."""

    fields: dict[tuple[str, Any], dict[str, Any]] = field(default_factory=dict)
    owners: dict[tuple[str, Any], list[str]] = field(default_factory=dict)
    alive: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    called: dict[tuple[str, str, str], set[int]] = field(default_factory=dict)
    words: dict[str, Word] = field(default_factory=dict)
    edits: list[DeclaredEdit] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    grads: list[DeclaredGrad] = field(default_factory=list)
    on_request: dict[str, int] = field(default_factory=dict)
    published: dict[str, str] = field(default_factory=dict)
    consumed: list[tuple[str, str]] = field(default_factory=list)

    def lanes(self, pass_: str) -> dict[str, dict[str, Any]]:
        """Declared fields of each lane of a pass."""
        every = ((key, fields) for (what, key), fields in self.fields.items() if what == "lane")
        return {key[1]: fields for key, fields in every if key[0] == pass_}

    def merge(self, what: str, key: Any, fields: dict[str, Any], owner: str) -> None:
        """Equal declarations merge; unequal ones raise with both owners."""
        known = self.fields.setdefault((what, key), {})
        owners = self.owners.setdefault((what, key), [])
        for name, value in fields.items():
            if known.setdefault(name, value) != value:
                problem = f"{owners[0]} wants {name}={known[name]!r}, {owner} {name}={value!r}"
                fix = "Make their options agree, or remove one of them."
                raise PlanConflict(problem, where=f"{what} {key}", fix=fix)
        owners.append(owner)


def make_plan(
    plugins: Mapping[str, Plugin],
    hook_of: Callable[[str, str], Any],
    events: dict[str, tuple[str, ...]],
    request: Request,
    backbone: Backbone,
) -> Plan:
    """Let every plugin declare, in order; merge; check. Raises PlanConflict or ConfigError."""
    draft = Draft(published=dict.fromkeys(request.inputs, "input"))
    core = Needs("core", request, backbone.sites, draft)
    core.lane("edit", prompt="edit", n=request.n, seed=request.seed)
    for name in plugins:
        hook_of("inlay_declare", name)(need=Needs(name, request, backbone.sites, draft))
    check_order(plugins, draft)
    names = [key for what, key in draft.fields if what == "pass" and key != "edit"]
    passes = tuple(plan_pass(name, draft, request, backbone) for name in (*names, "edit"))
    under = {(b.name, b.cond) for p in passes for b in p.branches}  # conditions go by branch
    if len(under) > len(dict(under)):
        fix = f"Name one of the lanes otherwise: {sorted(under)}."
        raise PlanConflict("a branch has two prompts in two passes", where="passes", fix=fix)
    alive = {(p.name, ln.name): frozenset(ln.steps) for p in passes for ln in p.lanes}
    alive |= {(p.name, b.name): frozenset(b.steps) for p in passes for b in p.branches}
    edits = tuple(clip(e, (e.pass_, e.lane), alive) for e in draft.edits)
    probes = tuple(clip(p, ("edit", p.branch), alive) for p in draft.probes)
    grads = tuple(clip(g, ("edit", g.lane), alive) for g in draft.grads)
    edits, dropped = settle(edits, probes, request.resolve)
    acting, sites = (*edits, *probes), dict[str, tuple[str, ...]]()
    for d in acting:
        for site in d.sites - {s.name for s in backbone.sites}:
            raise ConfigError(f"no attention site {site!r}", where=f"plugins.{d.plugin}")
    for s in backbone.sites:
        sites[s.name] = tuple(dict.fromkeys(d.plugin for d in acting if s.name in d.sites))
    sites = {name: users for name, users in sites.items() if users}
    rows = max(p.rows(i) for p in passes for i in range(request.steps))
    memory = backbone.memory(request.size, rows, bool(edits), len(probes))
    decided = (request, backbone.name, tuple(plugins), passes, sites, edits, dropped, probes)
    asked = (grads, draft.on_request, draft.words, draft.published)
    return Plan(*decided, *asked, events, memory)


def plan_pass(name: str, draft: Draft, request: Request, backbone: Backbone) -> PassPlan:
    """Lanes with the steps they live in, and their branches."""
    every, fields = frozenset(range(request.steps)), draft.lanes(name)
    alive = {}
    for lane, declared in fields.items():
        wanted = draft.alive.get((name, lane), () if declared.get("follows") else every)
        alive[lane] = frozenset(wanted)
    for e in draft.edits:  # a lane lives while others attend to it
        source = "" if ":" in e.from_ else lane_of(e.from_)  # "kind:name": on the board
        if e.pass_ == name and source and source not in fields:
            problem = f"{e.plugin} attends to lane {source!r}, which nobody declares"
            fix = "Add a plugin that provides it, such as source_trajectory, above."
            raise PlanConflict(problem, where=f"pass {name}", fix=fix)
        if e.pass_ == name and source:
            alive[source] |= e.steps & alive.get(lane_of(e.lane), frozenset())
    lanes, branches = [], []
    for lane in sorted(fields, key=lambda lane: lane == "edit"):  # sources first
        steps, given = alive[lane] if request.skip_dead_rows else every, fields[lane]
        if steps and not given.get("follows"):  # solved by itself: it cannot skip
            steps = frozenset(range(min(steps), request.steps))
        values = dict[str, Any](prompt="edit", n=1, seed=request.seed, true_cfg=request.true_cfg)
        values |= {"guidance": request.scale(lane), "steps": tuple(sorted(steps))}
        values |= {key: value for key, value in given.items() if value is not None}
        owners = tuple(dict.fromkeys(draft.owners["lane", (name, lane)]))
        lanes.append(ln := Lane(name=lane, owners=owners, **values))
        if ln.prompt not in request.prompt:
            problem = f"lane {lane!r} needs the prompt {ln.prompt!r}"
            raise ConfigError(problem, where=f"prompt.{ln.prompt}", fix="Give one.")
        roles = [("text", ln.prompt, ln.steps)]
        if backbone.cfg_scale(ln.guidance, ln.true_cfg) > 1:
            roles.insert(0, ("null", "negative", ln.steps))
        for key, called in draft.called.items():
            if key[:2] == (name, lane):
                role, cond = key[2], draft.fields["branch", key]["cond"] or ln.prompt
                roles.append((role, cond, tuple(sorted(steps & called))))
        kept = request.replays and stored(name, lane)
        branches += [Branch(f"{lane}/{r}", lane, r, c, ln.n, here, kept) for r, c, here in roles]
    solver = draft.fields.get(("pass", name), {})
    return PassPlan(name, tuple(lanes), tuple(branches), backbone.groups(branches), **solver)


def clip(declared: Any, rows: tuple[str, str], alive: dict[tuple[str, str], frozenset[int]]) -> Any:
    """The edit or probe, in the steps in which its lane (or branch) lives."""
    if rows not in alive:
        problem = f"{declared.plugin} acts on {rows[1]!r}, which is not there"
        raise PlanConflict(problem, where=f"pass {rows[0]}", fix="Declare it, or raise guidance.")
    steps = declared.steps & alive[rows]
    if declared.steps and not steps and isinstance(declared, Probe):
        problem = f"{declared.plugin} reads {rows[1]!r} in steps that overwrite it"
        fix = f"It lives in steps {min(alive[rows], default=None)} and later: read it there."
        raise PlanConflict(problem, where=f"pass {rows[0]}", fix=fix)
    return replace(declared, steps=steps)


def check_order(plugins: Mapping[str, Plugin], draft: Draft) -> None:
    """Board edges and after/before are checked against the YAML order; nothing is reordered."""
    pairs = [(other, name) for name, plugin in plugins.items() for other in plugin.after]
    pairs += [(name, other) for name, plugin in plugins.items() for other in plugin.before]
    for owner, key in draft.consumed:
        publisher = draft.published.get(key)
        if publisher is None:
            fix = f"Published: {sorted(draft.published) or 'nothing'}."
            problem = f"{owner} needs {key!r}, which nobody publishes"
            raise PlanConflict(problem, where=f"plugins.{owner}", fix=fix)
        pairs.append((publisher, owner))
    place = {name: i for i, name in enumerate(plugins)}
    for first, second in pairs:
        if place.get(first, -1) > place.get(second, len(place)):
            problem = f"{second} needs {first}, which comes later"
            raise PlanConflict(problem, where="plugins", fix=f"Put {first} above {second}.")
