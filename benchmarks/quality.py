"""`make quality`: how good the toybox's models and Add-it are, over scenes nobody trained on.

Prints tables, writes them into docs/results.md between its markers, and contact sheets to
outputs/quality/. Every item is kept in outputs/quality/*.jsonl, so an interrupted run goes on where
it stopped; delete the folder to measure again. `quality.py --n 200`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

import inlay
import inlay_toybox
from inlay import Plugin, hookimpl
from inlay_config import config
from inlay_toybox import quality, world
from inlay_toybox.detector import Detections, Detector

ROOT = Path(__file__).parents[1]
OUT = ROOT / "outputs" / "quality"
PAGE = ROOT / "docs" / "results.md"
METHODS = ("copy the input", "plain text-to-image", "Add-it", "Add-it and paste_back")
CHUNK = 20  # items between two writes to disk, and on one sheet
THRESHOLD = 0.3
Row = dict[str, Any]


def main() -> None:
    """Measure what is not measured yet, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="scenes of each table")
    n = parser.parse_args().n
    OUT.mkdir(parents=True, exist_ok=True)
    detector = Detector.from_pretrained()
    drawn = kept("models", n, lambda: models(n, detector))
    inserted = insertions(n, detector)
    tables = {"models": model_table(drawn), "insertion": insertion_table(inserted)}
    for name, table in tables.items():
        print(f"\n{table}")
        write_table(name, table)
    print(f"\nwritten to {PAGE.relative_to(ROOT)}; sheets in {OUT.relative_to(ROOT)}")


def weights() -> str:
    """A name for the shipped weights: what was measured with others is not read."""
    digest = hashlib.sha256()
    for path in sorted(inlay_toybox.path("flux").parent.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def kept(name: str, n: int, measure: Callable[[], Row]) -> Row:
    """The result of `measure`, from disk when it was measured before with these weights."""
    path = OUT / f"{name}-{n}-{weights()}.json"
    if not path.is_file():
        path.write_text(json.dumps(measure(), indent=1))
    return json.loads(path.read_text())


# the models -----------------------------------------------------------------------------------


def models(n: int, detector: Detector) -> Row:
    """Object accuracy of toybox/flux, and of the detector on pictures and on their round trips."""
    pipe = pipeline()
    found = {
        "drawn": quality.object_accuracy(pipe, n, detector=detector),
        "seen": quality.detector_accuracy(2 * n, detector=detector),
        "decoded": quality.detector_accuracy(n, detector=detector, vae=pipe.vae),
    }
    return {k: {name: str(share) for name, share in shares.items()} for k, shares in found.items()}


def model_table(found: Row) -> str:
    drawn, seen, decoded = found["drawn"], found["seen"], found["decoded"]
    return table(
        ("measured", "share (count)", "aim"),
        [
            ("toybox/flux draws the named objects, trained pairs", drawn["objects"], "0.95"),
            ("… pairs that training never showed", drawn["held_out"], "reported"),
            ("… every object of the prompt at once", drawn["pictures"], "reported"),
            ("… chance: each picture read with the next prompt", drawn["swapped"], ""),
            ("detector finds objects (class, box)", seen["objects"], "0.97"),
            ("… class anywhere in the picture", seen["presence"], "reported"),
            ("… precision of what it finds", seen["precision"], "reported"),
            ("… masks with half overlap", seen["masks"], "reported"),
            ("… after the autoencoder's round trip", decoded["objects"], "reported"),
        ],
    )


def pipeline() -> Any:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(inlay_toybox.path("flux"))
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


# insertion ------------------------------------------------------------------------------------


def insertions(n: int, detector: Detector) -> list[Row]:
    """One row per item: of each method inclusion, placement, PSNR. Kept chunk by chunk."""
    digest = hashlib.sha256(options().encode()).hexdigest()[:8]
    path = OUT / f"insertion-{weights()}-{digest}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    items = list(quality.insertion_items(n))
    plugins = {**config.load("addit").plugins, "before": Before(), "paste_back": {}}
    session = inlay.Session(pipeline(), plugins) if len(rows) < n else None
    while session and len(rows) < n:
        first = len(rows)
        chunk = items[first : first + CHUNK]
        pictures = results(session, chunk, first)
        with path.open("a") as file:
            for item, made in zip(chunk, pictures, strict=True):
                rows.append(judge(item, made, detector) | {"chance": item.chance})
                file.write(json.dumps(rows[-1]) + "\n")
        sheet(chunk, pictures).save(OUT / f"insertion-{first:03d}.png")
        print(f"{len(rows)} of {n} items", flush=True)
    return rows[:n]


def options() -> str:
    """What the shipped experiment `addit` says, as JSON; the subject is each item's own."""
    plugins = config.load("addit").plugins
    plugins["subject_mask"]["subject"] = ""
    return json.dumps({name: values for name, values in plugins.items() if values})


class Before(Plugin):
    """Keeps the picture as it is before paste_back: one run serves two rows of the table."""

    @hookimpl
    def inlay_final(self, result: inlay.Result) -> None:
        self.picture = result.images["edit"]


def results(
    session: inlay.Session, items: list[quality.InsertionItem], seed: int
) -> list[dict[str, torch.Tensor]]:
    """Pictures `1 3 h w` of every method, item by item; noise from `seed` and the place."""
    call = quality.settings()
    captions = [item.target_caption for item in items]
    drawn = quality.generate(session.backbone.pipe, captions, seed)
    pictures = []
    for i, item in enumerate(items):
        session.plugins["subject_mask"].cfg.subject = item.subject
        edited = session.run(
            {"source": item.source_caption, "edit": item.target_caption},
            item.picture,
            steps=call["num_inference_steps"],
            guidance=call["guidance_scale"],
            true_cfg=call["true_cfg_scale"],
            seed=seed + i,
        )
        before, pasted = session.plugins["before"].picture, edited.images["edit"]
        made = (pixels(item.picture), drawn[i : i + 1], before.float().cpu(), pasted.float().cpu())
        pictures.append(dict(zip(METHODS, made, strict=True)))
    return pictures


def judge(item: quality.InsertionItem, pictures: dict[str, Any], detector: Detector) -> Row:
    """included: the detector sees the class; placed: half of the object lies where it may stand
    (None when there is none); psnr: dB against the input, outside the true object's footprint and
    outside the object that was found; literal: outside the true footprint alone."""
    source, footprint = pixels(item.picture), torch.from_numpy(item.footprint)
    seen = detector.detect(torch.cat(list(pictures.values())), THRESHOLD)
    judged: Row = {"held_out": item.held_out, "class": item.name}
    for (method, picture), found in zip(pictures.items(), seen, strict=True):
        body = new_object(found, item.name)
        objects = footprint if body is None else footprint | torch.from_numpy(grown(body))
        judged[method] = {
            "included": body is not None,
            "placed": None if body is None else world.well_placed(body, item.allowed),
            "psnr": psnr(picture, source, ~objects),
            "literal": psnr(picture, source, ~footprint),
        }
    return judged


def new_object(found: Detections, name: str) -> np.ndarray | None:
    """Mask `h w` of the surest detection of a class."""
    best = found.best(name)
    return None if best is None else found.masks[best].numpy()


def grown(mask: np.ndarray, cells: int = 4) -> np.ndarray:
    """A mask and the pixels within `cells` of it: shadows and soft edges belong to the object."""
    tensor = torch.from_numpy(mask).float()[None, None]
    return torch.nn.functional.max_pool2d(tensor, 2 * cells + 1, 1, cells)[0, 0].bool().numpy()


def psnr(a: torch.Tensor, b: torch.Tensor, where: torch.Tensor) -> float:
    """dB of pictures `1 3 h w` in 0..1 inside `where`; 99 when nothing differs."""
    error = (a - b).square()[..., where].mean()
    return min(99.0, float(-10 * error.clamp(min=1e-12).log10()))


def insertion_table(rows: list[Row]) -> str:
    """Means over items; affordance over those in which the object was found."""
    chance = fmean(row["chance"] for row in rows)
    lines = []
    for method in METHODS:
        judged = [row[method] for row in rows]
        placed = [j["placed"] for j in judged if j["placed"] is not None]
        unseen = [row[method]["included"] for row in rows if row["held_out"]]
        lines.append(
            (
                method,
                share(placed),
                share([j["included"] for j in judged]),
                share(unseen),
                f"{fmean(j['psnr'] for j in judged):.1f}",
                f"{fmean(j['literal'] for j in judged):.1f}",
            )
        )
    bound = fmean(elsewhere(item, i) for i, item in enumerate(quality.insertion_items(len(rows))))
    lines.append(("the true object, elsewhere", "–", "–", "–", "99.0", f"{bound:.1f}"))
    lines.append(("chance (the object at a random place)", f"{chance:.3f}", "–", "–", "–", "–"))
    head = ("method", "affordance", "inclusion", "inclusion, held-out pairs")
    head += ("background PSNR, dB", "outside the true footprint alone")
    return f"{table(head, lines)}\n\nOptions other than the defaults: `{options()}`."


def elsewhere(item: quality.InsertionItem, seed: int) -> float:
    """What a perfect insertion at another place reaches in the last column: the true object with
    its shadow at a random place of its row, every other pixel the input's."""
    source = pixels(item.picture)
    target = torch.from_numpy(world.render(item.target, item.picture.width).image.copy())
    footprint = torch.from_numpy(item.footprint)
    columns = np.flatnonzero(item.footprint.any(0))
    right = item.footprint.shape[1] - columns.max()
    shift = int(np.random.default_rng(seed).integers(-columns.min(), right))
    moved = torch.roll(target.permute(2, 0, 1)[None] / 255, shift, 3)
    pasted = torch.where(torch.roll(footprint, shift, 1), moved, source)
    return psnr(pasted, source, ~footprint)


def share(hits: list[bool]) -> str:
    return f"{fmean(hits):.3f} ({sum(hits)}/{len(hits)})" if hits else "–"


# pages ----------------------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_table(name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in the results page."""
    page = PAGE.read_text(encoding="utf-8")
    block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    page = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _: block, page, flags=re.S)
    PAGE.write_text(page, encoding="utf-8")


def pixels(picture: Image.Image) -> torch.Tensor:
    """`1 3 h w` in 0..1."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255


def sheet(
    items: list[quality.InsertionItem], pictures: list[dict[str, torch.Tensor]]
) -> Image.Image:
    """Input, plain text-to-image, Add-it, pasted back: three items in a line, twice as large."""
    side, columns = items[0].picture.width, 3
    width, lines = 4 * side + 14, -(-len(items) // columns)
    canvas = Image.new("RGB", (columns * width, lines * (side + 4)), "white")
    for i, (item, made) in enumerate(zip(items, pictures, strict=True)):
        shown = [item.picture, *(to_image(made[method]) for method in METHODS[1:])]
        for k, picture in enumerate(shown):
            place = (i % columns * width + k * (side + 2), i // columns * (side + 4))
            canvas.paste(picture, place)
    return canvas.resize((canvas.width * 2, canvas.height * 2), Image.Resampling.NEAREST)


def to_image(picture: torch.Tensor) -> Image.Image:
    array = (picture[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)


if __name__ == "__main__":
    main()
