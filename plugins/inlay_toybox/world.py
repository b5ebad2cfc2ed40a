"""Deterministic miniature scenes that know everything about themselves.

``sample(seed)`` draws a :class:`Scene`, a small frozen record in fractions of the picture's side;
``render(scene, size)`` draws it. A scene knows its caption, each object's mask, footprint and box,
where each class may plausibly stand, its twin without one object, and other views of an object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from inlay_toybox import backdrop, captions
from inlay_toybox.backdrop import DUSK_LIGHT, Look
from inlay_toybox.classes import BY_NAME, CLASSES, GROUNDS, HELD_OUT, ToyClass
from inlay_toybox.sprites import aspect, sprite

COUNTS = (0.06, 0.44, 0.36, 0.14)
TILTS = (-12, 0, 12)


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        name: class name. colour: adjective, or None for the sprite's own colours.
        x: centre, base: lower edge, side: longer side; all in fractions of the picture's side.
        flip: mirrored. tilt: degrees, counter-clockwise.
    """

    name: str
    colour: str | None
    x: float
    base: float
    side: float
    flip: bool = False
    tilt: int = 0

    @property
    def toy(self) -> ToyClass:
        return BY_NAME[self.name]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in fractions, for an untilted sprite."""
        width = self.side * min(1.0, aspect(self.name))
        height = self.side * min(1.0, 1.0 / aspect(self.name))
        return self.x - width / 2, self.base - height, self.x + width / 2, self.base


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn. ``things`` are in the order in which the caption names them."""

    ground: str
    sunset: bool
    look: Look
    things: tuple[Thing, ...] = ()

    @property
    def caption(self) -> str:
        return captions.caption(self.things, self.ground, self.sunset)

    @property
    def held_out(self) -> bool:
        """Whether any of its (class, ground) pairs is held out of training."""
        return any((t.name, self.ground) in HELD_OUT for t in self.things)

    def without(self, index: int) -> Scene:
        """Its twin without one object."""
        return replace(self, things=self.things[:index] + self.things[index + 1 :])

    def mirrored(self) -> Scene:
        """The same objects in mirrored places, over the same backdrop."""
        things = tuple(replace(t, x=1 - t.x, flip=not t.flip, tilt=-t.tilt) for t in self.things)
        return replace(self, things=things)


@dataclass(frozen=True)
class Rendering:
    """A drawn scene; ``n`` objects in the scene's order.

    Attributes:
        image: uint8 ``[size, size, 3]``.
        masks: bool ``[n, size, size]``, the visible pixels of each object.
        footprints: bool ``[n, size, size]``, every pixel that the object changes: body, shadow,
            reflection.
        boxes: float32 ``[n, 4]``, left, top, right, bottom in pixels, of the visible mask.
    """

    image: np.ndarray
    masks: np.ndarray
    footprints: np.ndarray
    boxes: np.ndarray


def place(
    rng: np.random.Generator, scene: Scene, toy: ToyClass, colour: str | None = None
) -> Thing | None:
    """Find room for one more object of a class, or None when it does not fit after a few tries."""
    ratio = aspect(toy.name)
    for _ in range(12):
        u = rng.random(4)
        side = toy.size * (0.86 + 0.14 * u[0])
        if toy.habitat == "sky":
            height = side * min(1.0, 1.0 / ratio)
            lowest = scene.look.horizon - 0.03
            base = height + 0.01 + u[1] * max(0.0, lowest - height - 0.01)
        else:
            upper, lower = backdrop.stand(scene.ground, scene.look)
            depth = u[1]
            side *= 0.80 + 0.20 * depth
            height = side * min(1.0, 1.0 / ratio)
            farthest = upper + 0.56 * height
            base = farthest + depth * max(0.0, lower - 0.01 - farthest)
        width = side * min(1.0, ratio)
        x = width / 2 + 0.01 + u[2] * (0.98 - width)
        tilt = TILTS[int(u[3] * 6) // 2] if toy.habitat == "sky" else 0
        thing = Thing(
            toy.name, colour, float(x), float(base), float(side), u[3] * 2 % 1 < 0.5, tilt
        )
        if all(_overlap(thing.box, other.box) < 0.12 for other in scene.things):
            return thing
    return None


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over the smaller of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


@cache
def _inhabitants(ground: str, held_out: bool) -> tuple[tuple[ToyClass, ...], tuple[ToyClass, ...]]:
    """Standing and flying classes of a ground, with or without the held-out pairs."""
    here = [c for c in CLASSES if ground in c.grounds]
    here = [c for c in here if held_out or (c.name, ground) not in HELD_OUT]
    return (
        tuple(c for c in here if c.habitat != "sky"),
        tuple(c for c in here if c.habitat == "sky"),
    )


def sample(seed: int, held_out: bool = False, count: int | None = None) -> Scene:
    """Draw a scene.

    Args:
        seed: the same seed gives the same scene.
        held_out: allow the (class, ground) pairs that are held out of training.
        count: number of objects, 0 to 3; random by default. Fewer when there is no room.
    """
    rng = np.random.default_rng([seed, int(held_out)])
    u = rng.random(4)
    ground = GROUNDS[int(u[0] * len(GROUNDS))]
    scene = Scene(ground, bool(u[1] < 0.2), Look.draw(rng, ground))
    wanted = int(np.searchsorted(np.cumsum(COUNTS), u[2])) if count is None else count
    standing, flying = _inhabitants(ground, held_out)
    for _ in range(min(wanted, 3)):
        taken = {t.name for t in scene.things}
        crowded = sum(t.toy.habitat == "sky" for t in scene.things) >= 1
        pool = standing if crowded or rng.random() < 0.72 else flying
        toy = pool[int(rng.random() * len(pool))]
        if toy.name in taken:
            continue
        colour = None
        if toy.colours and rng.random() < 0.75:
            colour = toy.colours[int(rng.random() * len(toy.colours))]
        thing = place(rng, scene, toy, colour)
        if thing:
            scene = replace(scene, things=(*scene.things, thing))
    return scene


def views(name: str, n: int, seed: int, colour: str | None = None) -> list[Scene]:
    """Several views of one object: ``n`` scenes with this object alone, in other places and
    light.
    """
    toy = BY_NAME[name]
    rng = np.random.default_rng([seed, 1])
    scenes: list[Scene] = []
    while len(scenes) < n:
        ground = toy.grounds[int(rng.random() * len(toy.grounds))]
        scene = Scene(ground, bool(rng.random() < 0.2), Look.draw(rng, ground))
        thing = place(rng, scene, toy, colour)
        if thing:
            scenes.append(replace(scene, things=(thing,)))
    return scenes


def _pixels(thing: Thing, size: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Left column, top row, premultiplied colour and opacity of an object."""
    side = max(2, round(thing.side * size))
    rgb, alpha = sprite(thing.name, thing.colour, side, thing.flip, thing.tilt)
    height, width = alpha.shape[:2]
    return round(thing.x * size - width / 2), round(thing.base * size) - height, rgb, alpha


@lru_cache(maxsize=4096)
def _shadow(width: int) -> np.ndarray:
    """A soft flat ellipse, opacity ``[h, w, 1]``."""
    height = max(3, round(width * 0.22))
    y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height * 2 - 1
    x = (np.arange(width, dtype=np.float32)[None] + 0.5) / width * 2 - 1
    return (0.5 * np.clip(1.6 * (1 - x * x - y * y), 0.0, 1.0))[..., None]


def _blend(
    canvas: np.ndarray, left: int, top: int, rgb: np.ndarray | float, alpha: np.ndarray
) -> tuple[slice, slice, np.ndarray] | None:
    """Lay premultiplied colour over the canvas, clipped at its edges; the window and the opacity
    used.
    """
    size = canvas.shape[0]
    height, width = alpha.shape[:2]
    y0, y1, x0, x1 = max(0, top), min(size, top + height), max(0, left), min(size, left + width)
    if y0 >= y1 or x0 >= x1:
        return None
    inner = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    part = alpha[inner]
    window = canvas[y0:y1, x0:x1]
    window *= 1.0 - part
    window += rgb[inner] if isinstance(rgb, np.ndarray) else rgb
    return slice(y0, y1), slice(x0, x1), part[..., 0]


def render(scene: Scene, size: int = 64) -> Rendering:
    """Draw a scene at ``size`` × ``size`` pixels, farthest object first."""
    canvas, _ = backdrop.draw(scene.ground, scene.sunset, scene.look, size)
    n = len(scene.things)
    masks = np.zeros((n, size, size), bool)
    footprints = np.zeros((n, size, size), bool)
    for index in sorted(range(n), key=lambda i: scene.things[i].base):
        thing = scene.things[index]
        left, top, rgb, alpha = _pixels(thing, size)
        height, width = alpha.shape[:2]
        ground_marks = None
        if thing.toy.habitat == "land":
            shade = _shadow(round(width * 1.08))
            under = top + height - round(shade.shape[0] * 0.62)
            ground_marks = _blend(canvas, left - round(width * 0.04), under, 0.0, shade)
        elif thing.toy.habitat == "water":
            depth = max(1, height // 2)
            fade = np.linspace(0.45, 0.05, depth, dtype=np.float32)[:, None, None]
            mirror = alpha[::-1][:depth] * fade
            tinted = rgb[::-1][:depth] * fade * np.array([0.75, 0.9, 1.0], np.float32)
            ground_marks = _blend(canvas, left, top + height, tinted, mirror)
        lit = rgb * DUSK_LIGHT if scene.sunset else rgb
        body = _blend(canvas, left, top, lit, alpha)
        for mark, threshold in ((ground_marks, 0.04), (body, 0.04)):
            if mark:
                footprints[index][mark[0], mark[1]] |= mark[2] > threshold
        if body:
            solid = body[2] > 0.5
            masks[:, body[0], body[1]] &= ~solid
            masks[index][body[0], body[1]] |= solid
    image = (np.clip(canvas, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)
    return Rendering(image, masks, footprints, boxes_of(masks))


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Left, top, right, bottom (exclusive) of bool masks ``[n, h, w]``: float32 ``[n, 4]``; 0 if
    empty.
    """
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def affordance(scene: Scene, name: str, size: int = 64) -> np.ndarray:
    """Where one more object of a class may plausibly be: bool ``[size, size]``.

    The zone of its habitat (empty where the class does not live over this ground), less the
    objects that are there already. An object counts as well placed when at least half of its mask
    lies inside.
    """
    toy = BY_NAME[name]
    _, zones = backdrop.draw(scene.ground, scene.sunset, scene.look, size)
    if scene.ground not in toy.grounds:
        return np.zeros((size, size), bool)
    taken = render(scene, size).masks.any(0) if scene.things else np.zeros((size, size), bool)
    return getattr(zones, toy.habitat) & ~taken


def well_placed(mask: np.ndarray, allowed: np.ndarray) -> bool:
    """Whether at least half of a mask's area lies inside the allowed region (False when empty)."""
    area = int(mask.sum())
    return area > 0 and int((mask & allowed).sum()) * 2 >= area


def chance(mask: np.ndarray, allowed: np.ndarray, draws: int = 64, seed: int = 0) -> float:
    """How often an object pasted at a uniformly random place would count as well placed, 0..1.

    The mask's box is moved to ``draws`` uniformly random places inside the picture.
    """
    left, top, right, bottom = boxes_of(mask[None])[0].astype(int)
    body = mask[top:bottom, left:right]
    height, width = body.shape
    size_y, size_x = mask.shape
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, size_y - height + 1, draws)
    columns = rng.integers(0, size_x - width + 1, draws)
    hits = [
        (allowed[r : r + height, c : c + width] & body).sum()
        for r, c in zip(rows, columns, strict=True)
    ]
    return float(np.mean(np.array(hits) * 2 >= body.sum()))


def sheet(scenes: Sequence[Scene], size: int = 64, columns: int = 8) -> Image.Image:
    """Pictures of scenes side by side, for the eye."""
    rows = -(-len(scenes) // columns)
    canvas = Image.new("RGB", (columns * (size + 4), rows * (size + 4)), "white")
    for index, scene in enumerate(scenes):
        row, column = divmod(index, columns)
        tile = Image.fromarray(render(scene, size).image)
        canvas.paste(tile, (column * (size + 4) + 2, row * (size + 4) + 2))
    return canvas
