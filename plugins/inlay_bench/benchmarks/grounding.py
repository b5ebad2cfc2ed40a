"""Grounding-DINO (Liu et al., 2023): objects by words, for inclusion and affordance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from inlay_bench.networks import digest_of
from inlay_config.errors import ModelError
from inlay_config.images import to_pil

BOX, TEXT = 0.35, 0.25  # least scores of a box and of a word: the published demo's


class GroundingDino:
    """A transformers `GroundingDinoForObjectDetection` with its processor, by folder or hub name.

    name (with the thresholds), digest: for reports.
    """

    def __init__(self, model: nn.Module, processor: Any, name: str, digest: str) -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.name, self.digest = f"{name} (box {BOX}, text {TEXT})", digest

    @classmethod
    def from_pretrained(cls, where: str | Path) -> GroundingDino:
        """Raises ModelError when it is no whole Grounding-DINO."""
        from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor

        try:
            model, told = GroundingDinoForObjectDetection.from_pretrained(
                where, dtype=torch.float32, output_loading_info=True
            )
            processor = GroundingDinoProcessor.from_pretrained(where)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            fix = "Give a folder or a name such as IDEA-Research/grounding-dino-base."
            raise ModelError(f"no Grounding-DINO: {error}", where=str(where), fix=fix) from error
        if told["missing_keys"]:
            missing = ", ".join(sorted(told["missing_keys"])[:3])
            raise ModelError(f"the weights are not whole: no {missing}", where=str(where))
        return cls(model, processor, str(where), digest_of(model))

    def find(self, x: Tensor, phrase: str) -> Tensor:
        """Boxes of a phrase in one picture `1 3 h w` in 0..1: left, top, right, bottom in pixels,
        `n 4`, surest first."""
        (picture,) = to_pil(x)
        given = self.processor(
            images=picture, text=f"{phrase.strip().rstrip('.').lower()}.", return_tensors="pt"
        )
        with torch.no_grad():
            seen = self.model(**given)
        (found,) = self.processor.post_process_grounded_object_detection(
            seen,
            given["input_ids"],
            threshold=BOX,
            text_threshold=TEXT,
            target_sizes=[(picture.height, picture.width)],
        )
        order = found["scores"].argsort(descending=True)
        return found["boxes"][order]


def new_boxes(before: Tensor, after: Tensor, same: float = 0.5) -> Tensor:
    """Boxes of `after` (`n 4`) that overlap none of `before` by `same` (intersection over union)
    or more: what was added."""
    from torchvision.ops import box_iou

    if not len(before) or not len(after):
        return after
    return after[box_iou(after, before).amax(1) < same]
