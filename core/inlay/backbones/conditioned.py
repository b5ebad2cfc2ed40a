"""Stable Diffusion whose U-Net sees further channels beside the noisy latent: a plugin gives them.

InstructPix2Pix (Brooks et al. 2023): the latent of the picture to be changed, 4 + 4 channels.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from inlay_config.errors import ModelError

from ..events import Branch
from .stable_diffusion import StableDiffusion
from .text import Cond, pieces


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
        tokens = pieces(self.pipe.tokenizer, prompt, self.text_tokens)
        return Cond(self.pipe._encode_prompt(prompt, self.device, 1, False), None, tokens)

    def groups(self, branches: list[Branch]) -> tuple[tuple[str, ...], ...]:
        order = ("text", "image", "null")
        listed = sorted(branches, key=lambda b: (*order, b.role).index(b.role))
        return (tuple(b.name for b in listed),)

    def cfg_scale(self, guidance: float, true_cfg: float) -> float:
        return 1.0
