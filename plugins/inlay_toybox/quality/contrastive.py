"""How well a CLIP of the toybox names what it sees and finds the caption of a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from inlay_toybox import captions, path, world
from inlay_toybox.classes import BY_NAME, HELD_OUT, NAMES
from inlay_toybox.quality.shares import SCENES, Share, unseen_scenes
from inlay_toybox.recipes.clip import normalise
from inlay_toybox.training import UNSEEN

GROUP = 64
"""Captions among which a picture's own is to be found."""


@dataclass
class Clip:
    """A CLIP with its processor, in float32, as one function per tower."""

    model: CLIPModel
    processor: CLIPProcessor

    @classmethod
    def load(cls, folder: Path | None = None) -> Clip:
        """From a folder in the stock layout; toybox/clip by default."""
        folder = folder or path("clip")
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        return cls(model, CLIPProcessor.from_pretrained(folder))

    def see(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures ``[b, 3, s, s]`` in 0..1 to unit embeddings ``[b, d]``; gradients pass."""
        side = self.model.config.vision_config.image_size
        if images.shape[-1] != side:
            images = F.interpolate(images, size=side, mode="bicubic", antialias=True)
        out = self.model.get_image_features(pixel_values=normalise(images)).pooler_output
        return F.normalize(out, dim=-1)

    @torch.no_grad()
    def read(self, lines: list[str]) -> torch.Tensor:
        """Captions to unit embeddings ``[n, d]``."""
        tokens = self.processor.tokenizer(lines, padding=True, return_tensors="pt")
        return F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)


def degrade(images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Pictures ``[b, 3, 64, 64]`` in 0..1 as an early denoising preview shows them: 20 pixels of
    detail, and noise of standard deviation 0.1.
    """
    source = torch.Generator().manual_seed(seed)
    soft = F.interpolate(F.interpolate(images, size=20, mode="area"), size=64, mode="bicubic")
    return (soft + 0.1 * torch.randn(soft.shape, generator=source)).clamp(0, 1)


def zero_shot(n: int = 10, seed: int = 0, clip: Clip | None = None) -> dict[str, Share]:
    """Which of the 32 class names a picture of one object is nearest to.

    Args:
        n: unseen views of each class, in its own colours, over its grounds by chance.
        seed: of the views.
        clip: toybox/clip by default.

    Returns:
        ``classes``: nearest of "a cow", "a dog" …; ``captions``: nearest of the 32 captions that
        differ in the class alone ("a cow on the grass"); ``held_out``: likewise, over pairs held
        out of training, which the others leave out; ``degraded``: ``classes`` after ``degrade``.
    """
    clip = clip or Clip.load()
    shares = {key: Share() for key in ("classes", "captions", "held_out", "degraded")}
    names = clip.read([f"{BY_NAME[name].article} {name}" for name in NAMES])
    lines: dict[str, torch.Tensor] = {}
    for name in NAMES:
        scenes = world.views(name, n, UNSEEN + seed)
        images = _pictures(scenes)
        with torch.no_grad():
            seen, faint = clip.see(images), clip.see(degrade(images, seed))
        by_name, by_faint = (seen @ names.T).argmax(1), (faint @ names.T).argmax(1)
        for i, scene in enumerate(scenes):
            if scene.ground not in lines:
                lines[scene.ground] = clip.read([_line(other, scene.ground) for other in NAMES])
            hit = int((lines[scene.ground] @ seen[i]).argmax()) == NAMES.index(name)
            if (name, scene.ground) in HELD_OUT:
                shares["held_out"].add(hit)
                continue
            shares["captions"].add(hit)
            shares["classes"].add(int(by_name[i]) == NAMES.index(name))
            shares["degraded"].add(int(by_faint[i]) == NAMES.index(name))
    return shares


def _line(name: str, ground: str) -> str:
    return captions.caption([world.Thing(name, None, 0.5, 0.5, 0.5)], ground, sunset=False)


def _pictures(scenes: list[world.Scene]) -> torch.Tensor:
    drawn = np.stack([world.render(scene, 64).image for scene in scenes])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255


def retrieval(n: int = 4, clip: Clip | None = None) -> dict[str, Share]:
    """Which of ``GROUP`` captions of unseen scenes a picture is nearest to, and the other way
    round.

    Scenes that share a caption are left out of a group.

    Args:
        n: number of groups.
        clip: toybox/clip by default.

    Returns:
        ``caption``: pictures whose own caption is the nearest; ``picture``: captions whose own
        picture is.
    """
    clip = clip or Clip.load()
    shares = {key: Share() for key in ("caption", "picture")}
    unique: dict[str, world.Scene] = {}
    for scene in unseen_scenes(2 * n * GROUP + 50, SCENES):
        unique.setdefault(scene.caption, scene)
    chosen = list(unique.values())
    for first in range(0, n * GROUP, GROUP):
        scenes = chosen[first : first + GROUP]
        with torch.no_grad():
            cosine = clip.see(_pictures(scenes)) @ clip.read([s.caption for s in scenes]).T
        for i in range(len(scenes)):
            shares["caption"].add(int(cosine[i].argmax()) == i)
            shares["picture"].add(int(cosine[:, i].argmax()) == i)
    return shares
