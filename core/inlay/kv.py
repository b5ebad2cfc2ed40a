"""Lanes recorded once and replayed in later runs, so that n edits of a source cost n samplings.

Every lane but the edit's is kept: its latents and predictions by pass, lane and evaluation, and the
queries, keys and values that edits take of it by site too. In a replay its rows are not evaluated.
Equal facts and equal latents are demanded: a store never answers for another source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from inlay_attention import Held, SiteProgram, Store, lane_of
from inlay_attention.store import ANEW
from inlay_config.errors import InputError, PlanConflict

from .backbones import fingerprint
from .events import Branch, Step, Window

if TYPE_CHECKING:
    from .backbones import Backbone
    from .plan import PassPlan, Plan
    from .session import Run

Place = tuple[str, str, str, int]  # pass, branch, site, step


def stored(pass_: str, lane: str) -> bool:
    """Whether a store keeps this lane: all but the one that is edited."""
    return (pass_, lane) != ("edit", "edit")


def taken(store: Store, plan: Plan, sites: Iterable[str]) -> dict[Place, str]:
    """Which of q, k, v are to be kept where: what edits take, and what the store asks for.

    Raises PlanConflict where a stored lane depends on the edit.
    """
    places: dict[Place, set[str]] = {}

    def keep(pass_: PassPlan, lane: str, at: Iterable[str], steps: set[int], what: str) -> None:
        for b in (b for b in pass_.branches if b.lane == lane and stored(pass_.name, lane)):
            for site, step in product(at, steps & set(b.steps)):
                places.setdefault((pass_.name, b.name, site, step), set()).update(what)

    for p in plan.passes:
        for e in (e for e in plan.edits if e.pass_ == p.name and e.from_ and ":" not in e.from_):
            if stored(p.name, lane_of(e.lane)) and not stored(p.name, lane_of(e.from_)):
                problem = f"{e.plugin} lets lane {e.lane} depend on the edit: it cannot be stored"
                raise PlanConflict(problem, where=f"pass {p.name}", fix="Run without a store.")
            what = "qk" if e.how == "qk" or e.op in ("align", "mix") else "kv"
            keep(p, lane_of(e.from_), e.sites, set(e.steps), what)
        if store.sites:
            window = Window.parse(store.steps or [0.0, 1.0], "store.steps") or Window(0, 0)
            named = [site for site in sites if fnmatchcase(site, store.sites)]
            for lane in p.lanes:
                keep(p, lane.name, named, set(window.steps(plan.request.steps)), "qkv")
    return {place: "".join(sorted(what)) for place, what in places.items()}


class Tape:
    """One run's recording or replay; without a store it does nothing.

    taken: by pass, branch, site and step, which of q, k, v are kept; size: their bytes, by
    arithmetic. Raises ConfigError when they are more than the budget.
    """

    def __init__(self, store: Store | None, plan: Plan, backbone: Backbone) -> None:
        self.store, self.plan, self.backbone = store or Store(), plan, backbone
        self.replays = bool(self.store.facts)
        self.records = store is not None and not self.replays
        sites = {site.name: site for site in backbone.sites}
        self.taken = {} if store is None else taken(store, plan, sites)
        self.sites = {site for _, _, site, _ in self.taken}
        self.size = 0
        for (_, branch, name, _), parts in self.taken.items() if self.records else ():
            rows = next(b.n for p in plan.passes for b in p.branches if b.name == branch)
            n, m = backbone.lengths(sites[name], plan.request.size)
            tokens = rows * sum(n if part == "q" else m for part in parts)
            item = getattr(torch, self.store.dtype or "", backbone.dtype).itemsize
            self.size += tokens * sites[name].heads * sites[name].dim * item
        self.store.afford(self.size)

    def recall(self, step: Step, branch: Branch) -> bool:
        """Whether a branch is replayed; then its prediction and what probes read of it are there.
        Raises InputError when its lane is not where it was."""
        if not (self.replays and stored(step.pass_, branch.lane)):
            return False
        x = step.x[branch.lane]
        if not torch.equal(self.store.get(_key(step, branch.lane, "x")).to(x), x):
            problem = f"lane {branch.lane} is not where it was when it was recorded"
            fix = f"Its picture, its noise or a plugin that writes it differs. {ANEW}"
            raise InputError(problem, where=f"store, {step.pass_} step {step.index}", fix=fix)
        step.preds[branch.name] = self.store.get(_key(step, branch.name, "pred")).to(x)
        for p in (p for p in self.plan.probes if p.branch == branch.name):
            for site in p.sites if step.last_eval and step.index in p.steps else ():
                read = self.store.get(_key(step, branch.name, p.name, site))
                step.probes.setdefault(p.name, {})[site] = read.to(x)
        return True

    def kept(self, step: Step, site: str, branches: Iterable[str]) -> dict[str, str]:
        """What the program of a site is to keep of each of these branches."""
        places = {b: (step.pass_, b, site, step.index) for b in branches if self.records}
        return {b: self.taken[place] for b, place in places.items() if place in self.taken}

    def given(self, step: Step, site: str) -> dict[str, Held]:
        """What a site has of the replayed branches."""
        held, place = {}, (self.backbone.device, self.backbone.dtype)
        for b in (b for p in self.plan.passes for b in p.branches if self.replays):
            if parts := self.taken.get((step.pass_, b.name, site, step.index)):
                known = {
                    part: self.store.get(_key(step, b.name, part, site)).to(*place)
                    for part in parts
                }
                mask = self.store.tensors.get(_key(step, b.name, "mask", site))
                held[b.name] = Held(**known, mask=None if mask is None else mask.to(*place))
        return held

    def record(
        self, step: Step, branches: Iterable[Branch], programs: Mapping[str, SiteProgram]
    ) -> None:
        """After a model call. Raises InputError when the budget is spent."""
        for b in (b for b in branches if self.records and stored(step.pass_, b.lane)):
            self.store.put(_key(step, b.lane, "x"), step.x[b.lane])
            self.store.put(_key(step, b.name, "pred"), step.preds[b.name])
            for p in (p for p in self.plan.probes if p.branch == b.name):
                for site, read in step.probes.get(p.name, {}).items():
                    self.store.put(_key(step, b.name, p.name, site), read)
        for site, program in programs.items():
            for branch, held in program.held.items():
                for part, tensor in held._asdict().items():
                    if tensor is not None:
                        self.store.put(_key(step, branch, part, site), tensor, part != "mask")


def facts(run: Run, scheduler: Any) -> dict[str, str]:
    """What a recording depends on besides its latents: name -> a short description."""
    r, model = run.plan.request, fingerprint.model(run.backbone.denoiser)
    known = {"size": f"{r.size[1]}x{r.size[0]}", "steps": str(r.steps), "dtype": str(run.dtype)}
    known |= {"model": model, "scheduler": fingerprint.scheduler(scheduler)}
    edits = [e for e in run.plan.edits if stored(e.pass_, lane_of(e.lane))]
    known["edits"] = ", ".join(sorted(f"{e.plugin}: {e.kind} on {e.lane}" for e in edits)) or "none"
    for p in run.plan.passes:
        for b in (b for b in p.branches if stored(p.name, b.lane)):
            known[f"prompt of {p.name}/{b.name}"] = fingerprint.digest(run.conds[b.name].embeds)
    return known


def _key(step: Step, who: str, what: str, site: str = "") -> str:
    return f"{step.pass_}/{who}/{step.eval}/{what}/{site}"
