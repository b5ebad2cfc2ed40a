"""Recipe of InstructPix2Pix (Brooks et al. 2023): Stable Diffusion sees the picture to be changed
in further input channels, and the prompt is an instruction.

The new channels begin at zero. The condition is the mode of the picture's latent without the
scaling factor, as published. Of every sample one uniform number decides: with u = `dropout`, the
text alone is left out with probability u, the picture alone with u, and both with u.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from torch import Tensor

from inlay_train import edit_data, low_rank
from inlay_train.edit_data import EditPairs, Sources
from inlay_train.latent_diffusion import LatentDiffusion, embedded, fast_backward, pipeline
from inlay_train.recipe import Data, Sample, freeze


class InstructPix2Pix(LatentDiffusion):
    """Trains the U-Net, and with `text` the text encoder."""

    @dataclass
    class Config(LatentDiffusion.Config):
        """model: a Stable Diffusion to begin with, or an InstructPix2Pix to go on from. grow, flip:
        see EditPairs. text: train the text encoder too. emphasis: where a pair differs."""

        model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        data: Sources = field(default_factory=Sources)
        size: int = 256
        grow: float = 1.125
        flip: float = 0.5
        dropout: float = 0.05
        text: bool = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        pipe = pipeline(cfg.model)
        self.hold(pipe)
        self.tokenizer, self.text_encoder = pipe.tokenizer, pipe.text_encoder
        self.unet = self.prepared(pipe.unet)
        freeze([self.text_encoder])
        for module in [self.unet, *([self.text_encoder] if cfg.text else [])]:
            low_rank.add(module, cfg.rank)
        fast_backward(self.unet)

    def prepared(self, unet: Any) -> Any:
        """The U-Net with room for the picture. Raises ModelError for other channels."""
        return self.roomy(unet, 2 * self.vae.config.latent_channels, "an InstructPix2Pix")

    def data(self, out: Path) -> Data:
        cfg = self.cfg
        pairs = EditPairs(cfg.data, cfg.size, 1.0 if cfg.encoded else cfg.grow, cfg.flip)
        if not cfg.encoded:
            return pairs
        identity = self.identity(f"{asdict(cfg.data)} {cfg.size} {cfg.flip} {len(pairs)}")
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
        differs = (self.vae.config.scaling_factor * shown - clean).abs().amax(1, keepdim=True) > 0.5

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            seen = torch.cat([noisy, shown * ~unseen[:, None, None, None]], 1)
            guess: Tensor = self.unet(seen, time, words, return_dict=False)[0]
            return guess

        return self.loss(clean, predict, differs)

    @torch.no_grad()
    def _latents(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """The condition, and the latent to be drawn."""
        scale = self.vae.config.scaling_factor
        if before.shape[1] == self.vae.config.latent_channels:  # encoded before
            return before, scale * after
        return self._modes(before), scale * self.vae.encode(after).latent_dist.sample()

    def read(self, words: list[str]) -> Tensor:
        """Instructions as the U-Net attends to them, `b t c`."""
        with torch.set_grad_enabled(self.cfg.text and torch.is_grad_enabled()):
            return embedded(self.tokenizer, self.text_encoder, words)

    def save(self, folder: Path) -> None:
        StableDiffusionInstructPix2PixPipeline(
            vae=self.vae,
            text_encoder=low_rank.stock(self.text_encoder),
            tokenizer=self.tokenizer,
            unet=low_rank.stock(self.unet),
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
