"""Extending augmentations: CLIP sees each picture several times, warped at random, so that no
gradient can please it with an adversarial pattern (Blended Diffusion, Avrahami et al. 2022, 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from kornia.geometry.transform import get_perspective_transform, warp_perspective
from torch import Tensor

from inlay import ConfigError, Needs, Plugin, Run, hookimpl

Augment = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]
"""(pictures `n 3 h w` in -1..1, mask `1 1 h w`, side, generator) -> `k·n 3 side side`: copy k of
picture b at k·n + b, grey (0) outside the mask, which is warped with the picture."""


class ExtendingAugmentations(Plugin):
    """Publishes `augment:clip`, an Augment."""

    @dataclass
    class Config:
        """copies: of each picture, the first of them untouched; published: 8, in the paper 16.
        affine, perspective: probability of each warp. degrees, shift: of the affine one, at most,
        shift in sides of the picture. distortion: 0..1, 1 moves a corner up to the centre.

        mode: fixed warps exactly and shifts both ways; reference shifts vertically only, and
        samples the positions that kornia 0.6.4 did, a fraction of a pixel off.
        """

        copies: int = 8
        affine: float = 0.7
        perspective: float = 0.7
        degrees: float = 15.0
        shift: float = 0.1
        distortion: float = 0.7
        mode: Literal["fixed", "reference"] = "fixed"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        where = f"plugins.{need.owner}"
        for key in ("affine", "perspective", "shift", "distortion"):
            if not 0 <= (value := getattr(self.cfg, key)) <= 1:
                raise ConfigError(f"{value} is no share", where=f"{where}.{key}", fix="Use 0 to 1.")
        if self.cfg.copies < 1:
            raise ConfigError("no copy", where=f"{where}.copies", fix="Use 1 or more.")
        need.publish("augment:clip")

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        run.board["augment:clip"] = self.augment

    def augment(self, pictures: Tensor, mask: Tensor, side: int, rng: torch.Generator) -> Tensor:
        """An Augment: averaged to `side` (uneven bins, as published), copied, warped."""
        seen = F.adaptive_avg_pool2d(pictures * mask, side)
        count = (self.cfg.copies - 1) * len(seen)
        if not count:
            return seen
        chances = torch.tensor([[self.cfg.affine], [self.cfg.perspective]])
        applied = torch.rand(2, count, generator=rng) < chances
        matrices = self.draw(count, side, rng)
        warped = self.warp(seen.repeat(self.cfg.copies - 1, 1, 1, 1), *matrices, applied)
        return torch.cat([seen, warped])

    def draw(self, count: int, side: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Affine and perspective matrices `count 3 3`, from source to destination pixel."""
        angle, *shift = torch.rand(3, count, generator=rng) * 2 - 1
        angle = angle * math.radians(self.cfg.degrees)
        across = shift[0] * (self.cfg.mode == "fixed")
        cos, sin, middle = angle.cos(), angle.sin(), (side - 1) / 2
        affine = torch.eye(3).repeat(count, 1, 1)
        affine[:, 0, 0], affine[:, 0, 1], affine[:, 1, 0], affine[:, 1, 1] = cos, -sin, sin, cos
        affine[:, 0, 2] = middle * (1 - cos + sin) + across * self.cfg.shift * side
        affine[:, 1, 2] = middle * (1 - cos - sin) + shift[1] * self.cfg.shift * side
        corners = torch.tensor([[0.0, 0.0], [1, 0], [1, 1], [0, 1]]).repeat(count, 1, 1)
        inwards = torch.rand(count, 4, 2, generator=rng) * self.cfg.distortion * side / 2
        start = corners * (side - 1)
        return affine, get_perspective_transform(start, start + (1 - 2 * corners) * inwards)

    def warp(self, copies: Tensor, affine: Tensor, perspective: Tensor, applied: Tensor) -> Tensor:
        """`k 3 s s` by matrices `k 3 3`; applied: `2 k` bool, whether by each."""
        yes, old = applied.to(copies.device)[..., None, None, None], self.cfg.mode == "reference"
        sample = sample_as_kornia_064 if old else sample_exactly
        turned = torch.where(yes[0], sample(copies, affine.to(copies), "border"), copies)
        return torch.where(yes[1], sample(turned, perspective.to(copies), "zeros"), turned)


def sample_exactly(pictures: Tensor, matrices: Tensor, padding: str) -> Tensor:
    return warp_perspective(pictures, matrices, pictures.shape[-2:], padding_mode=padding)


def sample_as_kornia_064(pictures: Tensor, matrices: Tensor, padding: str) -> Tensor:
    """Positions are normalised by side - 1 and read as if by side; the affine warp (`border`)
    starts from the latter's pixel centres, the perspective one from the picture's corners."""
    side = pictures.shape[-1]
    unit = torch.tensor([[2 / (side - 1), 0, -1], [0, 2 / (side - 1), -1], [0, 0, 1]]).to(pictures)
    back = torch.linalg.inv(unit @ matrices @ torch.linalg.inv(unit))
    line = torch.linspace(-1, 1, side).to(pictures)
    line = line * (side - 1) / side if padding == "border" else line
    y, x = torch.meshgrid(line, line, indexing="ij")
    points = torch.einsum("kij,hwj->khwi", back, torch.stack([x, y, torch.ones_like(x)], -1))
    places = points[..., :2] / points[..., 2:]
    return F.grid_sample(pictures, places, padding_mode=padding, align_corners=False)
