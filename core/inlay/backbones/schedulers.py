"""What inlay knows about diffusers schedulers: choosing, tabulating frames, driving a lane."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay_config.config import suggest
from inlay_config.errors import ConfigError

if TYPE_CHECKING:
    from .base import Backbone

TESTED = "DDIM, DDPM, Euler, Euler ancestral, DPM++ multistep, UniPC, PNDM, FlowMatchEuler"


def choose(backbone: Backbone, wanted: Any) -> Any:
    """The pipeline's own scheduler, an instance, or a diffusers class by name.

    Raises ConfigError for an unknown name, and for one that solves another kind of model or fails
    when one step is tried.
    """
    own, flow = backbone.pipe.scheduler, backbone.flow
    if wanted is None or wanted == type(own).__name__:
        return own
    if isinstance(wanted, str):
        import diffusers

        known = [n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")]
        if wanted not in known:
            fix = suggest(wanted, known)
            raise ConfigError(f"no scheduler '{wanted}'", where="scheduler", fix=fix)
        flows = flow and not wanted.startswith("FlowMatch")
        extra = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if flows else {}
        try:
            wanted = getattr(diffusers, wanted).from_config(own.config, **extra)
        except (ImportError, KeyError, TypeError, ValueError) as error:
            problem = f"{wanted} cannot be built for this model: {' '.join(str(error).split())}"
            raise ConfigError(problem, where="scheduler", fix=f"Use one of {TESTED}.") from error
    if not _is_solver(wanted):
        problem = f"{type(wanted).__name__} does not step from (output, t, x) alone"
        raise ConfigError(problem, where="scheduler", fix=f"Use one of {TESTED}.")
    if is_flow(wanted) != flow:
        kind, fix = "flow" if flow else "diffusion", f"Use {type(own).__name__}."
        problem = f"{type(wanted).__name__} does not solve a {kind} model"
        raise ConfigError(problem, where="scheduler", fix=fix)
    _try(backbone, wanted)
    return wanted


def _try(backbone: Backbone, scheduler: Any) -> None:
    """One step of a run of ten, on nothing: what cannot be driven is told before a run."""
    trial, x = copy.deepcopy(scheduler), torch.zeros(2, 3, 5, 7)
    try:
        backbone.set_timesteps(trial, 10, None, backbone.native_size)
        advance(trial, x, trial.timesteps[0], scale_input(trial, x, trial.timesteps[0]), None)
    except Exception as error:  # third-party code of any kind
        problem = f"{type(scheduler).__name__} cannot be driven: {' '.join(str(error).split())}"
        raise ConfigError(problem, where="scheduler", fix=f"Use one of {TESTED}.") from error


def _is_solver(scheduler: Any) -> bool:
    """Whether `step(output, t, x)` is all it takes; EDM's preconditioning is not ours."""
    if not hasattr(scheduler, "step") or "sigma_data" in scheduler.config:
        return False
    parameters = list(inspect.signature(scheduler.step).parameters.values())
    return all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters[3:])


def is_flow(scheduler: Any) -> bool:
    flag = getattr(scheduler.config, "use_flow_sigmas", False)
    return bool(flag) or hasattr(scheduler, "scale_noise")


def steps_of(scheduler: Any, steps: int) -> list[int]:
    """The user's step that each evaluation belongs to (PNDM warms up, Heun evaluates twice)."""
    order, count = getattr(scheduler, "order", 1), len(scheduler.timesteps)
    warmup = max(count - steps * order, 0)
    return [min(max(i - warmup, 0) // order, steps - 1) for i in range(count)]


def solver(base: Any, start: int, lane: str, begin: bool) -> Any:
    """A lane's own copy, for a lane that starts at evaluation `start`.

    begin: whether the stock pipeline sets the begin index (identity needs the same).
    """
    own = copy.deepcopy(base)
    if start and hasattr(own, "ets"):
        problem = f"{type(base).__name__} cannot start at evaluation {start}"
        raise ConfigError(problem, where=f"scheduler, lane {lane}", fix="Use DDIM or UniPC.")
    if (start or begin) and hasattr(own, "set_begin_index"):
        own.set_begin_index(start)
    return own


def scale_input(solver: Any, x: Tensor, t: Tensor) -> Tensor:
    scaled: Tensor = solver.scale_model_input(x, t) if hasattr(solver, "scale_model_input") else x
    return scaled


def advance(
    solver: Any, output: Tensor, t: Tensor, x: Tensor, generator: torch.Generator | None
) -> Tensor:
    """scheduler.step, with the lane's generator where the scheduler draws noise, and without a
    learned variance where it knows none."""
    settings = getattr(solver, "config", None) or {}  # a pass's own solver may have none
    learned = "learned" in str(settings.get("variance_type", ""))
    if not (learned and _knows_variance(type(solver))):  # type: ignore[arg-type]
        output = output[:, : x.shape[1]]
    noise = {"generator": generator} if _draws_noise(type(solver)) else {}  # type: ignore[arg-type]
    following: Tensor = solver.step(output, t, x, **noise, return_dict=False)[0]
    return following.to(x.dtype)


@cache
def _knows_variance(scheduler: type) -> bool:
    return "variance_type" in inspect.signature(scheduler).parameters


@cache
def _draws_noise(scheduler: type) -> bool:
    return "generator" in inspect.signature(getattr(scheduler, "step")).parameters  # noqa: B009
