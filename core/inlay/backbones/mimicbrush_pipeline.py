"""MimicBrush's networks (Chen et al. 2024) as a diffusers pipeline, which diffusers itself lacks: a
container that is saved to and loaded from a folder. What it computes is said by `mimicbrush.py`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DiffusionPipeline,
    ModelMixin,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModel


class ImageTokens(ModelMixin, ConfigMixin):
    """Tokens of CLIP `b t vision_width` for the U-Nets' cross-attention `b t width`."""

    @register_to_config
    def __init__(self, vision_width: int = 1280, width: int = 768) -> None:
        super().__init__()
        self.proj = nn.Linear(vision_width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        tokens: Tensor = self.proj(hidden)
        return tokens


class DepthGuider(ModelMixin, ConfigMixin):
    """A depth map `b 1 h w` of any size as `b c h/8 w/8` channels for the imitative U-Net."""

    @register_to_config
    def __init__(
        self, channels: int = 4, block_out_channels: tuple[int, ...] = (16, 32, 64, 128)
    ) -> None:
        super().__init__()
        first, *_, last = widths = tuple(block_out_channels)
        self.conv_in = nn.Conv2d(1, first, 3, padding=1)
        blocks = list[nn.Module]()
        for width, wider in pairwise(widths):
            blocks.append(nn.Conv2d(width, width, 3, padding=1))
            blocks.append(nn.Conv2d(width, wider, 3, padding=1, stride=2))
        self.blocks = nn.ModuleList(blocks)
        self.conv_out = nn.Conv2d(last, channels, 3, padding=1)

    @property
    def factor(self) -> int:
        """Pixels of the resized map per cell of the output."""
        return 2 ** (len(self.blocks) // 2)

    def forward(self, depth: Tensor, grid: tuple[int, int] = (64, 64)) -> Tensor:
        """grid: (height, width) of the output; published 64x64."""
        size = [side * self.factor for side in grid]
        x = F.interpolate(depth, size, mode="bilinear", align_corners=True)
        for layer in (self.conv_in, *self.blocks):
            x = F.silu(layer(x))
        out: Tensor = self.conv_out(x)
        return out


class MimicBrushPipeline(DiffusionPipeline):
    """unet: the imitative one; its channels: the latent, the mask, the latent of the picture around
    the hole, the depth's (4 + 1 + 4 + 4; 9 where depth_guider is None). reference_unet: sees the
    exemplar's latent alone. image_encoder: its penultimate hidden states, through image_tokens, are
    the prompt of both.
    """

    model_cpu_offload_seq = "image_encoder->image_tokens->depth_guider->reference_unet->unet->vae"
    _optional_components: ClassVar[list[str]] = ["depth_guider", "feature_extractor"]

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        reference_unet: UNet2DConditionModel,
        image_encoder: CLIPVisionModel,
        image_tokens: ImageTokens,
        depth_guider: DepthGuider | None,
        scheduler: Any,
        feature_extractor: CLIPImageProcessor | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            unet=unet,
            reference_unet=reference_unet,
            image_encoder=image_encoder,
            image_tokens=image_tokens,
            depth_guider=depth_guider,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
        )
        blocks = getattr(getattr(vae, "config", None), "block_out_channels", (0,) * 4)
        self.vae_scale_factor = 2 ** (len(blocks) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
