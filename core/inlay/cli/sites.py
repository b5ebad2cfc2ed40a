"""`inlay plan --sites`: the attention calls of each site and what they cost, by a dry run of the
lowering on tensors that hold nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from inlay.backbones import Backbone
from inlay.cli.tables import ranges
from inlay.events import AttnSite
from inlay.plan import PassPlan, Plan
from inlay_attention import Edit, Held, Probe, Rows, SiteProgram, calls, lane_of
from inlay_attention.conflicts import DeclaredEdit


@dataclass
class SiteCost:
    """What sites of one shape do in some steps of a pass, in one model call.
    calls: (rows, queries, keys) of each; cost: products of queries and keys, against none edited.
    """

    pass_: str
    sites: list[str]
    steps: list[int]
    branches: list[str]
    plugins: list[str]
    calls: list[tuple[int, int, int]]
    cost: float


def site_costs(plan: Plan, backbone: Backbone) -> list[SiteCost]:
    """Sites in the steps in which they are edited or read; equal ones in one entry."""
    by_site: dict[str, SiteCost] = {}
    for pass_ in plan.passes:
        for group, site, step in product(pass_.groups, backbone.sites, range(plan.request.steps)):
            cost = _cost(plan, backbone, pass_, group, step, site)
            if cost:
                known = by_site.setdefault(f"{site.name} {_structure(cost)}", cost)
                known.steps.append(step)
    merged: dict[str, SiteCost] = {}
    for cost in by_site.values():
        known = merged.setdefault(f"{cost.steps} {_structure(cost)}", cost)
        known.sites += cost.sites if known is not cost else []
    return list(merged.values())


def _structure(cost: SiteCost) -> str:
    return str((cost.pass_, cost.branches, cost.plugins, cost.calls))


def _cost(
    plan: Plan, backbone: Backbone, pass_: PassPlan, group: Sequence[str], step: int, site: AttnSite
) -> SiteCost | None:
    here = [b for b in pass_.branches if step in b.steps]
    rows = {b.name: b.n for b in here if b.name in group and not b.replayed}
    known = [*rows, *(b.name for b in here if b.replayed)]
    edits: dict[str, list[Edit]] = {}
    for e in plan.edits:
        if e.pass_ == pass_.name and site.name in e.sites and step in e.steps:
            for branch in rows:
                if e.lane in (branch, lane_of(branch)):
                    edits.setdefault(branch, []).append(_example(e, branch, known))
    probes = [p for p in plan.probes if site.name in p.sites and step in p.steps]
    probes = [p for p in probes if p.branch in rows and pass_.name == "edit"]
    if not edits and not probes:
        return None
    n, m = backbone.lengths(site, plan.request.size)
    program = _program(backbone, site, Rows.of(rows), edits, probes)
    for b in (b for b in here if b.replayed):
        q, k = (torch.empty(b.n, site.heads, t, site.dim, device="meta") for t in (n, m))
        program.given = {**program.given, b.name: Held(k, k, q)}
    made = calls(program,
                 (sum(rows.values()), site.heads, n, site.dim),
                 (sum(rows.values()), site.heads, m, site.dim))  # fmt: skip
    cost = sum(r * q * k for r, q, k in made) / (sum(rows.values()) * n * m)
    plugins = {e.plugin for listed in edits.values() for e in listed} | {p.plugin for p in probes}
    return SiteCost(pass_.name, [site.name], [], list(rows), sorted(plugins), made, cost)


def _example(e: DeclaredEdit, branch: str, branches: list[str]) -> Edit:
    """A declared edit with numbers that change nothing, as it would be emitted for a branch."""
    from_ = e.from_
    if from_ and ":" not in from_:
        role = branch.split("/")[1]
        from_ = next(b for b in (from_, f"{from_}/{role}", f"{from_}/text") if b in branches)
    value = (lambda q, k, v, mask, attend: attend(q, k, v, mask)) if e.op == "patch" else 1.0
    return Edit(e.op, e.plugin, branch, e.queries, e.keys, value, from_=from_, how=e.how)


def _program(
    backbone: Backbone, site: AttnSite, rows: Rows, edits: dict[str, list[Edit]],
    probes: list[Probe],
) -> SiteProgram:  # fmt: skip
    words = {p.name: p.word if isinstance(p.word, tuple) else (0,) for p in probes}
    spans = backbone.spans(site, backbone.text_tokens)
    return SiteProgram(site.name, rows, edits, probes, words, spans, {})


def site_table(costs: Sequence[SiteCost]) -> str:
    """For people: sites, steps, calls as `rows x queries x keys`, and the relative cost."""
    lines = ["attention calls where plugins act; every other site makes one plain call"]
    for c in costs:
        made = " + ".join(f"{r} x {q} x {k}" for r, q, k in c.calls)
        some = c.sites[0] if len(c.sites) == 1 else f"{c.sites[0]} … {c.sites[-1]}"
        lines += [
            "",
            f"pass {c.pass_}, steps {ranges(c.steps)}, {len(c.sites)} sites ({some})",
            f"  {', '.join(c.plugins)} on [{', '.join(c.branches)}]",
            f"  {len(c.calls)} calls: {made} (rows x queries x keys), {c.cost:.2f} of plain",
        ]
    return "\n".join(lines)
