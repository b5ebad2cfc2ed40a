"""Tasks for insertion methods: unseen scenes, an object to insert into each, and the truth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from inlay_toybox import captions, world
from inlay_toybox.classes import HELD_OUT
from inlay_toybox.quality.shares import INSERTIONS, unseen_scenes


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
    for target in unseen_scenes(10 * n, INSERTIONS + seed * 10 * n):
        if made == n:
            return
        if item := item_of(target, made + 1, size):
            made += 1
            yield item


def item_of(target: world.Scene, number: int, size: int = 64) -> InsertionItem | None:
    """The scene without its last object, and that object to insert; None where it stands badly.

    number: seeds the draws behind ``chance``.
    """
    index = len(target.things) - 1
    thing, source = target.things[index], target.without(index)
    drawn = world.render(target, size)
    mask = drawn.masks[index]
    allowed = world.affordance(source, thing.name, size)
    if not world.well_placed(mask, allowed):
        return None
    return InsertionItem(
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
        chance=world.chance(mask, allowed, seed=number),
    )
