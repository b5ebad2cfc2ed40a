"""Insertion tasks that the papers call hard: a caption of few words, a full scene, a second object
of a class, a side.

Pairs of class and ground are trained ones, except in ``terse``, whose scenes are those of
``insertion_items``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice

import numpy as np

from inlay_toybox import captions, world
from inlay_toybox.classes import BY_NAME, CLASSES, HELD_OUT, ToyClass
from inlay_toybox.quality.insertion import InsertionItem, insertion_items, item_of
from inlay_toybox.training import UNSEEN

FIRST = 7_000_000  # of these scenes' seeds, counted from UNSEEN
SIDES = ("left of", "right of")
TRIES = 8  # places that are looked at for room on both sides
Choose = Callable[[world.Scene, np.random.Generator], tuple[ToyClass, str | None]]


def terse(n: int = 200, seed: int = 0) -> Iterator[InsertionItem]:
    """The usual items; their captions name the ground and the new object alone."""
    for item in insertion_items(n, seed):
        ground, thing = item.source.ground, item.target.things[-1]
        before, after = (captions.caption(seen, ground, False) for seen in ((), (thing,)))
        yield replace(item, source_caption=before, target_caption=after)


def crowded(n: int = 200, seed: int = 0, things: int = 3) -> Iterator[InsertionItem]:
    """One more object, of a class that is not there, in scenes that hold exactly `things`."""
    return islice(_items(seed, things, _another), n)


def again(n: int = 200, seed: int = 0) -> Iterator[InsertionItem]:
    """A second object of the class, and the colour, of the one that is there."""
    return islice(_items(seed, 1, _same), n)


def beside(n: int = 200, seed: int = 0) -> Iterator[InsertionItem]:
    """A new object left or right of the one that is there, in turns, as the caption says.

    There is room on both sides, so that where there is more of it says nothing of the answer. No
    training caption says a side.
    """
    made = 0
    for number in count(UNSEEN + FIRST + seed * 1_000_000):
        if made == n:
            return
        source, rng = world.sample(number, count=1), np.random.default_rng([number, 3])
        if len(source.things) != 1 or source.things[0].toy.habitat == "sky":
            continue
        (there,), side = source.things, SIDES[made % 2]
        toy, colour = _another(source, rng)
        tried = [world.place(rng, source, toy, colour) for _ in range(TRIES)]
        left = [thing for thing in tried if thing and thing.x < there.x]
        right = [thing for thing in tried if thing and thing.x > there.x]
        if toy.habitat == "sky" or not (left and right):
            continue
        thing = (left if side == SIDES[0] else right)[0]
        if item := item_of(replace(source, things=(there, thing)), made + 1):
            made += 1
            words = f"{captions.phrase(thing)} {side} {captions.phrase(there)}"
            place = captions.PREPOSITION[source.ground]
            words += f" {place} at sunset" if source.sunset else f" {place}"
            yield replace(item, target_caption=words)


def _items(seed: int, things: int, choose: Choose) -> Iterator[InsertionItem]:
    """Unseen scenes of exactly `things` objects and one more, of the class that is chosen."""
    made = 0
    for number in count(UNSEEN + FIRST + seed * 1_000_000):
        source, rng = world.sample(number, count=things), np.random.default_rng([number, 3])
        if len(source.things) != things:
            continue
        toy, colour = choose(source, rng)
        thing = world.place(rng, source, toy, colour)
        if thing and (item := item_of(replace(source, things=(*source.things, thing)), made + 1)):
            made += 1
            yield item


def _another(scene: world.Scene, rng: np.random.Generator) -> tuple[ToyClass, str | None]:
    """A class that lives here and is not there; its colour as in training."""
    taken = {thing.name for thing in scene.things}
    here = [
        toy
        for toy in CLASSES
        if scene.ground in toy.grounds
        and toy.name not in taken
        and (toy.name, scene.ground) not in HELD_OUT
    ]
    toy = here[int(rng.integers(len(here)))]
    colour = str(rng.choice(toy.colours)) if toy.colours and rng.random() < 0.75 else None
    return toy, colour


def _same(scene: world.Scene, rng: np.random.Generator) -> tuple[ToyClass, str | None]:
    (thing,) = scene.things
    return BY_NAME[thing.name], thing.colour
