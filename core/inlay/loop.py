"""THE loop. One pass, read top to bottom: every event of inlay happens here, in this order."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention import Seam
from .edits import AttnEdits, SiteProgram
from .errors import InlayError
from .events import Lane, ModelCall, Preds, ReadOnly, Rows, Step
from .guidance import cfg

if TYPE_CHECKING:
    from .plan import PassPlan
    from .session import Run


def run_pass(run: Run, pass_: PassPlan, seam: Seam) -> dict[str, Tensor]:
    """Solve every lane of a pass; returns the final latent of each lane that reached the end."""
    hook, backbone, request = run.hook, run.backbone, run.plan.request
    base = run.schedule(pass_)
    timesteps, frame_at = base.timesteps, run.frames(base)
    order = getattr(base, "order", 1)
    warmup = max(len(timesteps) - request.steps * order, 0)
    index_of = [min(max(i - warmup, 0) // order, request.steps - 1) for i in range(len(timesteps))]
    solvers = {lane.name: _solver(base, lane, index_of, backbone.sets_begin_index) for lane in pass_.lanes}
    x = {lane.name: run.initial(pass_.name, lane) * getattr(base, "init_noise_sigma", 1.0) for lane in pass_.lanes}
    hook.inlay_begin(run=run, pass_=pass_.name, x=x)

    for i, t in enumerate(timesteps):
        index = index_of[i]
        alive = {lane.name: lane for lane in pass_.lanes if index in lane.steps}
        if not alive:
            continue
        last = i + 1 == len(timesteps) or index_of[i + 1] != index
        step = Step(pass_.name, index, i, request.steps, t, last, tuple(alive), frame_at, x)
        hook.inlay_pre_step(run=run, step=step)

        edits = _collect_edits(run, step)
        scaled = {name: _scale(solvers[name], x[name], t) for name in alive}
        for group in pass_.groups:
            branches = [b for b in pass_.branches if b.name in group and b.lane in alive]
            if not branches:
                continue
            rows = _rows([(b.name, x[b.lane].shape[0]) for b in branches])
            kwargs = backbone.inputs(
                sample=torch.cat([scaled[b.lane] for b in branches]) if len(branches) > 1 else scaled[branches[0].lane],
                t=t,
                conds=[(run.conds[b.name], x[b.lane].shape[0]) for b in branches],
                guidance=[(alive[b.lane].guidance, x[b.lane].shape[0]) for b in branches],
                size=request.size,
            )
            call = ModelCall(step, rows, kwargs)
            hook.inlay_inputs(run=run, call=call)
            seam.programs = _programs(run, step, rows, edits)
            output = backbone.denoise(kwargs, branches[0].role)
            seam.check()
            step.preds.update({b.name: output[rows[b.name]] for b in branches})

        for name, lane in alive.items():
            scale = backbone.cfg_scale(lane.guidance, request.true_cfg)
            preds = Preds(name, step.preds[f"{name}/text"], step.preds.get(f"{name}/null"), scale, step)
            chosen = hook.inlay_combine(run=run, preds=preds)
            step.output[name] = cfg(preds.text, preds.null, scale) if chosen is None else chosen
        hook.inlay_denoised(run=run, step=step)
        for name in alive:
            output = step.frame.pred(step.x0[name], x[name]) if name in step.x0.written else step.output[name]
            step.x_next[name] = _advance(solvers[name], output, t, x[name], run.generators[pass_.name, name])
        hook.inlay_post_step(run=run, step=step)
        for name in alive:
            x[name] = step.x_next[name]
        _observe(run, step)
    ended = {lane.name for lane in pass_.lanes if request.steps - 1 in lane.steps}
    return {name: latent for name, latent in x.items() if name in ended}


def _solver(base: Any, lane: Lane, index_of: list[int], begin: bool) -> Any:
    """The lane's own scheduler; a lane that starts late starts its solver at its own index. `begin`: the stock pipeline sets it."""
    solver = copy.deepcopy(base)
    if lane.steps and lane.steps[0] > 0:
        if hasattr(solver, "set_begin_index"):
            solver.set_begin_index(index_of.index(lane.steps[0]))
        elif hasattr(solver, "ets"):
            raise InlayError(f"{type(base).__name__} cannot start at step {lane.steps[0]}", where=f"lane {lane.name}",
                             fix="Use another scheduler, such as DDIM or UniPC.")
    elif begin and hasattr(solver, "set_begin_index"):
        solver.set_begin_index(0)
    return solver


def _scale(solver: Any, x: Tensor, t: Tensor) -> Tensor:
    return solver.scale_model_input(x, t) if hasattr(solver, "scale_model_input") else x


def _advance(solver: Any, output: Tensor, t: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """scheduler.step with the lane's generator where the scheduler draws noise."""
    noisy = {"generator": generator} if _draws_noise(type(solver)) else {}
    following: Tensor = solver.step(output, t, x, **noisy, return_dict=False)[0]
    return following.to(x.dtype)


@cache
def _draws_noise(scheduler: type) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters  # type: ignore[attr-defined]


def _rows(branches: list[tuple[str, int]]) -> Rows:
    slices, start = {}, 0
    for name, n in branches:
        slices[name], start = slice(start, start + n), start + n
    return Rows(slices)


def _collect_edits(run: Run, step: Step) -> dict[str, AttnEdits]:
    """Ask each plugin, only for the sites and steps it declared; emitting is checked against the declaration."""
    collected = {}
    for site in run.backbone.sites:
        allowed = run.plan.allowed(step.pass_, site.name, step.index) if site.name in run.plan.sites else ()
        if allowed:
            edits = AttnEdits(frozenset(allowed), f"attention, step {step.index}, site {site.name}", run.branches(step))
            for owner in sorted({a[0] for a in allowed}):
                edits.owner = owner
                run.hook_of("inlay_attention", owner)(run=run, step=step, site=site, edits=edits)
            collected[site.name] = edits
    return collected


def _programs(run: Run, step: Step, rows: Rows, edits: dict[str, AttnEdits]) -> dict[str, SiteProgram]:
    """What each site computes in this call: edits of branches that are in it, probes of branches that are in it."""
    programs = {}
    for site in run.backbone.sites:
        probes = [(p, run.words[p.name]) for p in run.plan.probes
                  if step.pass_ == "edit" and step.index in p.steps and step.last_eval and site.name in p.sites and p.branch in rows]
        acting = {b: e for b, e in edits[site.name].by_branch.items() if b in rows} if site.name in edits else {}
        if acting or probes:
            spans = run.backbone.spans(site, run.text_length(rows))
            programs[site.name] = SiteProgram(f"step {step.index}, site {site.name}", rows, acting, probes, spans, site.name, step.probes)
    return programs


def _observe(run: Run, step: Step) -> None:
    """Observers get the step with read-only dictionaries."""
    if run.hook.inlay_observe.get_hookimpls() or run.callback:
        seen = copy.copy(step)
        seen.x, seen.x_next, seen.output, seen.preds = (ReadOnly(d) for d in (step.x, step.x_next, step.output, step.preds))
        run.hook.inlay_observe(run=run, step=seen)
        if run.callback:
            active = [name for name, steps in run.plan.windows(step.pass_).items() if step.index in steps]
            run.callback({"kind": "step", "pass": step.pass_, "step": step.index, "steps": step.total,
                          "sigma": float(step.frame.sigma), "active": active})
