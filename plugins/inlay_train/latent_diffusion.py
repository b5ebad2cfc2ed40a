"""What the recipes share that tune a Stable Diffusion to see more than a prompt: further input
channels, weights of low rank, rows that frozen networks see once, and the loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModel

from inlay import backbones
from inlay_config import registry
from inlay_config.errors import ConfigError, ModelError
from inlay_train.recipe import Recipe


class LatentDiffusion(Recipe):
    """A recipe with `vae`, `scheduler` and `levels`, the scheduler's noise levels, of a pipeline
    that a subclass hands to `hold`."""

    @dataclass
    class Config(Recipe.Config):
        """size: of the pictures in pixels. rank: of what is trained (0: all weights). encoded: draw
        and encode every row once. emphasis: what the loss weighs more in places that the recipe
        names, published: 0. shift: of timesteps towards noise, published: 1, none. zero_snr: noise
        ends at no picture at all, as sampling begins (Lin et al. 2023, "Common Diffusion Noise
        Schedules and Sample Steps Are Flawed"), published: no; for models that predict
        velocities."""

        size: int = 512
        rank: int = 0
        encoded: bool = False
        emphasis: float = 0.0
        shift: float = 1.0
        zero_snr: bool = False

    def hold(self, pipe: Any) -> None:
        """Seed what is fresh and take the parts that stay as they are."""
        torch.manual_seed(self.cfg.train.seed)
        self.vae, self.scheduler = pipe.vae, self.schedule(pipe.scheduler)
        self.levels: Any = DDPMScheduler.from_config(self.scheduler.config)
        self.vae.requires_grad_(False).eval()

    def schedule(self, found: Any) -> Any:
        """The model's scheduler, or one like it. Raises ConfigError for a noise that tells nothing
        of what is to be predicted."""
        if not self.cfg.zero_snr:
            return found
        if found.config.prediction_type != "v_prediction":
            problem = f"{self.cfg.model} predicts {found.config.prediction_type}, not velocities"
            raise ConfigError(problem, where="zero_snr", fix="Set zero_snr=false.")
        return type(found).from_config(found.config, rescale_betas_zero_snr=True)

    def roomy(self, unet: Any, channels: int, family: str) -> Any:
        """A U-Net with this many input channels: a plain one gets more. Raises ModelError for one
        that is neither plain nor of the `family` that is trained."""
        plain, taken = self.vae.config.latent_channels, unet.config.in_channels
        if taken == plain:
            return widened(unet, channels)
        if taken != channels:
            fix = f"Begin with a Stable Diffusion, or go on from {family}."
            problem = f"its U-Net takes {taken} channels, not {plain} or {channels}"
            raise ModelError(problem, where=self.cfg.model, fix=fix)
        return unet

    def identity(self, settings: str) -> str:
        """A name for rows that were encoded under these settings by this autoencoder."""
        weights = self.vae.encoder.conv_out.weight.detach().cpu().numpy().tobytes()
        return hashlib.sha256(settings.encode() + weights).hexdigest()

    @torch.no_grad()
    def posterior(self, picture: Tensor) -> Tensor:
        """Mean and deviation of the latents of pictures `b 3 h w` in -1..1: `b 2 c h w`."""
        found = self.vae.encode(picture.to(self.vae.device)).latent_dist
        return torch.stack([found.mean, found.std], 1)

    def sampled(self, found: Tensor) -> Tensor:
        """Scaled latents `b c h w` of posteriors."""
        mean, std = found.unbind(1)
        latents: Tensor = self.vae.config.scaling_factor * (mean + std * torch.randn_like(mean))
        return latents

    def loss(
        self, clean: Tensor, predict: Callable[[Tensor, Tensor], Tensor], places: Tensor
    ) -> Tensor:
        """Of latents `b c h w`: how far off `predict(noisy, time)` is at random times, which counts
        1 + emphasis times `places` `b 1 h w`."""
        noise, time = torch.randn_like(clean), self.times(clean)
        guess = predict(self.levels.add_noise(clean, noise, time), time).float()
        target = noise
        if self.levels.config.prediction_type == "v_prediction":
            target = self.levels.get_velocity(clean, noise, time)
        weight = 1 + self.cfg.emphasis * places
        return (weight * (guess - target).square()).mean() / weight.mean()

    def times(self, clean: Tensor) -> Tensor:
        """Random timesteps `b`, shifted towards noise."""
        u, shift = torch.rand(len(clean), device=clean.device), self.cfg.shift
        count = int(self.levels.config.num_train_timesteps)
        return (count * shift * u / (1 + (shift - 1) * u)).long().clamp(max=count - 1)


def pipeline(model: str) -> Any:
    """A pipeline by name or folder, also of what recipes wrote, in float32. Raises ModelError."""
    return backbones.load(registry.resolve_model(model), device="cpu")


def tower(clip: str) -> tuple[Any, Any]:
    """The vision tower of a CLIP by name or folder, and what prepares its pictures."""
    folder = registry.resolve_model(clip, "clip", "config.json")
    found = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
    return found, CLIPImageProcessor.from_pretrained(folder)


def normalised(pictures: Tensor, processor: Any) -> Tensor:
    """Pictures `b 3 s s` in 0..1 as a tower sees them."""
    mean, std = (
        torch.tensor(values, device=pictures.device)[:, None, None]
        for values in (processor.image_mean, processor.image_std)
    )
    return (pictures - mean) / std


def embedded(tokenizer: Any, encoder: Any, words: list[str]) -> Tensor:
    """Words as a U-Net attends to them, `b t c`."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = tokenizer(words, max_length=tokenizer.model_max_length, **options).input_ids
    embeds: Tensor = encoder(ids.to(encoder.device)).last_hidden_state
    return embeds


def widened(unet: Any, channels: int) -> Any:
    """The U-Net with `channels` input channels, the new ones without effect: their weights are
    zero."""
    old = unet.conv_in
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    new.bias = old.bias
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels].copy_(old.weight)
    unet.conv_in = new.to(old.weight)
    unet.register_to_config(in_channels=channels)
    return unet


def fast_backward(unet: Any, fused: Collection[str] = ()) -> None:
    """Attention whose backward pass is fast: on a CPU that of fused kernels is several times slower
    than of a plain softmax, which is used but at the sites that are `fused`."""
    plain = not torch.cuda.is_available()
    for name in unet.attn_processors:
        site = unet.get_submodule(name.removesuffix(".processor"))
        kept = name.removesuffix(".processor") in fused
        site.processor = AttnProcessor() if plain and not kept else AttnProcessor2_0()
