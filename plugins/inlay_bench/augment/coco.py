"""COCO annotations (Lin et al. 2014): what an inserted object is, and where."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from skimage import measure
from skimage.draw import polygon2mask
from skimage.morphology import closing, disk

from inlay_config.errors import InputError
from inlay_config.images import whole

Mask = np.ndarray[Any, np.dtype[np.bool_]]


def footprint(before: np.ndarray, after: np.ndarray, near: Mask, threshold: float = 0.08) -> Mask:
    """Pixels `h w` that an insertion has changed: by more than `threshold` of the range in some
    channel, inside `near`, without specks. before, after: uint8 `h w 3`."""
    change = np.abs(after.astype(np.float32) - before.astype(np.float32)).max(-1) / 255
    changed = closing((change > threshold) & near, disk(1))
    labels = measure.label(changed)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(np.isin(labels, np.flatnonzero(sizes >= max(4, 0.1 * sizes.max(initial=0)))))


def annotation(mask: Mask) -> dict[str, Any]:
    """bbox [x, y, width, height] and area in pixels, polygons, of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    polygons = []
    for contour in measure.find_contours(np.pad(mask, 1).astype(float), 0.5):
        points = measure.approximate_polygon(contour - 1, tolerance=0.5)[:, ::-1] + 0.5
        if len(points) >= 4:  # the last closes the ring
            polygons.append([round(float(v), 2) for v in points[:-1].ravel()])
    return {
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(mask.sum()),
        "segmentation": polygons,
        "iscrowd": 0,
    }


def inside(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> Mask:
    """The pixels `h w` that polygons (x, y, x, y, ..., in pixels from the corner) enclose."""
    mask = np.zeros(size, bool)
    for polygon in polygons:
        corners = np.reshape(polygon, (-1, 2))[:, ::-1] - 0.5  # of pixels' middles
        mask |= polygon2mask(size, corners)
    return mask


def read(path: Path) -> dict[str, Any]:
    """An annotation file. Raises InputError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        for image in data["images"]:
            image["id"], image["file_name"]
        for thing in data["annotations"]:
            thing["image_id"], thing["category_id"]
        {kind["id"]: kind["name"] for kind in data["categories"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"holds no COCO annotations ({type(error).__name__}: {error})"
        raise InputError(problem, where=str(path), fix="Give an instances_*.json.") from error
    return dict(data)


def write(
    path: Path, records: Iterable[Mapping[str, Any]], objects: Sequence[str],
    known: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """One file for all pictures: of each record the inserted object, and what `known` says of the
    picture it was inserted into, less what it hides. Categories of `known` keep their ids."""
    known = known or {"images": [], "annotations": [], "categories": []}
    kinds = {kind["name"]: kind["id"] for kind in known["categories"]}
    for name in objects:
        kinds.setdefault(name, max(kinds.values(), default=0) + 1)
    before = {image["file_name"]: image["id"] for image in known["images"]}
    images: list[dict[str, Any]] = []
    things: list[dict[str, Any]] = []
    for record in records:
        image = {key: record[key] for key in ("file_name", "width", "height")}
        images.append({"id": len(images) + 1, **image})
        theirs = [
            {key: value for key, value in thing.items() if key not in ("id", "image_id")}
            for thing in known["annotations"]
            if thing["image_id"] == before.get(record["source"])
            and not _hidden(thing.get("bbox"), record["annotation"]["bbox"])
        ]
        ours = {"category_id": kinds[record["object"]], **record["annotation"]}
        for thing in (*theirs, ours):
            things.append({"id": len(things) + 1, "image_id": images[-1]["id"], **thing})
    categories = [{"id": number, "name": name} for name, number in kinds.items()]
    data = {"images": images, "annotations": things, "categories": categories}
    with whole(path) as partial:
        partial.write_text(json.dumps(data), encoding="utf-8")


def _hidden(box: Sequence[float] | None, by: Sequence[float]) -> bool:
    """Whether more than half of a box [x, y, width, height] lies inside another."""
    if not box:
        return False
    (x, y, w, h), (left, top, width, height) = box, by
    across = min(x + w, left + width) - max(x, left)
    down = min(y + h, top + height) - max(y, top)
    return across > 0 and down > 0 and across * down > 0.5 * w * h
