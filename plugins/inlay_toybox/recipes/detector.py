"""Recipe of the detector: trained on renders, on their round trips through the autoencoder, and on
both blurred and noisy, so that it reads generated pictures as well as drawn ones."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from einops import einsum
from torch.nn import functional as F

from inlay_toybox import training
from inlay_toybox.classes import NAMES
from inlay_toybox.detector import SIDE, STRIDE, Detector
from inlay_toybox.training import UNSEEN, Batch

ROUND_TRIPS = 0.3
CELLS = SIDE // STRIDE


def targets(data: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the detector should answer.

    Returns:
        Heat ``[b, c, 16, 16]``, 1 at each object's centre cell and a Gaussian around it, and the
        objects as rows ``[n, 9]``: picture, row, column, the four distances in pixels, index in
        the picture, class.
    """
    heat = torch.zeros(len(data.scenes), len(NAMES), CELLS, CELLS)
    line = torch.arange(CELLS).float()
    rows = []
    for b, (scene, drawn) in enumerate(zip(data.scenes, data.renderings, strict=True)):
        for i, (thing, box) in enumerate(zip(scene.things, drawn.boxes.tolist(), strict=True)):
            left, top, right, bottom = box
            if (right - left) * (bottom - top) < 16:
                continue
            column, row = (int(v / STRIDE) for v in ((left + right) / 2, (top + bottom) / 2))
            column, row = min(column, CELLS - 1), min(row, CELLS - 1)
            spread = max(0.6, 0.12 * max(right - left, bottom - top) / STRIDE)
            bump = -((line - column) ** 2 + (line[:, None] - row) ** 2) / (2 * spread**2)
            kind = NAMES.index(thing.name)
            heat[b, kind] = torch.maximum(heat[b, kind], bump.exp())
            x, y = (column + 0.5) * STRIDE, (row + 0.5) * STRIDE
            rows.append([b, row, column, x - left, y - top, right - x, bottom - y, i, kind])
    return heat, torch.tensor(rows).reshape(-1, 9)


def detection_loss(
    outputs: tuple[torch.Tensor, ...], data: Batch, device: torch.device
) -> torch.Tensor:
    """Focal loss on the heat, L1 on the sides, cross-entropy on the masks."""
    heat, sides, mix, prototypes = (t.float() for t in outputs)
    goal, rows = (t.to(device) for t in targets(data))
    p = heat.sigmoid().clamp(1e-5, 1 - 1e-5)
    hit = goal > 0.999
    focal = torch.where(
        hit, (1 - p) ** 2 * p.log(), (1 - goal) ** 4 * p**2 * (1 - p).log()
    ).sum() / -max(1, int(hit.sum()))
    if not len(rows):
        return focal
    b, row, column = (rows[:, k].long() for k in range(3))
    side = (sides[b, :, row, column] - rows[:, 3:7]).abs().mean()
    logits = einsum(mix[b, :, row, column], prototypes[b], "n k, n k h w -> n h w")
    truth = torch.stack(
        [
            torch.from_numpy(data.renderings[i].masks[j]).float()
            for i, j in zip(b.tolist(), rows[:, 7].long().tolist(), strict=True)
        ]
    ).to(device)
    truth = F.avg_pool2d(truth[:, None], 2)[:, 0]
    x = (torch.arange(32, device=device) * 2 + 1)[None, None]
    y = x.transpose(1, 2)
    left, top = (column + 0.5) * STRIDE - rows[:, 3], (row + 0.5) * STRIDE - rows[:, 4]
    right, bottom = (column + 0.5) * STRIDE + rows[:, 5], (row + 0.5) * STRIDE + rows[:, 6]
    near = [v[:, None, None] for v in (left - 3, right + 3, top - 3, bottom + 3)]
    inside = ((x > near[0]) & (x < near[1]) & (y > near[2]) & (y < near[3])).float()
    mask = F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * inside
    return focal + 0.1 * side + (mask.sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)).mean()


@torch.no_grad()
def disturb(images: torch.Tensor, vae: AutoencoderKL | None) -> torch.Tensor:
    """Some pictures through the autoencoder with noisy latents, some blurred, some noisy."""
    b = len(images)
    images = images.clone()
    if vae is not None:
        chosen = torch.rand(b) < ROUND_TRIPS
        with torch.autocast(images.device.type, torch.bfloat16):
            latents = vae.encode(images[chosen] * 2 - 1).latent_dist.mode()
            level = 0.35 * torch.rand(len(latents), 1, 1, 1, device=images.device)
            level = level / vae.config.scaling_factor
            latents = latents + level * torch.randn_like(latents)
            images[chosen] = (vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)
    soft = torch.rand(b) < 0.3
    blurred = F.avg_pool2d(F.pad(images[soft], (1, 1, 1, 1), mode="replicate"), 3, 1)
    images[soft] = torch.lerp(images[soft], blurred, torch.rand(len(blurred), 1, 1, 1).to(images))
    grain = (torch.rand(b) < 0.3).float()[:, None, None, None] * 0.05 * torch.rand(b, 1, 1, 1)
    light = 1 + 0.1 * (torch.rand(b, 1, 1, 1) - 0.5)
    return (images * light.to(images) + grain.to(images) * torch.randn_like(images)).clamp(0, 1)


def train(
    minutes: float,
    out: Path,
    device: torch.device,
    resume: bool = False,
    start: Path | None = None,
    vae: Path | None = None,
    batch_size: int = 32,
    report_every: int = 100,
) -> Path:
    """Train, or go on training.

    Args:
        minutes: wall-clock budget of the whole schedule.
        out: folder for state, loss curve and sample grid; the model is written to ``out/detector``.
        device: where to train.
        resume: go on from ``out``, or else from the weights in ``start``.
        start: a saved detector, usually the shipped one.
        vae: an autoencoder for the round trips; none are made without it.
        batch_size: scenes per step.
        report_every: steps between two lines of the log.

    Returns:
        The detector's folder.
    """
    torch.manual_seed(1)
    model = (Detector.from_pretrained(start) if resume and start else Detector()).to(device).train()
    coder = AutoencoderKL.from_pretrained(vae).float().to(device) if vae else None

    def loss_of(step: int) -> torch.Tensor:
        first = UNSEEN // 2 + step * batch_size
        data = training.batch(range(first, first + batch_size), SIDE)
        images = disturb(data.images.to(device), coder)
        with torch.autocast(device.type, torch.bfloat16):
            outputs = model(images)
        return detection_loss(outputs, data, device)

    training.fit(
        {"detector": model},
        loss_of,
        out,
        minutes,
        resume,
        seed=1,
        adamw=2e-3,
        clip=2.0,
        report_every=report_every,
    )
    images = training.batch(range(UNSEEN, UNSEEN + 16), SIDE).images.to(device)
    training.save_grid(disturb(images, coder), out / "samples.png")
    model.save_pretrained(out / "detector")
    training.export_log(out, out / "detector")
    return out / "detector"
