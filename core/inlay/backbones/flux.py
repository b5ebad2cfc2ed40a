"""FLUX.1: joint attention over [text | image], latents packed 2x2, guidance by embedding, or by
true CFG in a second call, as FluxPipeline makes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from einops import rearrange
from torch import Tensor

from ..events import AttnSite, Branch
from .base import Backbone, Size, Spans
from .text import Cond, pieces


class Flux(Backbone):
    """FluxPipeline. A lane's `guidance` is the embedded scale, its `true_cfg` the CFG scale."""

    name, denoiser_name, sets_begin_index, flow = "flux", "transformer", True, True

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._ids: dict[Size, Tensor] = {}

    @property
    def multiple(self) -> int:
        return 2 * int(self.pipe.vae_scale_factor)

    @property
    def native_size(self) -> Size:
        side = self.pipe.default_sample_size * int(self.pipe.vae_scale_factor)
        return self.card.get("height", side), self.card.get("width", side)

    @property
    def text_tokens(self) -> int:
        """T5 length: what the model's card says, else its tokenizer's, at most FLUX's 512."""
        tokenizer = getattr(self.pipe, "tokenizer_2", None)
        most = min(512, tokenizer.model_max_length) if tokenizer else 512
        return int(self.card.get("max_sequence_length", most))

    def tokens(self, size: Size) -> int:
        height, width = self.grid(size)
        return self.text_tokens + height * width

    def site(self, index: int, name: str, module: Any, depth: float) -> AttnSite:
        block = "single" if name.startswith("single") else "double"
        return AttnSite(name, index, "joint", block, depth, module.heads, module.head_dim)

    def spans(self, site: AttnSite, text: int) -> Spans:
        def of(n: int) -> dict[str, slice]:
            return {"text": slice(0, text), "image": slice(text, n)}

        return lambda queries, keys: (of(queries), of(keys))

    def pieces(self, prompt: str) -> list[str]:
        return pieces(self.pipe.tokenizer_2, prompt, self.text_tokens)

    def encode_text(self, prompt: str) -> Cond:
        tokens = self.pieces(prompt)
        options = {"device": self.device, "max_sequence_length": self.text_tokens}
        embeds, pooled, _ = self.pipe.encode_prompt(prompt=prompt, prompt_2=None, **options)
        return Cond(embeds, pooled, tokens)

    def latent(
        self, n: int, size: Size, generator: torch.Generator | None, given: Tensor | None = None
    ) -> Tensor:
        channels, place = self.denoiser.config.in_channels // 4, (self.dtype, self.device)
        drawn: Tensor = self.pipe.prepare_latents(n, channels, *size, *place, generator, given)[0]
        return drawn

    def set_timesteps(self, scheduler: Any, steps: int, sigmas: Any, size: Size) -> None:
        height, width = self.grid(size)
        config = scheduler.config
        bounds = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5}
        limits = [config.get(key, default) for key, default in bounds.items()]
        mu = calculate_shift(height * width, *limits, config.get("max_shift", 1.15))
        if getattr(config, "use_flow_sigmas", False):
            sigmas = None
        elif sigmas is None:
            sigmas = np.linspace(1.0, 1 / steps, steps)
        retrieve_timesteps(scheduler, steps, self.device, sigmas=sigmas, mu=mu)

    def inputs(
        self,
        sample: Tensor,
        t: Tensor,
        conds: list[tuple[Cond, int]],
        guidance: list[tuple[float, int]],
        size: Size,
    ) -> dict[str, Any]:
        embeds = torch.cat([c.embeds.expand(n, -1, -1) for c, n in conds])
        scales = [scale for scale, n in guidance for _ in range(n)]
        pooled = [c.pooled.expand(n, -1) for c, n in conds if c.pooled is not None]
        distilled = self.denoiser.config.guidance_embeds
        return {
            "hidden_states": sample,
            "timestep": t.expand(sample.shape[0]).to(sample.dtype) / 1000,
            "guidance": sample.new_tensor(scales, dtype=torch.float32) if distilled else None,
            "pooled_projections": torch.cat(pooled),
            "encoder_hidden_states": embeds,
            "txt_ids": embeds.new_zeros(embeds.shape[1], 3),
            "img_ids": self._image_ids(size),
            "joint_attention_kwargs": {},
        }

    def cfg_scale(self, guidance: float, true_cfg: float) -> float:
        return true_cfg

    def groups(self, branches: list[Branch]) -> tuple[tuple[str, ...], ...]:
        null = tuple(b.name for b in branches if b.role == "null")
        rest = tuple(b.name for b in branches if b.role != "null")
        return tuple(names for names in (rest, null) if names)

    def to_grid(self, x: Tensor, size: Size) -> Tensor:
        return rearrange(x, "b (h w) c -> b c h w", h=self.grid(size)[0])

    def from_grid(self, grid: Tensor) -> Tensor:
        return rearrange(grid, "b c h w -> b (h w) c")

    def pack(self, z: Tensor) -> Tensor:
        return rearrange(z, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)

    def unpack(self, x: Tensor, size: Size) -> Tensor:
        height = self.grid(size)[0]
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=2, q=2)

    def _image_ids(self, size: Size) -> Tensor:
        """(0, row, column) of every image token, made once per size."""
        if size not in self._ids:
            blank = torch.empty(1, 0, device=self.device)
            place = (self.dtype, self.device)
            self._ids[size] = self.pipe.prepare_latents(1, 1, *size, *place, None, blank)[1]
        return self._ids[size]
