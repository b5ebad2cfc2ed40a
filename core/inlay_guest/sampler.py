"""A session as a denoiser `(x, sigma) -> x0`, all that k-diffusion's samplers ask of a model.

Their x is x0 + sigma·noise. A flow model at noise level s sees it as x / (1 + sigma), with
s = sigma / (1 + sigma); the level 1 of pure noise is no finite sigma.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from inlay import ConfigError, Frame, InputError, Run, Session, Step
from inlay.backbones import schedulers
from inlay.loop import predict
from inlay.plan import Request
from inlay_attention import Seam
from inlay_config import images
from inlay_config.config import Experiment, Prompt

from .refusal import SAMPLED, refuse


@contextmanager
def denoiser(
    session: Session,
    prompt: str | Mapping[str, str] = "",
    *,
    sigmas: Sequence[float] | Tensor,
    image: Any = None,
    mask: Any = None,
    guidance: float = 3.5,
    true_cfg: float = 1.0,
    size: Any = None,
    n: int = 1,
    seed: int = 0,
    conds: Mapping[str, Any] | None = None,
) -> Iterator[Denoiser]:
    """A denoiser under which the session's plugins act: attention, inputs, combine and denoised.

    sigmas: the sampler's own, falling, a last 0 or none; step i of the plugins is where sigma is at
    most sigmas[i]. The rest as of `Session.run`. Raises PlanConflict for plugins that need the
    loop: lanes, passes, and every event that writes latents or pictures.
    """
    levels = [float(s) for s in sigmas if float(s) > 0]
    if not levels or sorted(levels, reverse=True) != levels:
        raise ConfigError("they do not fall to 0", where="sigmas", fix="Give the sampler's own.")
    pictures = images.as_pictures(image=image, mask=mask)
    setup = session.setup | {"true_cfg": true_cfg, "n": n, "steps": len(levels), "seed": seed}
    said = Prompt(**({"edit": prompt} if isinstance(prompt, str) else prompt))
    sides = list(size) if isinstance(size, tuple) else size
    asked = Experiment(prompt=said, guidance=guidance, size=sides, **setup)
    shape = pictures["image"].size[::-1] if "image" in pictures else None
    pixels = session.backbone.fit(sides, shape)
    inputs = tuple(key for kind in pictures for key in images.BOARD[kind])
    prompts = {"source": said.source, "edit": said.edit, "negative": said.negative}
    grid = session.backbone.grid(pixels)
    refuse(session, Request(prompts, len(levels), pixels, grid, inputs=inputs), SAMPLED)
    plan = session.plan(asked, shape, list(pictures))
    run = Run(session, plan, None)
    session.encode(run, conds or {})
    with torch.no_grad(), Seam({k: session.backbone.modules[k] for k in run.sites}) as seam:
        session.prepare(run, pictures)
        for owner in plan.events["begin"]:
            run.hook_of("inlay_begin", owner)(run=run, pass_="edit", x={})
        run.seam = seam
        yield Denoiser(run, levels, session.scheduler)


class Denoiser:
    """x: latents in the model's layout (`b c h w`; FLUX packed `b n c`), x0 + sigma·noise."""

    def __init__(self, run: Run, levels: Sequence[float], scheduler: Any) -> None:
        self.run, self._levels = run, levels
        self._flow, config = schedulers.is_flow(scheduler), scheduler.config
        self._predicts = getattr(config, "prediction_type", "epsilon")
        self._train = int(getattr(config, "num_train_timesteps", 1000))
        if not self._flow:
            kept = scheduler.alphas_cumprod.double()
            self._table = ((1 - kept) / kept).sqrt().log()  # log sigma of every training timestep
        self._calls = 0

    def __call__(self, x: Tensor, sigma: float | Tensor, **_: Any) -> Tensor:
        """x0 `b ...` at sigma, a number or `b` equal ones. What a sampler hands on besides is not
        looked at: prompts and guidance are the session's."""
        given = torch.as_tensor(sigma, dtype=torch.float64).flatten()
        if not bool((given == given[0]).all()):
            raise InputError("pictures are at different levels", where="sigma", fix="Use one.")
        run, level = self.run, float(given[0])
        index = sum(level <= known * (1 + 1e-6) for known in self._levels[1:])
        frames = [self._frame(s) for s in (level, *self._levels[index + 1 :], 0.0)]
        now, here = self._calls, frames[0]
        seen = x * (here.alpha if self._flow else 1.0)
        seen = seen.to(run.device, run.dtype)
        total, t = len(self._levels), self._timestep(level)

        def frame_at(i: int) -> Frame:
            return frames[i - now]

        step = Step("edit", index, now, total, t, True, ("edit",), frame_at, {"edit": seen})
        shown = seen if self._flow else seen / (level**2 + 1) ** 0.5
        predict(run, run.plan.passes[-1], step, {"edit": shown})
        run.seam.programs = {}
        run.hook.inlay_denoised(run=run, step=step)
        self._calls += 1
        return step.x0["edit"].to(x)

    def _frame(self, sigma: float) -> Frame:
        if self._flow:
            level = torch.tensor(sigma / (1 + sigma), device=self.run.device)
            return Frame(1 - level, level, "flow", "flow")
        one, level = torch.ones(2, device=self.run.device) * torch.tensor([1.0, sigma])
        return Frame(one, level, "ve", self._predicts)

    def _timestep(self, sigma: float) -> Tensor:
        """The model's own time, between training timesteps too (linear in log sigma)."""
        if self._flow:
            return torch.tensor(self._train * sigma / (1 + sigma), device=self.run.device)
        table, log = self._table, torch.tensor(sigma, dtype=torch.float64).log()
        high = int(torch.searchsorted(table, log).clamp(1, len(table) - 1))
        low = table[high - 1]
        t = high - 1 + ((log - low) / (table[high] - low)).clamp(0, 1)
        return t.float().to(self.run.device)
