"""Depth of a picture as a map `1 1 h w`, larger = nearer: from a file, or by a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inlay import InputError, ModelError, open_image


def of_file(path: str, where: str) -> Tensor:
    """A picture's grey in 0..1, or the numbers of an .npy `h w` as they are. Raises InputError."""
    if Path(path).suffix != ".npy":
        grey = np.asarray(open_image(path, where).convert("L"), dtype=np.float32) / 255
        return torch.from_numpy(grey)[None, None]
    try:
        depth = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' cannot be read: {error}", where=where) from error
    if depth.ndim != 2 or not depth.size or not np.isfinite(depth).all():
        problem = f"'{path}' holds {depth.shape}, or numbers that are not finite"
        raise InputError(problem, where=where, fix="Save one depth map, height by width.")
    return torch.from_numpy(depth.astype(np.float32))[None, None]


def load(name: str, where: str) -> tuple[Any, Any]:
    """(network, processor) of transformers by folder or hub name. Raises ModelError."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    try:
        network = AutoModelForDepthEstimation.from_pretrained(name, use_safetensors=True)
        return network.eval(), AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        fix = "Give a grey picture, an .npy, or a depth model of transformers, such as "
        fix += "LiheYoung/depth-anything-base-hf."
        raise ModelError(f"'{name}' is no depth: {reason}", where=where, fix=fix) from error


def estimate(found: tuple[Any, Any], picture: Any, published: bool, blank: bool) -> Tensor:
    """The network's own numbers for a PIL picture, not normalised. published: its mean counts a
    255th, as in MimicBrush's code; blank: it is shown zeros, that code's depth of no shape."""
    network, processor = found
    mean = [m / (255 if published else 1) for m in processor.image_mean]
    pixels = processor(images=picture, return_tensors="pt", image_mean=mean).pixel_values
    pixels = pixels.to(next(network.parameters()))
    with torch.no_grad():
        depth: Tensor = network(pixels * (0 if blank else 1)).predicted_depth
    return depth[:, None].float().cpu()
