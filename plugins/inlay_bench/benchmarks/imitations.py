"""What MimicBrush measures (Chen et al., 2024): against the true picture within one object, against
the reference and a prompt across two."""

from __future__ import annotations

import torch
from torch import Tensor

from inlay_bench.benchmarks.measures import TRUTH, known
from inlay_bench.measures import Column, Evidence, Numbers, measure, number
from inlay_bench.metrics import clip, perceptual, pixels, region
from inlay_config.images import to_tensor

ACROSS = "Across objects"


@measure(
    "within",
    TRUTH,
    Column("ssim_within", "SSIM", "against the true picture, of items that know it (Within)"),
    Column("psnr_within", "PSNR, dB", "likewise", digits=2, unit="dB"),
)
def within(e: Evidence) -> Numbers:
    true = _truth(e)
    if true is None:
        return {"ssim_within": None, "psnr_within": None}
    return {
        "ssim_within": number(pixels.ssim(true, e.picture)),
        "psnr_within": number(pixels.psnr(true, e.picture)),
    }


@measure(
    "within-lpips",
    TRUTH,
    Column("lpips_within", "LPIPS", "likewise, perceptual distance", better="lower"),
    networks=("lpips",),
)
def within_lpips(e: Evidence) -> Numbers:
    true = _truth(e)
    if true is None:
        return {"lpips_within": None}
    return {"lpips_within": number(perceptual.lpips(e.networks["lpips"], true, e.picture))}


@measure(
    "across",
    ACROSS,
    Column("dino_reference", "DINO-I", "100 times the cosine of the region's box and the marked "
           "part of the reference, of items without a true picture (Cross)", digits=2),
    Column("clip_reference", "CLIP-I", "likewise, through CLIP", digits=2),
    Column("clip_prompt", "CLIP-T", "100 times the cosine of the region's box and its prompt; left "
           "out where there is none", digits=2),
    networks=("judge", "dino"),
)  # fmt: skip
def across(e: Evidence) -> Numbers:
    numbers: Numbers = dict.fromkeys(("dino_reference", "clip_reference", "clip_prompt"))
    if _truth(e) is not None:
        return numbers
    left, top, right, bottom = region.crop(known(e, "region"))
    made = e.picture[..., top:bottom, left:right]
    shown = to_tensor(e.item.given["shown"])
    for name in ("dino", "judge"):
        network = e.networks[name]
        cosine = torch.cosine_similarity(network.images(made), network.images(shown))
        numbers["dino_reference" if name == "dino" else "clip_reference"] = 100 * float(cosine)
    if words := e.item.texts["target"]:
        cosine = clip.text_similarity(e.networks["judge"], made, [words])
        numbers["clip_prompt"] = 100 * float(cosine)
    return numbers


def _truth(e: Evidence) -> Tensor | None:
    """The true picture, `1 3 h w` in 0..1; None across objects."""
    from PIL import Image

    true = e.item.truth.get("picture")
    return None if true is None else to_tensor(Image.fromarray(true))
