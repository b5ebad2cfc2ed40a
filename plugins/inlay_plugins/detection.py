"""Objects by words: Grounding-DINO's boxes and CLIPSeg's heat, by transformers' own classes.

No hooks. Pictures are `3 h w` in 0..1.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from inlay import ModelError, resolve_model
from inlay_plugins import masks

GROUNDING_DINO, CLIPSEG = "IDEA-Research/grounding-dino-base", "CIDAS/clipseg-rd64-refined"


class GroundingDino:
    """Liu et al. 2023. model: a GroundingDinoForObjectDetection."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def box(self, picture: Tensor, words: str, threshold: float) -> list[float] | None:
        """The surest box of the words that scores above the threshold: left, top, right, bottom in
        pixels; None where there is none."""
        found = self.surest(picture, words, threshold)
        return found[1] if found else None

    def surest(
        self, picture: Tensor, words: str, threshold: float
    ) -> tuple[float, list[float]] | None:
        """Its score in 0..1 as well."""
        scores, boxes = self.boxes(picture, f"a {words.lower()}.", threshold)
        return (float(scores[0]), [float(edge) for edge in boxes[0]]) if len(scores) else None

    def boxes(self, picture: Tensor, text: str, threshold: float) -> tuple[Tensor, Tensor]:
        """Scores `n` above the threshold and boxes `n 4` of a text that ends in a full stop, surest
        first."""
        given = self.processor(images=_pil(picture), text=text, return_tensors="pt")
        given = given.to(self.model.device)
        with torch.no_grad():
            seen = self.model(**given)
        (found,) = self.processor.post_process_grounded_object_detection(
            seen, given["input_ids"], threshold=threshold, target_sizes=[tuple(picture.shape[-2:])]
        )
        order = found["scores"].argsort(descending=True)
        return found["scores"][order], found["boxes"][order]


class ClipSeg:
    """Lüddecke and Ecker 2022. model: a CLIPSegForImageSegmentation."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def heat(self, picture: Tensor, words: str) -> Tensor:
        """How much each pixel shows the words, `h w` in 0..1."""
        text, pictures = [f"a photo of {words}"], [_pil(picture)]
        given = self.processor(text=text, images=pictures, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = self.model(**given.to(self.model.device)).logits
        heat = logits.float().sigmoid().view(1, 1, *logits.shape[-2:]).cpu()
        return masks.resize_bilinear(heat, picture.shape[-2:])[0, 0]


@cache
def grounding_dino(name: str = GROUNDING_DINO, device: str = "cpu") -> GroundingDino:
    """By folder or hub name, kept for the next run. Raises ModelError when it is not whole."""
    from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor

    return GroundingDino(
        *_whole(GroundingDinoForObjectDetection, GroundingDinoProcessor, name, device)
    )


@cache
def clipseg(name: str = CLIPSEG, device: str = "cpu") -> ClipSeg:
    """By folder or hub name, kept for the next run. Raises ModelError when it is not whole."""
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    return ClipSeg(*_whole(CLIPSegForImageSegmentation, CLIPSegProcessor, name, device))


def _whole(network: Any, processor: Any, name: str, device: str) -> tuple[Any, Any]:
    place = resolve_model(name, "detector", "config.json")
    options: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}
    try:
        model, told = network.from_pretrained(place, output_loading_info=True, **options)
        prepare = processor.from_pretrained(place)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        fix = f"Give a folder or hub name of a {network.__name__}."
        raise ModelError(f"'{name}' is none: {reason}", where="detector", fix=fix) from error
    if told["missing_keys"]:  # transformers would draw them at random
        missing = ", ".join(sorted(told["missing_keys"])[:3])
        raise ModelError(f"the weights of '{name}' are not whole: no {missing}", where="detector")
    return model.to(device).eval().requires_grad_(False), prepare


def _pil(picture: Tensor) -> Image.Image:
    values = (picture.float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())
