"""The toybox's SAM 2 (Ravi et al. 2024, "SAM 2: Segment Anything in Images and Videos"): a folder
with ``config.yaml`` in the package's configuration style and ``model.safetensors``, read and built
as every other SAM 2 (``inlay_plugins.segmentation``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import save_file

from inlay_plugins import segmentation
from inlay_plugins.segmentation import CONFIG, WEIGHTS
from inlay_toybox import path as model_path

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base
    from sam2.sam2_image_predictor import SAM2ImagePredictor


def build(config: dict[str, Any]) -> SAM2Base:
    """A model with random weights from ``config["model"]``, in evaluation mode.

    Raises:
        ModelError: a class that is not SAM 2's, or arguments that do not fit.
    """
    return segmentation.build(config["model"], "model")


def load(folder: str | Path | None = None) -> SAM2Base:
    """A model in float32 and evaluation mode; the shipped ``toybox/sam2`` by default.

    Raises:
        ModelError: the folder is incomplete, its configuration names what is not SAM 2's, or its
            weights are damaged or of other shapes than the configuration's.
    """
    return segmentation.read(Path(folder) if folder else model_path("sam2"))


def save(model: SAM2Base, config: dict[str, Any], folder: Path) -> Path:
    """Write what ``load`` reads, the weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    partial = folder / f"{WEIGHTS}.tmp"
    save_file(tensors, partial)
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    partial.replace(folder / WEIGHTS)
    return folder


def predictor(model: str | Path | SAM2Base | None = None) -> SAM2ImagePredictor:
    """The package's image predictor over a model, or over the model in a folder (``load``).

    ``set_image(uint8 [h, w, 3])``, then ``predict(point_coords=, point_labels=, box=, mask_input=,
    multimask_output=)`` with coordinates in the picture's pixels, a pixel's centre at + 0.5, and
    low-resolution logits of 4 × the image embedding as ``mask_input``.
    """
    loaded = load(model) if model is None or isinstance(model, (str, Path)) else model
    return segmentation.predictor(loaded)
