"""Sample grids of the shipped models, drawn anew from their weights, nothing selected."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from inlay_toybox import path, training
from inlay_toybox.training import UNSEEN

if TYPE_CHECKING:
    from inlay_toybox.quality.exemplars import ExemplarItem

COUNT = 24


def draw(name: str, file: Path) -> str:
    """Write the sample grid of a model.

    Returns:
        What is to be seen on it, or "" where a model draws nothing.
    """
    if name not in SHEETS:
        return ""
    maker, caption = SHEETS[name]
    training.save_grid(maker(), file)
    return caption


def _prompts() -> list[str]:
    from inlay_toybox.quality.shares import PROMPTS, unseen_scenes

    return [scene.caption for scene in unseen_scenes(COUNT, PROMPTS)]


def _flux() -> torch.Tensor:
    from diffusers import FluxPipeline

    from inlay_toybox.quality.drawing import generate

    return generate(FluxPipeline.from_pretrained(path("flux")), _prompts(), seed=0)


def _sd() -> torch.Tensor:
    from diffusers import StableDiffusionPipeline

    from inlay_toybox.quality.drawing import generate

    return generate(StableDiffusionPipeline.from_pretrained(path("sd")), _prompts(), seed=0)


def _scenes() -> torch.Tensor:
    return training.batch(range(UNSEEN, UNSEEN + COUNT), 64, held_out=True).images


def _vae() -> torch.Tensor:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(path("flux") / "vae", torch_dtype=torch.float32)
    images = _scenes()[: COUNT // 2]
    with torch.no_grad():
        back = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample
    return torch.stack([images, back / 2 + 0.5], 1).flatten(0, 1)


def _detector() -> torch.Tensor:
    from inlay_toybox.detector import Detector

    images = _scenes()
    for image, found in zip(images, Detector.from_pretrained().detect(images, 0.3), strict=True):
        canvas = Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())
        pen = ImageDraw.Draw(canvas)
        for box in found.boxes.tolist():
            pen.rectangle(box, outline=(255, 220, 0))
        image.copy_(torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255)
    return images


def _gradients(name: str) -> torch.Tensor:
    """Scenes with an object, each followed by the strength of the gradient that pulls it towards
    the object's name, brightest where it is strongest.
    """
    from inlay_toybox import captions, world
    from inlay_toybox.quality.contrastive import Clip

    clip = Clip.load(path(name))
    seeds = iter(range(UNSEEN, 2 * UNSEEN))
    scenes = [s for s in (world.sample(next(seeds)) for _ in range(2 * COUNT)) if s.things]
    scenes = scenes[: COUNT // 2]
    drawn = np.stack([world.render(scene, 64).image for scene in scenes])
    images = (torch.from_numpy(drawn).permute(0, 3, 1, 2) / 255).requires_grad_()
    words = clip.read([captions.phrase(scene.things[0]) for scene in scenes])
    (gradient,) = torch.autograd.grad((clip.see(images) * words).sum(), images)
    strength = F.avg_pool2d(gradient.norm(dim=1, keepdim=True), 5, 1, 2)
    strength = strength / strength.amax((1, 2, 3), keepdim=True)
    return torch.stack([images.detach(), strength.expand_as(images)], 1).flatten(0, 1)


def _ddpm() -> torch.Tensor:
    from diffusers import DDPMPipeline

    from inlay_toybox.recipes import ddpm

    pipe = DDPMPipeline.from_pretrained(path("ddpm"))
    return ddpm.generate(pipe.unet.eval(), pipe.scheduler, COUNT, steps=100)


def _sam2() -> torch.Tensor:
    from inlay_toybox import segmenter
    from inlay_toybox.recipes.sam2 import sample

    return sample(segmenter.load(), UNSEEN, COUNT)


def _instructed(name: str) -> torch.Tensor:
    from inlay_toybox.quality.conditioned import additions, instructed, rendered

    asked = additions(COUNT // 2)
    pairs = [rendered([edit.before for edit in asked]), instructed(name, asked)]
    return torch.stack(pairs, 1).flatten(0, 1)


def _filled() -> torch.Tensor:
    from inlay_toybox.quality.conditioned import painted
    from inlay_toybox.quality.exemplars import exemplar_items

    items = list(exemplar_items(COUNT // 4))
    return _beside(items, painted(items))


def _imitated() -> torch.Tensor:
    from inlay_toybox.quality.conditioned import imitated
    from inlay_toybox.quality.exemplars import imitation_items

    items = list(imitation_items(COUNT // 4))
    return _beside(items, imitated(items))


def _beside(items: list[ExemplarItem], made: torch.Tensor) -> torch.Tensor:
    """Of each item the picture with a grey hole, the exemplar, what is drawn, the truth."""
    shown = [(i.picture, i.exemplar.resize((64, 64)), i.truth) for i in items]
    tiles = torch.from_numpy(np.stack([[np.array(p) for p in three] for three in shown]))
    tiles = tiles.permute(0, 1, 4, 2, 3) / 255
    holes = torch.stack([torch.from_numpy(item.region) for item in items])
    tiles[:, 0][holes[:, None].expand(-1, 3, -1, -1)] = 0.5
    return torch.cat([tiles[:, :2], made[:, None], tiles[:, 2:]], 1).flatten(0, 1)


SHEETS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "flux": (_flux, f"the first {COUNT} unseen prompts, not selected"),
    "sd": (_sd, f"the first {COUNT} unseen prompts, not selected"),
    "clip": (partial(_gradients, "clip"), "unseen scenes, and where the gradient of their name is"),
    "judge": (partial(_gradients, "judge"), "the same scenes to the judge"),
    "ddpm": (_ddpm, f"the first {COUNT} samples of 100 steps of its own scheduler, not selected"),
    "vae": (_vae, "unseen scenes, each followed by its round trip"),
    "detector": (_detector, "unseen scenes and the boxes found in them"),
    **{
        name: (partial(_instructed, name), "unseen scenes, each followed by what was to be added")
        for name in ("instruct", "magicbrush", "erasedraw")
    },
    "paint-by-example": (
        _filled,
        "unseen holes, the exemplar of each, what is drawn, and a right answer",
    ),
    "mimicbrush": (
        _imitated,
        "half objects and silhouettes to fill, the reference of each, what is drawn, and the truth",
    ),
    "sam2": (
        _sam2,
        "one random click per object in unseen scenes: right in green, too much in red, missing "
        "in blue",
    ),
}
