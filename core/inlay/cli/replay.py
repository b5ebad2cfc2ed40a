"""`inlay run --from`: the experiment of a manifest, after checking that its inputs are the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer
from PIL import Image

from inlay_config import config, manifest, registry
from inlay_config.config import Experiment
from inlay_config.errors import InputError, ModelError
from inlay_config.images import open_image

MAX_BYTES = 1 << 20


def load(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The recorded experiment, overrides on top. Raises when input pictures or weights differ."""
    record = read(path)
    experiment = config.from_dict(record["experiment"], overrides)
    for role, digest in record.get("inputs", {}).items():
        given = getattr(experiment.input, role, None) or ""
        where, fix = f"input.{role}", f"Give the picture of the recorded run: input.{role}=PATH."
        if not Path(given).is_file():
            raise InputError(f"there is no file '{given}' here", where=where, fix=fix)
        picture = open_image(given, where).convert("L" if role == "mask" else "RGB")
        if manifest.hash_image(picture) != digest:
            raise InputError(f"'{given}' is not the recorded picture", where=where, fix=fix)
    model = registry.resolve_model(experiment.model)
    if Path(model).exists() and manifest.hash_weights(model) != record.get("weights"):
        fix = "Use the model of that time, or start from the YAML instead of --from."
        raise ModelError(f"the weights of '{experiment.model}' differ", where="model", fix=fix)
    for name, then in record.get("versions", {}).items():
        if name != "python" and (now := version(name)) != then:
            typer.echo(f"note: {name} is {now}, was {then}; the last bits may differ", err=True)
    return experiment


def read(path: Path) -> dict[str, Any]:
    """The manifest of a manifest.json, or of a PNG that `inlay run` wrote."""
    try:
        if path.suffix.lower() == ".png":
            with Image.open(path, formats=["PNG"]) as image:
                text = image.info["inlay"]
        elif path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        else:
            text = path.read_text(encoding="utf-8")
        record: dict[str, Any] = json.loads(text)
        if record["inlay_manifest"] != manifest.FORMAT:
            raise ValueError("written by another version")
        record["experiment"]["prompt"]
    except Exception as error:  # whatever a hostile file makes the decoders raise
        fix = "Give a manifest.json or a PNG that `inlay run` wrote."
        raise InputError(f"holds no manifest ({error})", where=str(path), fix=fix) from error
    return record
