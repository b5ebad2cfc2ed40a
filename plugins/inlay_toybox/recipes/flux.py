"""Recipe of the text-to-image model: stock ``FluxTransformer2DModel`` with small CLIP and T5
encoders.

Scenes are rendered and encoded once into a cache of latents; text encoders and transformer are
trained together on the rectified-flow loss, with objects weighted, captions dropped one time in
ten, and a random guidance embedding (which therefore means nothing until ``recipes.distil`` gives
it a meaning).
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn

from inlay_toybox import pipelines, text, training
from inlay_toybox.latents import OBJECT_WEIGHT, make_cache, samples

GUIDANCE = (1.0, 5.0)
NOISE_SHIFT = 2.2
SETTINGS = {
    "height": 64,
    "width": 64,
    "max_sequence_length": text.TOKENS,
    "num_inference_steps": 28,
    "true_cfg_scale": 3.0,
    "guidance_scale": 1.0,
    "negative_prompt": "",
}
"""How to sample from the model; written beside the weights as ``settings.json``."""


def build_transformer() -> FluxTransformer2DModel:
    """A fresh transformer over packed latents ``[b, tokens, 32]``."""
    return FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def build(vae: AutoencoderKL) -> FluxPipeline:
    """A pipeline of fresh models around a trained autoencoder."""
    lines = text.corpus()
    clip, t5 = text.clip_tokenizer(lines), text.t5_tokenizer(lines)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text.clip_encoder(clip),
        tokenizer=clip,
        text_encoder_2=text.t5_encoder(t5),
        tokenizer_2=t5,
        transformer=build_transformer(),
    )


class Model(nn.Module):
    """Text encoders and transformer as one differentiable function."""

    def __init__(self, pipe: FluxPipeline, side: int) -> None:
        super().__init__()
        self.clip, self.t5, self.flow = pipe.text_encoder, pipe.text_encoder_2, pipe.transformer
        rows = torch.arange(side).repeat_interleave(side)
        ids = torch.stack([torch.zeros(side * side), rows, torch.arange(side).repeat(side)], -1)
        self.register_buffer("img_ids", ids, persistent=False)
        self.register_buffer("txt_ids", torch.zeros(text.TOKENS, 3), persistent=False)

    def encode(self, clip: torch.Tensor, t5: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids ``[b, TOKENS]`` each to the pooled ``[b, WIDTH]`` and the sequence ``[b,
        TOKENS, WIDTH]``.
        """
        return self.clip(clip).pooler_output, self.t5(t5).last_hidden_state

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        guidance: torch.Tensor,
        pooled: torch.Tensor,
        words: torch.Tensor,
    ) -> torch.Tensor:
        """The velocity ``noise - data`` at ``x`` ``[b, tokens, 32]`` and noise level ``sigma``
        ``[b]``.
        """
        return self.flow(
            hidden_states=x,
            timestep=sigma,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=words,
            txt_ids=self.txt_ids,
            img_ids=self.img_ids,
            return_dict=False,
        )[0]


def tokenise(
    pipe: FluxPipeline, captions: list[str], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP and T5 ids, ``[b, TOKENS]`` each, padded as the stock pipeline pads them."""
    how = {"padding": "max_length", "max_length": text.TOKENS, "truncation": True}
    clip = pipe.tokenizer(captions, return_tensors="pt", **how).input_ids
    t5 = pipe.tokenizer_2(captions, return_tensors="pt", **how).input_ids
    return clip.to(device), t5.to(device)


def noise_levels(n: int, device: torch.device) -> torch.Tensor:
    """Sigmas ``[n]``, uniform and then shifted towards noise.

    Where an object goes and how large it is are settled above 0.85 in so few tokens; a fifth of the
    samples lies above 0.9, where a centred logit-normal has three in a hundred.
    """
    u = torch.rand(n, device=device)
    return (NOISE_SHIFT * u / (1 + (NOISE_SHIFT - 1) * u)).clamp(0.002, 0.999)


def save(pipe: FluxPipeline, folder: Path, size: int, **changes: float) -> None:
    """Write the pipeline with the recommended settings, some of them changed."""
    settings = SETTINGS | {"height": size, "width": size} | changes
    pipelines.save(pipe, pipe.transformer, folder, settings)


def preview(pipe: FluxPipeline, file: Path, size: int, n: int = 24, **changes: float) -> None:
    """Pictures of unseen captions, for the eye."""
    settings = SETTINGS | {"height": size, "width": size} | changes
    pipelines.preview(pipe, file, settings, n)


def train(
    minutes: float,
    out: Path,
    device: torch.device,
    size: int = 64,
    resume: bool = False,
    start: Path | None = None,
    vae: Path | None = None,
    batch_size: int = 48,
    scenes: int = 60_000,
    compiled: bool = False,
    report_every: int = 100,
) -> Path:
    """Train, or go on training.

    Args:
        minutes: wall-clock budget of the whole schedule.
        out: folder for cache, state, loss curve and sample grid; the model is written to
            ``out/flux``.
        device: where to train.
        size: side of the pictures in pixels: 64 for 64 image tokens, 128 for 256.
        resume: go on from ``out``, or else from the weights in ``start``.
        start: a pipeline in the stock layout, usually the shipped one.
        vae: folder of the autoencoder; by default the one in ``start``.
        batch_size: scenes per step.
        scenes: size of the cache.
        compiled: run the transformer through ``torch.compile``: a minute at the start, 15 % per
            step.
        report_every: steps between two lines of the log; state and sample grid every fifth of them.

    Returns:
        The pipeline's folder.
    """
    torch.manual_seed(0)
    if resume and start:
        pipe = FluxPipeline.from_pretrained(start)
    else:
        vae = vae or (start / "vae" if start else None)
        if vae is None:
            raise ValueError("train the autoencoder first, or name a pipeline that has one")
        pipe = build(AutoencoderKL.from_pretrained(vae))
    pipe.to(device)
    pipe.vae.float().requires_grad_(False)
    model = Model(pipe, size // 8).to(device)
    cache = make_cache(out / "cache", pipe.vae, scenes, size, device)
    flow = torch.compile(model) if compiled else model
    batches = samples(cache, batch_size, device)

    def loss_of(step: int) -> torch.Tensor:
        x0, shares, captions = next(batches)
        noise, sigma = torch.randn_like(x0), noise_levels(batch_size, device)
        guidance = torch.empty_like(sigma).uniform_(*GUIDANCE)
        level = sigma[:, None, None]
        with torch.autocast(device.type, torch.bfloat16):
            texts = model.encode(*tokenise(pipe, captions, device))
            velocity = flow((1 - level) * x0 + level * noise, sigma, guidance, *texts)
        weight = (1 + OBJECT_WEIGHT * shares)[..., None]
        error = (velocity.float() - (noise - x0)).square()
        return (weight * error).mean() / weight.mean()

    training.fit(
        {"clip": model.clip, "t5": model.t5, "flow": model.flow},
        loss_of,
        out,
        minutes,
        resume,
        report_every=report_every,
        preview=lambda: preview(pipe, out / "samples.png", size),
    )
    save(pipe, out / "flux", size)
    training.export_log(out, out / "flux")
    return out / "flux"
