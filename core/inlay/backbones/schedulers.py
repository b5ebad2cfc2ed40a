"""What inlay knows about diffusers schedulers: choosing, tabulating frames, driving a lane."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from inlay_config.config import suggest
from inlay_config.errors import ConfigError, ModelError

from ..frames import Frame

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


def levels(
    scheduler: Any, backbone: Backbone, steps: int, size: tuple[int, int]
) -> list[tuple[int, Frame]]:
    """(the user's step, Frame) of every evaluation of a run at this size. Raises ModelError, as
    `tabulate` does."""
    base = copy.deepcopy(scheduler)
    backbone.set_timesteps(base, steps, None, size)
    return list(zip(steps_of(base, steps), tabulate(base), strict=False))


def frames(scheduler: Any, device: torch.device) -> Callable[[int], Frame]:
    """Frame of an evaluation; tabulated when first asked, so nobody pays who does not ask."""
    table: list[Frame] = []

    def frame_at(i: int) -> Frame:
        for f in () if table else tabulate(scheduler):
            table.append(replace(f, alpha=f.alpha.to(device), sigma=f.sigma.to(device)))
        return table[i]

    return frame_at


def tabulate(scheduler: Any) -> list[Frame]:
    """Frames of every evaluation and of the end; a pass's own solver may bring `frames`.

    Levels are read from `sigmas` or `alphas_cumprod` of a copy whose timesteps are set and whose
    begin index is not (with it set, noising returns the first level at every timestep), and checked
    against the scheduler's own noising. Raises ModelError when they disagree (KDPM2's half-steps).
    """
    if hasattr(scheduler, "frames"):
        return list(scheduler.frames)
    s = copy.deepcopy(scheduler)
    timesteps, flow = s.timesteps.cpu(), is_flow(s)
    predicts = "flow" if flow else getattr(s.config, "prediction_type", "epsilon")
    sigmas, space = getattr(s, "sigmas", None), "vp"
    if sigmas is not None and len(sigmas) == len(timesteps) + 1:
        levels = sigmas.cpu().float()
        alphas = 1 - levels if flow else 1 / (levels**2 + 1).sqrt()
        if not flow and float(getattr(s, "init_noise_sigma", 1)) == 1:
            levels = levels * alphas
        elif not flow:
            space, alphas = "ve", torch.ones_like(levels)
    elif getattr(s, "alphas_cumprod", None) is not None and not flow:
        final = torch.as_tensor(getattr(s, "final_alpha_cumprod", 1.0)).reshape(1)
        cumprod = torch.cat([s.alphas_cumprod.cpu()[timesteps.long()], final]).float()
        alphas, levels = cumprod.sqrt(), (1 - cumprod).sqrt()
    else:
        problem = f"{type(s).__name__} has neither a sigma per timestep nor alphas_cumprod"
        raise ModelError(problem, where="scheduler", fix=f"Use one of {TESTED}.")
    _check(s, timesteps, alphas, levels)
    kind: Literal["vp", "ve", "flow"] = "flow" if flow else "ve" if space == "ve" else "vp"
    return [Frame(a, v, kind, predicts) for a, v in zip(alphas, levels, strict=True)]


def _check(s: Any, timesteps: Tensor, alphas: Tensor, levels: Tensor) -> None:
    """Compare with the scheduler's noising at each timestep that occurs once."""
    name, one, zero = type(s).__name__, torch.ones(1, 1), torch.zeros(1, 1)
    if name == "FlowMatchHeunDiscreteScheduler" or not (
        hasattr(s, "scale_noise") or hasattr(s, "add_noise")
    ):  # Heun's scale_noise ignores t; a pass's own solver has no noising
        return
    for i, t in enumerate(s.timesteps):
        at = t.reshape(1)
        if int((timesteps == t.cpu()).sum()) > 1:
            continue
        if hasattr(s, "scale_noise"):
            said = float(s.scale_noise(one, at, zero)), float(s.scale_noise(zero, at, one))
        else:
            said = float(s.add_noise(one, zero, at)), float(s.add_noise(zero, one, at))
        table = float(alphas[i]), float(levels[i])
        if any(abs(a - b) > 1e-4 * max(1.0, b) for a, b in zip(said, table, strict=True)):
            problem = f"{name} noises step {i} with {said}, its table says {table}"
            raise ModelError(problem, where="scheduler", fix=f"Use one of {TESTED}.")
