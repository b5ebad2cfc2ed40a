"""Stable Diffusion 1.x and 2.x: a U-Net with self- and cross-attention, classifier-free guidance in one batch (null rows first)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..events import AttnSite, Cond
from . import Backbone, card
from .text import pieces


class StableDiffusion(Backbone):
    """StableDiffusionPipeline. `guidance` is the classifier-free scale of a lane; `true_cfg` does not apply."""

    name, denoiser_name = "sd", "unet"

    @property
    def native_size(self) -> tuple[int, int]:
        side = (
            int(card(self.pipe).get("size", 0))
            or self.denoiser.config.sample_size * self.pipe.vae_scale_factor
        )
        return side, side

    def site(self, index: int, name: str, module: nn.Module, depth: float) -> AttnSite:
        levels = len(self.denoiser.config.block_out_channels)
        block, _, rest = name.partition("_block")
        level = levels - 1 if block == "mid" else int(rest.split(".")[1])
        level = levels - 1 - level if block == "up" else level
        heads = int(module.heads)
        kind = "cross" if name.endswith("attn2") else "self"
        return AttnSite(
            name, index, kind, block, depth, heads, int(module.inner_dim) // heads, scale=2**level
        )

    def spans(
        self, site: AttnSite, text: int
    ) -> Callable[[int, int], tuple[dict[str, slice], dict[str, slice]]]:
        keys = "text" if site.kind == "cross" else "image"
        return lambda q, k: ({"image": slice(0, q)}, {keys: slice(0, k)})

    def tokens(self, size: tuple[int, int]) -> int:
        height, width = self.grid(size)
        return height * width

    def encode_text(self, prompt: str) -> Cond:
        embeds = self.pipe.encode_prompt(prompt, self.device, 1, False)[0]
        return Cond(embeds, None, pieces(self.pipe.tokenizer, prompt, embeds.shape[1]))

    def latent(
        self,
        n: int,
        size: tuple[int, int],
        generator: torch.Generator | None,
        given: Tensor | None = None,
    ) -> Tensor:
        if given is not None:
            return given.to(self.device, self.dtype)
        return randn_tensor(
            (n, self.denoiser.config.in_channels, *self.grid(size)),
            generator=generator,
            device=self.device,
            dtype=self.dtype,
        )

    def set_timesteps(
        self, scheduler: Any, steps: int, sigmas: list[float] | None, size: tuple[int, int]
    ) -> None:
        retrieve_timesteps(scheduler, steps, self.device, None, sigmas)

    def inputs(
        self,
        sample: Tensor,
        t: Tensor,
        conds: list[tuple[Cond, int]],
        guidance: list[tuple[float, int]],
        size: tuple[int, int],
    ) -> dict[str, Any]:
        condition = None
        if (
            self.denoiser.config.time_cond_proj_dim is not None
        ):  # LCM-distilled: guidance is an embedding
            scales = torch.tensor([g - 1 for g, n in guidance for _ in range(n)])
            condition = self.pipe.get_guidance_scale_embedding(
                scales, embedding_dim=self.denoiser.config.time_cond_proj_dim
            )
            condition = condition.to(sample.device, sample.dtype)
        embeds = torch.cat([c.embeds.expand(n, -1, -1) for c, n in conds])
        return {
            "sample": sample,
            "timestep": t,
            "encoder_hidden_states": embeds,
            "timestep_cond": condition,
        }

    def cfg_scale(self, guidance: float, true_cfg: float) -> float:
        return guidance if self.denoiser.config.time_cond_proj_dim is None else 1.0
