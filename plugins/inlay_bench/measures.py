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
from inlay_bench.metrics import affordance, clip, contact, perceptual, pixels
from inlay_bench.tasks import Item
from inlay_config.errors import InputError, ModelError
from inlay_config.images import to_tensor

Numbers = dict[str, float | None]
THRESHOLD = 0.3  # least score of a detection
MARGIN = 4  # pixels around a found object that are its soft edge and shadow


@dataclass(frozen=True)
class Column:
    """One number of a record.

    key: in the record. title: in tables. about: what it says. better: "higher", "lower" or "".
    digits: shown after the point. mark, flag: of a yes-or-no number, the words below a picture that
    a yes puts there, and a no. unit: shown behind the number below a picture.
    """

    key: str
    title: str
    about: str
    better: str = "higher"
    digits: int = 3
    mark: str = ""
    flag: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Measure:
    """Columns, the table they stand in, the networks behind them, the function that fills them."""

    group: str
    columns: tuple[Column, ...]
    networks: tuple[str, ...]
    function: Callable[[Evidence], Numbers]


MEASURES: dict[str, Measure] = {}


def measure(
    name: str, group: str, *columns: Column, networks: tuple[str, ...] = ()
) -> Callable[[Callable[[Evidence], Numbers]], Callable[[Evidence], Numbers]]:
    """Register a measure that a task's YAML can name."""

    def register(function: Callable[[Evidence], Numbers]) -> Callable[[Evidence], Numbers]:
        MEASURES[name] = Measure(group, columns, networks, function)
        return function

    return register


class Evidence:
    """What a measure may look at. source, picture: `1 3 h w` in 0..1, before and after. networks:
    by name."""

    def __init__(
        self, item: Item, source: Tensor, picture: Tensor, networks: Mapping[str, Any]
    ) -> None:
        self.item, self.source, self.picture, self.networks = item, source, picture, networks

    @property
    def allowed(self) -> Tensor:
        """Pixels `h w` where the object may be. Raises InputError when the item does not know."""
        if "allowed" not in self.item.truth:
            fix = "Leave `affordance` and `boxes` out of the task's measures."
            raise InputError("no allowed region is known", where=f"item {self.item.id}", fix=fix)
        return torch.from_numpy(self.item.truth["allowed"])

    @cached_property
    def found(self) -> Found:
        """The detector's new objects of the item's class: boxes `n 4`, masks `n h w`, surest
        first. One that lies half on objects of this class that were there before is not new."""
        seen = self.networks["detector"].detect(self.picture, THRESHOLD)[0]
        known = self.item.truth.get("present")
        before = torch.zeros(()).bool() if known is None else torch.from_numpy(known)
        mine = [
            i
            for i, (name, mask) in enumerate(zip(seen.classes, seen.masks, strict=True))
            if name == self.item.facts["class"] and 2 * (mask & before).sum() < mask.sum()
        ]
        return Found(seen.boxes[mine], seen.masks[mine])

    @cached_property
    def footprint(self) -> Tensor:
        """Pixels `h w` that the true object changes; none where it is not known."""
        known = self.item.truth.get("footprint")
        nothing = torch.zeros(self.picture.shape[-2:], dtype=torch.bool)
        return nothing if known is None else torch.from_numpy(known)

    @cached_property
    def background(self) -> Tensor:
        """Pixels `1 1 h w` that belong to no object: outside the true object's footprint and
        outside the surest one that was found, with a margin."""
        touched = self.footprint
        if len(self.found.masks):
            touched = touched | grown(self.found.masks[0])
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


# the object ------------------------------------------------------------------------------------

OBJECT, BOXES = "The object", "Affordance by boxes"
MEANING = "Pictures and captions, by CLIP"
BACKGROUND, STRICT = "The background", "The background, outside the true object's footprint alone"


@measure(
    "inclusion",
    OBJECT,
    Column("inclusion", "inclusion", "the detector finds the object in the picture", mark="found"),
    networks=("detector",),
)
def inclusion(e: Evidence) -> Numbers:
    return {"inclusion": float(len(e.found.boxes) > 0)}


@measure(
    "held-out",
    OBJECT,
    Column("held_out", "of held-out pairs", "inclusion of objects on grounds never trained on"),
    networks=("detector",),
)
def inclusion_of_held_out_pairs(e: Evidence) -> Numbers:
    return {"held_out": inclusion(e)["inclusion"] if e.item.facts["held_out"] else None}


@measure(
    "affordance",
    OBJECT,
    Column(
        "affordance",
        "affordance",
        "at least half of the surest new object's own pixels lie where its class may be; pictures "
        "without a new object are left out",
        mark="placed",
    ),
    Column("affordance_all", "none found = 0", "affordance, a picture without a new object is a 0"),
    networks=("detector",),
)
def affordance_by_mask(e: Evidence) -> Numbers:
    score = affordance.picture_score(affordance.by_masks(e.found.masks[:1], e.allowed))
    return {"affordance": score, "affordance_all": score or 0.0}


@measure(
    "boxes",
    BOXES,
    Column(
        "affordance_single",
        "one box",
        "the share of a picture's new objects with half of their box inside one of the boxes that "
        "make up the allowed region; pictures without a new object are left out",
    ),
    Column("affordance_union", "all boxes", "likewise, inside all of these boxes together"),
    networks=("detector",),
)
def affordance_by_boxes(e: Evidence) -> Numbers:
    allowed = affordance.boxes_of(e.allowed.numpy())
    readings = {"single": affordance.single, "union": affordance.union}
    return {
        f"affordance_{name}": affordance.picture_score(share(e.found.boxes, allowed))
        for name, share in readings.items()
    }


@measure(
    "contact",
    OBJECT,
    Column(
        "contact",
        "contact",
        "the surest new object has its shadow (on land) or reflection (on water); objects in the "
        "sky are left out",
        mark="touches",
    ),
    networks=("detector",),
)
def contact_mark(e: Evidence) -> Numbers:
    if not len(e.found.masks):
        return {"contact": None}
    seen = contact.present(e.source[0], e.picture[0], e.found.masks[0], e.item.facts["habitat"])
    return {"contact": None if seen is None else float(seen)}


@measure(
    "source",
    OBJECT,
    Column(
        "source",
        "input in order",
        "the detector finds in the input what its caption names, and not the object to insert",
        better="",
        flag="input not in order",
    ),
    networks=("detector",),
)
def source_in_order(e: Evidence) -> Numbers:
    seen = e.networks["detector"].detect(e.source, THRESHOLD)[0].classes
    right = e.item.facts["class"] not in seen and set(e.item.facts["things"]) <= set(seen)
    return {"source": float(right)}


@measure(
    "side",
    OBJECT,
    Column(
        "side",
        "on its side",
        "the surest new object is on that side of another which the caption says",
    ),
    networks=("detector",),
)
def on_the_side_asked(e: Evidence) -> Numbers:
    if not len(e.found.boxes):
        return {"side": None}
    left, _, right, _ = e.found.boxes[0].tolist()
    is_left = (left + right) / 2 < e.item.facts["anchor"] * e.picture.shape[-1]
    return {"side": float(is_left == (e.item.facts["side"] == "left of"))}


# pictures and captions -------------------------------------------------------------------------


@measure(
    "clip",
    MEANING,
    Column(
        "clip_direction", "direction", "cosine of the pictures' change and the captions' change"
    ),
    Column("clip_out", "out", "cosine of the picture and the caption with the object"),
    Column("clip_image", "image", "cosine of the pictures before and after"),
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


# the background --------------------------------------------------------------------------------


@measure(
    "background",
    BACKGROUND,
    Column(
        "psnr",
        "PSNR, dB",
        "against the input, outside the true object's footprint and outside the object that was "
        f"found; {pixels.CEILING:g} = equal",
        digits=1,
        unit="dB",
    ),
    Column("ssim", "SSIM", "likewise, structural similarity"),
    networks=("detector",),
)
def background(e: Evidence) -> Numbers:
    return differences(e, e.background, "")


@measure(
    "background-lpips",
    BACKGROUND,
    Column("lpips", "LPIPS", "likewise, perceptual distance", better="lower"),
    networks=("detector", "lpips"),
)
def background_lpips(e: Evidence) -> Numbers:
    distance = perceptual.lpips(e.networks["lpips"], e.source, e.picture, e.background)
    return {"lpips": number(distance)}


@measure(
    "footprint",
    STRICT,
    Column(
        "psnr_strict",
        "PSNR, dB",
        "an object at another plausible place counts as damage here; the row `elsewhere` says how "
        "much a perfect one costs",
        digits=1,
    ),
    Column("ssim_strict", "SSIM", "likewise, structural similarity"),
)
def outside_footprint(e: Evidence) -> Numbers:
    return differences(e, ~e.footprint[None, None], "_strict")


@measure(
    "footprint-lpips",
    STRICT,
    Column("lpips_strict", "LPIPS", "likewise, perceptual distance", better="lower"),
    networks=("lpips",),
)
def outside_footprint_lpips(e: Evidence) -> Numbers:
    where = ~e.footprint[None, None]
    distance = perceptual.lpips(e.networks["lpips"], e.source, e.picture, where)
    return {"lpips_strict": number(distance)}


def differences(e: Evidence, where: Tensor, suffix: str) -> Numbers:
    """PSNR and SSIM over the pixels that count."""
    return {
        f"psnr{suffix}": number(pixels.psnr(e.source, e.picture, where)),
        f"ssim{suffix}": number(pixels.ssim(e.source, e.picture, where)),
    }


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
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot be loaded: {reason}", where=str(folder), fix=fix) from error
    net.name, net.digest = "toybox/detector", networks.digest_of(net)
    return net


NETWORKS: dict[str, Callable[..., Any]] = {
    "detector": detector,
    "inception": lambda: networks.inception(),
    "judge": networks.judge,
    "lpips": networks.lpips,
}
