"""Pictures of an evaluation on disk: inputs, and what methods made of them.

A method's picture says in the PNG itself what it was made by and from, so that it is drawn once:
after a kill, or when it is to be measured by other networks, it is taken from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from inlay_bench.records import on_disk
from inlay_bench.tasks import Item
from inlay_config import manifest
from inlay_config.errors import InputError
from inlay_config.images import whole

CHUNK = "inlay-eval"
Draw = Callable[[Item, Image.Image], Image.Image]


@dataclass(frozen=True)
class Stamp:
    """What a picture depends on, and how long it took. made_by: digest of an identity. made_from:
    of the input's pixels, or of the words and the seed of an input that was drawn."""

    made_by: str
    made_from: str
    seconds: float = 0.0


def path_of(out: Path, method: str, item: str) -> Path:
    """Where the picture of an item lies."""
    return out / "pictures" / method / f"{item}.png"


def store(picture: Image.Image, path: Path, stamp: Stamp | None = None) -> None:
    """Write a PNG whole or not at all. Raises DiskError when there is no room."""
    text = PngImagePlugin.PngInfo()
    if stamp:
        text.add_text(CHUNK, json.dumps(asdict(stamp)))
    with on_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            picture.save(partial, format="PNG", pnginfo=text)


def kept(path: Path, made_by: str, made_from: str) -> tuple[Image.Image, float] | None:
    """A stored picture and the seconds it took; None unless it is there, made by and from these."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            stamp = Stamp(**json.loads(image.info[CHUNK]))
            picture = image.convert("RGB")
    except Exception:  # whatever a broken file makes the decoders raise: it is made again
        return None
    same = (stamp.made_by, stamp.made_from) == (made_by, made_from)
    return (picture, stamp.seconds) if same else None


class Sources:
    """The inputs of items, on disk beside the results: given, or drawn once.

    made_by: digest of what draws them.
    """

    def __init__(self, out: Path, draw: Draw | None, made_by: str = "") -> None:
        self.out, self.draw, self.made_by = out, draw, made_by

    def __call__(self, item: Item) -> Image.Image:
        path = path_of(self.out, "input", item.id)
        for name, picture in item.given.items():
            store(picture, path_of(self.out, f"given-{name}", item.id))
        if item.picture is not None:
            store(item.picture, path)
            return item.picture
        if self.draw is None:
            raise InputError("it has no picture", where=f"item {item.id}")
        made_from = digest({"text": item.texts["source"], "seed": item.seed})
        if drawn := kept(path, self.made_by, made_from):
            return drawn[0]
        picture = self.draw(item, Image.new("RGB", (1, 1)))
        store(picture, path, Stamp(self.made_by, made_from))
        return picture


def digest(identity: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of plain data."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(item: Item, source: Image.Image) -> str:
    """Twelve hexadecimal digits of all pictures that a method gets of an item."""
    if not item.given:
        return digest_of(source)
    return digest({"input": digest_of(source), **{k: digest_of(p) for k, p in item.given.items()}})


def digest_of(picture: Image.Image) -> str:
    """Twelve hexadecimal digits of a picture's pixels."""
    return manifest.hash_image(picture)[:12]
