"""Reads a SAM 2 (Ravi et al. 2024, "SAM 2: Segment Anything in Images and Videos") of any size for
the package's own image predictor: a folder with ``config.yaml`` in the package's configuration
style and ``model.safetensors``.

A configuration names classes by ``_target_``. Only the classes in ``TARGETS`` are ever built, so a
folder from elsewhere cannot make this process run other code.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.transformer import RoPEAttention
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor

from inlay_config.errors import ModelError
from inlay_toybox import path as model_path

CONFIG, WEIGHTS = "config.yaml", "model.safetensors"
TARGETS: dict[str, type] = {
    f"{c.__module__}.{c.__qualname__}": c
    for c in (
        SAM2Base, ImageEncoder, Hiera, FpnNeck, PositionEmbeddingSine, MemoryAttention,
        MemoryAttentionLayer, RoPEAttention, MemoryEncoder, MaskDownSampler, Fuser, CXBlock,
    )
}  # fmt: skip
"""What a configuration may name: the modules of the package's own configurations."""
REFUSED = {"weights_path": "it reads a file of its own", "compile_image_encoder": "it compiles"}
"""Arguments of those classes that do more than build a module, and why they stay unset."""


def build(config: dict[str, Any]) -> SAM2Base:
    """A model with random weights from ``config["model"]``, in evaluation mode.

    Raises:
        ModelError: a target outside ``TARGETS``, a refused argument, or arguments that do not fit.
    """
    model = _instantiate(config.get("model"), "model")
    if not isinstance(model, SAM2Base):
        raise ModelError("no SAM2Base is configured there", where="model")
    return model.eval()


def _instantiate(node: Any, where: str) -> Any:
    """The objects that a configuration's tree describes, innermost first."""
    if isinstance(node, list):
        return [_instantiate(value, f"{where}[{i}]") for i, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    for key in REFUSED.keys() & node.keys():
        if node[key]:
            raise ModelError(f"'{key}' cannot be set: {REFUSED[key]}", where=f"{where}.{key}")
    values = {k: _instantiate(v, f"{where}.{k}") for k, v in node.items() if k != "_target_"}
    if "_target_" not in node:
        return values
    if node["_target_"] not in TARGETS:
        fix = f"Only SAM 2's own modules can be named: {', '.join(sorted(TARGETS))}."
        raise ModelError(f"'{node['_target_']}' is not built", where=f"{where}._target_", fix=fix)
    try:
        return TARGETS[node["_target_"]](**values)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        problem = f"{node['_target_'].rpartition('.')[2]} cannot be built: {error}"
        raise ModelError(problem, where=where) from error


def read_config(file: str | Path) -> dict[str, Any]:
    """A configuration as plain mappings and lists, its interpolations left as they are.

    Raises:
        ModelError: the file is no YAML mapping.
    """
    try:
        config = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"not YAML: {error}", where=str(file)) from error
    if not isinstance(config, dict):
        raise ModelError("no mapping with the key 'model'", where=str(file))
    return {str(key): value for key, value in config.items()}


def load(folder: str | Path | None = None) -> SAM2Base:
    """A model in float32 and evaluation mode; the shipped ``toybox/sam2`` by default.

    Args:
        folder: with ``config.yaml`` and ``model.safetensors``.

    Raises:
        ModelError: the folder is incomplete, its configuration names what is not SAM 2's, or its
            weights are damaged or of other shapes than the configuration's.
    """
    folder = Path(folder) if folder else model_path("sam2")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{name} is missing", where=str(folder))
    model = build(read_config(folder / CONFIG))
    where = str(folder / WEIGHTS)
    try:
        weights = {k: v.float() for k, v in load_file(folder / WEIGHTS).items()}
        model.load_state_dict(weights)
    except SafetensorError as error:
        raise ModelError(f"damaged: {error}", where=where) from error
    except RuntimeError as error:
        raise ModelError(str(error), where=where, fix=f"They must fit {CONFIG}.") from error
    return model


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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)
        predictor = SAM2ImagePredictor(loaded)
    # The package writes down the feature maps of 1024-pixel models; these are the model's own.
    side = loaded.image_size // loaded.backbone_stride
    predictor._bb_feat_sizes = [(4 * side, 4 * side), (2 * side, 2 * side), (side, side)]
    return predictor
