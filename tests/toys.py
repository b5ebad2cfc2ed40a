"""Closed-form stand-ins for networks, as the goldens of Blended Diffusion were made with."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file
from torch import nn

from inlay_plugins.clips import Clip

GOLDENS = Path(__file__).parent / "goldens"
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@cache
def golden(name: str) -> tuple[dict, dict]:
    """Tensors, and what is said of them."""
    card = json.loads((GOLDENS / f"{name}.json").read_text())
    return load_file(GOLDENS / f"{name}.safetensors"), card


def pool3(x: torch.Tensor) -> torch.Tensor:
    """The mean of 3x3, zeros beyond the border."""
    return F.avg_pool2d(x, 3, 1, 1)


def mix(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A matrix on the channels of `b c h w`."""
    return torch.einsum("ij,bjhw->bihw", matrix, x)


class ToyADM(nn.Module):
    """A pixel model with a learned variance; M `3 3`, mu `3`."""

    def __init__(self, matrix: torch.Tensor, mu: torch.Tensor, side: int):
        super().__init__()
        self.matrix, self.mu = nn.Parameter(matrix), nn.Parameter(mu)
        self.config = SimpleNamespace(sample_size=side, in_channels=3, block_out_channels=(1,))

    def forward(self, sample, timestep, return_dict=False):
        t = timestep.float()
        a = torch.exp(-(1e-4 * (t + 1) + 9.96e-6 * t * (t + 1)))
        mean = self.mu.view(1, 3, 1, 1) + 0.25 * mix(self.matrix, pool3(sample)).tanh()
        eps = (1 - a).sqrt() * (sample - a.sqrt() * mean) / (0.16 * a + 1 - a)
        channel = torch.arange(3.0).view(1, 3, 1, 1)
        return (torch.cat([eps, 0.9 * (1.5 * sample + channel + 3 * t / 1000).sin()], 1),)


class ToyLatent(nn.Module):
    """A latent model under a prompt `b tokens 6`; M `4 4`, P `4 6`. further: E `4 5` of channels
    behind the latent's, if it takes any."""

    def __init__(
        self,
        matrix: torch.Tensor,
        prompt: torch.Tensor,
        side: int,
        further: torch.Tensor | None = None,
    ):
        super().__init__()
        self.matrix, self.prompt = nn.Parameter(matrix), nn.Parameter(prompt)
        self.further = further
        channels = 4 if further is None else 4 + further.shape[1]
        self.config = SimpleNamespace(
            sample_size=side, in_channels=channels, block_out_channels=(1,), time_cond_proj_dim=None
        )

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=False, **_):
        s, p = timestep.float() + 1, 0.00085**0.5
        k = (0.012**0.5 - p) / 999
        a = torch.exp(-(p**2 * s + p * k * s**2 + k**2 * s**3 / 3))
        told = encoder_hidden_states.mean(1) @ self.prompt.T
        sample, beside = sample[:, :4], sample[:, 4:]
        mean = 0.5 * mix(self.matrix, pool3(sample)).tanh() + told[:, :, None, None]
        if self.further is not None:
            mean = mean + 0.3 * mix(self.further, beside).tanh()
        return ((1 - a).sqrt() * (sample - a.sqrt() * mean) / (0.5 * a + 1 - a),)


class ToyVAE(nn.Module):
    """Cells of 8x8 pixels. noises: what posterior samples take, in order; none: the mean."""

    def __init__(self, encoder: torch.Tensor, decoder: torch.Tensor, scale: float, noises=()):
        super().__init__()
        self.encoder, self.decoder = nn.Parameter(encoder), nn.Parameter(decoder)
        self.config, self.dtype = SimpleNamespace(scaling_factor=scale), torch.float32
        self.noises = iter(noises)

    def encode(self, picture):
        mean = mix(self.encoder, F.avg_pool2d(picture, 8))
        latent = mean + 0.3 * next(self.noises, torch.zeros_like(mean))
        return SimpleNamespace(
            latent_dist=SimpleNamespace(mode=lambda: latent, sample=lambda generator: latent)
        )

    def decode(self, z, return_dict=False):
        return (mix(self.decoder, z).tanh().repeat_interleave(8, 2).repeat_interleave(8, 3),)


def assemble(cls, **parts):
    """A pipeline of parts that its own constructor would refuse."""
    pipe = cls.__new__(cls)
    pipe._internal_dict = {}
    vars(pipe).update(parts, maybe_free_model_hooks=lambda: None)
    return pipe


def pixel_pipe(stored: dict, scheduler) -> DDPMPipeline:
    unet = ToyADM(stored["adm_M"], stored["adm_mu0"], stored["init"].shape[-1])
    return assemble(DDPMPipeline, unet=unet, scheduler=scheduler)


def latent_pipe(stored: dict, scheduler, scale: float = 0.18215, noises=()):
    """12x12 latents of 96x96 pixels."""
    return assemble(
        StableDiffusionPipeline,
        unet=ToyLatent(stored["eps_M"], stored["eps_P"], 12),
        vae=ToyVAE(stored["enc_W"], stored["dec_W"], scale, noises),
        scheduler=scheduler,
        tokenizer=None,
        vae_scale_factor=8,
        image_processor=VaeImageProcessor(vae_scale_factor=8),
    )


def clip(stored: dict, side: int, prefix: str = "") -> Clip:
    """16 numbers of a picture; every sentence is the stored one."""
    first, second = stored[f"{prefix}clip_W1"], stored[f"{prefix}clip_W2"]
    numbers = [torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, DEVIATION)]

    def see(x: torch.Tensor) -> torch.Tensor:
        pooled = F.adaptive_avg_pool2d(x, 4).flatten(1)
        return (pooled @ first.T).tanh() @ second.T

    return Clip("toy", side, *numbers, see, lambda lines: stored[f"{prefix}text_embed"])


def perceptual(stored: dict):
    """In LPIPS's place: pictures `n 3 h w`, `1 3 h w` -> `n`."""
    weights = stored["perc_w"].view(1, 3, 1, 1)

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        d = pool3(a) - pool3(b)
        return (weights * ((1 + 4 * d**2).sqrt() - 1)).mean((1, 2, 3))

    return distance
