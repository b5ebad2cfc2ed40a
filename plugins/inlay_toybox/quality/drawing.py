"""How often a text-to-image model draws what the words say; read by the shipped detector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from inlay_toybox import path
from inlay_toybox.classes import HELD_OUT
from inlay_toybox.detector import Detector
from inlay_toybox.quality.shares import PROMPTS, THRESHOLD, Share, unseen_scenes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def settings(folder: Path | None = None) -> dict[str, Any]:
    """Recommended arguments of a shipped pipeline's call (by default toybox/flux's): size, steps,
    guidance, sequence length.
    """
    return json.loads(((folder or path("flux")) / "settings.json").read_text())


def generate(
    pipe: DiffusionPipeline, prompts: list[str], seed: int, batch: int = 20, **changes: Any
) -> torch.Tensor:
    """Pictures of prompts with the settings recommended beside the pipeline's weights, ``[n, 3, h,
    w]`` in 0..1.

    Each prompt has its own noise, from ``seed`` and its position; ``changes`` overrides the
    settings.
    """
    pipe.set_progress_bar_config(disable=True)
    options = settings(Path(pipe.name_or_path)) | changes
    negative = options.pop("negative_prompt")
    pictures = []
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        noise = [
            torch.Generator().manual_seed(seed * 100_003 + first + i) for i in range(len(part))
        ]
        with torch.no_grad():
            out = pipe(
                part,
                negative_prompt=[negative] * len(part),
                generator=noise,
                output_type="pt",
                **options,
            )
        pictures.append(out.images.float().cpu())
    return torch.cat(pictures)


def object_accuracy(
    pipe: DiffusionPipeline,
    n: int = 200,
    seed: int = 0,
    detector: Detector | None = None,
    **changes: Any,
) -> dict[str, Share]:
    """How many of the objects named in unseen prompts the detector finds in the generated pictures.

    Args:
        pipe: a text-to-image pipeline of the toybox.
        n: number of prompts (one to three objects each).
        seed: for the noise.
        detector: the shipped one by default.
        **changes: overrides of the recommended settings.

    Returns:
        ``objects``: named objects of trained pairs that were found; ``held_out``: likewise, of
        pairs held out of training; ``pictures``: prompts of which every object was found;
        ``swapped``: what the count of ``objects`` is when each picture is read with the next
        prompt, the level of chance.
    """
    detector = detector or Detector.from_pretrained()
    scenes = list(unseen_scenes(n, PROMPTS))
    pictures = generate(pipe, [s.caption for s in scenes], seed, **changes)
    found = [set(d.classes) for d in detector.detect(pictures, THRESHOLD)]
    shares = {key: Share() for key in ("objects", "held_out", "pictures", "swapped")}
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            new = (thing.name, scene.ground) in HELD_OUT
            shares["held_out" if new else "objects"].add(thing.name in found[i])
            if not new:
                shares["swapped"].add(thing.name in found[i - 1])
        shares["pictures"].add(all(t.name in found[i] for t in scene.things))
    return shares
