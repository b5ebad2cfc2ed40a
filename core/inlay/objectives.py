"""Objectives: plugins say losses; the core sums them, makes one backward through the forward that
the step uses anyway, and moves the lane against the gradient.

With g = ∂L/∂x: `apply: x0` moves x0 by -(σ²/α)·g, in any space (the same as ε + σ·g); `apply: mean`
moves the next latent by -Σ·g, Σ the solver's variance (Dhariwal & Nichol 2021, algorithm 1).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay_config.errors import ConfigError, ModelError

from .backbones.levels import variance
from .events import Step

if TYPE_CHECKING:
    from .plan import Plan
    from .session import Run


@dataclass(frozen=True)
class DeclaredGrad:
    """`plugin` will say a loss of `lane` in `steps` of the edit pass. through: model, or x0 alone,
    which takes the prediction as given and spares the model's backward."""

    plugin: str
    lane: str
    steps: frozenset[int]
    through: str


def check(plan: Plan, scheduler: Any) -> Plan:
    """The plan without the steps where x0 means nothing yet.

    Raises ConfigError for `apply: mean` with a scheduler that has no variance.
    """
    if not plan.grads:
        return plan
    policy = plan.request.gradient
    options = inspect.signature(type(scheduler).__init__).parameters  # a config keeps a former's
    if policy.apply == "mean" and "variance_type" not in options:
        problem = f"{type(scheduler).__name__} has no variance to move the mean by"
        fix = "Use apply: x0, or scheduler: DDPMScheduler."
        raise ConfigError(problem, where="gradient.apply", fix=fix)
    late = {step for step, frame in plan.request.levels() if frame.signal >= policy.alpha_min}
    return replace(plan, grads=tuple(replace(g, steps=g.steps & late) for g in plan.grads))


def start(run: Run, step: Step) -> list[DeclaredGrad]:
    """Losses of this evaluation; lanes with one through the model become leaves of the graph."""
    policy, lanes = run.plan.request.gradient, step.lanes if step.pass_ == "edit" else ()
    here = [g for g in run.plan.grads if step.index in g.steps and g.lane in lanes]
    if not here or step.frame.signal < policy.alpha_min:
        return []
    here = [replace(g, through=policy.through or g.through) for g in here]
    deep = {g.lane for g in here if g.through == "model"}
    for lane in deep:
        step.x[lane] = step.x[lane].detach().requires_grad_()
    return [replace(g, through="model") if g.lane in deep else g for g in here]


def guide(run: Run, step: Step, losses: list[DeclaredGrad]) -> dict[str, Tensor]:
    """One backward for all lanes: moves step.x0 (`apply: x0`), or returns what each lane's next
    latent is to be moved by (`apply: mean`). Everything leaves the graph."""
    policy, frame = run.plan.request.gradient, step.frame
    through = {g.lane: g.through for g in losses}
    leaves, total = list[Tensor](), torch.zeros((), device=run.device)
    with torch.enable_grad():
        for lane, way in through.items():
            x0 = frame.x0(step.output[lane].float(), step.x[lane].float())
            x0 = x0 if way == "model" else x0.detach().requires_grad_()
            leaves.append(step.x[lane] if way == "model" else x0)
            step.x0.offer(lane, x0)
        for g in losses:
            said = run.hook_of("inlay_objective", g.plugin)(run=run, step=step, lane=g.lane)
            total = sum((loss.float().sum() for loss in said), total)
    gradients: Any = [None] * len(leaves)  # of a constant
    if total.requires_grad:
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    step.preds.update({name: pred.detach() for name, pred in step.preds.items()})
    shifts: dict[str, Tensor] = {}
    for (lane, way), slope in zip(through.items(), gradients, strict=True):
        step.x[lane] = x = step.x[lane].detach()
        step.output[lane] = output = step.output[lane].detach()
        run.unguided[lane] = x0 = step.x0[lane].detach()
        step.x0.offer(lane, x0.to(x.dtype))
        if slope is None:
            continue
        if way == "x0":
            slope = slope / frame.alpha  # ∂x0/∂x with the prediction as it is
        move = settled(slope.float(), policy, f"lane {lane}, step {step.index}")
        if policy.apply == "mean":
            shifts[lane] = -variance(run.variance_type, frame, step.next_frame, output, x) * move
        else:
            step.x0[lane] = (x0 - frame.sigma**2 / frame.alpha * move).to(x.dtype)
    return shifts


def settled(g: Tensor, policy: Any, where: str) -> Tensor:
    """The gradient after the policy: finite, normalised, clipped, scaled, each picture by itself.
    Raises ModelError where it is not finite."""
    if not torch.isfinite(g).all():
        if policy.on_nonfinite == "raise":
            fix = "Lower the loss's scale, use dtype=float32, or gradient.on_nonfinite: skip."
            raise ModelError("the gradient is not finite", where=f"objective, {where}", fix=fix)
        return torch.zeros_like(g)
    norm = torch.linalg.vector_norm(g, dim=tuple(range(1, g.dim())), keepdim=True)
    if policy.normalize:  # to unit root mean square
        unit = g[0].numel() ** 0.5
        g, norm = g * unit / norm.clamp_min(1e-12), torch.full_like(norm, unit)
    if policy.clip is not None:
        g = g * (policy.clip / norm.clamp_min(1e-12)).clamp_max(1)
    return g * policy.scale
