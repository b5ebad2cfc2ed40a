"""Measurements of the toybox's models, for reports: how often the right thing is drawn, found,
placed.

Everything runs over scenes that no recipe has trained on. Pairs that are held out of training are
counted apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from inlay_toybox import captions, path, world
from inlay_toybox.classes import HELD_OUT
from inlay_toybox.detector import Detections, Detector, iou
from inlay_toybox.training import UNSEEN

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxPipeline

THRESHOLD = 0.3
OVERLAP = 0.5
_PROMPTS, _SCENES, _INSERTIONS = 1_000_000, 2_000_000, 3_000_000


@dataclass
class Share:
    """A proportion with its counts."""

    hits: int = 0
    total: int = 0

    def add(self, hit: bool) -> None:
        self.hits, self.total = self.hits + int(hit), self.total + 1

    @property
    def value(self) -> float:
        return self.hits / self.total if self.total else float("nan")

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.hits}/{self.total})"


def settings(folder: Path | None = None) -> dict[str, Any]:
    """Recommended arguments of the shipped pipeline's call: size, steps, guidance, sequence
    length.
    """
    return json.loads(((folder or path("flux")) / "settings.json").read_text())


def unseen_scenes(n: int, first: int, count: int | None = None) -> Iterator[world.Scene]:
    """Scenes beyond all training seeds with at least one object; held-out pairs may occur."""
    seed, left = UNSEEN + first, n
    while left:
        scene = world.sample(seed, held_out=True, count=count)
        seed += 1
        if scene.things:
            left -= 1
            yield scene


def generate(
    pipe: FluxPipeline, prompts: list[str], seed: int, batch: int = 20, **changes: Any
) -> torch.Tensor:
    """Pictures of prompts with the recommended settings, ``[n, 3, h, w]`` in 0..1.

    Each prompt has its own noise, from ``seed`` and its position; ``changes`` overrides the
    settings.
    """
    pipe.set_progress_bar_config(disable=True)
    options = settings() | changes
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
    pipe: FluxPipeline,
    n: int = 200,
    seed: int = 0,
    detector: Detector | None = None,
    **changes: Any,
) -> dict[str, Share]:
    """How many of the objects named in unseen prompts the detector finds in the generated pictures.

    Args:
        pipe: a FLUX pipeline of the toybox.
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
    scenes = list(unseen_scenes(n, _PROMPTS))
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


def detector_accuracy(
    n: int = 400,
    seed: int = 0,
    detector: Detector | None = None,
    vae: AutoencoderKL | None = None,
    size: int = 64,
) -> dict[str, Share]:
    """How well the detector reads unseen scenes, or their round trips through an autoencoder.

    Objects of which less than a third is visible are not counted.

    Returns:
        ``objects``: found with the right class and at least half box overlap; ``presence``: class
        found anywhere; ``precision``: detections that match an object; ``masks``: found objects
        with at least half mask overlap.
    """
    detector = detector or Detector.from_pretrained()
    shares = {key: Share() for key in ("objects", "presence", "precision", "masks")}
    scenes = list(unseen_scenes(n, _SCENES + seed * n))
    for first in range(0, n, 50):
        part = scenes[first : first + 50]
        drawn = [world.render(scene, size) for scene in part]
        images = torch.from_numpy(np.stack([d.image for d in drawn])).permute(0, 3, 1, 2) / 255
        if vae is not None:
            with torch.no_grad():
                latents = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode()
                images = (vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)
        for scene, truth, seen in zip(part, drawn, detector.detect(images, THRESHOLD), strict=True):
            _compare(scene, truth, seen, shares)
    return shares


def _compare(
    scene: world.Scene, truth: world.Rendering, seen: Detections, shares: dict[str, Share]
) -> None:
    """Count one picture's detections against the truth."""
    overlaps = iou(torch.from_numpy(truth.boxes), seen.boxes)
    for i, thing in enumerate(scene.things):
        alone = world.render(
            world.Scene(scene.ground, scene.sunset, scene.look, (thing,)), truth.image.shape[0]
        )
        if truth.masks[i].sum() * 3 < alone.masks[0].sum():
            continue
        match = [
            j
            for j, name in enumerate(seen.classes)
            if name == thing.name and overlaps[i, j] >= OVERLAP
        ]
        shares["objects"].add(bool(match))
        shares["presence"].add(thing.name in seen.classes)
        if match:
            mask, body = seen.masks[match[0]].numpy(), truth.masks[i]
            shares["masks"].add(bool((mask & body).sum() * 2 >= (mask | body).sum()))
    names = [t.name for t in scene.things]
    for j, name in enumerate(seen.classes):
        shares["precision"].add(name in names and bool(overlaps[names.index(name), j] >= OVERLAP))


@dataclass(frozen=True)
class InsertionItem:
    """One task for an insertion method, with the truth.

    Attributes:
        source: the scene before; target: a scene that has the object, one of many right answers.
        picture: the source, an RGB picture of the model's size.
        source_caption, target_caption: their captions. subject: the words to insert, as in the
            caption.
        name: the object's class. held_out: whether its (class, ground) pair was never trained.
        allowed: bool ``[h, w]``, where the object may plausibly be.
        footprint: bool ``[h, w]``, pixels that the object changes in ``target``: body, shadow,
            reflection.
        mask: bool ``[h, w]``, its visible pixels in ``target``.
        chance: how often the object, pasted at a random place, would count as well placed.
    """

    source: world.Scene
    target: world.Scene
    picture: Image.Image
    source_caption: str
    target_caption: str
    subject: str
    name: str
    held_out: bool
    allowed: np.ndarray
    footprint: np.ndarray
    mask: np.ndarray
    chance: float


def insertion_items(n: int = 200, seed: int = 0, size: int = 64) -> Iterator[InsertionItem]:
    """Unseen scenes and an object to insert into each: the scene's twin without its last named
    object.
    """
    made = 0
    for target in unseen_scenes(10 * n, _INSERTIONS + seed * 10 * n):
        if made == n:
            return
        index = len(target.things) - 1
        thing, source = target.things[index], target.without(index)
        drawn = world.render(target, size)
        mask = drawn.masks[index]
        allowed = world.affordance(source, thing.name, size)
        if not world.well_placed(mask, allowed):
            continue
        made += 1
        yield InsertionItem(
            source=source,
            target=target,
            picture=Image.fromarray(world.render(source, size).image),
            source_caption=source.caption,
            target_caption=target.caption,
            subject=captions.subject(thing),
            name=thing.name,
            held_out=(thing.name, target.ground) in HELD_OUT,
            allowed=allowed,
            footprint=drawn.footprints[index],
            mask=mask,
            chance=world.chance(mask, allowed, seed=made),
        )
