"""Rows without a model: the exemplar's object pasted into the region, and harmonised.

They stand where Paint by Example compares with image harmonisation (DCCF: a network we have not):
colour transfer (Reinhard et al., 2001) and Poisson blending (Perez et al., 2003).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from inlay_bench.tasks import Item
from inlay_config.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

STRENGTH = 0.4  # of a colour transfer; all the way an object has no colour of its own left
Array = NDArray[Any]
Harmonise = Callable[[Array, Array, Array], Array]
"""(source `h w 3`, pasted `h w 3`, opacity `h w`), all 0..1 -> harmonised picture `h w 3`"""


def paste(item: Item, source: Image.Image, harmonise: Harmonise) -> Image.Image:
    """The exemplar inside the item's region: as large as fits, its shape kept, in the middle.

    Its object alone where the item knows its pixels (`truth["cutout"]`), else all of it. Raises
    InputError for an item without exemplar or region.
    """
    from PIL import Image

    if "exemplar" not in item.given or "region" not in item.truth:
        raise InputError("nobody knows what to paste, or where", where=f"item {item.id}")
    exemplar, region = item.given["exemplar"], item.truth["region"]
    cutout = item.truth.get("cutout", np.ones(exemplar.size[::-1], bool))
    box, hole = _box(cutout), _box(region)
    (thing_wide, thing_tall), (wide, tall) = _size(box), _size(hole)
    scale = min(wide / thing_wide, tall / thing_tall)
    size = (max(round(thing_wide * scale), 1), max(round(thing_tall * scale), 1))
    left, top = hole[0] + (wide - size[0]) // 2, hole[1] + (tall - size[1]) // 2
    place = (slice(top, top + size[1]), slice(left, left + size[0]))
    shape = Image.Resampling.LANCZOS
    before = np.asarray(source.convert("RGB"), np.float64) / 255
    pasted, opacity = before.copy(), np.zeros(before.shape[:2])
    pasted[place] = np.asarray(exemplar.resize(size, shape, box=box), np.float64) / 255
    solid = Image.fromarray(cutout.astype(np.uint8) * 255).resize(size, shape, box=box)
    opacity[place] = np.asarray(solid, np.float64) / 255
    made = harmonise(before, pasted, opacity * region)
    return Image.fromarray((made.clip(0, 1) * 255).round().astype(np.uint8))


def _box(mask: Array) -> tuple[int, int, int, int]:
    """Left, top, right, bottom (exclusive) of a mask `h w` that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _size(box: tuple[int, int, int, int]) -> tuple[int, int]:
    """Width and height."""
    return box[2] - box[0], box[3] - box[1]


def over(source: Array, pasted: Array, opacity: Array) -> Array:
    """The pasted pixels over the source, as they are."""
    return source + (pasted - source) * opacity[..., None]


def colour_transfer(source: Array, pasted: Array, opacity: Array) -> Array:
    """Mean and deviation of the object's colours, in CIELAB, go `STRENGTH` of the way to those of
    the picture around it (Reinhard et al., Color transfer between images, 2001)."""
    from skimage.color import lab2rgb, rgb2lab

    solid = opacity > 0.5
    if not solid.any() or solid.all():
        return over(source, pasted, opacity)
    around, lab = rgb2lab(source)[~solid], rgb2lab(pasted)
    mean, deviation = lab[solid].mean(0), lab[solid].std(0)
    gain = around.std(0) / np.maximum(deviation, 1e-6)
    moved = lab + STRENGTH * ((lab - mean) * gain + around.mean(0) - lab)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # colours that no screen shows are clipped
        return over(source, lab2rgb(moved), opacity)


def poisson(source: Array, pasted: Array, opacity: Array) -> Array:
    """The object's gradients with the picture's colours at its outline (Perez et al., Poisson image
    editing, 2003): the discrete Poisson equation inside the silhouette, solved directly. At the
    picture's border there is no outline to meet."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.linalg import spsolve

    inside = opacity > 0.5
    if not inside.any() or inside.all():
        return over(source, pasted, opacity)
    number = np.full(inside.shape, -1)
    number[inside] = np.arange(inside.sum())
    rows, columns = np.nonzero(inside)
    degree, right = np.zeros(len(rows)), np.zeros((len(rows), 3))
    entries: list[tuple[Array, Array]] = []
    for down, aside in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        r, c = rows + down, columns + aside
        there = (r >= 0) & (r < inside.shape[0]) & (c >= 0) & (c < inside.shape[1])
        here, r, c = np.flatnonzero(there), r[there], c[there]
        degree[here] += 1
        right[here] += pasted[rows[here], columns[here]] - pasted[r, c]
        known = ~inside[r, c]
        right[here[known]] += source[r[known], c[known]]
        entries.append((here[~known], number[r[~known], c[~known]]))
    at, neighbour = (np.concatenate(part) for part in zip(*entries, strict=True))
    index = np.concatenate([np.arange(len(rows)), at])
    other = np.concatenate([np.arange(len(rows)), neighbour])
    values = np.concatenate([degree, -np.ones(len(at))])
    made = source.copy()
    made[inside] = spsolve(coo_matrix((values, (index, other))).tocsc(), right)
    return made


PASTES: dict[str, Harmonise] = {
    "paste": over,
    "paste_colour": colour_transfer,
    "paste_poisson": poisson,
}
