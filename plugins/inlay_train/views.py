"""Rows for MimicBrush: clips and single pictures of a folder, scenes of the toybox."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import center_crop, pil_to_tensor
from torchvision.transforms.v2.functional import resize

from inlay_config.errors import ConfigError, InputError
from inlay_config.images import open_image
from inlay_train import imitation_pairs
from inlay_train.encoded import LATER
from inlay_train.imitation_pairs import Points, Strength
from inlay_train.recipe import Sample

TRIES = 8
"""Pairs of frames that are looked at before one frame stands for both."""


@dataclass
class Sources:
    """Where views come from; what is named is trained on together.

    clips: a folder with a folder of frames per clip, and single pictures. low, high: SSIM of the
    frames of a pair. toybox: number of its scenes. objects: share of these whose hole is one whole
    object, in place of the published segments of single pictures; silhouettes: share of these holes
    that are its outline, not a box; zoom: share whose reference is cut out around that object.
    sift: match features; without, cells of the toybox that show objects match, and of photographs
    none. single: share of the toybox's rows whose reference is the same scene, as single pictures
    are.
    """

    clips: str | None = None
    low: float = 0.2
    high: float = 0.9
    toybox: int = 0
    objects: float = 0.0
    silhouettes: float = 0.5
    zoom: float = 0.0
    sift: bool = True
    single: float = field(default=0.0, metadata=LATER)


@dataclass
class Masking:
    """Cells of the grid a side, and the shares of those with and without matches that are holes."""

    cells: tuple[int, int] = (3, 10)
    matched: float = 0.75
    plain: float = 0.5


@dataclass
class Changes:
    """How strongly either view is changed."""

    source: Strength = field(default_factory=Strength)
    reference: Strength = field(default_factory=Strength)


class Views:
    """Rows `source` `3 s s`, `reference` `3 s s` in a white square, `mask` `1 s s`, and `depth`
    `1 s s`, which only the toybox knows and is 0 elsewhere."""

    def __init__(self, sources: Sources, size: int, masking: Masking, changes: Changes) -> None:
        self.sources, self.size, self.masking, self.changes = sources, size, masking, changes
        folder = Path(sources.clips) if sources.clips else None
        if folder and not folder.is_dir():
            raise InputError("there is no such folder", where=str(folder))
        self.clips = imitation_pairs.clips(folder) if folder else []
        if not len(self):
            fix = "Name a folder of clips (data.clips) or a number of toybox scenes."
            raise ConfigError("nothing to train on", where="data", fix=fix)

    def __len__(self) -> int:
        return len(self.clips) + self.sources.toybox

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        if index >= len(self.clips):
            return self._toybox(index - len(self.clips), rng)
        one, other = self._pair(self.clips[index], rng)
        source = imitation_pairs.augmented(one, rng, self.changes.source)
        reference = imitation_pairs.augmented(other, rng, self.changes.reference)
        points: Points = np.zeros((0, 2))
        if self.sources.sift:
            points = imitation_pairs.matches(source, reference)
        return self._row(source, reference, points, rng)

    def _pair(self, frames: list[Path], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Two frames that make a pair, or one twice: a pseudo pair, as of a single picture."""
        for _ in range(TRIES if len(frames) > 1 else 0):
            one, other = (self._open(file) for file in imitation_pairs.two(frames, rng))
            if imitation_pairs.makes_pair(one, other, self.sources.low, self.sources.high):
                return one, other
        frame = self._open(frames[int(rng.integers(len(frames)))])
        return frame, frame

    def _open(self, file: Path) -> Tensor:
        """The square in the middle of a picture, `3 s s`."""
        picture = pil_to_tensor(open_image(file, str(file))).float() / 255
        square = center_crop(picture, [min(picture.shape[-2:])] * 2)
        whole: Tensor = resize(square, [self.size, self.size], antialias=True)
        return whole.clamp(0, 1)

    def _row(
        self,
        source: Tensor,
        reference: Tensor,
        points: Points,
        rng: np.random.Generator,
        mask: Tensor | None = None,
        depth: Tensor | None = None,
    ) -> Sample:
        how = self.masking
        if mask is None:
            cells = how.cells[0], how.cells[1]
            mask = imitation_pairs.grid(points, self.size, rng, cells, how.matched, how.plain)
        return {
            "source": source,
            "reference": imitation_pairs.squared(reference, self.size),
            "mask": mask,
            "depth": torch.zeros_like(mask) if depth is None else depth,
        }

    def _toybox(self, seed: int, rng: np.random.Generator) -> Sample:
        from inlay_toybox import imitation, world

        while (views := imitation.views(seed)) is None:
            seed += self.sources.toybox
        if self.sources.single and rng.random() < self.sources.single:
            views = imitation.Views(views.source, views.source)
        drawn, size = world.render(views.source, self.size), self.size
        other = world.render(views.reference, 2 * size)
        shown = int(rng.integers(len(views.source.things)))
        source, reference = (_tensor(r.image) for r in (drawn, other))
        if rng.random() < self.sources.zoom and other.masks[shown].any():
            left, top, right, bottom = _box(world.boxes_of(other.masks)[shown], 2 * size, rng)
            reference = reference[:, top:bottom, left:right]
        source = imitation_pairs.augmented(source, rng, self.changes.source)
        reference = imitation_pairs.augmented(reference, rng, self.changes.reference)
        mask = None
        if rng.random() < self.sources.objects and drawn.masks[shown].any():
            if rng.random() < self.sources.silhouettes:
                mask = torch.from_numpy(drawn.masks[shown]).float()[None]
            else:
                mask = _around(drawn.footprints[shown], rng)
        if self.sources.sift:
            large = [_tensor(world.render(s, 256).image) for s in (views.source, views.reference)]
            points = imitation_pairs.matches(large[0], large[1])
        else:
            points = (np.argwhere(drawn.masks.any(0))[:, ::-1] + 0.5) / size
        depth = torch.from_numpy(imitation.depth(views.source, drawn))[None]
        return self._row(source, reference, points, rng, mask, depth)


def _tensor(image: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def _box(
    sides: np.ndarray[Any, Any], size: int, rng: np.random.Generator, widest: float = 0.12
) -> tuple[int, int, int, int]:
    """A box that is larger by up to `widest` of the picture on each side, inside of it."""
    left, top, right, bottom = sides + rng.uniform(0.0, widest, 4) * size * [-1, -1, 1, 1]
    return max(0, int(left)), max(0, int(top)), min(size, int(right)), min(size, int(bottom))


def _around(footprint: np.ndarray[Any, Any], rng: np.random.Generator) -> Tensor:
    """The hole `1 s s` that is a box around all that an object changes."""
    from inlay_toybox import world

    left, top, right, bottom = _box(world.boxes_of(footprint[None])[0], len(footprint), rng)
    mask = torch.zeros(1, *footprint.shape)
    mask[:, top:bottom, left:right] = 1
    return mask
