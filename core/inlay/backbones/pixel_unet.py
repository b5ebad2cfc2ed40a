"""Unconditional pixel-space U-Nets, as Blended Diffusion edits with: latents are pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..events import AttnSite
from .base import Backbone, Size, Spans
from .stable_diffusion import place_in_unet
from .text import Cond


class PixelUNet(Backbone):
    """DDPMPipeline over UNet2DModel. Pictures -1..1 are the latents `b 3 h w`; the model takes no
    prompt, so prompts are there for plugins to read, and there is no guidance scale. Six output
    channels are a mean and a learned variance."""

    name, denoiser_name = "pixel", "unet"

    @property
    def multiple(self) -> int:
        return 1

    @property
    def divisor(self) -> int:
        return int(2 ** (len(self.denoiser.config.block_out_channels) - 1))

    @property
    def native_size(self) -> Size:
        side = self.denoiser.config.sample_size
        return (side, side) if isinstance(side, int) else tuple(side)

    @property
    def decodes(self) -> bool:
        return True

    @property
    def text_tokens(self) -> int:
        return 0

    def tokens(self, size: Size) -> int:
        return max((self.lengths(site, size)[0] for site in self.sites), default=0)

    def site(self, index: int, name: str, module: Any, depth: float) -> AttnSite:
        block, level = place_in_unet(name, len(self.denoiser.config.block_out_channels))
        width = module.inner_dim // module.heads
        return AttnSite(name, index, "self", block, depth, module.heads, width, scale=2**level)

    def spans(self, site: AttnSite, text: int) -> Spans:
        return lambda queries, keys: ({"image": slice(0, queries)}, {"image": slice(0, keys)})

    def encode_text(self, prompt: str) -> Cond:
        return Cond(torch.zeros(1, 0, 0))

    def set_timesteps(self, scheduler: Any, steps: int, sigmas: Any, size: Size) -> None:
        scheduler.set_timesteps(steps, **({} if sigmas is None else {"sigmas": sigmas}))

    def inputs(
        self,
        sample: Tensor,
        t: Tensor,
        conds: list[tuple[Cond, int]],
        guidance: list[tuple[float, int]],
        size: Size,
    ) -> dict[str, Any]:
        return {"sample": sample, "timestep": t}

    def cfg_scale(self, guidance: float, true_cfg: float) -> float:
        return 1.0

    def encode_image(self, image: Tensor) -> Tensor:
        return (image * 2 - 1).to(self.device, self.dtype)

    def pixels(self, x: Tensor, size: Size) -> Tensor:
        return x

    def decode(self, x: Tensor, size: Size) -> Tensor:
        return (x / 2 + 0.5).clamp(0, 1)
