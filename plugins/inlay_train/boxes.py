"""Pictures with boxes around their objects: annotations of COCO, of Open Images, of the toybox."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from inlay_config.errors import ConfigError, InputError
from inlay_config.images import open_image
from inlay_train.recipe import Sample
from inlay_train.self_reference import Box, Settings, fits, make

SMALLEST = 40
"""Pixels that an object of the toybox must show at 64 pixels a side."""


@dataclass
class Sources:
    """Where pictures come from; what is named is trained on together.

    coco, open_images: a JSON file of instances, a CSV file of boxes, with their `pictures`, a
    folder. toybox: number of its scenes.
    """

    coco: str | None = None
    open_images: str | None = None
    pictures: str = "."
    toybox: int = 0


Boxed = tuple[Path, list[tuple[float, ...]]]
"""A picture, and boxes (left, top, right, bottom) in shares of its sides."""


def coco(file: Path, pictures: Path) -> Iterator[Boxed]:
    """Of a COCO instances file: boxes of a fitting size, crowds left out."""
    held = _json(file)
    boxes = defaultdict[Any, list[tuple[float, ...]]](list)
    sizes = {image["id"]: (image["width"], image["height"]) for image in held["images"]}
    for row in held["annotations"]:
        width, height = sizes[row["image_id"]]
        left, top, across, down = row["bbox"]
        sides = left / width, top / height, (left + across) / width, (top + down) / height
        if not row.get("iscrowd") and _fitting(sides):
            boxes[row["image_id"]].append(sides)
    for image in held["images"]:
        if image["id"] in boxes:
            yield pictures / image["file_name"], boxes[image["id"]]


def open_images(file: Path, pictures: Path) -> Iterator[Boxed]:
    """Of an Open Images box file: boxes of a fitting size, groups and depictions left out."""
    boxes = defaultdict[str, list[tuple[float, ...]]](list)
    columns = ("XMin", "YMin", "XMax", "YMax")
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            missing = {"ImageID", *columns} - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"no column {sorted(missing)[0]}")
            for row in reader:
                sides = tuple(float(row[key]) for key in columns)
                whole = row.get("IsGroupOf") != "1" and row.get("IsDepiction") != "1"
                if whole and _fitting(sides):
                    boxes[row["ImageID"]].append(sides)
    except (OSError, ValueError) as error:
        fix = "Columns ImageID, XMin, XMax, YMin and YMax are needed."
        raise InputError(f"cannot be read: {error}", where=str(file), fix=fix) from error
    for name, found in boxes.items():
        yield pictures / f"{name}.jpg", found


def _fitting(sides: tuple[float, ...]) -> bool:
    left, top, right, bottom = (round(side * 1000) for side in sides)
    return fits((left, top, right, bottom), 1000, 1000)


def _json(file: Path) -> Any:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        return {key: held[key] for key in ("images", "annotations")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "It is no COCO file of instances: images and annotations are needed."
        raise InputError(f"cannot be read: {error}", where=str(file), fix=fix) from error


class SelfReference:
    """Rows `picture` `3 s s`, `mask` `1 s s` and `exemplar` `3 e e` in 0..1 (`self_reference`): of
    every picture one of its boxes.

    size: s; shown: e; named: rows also have `words` for the object, of the toybox alone.
    """

    def __init__(
        self, sources: Sources, size: int, shown: int, settings: Settings, named: bool = False
    ) -> None:
        self.size, self.shown, self.settings, self.named = size, shown, settings, named
        self.listed: list[Boxed] = []
        pictures = Path(sources.pictures)
        if sources.coco:
            self.listed += coco(Path(sources.coco), pictures)
        if sources.open_images:
            self.listed += open_images(Path(sources.open_images), pictures)
        self.scenes = sources.toybox
        if not len(self):
            fix = "Name annotations (data.coco, data.open_images) or a number of toybox scenes."
            raise ConfigError("nothing to train on", where="data", fix=fix)
        if named and self.listed:
            fix = "Train on data.toybox alone."
            raise ConfigError("no words are known for boxes", where="prompt", fix=fix)

    def __len__(self) -> int:
        return len(self.listed) + self.scenes

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        words, finer = dict[str, str](), None
        if index >= len(self.listed):
            picture, finer, box, name = of_toybox(index - len(self.listed), self.size, rng)
            words = {"words": name} if self.named else {}
        else:
            file, boxes = self.listed[index]
            picture = pil_to_tensor(open_image(file, str(file))).float() / 255
            box = _pixels(boxes[int(rng.integers(len(boxes)))], *picture.shape[-2:])
        pair = make(picture, box, self.size, self.shown, rng, self.settings, finer)
        return {"picture": pair.picture, "mask": pair.mask, "exemplar": pair.exemplar, **words}


def _pixels(sides: tuple[float, ...], height: int, width: int) -> Box:
    left, top, right, bottom = sides
    return (
        int(left * width),
        int(top * height),
        min(width, int(np.ceil(right * width))),
        min(height, int(np.ceil(bottom * height))),
    )


def of_toybox(seed: int, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Box, str]:
    """A scene `3 s s`, the same drawn twice as large, the box in the first of one object that shows
    enough of itself, and words for it; of the next scene that has one where this has none."""
    from inlay_toybox import captions, world

    while True:
        scene = world.sample(seed)
        drawn = world.render(scene, size)
        least = SMALLEST * size**2 / 64**2
        if len(seen := np.flatnonzero(drawn.masks.sum((1, 2)) >= least)):
            break
        seed += 1
    shown = int(rng.choice(seen))
    left, top, right, bottom = (int(side) for side in drawn.boxes[shown])
    picture, finer = (
        torch.from_numpy(image).permute(2, 0, 1).float() / 255
        for image in (drawn.image, world.render(scene, 2 * size).image)
    )
    return picture, finer, (left, top, right, bottom), captions.subject(scene.things[shown])
