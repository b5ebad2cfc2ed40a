"""Recipe that gives the guidance embedding its meaning, as in FLUX.1-dev.

A student, which starts as the teacher, learns to answer in one evaluation what the frozen teacher
answers in two under classifier-free guidance: ``null + g * (text - null)`` for the scale ``g``
that the guidance embedding tells it (Meng et al. 2023, "On Distillation of Guided Diffusion
Models", section 3).
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import FluxPipeline

from inlay_toybox import path, training
from inlay_toybox.latents import OBJECT_WEIGHT, Cache, make_cache, samples
from inlay_toybox.recipes.flux import GUIDANCE, Model, noise_levels, preview, save, tokenise

SETTINGS = {"true_cfg_scale": 1.0, "guidance_scale": 3.5}
"""What changes in the recommended settings once the model is distilled."""


def train(
    minutes: float,
    out: Path,
    device: torch.device,
    size: int = 64,
    resume: bool = False,
    teacher: Path | None = None,
    cache: Cache | None = None,
    batch_size: int = 48,
    scenes: int = 60_000,
    report_every: int = 50,
) -> Path:
    """Distil, or go on distilling.

    Args:
        minutes: wall-clock budget of the whole schedule.
        out: folder for state, loss curve and sample grid; the model is written to ``out/flux``.
        device: where to train.
        size: side of the pictures in pixels.
        resume: go on from ``out``.
        teacher: the trained pipeline, in the stock layout; the shipped one by default.
        cache: encoded scenes; made in ``out`` by default.
        batch_size: scenes per step.
        scenes: size of the cache.
        report_every: steps between two lines of the log.

    Returns:
        The pipeline's folder.
    """
    torch.manual_seed(2)
    pipe = FluxPipeline.from_pretrained(teacher or path("flux")).to(device)
    model = Model(pipe, size // 8).to(device)
    fixed = copy.deepcopy(model).requires_grad_(False)
    model.clip.requires_grad_(False)
    model.t5.requires_grad_(False)
    cache = cache or make_cache(out / "cache", pipe.vae, scenes, size, device)
    batches = samples(cache, batch_size, device)
    null = tokenise(pipe, [""] * batch_size, device)

    def loss_of(step: int) -> torch.Tensor:
        x0, shares, captions = next(batches)
        sigma = noise_levels(batch_size, device)
        level = sigma[:, None, None]
        x = (1 - level) * x0 + level * torch.randn_like(x0)
        scale = torch.empty_like(sigma).uniform_(*GUIDANCE)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                texts = fixed.encode(*tokenise(pipe, captions, device))
                blank = fixed.encode(*null)
                with_text = fixed(x, sigma, scale, *texts).float()
                without = fixed(x, sigma, scale, *blank).float()
            goal = torch.lerp(without, with_text, scale[:, None, None])
            velocity = model(x, sigma, scale, *texts)
        weight = (1 + OBJECT_WEIGHT * shares)[..., None]
        return (weight * (velocity.float() - goal).square()).mean() / weight.mean()

    training.fit(
        {"flow": model.flow},
        loss_of,
        out,
        minutes,
        resume,
        seed=2,
        muon=0.003,
        adamw=3e-4,
        keep=0.99,
        report_every=report_every,
    )
    preview(pipe, out / "samples.png", size, **SETTINGS)  # type: ignore[arg-type]
    save(pipe, out / "flux", size, **SETTINGS)
    training.export_log(out, out / "flux")
    return out / "flux"
