"""Stable Diffusion whose U-Net sees further channels beside the noisy latent: a plugin gives them.

InstructPix2Pix (Brooks et al. 2023): the latent of the picture to be changed, 4 + 4 channels.
Paint by Example (Yang et al. 2023): that of the picture around a hole, and where it is, 4 + 4 + 1;
its prompt is one token, made of an exemplar.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from inlay_config.errors import ModelError

from ..events import Branch
from .stable_diffusion import StableDiffusion
from .text import Cond


class Conditioned(StableDiffusion):
    """What these families share. plugin: the one that gives the channels; layout: what they are,
    for messages. Raises ModelError for a U-Net with another number of them."""

    plugin: ClassVar[str]
    layout: ClassVar[str]

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        taken, wanted = int(self.denoiser.config.in_channels), self.channels + self.further
        if taken != wanted:
            problem = f"its U-Net takes {taken} channels, {type(pipe).__name__} gives {wanted}"
            fix = f"Use a checkpoint of this kind: {self.layout}."
            raise ModelError(problem, where="model", fix=fix)

    @property
    def channels(self) -> int:
        return int(self.pipe.vae.config.latent_channels)

    @property
    @abstractmethod
    def further(self) -> int:
        """Channels beside the latent's own."""

    def denoise(self, kwargs: dict[str, Any], role: str) -> Tensor:
        given, taken = kwargs["sample"].shape[1], self.denoiser.config.in_channels
        if given != taken:
            problem = f"{self.name} takes {taken} channels ({self.layout}) and was given {given}"
            fix = f"Add the plugin `{self.plugin}`, and nothing that changes its channels."
            raise ModelError(problem, where="plugins", fix=fix)
        return super().denoise(kwargs, role)


class InstructPix2Pix(Conditioned):
    """StableDiffusionInstructPix2PixPipeline. Null rows are the plugin's to declare, since it knows
    which of the three are needed."""

    name, plugin = "instruct-pix2pix", "instruct"
    layout = "the latent, then that of the picture"

    @property
    def further(self) -> int:
        return self.channels

    def picture(self, image: Tensor) -> Tensor:
        """The channels of a picture `b 3 h w` in 0..1: the posterior's mode without the scaling
        factor, as the model was trained."""
        vae = self.pipe.vae
        posterior = vae.encode((2 * image - 1).to(self.device, vae.dtype)).latent_dist
        mode: Tensor = posterior.mode()
        return mode.to(self.dtype)

    def encode_text(self, prompt: str) -> Cond:
        tokens = self.pieces(prompt)
        return Cond(self.pipe._encode_prompt(prompt, self.device, 1, False), None, tokens)

    def groups(self, branches: list[Branch]) -> tuple[tuple[str, ...], ...]:
        order = ("text", "image", "null")
        listed = sorted(branches, key=lambda b: (*order, b.role).index(b.role))
        return (tuple(b.name for b in listed),)

    def cfg_scale(self, guidance: float, true_cfg: float) -> float:
        return 1.0


class PaintByExample(Conditioned):
    """PaintByExamplePipeline. Every prompt is the learned null vector until the plugin puts its
    exemplar in place. Raises ModelError where a checkpoint lacks a part of the encoder."""

    name, plugin = "paint-by-example", "exemplar"
    layout = "the latent, that of the picture around the hole, and where the picture is kept"
    learned = ("mapper.", "final_layer_norm.", "proj_out.", "uncond_vector")

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        folder = Path(getattr(pipe.image_encoder, "name_or_path", "") or "-")
        stored = {key for file in folder.glob("*.safetensors") for key in _keys(file)}
        missing = [part for part in self.learned if not any(k.startswith(part) for k in stored)]
        if stored and missing:
            problem = f"the exemplar's encoder has no {', '.join(p.strip('.') for p in missing)}"
            fix = "A CLIP alone is not enough: take Paint by Example's own image_encoder."
            raise ModelError(problem, where=str(folder), fix=fix)

    @property
    def further(self) -> int:
        return self.channels + 1

    @property
    def text_tokens(self) -> int:
        return 1

    def pieces(self, prompt: str) -> list[str]:
        return []

    def encode_text(self, prompt: str) -> Cond:
        return Cond(self.pipe.image_encoder.uncond_vector, None, [])

    def exemplar(self, picture: Image.Image, squash: bool) -> Tensor:
        """The token `1 1 c` of a picture: squashed to a square, or the square in its middle."""
        processor, encoder = self.pipe.feature_extractor, self.pipe.image_encoder
        if squash:
            side = processor.crop_size
            picture = picture.resize((side["width"], side["height"]), Image.Resampling.BICUBIC)
        pixels = processor(images=picture, return_tensors="pt").pixel_values
        token: Tensor = encoder(pixels.to(self.device, next(encoder.parameters()).dtype))
        return token

    def around(self, image: Tensor, keep: Tensor, generator: torch.Generator | None) -> Tensor:
        """Latent of a picture `b 3 h w` in 0..1 that is grey where `keep` `b 1 h w` is 0: a sample
        of the posterior, or without a generator its mode."""
        vae = self.pipe.vae
        masked = ((2 * image - 1) * keep).to(self.device, vae.dtype)
        posterior = vae.encode(masked).latent_dist
        z: Tensor = posterior.mode() if generator is None else posterior.sample(generator)
        return (vae.config.scaling_factor * z).to(self.dtype)

    def without_queries(self, sites: Collection[str]) -> None:
        """From now on cross-attention is the value of its one key at these sites, and nowhere
        else: what a softmax over one key says."""
        for name, module in self.modules.items():
            held: Any = module
            stock = getattr(held.processor, "stock", held.processor)
            held.processor = OneToken(stock) if name in sites else stock


class OneToken:
    """Attention processor: W_out W_v c for every query. stock: for several keys."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        *args: Any,
        **rest: Any,
    ) -> Tensor:
        if encoder_hidden_states.shape[1] > 1:
            mixed: Tensor = self.stock(attn, hidden_states, encoder_hidden_states, *args, **rest)
            return mixed
        bias: Tensor = attn.to_out[0](attn.to_v(encoder_hidden_states))
        return bias.expand(-1, hidden_states.shape[1], -1)


def _keys(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())
