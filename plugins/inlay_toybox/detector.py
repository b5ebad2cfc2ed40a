"""A small anchor-free detector of the toybox's classes: what is in a picture, where, and its mask.

Centres and boxes as in CenterNet (Zhou et al. 2019, "Objects as Points"), masks as in YOLACT
(Bolya et al. 2019): a few prototypes for the picture, mixed by coefficients of each object.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import einsum, rearrange
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from inlay_toybox import path as model_path
from inlay_toybox.classes import NAMES

SIDE = 64
STRIDE = 4


@dataclass(frozen=True)
class Detections:
    """What was found in one picture, best first.

    Attributes:
        classes: class names, ``n`` of them.
        scores: ``[n]`` in 0..1.
        boxes: ``[n, 4]``, left, top, right, bottom in pixels of the picture given.
        masks: bool ``[n, h, w]``, the object's own pixels, without shadow or reflection.
    """

    classes: list[str]
    scores: torch.Tensor
    boxes: torch.Tensor
    masks: torch.Tensor

    def best(self, name: str) -> int | None:
        """Index of the surest detection of a class, or None."""
        return self.classes.index(name) if name in self.classes else None


class _Block(nn.Module):
    """Pre-activation residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def _down(narrow: int, wide: int, blocks: int = 2) -> nn.Sequential:
    convolution = nn.Conv2d(narrow, wide, 3, stride=2, padding=1)
    return nn.Sequential(convolution, *(_Block(wide) for _ in range(blocks)))


class Detector(nn.Module):
    """The detector. Pictures of other sizes are resized to 64 × 64 inside and results scaled
    back.
    """

    def __init__(
        self, classes: tuple[str, ...] = NAMES, width: int = 32, prototypes: int = 12
    ) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.config = {"classes": list(classes), "width": width, "prototypes": prototypes}
        self.fine = _down(3, width, 1)
        self.middle = _down(width, 2 * width)
        self.coarse = _down(2 * width, 4 * width)
        self.widen = nn.Conv2d(4 * width, 2 * width, 1)
        self.neck = nn.Sequential(_Block(2 * width), nn.GroupNorm(8, 2 * width), nn.SiLU())
        outputs = len(classes) + 4 + prototypes
        self.head = nn.Sequential(
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(4 * width, outputs, 1),
        )
        self.prototypes = nn.Sequential(
            nn.Conv2d(3 * width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, prototypes, 1)
        )
        nn.init.constant_(self.head[-1].bias[: len(classes)], -4.0)  # type: ignore[index]

    def forward(
        self, images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Raw outputs for pictures ``[b, 3, 64, 64]`` in 0..1.

        Returns:
            Class logits ``[b, c, 16, 16]``, distances to the four box sides ``[b, 4, 16, 16]`` in
            pixels, mask coefficients ``[b, k, 16, 16]`` and mask prototypes ``[b, k, 32, 32]``.
        """
        fine = self.fine(images * 2 - 1)
        middle = self.middle(fine)
        wide = F.interpolate(self.widen(self.coarse(middle)), scale_factor=2.0)
        features = self.neck(middle + wide)
        out = self.head(features)
        heat, sides, mix = out.split(
            [len(self.classes), 4, out.shape[1] - len(self.classes) - 4], 1
        )
        joined = torch.cat([fine, F.interpolate(features, scale_factor=2.0)], 1)
        return heat, STRIDE * F.softplus(sides + 1.0), mix, self.prototypes(joined)

    @torch.no_grad()
    def detect(
        self, images: torch.Tensor, threshold: float = 0.3, limit: int = 6
    ) -> list[Detections]:
        """Find objects.

        Args:
            images: ``[b, 3, h, w]`` in 0..1, square like the toybox's pictures.
            threshold: least score.
            limit: at most so many objects in a picture.

        Returns:
            One :class:`Detections` per picture.
        """
        height, width = images.shape[-2:]
        parameter = next(self.parameters())
        small = images.to(parameter)
        if (height, width) != (SIDE, SIDE):
            small = F.interpolate(small, (SIDE, SIDE), mode="bilinear", antialias=True).clamp(0, 1)
        heat, sides, mix, prototypes = (t.float() for t in self(small))
        scores = heat.sigmoid()
        peaks = scores * (F.max_pool2d(scores.amax(1, keepdim=True), 3, 1, 1) == scores)
        return [
            self._read(peaks[i], sides[i], mix[i], prototypes[i], threshold, limit, height, width)
            for i in range(len(images))
        ]

    def _read(
        self,
        peaks: torch.Tensor,
        sides: torch.Tensor,
        mix: torch.Tensor,
        prototypes: torch.Tensor,
        threshold: float,
        limit: int,
        height: int,
        width: int,
    ) -> Detections:
        """The detections of one picture from its raw outputs."""
        scores, flat = peaks.flatten().topk(limit)
        flat = flat[scores > threshold]
        scores = scores[scores > threshold]
        kind, cell = flat // peaks[0].numel(), flat % peaks[0].numel()
        row, column = cell // peaks.shape[2], cell % peaks.shape[2]
        centre = torch.stack([column, row], -1) * STRIDE + STRIDE / 2
        reach = sides[:, row, column].T
        boxes = torch.cat([centre - reach[:, :2], centre + reach[:, 2:]], 1).clamp(0, SIDE)
        keep = _suppress(boxes, scores)
        kind, row, column, boxes, scores = (t[keep] for t in (kind, row, column, boxes, scores))
        logits = einsum(mix[:, row, column], prototypes, "k n, k h w -> n h w")
        masks = F.interpolate(logits[:, None], (height, width), mode="bilinear")[:, 0] > 0
        boxes = boxes * torch.tensor([width, height, width, height], device=boxes.device) / SIDE
        x = torch.arange(width, device=boxes.device) + 0.5
        y = torch.arange(height, device=boxes.device) + 0.5
        left, top, right, bottom = rearrange(boxes, "n s -> s n 1")
        across = (x > left - 1) & (x < right + 1)
        down = (y > top - 1) & (y < bottom + 1)
        masks = masks & across[:, None, :] & down[:, :, None]
        return Detections([self.classes[k] for k in kind.tolist()], scores, boxes, masks)

    def save_pretrained(self, folder: Path) -> None:
        """Write ``model.safetensors`` (bfloat16) and ``config.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None) -> Detector:
        """Load a detector in float32 and evaluation mode; the shipped one by default."""
        folder = Path(folder) if folder else model_path("detector")
        config = json.loads((folder / "config.json").read_text())
        model = cls(tuple(config["classes"]), config["width"], config["prototypes"])
        model.load_state_dict(
            {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        )
        return model.eval()


def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes ``[n, 4]`` and ``[m, 4]``: ``[n, m]``."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area = [(t[:, 2:] - t[:, :2]).clamp(min=0).prod(-1) for t in (a, b)]
    return shared / (area[0][:, None] + area[1][None] - shared).clamp(min=1e-6)


def _suppress(boxes: torch.Tensor, scores: torch.Tensor, overlap: float = 0.55) -> torch.Tensor:
    """Indices that survive non-maximum suppression over all classes; input sorted by score."""
    kept: list[int] = []
    overlaps = iou(boxes, boxes)
    for i in range(len(scores)):
        if all(overlaps[i, j] < overlap for j in kept):
            kept.append(i)
    return torch.tensor(kept, dtype=torch.long, device=boxes.device)
