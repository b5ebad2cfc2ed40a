"""Grounding-DINO (Liu et al., 2023): objects by words, for inclusion and affordance."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from inlay_bench.networks import digest_of
from inlay_plugins import detection

BOX = 0.35  # least score of a box: the published demo's


class GroundingDino:
    """The network that plugins look with, told as reports want it: name (with the threshold) and
    digest."""

    def __init__(self, network: detection.GroundingDino, name: str) -> None:
        self.network, self.name = network, f"{name} (box {BOX})"
        self.digest = digest_of(network.model)

    @classmethod
    def from_pretrained(cls, where: str | Path) -> GroundingDino:
        """By folder or hub name. Raises ModelError when it is no whole Grounding-DINO."""
        return cls(detection.grounding_dino(str(where)), str(where))

    def find(self, x: Tensor, phrase: str) -> Tensor:
        """Boxes of a phrase in one picture `1 3 h w` in 0..1: left, top, right, bottom in pixels,
        `n 4`, surest first."""
        return self.network.boxes(x[0], f"{phrase.strip().rstrip('.').lower()}.", BOX)[1]


def new_boxes(before: Tensor, after: Tensor, same: float = 0.5) -> Tensor:
    """Boxes of `after` (`n 4`) that overlap none of `before` by `same` (intersection over union)
    or more: what was added."""
    from torchvision.ops import box_iou

    if not len(before) or not len(after):
        return after
    return after[box_iou(after, before).amax(1) < same]
