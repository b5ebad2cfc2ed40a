"""How often the models that take more than a prompt do what they are told or shown."""

from __future__ import annotations

from itertools import count, islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from inlay_toybox import edits, path, world
from inlay_toybox.detector import Detector
from inlay_toybox.quality.exemplars import exemplar_items
from inlay_toybox.quality.shares import INSTRUCTIONS, THRESHOLD, Share
from inlay_toybox.training import UNSEEN

STEPS, BATCH = 20, 10


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


def filled(n: int) -> tuple[list[Any], torch.Tensor]:
    """Unseen holes with their exemplars, and what toybox/paint-by-example draws there at its
    published guidance of 5, ``[n, 3, h, w]`` in 0..1.
    """
    from diffusers import PaintByExamplePipeline, pipelines
    from diffusers.pipelines.deprecated import paint_by_example

    pipelines.paint_by_example = paint_by_example  # diffusers moved it, its own layout names it
    pipe = PaintByExamplePipeline.from_pretrained(path("paint-by-example"))
    pipe.set_progress_bar_config(disable=True)
    items, drawn = list(exemplar_items(n)), []
    for first in range(0, n, BATCH):
        part = items[first : first + BATCH]
        shown = [item.exemplar.resize((64, 64), Image.Resampling.BICUBIC) for item in part]
        pictures = np.stack([np.array(item.picture) for item in part])
        made = pipe(
            pipe.feature_extractor(images=shown, return_tensors="pt").pixel_values,
            torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1,
            torch.stack([torch.from_numpy(item.region)[None].float() for item in part]),
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(first),
            output_type="pt",
        )
        drawn.append(made.images.float())
    return items, torch.cat(drawn)


def exemplar_quality(n: int) -> dict[str, Any]:
    """Returns ``shown``: holes in which the detector finds an object of the exemplar's class, most
    of it inside; ``swapped``: of the next exemplar's class, the level of chance.
    """
    items, made = filled(n)
    shares = {"shown": Share(), "swapped": Share()}
    for i, found in enumerate(Detector.from_pretrained().detect(made, THRESHOLD)):
        named = zip(found.classes, found.masks.numpy(), strict=True)
        inside = {c for c, m in named if 2 * (m & items[i].region).sum() >= m.sum() > 0}
        shares["shown"].add(items[i].name in inside)
        shares["swapped"].add(items[(i + 1) % n].name in inside)
    return shares
