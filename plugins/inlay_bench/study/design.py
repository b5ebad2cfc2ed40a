"""A study's questions: which pictures stand side by side, in which order, under which names.

Everything random comes from the seed. A page knows pictures by number and nothing of methods; the
key that names them is a file of its own.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inlay_bench.study.material import Material
from inlay_config.errors import ConfigError, InputError
from inlay_config.images import open_image

DESIGNS = {
    "2afc": "Which picture is the better edit?",
    "rank": "Order the pictures, the best first.",
    "likert": "How good is this edit?",
}
POINTS = 5  # of a rating
SMALL = 192  # pictures with no side longer than this are shown in their own pixels
FORMAT = 1


@dataclass(frozen=True)
class Question:
    """What one vote is on: an item and methods in the order shown."""

    item: str
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A study: what the page may know, and the key that it may not."""

    page: dict[str, Any]
    pictures: dict[str, str]
    key: dict[str, Any]


def questions(
    material: Material, design: str, seed: int, n: int | None = None, against: str | None = None
) -> list[Question]:
    """The questions in their order.

    n: of the items, drawn by the seed; all if not given. against: of a 2AFC, pairs with this method
    alone. Each method of a pair is on the left as often as on the right, but for one.
    """
    rng = np.random.default_rng(seed)
    items = [material.items[i] for i in rng.permutation(len(material.items))[:n]]
    asked: list[Question] = []
    if design == "2afc":
        pairs = list(combinations(material.methods, 2))
        for pair in [p for p in pairs if against is None or against in p]:
            flipped = rng.permutation(np.arange(len(items)) % 2)
            asked += [
                Question(item, pair[::-1] if flip else pair)
                for item, flip in zip(items, flipped, strict=True)
            ]
    elif design == "rank":
        for item in items:
            order = rng.permutation(len(material.methods))
            asked.append(Question(item, tuple(material.methods[i] for i in order)))
    else:
        asked = [Question(item, (method,)) for item in items for method in material.methods]
    return [asked[i] for i in rng.permutation(len(asked))]


def build(
    material: Material,
    design: str = "2afc",
    seed: int = 0,
    n: int | None = None,
    against: str | None = None,
    ties: bool = False,
    question: str | None = None,
    side: int = 768,
) -> Study:
    """A study of the material.

    ties: a 2AFC may be answered with "no difference". question: instead of the design's own. side:
    of pictures, at most. Raises ConfigError for an unknown design or method, InputError for a
    picture that cannot be read and for pictures of one item that differ in shape.
    """
    if design not in DESIGNS:
        raise ConfigError(f"no design '{design}'", where="--design", fix=f"{', '.join(DESIGNS)}.")
    if against is not None and against not in material.methods:
        fix = f"One of {', '.join(material.methods)}."
        raise ConfigError(f"no method '{against}'", where="--against", fix=fix)
    asked = questions(material, design, seed, n, against)
    numbers: dict[tuple[str, str], str] = {}
    for each in asked:
        for method in each.methods:
            numbers.setdefault((method, each.item), f"p{len(numbers) + 1:04d}")
    embedded = {number: material.pictures[shown] for shown, number in numbers.items()}
    before: dict[str, str] = {}
    for each in asked:
        if each.item in material.inputs and each.item not in before:
            before[each.item] = f"i{len(before) + 1:04d}"
            embedded[before[each.item]] = material.inputs[each.item]
    _same_shapes(asked, material)
    page: dict[str, Any] = {
        "design": design,
        "seed": seed,
        "ties": ties and design == "2afc",
        "points": POINTS,
        "question": question or DESIGNS[design],
        "questions": [
            {
                "id": f"q{i:04d}",
                "text": material.texts.get(each.item, ""),
                "input": before.get(each.item),
                "options": [numbers[method, each.item] for method in each.methods],
            }
            for i, each in enumerate(asked, 1)
        ],
    }
    pictures = {number: _data(path, side) for number, path in embedded.items()}
    content = json.dumps([page, pictures], sort_keys=True).encode()
    page["id"] = hashlib.sha256(content).hexdigest()[:16]
    key = {
        "inlay_study_key": FORMAT,
        "study": page["id"],
        "design": design,
        "seed": seed,
        "methods": material.methods,
        "questions": {q["id"]: each.item for q, each in zip(page["questions"], asked, strict=True)},
        "pictures": {number: method for (method, _), number in numbers.items()},
        "shown": {q["id"]: q["options"] for q in page["questions"]},
    }
    return Study(page, pictures, key)


def _same_shapes(asked: Sequence[Question], material: Material) -> None:
    """A picture of another shape than its neighbour gives its method away."""
    for each in asked:
        sizes = {}
        for method in each.methods:
            with Image.open(material.pictures[method, each.item]) as image:
                sizes[method] = image.width / image.height
        if max(sizes.values()) > 1.02 * min(sizes.values()):
            shapes = ", ".join(f"{method} {ratio:.2f}" for method, ratio in sizes.items())
            problem = f"pictures of item '{each.item}' differ in width by height: {shapes}"
            fix = "Crop them alike, or a voter knows which is whose."
            raise InputError(problem, where="study", fix=fix)


def _data(path: Path, side: int) -> str:
    """A picture as a WebP address that holds it; small ones without loss, nothing but pixels."""
    picture = open_image(path, where="study")
    small = max(picture.size) <= SMALL
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="WEBP", lossless=small, quality=90, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
