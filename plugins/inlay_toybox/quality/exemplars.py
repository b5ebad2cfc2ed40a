"""Tasks for methods that take an exemplar: unseen scenes with a hole, another view of the object
that is to fill it, and the truth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import count

import numpy as np
from PIL import Image

from inlay_toybox import captions, world
from inlay_toybox.backdrop import DUSK_LIGHT
from inlay_toybox.classes import BY_NAME, HELD_OUT
from inlay_toybox.quality.shares import EXEMPLARS, IMITATIONS, STRIDE, unseen_scenes
from inlay_toybox.sprites import HUES, sprite

DETAIL = 2
"""Exemplars are drawn at this many times the size of the scene."""

COLOURED = tuple(toy.name for toy in BY_NAME.values() if toy.colours)
"""Classes that have colours."""

SEEN = 0.6
"""Least visible share of an object that is to be drawn."""


@dataclass(frozen=True)
class ExemplarItem:
    """One task for a method that fills a hole with what an exemplar shows.

    Attributes:
        source, target: the scene before and one of many right answers.
        picture: what the method gets, an RGB picture of the model's size.
        truth: uint8 ``[h, w, 3]``, the right answer.
        region: bool ``[h, w]``, the hole.
        mask, footprint: bool ``[h, w]``, the object's visible pixels in the truth, and all that it
            changes: body, shadow, reflection.
        exemplar: an RGB picture of the object in another scene. cutout: bool ``[h, w]``, the
            object's pixels in it.
        kind: "insert"; "part" or "texture" of an imitation.
        name: the object's class. colour: adjective or None. held_out: whether its (class, ground)
            pair was never trained.
    """

    source: world.Scene
    target: world.Scene
    picture: Image.Image
    truth: np.ndarray
    region: np.ndarray
    mask: np.ndarray
    footprint: np.ndarray
    exemplar: Image.Image
    cutout: np.ndarray
    kind: str
    name: str
    colour: str | None
    held_out: bool

    @property
    def subject(self) -> str:
        """The object in words, as in the caption."""
        return captions.subject(self.target.things[-1])


def exemplar_items(n: int = 200, seed: int = 0, size: int = 64) -> Iterator[ExemplarItem]:
    """Unseen scenes without their last named object, a box around its place as the hole, and a
    view of the same object on other ground.

    The object of every third item is of a class that has colours, so that colour can be counted;
    these classes take turns.
    """
    for i, target in enumerate(_targets(n, EXEMPLARS + seed * STRIDE)):
        rng = np.random.default_rng([seed, i])
        thing, drawn = target.things[-1], world.render(target, size)
        source = target.without(len(target.things) - 1)
        exemplar, cutout = view(thing, target.ground, rng, size * DETAIL)
        yield ExemplarItem(
            source=source,
            target=target,
            picture=Image.fromarray(world.render(source, size).image),
            truth=drawn.image,
            region=around(drawn.footprints[-1], rng),
            mask=drawn.masks[-1],
            footprint=drawn.footprints[-1],
            exemplar=exemplar,
            cutout=cutout,
            kind="insert",
            name=thing.name,
            colour=thing.colour,
            held_out=(thing.name, target.ground) in HELD_OUT,
        )


def imitation_items(
    n: int = 200, seed: int = 0, size: int = 64, kinds: tuple[str, ...] = ("part", "texture")
) -> Iterator[ExemplarItem]:
    """Unseen scenes of which a region is to look like a reference, with one right answer.

    Kinds take turns. part: half of an object is hidden, the reference shows the whole object
    elsewhere. texture: an object is to have the reference's colour; the region is its silhouette.
    """
    scenes = _targets(10 * n, IMITATIONS + seed * STRIDE)
    for i in range(n):
        rng, kind = np.random.default_rng([seed, i, 1]), kinds[i % len(kinds)]
        target = next(s for s in scenes if kind == "part" or s.things[-1].toy.colours)
        thing, before = target.things[-1], target
        if kind == "texture":
            colours = [c for c in thing.toy.colours if not same_paint(thing, c)]
            other = colours[int(rng.integers(len(colours)))]
            before, thing = target, replace(thing, colour=other)
            target = replace(target, things=(*target.things[:-1], thing))
        drawn = world.render(target, size)
        region = drawn.masks[-1] if kind == "texture" else half(drawn.masks[-1], rng)
        exemplar, cutout = view(thing, target.ground, rng, size * DETAIL)
        yield ExemplarItem(
            source=before,
            target=target,
            picture=Image.fromarray(world.render(before, size).image),
            truth=drawn.image,
            region=region,
            mask=drawn.masks[-1],
            footprint=drawn.footprints[-1],
            exemplar=exemplar,
            cutout=cutout,
            kind=kind,
            name=thing.name,
            colour=thing.colour,
            held_out=(thing.name, target.ground) in HELD_OUT,
        )


def _targets(n: int, first: int) -> Iterator[world.Scene]:
    """Scenes whose last object is well visible, and in every third one of a class with colours."""
    made = 0
    for scene in unseen_scenes(1000 * n, first):
        if made == n:
            return
        thing = scene.things[-1]
        if made % 3 == 0 and thing.name != COLOURED[made // 3 % len(COLOURED)]:
            continue
        alone = world.render(replace(scene, things=(thing,)), 32).masks[0].sum()
        if alone and world.render(scene, 32).masks[-1].sum() >= SEEN * alone:
            made += 1
            yield scene


def view(
    thing: world.Thing, ground: str, rng: np.random.Generator, size: int
) -> tuple[Image.Image, np.ndarray]:
    """The object alone in another scene, cropped to a box around it, and its pixels there.

    It stands on other ground than ``ground`` where its class knows any.
    """
    others = [g for g in BY_NAME[thing.name].grounds if g != ground]
    for first in count(int(rng.integers(2**31)), 1000):
        scene = world.views(thing.name, 1, first, thing.colour)[0]
        if others and scene.ground == ground:
            continue
        drawn = world.render(scene, size)
        left, top, right, bottom = _box(around(drawn.masks[0], rng, widest=0.08))
        inside = (slice(top, bottom), slice(left, right))
        return Image.fromarray(drawn.image[inside]), drawn.masks[0][inside]
    raise AssertionError("count has no end")


def around(mask: np.ndarray, rng: np.random.Generator, widest: float = 0.1) -> np.ndarray:
    """A box ``[h, w]`` around a mask, each side further out by 3 % of the picture to ``widest``."""
    height, width = mask.shape
    left, top, right, bottom = _box(mask)
    more = [round(float(g)) for g in rng.uniform(0.03, widest, 4) * height]
    region = np.zeros_like(mask)
    rows = slice(max(top - more[1], 0), min(bottom + more[3], height))
    region[rows, max(left - more[0], 0) : min(right + more[2], width)] = True
    return region


def half(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The left, right, upper or lower half of the box of a mask, ``[h, w]``."""
    left, top, right, bottom = _box(mask)
    x, y = (left + right + 1) // 2, (top + bottom + 1) // 2
    halves = ((left, top, x, bottom), (x, top, right, bottom),
              (left, top, right, y), (left, y, right, bottom))  # fmt: skip
    left, top, right, bottom = halves[int(rng.integers(4))]
    region = np.zeros_like(mask)
    region[top:bottom, left:right] = True
    return region


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    left, top, right, bottom = (int(edge) for edge in world.boxes_of(mask[None])[0])
    return left, top, right, bottom


# colours ---------------------------------------------------------------------------------------

NEAR = 0.09
"""Hues this near are one paint."""


def hue_of(name: str, colour: str | None) -> float:
    """The hue (0..1) of an object's paint."""
    return BY_NAME[name].hue if colour is None else HUES[colour]


def same_paint(thing: world.Thing, colour: str | None) -> bool:
    """Whether an object would look the same in a colour."""
    return bool(_apart(hue_of(thing.name, thing.colour), hue_of(thing.name, colour)) < NEAR)


def right_colour(image: np.ndarray, mask: np.ndarray, name: str, colour: str | None) -> bool:
    """Whether an object's paint is nearest to its colour's, of all that its class has.

    Args:
        image: uint8 ``[h, w, 3]``. mask: bool ``[h, w]``, the object's pixels.
        name, colour: of the object; a class without colours is a ValueError.
    """
    if not BY_NAME[name].colours:
        raise ValueError(f"a {name} has no colours")
    known = _known(name)
    seen = _shares(image[mask], name)
    nearest = min(known, key=lambda key: float(np.square(known[key] - seen).sum()))
    return bool(_apart(hue_of(name, nearest[0]), hue_of(name, colour)) < NEAR)


@cache
def _known(name: str) -> dict[tuple[str | None, bool], np.ndarray]:
    """The shares of paints of a class by colour, in daylight and at sunset."""
    known = {}
    for colour in (None, *BY_NAME[name].colours):
        rgb, alpha = sprite(name, colour, 64)
        solid = rgb[alpha[..., 0] > 0.5]
        for sunset in (False, True):
            lit = solid * DUSK_LIGHT if sunset else solid
            known[colour, sunset] = _shares((lit.clip(0, 1) * 255).astype(np.uint8), name)
    return known


def _shares(pixels: np.ndarray, name: str) -> np.ndarray:
    """How much of some pixels, uint8 ``[n, 3]``, has the hue of each paint of a class: windows and
    wheels have hues too, so one paint alone says little.
    """
    hsv = np.asarray(Image.fromarray(pixels[None]).convert("HSV"), np.float32)[0] / 255
    hues = hsv[(hsv[:, 1] > 0.35) & (hsv[:, 2] > 0.2), 0]
    paints = [hue_of(name, colour) for colour in (None, *BY_NAME[name].colours)]
    return np.array([(_apart(hues, paint) < NEAR).sum() for paint in paints]) / max(len(pixels), 1)


def _apart(a, b):
    """Distance of hues on their circle, 0..0.5."""
    return np.abs((a - b + 0.5) % 1.0 - 0.5)
