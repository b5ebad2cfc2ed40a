"""What the papers measure of their benchmarks. Networks are named by the task or by --network."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from inlay_bench.benchmarks.dino import Dino, structure_distance
from inlay_bench.benchmarks.grounding import GroundingDino, new_boxes
from inlay_bench.measures import (
    BACKGROUND,
    BOXES,
    MEANING,
    NETWORKS,
    OBJECT,
    Column,
    Evidence,
    Numbers,
    measure,
    number,
)
from inlay_bench.metrics import affordance, clip, perceptual, pixels
from inlay_config.errors import InputError
from inlay_config.images import to_pil, to_tensor

TRUTH, LIKENESS, STRUCTURE = "Against the true picture", "Against the input", "Structure"

NETWORKS["dino"] = lambda where="facebook/dino-vits16": Dino.from_pretrained(where)
NETWORKS["structure"] = lambda where="facebook/dino-vitb8": Dino.from_pretrained(where)
NETWORKS["grounding"] = lambda where="IDEA-Research/grounding-dino-base": (
    GroundingDino.from_pretrained(where)
)


def known(e: Evidence, name: str) -> Tensor:
    """A truth of the item as a tensor. Raises InputError when it has none."""
    if name not in e.item.truth:
        raise InputError(f"no {name} is known", where=f"item {e.item.id}")
    return torch.from_numpy(e.item.truth[name])


@lru_cache(maxsize=4)
def seen(e: Evidence) -> Tensor:
    """Boxes `n 4` of the subject in the picture; none where nobody named a subject."""
    phrase = e.item.texts["subject"]
    return e.networks["grounding"].find(e.picture, phrase) if phrase else torch.zeros(0, 4)


@measure(
    "inclusion-grounding",
    OBJECT,
    Column(
        "inclusion", "inclusion", "Grounding-DINO finds the subject in the picture", mark="found"
    ),
    networks=("grounding",),
)
def inclusion(e: Evidence) -> Numbers:
    return {"inclusion": float(len(seen(e)) > 0) if e.item.texts["subject"] else None}


@measure(
    "affordance-grounding",
    BOXES,
    Column(
        "affordance_single",
        "one box",
        "Add-it's definition: the share of a picture's new objects with half of their box inside "
        "one of the item's boxes; pictures without a new object are left out",
        mark="placed",
    ),
    Column("affordance_single_all", "one box, none found = 0", "likewise, without a new object 0"),
    Column("affordance_union", "all boxes", "inside all of the item's boxes together"),
    Column("affordance_union_all", "all boxes, none found = 0", "likewise, no new object is 0"),
    networks=("grounding",),
)
def affordance_by_boxes(e: Evidence) -> Numbers:
    """Detections that the input shows as well (intersection over union of half) are not new."""
    before = e.networks["grounding"].find(e.source, e.item.texts["subject"])
    added = new_boxes(before, seen(e))
    allowed = torch.tensor(e.item.facts["boxes"], dtype=torch.float64)
    numbers: Numbers = {}
    for name, share in (("single", affordance.single), ("union", affordance.union)):
        score = affordance.picture_score(share(added, allowed))
        numbers |= {f"affordance_{name}": score, f"affordance_{name}_all": score or 0.0}
    return numbers


@measure(
    "likeness",
    LIKENESS,
    Column("l1_input", "L1", "mean absolute difference to the input, 0..1", better="lower"),
    Column("dino_input", "DINO", "cosine of the pictures before and after"),
    networks=("dino",),
)
def likeness(e: Evidence) -> Numbers:
    """L1 and DINO of the Emu Edit evaluation (Sheynin et al., 2023)."""
    return {
        "l1_input": number(pixels.l1(e.source, e.picture)),
        "dino_input": number(_cosine(e.networks["dino"], e.source, e.picture)),
    }


@measure(
    "true-pixels",
    TRUTH,
    Column("l1", "L1", "mean absolute difference, 0..1", better="lower", digits=4),
    Column("l2", "L2", "mean squared difference, 0..1", better="lower", digits=4),
)
def true_pixels(e: Evidence) -> Numbers:
    """L1 and L2 of MagicBrush (Zhang et al., 2023)."""
    (made,), (target,) = to_pil(e.picture), to_pil(_target(e))
    l1, l2 = pixels.magicbrush(made, target)
    return {"l1": l1, "l2": l2}


@measure(
    "true-features",
    TRUTH,
    Column("clip_target", "CLIP-I", "cosine with the true picture"),
    Column("dino_target", "DINO", "likewise, of DINO's class token"),
    Column("clip_local", "CLIP-T", "cosine with the local description, else the caption"),
    networks=("judge", "dino"),
)
def true_features(e: Evidence) -> Numbers:
    """CLIP-I, DINO and CLIP-T of MagicBrush (Zhang et al., 2023)."""
    judge, target = e.networks["judge"], _target(e)
    words = e.item.texts.get("local") or e.item.texts["target"]
    return {
        "clip_target": number(clip.image_similarity(judge, e.picture, target)),
        "dino_target": number(_cosine(e.networks["dino"], e.picture, target)),
        "clip_local": number(clip.text_similarity(judge, e.picture, [words])),
    }


@measure(
    "structure",
    STRUCTURE,
    Column(
        "structure",
        "distance ×10³",
        "of the self-similarity of DINO's last keys, before and after",
        better="lower",
        digits=2,
    ),
    networks=("structure",),
)
def structure(e: Evidence) -> Numbers:
    distance = structure_distance(e.networks["structure"], e.source, e.picture)
    return {"structure": 1000 * float(distance)}


@measure(
    "masked-background",
    BACKGROUND,
    Column(
        "psnr",
        "PSNR, dB",
        "as PIE-Bench computes it: the region to edit is black in both pictures and counts as "
        f"equal; {pixels.CEILING:g} = equal; a region that is the whole picture has no background",
        digits=2,
        unit="dB",
    ),
    Column("mse", "MSE ×10⁴", "likewise", better="lower", digits=2),
    Column("ssim", "SSIM ×10²", "likewise", digits=2),
    Column(
        "psnr_outside", "PSNR outside, dB", "over the pixels outside the region alone", digits=2
    ),
)
def masked_background(e: Evidence) -> Numbers:
    x, y, outside = _blacked(e)
    if not outside.any():
        return dict.fromkeys(("psnr", "mse", "ssim", "psnr_outside"))
    return {
        "psnr": number(pixels.psnr(x, y)),
        "mse": 1e4 * float(pixels.l2(x, y)),
        "ssim": 100 * float(structural_similarity_index_measure(y, x, data_range=1.0)),
        "psnr_outside": number(pixels.psnr(x, y, outside)),
    }


@measure(
    "masked-lpips",
    BACKGROUND,
    Column("lpips", "LPIPS ×10³", "likewise, perceptual distance", better="lower", digits=2),
    networks=("lpips",),
)
def masked_lpips(e: Evidence) -> Numbers:
    x, y, outside = _blacked(e)
    if not outside.any():
        return {"lpips": None}
    return {"lpips": 1000 * float(perceptual.lpips(e.networks["lpips"], x, y))}


@measure(
    "clip-score",
    MEANING,
    Column("clip_whole", "whole", "100 times the cosine of the picture and its prompt", digits=2),
    Column("clip_edited", "edited", "likewise, all black but the region to edit", digits=2),
    networks=("judge",),
)
def clip_score(e: Evidence) -> Numbers:
    """The CLIP similarities of PIE-Bench (Ju et al., 2024), never below 0."""
    judge, words = e.networks["judge"], [e.item.texts["target"]]
    region = known(e, "mask")[None, None]
    pictures = {"whole": e.picture, "edited": e.picture * region}
    return {
        f"clip_{name}": 100 * max(0.0, float(clip.text_similarity(judge, x, words)))
        for name, x in pictures.items()
    }


def _blacked(e: Evidence) -> tuple[Tensor, Tensor, Tensor]:
    """Both pictures with the region to edit black, and what is outside it, bool `1 1 h w`."""
    outside = ~known(e, "mask")[None, None]
    return e.source * outside, e.picture * outside, outside


def _target(e: Evidence) -> Tensor:
    """The true picture, `1 3 h w` in 0..1."""
    from PIL import Image

    return to_tensor(Image.fromarray(known(e, "target").numpy()))


def _cosine(network: Dino, x: Tensor, y: Tensor) -> Tensor:
    return F.cosine_similarity(network.images(x), network.images(y))
