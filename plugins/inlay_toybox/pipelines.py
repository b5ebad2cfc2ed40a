"""What the recipes of text-to-image pipelines share: how one is written, and looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from inlay_toybox import training, world
from inlay_toybox.training import UNSEEN


def save(
    pipe: DiffusionPipeline, denoiser: nn.Module, folder: Path, settings: dict[str, Any]
) -> None:
    """Write the pipeline in the stock layout, with the recommended settings.

    Denoiser and autoencoder are written in bfloat16. The small text encoders stay in float32:
    transformers loads a model in the type of its file, diffusers in float32 unless told otherwise,
    and a plain ``from_pretrained(folder)`` should give a pipeline of one type.
    """
    large = (denoiser, pipe.vae)
    held = [module.dtype for module in large]
    for module in large:
        module.to(torch.bfloat16)
    pipe.save_pretrained(folder)
    for module, dtype in zip(large, held, strict=True):
        module.to(dtype)
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")


def preview(pipe: DiffusionPipeline, file: Path, settings: dict[str, Any], n: int = 24) -> None:
    """Pictures of ``n`` unseen captions in 16 steps, for the eye."""
    captions = [world.sample(UNSEEN + i, True, 1 + i % 2).caption for i in range(n)]
    pipe.set_progress_bar_config(disable=True)
    call = settings | {"num_inference_steps": 16, "negative_prompt": [""] * n}
    generator = torch.Generator().manual_seed(0)
    out = pipe(captions, **call, generator=generator, output_type="pt").images
    training.save_grid(out.float(), file)
