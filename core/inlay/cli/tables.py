"""A plan as a table for people and as plain data for programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.plan import Plan
    from inlay_attention.conflicts import DeclaredEdit


def plan_table(plan: Plan) -> str:
    """What `inlay plan` prints: passes, lanes, calls, sites, order per event, board, memory."""
    r = plan.request
    lines = [f"{plan.backbone}, {r.size[1]}x{r.size[0]} px, {r.steps} steps, n = {r.n}"]
    for p in plan.passes:
        calls = " + ".join(f"[{', '.join(group)}]" for group in p.groups)
        lines += ["", f"pass {p.name}: {plan.evaluations[p.name]} forward units, calls {calls}"]
        lines += [
            f"  lane {ln.name}: prompt {ln.prompt}, n {ln.n}, seed {ln.seed}, guidance "
            f"{ln.guidance:g}, steps {ranges(ln.steps)} ({', '.join(ln.owners)})"
            for ln in p.lanes
        ]
    lines += ["", f"attention: {len(plan.sites)} sites subscribed"]
    for e in plan.edits:
        lines.append(f"  {edit_line(e)}")
    lines += [f"  resolved, dropped: {edit_line(e)}" for e in plan.dropped]
    lines += [
        f"  {q.plugin}: probe {q.name}, {q.read} of {q.word!r} on {q.branch}, "
        f"{len(q.sites)} sites, steps {ranges(q.steps)}"
        for q in plan.probes
    ]
    lines += [
        f"  {g.plugin}: loss of {g.lane} through {g.through}, steps {ranges(g.steps)}"
        for g in plan.grads
    ]
    asked = plan.on_request.items()
    lines += [f"  {owner}: up to {n} forward units on request" for owner, n in asked]
    order = [f"  {event}: {' -> '.join(names)}" for event, names in plan.events.items() if names]
    board = ", ".join(f"{key} ({owner})" for key, owner in plan.publishes.items()) or "empty"
    memory = ", ".join(f"{purpose} {in_bytes(size)}" for purpose, size in plan.memory.items())
    lines += ["", "order of plugins per event", *(order or ["  none"]), ""]
    return "\n".join([*lines, f"board: {board}", "conflicts: none", f"memory: {memory}"])


def plan_data(plan: Plan) -> dict[str, Any]:
    """The same for `inlay plan --json`."""
    r = plan.request
    return {
        "digest": plan.digest,
        "backbone": plan.backbone,
        "size": list(r.size),
        "steps": r.steps,
        "n": r.n,
        "order": list(plan.order),
        "passes": [
            {
                "name": p.name,
                "calls": [list(group) for group in p.groups],
                "evaluations": plan.evaluations[p.name],
                "lanes": [
                    {
                        "name": ln.name,
                        "prompt": ln.prompt,
                        "n": ln.n,
                        "seed": ln.seed,
                        "guidance": ln.guidance,
                        "steps": list(ln.steps),
                        "owners": list(ln.owners),
                    }
                    for ln in p.lanes
                ],
            }
            for p in plan.passes
        ],
        "sites": {name: list(plugins) for name, plugins in plan.sites.items()},
        "edits": [
            {
                "plugin": e.plugin,
                "op": e.op,
                "lane": e.lane,
                "from": e.from_,
                "how": e.how,
                "queries": e.queries,
                "sites": sorted(e.sites),
                "steps": sorted(e.steps),
            }
            for e in plan.edits
        ],
        "probes": [
            {
                "name": q.name,
                "plugin": q.plugin,
                "branch": q.branch,
                "read": q.read,
                "word": q.word,
                "sites": sorted(q.sites),
                "steps": sorted(q.steps),
            }
            for q in plan.probes
        ],
        "objectives": [
            {"plugin": g.plugin, "lane": g.lane, "through": g.through, "steps": sorted(g.steps)}
            for g in plan.grads
        ],
        "events": {event: list(names) for event, names in plan.events.items() if names},
        "publishes": plan.publishes,
        "conflicts": [],
        "memory": plan.memory,
    }


def edit_line(e: DeclaredEdit) -> str:
    """`share: append on edit from source (join), 4 sites, steps 0-1`."""
    source = f" from {e.from_}" if e.from_ else ""
    how = f" ({e.how})" if e.how else ""
    queries = f", {e.queries} queries" if e.queries != "all" else ""
    where = f"{len(e.sites)} sites, steps {ranges(e.steps)}"
    return f"{e.plugin}: {e.op} on {e.lane}{source}{how}{queries}, {where}"


def ranges(steps: Iterable[int]) -> str:
    """`0-3, 7` from step indices."""
    parts: list[list[int]] = []
    for i in sorted(steps):
        if parts and parts[-1][1] == i - 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "none"


def in_bytes(n: int) -> str:
    """`1.5 MiB`."""
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
