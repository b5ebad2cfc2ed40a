"""The things that live in the toybox: 32 classes, where each may be, and the pairs held out of
training.

A class lives on *land*, on *water* or in the *sky*, and over some of the six grounds. One tenth of
all (class, ground) pairs is held out of every training set (``HELD_OUT``): a model that draws a
penguin on the sand has composed what it knows, it has not remembered a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Habitat = Literal["land", "water", "sky"]

LAND = ("grass", "sand", "snow", "road")
WATER = ("lake", "sea")
GROUNDS = LAND + WATER


@dataclass(frozen=True)
class ToyClass:
    """One class of objects.

    Attributes:
        name: the word(s) used in captions; may be two words ("fire truck").
        sprite: code point of its Fluent Emoji picture, the stem of the file in ``sprites/``.
        habitat: the zone of a scene where it may be.
        grounds: the grounds over which it may be.
        size: longer side of a near object, as a fraction of the picture's side.
        colours: adjectives that recolour it; an object without an adjective has the sprite's
            colours.
        hue: hue (0..1) of the paint that ``colours`` replaces.
    """

    name: str
    sprite: str
    habitat: Habitat
    grounds: tuple[str, ...]
    size: float
    colours: tuple[str, ...] = ()
    hue: float = 0.0

    @property
    def article(self) -> str:
        return "an" if self.name[0] in "aeiou" else "a"


def _land(name: str, sprite: str, size: float, *grounds: str, **more) -> ToyClass:
    return ToyClass(name, sprite, "land", grounds or LAND, size, **more)


def _water(name: str, sprite: str, size: float) -> ToyClass:
    return ToyClass(name, sprite, "water", WATER, size)


def _sky(name: str, sprite: str, size: float, **more) -> ToyClass:
    return ToyClass(name, sprite, "sky", GROUNDS, size, **more)


CLASSES: tuple[ToyClass, ...] = (
    _land("cow", "1f404", 0.44),
    _land("dog", "1f415", 0.35),
    _land("horse", "1f40e", 0.46),
    _land("sheep", "1f411", 0.40, "grass", "snow", "road"),
    _land("pig", "1f416", 0.40, "grass", "sand", "road"),
    _land("elephant", "1f418", 0.51, "grass", "sand", "road"),
    _land("giraffe", "1f992", 0.55, "grass", "sand", "road"),
    _land("zebra", "1f993", 0.46, "grass", "sand", "road"),
    _land("penguin", "1f427", 0.37, "sand", "snow", "road"),
    _land("car", "1f697", 0.46, colours=("red", "blue", "green"), hue=0.98),
    _land("bus", "1f68c", 0.53, colours=("red", "blue", "green"), hue=0.10),
    _land("fire truck", "1f692", 0.53, "grass", "snow", "road"),
    _land("tractor", "1f69c", 0.48, "grass", "sand", "road"),
    _land("bicycle", "1f6b2", 0.44, "grass", "sand", "road"),
    _land("house", "1f3e0", 0.53, "grass", "sand", "snow"),
    _land("circus tent", "1f3aa", 0.53, "grass", "sand", "snow"),
    _land("chair", "1fa91", 0.37),
    _land("tree", "1f333", 0.53, "grass", "snow", "road"),
    _land("cactus", "1f335", 0.44, "grass", "sand", "road"),
    _land("snowman", "26c4", 0.44, "grass", "snow", "road"),
    _water("sailboat", "26f5", 0.46),
    _water("ship", "1f6a2", 0.51),
    _water("duck", "1f986", 0.37),
    _water("swan", "1f9a2", 0.40),
    _water("whale", "1f433", 0.46),
    _water("canoe", "1f6f6", 0.46),
    _sky("kite", "1fa81", 0.40),
    _sky("balloon", "1f388", 0.37, colours=("red", "blue", "green"), hue=0.97),
    _sky("airplane", "2708", 0.42),
    _sky("helicopter", "1f681", 0.42),
    _sky("parachute", "1fa82", 0.42),
    _sky("rocket", "1f680", 0.40),
)
BY_NAME: dict[str, ToyClass] = {c.name: c for c in CLASSES}
NAMES: tuple[str, ...] = tuple(BY_NAME)
PAIRS: tuple[tuple[str, str], ...] = tuple((c.name, g) for c in CLASSES for g in c.grounds)

HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("cow", "snow"),
        ("horse", "sand"),
        ("elephant", "road"),
        ("penguin", "sand"),
        ("car", "grass"),
        ("house", "snow"),
        ("chair", "road"),
        ("cactus", "grass"),
        ("duck", "sea"),
        ("whale", "lake"),
        ("kite", "sand"),
        ("airplane", "lake"),
    }
)
