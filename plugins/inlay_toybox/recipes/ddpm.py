"""Recipe of the unconditional pixel model that Blended Diffusion needs: a stock ``UNet2DModel``
with learned variance.

The layout is that of the ADM models in small: scale-shift norms, a linear schedule of 1,000 steps,
six output channels (the noise and the variance), the hybrid loss of Nichol & Dhariwal 2021,
"Improved Denoising Diffusion Probabilistic Models", equation 16.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UNet2DModel,
)

from inlay_toybox import training, world

SIZE = 64
"""Side of the pictures in pixels."""

TIMESTEPS = 1000
OBJECT_WEIGHT = 2.0
STEEPEST = 30.0
"""Largest weight of a timestep."""

CHANNELS = (16, 32, 64, 80)


def build() -> UNet2DModel:
    """A fresh model: noisy pictures ``[b, 3, s, s]`` and timesteps ``[b]`` to ``[b, 6, s, s]``.

    The full resolution is where the time goes, so it has few channels; attention is at 8 x 8 only.
    """
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=6,
        layers_per_block=1,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        attention_head_dim=40,
        resnet_time_scale_shift="scale_shift",
    )


def schedule() -> DDPMScheduler:
    """The linear schedule of ADM, with the variance read from channels 3 to 5."""
    return DDPMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="learned_range",
        clip_sample=True,
    )


def fast_schedule(scheduler: DDPMScheduler) -> SchedulerMixin:
    """A deterministic schedule for few steps, first order as in DDIM, previews clipped to -1..1.

    Stock ``DDIMScheduler`` does not take six channels; this one drops the variance by itself.
    """
    return DPMSolverMultistepScheduler.from_config(
        scheduler.config,
        solver_order=1,
        timestep_spacing="trailing",
        thresholding=True,
        sample_max_value=1.0,
    )


class HybridLoss:
    """Squared error of the noise, plus the variational bound as a function of the variance.

    The error counts ``1 / alphas_cumprod`` times, at most ``STEEPEST``: where there is much noise a
    small error in it is a large one in the picture, and a short training that counts every
    timestep once draws pictures of one colour.
    """

    def __init__(self, scheduler: DDPMScheduler, device: torch.device) -> None:
        betas = scheduler.betas.double()
        kept = scheduler.alphas_cumprod.double()
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        variance = betas * (1 - before) / (1 - kept)
        variance[0] = variance[1]
        tables = {
            "weight": (1 / kept).clamp(max=STEEPEST),
            "signal": kept.sqrt(),
            "noise": (1 - kept).sqrt(),
            "from_x0": before.sqrt() * betas / (1 - kept),
            "from_x": (1 - before) * (1 - betas).sqrt() / (1 - kept),
            "low": variance.log(),
            "high": betas.log(),
        }
        self.tables = {name: table.float().to(device) for name, table in tables.items()}

    def at(self, name: str, t: torch.Tensor) -> torch.Tensor:
        """A coefficient at timesteps ``[b]``, as ``[b, 1, 1, 1]``."""
        return self.tables[name][t][:, None, None, None]

    def diffuse(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Pictures ``[b, 3, h, w]`` in -1..1 noised to timesteps ``[b]``."""
        return self.at("signal", t) * x0 + self.at("noise", t) * noise

    def __call__(
        self,
        output: torch.Tensor,
        x0: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """The loss, a scalar.

        Args:
            output: the model's answer ``[b, 6, h, w]``, float32.
            x0, noise: the picture in -1..1 and its noise, ``[b, 3, h, w]``.
            t: timesteps ``[b]``.
            weight: of each pixel's noise error, ``[b, 1, h, w]``.
        """
        guess, variance = output.chunk(2, 1)
        weight = weight / weight.mean() * self.at("weight", t)
        simple = (weight * (guess - noise).square()).mean()
        return simple + self.bound(guess.detach(), variance, x0, self.diffuse(x0, noise, t), t)

    def bound(
        self,
        guess: torch.Tensor,
        variance: torch.Tensor,
        x0: torch.Tensor,
        x: torch.Tensor,
        t: torch.Tensor,
    ) -> torch.Tensor:
        """The bound's terms at ``t`` in bits per channel, averaged: divergence of the step back, or
        likelihood of the pixels' bytes at t = 0.

        One random term stands for a thousandth of the thousand terms' sum, the weight that the
        hybrid loss gives to the bound.
        """
        fraction = (variance + 1) / 2
        log_variance = fraction * self.at("high", t) + (1 - fraction) * self.at("low", t)
        seen = (x - self.at("noise", t) * guess) / self.at("signal", t)
        mean = self.at("from_x0", t) * seen + self.at("from_x", t) * x
        true_mean = self.at("from_x0", t) * x0 + self.at("from_x", t) * x
        true_log = self.at("low", t)
        divergence = 0.5 * (
            log_variance
            - true_log
            - 1
            + (true_log - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )
        likelihood = _byte_log_likelihood(x0, mean, 0.5 * log_variance)
        first = (t == 0)[:, None, None, None]
        return torch.where(first, -likelihood, divergence).mean() / math.log(2)


def _byte_log_likelihood(
    x: torch.Tensor, mean: torch.Tensor, log_deviation: torch.Tensor
) -> torch.Tensor:
    """Log probability that a Gaussian falls on the byte of ``x`` in -1..1, tails at 0 and 255."""
    normal = torch.distributions.Normal(0.0, 1.0)
    scale = (-log_deviation).exp()
    above = normal.cdf((x - mean + 1 / 255) * scale)
    below = normal.cdf((x - mean - 1 / 255) * scale)
    above = torch.where(x > 0.999, torch.ones_like(above), above)
    below = torch.where(x < -0.999, torch.zeros_like(below), below)
    return (above - below).clamp(min=1e-12).log()


def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scenes of seeds 0 to n - 1: uint8 ``[n, 3, SIZE, SIZE]``, and bool ``[n, 1, SIZE, SIZE]``
    inside objects, their shadows and reflections.
    """
    images = torch.empty(n, 3, SIZE, SIZE, dtype=torch.uint8)
    inside = torch.empty(n, 1, SIZE, SIZE, dtype=torch.bool)
    for seed in range(n):
        drawn = world.render(world.sample(seed), SIZE)
        images[seed] = torch.from_numpy(drawn.image).permute(2, 0, 1)
        inside[seed, 0] = torch.from_numpy(np.asarray(drawn.footprints.any(0)))
    return images, inside


@torch.no_grad()
def generate(
    unet: UNet2DModel,
    scheduler: SchedulerMixin,
    n: int,
    seed: int = 0,
    steps: int = 50,
    batch: int = 64,
) -> torch.Tensor:
    """Samples ``[n, 3, SIZE, SIZE]`` in 0..1, each from its own noise (``seed``, place); what a
    scheduler adds on the way is drawn by batch."""
    pictures = []
    for first in range(0, n, batch):
        places = range(first, min(first + batch, n))
        noise = [torch.Generator().manual_seed(seed * 100_003 + place) for place in places]
        x = torch.stack([torch.randn(3, SIZE, SIZE, generator=source) for source in noise])
        x = x.to(unet.device)
        scheduler.set_timesteps(steps)
        further = torch.Generator().manual_seed(seed * 100_003 + first + 50_000)
        for t in scheduler.timesteps:
            with torch.autocast(unet.device.type, torch.bfloat16):
                output = unet(x, t).sample
            x = scheduler.step(output.float(), t, x, generator=further).prev_sample
        pictures.append((x / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(pictures)


def train(
    minutes: float,
    out: Path,
    device: torch.device,
    resume: bool = False,
    start: Path | None = None,
    batch_size: int = 16,
    report_every: int = 200,
    scenes: int = 30_000,
    compiled: bool = False,
) -> Path:
    """Train, or go on training.

    Args:
        minutes: wall-clock budget of the whole schedule.
        out: folder for state, loss curve and samples; the pipeline is written to ``out/ddpm``.
        device: where to train.
        resume: go on from ``out``, or else from the weights in ``start``.
        start: a pipeline in the stock layout, usually the shipped one.
        batch_size: scenes per step.
        report_every: steps between two lines of the log.
        scenes: number of training scenes.
        compiled: compile the network; pays off after ten minutes or so.

    Returns:
        The pipeline's folder.
    """
    torch.manual_seed(5)
    unet = (
        UNet2DModel.from_pretrained(start / "unet", torch_dtype=torch.float32)
        if resume and start and start.is_dir()
        else build()
    )
    unet = unet.to(device, memory_format=torch.channels_last).train()
    scheduler = schedule()
    loss = HybridLoss(scheduler, device)
    network = torch.compile(unet) if compiled else unet
    images, inside = draw(scenes)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng([5, step])
        rows = torch.from_numpy(rng.integers(0, scenes, batch_size))
        x0 = images[rows].to(device).float() / 127.5 - 1
        weight = 1 + OBJECT_WEIGHT * inside[rows].to(device).float()
        t = torch.from_numpy(rng.integers(0, TIMESTEPS, batch_size)).to(device)
        noise = torch.randn_like(x0)
        x = loss.diffuse(x0, noise, t).to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            output = network(x, t).sample
        return loss(output.float(), x0, noise, t, weight)

    def preview() -> None:
        pictures = generate(unet, fast_schedule(scheduler), 16, steps=25)
        training.save_grid(pictures, out / "samples.png")

    training.fit(
        {"unet": unet},
        loss_of,
        out,
        minutes,
        resume,
        seed=5,
        adamw=4e-3,
        keep=0.995,
        report_every=report_every,
        preview=preview,
    )
    unet.to(torch.bfloat16)
    DDPMPipeline(unet, scheduler).save_pretrained(out / "ddpm")
    training.export_log(out, out / "ddpm")
    return out / "ddpm"
