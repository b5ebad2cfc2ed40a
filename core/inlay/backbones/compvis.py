"""Stable Diffusion's original checkpoints, one file, as diffusers pipelines: InstructPix2Pix and
what was tuned from it (MagicBrush, EraseDraw), and Stable Diffusion 1 itself.

Keys: `model.diffusion_model.*` the U-Net, `model_ema.*` its average, `first_stage_model.*` the
autoencoder, `cond_stage_model.transformer.*` CLIP's text tower. Renaming is diffusers' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay_config.checkpoint_files import read
from inlay_config.config import data_path
from inlay_config.errors import ModelError

UNET, AVERAGE = "model.diffusion_model.", "model_ema."
FIRST = f"{UNET}input_blocks.0.0.weight"
BASES = {4: "stable-diffusion-v1-5/stable-diffusion-v1-5", 8: "timbrooks/instruct-pix2pix"}
"""Channels of the U-Net -> the published model of that shape."""
SUFFIXES = (".ckpt", ".safetensors")
FIX = "Give a checkpoint of InstructPix2Pix, MagicBrush, EraseDraw or Stable Diffusion 1."


def is_file(path: str | Path) -> bool:
    """Whether a model's name is a checkpoint file."""
    return Path(path).is_file() and Path(path).suffix in SUFFIXES


def holds(file: Path) -> bool:
    """Whether a file has such a U-Net. Raises ModelError for one that is no checkpoint."""
    return FIRST in _tensors(file)


def state_of(file: Path) -> dict[str, Tensor]:
    """Tensors by the original's names. Raises ModelError for another kind of file."""
    tensors = _tensors(file)
    if FIRST not in tensors:
        raise ModelError(f"it has no {FIRST}", where=str(file), fix=FIX)
    return tensors


def _tensors(file: Path) -> dict[str, Tensor]:
    state: Mapping[str, Any] = read(file, FIX)
    while isinstance(inner := state.get("state_dict"), Mapping):
        state = inner
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def base_of(file: Path, state: Mapping[str, Tensor]) -> str:
    """Whose configurations a checkpoint has: those of its own folder, if it is one of diffusers,
    else the published model's of its shape. Raises ModelError for another shape."""
    if (file.parent / "model_index.json").is_file():
        return str(file.parent)
    channels = state[FIRST].shape[1]
    if channels not in BASES:
        problem = f"its U-Net takes {channels} channels, none of {', '.join(map(str, BASES))}"
        raise ModelError(problem, where=str(file), fix=FIX)
    return BASES[channels]


def load(
    file: str | Path, base: str | None = None, dtype: str = "float32", average: bool = True
) -> Any:
    """A pipeline with the checkpoint's weights.

    base: folder or hub name of the configurations, see `base_of`; those of published models ship
    here, but for the tokenizer, which is fetched. average: the exponential moving average, as
    published, where the file has one. Raises ModelError for another kind of file, a part or a
    tensor that is missing.
    """
    import diffusers
    from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from transformers import CLIPTextModel

    file = Path(file)
    state = state_of(file)
    base = base or base_of(file, state)
    shipped = data_path("models") / base.replace("/", "--")
    home = str(shipped) if shipped.is_dir() else base
    state = averaged(state, average)
    try:
        index = DiffusionPipeline.load_config(home)
        parts: dict[str, Any] = {}
        for name, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            with _told(name, file):
                parts[name] = cls.from_single_file(dict(state), config=home, subfolder=name)
        parts["text_encoder"] = create_diffusers_clip_model_from_ldm(
            CLIPTextModel, state, subfolder="text_encoder", config=home
        )
        if any(value.is_meta for value in parts["text_encoder"].state_dict().values()):
            problem = "it lacks tensors of the text_encoder"
            raise ModelError(problem, where=str(file), fix=FIX)
        for model in parts.values():  # diffusers' own `to` warns of rounding
            nn.Module.to(model.eval(), getattr(torch, dtype))
        scheduler = getattr(diffusers, index["scheduler"][1])
        pipe = getattr(diffusers, index["_class_name"])(
            **parts,
            tokenizer=_tokenizer(home, base),
            scheduler=scheduler.from_pretrained(home, subfolder="scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"it cannot be converted: {reason}", where=str(file), fix=FIX) from error
    pipe.register_to_config(_name_or_path=str(file))
    return pipe


def averaged(state: Mapping[str, Tensor], average: bool = True) -> dict[str, Tensor]:
    """The state without the average, which, if wanted, takes the U-Net's place: its names lack
    dots. Raises ModelError where it is not whole."""
    kept = {key: value for key, value in state.items() if not key.startswith(AVERAGE)}
    if not average or len(kept) == len(state):
        return kept
    for key in (k for k in kept if k.startswith(UNET)):
        flat = AVERAGE + key.removeprefix("model.").replace(".", "")
        if flat not in state:
            raise ModelError(f"its average has no {flat}", where="model", fix=FIX)
        kept[key] = state[flat]
    return kept


@contextmanager
def _told(name: str, file: Path) -> Iterator[None]:
    """Diffusers leaves what it lacks without values, and fails on that later."""
    try:
        yield
    except NotImplementedError as error:
        problem = f"it lacks tensors of the {name}"
        raise ModelError(problem, where=str(file), fix=FIX) from error


def _tokenizer(home: str, base: str) -> Any:
    """Of a folder, else of the hub's model. Raises ModelError when it cannot be had."""
    from transformers import CLIPTokenizer

    name = home if (Path(home) / "tokenizer").is_dir() else base
    try:
        return CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")
    except (OSError, ValueError) as error:
        fix = f"Give a folder of {base}'s configurations with its tokenizer, or see to the network."
        raise ModelError(f"{base}'s tokenizer is not to be had", where="model", fix=fix) from error
