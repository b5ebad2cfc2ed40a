"""Recipe of InstructPix2Pix (Brooks et al. 2023): Stable Diffusion sees the picture to be changed
in further input channels, and the prompt is an instruction.

The new channels begin at zero. The condition is the mode of the picture's latent without the
scaling factor, as published. Of every sample one uniform number decides: with u = `dropout`, the
text alone is left out with probability u, the picture alone with u, and both with u.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from inlay_config import registry
from inlay_config.errors import ConfigError, ModelError
from inlay_train import edit_data, low_rank
from inlay_train.edit_data import EditPairs, Sources
from inlay_train.recipe import Data, Recipe, Sample, Training, freeze


class InstructPix2Pix(Recipe):
    """Trains the U-Net, and with `text` the text encoder."""

    @dataclass
    class Config:
        """model: a Stable Diffusion to begin with, or an InstructPix2Pix to go on from. size: of
        the pictures in pixels; grow, flip: see EditPairs. rank: of what is trained (0: all
        weights). text: train the text encoder too. encoded: encode the pairs once. emphasis: what
        the loss weighs more where a pair differs, published: 0. shift: of timesteps towards noise,
        published: 1, none. zero_snr: noise ends at no picture at all, as sampling begins (Lin et
        al. 2023, "Common Diffusion Noise Schedules and Sample Steps Are Flawed"), published: no;
        for models that predict velocities."""

        model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        data: Sources = field(default_factory=Sources)
        size: int = 256
        grow: float = 1.125
        flip: float = 0.5
        dropout: float = 0.05
        rank: int = 0
        text: bool = False
        encoded: bool = False
        emphasis: float = 0.0
        shift: float = 1.0
        zero_snr: bool = False
        train: Training = field(default_factory=Training)

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        pipe: Any = DiffusionPipeline.from_pretrained(
            registry.resolve_model(cfg.model), dtype=torch.float32, use_safetensors=True
        )
        self.tokenizer, self.scheduler = pipe.tokenizer, self.schedule(pipe.scheduler)
        self.levels: Any = DDPMScheduler.from_config(self.scheduler.config)
        self.vae, self.text_encoder = pipe.vae, pipe.text_encoder
        self.unet = self.prepared(pipe.unet)
        freeze([self.vae, self.text_encoder])
        torch.manual_seed(cfg.train.seed)
        for module in [self.unet, *([self.text_encoder] if cfg.text else [])]:
            low_rank.add(module, cfg.rank)
        if not torch.cuda.is_available():
            # On a CPU the fused attention's backward pass is several times slower than this one.
            self.unet.set_attn_processor(AttnProcessor())

    def schedule(self, found: Any) -> Any:
        """The model's scheduler, or one like it. Raises ConfigError for a noise that tells nothing
        of what is to be predicted."""
        if not self.cfg.zero_snr:
            return found
        if found.config.prediction_type != "v_prediction":
            problem = f"{self.cfg.model} predicts {found.config.prediction_type}, not velocities"
            raise ConfigError(problem, where="zero_snr", fix="Set zero_snr=false.")
        return type(found).from_config(found.config, rescale_betas_zero_snr=True)

    def prepared(self, unet: Any) -> Any:
        """The U-Net with room for the picture. Raises ModelError for other channels."""
        channels, taken = self.vae.config.latent_channels, unet.config.in_channels
        if taken == channels:
            return widened(unet, 2 * channels)
        if taken != 2 * channels:
            fix = "Begin with a Stable Diffusion, or go on from an InstructPix2Pix."
            problem = f"its U-Net takes {taken} channels, not {channels} or {2 * channels}"
            raise ModelError(problem, where=self.cfg.model, fix=fix)
        return unet

    def data(self, out: Path) -> Data:
        cfg = self.cfg
        pairs = EditPairs(cfg.data, cfg.size, 1.0 if cfg.encoded else cfg.grow, cfg.flip)
        if not cfg.encoded:
            return pairs
        weights = self.vae.encoder.conv_out.weight.detach().cpu().numpy().tobytes()
        told = f"{asdict(cfg.data)} {cfg.size} {cfg.flip} {len(pairs)}"
        identity = hashlib.sha256(told.encode() + weights).hexdigest()
        return edit_data.encode(pairs, self._modes, out / "encoded.safetensors", identity)

    @torch.no_grad()
    def _modes(self, pictures: Tensor) -> Tensor:
        halved = self.cfg.train.precision == "bf16"
        with torch.autocast(self.vae.device.type, torch.bfloat16, enabled=halved):
            mode: Tensor = self.vae.encode(pictures.to(self.vae.device)).latent_dist.mode()
        return mode.float()

    def forward(self, batch: Sample) -> Tensor:
        shown, clean = self._latents(batch["before"], batch["after"])
        chance, u = torch.rand(len(clean), device=clean.device), self.cfg.dropout
        words = self.read([
            "" if r < 2 * u else text
            for r, text in zip(chance.tolist(), batch["instruction"], strict=True)
        ])  # fmt: skip
        unseen = (chance >= u) & (chance < 3 * u)
        noise, time = torch.randn_like(clean), self._times(clean)
        noisy = self.levels.add_noise(clean, noise, time)
        seen = torch.cat([noisy, shown * ~unseen[:, None, None, None]], 1)
        guess = self.unet(seen, time, words, return_dict=False)[0].float()
        error = (guess - self._target(clean, noise, time)).square()
        differs = (self.vae.config.scaling_factor * shown - clean).abs().amax(1, keepdim=True) > 0.5
        weight = 1 + self.cfg.emphasis * differs
        return (weight * error).mean() / weight.mean()

    @torch.no_grad()
    def _latents(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """The condition, and the latent to be drawn."""
        scale = self.vae.config.scaling_factor
        if before.shape[1] == self.vae.config.latent_channels:  # encoded before
            return before, scale * after
        return self._modes(before), scale * self.vae.encode(after).latent_dist.sample()

    def _times(self, clean: Tensor) -> Tensor:
        """Random timesteps `b`, shifted towards noise."""
        u, shift = torch.rand(len(clean), device=clean.device), self.cfg.shift
        count = int(self.levels.config.num_train_timesteps)
        return (count * shift * u / (1 + (shift - 1) * u)).long().clamp(max=count - 1)

    def _target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        if self.levels.config.prediction_type == "v_prediction":
            velocity: Tensor = self.levels.get_velocity(clean, noise, time)
            return velocity
        return noise

    def read(self, words: list[str]) -> Tensor:
        """Instructions as the U-Net attends to them, `b t c`."""
        length = self.tokenizer.model_max_length
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizer(words, max_length=length, **options).input_ids
        with torch.set_grad_enabled(self.cfg.text and torch.is_grad_enabled()):
            embeds: Tensor = self.text_encoder(ids.to(self.vae.device)).last_hidden_state
        return embeds

    def save(self, folder: Path) -> None:
        unet = UNet2DConditionModel.from_config(self.unet.config)
        unet.load_state_dict(low_rank.merged(self.unet))
        encoder = type(self.text_encoder)(self.text_encoder.config)
        encoder.load_state_dict(low_rank.merged(self.text_encoder))
        StableDiffusionInstructPix2PixPipeline(
            vae=self.vae,
            text_encoder=encoder,
            tokenizer=self.tokenizer,
            unet=unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)


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
