"""MimicBrush (Chen et al. 2024): a hole is filled with what fits there of another picture.

The prompt of both U-Nets is what CLIP sees of the exemplar, 257 tokens; the reference U-Net reads
the exemplar's clean latent at the step's own time, and what comes to its self-attention in the
middle and on the way up joins that of the imitative U-Net.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from inlay_attention import Held
from inlay_config.errors import ModelError

from .conditioned import Conditioned
from .mimicbrush_forward import readers, reference, shared
from .text import Cond


class MimicBrush(Conditioned):
    """MimicBrushPipeline. Every prompt is CLIP's view of no picture (zeros behind its
    normalisation) until the plugin puts its exemplar in place. Raises ModelError where U-Nets do
    not fit to each other, and for a checkpoint without CLIP's projection."""

    name, plugin = "mimicbrush", "imitation"
    layout = "the latent, the mask, the latent of the picture around the hole, the depth's"

    def __init__(self, pipe: Any) -> None:
        if pipe.image_tokens is None or pipe.image_encoder is None:
            problem = "it has no image_encoder, or no image_tokens, its projection"
            fix = "Both come with MimicBrush's own checkpoint; a CLIP alone is not enough."
            raise ModelError(problem, where="model", fix=fix)
        super().__init__(pipe)
        taken, wanted = pipe.reference_unet.config.in_channels, self.channels
        if taken != wanted:
            problem = f"its reference U-Net takes {taken} channels, an exemplar's latent {wanted}"
            fix = "Use a plain Stable Diffusion's U-Net there, not an inpainting one."
            raise ModelError(problem, where="model", fix=fix)
        unets = self.denoiser, pipe.reference_unet
        own, other = ({n: m.inner_dim for n, m in readers(unet).items()} for unet in unets)
        if own != other or not own:
            problem = "the self-attention of its two U-Nets is not the same"
            raise ModelError(problem, where="model", fix="Both are made of one Stable Diffusion.")

    @property
    def takes_depth(self) -> bool:
        """Whether the imitative U-Net has channels for the depth."""
        return self.pipe.depth_guider is not None

    @property
    def further(self) -> int:
        depth = self.pipe.depth_guider.config.channels if self.takes_depth else 0
        return self.channels + 1 + int(depth)

    @property
    def text_tokens(self) -> int:
        config = self.pipe.image_encoder.config
        return int((config.image_size // config.patch_size) ** 2 + 1)

    def encode_text(self, prompt: str) -> Cond:
        side = self.pipe.image_encoder.config.image_size
        return Cond(self.prompt(torch.zeros(1, 3, side, side)), None, [])

    def prompt(self, pixels: Tensor) -> Tensor:
        """The prompt `b t c` of pictures `b 3 s s` that are normalised for CLIP."""
        encoder = self.pipe.image_encoder
        weight = next(encoder.parameters())
        seen = encoder(pixels.to(self.device, weight.dtype), output_hidden_states=True)
        tokens: Tensor = self.pipe.image_tokens(seen.hidden_states[-2].to(self.dtype))
        return tokens

    def exemplar(self, picture: Image.Image) -> Tensor:
        """The prompt of a picture."""
        pixels = self.pipe.feature_extractor(images=picture, return_tensors="pt").pixel_values
        return self.prompt(pixels)

    def posterior(self, image: Tensor, noise: Tensor | None) -> Tensor:
        """Latent of a picture `1 3 h w` in 0..1: its posterior's mode, or with `noise` `1 c h w` a
        sample."""
        vae = self.pipe.vae
        found = vae.encode((2 * image - 1).to(self.device, vae.dtype)).latent_dist
        z = found.mean if noise is None else found.mean + found.std * noise.to(found.mean)
        return (vae.config.scaling_factor * z).to(self.dtype)

    def shape_of(self, depth: Tensor, grid: tuple[int, int]) -> Tensor:
        """The depth's channels `1 c h w` of a map `1 1 h w` for latents of `grid`."""
        channels: Tensor = self.pipe.depth_guider(depth.to(self.device, self.dtype), grid)
        return channels

    def read(self, z: Tensor, t: Tensor, prompt: Tensor, mix: float) -> dict[str, Held]:
        """Keys and values by site that the exemplar's clean latent `1 c h w` gives at time t."""
        hidden = reference(self.pipe.reference_unet, z, t, prompt)
        return {site: shared(self.modules[site], r, mix) for site, r in hidden.items()}
