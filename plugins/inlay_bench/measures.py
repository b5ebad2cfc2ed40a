"""Measures: from an item and a method's picture to the numbers of its record.

A measure names its columns and the networks it looks through; a task names measures. A number is
null where it does not apply to an item, and a whole measure is left out, with the reason in the
report, where a network is not at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from inlay_bench import networks
from inlay_bench.metrics import affordance, clip, perceptual, pixels
from inlay_bench.tasks import Item
from inlay_config.errors import ModelError
from inlay_config.images import to_tensor

Numbers = dict[str, float | None]
THRESHOLD = 0.3  # least score of a detection
MARGIN = 4  # pixels around a found object that are its soft edge and shadow


@dataclass(frozen=True)
class Column:
    """One number of a record. key: in the record. title: in tables. better: "higher", "lower" or
    "" (neither). digits: shown after the point. about: what it says, for the report."""

    key: str
    title: str
    about: str
    better: str = "higher"
    digits: int = 3


@dataclass(frozen=True)
class Measure:
    """Columns, the networks behind them, and the function that fills them."""

    columns: tuple[Column, ...]
    networks: tuple[str, ...]
    function: Callable[[Evidence], Numbers]


MEASURES: dict[str, Measure] = {}


def measure(
    name: str, *columns: Column, networks: tuple[str, ...] = ()
) -> Callable[[Callable[[Evidence], Numbers]], Callable[[Evidence], Numbers]]:
    """Register a measure that a task's YAML can name."""

    def register(function: Callable[[Evidence], Numbers]) -> Callable[[Evidence], Numbers]:
        MEASURES[name] = Measure(columns, networks, function)
        return function

    return register


class Evidence:
    """What a measure may look at. source, picture: `1 3 h w` in 0..1, before and after. networks:
    by name."""

    def __init__(
        self, item: Item, source: Tensor, picture: Tensor, networks: Mapping[str, Any]
    ) -> None:
        self.item, self.source, self.picture, self.networks = item, source, picture, networks

    @cached_property
    def found(self) -> Any:
        """The detector's new objects of the item's class: boxes `n 4`, masks `n h w`, surest
        first."""
        seen = self.networks["detector"].detect(self.picture, THRESHOLD)[0]
        mine = [i for i, name in enumerate(seen.classes) if name == self.item.facts["class"]]
        return Found(seen.boxes[mine], seen.masks[mine])

    @cached_property
    def background(self) -> Tensor:
        """Pixels `1 1 h w` that belong to no object: outside the footprint of the true object,
        where one is known, and outside what was found, with a margin."""
        touched = torch.zeros(self.picture.shape[-2:], dtype=torch.bool)
        if "footprint" in self.item.truth:
            touched |= torch.from_numpy(self.item.truth["footprint"])
        if len(self.found.masks):
            touched |= grown(self.found.masks[0])
        return ~touched[None, None]


@dataclass(frozen=True)
class Found:
    """New objects: boxes `n 4` in pixels, masks bool `n h w`."""

    boxes: Tensor
    masks: Tensor


def evidence(item: Item, source: Any, picture: Any, networks: Mapping[str, Any]) -> Evidence:
    """Evidence from 8-bit pictures (PIL). Raises ValueError when their sizes differ."""
    if source.size != picture.size:
        sizes = " and ".join(f"{p.width}x{p.height}" for p in (source, picture))
        raise ValueError(f"the input and the picture differ in size: {sizes}")
    return Evidence(item, to_tensor(source), to_tensor(picture), networks)


def grown(mask: Tensor, cells: int = MARGIN) -> Tensor:
    """A mask `h w` and the pixels within `cells` of it."""
    wide = torch.nn.functional.max_pool2d(mask[None, None].float(), 2 * cells + 1, 1, cells)
    return wide[0, 0].bool()


def number(value: Tensor) -> float | None:
    """The one value of a metric; None for NaN, where nothing counts."""
    plain = float(value)
    return plain if plain == plain else None


@measure(
    "inclusion",
    Column("inclusion", "inclusion", "share of pictures in which the detector finds the object"),
    networks=("detector",),
)
def inclusion(e: Evidence) -> Numbers:
    return {"inclusion": float(len(e.found.boxes) > 0)}


@measure(
    "affordance",
    Column(
        "affordance",
        "affordance",
        "at least half of the surest new object's own pixels lie where its class may be; pictures "
        "without a new object are left out",
    ),
    Column(
        "affordance_all", "affordance, none = 0", "the same, pictures without a new object count 0"
    ),
    networks=("detector",),
)
def affordance_by_mask(e: Evidence) -> Numbers:
    allowed = torch.from_numpy(e.item.truth["allowed"])
    score = affordance.picture_score(affordance.by_masks(e.found.masks[:1], allowed))
    return {"affordance": score, "affordance_all": score or 0.0}


@measure(
    "boxes",
    Column(
        "affordance_single",
        "affordance, one box",
        "share of a picture's new objects with half of their box inside one allowed box",
    ),
    Column(
        "affordance_union", "affordance, all boxes", "the same, inside all allowed boxes together"
    ),
    networks=("detector",),
)
def affordance_by_boxes(e: Evidence) -> Numbers:
    allowed = affordance.boxes_of(e.item.truth["allowed"])
    readings = {"single": affordance.single, "union": affordance.union}
    return {
        f"affordance_{name}": affordance.picture_score(share(e.found.boxes, allowed))
        for name, share in readings.items()
    }


@measure(
    "clip",
    Column(
        "clip_direction",
        "CLIP direction",
        "cosine of the pictures' change and the captions' change",
    ),
    Column("clip_out", "CLIP out", "cosine of the picture and the caption with the object"),
    Column("clip_image", "CLIP image", "cosine of the picture before and after"),
    networks=("judge",),
)
def clip_similarities(e: Evidence) -> Numbers:
    texts = e.item.texts
    seen = clip.similarities(
        e.networks["judge"], e.source, e.picture, [texts["source"]], [texts["target"]]
    )
    return {
        "clip_direction": number(seen.direction),
        "clip_out": number(seen.edited),
        "clip_image": number(seen.image),
    }


@measure(
    "background",
    Column(
        "psnr",
        "background PSNR, dB",
        f"against the input, outside the true and the found object; {pixels.CEILING:g} = equal",
        digits=1,
    ),
    Column("ssim", "background SSIM", "likewise, structural similarity"),
    networks=("detector",),
)
def background(e: Evidence) -> Numbers:
    pair = (e.source, e.picture)
    return {
        "psnr": number(pixels.psnr(*pair, e.background)),
        "ssim": number(pixels.ssim(*pair, e.background)),
    }


@measure(
    "background-lpips",
    Column("lpips", "background LPIPS", "likewise, perceptual distance", better="lower"),
    networks=("detector", "lpips"),
)
def background_lpips(e: Evidence) -> Numbers:
    distance = perceptual.lpips(e.networks["lpips"], e.source, e.picture, e.background)
    return {"lpips": number(distance)}


# networks --------------------------------------------------------------------------------------


def detector() -> Any:
    """The toybox's detector. Raises ModelError when its weights do not fit."""
    from safetensors import SafetensorError

    from inlay_toybox import path
    from inlay_toybox.detector import Detector

    folder = path("detector")
    try:
        net: Any = Detector.from_pretrained(folder)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        fix = "Install the package again, or train it: inlay-toybox train detector."
        raise ModelError(f"cannot be loaded: {error}", where=str(folder), fix=fix) from error
    net.name, net.digest = "toybox/detector", networks.digest_of(net)
    return net


NETWORKS: dict[str, Callable[[], Any]] = {
    "detector": detector,
    "judge": networks.judge,
    "lpips": networks.lpips,
}
