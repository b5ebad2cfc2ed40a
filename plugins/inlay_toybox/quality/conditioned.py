"""How often the models that take more than a prompt do what they are told or shown."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from inlay_config.images import to_pil
from inlay_plugins import masks
from inlay_toybox import edits, path, world
from inlay_toybox.detector import Detector
from inlay_toybox.quality.exemplars import (
    ExemplarItem,
    exemplar_items,
    imitation_items,
    right_colour,
)
from inlay_toybox.quality.shares import INSTRUCTIONS, THRESHOLD, Share
from inlay_toybox.training import UNSEEN

STEPS, BATCH = 20, 10
SEEDS = 1_000_000  # between the first seeds of two sets of pictures of the same items

Draw = Callable[[list[ExemplarItem]], torch.Tensor]
"""Items -> pictures ``[n, 3, h, w]`` in 0..1."""


def additions(n: int) -> list[edits.Edit]:
    """Instructions to add an object of a class that is not there to scenes that no recipe trained
    on.
    """
    drawn = (edits.draw(UNSEEN + INSTRUCTIONS + i, ["add"]) for i in count())
    return list(islice((edit for edit in drawn if new_classes(edit)), n))


def new_classes(edit: edits.Edit) -> set[str]:
    """Classes that the edit brings."""
    after, before = ({t.name for t in scene.things} for scene in (edit.after, edit.before))
    return after - before


def rendered(scenes: list[world.Scene]) -> torch.Tensor:
    """Scenes as ``[n, 3, h, w]`` in 0..1."""
    images = [torch.from_numpy(world.render(scene).image) for scene in scenes]
    return torch.stack(images).permute(0, 3, 1, 2) / 255


def instructed(name: str, asked: list[edits.Edit]) -> torch.Tensor:
    """What a model makes of each scene and its instruction, ``[n, 3, h, w]`` in 0..1, at s_T = 3
    and s_I = 1.5.
    """
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(path(name))
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for first in range(0, len(asked), BATCH):
        part = asked[first : first + BATCH]
        made = pipe(
            [edit.instruction for edit in part],
            rendered([edit.before for edit in part]),
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            image_guidance_scale=1.5,
            generator=torch.Generator().manual_seed(first),
            output_type="pt",
        )
        drawn.append(made.images.float())
    return torch.cat(drawn)


def instruction_quality(name: str, n: int) -> dict[str, Any]:
    """Returns ``added``: scenes in which the detector finds the object that was to be added;
    ``before``: those in which it found it already; ``kept``: PSNR in dB where nothing was to
    change.
    """
    asked = additions(n)
    before, after = (rendered([getattr(e, k) for e in asked]) for k in ("before", "after"))
    made, detector = instructed(name, asked), Detector.from_pretrained()
    shares = {"added": Share(), "before": Share()}
    for key, pictures in (("added", made), ("before", before)):
        for edit, found in zip(asked, detector.detect(pictures, THRESHOLD), strict=True):
            shares[key].add(new_classes(edit) <= set(found.classes))
    same = ((before - after).abs().amax(1, keepdim=True) == 0).expand_as(before)
    error = (made - before).square()[same].mean()
    return {**shares, "kept": float(-10 * error.log10())}


def painted(
    items: list[ExemplarItem], folder: Path | None = None, guidance: float = 5.0, seed: int = 0
) -> torch.Tensor:
    """What the stock pipeline makes of holes and exemplars, ``[n, 3, h, w]`` in 0..1.

    Args:
        items: unseen holes with their exemplars.
        folder: of a Paint by Example; by default toybox/paint-by-example.
        guidance: similarity to the exemplar; published: 5.
        seed: of the noise; others for other pictures of the same holes.
    """
    from diffusers import PaintByExamplePipeline, pipelines
    from diffusers.pipelines.deprecated import paint_by_example

    pipelines.paint_by_example = paint_by_example  # diffusers moved it, its own layout names it
    pipe = PaintByExamplePipeline.from_pretrained(folder or path("paint-by-example"))
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for first in range(0, len(items), BATCH):
        part = items[first : first + BATCH]
        shown = [item.exemplar.resize((64, 64), Image.Resampling.BICUBIC) for item in part]
        made = pipe(
            pipe.feature_extractor(images=shown, return_tensors="pt").pixel_values,
            2 * _stacked([item.picture for item in part]) - 1,
            _holes(part),
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed * SEEDS + first),
            output_type="pt",
        )
        drawn.append(made.images.float())
    return torch.cat(drawn)


@torch.no_grad()
def imitated(
    items: list[ExemplarItem],
    folder: Path | None = None,
    guidance: float = 3.0,
    seed: int = 0,
    reads: bool = True,
) -> torch.Tensor:
    """What a MimicBrush makes of regions and references, as the plugin ``imitation`` does, several
    in a batch, ``[n, 3, h, w]`` in 0..1.

    Args:
        items: unseen regions with their references.
        folder: of the model; by default toybox/mimicbrush.
        guidance: between a row that sees nothing of the reference, and one that sees it.
        seed: of the noise.
        reads: whether the reference U-Net is read; without, CLIP's tokens alone are.
    """
    from inlay.backbones.mimicbrush_forward import imitate, reference
    from inlay.backbones.mimicbrush_pipeline import MimicBrushPipeline

    pipe: Any = MimicBrushPipeline.from_pretrained(folder or path("mimicbrush"))
    scale, levels = pipe.vae.config.scaling_factor, pipe.scheduler
    drawn = []
    for first in range(0, len(items), BATCH):
        part = items[first : first + BATCH]
        pictures, holes = _stacked([item.picture for item in part]), _holes(part)
        shown = torch.cat([_framed(item, 64) for item in part])
        squares = [to_pil(_framed(item, max(item.exemplar.size)))[0] for item in part]
        clean, around = (
            scale * pipe.vae.encode(2 * x - 1).latent_dist.mode()
            for x in (shown, pictures * (1 - holes))
        )
        grid = around.shape[-2:]
        given = [F.interpolate(holes, grid), around]
        if pipe.depth_guider is not None:  # the shape is free
            given.append(pipe.depth_guider(torch.zeros_like(holes), grid))
        seen = pipe.feature_extractor(images=squares, return_tensors="pt").pixel_values
        tokens, nothing = (_tokens(pipe, x) for x in (seen, torch.zeros_like(seen)))
        z = torch.randn(around.shape, generator=torch.Generator().manual_seed(seed * SEEDS + first))
        levels.set_timesteps(STEPS)
        for t in levels.timesteps:
            sample = torch.cat([z, *given], 1).repeat(2, 1, 1, 1)
            read = reference(pipe.reference_unet, clean, t, tokens) if reads else {}
            rows = len(part) if reads else 0
            both = imitate(pipe.unet, read, sample, t, torch.cat([tokens, nothing]), rows=rows)
            text, null = both.chunk(2)
            z = levels.step(null + guidance * (text - null), t, z).prev_sample
        made = pipe.vae.decode(z / scale).sample / 2 + 0.5
        drawn.append(torch.where(holes > 0, made.clamp(0, 1), pictures))
    return torch.cat(drawn)


def _framed(item: ExemplarItem, side: int) -> torch.Tensor:
    """A reference `1 3 side side` in a white square, as the plugin puts it there."""
    return masks.frame(_stacked([item.exemplar]), (side, side))


def _tokens(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    seen = pipe.image_encoder(pixels, output_hidden_states=True)
    return pipe.image_tokens(seen.hidden_states[-2])


def _stacked(pictures: list[Image.Image]) -> torch.Tensor:
    """``[n, 3, h, w]`` in 0..1."""
    arrays = np.stack([np.array(picture) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255


def _holes(items: list[ExemplarItem]) -> torch.Tensor:
    """``[n, 1, h, w]``, 1 in the hole."""
    return torch.stack([torch.from_numpy(item.region)[None].float() for item in items])


def inside(items: list[ExemplarItem], made: torch.Tensor) -> list[set[str]]:
    """Classes of which the detector finds an object that lies in the region by half or more."""
    seen = Detector.from_pretrained().detect(made, THRESHOLD)
    return [
        {
            name
            for name, mask in zip(one.classes, one.masks.numpy(), strict=True)
            if 2 * (mask & item.region).sum() >= mask.sum() > 0
        }
        for item, one in zip(items, seen, strict=True)
    ]


def exemplar_quality(n: int, draw: Draw = painted) -> dict[str, Any]:
    """Returns ``shown``: holes in which the detector finds an object of the exemplar's class, most
    of it inside; ``swapped``: of the next exemplar's class, the level of chance.
    """
    items = list(exemplar_items(n))
    shares = {"shown": Share(), "swapped": Share()}
    for i, names in enumerate(inside(items, draw(items))):
        shares["shown"].add(items[i].name in names)
        shares["swapped"].add(items[(i + 1) % n].name in names)
    return shares


def imitation_quality(n: int) -> dict[str, Any]:
    """Returns what ``exemplar_quality`` does, and ``painted``: objects whose paint, in their
    silhouette, is nearest to that of the reference in another colour; ``part``, ``texture``: PSNR
    in dB of the region against the true picture where half an object was hidden, and where its
    colour was another.
    """
    items = list(imitation_items(n))
    made, truth = imitated(items), _stacked([Image.fromarray(item.truth) for item in items])
    errors: dict[str, list[torch.Tensor]] = {"part": [], "texture": []}
    paint = Share()
    for item, picture, true in zip(items, made, truth, strict=True):
        errors[item.kind].append((picture - true).square()[:, item.region].mean())
        if item.kind == "texture":
            drawn = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
            paint.add(right_colour(drawn, item.mask, item.name, item.colour))
    near = {kind: float(-10 * torch.stack(e).log10().mean()) for kind, e in errors.items()}
    return {**exemplar_quality(n, imitated), "painted": paint, **near}
