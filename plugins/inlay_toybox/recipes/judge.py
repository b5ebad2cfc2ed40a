"""Recipe of the CLIP that only ever judges, and never guides.

A picture made by pleasing one CLIP pleases that CLIP. The judge has another width, depth and patch,
other weights to begin with, other scenes in another order, other corruptions, and sees mirrored
pictures, so that what fools the guide need not fool it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from inlay_toybox.recipes import clip
from inlay_toybox.training import UNSEEN

JUDGE = clip.Design(
    side=80,
    patch=10,
    width=112,
    layers=5,
    heads=7,
    text_width=112,
    embedding=80,
    seed=4,
    first=UNSEEN // 4,
    round_trips=0.3,
    extended=0.15,
    blurred=0.25,
    noisy=0.25,
    masked=0.1,
    close=0.4,
    grain=0.08,
    mirrored=0.5,
)


def train(
    minutes: float,
    out: Path,
    device: torch.device,
    resume: bool = False,
    start: Path | None = None,
    vae: Path | None = None,
    batch_size: int = 128,
    report_every: int = 25,
) -> Path:
    """Train, or go on training; the arguments are those of ``recipes.clip.train``."""
    return clip.train(
        minutes, out, device, resume, start, vae, batch_size, report_every, JUDGE, "judge"
    )
