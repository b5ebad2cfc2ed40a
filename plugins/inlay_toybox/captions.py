"""The captions' grammar: "a red bus and a cow on the grass and a kite in the sky at sunset"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from inlay_toybox.classes import BY_NAME

PREPOSITION = {
    "grass": "on the grass",
    "sand": "on the sand",
    "snow": "in the snow",
    "road": "on the road",
    "lake": "on the lake",
    "sea": "on the sea",
}


class Named(Protocol):
    """What a caption needs to know of an object."""

    @property
    def name(self) -> str: ...

    @property
    def colour(self) -> str | None: ...


def subject(thing: Named) -> str:
    """The words that name an object: "cow", "red bus"."""
    return f"{thing.colour} {thing.name}" if thing.colour else thing.name


def phrase(thing: Named) -> str:
    """The object with its article: "an elephant", "a red bus"."""
    return f"a {subject(thing)}" if thing.colour else f"{BY_NAME[thing.name].article} {thing.name}"


def join(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def caption(things: Sequence[Named], ground: str, sunset: bool, flat: bool = False) -> str:
    """The caption of a scene.

    Args:
        things: its objects in the order in which they are named.
        ground: one of the six grounds.
        sunset: whether to add "at sunset".
        flat: name all objects in one list and leave out "in the sky".
    """
    low = [phrase(t) for t in things if flat or BY_NAME[t.name].habitat != "sky"]
    high = [] if flat else [phrase(t) for t in things if BY_NAME[t.name].habitat == "sky"]
    if low:
        text = f"{join(low)} {PREPOSITION[ground]}"
        text += f" and {join(high)} in the sky" if high else ""
    elif high:
        text = f"{join(high)} in the sky over the {ground}"
    else:
        text = f"a view of the {ground}"
    return f"{text} at sunset" if sunset else text
