"""Recipe of the small Stable Diffusion: stock ``UNet2DConditionModel`` and a small CLIP encoder.

Encoder and U-Net are trained together on the cached latents of toybox/flux, predicting the velocity
(Salimans & Ho 2022, "Progressive Distillation", appendix D) over the noise schedule of Stable
Diffusion, with objects weighted and captions dropped one time in ten.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from einops import rearrange
from torch.nn import functional as F

from inlay_toybox import pipelines, text, training
from inlay_toybox.latents import OBJECT_WEIGHT, make_cache, samples

TIME_SHIFT = 1.6
SETTINGS = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 30,
    "guidance_scale": 3.0,
    "negative_prompt": "",
}
"""How to sample from the model; written beside the weights as ``settings.json``."""


def build_unet() -> UNet2DConditionModel:
    """A fresh U-Net over latents ``[b, 8, s/4, s/4]``: self- and cross-attention at the latents'
    size (way up) and at half of it (way down, middle, way up).
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 88),
        layers_per_block=1,
        attention_head_dim=4,  # the number of heads, for reasons of history in diffusers
        norm_num_groups=8,
        cross_attention_dim=text.WIDTH,
        use_linear_projection=True,
    )


def build(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """A pipeline of fresh models around a trained autoencoder."""
    tokenizer = text.clip_tokenizer(text.corpus())
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text.clip_encoder(tokenizer, layers=2),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def unpack(packed: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    """Cached latents ``[b, (s/8)^2, 32]`` as the stock pipeline has them, ``[b, 8, s/4, s/4]``.

    It undoes the autoencoder's scale and not its shift, so the shift is put back.
    """
    side = math.isqrt(packed.shape[1])
    latents = rearrange(packed, "b (h w) (c p q) -> b c (h p) (w q)", h=side, p=2, q=2)
    return latents + vae.config.shift_factor * vae.config.scaling_factor


def timesteps(n: int, count: int, device: torch.device) -> torch.Tensor:
    """Random timesteps ``[n]`` in 0..count - 1, shifted towards noise, where objects get their
    place.
    """
    u = torch.rand(n, device=device)
    return (count * TIME_SHIFT * u / (1 + (TIME_SHIFT - 1) * u)).long().clamp(max=count - 1)


def save(pipe: StableDiffusionPipeline, folder: Path, size: int) -> None:
    """Write the pipeline with the recommended settings."""
    settings = SETTINGS | {"height": size, "width": size}
    pipelines.save(pipe, pipe.unet, folder, settings)


def preview(pipe: StableDiffusionPipeline, file: Path, size: int, n: int = 24) -> None:
    """Pictures of unseen captions, for the eye."""
    settings = SETTINGS | {"height": size, "width": size}
    pipelines.preview(pipe, file, settings, n)


def train(
    minutes: float,
    out: Path,
    device: torch.device,
    size: int = 64,
    resume: bool = False,
    start: Path | None = None,
    vae: Path | None = None,
    batch_size: int = 32,
    scenes: int = 60_000,
    report_every: int = 100,
) -> Path:
    """Train, or go on training.

    Args:
        minutes: wall-clock budget of the whole schedule.
        out: folder for cache, state, loss curve and sample grid; the model is written to
            ``out/sd``.
        device: where to train.
        size: side of the pictures in pixels.
        resume: go on from ``out``, or else from the weights in ``start``.
        start: a pipeline in the stock layout, usually the shipped one.
        vae: folder of the autoencoder; by default the one in ``start``.
        batch_size: scenes per step.
        scenes: size of the cache.
        report_every: steps between two lines of the log; sample grid every fifth of them.

    Returns:
        The pipeline's folder.

    Raises:
        ValueError: neither an autoencoder nor a pipeline that has one was named.
    """
    torch.manual_seed(0)
    if resume and start:
        pipe = StableDiffusionPipeline.from_pretrained(start)
    elif vae:
        pipe = build(AutoencoderKL.from_pretrained(vae))
    else:
        raise ValueError("train the autoencoder first, or name a pipeline that has one")
    pipe.to(device)
    pipe.vae.float().requires_grad_(False)
    unet, encoder = pipe.unet.float().train(), pipe.text_encoder.float().train()
    # On a CPU the fused attention's backward pass is several times slower than plain softmax.
    unet.set_attn_processor(AttnProcessor())
    cache = make_cache(out / "cache", pipe.vae, scenes, size, device)
    batches = samples(cache, batch_size, device)
    levels = pipe.scheduler.alphas_cumprod.to(device)
    side = size // 8

    def loss_of(step: int) -> torch.Tensor:
        packed, shares, captions = next(batches)
        x0 = unpack(packed, pipe.vae)
        time, noise = timesteps(len(x0), len(levels), device), torch.randn_like(x0)
        alpha = levels[time].sqrt()[:, None, None, None]
        sigma = (1 - alpha.square()).sqrt()
        ids = pipe.tokenizer(
            captions,
            padding="max_length",
            max_length=text.TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            words = encoder(ids).last_hidden_state
            velocity = unet(alpha * x0 + sigma * noise, time, words, return_dict=False)[0]
        inside = F.interpolate(shares.reshape(-1, 1, side, side), scale_factor=2)
        weight = 1 + OBJECT_WEIGHT * inside
        error = (velocity.float() - (alpha * noise - sigma * x0)).square()
        return (weight * error).mean() / weight.mean()

    training.fit(
        {"text": encoder, "unet": unet},
        loss_of,
        out,
        minutes,
        resume=resume,
        convolutions=True,
        report_every=report_every,
        preview=lambda: preview(pipe, out / "samples.png", size),
    )
    save(pipe, out / "sd", size)
    training.export_log(out, out / "sd")
    return out / "sd"
