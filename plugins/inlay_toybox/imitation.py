"""Two views of one toybox scene, and what is known of both: for models that imitate.

The things of a scene stand elsewhere, in other sizes and other light; which pixels belong together
is known, and so is the depth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from inlay_toybox import world
from inlay_toybox.backdrop import Look
from inlay_toybox.classes import GROUNDS


@dataclass(frozen=True)
class Views:
    """Two scenes with the same things, in the order of the first."""

    source: world.Scene
    reference: world.Scene


def views(seed: int, held_out: bool = False) -> Views | None:
    """A scene and another that has as many of its things as find room; None for an empty scene."""
    source = world.sample(seed, held_out)
    if not source.things:
        return None
    rng = np.random.default_rng([seed, 3])
    grounds = [g for g in GROUNDS if all(g in t.toy.grounds for t in source.things)]
    ground = grounds[int(rng.integers(len(grounds)))]
    reference = world.Scene(ground, bool(rng.random() < 0.3), Look.draw(rng, ground))
    kept = []
    for thing in source.things:
        placed = world.place(rng, reference, thing.toy, thing.colour)
        if placed:
            reference = replace(reference, things=(*reference.things, placed))
            kept.append(thing)
    if not kept:
        return None
    return Views(replace(source, things=tuple(kept)), reference)


def depth(scene: world.Scene, drawn: world.Rendering) -> np.ndarray:
    """How near each pixel is, float32 ``[size, size]``: 0 the sky, 1 the lower edge. The ground
    comes nearer from the horizon down; an object is as near as the place where it stands, one in
    the sky a little nearer than the sky.
    """
    size = drawn.image.shape[0]
    rows = (np.arange(size, dtype=np.float32) + 0.5) / size
    horizon = scene.look.horizon
    near = np.clip((rows - horizon) / (1 - horizon), 0, 1)
    out = np.repeat(near[:, None], size, 1).astype(np.float32)
    for thing, mask in zip(scene.things, drawn.masks, strict=True):
        stands = np.clip((thing.base - horizon) / (1 - horizon), 0, 1)
        out[mask] = max(0.15, stands)
    return out
