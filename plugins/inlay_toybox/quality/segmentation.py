"""How well the segmenter finds a body from a click, a box or a mask, on scenes nobody trained on.

Everything goes through the package's own image predictor, one object at a time. The mask compared
is the one of three that the model itself thinks best for a single click, and its single mask for
everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor
from scipy.ndimage import distance_transform_edt, gaussian_filter, zoom

from inlay_toybox import segmenter, world
from inlay_toybox.quality.shares import SCENES, Share, unseen_scenes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SMALLEST = 16
"""Objects with fewer visible pixels are not asked for."""


@dataclass
class Overlap:
    """Intersection over union of the objects asked for: mean, and shares of at least a half and
    nine tenths.
    """

    values: list[float] = field(default_factory=list)
    half: Share = field(default_factory=Share)
    close: Share = field(default_factory=Share)

    def add(self, seen: np.ndarray, body: np.ndarray) -> None:
        """Count one mask, bool ``[h, w]`` like the body."""
        overlap = float((seen & body).sum() / max(1, (seen | body).sum()))
        self.values.append(overlap)
        self.half.add(overlap >= 0.5)
        self.close.add(overlap >= 0.9)

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else float("nan")

    def __str__(self) -> str:
        return f"{self.mean:.3f} (>= 0.5: {self.half}, >= 0.9: {self.close})"


def bodies(
    n: int = 200, seed: int = 0, size: int = 64
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Unseen scenes as pictures uint8 ``[size, size, 3]``, and the visible body of each object,
    bool ``[size, size]``.
    """
    for scene in unseen_scenes(n, SCENES + seed * n):
        drawn = world.render(scene, size)
        least = SMALLEST * (size / 64) ** 2
        yield drawn.image, [mask for mask in drawn.masks if mask.sum() >= least]


def centre(body: np.ndarray) -> np.ndarray:
    """The pixel deepest inside a body, ``[x, y]``."""
    row, column = np.unravel_index(
        distance_transform_edt(np.pad(body, 1)).argmax(), np.add(2, body.shape)
    )
    return np.array([column - 1, row - 1])


def rough(body: np.ndarray, side: int) -> np.ndarray:
    """A mask hint as someone might give it, logits ``[1, side, side]``: blurred, coarse, faint."""
    soft = gaussian_filter(body.astype(np.float32), 2.0 * len(body) / 64)
    return 20 * (zoom(soft, side / len(body), order=1)[None] - 0.4)


def segmentation_accuracy(
    n: int = 200,
    seed: int = 0,
    predictor: SAM2ImagePredictor | None = None,
    vae: AutoencoderKL | None = None,
    size: int = 64,
) -> dict[str, Overlap]:
    """Overlap with the true bodies for each kind of prompt.

    Args:
        n: unseen scenes. seed: another seed, other scenes and clicks.
        predictor: the shipped model's by default.
        vae: measure on round trips through this autoencoder instead of on the renders.
        size: side of the pictures in pixels.

    Returns:
        ``click``: one click at the deepest pixel; ``single``: the same click, single mask;
        ``anywhere``: one click at a random pixel of the body; ``two``: that click and a second one
        where its mask is wrong, with its logits as hint; ``box``; ``mask``: a blurred, coarse mask
        alone; ``disc``: no model at all, a disc of the mean object's area around the deepest pixel.
    """
    predictor = predictor or segmenter.predictor()
    side = predictor.model.sam_prompt_encoder.mask_input_size[0]
    rng = np.random.default_rng(seed)
    scenes = list(bodies(n, seed, size))
    radius = np.sqrt(np.mean([body.sum() for _, some in scenes for body in some]) / np.pi)
    y, x = np.mgrid[:size, :size]
    kinds = ("click", "single", "anywhere", "two", "box", "mask", "disc")
    overlaps = {kind: Overlap() for kind in kinds}
    for picture, some in scenes:
        predictor.set_image(_round_trip(picture, vae) if vae is not None else picture)
        for body in some:
            middle = centre(body)
            masks, quality, _ = _click(predictor, [middle], [1], True)
            overlaps["click"].add(masks[quality.argmax()], body)
            overlaps["single"].add(_click(predictor, [middle], [1])[0][0], body)
            pixels = np.argwhere(body)[:, ::-1]
            random = pixels[rng.integers(len(pixels))]
            masks, quality, logits = _click(predictor, [random], [1], True)
            best = quality.argmax()
            overlaps["anywhere"].add(masks[best], body)
            wrong = masks[best] != body
            second = centre(wrong) if wrong.any() else middle
            labels = [1, int(body[second[1], second[0]])]
            masks, _, _ = _click(predictor, [random, second], labels, hint=logits[best][None])
            overlaps["two"].add(masks[0], body)
            masks, _, _ = predictor.predict(
                box=world.boxes_of(body[None])[0], multimask_output=False
            )
            overlaps["box"].add(masks[0] > 0, body)
            masks, _, _ = predictor.predict(mask_input=rough(body, side), multimask_output=False)
            overlaps["mask"].add(masks[0] > 0, body)
            disc = (x - middle[0]) ** 2 + (y - middle[1]) ** 2 <= radius**2
            overlaps["disc"].add(disc, body)
    return overlaps


def _click(
    predictor: SAM2ImagePredictor,
    places: list[np.ndarray],
    labels: list[int],
    multimask: bool = False,
    hint: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks (bool ``[k, h, w]``), estimated overlaps and logits for clicks on pixels' centres."""
    masks, quality, logits = predictor.predict(
        point_coords=np.stack(places) + 0.5,
        point_labels=np.array(labels),
        mask_input=hint,
        multimask_output=multimask,
    )
    return masks > 0, quality, logits


@torch.no_grad()
def _round_trip(picture: np.ndarray, vae: AutoencoderKL) -> np.ndarray:
    """A picture after the autoencoder, uint8 like before."""
    images = torch.from_numpy(picture).permute(2, 0, 1)[None].to(vae.dtype) / 127.5 - 1
    back = vae.decode(vae.encode(images).latent_dist.mode()).sample[0].float()
    pixels = ((back / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
