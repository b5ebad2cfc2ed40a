"""How well the detector finds, on renders and after an autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from inlay_toybox import world
from inlay_toybox.detector import Detections, Detector, iou
from inlay_toybox.quality.shares import OVERLAP, SCENES, THRESHOLD, Share, unseen_scenes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def detector_accuracy(
    n: int = 400,
    seed: int = 0,
    detector: Detector | None = None,
    vae: AutoencoderKL | None = None,
    size: int = 64,
) -> dict[str, Share]:
    """How well the detector reads unseen scenes, or their round trips through an autoencoder.

    Objects of which less than a third is visible are not counted.

    Returns:
        ``objects``: found with the right class and at least half box overlap; ``presence``: class
        found anywhere; ``precision``: detections that match an object; ``masks``: found objects
        with at least half mask overlap.
    """
    detector = detector or Detector.from_pretrained()
    shares = {key: Share() for key in ("objects", "presence", "precision", "masks")}
    scenes = list(unseen_scenes(n, SCENES + seed * n))
    for first in range(0, n, 50):
        part = scenes[first : first + 50]
        drawn = [world.render(scene, size) for scene in part]
        images = torch.from_numpy(np.stack([d.image for d in drawn])).permute(0, 3, 1, 2) / 255
        if vae is not None:
            with torch.no_grad():
                latents = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode()
                images = (vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)
        for scene, truth, seen in zip(part, drawn, detector.detect(images, THRESHOLD), strict=True):
            compare(scene, truth, seen, shares)
    return shares


def compare(
    scene: world.Scene, truth: world.Rendering, seen: Detections, shares: dict[str, Share]
) -> None:
    """Count one picture's detections against the truth."""
    overlaps = iou(torch.from_numpy(truth.boxes), seen.boxes)
    for i, thing in enumerate(scene.things):
        alone = world.render(
            world.Scene(scene.ground, scene.sunset, scene.look, (thing,)), truth.image.shape[0]
        )
        if truth.masks[i].sum() * 3 < alone.masks[0].sum():
            continue
        match = [
            j
            for j, name in enumerate(seen.classes)
            if name == thing.name and overlaps[i, j] >= OVERLAP
        ]
        shares["objects"].add(bool(match))
        shares["presence"].add(thing.name in seen.classes)
        if match:
            mask, body = seen.masks[match[0]].numpy(), truth.masks[i]
            shares["masks"].add(bool((mask & body).sum() * 2 >= (mask | body).sum()))
    names = [t.name for t in scene.things]
    for j, name in enumerate(seen.classes):
        shares["precision"].add(name in names and bool(overlaps[names.index(name), j] >= OVERLAP))
