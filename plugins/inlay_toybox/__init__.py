"""The toybox: a miniature world and trained miniature models, usable with stock diffusers alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path

MODELS: dict[str, str] = {
    "flux": "text-to-image, FluxPipeline layout, 64 px",
    "sd": "text-to-image, StableDiffusionPipeline layout, 64 px",
    "instruct": "InstructPix2Pix, StableDiffusionInstructPix2PixPipeline layout, 64 px",
    "erasedraw": "instruct tuned to add objects, the same layout",
    "magicbrush": "instruct tuned on exact edits, the same layout",
    "clip": "pictures and captions in one space, CLIPModel layout; guides",
    "judge": "another CLIPModel, trained otherwise; only ever judges",
    "ddpm": "unconditional, over pixels, learned variance, DDPMPipeline layout, 64 px",
    "detector": "finds and masks the toybox's 32 classes",
    "paint-by-example": "fills a hole as an exemplar says, PaintByExamplePipeline layout, 64 px",
    "mimicbrush": "fills a hole with what fits there of another picture, two U-Nets, 64 px",
    "sam2": "masks what is clicked or boxed, for the sam2 package's image predictor",
}


@cache
def path(name: str) -> Path:
    """Folder of a shipped model: ``path("flux")`` loads with ``FluxPipeline.from_pretrained``.

    What ships as a difference to another model is expanded into the user's cache, once.
    """
    if name not in MODELS:
        raise KeyError(f"no toybox model {name!r}; there are: {', '.join(MODELS)}")
    folder = Path(__file__).parent / "models" / name
    if not (folder / "delta.safetensors").is_file():
        return folder
    from inlay_toybox import deltas

    return deltas.expand(folder, path(deltas.base_of(folder)))
