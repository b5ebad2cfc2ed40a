"""Recipe of the autoencoder: stock ``AutoencoderKL``, f = 4, 8 latent channels."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from inlay_toybox import training
from inlay_toybox.training import UNSEEN, Average

KL_WEIGHT = 3e-4
OBJECT_WEIGHT = 2.0


def build() -> AutoencoderKL:
    """A fresh autoencoder: pictures ``[b, 3, s, s]`` in -1..1 to latents ``[b, 8, s/4, s/4]``."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def reconstruction_loss(
    out: torch.Tensor, target: torch.Tensor, objects: torch.Tensor
) -> torch.Tensor:
    """L1, squared and gradient error, objects weighted; pictures in -1..1."""
    weight = 1.0 + OBJECT_WEIGHT * objects
    error = out - target
    loss = (weight * (error.abs() + 2.0 * error.square())).mean()
    across = error[..., 1:] - error[..., :-1]
    down = error[..., 1:, :] - error[..., :-1, :]
    edges = (weight[..., 1:] * across.abs()).mean() + (weight[..., 1:, :] * down.abs()).mean()
    return loss + 0.5 * edges


@torch.no_grad()
def psnr(
    vae: AutoencoderKL, device: torch.device, size: int, n: int = 64
) -> tuple[float, torch.Tensor]:
    """PSNR in dB over ``n`` unseen scenes, and eight pairs (picture, reconstruction) for the
    eye.
    """
    images = training.batch(range(UNSEEN, UNSEEN + n), size, held_out=True).images.to(device)
    latents = vae.encode(images * 2 - 1).latent_dist.mode()
    back = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    error = (back - images).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean()), torch.cat([images[:8], back[:8]])


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, device: torch.device, size: int) -> None:
    """Set the shift and scale in the config that make latents zero-mean with unit variance."""
    images = training.batch(range(UNSEEN - 256, UNSEEN), size).images.to(device)
    latents = vae.encode(images * 2 - 1).latent_dist.mode()
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 4),
        scaling_factor=round(1 / float(latents.std()), 4),
    )


def train(
    minutes: float,
    out: Path,
    device: torch.device,
    size: int = 64,
    resume: bool = False,
    start: Path | None = None,
    batch_size: int = 16,
) -> Path:
    """Train, or go on training.

    A shipped autoencoder has transformers that know its latents. Going on from one trains the
    decoder alone and keeps the encoder, the shift and the scale, so that they stay valid.

    Args:
        minutes: wall-clock budget of the whole schedule.
        out: folder for state, loss curve and sample grid; the model is written to ``out/vae``.
        device: where to train.
        size: side of the pictures in pixels.
        resume: go on from ``out``, or else from the weights in ``start``.
        start: a model in the stock layout, usually the shipped one.

    Returns:
        The model's folder.
    """
    torch.manual_seed(0)
    further = resume and start is not None
    vae = (AutoencoderKL.from_pretrained(start).float() if further else build()).to(device)
    shipped = vae.encoder.conv_out.weight.detach().clone() if further else None
    if resume:
        training.load_state(out, Average({"vae": vae}))
    decoder_only = shipped is not None and torch.equal(shipped, vae.encoder.conv_out.weight)
    vae.encoder.requires_grad_(not decoder_only)

    def loss_of(step: int) -> torch.Tensor:
        data = training.batch(range(step * batch_size, (step + 1) * batch_size), size)
        target = (data.images * 2 - 1).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            back = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(back.float(), target, data.objects.to(device))
        return loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()

    step = training.fit({"vae": vae}, loss_of, out, minutes, resume, adamw=2e-3)
    decibel, pictures = psnr(vae, device, size)
    print(f"vae: {step} steps, PSNR {decibel:.2f} dB on unseen scenes", flush=True)
    training.save_grid(pictures, out / "samples.png")
    if not decoder_only:
        measure_latents(vae, device, size)
    vae.to(torch.bfloat16).save_pretrained(out / "vae")
    training.export_log(out, out / "vae")
    return out / "vae"
