"""The manifest: what it takes to make the same picture again, in manifest.json and in every PNG."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

PACKAGES = ("inlay", "torch", "diffusers", "transformers", "numpy", "pluggy")
FORMAT = 1


def build(
    experiment: Mapping[str, Any], folder: str, pictures: Mapping[str, Image.Image], **record: Any
) -> dict[str, Any]:
    """The record of a run: `config.to_dict(experiment)` and what else decided its bits.

    folder: of the weights ("": a live pipeline's, not hashed); pictures: the inputs by kind;
    record: plan (its digest), seed, device, dtype, threads of the run, timings ({part: seconds}).
    """
    record["weights"] = hash_weights(folder) if folder else ""
    record["inputs"] = {kind: hash_image(picture) for kind, picture in pictures.items()}
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


def hash_image(image: Image.Image) -> str:
    """sha256 of size and RGB pixels: the same picture in another format is the same input."""
    pixels = image.convert("RGB")
    return hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).hexdigest()


def hash_weights(folder: str | Path) -> str:
    """sha256 over a model's safetensors files, names and bytes, or over one checkpoint; "" where
    there are none."""
    one = [Path(folder)] if Path(folder).is_file() else []
    files = one or sorted(Path(folder).rglob("*.safetensors"))
    parts = [(str(file.relative_to(folder)), _hash_file(file, file.stat())) for file in files]
    return hashlib.sha256(repr(parts).encode()).hexdigest() if parts else ""


@cache
def _hash_file(file: Path, state: os.stat_result) -> str:  # `state` tells an overwritten file apart
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
