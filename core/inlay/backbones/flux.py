"""FLUX.1: joint attention over [text | image], latents packed 2x2, guidance distilled or true CFG (two calls, as FluxPipeline makes them)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from einops import rearrange
from torch import Tensor, nn

from ..events import AttnSite, Branch, Cond
from . import Backbone, card
from .text import pieces


class Flux(Backbone):
    """FluxPipeline. `guidance` is the distilled embedding per row, `true_cfg` the classifier-free scale of every lane."""

    name, denoiser_name, sets_begin_index, flow = "flux", "transformer", True, True

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._ids: dict[tuple[int, int], Tensor] = {}

    @property
    def multiple(self) -> int:
        return 2 * int(self.pipe.vae_scale_factor)

    @property
    def native_size(self) -> tuple[int, int]:
        side = int(
            card(self.pipe).get("size", self.pipe.default_sample_size * self.pipe.vae_scale_factor)
        )
        return side, side

    @property
    def text_tokens(self) -> int:
        """T5 length: the model card's, else what the tokenizer allows, at most FLUX's 512."""
        tokenizer = getattr(self.pipe, "tokenizer_2", None)
        return int(
            card(self.pipe).get(
                "max_sequence_length", min(512, tokenizer.model_max_length if tokenizer else 512)
            )
        )

    def site(self, index: int, name: str, module: nn.Module, depth: float) -> AttnSite:
        block = "single" if name.startswith("single") else "double"
        return AttnSite(name, index, "joint", block, depth, int(module.heads), int(module.head_dim))

    def spans(
        self, site: AttnSite, text: int
    ) -> Callable[[int, int], tuple[dict[str, slice], dict[str, slice]]]:
        return lambda q, k: (
            {"text": slice(0, text), "image": slice(text, q)},
            {"text": slice(0, text), "image": slice(text, k)},
        )

    def tokens(self, size: tuple[int, int]) -> int:
        height, width = self.grid(size)
        return self.text_tokens + height * width

    def encode_text(self, prompt: str) -> Cond:
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt=prompt, prompt_2=None, device=self.device, max_sequence_length=self.text_tokens
        )
        return Cond(embeds, pooled, pieces(self.pipe.tokenizer_2, prompt, self.text_tokens))

    def latent(
        self,
        n: int,
        size: tuple[int, int],
        generator: torch.Generator | None,
        given: Tensor | None = None,
    ) -> Tensor:
        channels = self.denoiser.config.in_channels // 4
        x, _ = self.pipe.prepare_latents(
            n, channels, *size, self.dtype, self.device, generator, given
        )
        return x

    def set_timesteps(
        self, scheduler: Any, steps: int, sigmas: list[float] | None, size: tuple[int, int]
    ) -> None:
        height, width = self.grid(size)
        config = scheduler.config
        mu = calculate_shift(height * width, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
                             config.get("base_shift", 0.5), config.get("max_shift", 1.15))  # fmt: skip
        levels = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
        levels = None if getattr(config, "use_flow_sigmas", False) else levels
        retrieve_timesteps(scheduler, steps, self.device, sigmas=levels, mu=mu)

    def inputs(
        self,
        sample: Tensor,
        t: Tensor,
        conds: list[tuple[Cond, int]],
        guidance: list[tuple[float, int]],
        size: tuple[int, int],
    ) -> dict[str, Any]:
        embeds = (
            torch.cat([c.embeds.expand(n, -1, -1) for c, n in conds])
            if len(conds) > 1
            else conds[0][0].embeds.expand(conds[0][1], -1, -1)
        )
        pooled = torch.cat([c.pooled.expand(n, -1) for c, n in conds if c.pooled is not None])
        scales = [g for g, n in guidance for _ in range(n)]
        return {
            "hidden_states": sample,
            "timestep": t.expand(sample.shape[0]).to(sample.dtype) / 1000,
            "guidance": torch.tensor(scales, device=sample.device, dtype=torch.float32)
            if self.denoiser.config.guidance_embeds
            else None,
            "pooled_projections": pooled,
            "encoder_hidden_states": embeds,
            "txt_ids": torch.zeros(embeds.shape[1], 3, device=sample.device, dtype=embeds.dtype),
            "img_ids": self._image_ids(size),
            "joint_attention_kwargs": {},
        }

    def _image_ids(self, size: tuple[int, int]) -> Tensor:
        """(0, row, column) of every image token, made once per size."""
        if size not in self._ids:
            blank = torch.empty(1, 0, device=self.device)
            self._ids[size] = self.pipe.prepare_latents(
                1, 1, *size, self.dtype, self.device, None, blank
            )[1]
        return self._ids[size]

    def cfg_scale(self, guidance: float, true_cfg: float) -> float:
        return true_cfg

    def groups(self, branches: list[Branch]) -> tuple[tuple[str, ...], ...]:
        split = [tuple(b.name for b in branches if b.role == role) for role in ("text", "null")]
        return tuple(group for group in split if group)

    def to_grid(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return rearrange(x, "b (h w) c -> b c h w", h=self.grid(size)[0])

    def from_grid(self, grid: Tensor) -> Tensor:
        return rearrange(grid, "b c h w -> b (h w) c")

    def pack(self, z: Tensor) -> Tensor:
        return rearrange(z, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)

    def unpack(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=self.grid(size)[0], p=2, q=2)
