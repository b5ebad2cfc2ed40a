"""Measures of pictures that were made from an exemplar, against the truth of the toybox."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from inlay_bench.measures import (
    BACKGROUND,
    THRESHOLD,
    Column,
    Evidence,
    Numbers,
    grown,
    measure,
    number,
)
from inlay_bench.metrics import perceptual, pixels, region
from inlay_config.errors import InputError
from inlay_config.images import to_pil, to_tensor

IDENTITY, REGION, TRUTH = "The exemplar's object", "The region", "Against the true picture"
SCALES = (0.55, 0.7, 0.85, 1.0)  # of an exemplar in a region, where a copy is looked for


def region_of(e: Evidence) -> Tensor:
    """Pixels `h w` that a method was asked to fill. Raises InputError when the item has none."""
    if "region" not in e.item.truth:
        raise InputError("no region is known", where=f"item {e.item.id}")
    return torch.from_numpy(e.item.truth["region"])


def within(e: Evidence) -> tuple[list[str], list[Tensor]]:
    """Classes and masks `h w` of the detector's objects that lie in the region by half or more,
    surest first."""
    hole = region_of(e)
    seen = e.networks["detector"].detect(e.picture, THRESHOLD)[0]
    inside = [
        (name, mask)
        for name, mask in zip(seen.classes, seen.masks, strict=True)
        if mask.any() and int((mask & hole).sum()) * 2 >= int(mask.sum())
    ]
    return [name for name, _ in inside], [mask for _, mask in inside]


@measure(
    "exemplar-identity",
    IDENTITY,
    Column("identity", "class", "the surest object in the region has the exemplar's class",
           mark="its class"),
    Column("colour", "colour", "its paint is nearest to the exemplar's of all that the class has; "
           "classes of one colour, and pictures without an object of the class, are left out",
           mark="its colour"),
    Column("likeness", "class and colour", "both, as far as the class has colours; a picture "
           "without the object is a 0"),
    Column("any_of_class", "anywhere among", "some object in the region has the class"),
    networks=("detector",),
)  # fmt: skip
def exemplar_identity(e: Evidence) -> Numbers:
    from inlay_toybox.classes import BY_NAME
    from inlay_toybox.quality.exemplars import right_colour

    name, (names, masks) = e.item.facts["class"], within(e)
    right = bool(names) and names[0] == name
    colour = None
    if name in names and BY_NAME[name].colours:
        body = masks[names.index(name)].numpy()
        image = np.asarray(to_pil(e.picture)[0])
        colour = float(right_colour(image, body, name, e.item.facts["colour"]))
    both = float(right) * (1.0 if colour is None else colour)
    return {
        "identity": float(right),
        "colour": colour,
        "likeness": both,
        "any_of_class": float(name in names),
    }


@measure(
    "texture",
    IDENTITY,
    Column("texture", "texture", "how much the colours of the object of the exemplar's class share "
           "with those of the true object, in the scene's own light: 1 is all of them; pictures "
           "without an object of the class are left out"),
    networks=("detector",),
)  # fmt: skip
def texture(e: Evidence) -> Numbers:
    """Intersection of histograms (Swain and Ballard, 1991) in CIELAB."""
    names, masks = within(e)
    if e.item.facts["class"] not in names:
        return {"texture": None}
    mine = _colours(e.picture, masks[names.index(e.item.facts["class"])].numpy())
    return {"texture": float(np.minimum(mine, _colours(_truth(e), e.item.truth["mask"])).sum())}


def _colours(picture: Tensor, mask: np.ndarray) -> np.ndarray:
    """How much of a mask `h w` of a picture `1 3 h w` has each colour: 5 bins of lightness, 10 of
    either opponent axis, smoothed by a bin."""
    from scipy.ndimage import gaussian_filter
    from skimage.color import rgb2lab

    lab = rgb2lab(picture[0].permute(1, 2, 0).numpy())[mask]
    ranges = ((0, 100), (-100, 100), (-100, 100))
    counts, _ = np.histogramdd(lab, bins=(5, 10, 10), range=ranges)
    found: np.ndarray = gaussian_filter(counts / len(lab), 1, mode="constant")
    return found / found.sum()


@measure(
    "region-clip",
    REGION,
    Column("region_clip", "CLIP score", "100 times the cosine of the region's box and the exemplar "
           "(Paint by Example), both squashed to the encoder's square", digits=2),
    networks=("judge",),
)  # fmt: skip
def region_clip(e: Evidence) -> Numbers:
    exemplar = to_tensor(e.item.given["exemplar"])
    score = region.region_score(e.networks["judge"], e.picture, region_of(e), exemplar)
    return {"region_clip": score}


@measure(
    "region-clip-published",
    REGION,
    Column("region_clip_published", "CLIP score, as published", "likewise, the region without its "
           "last row and column, the exemplar squashed by Pillow", digits=2),
    networks=("judge",),
)  # fmt: skip
def region_clip_published(e: Evidence) -> Numbers:
    from PIL import Image

    judge = e.networks["judge"]
    size = (judge.side, judge.side)
    exemplar = e.item.given["exemplar"].convert("RGB").resize(size, Image.Resampling.BICUBIC)
    try:
        score = region.region_score(
            judge, e.picture, region_of(e), to_tensor(exemplar), "reference"
        )
    except ValueError:  # the published crop of this mask is empty
        return {"region_clip_published": None}
    return {"region_clip_published": score}


@measure(
    "copied",
    REGION,
    Column("copied", "copied", "highest correlation of the exemplar, background and all, at any "
           "place and scale in the region: 1 is a pasted rectangle", better="lower"),
)  # fmt: skip
def copied(e: Evidence) -> Numbers:
    """Normalised cross-correlation of luminance (Lewis, 1995)."""
    from PIL import Image
    from skimage.feature import match_template

    left, top, right, bottom = region.crop(region_of(e))
    crop = np.asarray(to_pil(e.picture)[0].convert("L"), np.float64)[top:bottom, left:right]
    exemplar = e.item.given["exemplar"].convert("L")
    fit = min(crop.shape[1] / exemplar.width, crop.shape[0] / exemplar.height)
    best = -1.0
    for scale in SCALES:
        size = [max(int(side * fit * scale), 2) for side in exemplar.size]
        if min(size) <= min(crop.shape[::-1]):
            shown = np.asarray(
                exemplar.resize((size[0], size[1]), Image.Resampling.BOX), np.float64
            )
            best = max(best, float(match_template(crop, shown).max()))
    return {"copied": best}


@measure(
    "around-object",
    REGION,
    Column("psnr_around", "PSNR around, dB", "against the input, in the region but outside the "
           "object that was found and the true object's footprint: the scene goes on there",
           digits=1, unit="dB"),
    networks=("detector",),
)  # fmt: skip
def around_the_object(e: Evidence) -> Numbers:
    _, masks = within(e)
    rest = region_of(e) & ~e.footprint
    for mask in masks[:1]:
        rest = rest & ~grown(mask)
    return {"psnr_around": number(pixels.psnr(e.source, e.picture, rest[None, None]))}


@measure(
    "outside-region",
    BACKGROUND,
    Column("psnr_outside", "PSNR, dB", "against the input, outside the region; "
           f"{pixels.CEILING:g} = equal", digits=1),
    Column("ssim_outside", "SSIM", "likewise, structural similarity"),
)  # fmt: skip
def outside_region(e: Evidence) -> Numbers:
    rest = ~region_of(e)[None, None]
    return {
        "psnr_outside": number(pixels.psnr(e.source, e.picture, rest)),
        "ssim_outside": number(pixels.ssim(e.source, e.picture, rest)),
    }


@measure(
    "true-region",
    TRUTH,
    Column("psnr_true", "PSNR, dB", "against the true picture, in the region", digits=2),
    Column("ssim_true", "SSIM", "likewise, structural similarity"),
)
def true_region(e: Evidence) -> Numbers:
    true, hole = _truth(e), region_of(e)[None, None]
    return {
        "psnr_true": number(pixels.psnr(true, e.picture, hole)),
        "ssim_true": number(pixels.ssim(true, e.picture, hole)),
    }


@measure(
    "true-region-lpips",
    TRUTH,
    Column("lpips_true", "LPIPS", "likewise, perceptual distance", better="lower"),
    networks=("lpips",),
)
def true_region_lpips(e: Evidence) -> Numbers:
    hole = region_of(e)[None, None]
    return {"lpips_true": number(perceptual.lpips(e.networks["lpips"], _truth(e), e.picture, hole))}


def _truth(e: Evidence) -> Tensor:
    """The true picture, `1 3 h w` in 0..1."""
    from PIL import Image

    return to_tensor(Image.fromarray(e.item.truth["picture"]))
