"""Every model's figures by name, with what they mean and what was aimed at: one table for the
commands, the documentation and the benchmarks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay_toybox import MODELS, path

KEPT = Path("outputs/toybox")
"""Where measured figures are kept, below the working directory."""


@dataclass(frozen=True)
class Subject:
    """What is measured of one model.

    Attributes:
        measure: number of scenes to figures by key; each prints itself (a share, a float).
        labels: key to what it says and the aim, in the order of the table.
        readers: other models' folders whose weights decide the figures too.
    """

    measure: Callable[[int], dict[str, Any]]
    labels: dict[str, tuple[str, str]]
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """One line of a table: what was measured, the value as printed, the aim ("" where none is)."""

    label: str
    value: str
    aim: str


def _flux(n: int) -> dict[str, Any]:
    from diffusers import FluxPipeline

    from inlay_toybox.quality.drawing import object_accuracy

    return object_accuracy(FluxPipeline.from_pretrained(path("flux")), n)


def _sd(n: int) -> dict[str, Any]:
    from diffusers import StableDiffusionPipeline

    from inlay_toybox.quality.drawing import object_accuracy

    return object_accuracy(StableDiffusionPipeline.from_pretrained(path("sd")), n)


def _vae(n: int) -> dict[str, Any]:
    import torch
    from diffusers import AutoencoderKL

    from inlay_toybox.recipes.vae import psnr

    vae = AutoencoderKL.from_pretrained(path("flux") / "vae", torch_dtype=torch.float32)
    return {"psnr": psnr(vae, torch.device("cpu"), 64, n)[0]}


def _detector(n: int) -> dict[str, Any]:
    import torch
    from diffusers import AutoencoderKL

    from inlay_toybox.quality.detection import detector_accuracy

    vae = AutoencoderKL.from_pretrained(path("flux") / "vae", torch_dtype=torch.float32)
    decoded = detector_accuracy(n, vae=vae)
    return detector_accuracy(2 * n) | {f"decoded_{key}": v for key, v in decoded.items()}


def _sam2(n: int) -> dict[str, Any]:
    import torch
    from diffusers import AutoencoderKL

    from inlay_toybox.quality.segmentation import segmentation_accuracy

    vae = AutoencoderKL.from_pretrained(path("flux") / "vae", torch_dtype=torch.float32)
    decoded = segmentation_accuracy(n // 2, vae=vae)
    return segmentation_accuracy(n) | {f"decoded_{key}": v for key, v in decoded.items()}


def _contrastive(name: str) -> Callable[[int], dict[str, Any]]:
    def measure(n: int) -> dict[str, Any]:
        from inlay_toybox.quality.contrastive import Clip, retrieval, zero_shot

        clip = Clip.load(path(name))
        return zero_shot(max(1, n // 16), clip=clip) | retrieval(max(1, n // 50), clip)

    return measure


def _ddpm(n: int) -> dict[str, Any]:
    from inlay_toybox.quality.unconditional import unconditional_quality

    return unconditional_quality(n)


def _instructed(name: str) -> Callable[[int], dict[str, Any]]:
    def measure(n: int) -> dict[str, Any]:
        from inlay_toybox.quality.conditioned import instruction_quality

        return instruction_quality(name, max(1, n // 2))

    return measure


def _filled(n: int) -> dict[str, Any]:
    from inlay_toybox.quality.conditioned import exemplar_quality

    return exemplar_quality(max(1, n // 2))


def _imitated(n: int) -> dict[str, Any]:
    from inlay_toybox.quality.conditioned import imitation_quality

    return imitation_quality(max(1, n // 2))


_NAMED = {
    "classes": ("unseen views of one object, nearest of 32 class names", "0.95"),
    "captions": ("… nearest of 32 captions over its ground", "0.95"),
    "held_out": ("… over grounds held out of training", ""),
    "degraded": ("class name of the views blurred and noisy as an early preview", ""),
    "caption": ("pictures whose own caption is the nearest of 64", ""),
    "picture": ("captions whose own picture is the nearest of 64", ""),
}

_DRAWN = {
    "objects": ("objects named in unseen prompts that the detector finds, trained pairs", "0.95"),
    "held_out": ("the same, (class, ground) pairs held out of training", ""),
    "pictures": ("pictures with every object found", ""),
    "swapped": ("chance: each picture read with the next prompt", ""),
}

_ADDED = {
    "added": ("objects that an instruction adds to unseen scenes and the detector finds", ""),
    "before": ("chance: the same class found before", ""),
    "kept": ("PSNR in dB where nothing was to change", ""),
}

_FILLED = {
    "shown": ("unseen holes in which the detector finds the exemplar's class", "0.85"),
    "swapped": ("chance: the next exemplar's class", ""),
}

SUBJECTS: dict[str, Subject] = {
    "flux": Subject(_flux, _DRAWN, ("detector",)),
    "sd": Subject(_sd, _DRAWN, ("detector", "flux/vae")),
    "vae": Subject(_vae, {"psnr": ("PSNR in dB after a round trip, unseen scenes", "30")}),
    "detector": Subject(
        _detector,
        {
            "objects": ("objects found: right class, half box overlap", "0.97"),
            "presence": ("class found anywhere in the picture", ""),
            "precision": ("detections that match an object", ""),
            "masks": ("found objects with half mask overlap", ""),
            "decoded_objects": ("objects found after the autoencoder's round trip", ""),
            "decoded_masks": ("… with half mask overlap", ""),
        },
        ("flux/vae",),
    ),
    "clip": Subject(_contrastive("clip"), _NAMED),
    "judge": Subject(_contrastive("judge"), _NAMED),
    "ddpm": Subject(
        _ddpm,
        {
            "objects": ("samples in which the detector finds an object", "real scenes"),
            "real_objects": ("real scenes in which it does", ""),
            "frechet": ("Fréchet distance of samples and scenes to the judge", "two sets"),
            "split_half": ("… of two sets of scenes", ""),
        },
        ("detector", "judge"),
    ),
    **{
        name: Subject(_instructed(name), _ADDED, ("detector",))
        for name in ("instruct", "magicbrush", "erasedraw")
    },
    "paint-by-example": Subject(_filled, _FILLED, ("detector",)),
    "mimicbrush": Subject(
        _imitated,
        {
            **_FILLED,
            "painted": ("silhouettes painted in the reference's colour, not the one before", ""),
            "part": ("PSNR in dB against the truth, half an object, its reference shown", ""),
            "texture": ("… a silhouette, another colour of it shown", ""),
        },
        ("detector",),
    ),
    "sam2": Subject(
        _sam2,
        {
            "click": ("mean overlap (IoU) with the body, one click at its deepest pixel", "0.90"),
            "single": ("the same click, single mask", ""),
            "anywhere": ("one click at a random pixel of the body", ""),
            "two": ("… and a second click where that mask is wrong", ""),
            "box": ("a box", ""),
            "mask": ("a blurred, coarse mask alone", ""),
            "decoded_click": ("one click, after the autoencoder's round trip", ""),
            "disc": ("no model: a disc of the mean object's area around the click", ""),
        },
        ("flux/vae",),
    ),
}


def folder(name: str) -> Path:
    """The shipped weights of a subject."""
    return path("flux") / "vae" if name == "vae" else path(name)


def home(name: str) -> Path:
    """Where a subject ships: of what is a difference to another model, the difference."""
    return folder(name) if name == "vae" else path("flux").parent / name


def shipped(names: list[str] | None = None) -> list[str]:
    """The subjects with shipped weights, or those of them that are named.

    Raises:
        ValueError: a name is not among them.
    """
    there = [name for name in SUBJECTS if name == "vae" or name in MODELS]
    for name in names or []:
        if name not in there:
            raise ValueError(f"no model {name!r} to measure; there are: {', '.join(there)}")
    return names or there


def figures(name: str, n: int = 200, kept: Path | None = None) -> list[Figure]:
    """The figures of one model over ``n`` unseen scenes, from ``kept`` (by default ``KEPT``) when
    they were measured before with these weights.
    """
    subject = SUBJECTS[name]
    models = path("flux").parent
    key = digest(folder(name), *(models / reader for reader in subject.readers))
    file = (kept or KEPT) / f"figures-{name}-{n}-{key}.json"
    if not file.is_file():
        measured = {k: _printed(v) for k, v in subject.measure(n).items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(measured, indent=1) + "\n")
        partial.replace(file)
    found = json.loads(file.read_text())
    return [Figure(label, found[k], aim) for k, (label, aim) in subject.labels.items()]


def digest(*folders: Path) -> str:
    """Eight digits that name the weights in some folders."""
    total = hashlib.sha256()
    for file in sorted(file for one in folders for file in one.rglob("*.safetensors")):
        total.update(file.read_bytes())
    return total.hexdigest()[:8]


def _printed(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
