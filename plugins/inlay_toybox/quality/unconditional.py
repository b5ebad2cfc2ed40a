"""How real the pictures of the unconditional model look, to the detector and to the judge."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline

from inlay_toybox import path, world
from inlay_toybox.detector import Detector
from inlay_toybox.quality.contrastive import Clip
from inlay_toybox.quality.shares import THRESHOLD, Share
from inlay_toybox.recipes import ddpm
from inlay_toybox.training import UNSEEN

REAL = UNSEEN + 4_000_000
"""First seed of the real scenes, counted in no other measurement."""


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance of two sets of features ``[n, d]``, as Gaussians (Heusel et al. 2017)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return float(apart + cov_a.trace() + cov_b.trace() - 2 * mixed)


def _scenes(first: int, n: int) -> torch.Tensor:
    drawn = [world.render(world.sample(first + i), ddpm.SIZE).image for i in range(n)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255


def _occupied(images: torch.Tensor, detector: Detector) -> Share:
    found = [d for part in images.split(50) for d in detector.detect(part, THRESHOLD)]
    return Share(sum(bool(d.classes) for d in found), len(found))


def unconditional_quality(
    n: int = 256,
    seed: int = 0,
    steps: int = 100,
    pipe: DDPMPipeline | None = None,
    judge: Clip | None = None,
) -> dict[str, Any]:
    """Samples beside as many unseen scenes.

    Args:
        n: number of samples, and of scenes in each of two sets.
        seed: of the samples' noise.
        steps: of the model's own schedule.
        pipe: toybox/ddpm by default.
        judge: toybox/judge by default.

    Returns:
        ``objects``: samples in which the detector finds an object; ``real_objects``: likewise, of
        unseen scenes, some of which are empty; ``frechet``: Fréchet distance between samples and
        scenes in the judge's unit embeddings; ``split_half``: the same between two sets of scenes,
        the best that can be reached.
    """
    pipe = pipe or DDPMPipeline.from_pretrained(path("ddpm"))
    judge = judge or Clip.load(path("judge"))
    detector = Detector.from_pretrained()
    unet = pipe.unet.eval()
    drawn = ddpm.generate(unet, pipe.scheduler, n, seed, steps)
    real, other = _scenes(REAL, n), _scenes(REAL + n, n)
    with torch.no_grad():
        seen, seen_other, seen_drawn = (judge.see(images) for images in (real, other, drawn))
    return {
        "objects": _occupied(drawn, detector),
        "real_objects": _occupied(real, detector),
        "frechet": frechet(seen_drawn, seen),
        "split_half": frechet(seen_other, seen),
    }
