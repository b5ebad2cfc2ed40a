"""Edits of scenes: an instruction, and the scene before and after it, equal everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from inlay_toybox import captions, world
from inlay_toybox.classes import CLASSES, HELD_OUT
from inlay_toybox.sprites import aspect
from inlay_toybox.world import Scene, Thing

_WORDS = {
    "add": ("add {new}", "add {new} {place}", "put {new} {place}", "insert {new}"),
    "remove": ("remove the {old}", "delete the {old}", "take the {old} away"),
    "replace": ("replace the {old} by {new}", "turn the {old} into {new}"),
    "recolour": ("make the {name} {colour}", "paint the {name} {colour}"),
    "light": ("make it {light}", "turn it to {light}"),
}
KINDS = tuple(_WORDS)
MIXTURE = ("add", "add", "remove", "replace", "recolour", "light")
"""Kinds in the shares in which models are trained on them."""


@dataclass(frozen=True)
class Edit:
    """kind: one of ``KINDS``. instruction: as a person would say it ("add a red bus on the road").
    before, after: the scenes; their captions tell the same in the manner of prompts."""

    kind: str
    instruction: str
    before: Scene
    after: Scene


def draw(seed: int, kinds: Sequence[str] = MIXTURE, held_out: bool = False) -> Edit:
    """Draw an edit; the same seed gives the same one.

    Args:
        seed: of the scene as well.
        kinds: which to choose from, more often where one is repeated; the next that the scene
            allows is taken.
        held_out: allow the (class, ground) pairs that are held out of training.

    Raises:
        ValueError: no scene of this or the following seeds allows any of the kinds.
    """
    rng = np.random.default_rng([seed, 3])
    order = [kinds[i] for i in rng.permutation(len(kinds))]
    for further in range(100):
        scene = world.sample(seed + further * 1_000_003, held_out)
        for kind in order:
            if made := _MAKERS[kind](rng, scene, held_out):
                before, after, words = made
                wording = _WORDS[kind][int(rng.random() * len(_WORDS[kind]))]
                return Edit(kind, wording.format(**words), before, after)
    raise ValueError(f"no scene allows an edit of the kinds {', '.join(kinds)}")


Made = tuple[Scene, Scene, dict[str, str]] | None


def addition(scene: Scene, index: int) -> Edit:
    """The plainest wording of a scene's twin without one object, and back: "add a dog"."""
    words = _told(scene, index)
    return Edit("add", _WORDS["add"][0].format(**words), scene.without(index), scene)


def _told(scene: Scene, index: int) -> dict[str, str]:
    thing = scene.things[index]
    sky = thing.toy.habitat == "sky"
    place = "in the sky" if sky else captions.PREPOSITION[scene.ground]
    return {"new": captions.phrase(thing), "old": captions.subject(thing), "place": place}


def _add(rng: np.random.Generator, scene: Scene, held_out: bool) -> Made:
    if not scene.things:
        return None
    index = int(rng.random() * len(scene.things))
    return scene.without(index), scene, _told(scene, index)


def _remove(rng: np.random.Generator, scene: Scene, held_out: bool) -> Made:
    made = _add(rng, scene, held_out)
    return made and (made[1], made[0], made[2])


def _replace(rng: np.random.Generator, scene: Scene, held_out: bool) -> Made:
    if not scene.things:
        return None
    index = int(rng.random() * len(scene.things))
    old = scene.things[index]
    taken = {thing.name for thing in scene.things}
    pool = [
        toy
        for toy in CLASSES
        if toy.habitat == old.toy.habitat and scene.ground in toy.grounds and toy.name not in taken
        if held_out or (toy.name, scene.ground) not in HELD_OUT
    ]
    if not pool:
        return None
    toy = pool[int(rng.random() * len(pool))]
    colour = None
    if toy.colours and rng.random() < 0.75:
        colour = toy.colours[int(rng.random() * len(toy.colours))]
    new = _inside(replace(old, name=toy.name, colour=colour, side=_depth(old) * toy.size))
    after = _with(scene, index, new)
    words = _told(scene, index) | {"new": captions.phrase(new)}
    return scene, after, words


def _depth(thing: Thing) -> float:
    """How near an object is: its size as a share of its class's largest."""
    return thing.side / thing.toy.size


def _inside(thing: Thing) -> Thing:
    """Moved by as little as keeps it inside the picture."""
    ratio = aspect(thing.name)
    width, height = thing.side * min(1.0, ratio), thing.side * min(1.0, 1.0 / ratio)
    x = min(max(thing.x, width / 2 + 0.01), 0.99 - width / 2)
    return replace(thing, x=x, base=max(thing.base, height + 0.01))


def _recolour(rng: np.random.Generator, scene: Scene, held_out: bool) -> Made:
    painted = [i for i, thing in enumerate(scene.things) if thing.toy.colours]
    if not painted:
        return None
    index = painted[int(rng.random() * len(painted))]
    old = scene.things[index]
    others = [colour for colour in old.toy.colours if colour != old.colour]
    colour = others[int(rng.random() * len(others))]
    after = _with(scene, index, replace(old, colour=colour))
    return scene, after, {"name": old.name, "colour": colour}


def _light(rng: np.random.Generator, scene: Scene, held_out: bool) -> Made:
    after = replace(scene, sunset=not scene.sunset)
    return scene, after, {"light": "day" if scene.sunset else "sunset"}


def _with(scene: Scene, index: int, thing: Thing) -> Scene:
    things = list(scene.things)
    things[index] = thing
    return replace(scene, things=tuple(things))


_MAKERS: dict[str, Callable[[np.random.Generator, Scene, bool], Made]] = {
    "add": _add,
    "remove": _remove,
    "replace": _replace,
    "recolour": _recolour,
    "light": _light,
}
