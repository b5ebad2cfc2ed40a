"""``inlay-toybox report``: fills the generated parts of docs/toybox.md.

The page is written by hand; what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is
replaced, NAME being ``models`` (the table of sizes) or a model's. Figures, sample grids and curves
are made from the shipped weights and the ``training.csv`` beside them, so a fresh clone suffices.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from inlay_toybox import sheets, training
from inlay_toybox.quality.figures import figures, home, shipped


@dataclass(frozen=True)
class Size:
    """Parameters and bytes of the weights in a folder."""

    parameters: int
    bytes: int


def size(model: Path) -> Size:
    """Counts the weights below a folder."""
    files = list(model.rglob("*.safetensors"))
    count = 0
    for file in files:
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                length = 1
                for side in weights.get_slice(key).get_shape():
                    length *= side
                count += length
    return Size(count, sum(file.stat().st_size for file in files))


def own(name: str) -> Size:
    """The size of one subject: the autoencoder is counted for itself and not for toybox/flux."""
    whole = size(home(name))
    if name != "flux":
        return whole
    part = size(home("vae"))
    return Size(whole.parameters - part.parameters, whole.bytes - part.bytes)


def trained(model: Path) -> str:
    """ "4,700 steps, 90 minutes" from the shipped curve."""
    file = model / "training.csv"
    if not file.is_file():
        return "no record"
    with file.open() as lines:
        *_, last = [{"step": "0", "seconds": "0"}, *csv.DictReader(lines)]
    return f"{int(last['step']):,} steps, {float(last['seconds']) / 60:.0f} minutes"


def model_table(names: list[str]) -> str:
    """The table of sizes."""
    lines = ["| model | parameters | file | trained for |", "|---|---|---|---|"]
    total = 0
    for name in names:
        one = own(name)
        total += one.bytes
        title = "the shared `vae`" if name == "vae" else f"`toybox/{name}`"
        lines.append(
            f"| {title} | {one.parameters / 1e6:.2f} M | {one.bytes / 1e6:.1f} MB | "
            f"{trained(home(name))} |"
        )
    return "\n".join([*lines, f"| together | | {total / 1e6:.1f} MB | |"])


def section(name: str, n: int, pictures: Path) -> str:
    """Figures, sample grid and curve of one model; writes the two pictures."""
    lines = ["| measured | value | aim |", "|---|---|---|"]
    lines += [f"| {f.label} | {f.value} | {f.aim} |" for f in figures(name, n)]
    grid, curve = pictures / f"toybox-{name}-samples.webp", pictures / f"toybox-{name}-loss.png"
    if caption := sheets.draw(name, grid):
        lines += ["", f"![{caption}](pictures/{grid.name})", ""]
        lines += [f"{caption[0].upper()}{caption[1:]}."]
    record = home(name) / "training.csv"
    if record.is_file():
        training.draw_curve(record, curve)
    if curve.is_file():
        lines += ["", f"![training curve of {name}](pictures/{curve.name})"]
    return "\n".join(lines)


def fill(page: str, name: str, text: str) -> str:
    """The page with the block of that name replaced.

    Raises:
        ValueError: the page has no such block.
    """
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.S)
    if not pattern.search(page):
        raise ValueError(f"the page has no block <!-- {name} --> … <!-- /{name} -->")
    return pattern.sub(lambda _: f"<!-- {name} -->\n{text}\n<!-- /{name} -->", page)


def write(page: Path, names: list[str] | None = None, n: int = 200) -> list[Path]:
    """Fill a page's blocks, pictures beside it in ``pictures/``.

    Args:
        page: the Markdown file, with a block for each model.
        names: models to report; by default all of them.
        n: unseen scenes behind each figure.

    Returns:
        The files written.

    Raises:
        ValueError: an unknown model, or a page without its block.
        OSError: no page there, or it cannot be written.
    """
    chosen = shipped(names)
    text = page.read_text(encoding="utf-8")
    for name in ("models", *chosen):
        fill(text, name, "")
    pictures = page.parent / "pictures"
    pictures.mkdir(exist_ok=True)
    blocks = {"models": model_table(shipped())}
    for name in chosen:
        blocks[name] = section(name, n, pictures)
        print(f"{name} reported", flush=True)
    text = page.read_text(encoding="utf-8")  # again: it may have been edited meanwhile
    for name, block in blocks.items():
        text = fill(text, name, block)
    partial = page.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(page)
    return [page, *sorted(pictures.glob("toybox-*"))]
