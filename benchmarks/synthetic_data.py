"""What pictures that `inlay augment` made are worth to a detector, beside real ones.

A small detector is trained from scratch, by the recipe of the toybox's own, on few labelled scenes;
on those and on pictures without any object into which Add-it inserted one; and on as many real
scenes instead. What each finds is counted on the same scenes, which nobody trained on.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import comparison
import numpy as np
import torch
from PIL import Image

from inlay_bench import intervals, report
from inlay_bench.augment import coco
from inlay_bench.augment.cli import augment
from inlay_config.images import open_image, whole
from inlay_toybox import world
from inlay_toybox.captions import PREPOSITION
from inlay_toybox.classes import CLASSES, GROUNDS, HELD_OUT
from inlay_toybox.detector import Detector
from inlay_toybox.quality.detection import compare
from inlay_toybox.quality.shares import SCENES, THRESHOLD, Share, unseen_scenes
from inlay_toybox.recipes.detector import detection_loss, disturb
from inlay_toybox.training import Batch

REAL, EMPTY = 64, 22  # labelled scenes; pictures of each ground without an object
FLYING = 6  # of EMPTY that get an object of the sky, as often as scenes have one
FIRST = 8_000_000  # seed of the scenes to train on, away from those of the recipes
STEPS, ROWS, WIDTH, RATE = 400, 32, 16, 2e-3
SEEDS = 3  # detectors of each kind


@dataclass(frozen=True)
class Name:
    """What is known of an object: its class."""

    name: str


@dataclass(frozen=True)
class Labelled:
    """A picture float32 `3 h w` in 0..1 with `n` objects: boxes float32 `n 4` (left, top, right,
    bottom in pixels) and masks bool `n h w`. To the recipe it is both scene and rendering."""

    image: torch.Tensor
    things: tuple[Name, ...]
    boxes: np.ndarray
    masks: np.ndarray

    def mirrored(self) -> Labelled:
        left, top, right, bottom = self.boxes.T
        side = self.image.shape[-1]
        boxes = np.stack([side - right, top, side - left, bottom], 1)
        masks = self.masks[..., ::-1].copy()  # tensors have no negative strides
        return replace(self, image=self.image.flip(-1), boxes=boxes, masks=masks)


def section(args: argparse.Namespace) -> str:
    """The section of the results page, whatever was asked of the others."""
    return table(comparison.OUT / "synthetic-data")


def table(out: Path, scenes: int = 300) -> str:
    """What detectors of each kind find in `scenes` unseen scenes; files are kept below `out`."""
    real, made = rendered(REAL, FIRST), augmented(out)
    sets = {
        f"{REAL} real scenes": real,
        f"{REAL} real scenes and {len(made)} augmented pictures": real + made,
        f"{len(made)} augmented pictures": made,
        f"{REAL + len(made)} real scenes": rendered(REAL + len(made), FIRST),
    }
    counts = {
        name: mean([found(out, each, seed, scenes) for seed in range(SEEDS)])
        for name, each in sets.items()
    }
    drawn, (base, *_) = intervals.draws(scenes), counts.values()
    lines = []
    for name, (recall, precision) in counts.items():
        means = [intervals.interval(values, drawn) for values in (recall, precision)]
        gain = intervals.difference(recall, base[0], drawn)
        lines.append((name, *map(shown, means), shown(gain) if lines else ""))
    head = ("trained on", "objects found", "detections that are right", "more found")
    return "\n".join([*report.table(head, lines), "", note(scenes)])


def mean(values: Sequence[np.ndarray]) -> np.ndarray:
    """Of what is known; NaN where nothing is."""
    known: np.ndarray = np.ma.masked_invalid(values).mean(0).filled(np.nan)
    return known


def shown(value: intervals.Interval) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def note(scenes: int) -> str:
    return (
        f"* {scenes} unseen scenes, {SEEDS} detectors of each kind ({STEPS} steps of {ROWS} "
        "pictures, mirrored too); means over scenes with paired 95% intervals. An object is found "
        "where class and half box overlap agree.\n"
        "* The augmented pictures are scenes without an object, which nobody had to label; one was "
        "inserted by `addit_paste` as it ships, and labelled by `inlay augment`, shadow and all."
    )


def rendered(n: int, first: int) -> list[Labelled]:
    """The next `n` scenes with an object, labelled by the world itself."""
    pictures: list[Labelled] = []
    while len(pictures) < n:
        scene, first = world.sample(first), first + 1
        if scene.things:
            drawn, names = world.render(scene), tuple(Name(t.name) for t in scene.things)
            image = torch.from_numpy(drawn.image).permute(2, 0, 1) / 255
            pictures.append(Labelled(image, names, drawn.boxes, drawn.masks))
    return pictures


def augmented(out: Path) -> list[Labelled]:
    """What `inlay augment` makes of scenes without objects, ground by ground."""
    made: list[Labelled] = []
    for number, ground in enumerate(GROUNDS):
        here = [c for c in CLASSES if ground in c.grounds and (c.name, ground) not in HELD_OUT]
        seeds = iter(range(FIRST + number * 10_000, FIRST + (number + 1) * 10_000))
        for sky, n in ((False, EMPTY - FLYING), (True, FLYING)):
            folder = out / f"{ground}-{'sky' if sky else 'low'}"
            objects = ",".join(c.name for c in here if (c.habitat == "sky") is sky)
            empty(folder, ground, seeds, n)
            where = f"in the sky over the {ground}" if sky else PREPOSITION[ground]
            augment(
                folder, objects, experiment="addit_paste", out=str(folder / "made"), per=1,
                caption=f"a view of the {ground}", template=f"{{a}} {{object}} {where}",
                labels=None, area="0.005,0.5", tries=2, seed=0, as_json=True,
            )  # fmt: skip
            made += read(folder / "made")
    return made


def empty(folder: Path, ground: str, seeds: Sequence[int], n: int) -> None:
    """Write `n` pictures of a ground by day without an object."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = (world.sample(seed, count=0) for seed in seeds)
    fitting = (scene for scene in scenes if scene.ground == ground and not scene.sunset)
    for i in range(n):
        picture = Image.fromarray(world.render(next(fitting)).image)
        picture.save(folder / f"{i:03}.png")


def read(folder: Path) -> list[Labelled]:
    """A folder with images/ and COCO annotations."""
    data = coco.read(folder / "annotations.json")
    names = {kind["id"]: kind["name"] for kind in data["categories"]}
    pictures = []
    for image in data["images"]:
        mine = [thing for thing in data["annotations"] if thing["image_id"] == image["id"]]
        pixels = np.array(open_image(folder / "images" / image["file_name"]))
        boxes = np.array([thing["bbox"] for thing in mine], np.float32)
        boxes[:, 2:] += boxes[:, :2]
        size = pixels.shape[:2]
        masks = np.stack([coco.inside(thing["segmentation"], size) for thing in mine])
        things = tuple(Name(names[thing["category_id"]]) for thing in mine)
        picture = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        pictures.append(Labelled(picture, things, boxes, masks))
    return pictures


def found(out: Path, pictures: list[Labelled], seed: int, scenes: int) -> np.ndarray:
    """Shares of objects found and of detections that are right, by scene, `2 n` (NaN: none), of a
    detector trained on these pictures; kept."""
    digest = zlib.crc32(b"".join(p.image.numpy().tobytes() + p.boxes.tobytes() for p in pictures))
    asked = f"{STEPS}-{ROWS}-{WIDTH}-{RATE}-{seed}-{scenes}"
    return kept(out / f"found-{digest:08x}-{asked}.json",
                lambda: measured(trained(pictures, seed), scenes))  # fmt: skip


def kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array from a file, or made and written to it."""
    if not path.is_file():
        with whole(path) as partial:
            partial.write_text(json.dumps(make().tolist()), encoding="utf-8")
    return np.array(json.loads(path.read_text(encoding="utf-8")))


def trained(pictures: list[Labelled], seed: int) -> Detector:
    """A detector from scratch."""
    torch.manual_seed(seed)
    detector, every = Detector(width=WIDTH), [*pictures, *(p.mirrored() for p in pictures)]
    adamw = torch.optim.AdamW(detector.parameters(), RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(adamw, RATE, STEPS, pct_start=0.1)
    for _ in range(STEPS):
        rows = [every[i] for i in torch.randint(len(every), (ROWS,)).tolist()]
        images = torch.stack([p.image for p in rows])
        loss = detection_loss(
            detector(disturb(images, None)),
            Batch(images, images[:, :1], rows, rows),  # type: ignore[arg-type]
            torch.device("cpu"),
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 2.0)
        adamw.step()
        adamw.zero_grad()
        rates.step()
    return detector.eval()


def measured(detector: Detector, scenes: int) -> np.ndarray:
    """What it finds, see `found`."""
    rows = []
    for scene in unseen_scenes(scenes, SCENES):
        shares = {key: Share() for key in ("objects", "presence", "precision", "masks")}
        drawn = world.render(scene)
        image = torch.from_numpy(drawn.image).permute(2, 0, 1)[None] / 255
        compare(scene, drawn, detector.detect(image, THRESHOLD)[0], shares)
        rows.append([shares["objects"].value, shares["precision"].value])
    return np.array(rows).T
