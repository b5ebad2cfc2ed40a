"""Stable Diffusion 1.x and 2.x: a U-Net with self- and cross-attention, CFG in one batch (null rows
first, as StableDiffusionPipeline lays it out)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor

from ..events import AttnSite
from .base import Backbone, Size, Spans
from .text import Cond, pieces


class StableDiffusion(Backbone):
    """StableDiffusionPipeline. A lane's `guidance` is its CFG scale; `true_cfg` does not apply."""

    name, denoiser_name = "sd", "unet"

    @property
    def native_size(self) -> Size:
        side = self.denoiser.config.sample_size * self.multiple
        return self.card.get("height", side), self.card.get("width", side)

    @property
    def text_tokens(self) -> int:
        return int(getattr(self.pipe.tokenizer, "model_max_length", 77))

    def tokens(self, size: Size) -> int:
        height, width = self.grid(size)
        return height * width

    def site(self, index: int, name: str, module: Any, depth: float) -> AttnSite:
        block, level = place_in_unet(name, len(self.denoiser.config.block_out_channels))
        kind: Literal["cross", "self"] = "cross" if name.endswith("attn2") else "self"
        width = module.inner_dim // module.heads
        return AttnSite(name, index, kind, block, depth, module.heads, width, scale=2**level)

    def spans(self, site: AttnSite, text: int) -> Spans:
        names = "text" if site.kind == "cross" else "image"
        return lambda queries, keys: ({"image": slice(0, queries)}, {names: slice(0, keys)})

    def pieces(self, prompt: str) -> list[str]:
        return pieces(getattr(self.pipe, "tokenizer", None), prompt, self.text_tokens)

    def encode_text(self, prompt: str) -> Cond:
        tokens = self.pieces(prompt)
        return Cond(self.pipe.encode_prompt(prompt, self.device, 1, False)[0], None, tokens)

    def set_timesteps(self, scheduler: Any, steps: int, sigmas: Any, size: Size) -> None:
        retrieve_timesteps(scheduler, steps, self.device, None, sigmas)

    def inputs(
        self,
        sample: Tensor,
        t: Tensor,
        conds: list[tuple[Cond, int]],
        guidance: list[tuple[float, int]],
        size: Size,
    ) -> dict[str, Any]:
        distilled, width = None, self.denoiser.config.time_cond_proj_dim
        if width is not None:  # LCM: guidance is an embedding
            scales = torch.tensor([scale - 1 for scale, n in guidance for _ in range(n)])
            distilled = self.pipe.get_guidance_scale_embedding(scales, embedding_dim=width)
            distilled = distilled.to(sample.device, sample.dtype)
        embeds = torch.cat([c.embeds.expand(n, -1, -1) for c, n in conds])
        text = {"encoder_hidden_states": embeds, "timestep_cond": distilled}
        return {"sample": sample, "timestep": t, **text}

    def cfg_scale(self, guidance: float, true_cfg: float) -> float:
        return guidance if self.denoiser.config.time_cond_proj_dim is None else 1.0


def place_in_unet(name: str, levels: int) -> tuple[str, int]:
    """(down, mid or up; how often the grid was halved) of a module's path."""
    block, _, rest = name.partition("_block")
    level = levels - 1 if block == "mid" else int(rest.split(".")[1])
    return block, levels - 1 - level if block == "up" else level
