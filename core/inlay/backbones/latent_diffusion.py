"""Latent Diffusion's text-to-image model (LDM), which Blended Latent Diffusion was published on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Size
from .stable_diffusion import StableDiffusion
from .text import Cond, pieces


class LatentDiffusion(StableDiffusion):
    """LDMTextToImagePipeline: a U-Net as Stable Diffusion's under a BERT of its own, 77 tokens of
    padding and all; the autoencoder is an AutoencoderKL or a VQModel."""

    name = "ldm"

    @property
    def text_tokens(self) -> int:
        return 77

    @property
    def decodes(self) -> bool:
        return True

    def pieces(self, prompt: str) -> list[str]:
        """WordPiece marks what goes on with a word; others mark what begins one."""
        found = pieces(self.pipe.tokenizer, prompt, self.text_tokens)
        return [piece[2:] if piece.startswith("##") else f"▁{piece}" for piece in found]

    def encode_text(self, prompt: str) -> Cond:
        padding = {"padding": "max_length", "max_length": self.text_tokens}
        tokens = self.pipe.tokenizer(prompt, truncation=True, return_tensors="pt", **padding)
        return Cond(self.pipe.bert(tokens.input_ids.to(self.device))[0], None, self.pieces(prompt))

    def encode_image(self, image: Tensor) -> Tensor:
        vae = self.pipe.vqvae
        coded: Any = vae.encode((image * 2 - 1).to(self.device, vae.dtype))
        z: Tensor = coded.latents if hasattr(coded, "latents") else coded.latent_dist.mode()
        return (z * vae.config.scaling_factor).to(self.dtype)

    def pixels(self, x: Tensor, size: Size) -> Tensor:
        vae = self.pipe.vqvae
        image: Tensor = vae.decode((1 / vae.config.scaling_factor * x).to(vae.dtype)).sample
        return image

    def decode(self, x: Tensor, size: Size) -> Tensor:
        return (self.pixels(x, size) / 2 + 0.5).clamp(0, 1)
