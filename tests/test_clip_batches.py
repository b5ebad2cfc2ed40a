"""CLIP looks once per guided step: at all copies of all pictures; and ranks in batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from inlay import Session
from inlay_config.config import Gradient
from inlay_plugins import clips
from inlay_plugins.clip_guidance import ClipGuidance
from inlay_plugins.extending_augmentations import ExtendingAugmentations
from inlay_plugins.rank import Rank
from models import pixel

CLIP = clips.load("toybox/clip")
COPIES, N, STEPS = 4, 2, 3


def counted(seen: list[int], at_once: int | None = None) -> clips.Clip:
    """The toybox's CLIP, which notes how many pictures it is shown; at_once: and looks at so many
    at a time."""

    def see(pictures: Tensor) -> Tensor:
        seen.append(len(pictures))
        return torch.cat([CLIP.see(part) for part in pictures.split(at_once or len(pictures))])

    return replace(CLIP, see=see)


def guided(clip: clips.Clip) -> Tensor:
    """Latents of a guided run of a tiny random pixel model."""
    pipe = pixel()
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    plugins = {
        "warp": ExtendingAugmentations(ExtendingAugmentations.Config(copies=COPIES)),
        "guide": ClipGuidance(ClipGuidance.Config(scale=10.0, mask=""), loaded=[clip]),
    }
    session = Session(pipe, plugins, gradient=Gradient(alpha_min=0.0))
    return session.run("a cow", steps=STEPS, n=N, seed=3).latents["edit"]


def test_all_copies_of_all_pictures_are_one_call_and_change_nothing() -> None:
    seen, singles = list[int](), list[int]()
    latents = guided(counted(seen))
    assert seen == [COPIES * N] * STEPS
    torch.testing.assert_close(latents, guided(counted(singles, at_once=1)), rtol=1e-4, atol=1e-5)
    assert not torch.equal(latents[0], latents[1])


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_a_ranking_does_not_depend_on_its_batches(batch: int) -> None:
    seen = list[int]()
    pictures = torch.rand(10, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    rank = Rank(Rank.Config(scope="image", batch=batch), loaded=[counted(seen)])
    rank.texts, rank.files = {"a cow": 1.0}, {}
    scores = rank.scores(pictures, None)
    assert max(seen) == min(batch, 10) and sum(seen) == 10
    far = clips.Target.of(CLIP, {"a cow": 1.0}, {}, "").distances(
        CLIP.images(pictures), "spherical"
    )
    torch.testing.assert_close(scores, far, rtol=1e-5, atol=1e-6)
