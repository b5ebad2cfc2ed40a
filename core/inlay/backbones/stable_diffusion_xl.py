"""Stable Diffusion XL: SD's U-Net with two text encoders and the picture's size as a condition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from inlay_config.errors import ModelError

from .base import Size
from .stable_diffusion import StableDiffusion
from .text import Cond, pieces


class StableDiffusionXL(StableDiffusion):
    """StableDiffusionXLPipeline, called with its default size conditions (the picture's own size,
    no crop). An empty prompt is zeros where the model's card says so, as the stock negative is."""

    name, sets_begin_index = "sdxl", True

    def pieces(self, prompt: str) -> list[str]:
        return pieces(self.pipe.tokenizer or self.pipe.tokenizer_2, prompt, self.text_tokens)

    def encode_text(self, prompt: str) -> Cond:
        tokens = self.pieces(prompt)
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompt, None, self.device, 1, False)
        if not prompt and self.pipe.config.force_zeros_for_empty_prompt:
            embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        return Cond(embeds, pooled, tokens)

    def inputs(
        self,
        sample: Tensor,
        t: Tensor,
        conds: list[tuple[Cond, int]],
        guidance: list[tuple[float, int]],
        size: Size,
    ) -> dict[str, Any]:
        pooled = [c.pooled.expand(n, -1) for c, n in conds if c.pooled is not None]
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=self.dtype, device=self.device)
        added = {"text_embeds": torch.cat(pooled), "time_ids": sizes.expand(sample.shape[0], -1)}
        plain = super().inputs(sample, t, conds, guidance, size)
        return {**plain, "added_cond_kwargs": added}

    @contextmanager
    def _upcast(self) -> Iterator[None]:
        """The VAE in float32 where float16 overflows it, as the stock pipeline does."""
        vae = self.pipe.vae
        half = vae.dtype == torch.float16 and vae.config.force_upcast
        if half:
            vae.to(dtype=torch.float32)
        yield
        if half:
            vae.to(dtype=torch.float16)

    def encode_image(self, image: Tensor) -> Tensor:
        with self._upcast():
            return super().encode_image(image)

    def pixels(self, x: Tensor, size: Size) -> Tensor:
        vae = self.pipe.vae
        if torch.is_grad_enabled() and vae.dtype == torch.float16 and vae.config.force_upcast:
            problem = "float16 overflows this autoencoder, and its backward cannot be upcast"
            raise ModelError(problem, where="dtype", fix="Use bfloat16 or float32.")
        with self._upcast():
            return super().pixels(x, size)
