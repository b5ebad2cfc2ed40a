"""Scenes rendered and encoded once, for the recipes that train on latents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from inlay_toybox import text, training

CAPTION_DROPOUT = 0.1
OBJECT_WEIGHT = 2.0
"""What the loss inside an object weighs more than elsewhere."""


@dataclass(frozen=True)
class Cache:
    """Encoded scenes. latents: float16 ``[n, tokens, 32]``, packed, zero mean, unit variance;
    objects: uint8 ``[n, tokens]``, share of the token inside an object times 255; captions:
    wordings of each scene."""

    latents: torch.Tensor
    objects: torch.Tensor
    captions: list[list[str]]


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Pictures ``[b, 3, s, s]`` in 0..1 to packed latents ``[b, (s/8)^2, 32]``."""
    latents = vae.encode(images.to(vae.dtype) * 2 - 1).latent_dist.mode().float()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def make_cache(
    folder: Path, vae: AutoencoderKL, n: int, size: int, device: torch.device, chunk: int = 250
) -> Cache:
    """Render and encode the scenes of seeds 0 to n - 1, or read them back from ``folder``.

    The files' names hold size, number and a digest of the autoencoder, so none is read by mistake.
    """
    digest = hashlib.sha256(vae.encoder.conv_out.weight.detach().float().cpu().numpy().tobytes())
    key = f"{size}-{n}-{digest.hexdigest()[:8]}"
    tensors, words = folder / f"latents-{key}.safetensors", folder / f"captions-{key}.json"
    if not (tensors.exists() and words.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        latents, objects, captions = [], [], []
        for first in range(0, n, chunk):
            data = training.batch(range(first, min(n, first + chunk)), size)
            with torch.autocast(device.type, torch.bfloat16):
                latents.append(encode(vae, data.images.to(device)).half().cpu())
            share = F.avg_pool2d(data.objects, 8).flatten(1)
            objects.append((share * 255).round().byte())
            captions += [text.wordings(s, first + i) for i, s in enumerate(data.scenes)]
        words.write_text(json.dumps(captions))
        save_file({"latents": torch.cat(latents), "objects": torch.cat(objects)}, tensors)
        print(f"cached {len(captions)} scenes", flush=True)
    stored = load_file(tensors)
    return Cache(stored["latents"], stored["objects"], json.loads(words.read_text()))


def samples(
    cache: Cache, size: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
    """Endless shuffled batches: latents, object shares, captions (some of them empty)."""
    n = len(cache.captions)
    while True:
        for rows in torch.randperm(n).split(size):
            if len(rows) < size:
                break
            which = torch.randint(4, (size,)).tolist()
            drop = (torch.rand(size) < CAPTION_DROPOUT).tolist()
            captions = [
                "" if d else cache.captions[i][w]
                for i, w, d in zip(rows.tolist(), which, drop, strict=True)
            ]
            shares = cache.objects[rows].to(device).float() / 255
            yield cache.latents[rows].to(device).float(), shares, captions
