"""The manifest: what it takes to make the same picture again, in manifest.json and in every PNG."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, PngImagePlugin

from inlay import images

if TYPE_CHECKING:
    from inlay.events import Result

PACKAGES = ("inlay", "torch", "diffusers", "transformers", "numpy", "pluggy")
FORMAT = 1


def build(experiment: Mapping[str, Any], **record: Any) -> dict[str, Any]:
    """The record of a run: `config.to_dict(experiment)` and what else decided its bits.

    record: plan (its digest), weights (`hash_weights`), inputs ({"image": `hash_image`}), seed,
    device, dtype, threads as they were in the run, timings ({part: seconds}).
    """
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    head = {"inlay_manifest": FORMAT, "experiment": dict(experiment), "versions": versions}
    return {**head, **record, "host": platform.node()}


def portable(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """For a picture that travels: without timings and host, paths cut to their file names."""
    kept = {key: value for key, value in manifest.items() if key not in ("timings", "host")}
    experiment = {**kept["experiment"], "out": None}
    experiment["input"] = {k: v and Path(v).name for k, v in experiment["input"].items()}
    if Path(experiment["model"]).is_absolute():
        experiment["model"] = Path(experiment["model"]).name
    return {**kept, "experiment": experiment}


def save_png(image: Image.Image, path: Path, manifest: Mapping[str, Any] | None = None) -> None:
    """Write the picture, the portable manifest in its text chunk `inlay`."""
    text = PngImagePlugin.PngInfo()
    if manifest:
        text.add_itxt("inlay", json.dumps(portable(manifest), sort_keys=True))
    images.save(image, path, pnginfo=text)


def save_result(result: Result, folder: str | Path) -> None:
    """images/LANE.png (LANE-0.png ... for several), masks/NAME.png, and manifest.json last."""
    groups = [("images", lane, batch, result.manifest) for lane, batch in result.images.items()]
    groups += [("masks", name, mask, None) for name, mask in result.board.of("mask")]
    for kind, name, batch, manifest in groups:
        for i, image in enumerate(pictures := images.to_pil(batch)):
            file = f"{name}-{i}.png" if len(pictures) > 1 else f"{name}.png"
            path = images.safe_join(Path(folder, kind), file)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(image, path, manifest)
    write_json(result.manifest, Path(folder, "manifest.json"))


def write_json(data: Any, path: Path) -> None:
    """Write beside, then rename."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def hash_image(image: Image.Image) -> str:
    """sha256 of size and decoded RGB pixels: the same picture in another format is the same input."""
    pixels = image.convert("RGB")
    return hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).hexdigest()


def hash_weights(folder: str | Path) -> str:
    """sha256 over a model's safetensors files, names and bytes; "" where there are none."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    stats = [(file, file.stat()) for file in files]
    parts = [
        (str(f.relative_to(folder)), _hash_file(f, s.st_size, s.st_mtime_ns)) for f, s in stats
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest() if parts else ""


@cache
def _hash_file(file: Path, size: int, modified: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
