"""THE loop. One pass, read top to bottom: every event of inlay happens here, in this order."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay_attention import AttnEdits, Rows, SiteProgram, cat, lane_of
from inlay_config.errors import PluginError

from . import objectives
from .backbones import levels, schedulers
from .backbones.text import Cond
from .events import Step

if TYPE_CHECKING:
    from .plan import PassPlan
    from .session import Run


def run_pass(run: Run, pass_: PassPlan) -> dict[str, Tensor]:
    """Solve every lane of a pass; returns the final latent of each lane that reached the end."""
    hook, backbone, request = run.hook, run.backbone, run.plan.request
    base = run.schedule(pass_)
    index_of = schedulers.steps_of(base, request.steps)
    frame_at = levels.frames(base, run.device)
    solvers, scale = dict[str, Any](), getattr(base, "init_noise_sigma", 1.0)
    x = {ln.name: run.initial(pass_.name, ln) * scale for ln in pass_.lanes}
    hook.inlay_begin(run=run, pass_=pass_.name, x=x)

    for i, t in enumerate(base.timesteps):
        index, last = index_of[i], index_of[i : i + 2] != [index_of[i]] * 2
        alive = {ln.name: ln for ln in pass_.lanes if index in ln.steps}
        if not alive:
            continue
        for name, lane in alive.items():
            if i == 0 or index_of[i - 1] not in lane.steps:  # the lane begins, or begins again
                solvers[name] = schedulers.solver(base, i, name, backbone.sets_begin_index)
        step = Step(pass_.name, index, i, request.steps, t, last, tuple(alive), frame_at, x)
        hook.inlay_pre_step(run=run, step=step)

        losses = objectives.start(run, step)
        with torch.set_grad_enabled(any(g.through == "model" for g in losses)):
            scaled = {name: schedulers.scale_input(solvers[name], x[name], t) for name in alive}
            predict(run, pass_, step, scaled)
        shifts = objectives.guide(run, step, losses) if losses else {}
        run.seam.programs = {}  # another run inside a hook is not edited
        hook.inlay_denoised(run=run, step=step)
        for name in alive:
            output = step.output[name]
            if name in step.x0.written:
                written = step.frame.pred(step.x0[name], x[name])
                output = cat([written, output[:, written.shape[1] :]], 1)  # a variance stays
            generator = run.generators[pass_.name, name]
            step.x_next[name] = schedulers.advance(solvers[name], output, t, x[name], generator)
            if name in shifts:
                step.x_next[name] = step.x_next[name] + shifts[name]
        hook.inlay_post_step(run=run, step=step)
        observe(run, step)
        x.update({name: step.x_next[name] for name in alive})
    return {ln.name: x[ln.name] for ln in pass_.lanes if request.steps - 1 in ln.steps}


def predict(run: Run, pass_: PassPlan, step: Step, scaled: dict[str, Tensor]) -> None:
    """One evaluation: step.preds by branch, step.output by lane. scaled: what the model sees."""
    edits = collect_edits(run, pass_, step)
    for group in pass_.groups:
        here = [b for b in pass_.branches if b.name in group and step.index in b.steps]
        branches = [b for b in here if not run.tape.recall(step, b)]
        if not branches:
            continue
        rows = Rows.of({b.name: scaled[b.lane].shape[0] for b in branches})
        programs = site_programs(run, step, rows, edits)
        shown = {b.name: scaled[b.lane] for b in branches}
        step.preds.update(call(run, step, rows, shown, run.conds, programs))
        run.tape.record(step, branches, programs)
    for lane in (ln for ln in pass_.lanes if ln.name in step.lanes):
        weight = run.backbone.cfg_scale(lane.guidance, lane.true_cfg)
        text, null = step.preds[f"{lane.name}/text"], step.preds.get(f"{lane.name}/null")
        preds = {"lane": lane.name, "text": text, "null": null, "scale": weight}
        step.output[lane.name] = run.hook.inlay_combine(run=run, step=step, **preds)


def call(
    run: Run, step: Step, rows: Rows, shown: Mapping[str, Tensor], conds: Mapping[str, Cond],
    programs: Mapping[str, Any],
) -> dict[str, Tensor]:  # fmt: skip
    """One model call: predictions by branch of what the model is shown of each."""
    lanes = {(p.name, ln.name): ln for p in run.plan.passes for ln in p.lanes}
    guidance = [lanes[step.pass_, lane_of(b)].guidance for b in rows]
    counts = [rows[b].stop - rows[b].start for b in rows]
    kwargs = run.backbone.inputs(
        sample=cat([shown[b] for b in rows]),
        t=step.t,
        conds=list(zip([conds[b] for b in rows], counts, strict=True)),
        guidance=list(zip(guidance, counts, strict=True)),
        size=run.size,
    )
    run.hook.inlay_inputs(run=run, step=step, rows=rows, kwargs=kwargs)
    run.seam.programs = dict(programs)
    output = run.backbone.denoise(kwargs, next(iter(rows)).split("/")[1])
    run.seam.check()
    return {b: output[rows[b]] for b in rows}


def evaluate(
    run: Run, step: Step, x: Mapping[str, Tensor], conds: Mapping[str, Cond] | None = None,
    programs: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Predictions of branches at other latents or under other conditions than the step's own.

    x: by branch, `n …`. programs[site]: what is called in place of SDPA there, (sdpa, q, k, v, …);
    edits of plugins do not act. In the graph where the caller has enabled gradients. Raises
    PluginError beyond what the run's plugins declared by need.evaluations.
    """
    shown = {b: step.frame.shown(latent) for b, latent in x.items()}
    run.evaluated += sum(latent.shape[0] for latent in x.values())
    if run.evaluated > sum(run.plan.on_request.values()):
        problem = f"{run.evaluated} rows were asked for, declared: {run.plan.on_request}"
        raise PluginError(problem, where="run.evaluate", fix="Declare more by need.evaluations.")
    if run.lengths:
        raise PluginError("prompts differ in length", where="run.evaluate", fix="Give equal ones.")
    given, kept, found = {**run.conds, **(conds or {})}, run.seam.programs, dict[str, Tensor]()
    groups = next(p.groups for p in run.plan.passes if p.name == step.pass_)
    try:
        for rows in (Rows.of({b: len(x[b]) for b in group if b in x}) for group in groups):
            found |= call(run, step, rows, shown, given, programs or {}) if rows else {}
    finally:  # a program may have had enough
        run.seam.programs = kept
    return found


def collect_edits(run: Run, pass_: PassPlan, step: Step) -> dict[str, AttnEdits]:
    """Edits by site: each plugin is asked only for the sites and steps that it declared."""
    branches = tuple(b.name for b in pass_.branches if step.index in b.steps)
    collected = {}
    for site in run.backbone.sites if run.plan.edits else ():
        place = (step.pass_, site.name, step.index)
        if allowed := run.plan.allowed.get(place):
            where = f"attention, step {step.index}, site {site.name}"
            edits = AttnEdits(allowed, where, branches, dropped=run.plan.lost.get(place, ()))
            for edits.owner in sorted({plugin for plugin, *_ in allowed}):
                ask = run.hook_of("inlay_attention", edits.owner)
                ask(run=run, step=step, site=site, edits=edits)
            collected[site.name] = edits
    return collected


def site_programs(
    run: Run, step: Step, rows: Rows, edits: dict[str, AttnEdits]
) -> dict[str, SiteProgram]:
    """What each site computes in this call: the edits and probes of the branches that are in it."""
    reading = step.last_eval and step.pass_ == "edit"
    probes = [p for p in run.plan.probes if reading and step.index in p.steps and p.branch in rows]
    programs = {}
    lengths = {b: run.lengths[b] for b in rows} if run.lengths else {}
    for site in run.backbone.sites if edits or probes or run.tape.records or lengths else ():
        by_branch = edits[site.name].by_branch if site.name in edits else {}
        acting = {branch: listed for branch, listed in by_branch.items() if branch in rows}
        read = [p for p in probes if site.name in p.sites]
        keep = run.tape.kept(step, site.name, rows)
        if acting or read or keep or (lengths and site.kind != "self"):
            spans = run.backbone.spans(site, run.conds[next(iter(rows))].embeds.shape[1])
            named = (site.name, rows, acting, read, run.words, spans, step.probes)
            given = run.tape.given(step, site.name) if acting else {}
            on_board = {e.from_ for listed in acting.values() for e in listed if ":" in e.from_}
            given |= {key: run.board[key][site.name] for key in on_board}
            programs[site.name] = SiteProgram(*named, given, lengths, keep)
    return programs


def observe(run: Run, step: Step) -> None:
    """Observers and the progress callback see the step after all folds, read-only."""
    if not (run.callback or run.hook.inlay_observe.get_hookimpls()):
        return
    seen = copy.copy(step)
    for name in ("x", "x0", "x_next", "output", "preds"):
        setattr(seen, name, MappingProxyType(getattr(step, name)))
    run.hook.inlay_observe(run=run, step=seen)
    if run.callback:
        here = [run.plan.allowed.get((step.pass_, s, step.index), ()) for s in run.plan.sites]
        told = {"kind": "step", "pass": step.pass_, "step": step.index, "steps": step.total}
        told |= {"active": sorted({p for e in here for p, *_ in e}), "run": run, "seen": seen}
        run.callback({**told, "sigma": float(step.frame.sigma)})
