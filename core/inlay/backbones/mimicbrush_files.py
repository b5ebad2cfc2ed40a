"""MimicBrush's published files as a pipeline: one checkpoint of what was trained, and the parts
that others published: the autoencoder, CLIP's vision tower, Stable Diffusion's configurations.

    pipe = load("mimicbrush.bin", base="stable-diffusion-v1-5", encoder="image_encoder")
    pipe.save_pretrained("mimicbrush-diffusers")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from inlay_config.checkpoint_files import read
from inlay_config.errors import ModelError

from .mimicbrush_forward import readers
from .mimicbrush_pipeline import DepthGuider, ImageTokens, MimicBrushPipeline

State = Mapping[str, Tensor]
PARTS = {
    "unet": ("unet", "imitative_unet", "imitativenet"),
    "reference_unet": ("referencenet", "reference_unet"),
    "image_tokens": ("image_proj_model", "image_proj"),
    "depth_guider": ("depth_guider",),
    "image_encoder": ("image_encoder",),
}
"""Our name of a part -> what a checkpoint calls it: a table of tensors, or a prefix of keys."""
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
FIX = "Give MimicBrush's own checkpoint: both U-Nets, the projection of CLIP, the depth guider."


@torch.no_grad()
def load(
    checkpoint: str | Path, *, base: str, encoder: str, vae: str | None = None
) -> MimicBrushPipeline:
    """checkpoint: a file, or the folder that holds it. base: folder or hub name of Stable Diffusion
    1.5; encoder: of CLIP's vision tower, whose weights count where the checkpoint has none; vae: of
    the autoencoder, by default the base's.

    Raises ModelError for a checkpoint that lacks a part, or whose parts have other shapes.
    """
    file = _file(Path(checkpoint))
    parts, where = _split(read(file, FIX)), str(file)
    if missing := [part for part in PARTS if part not in parts and part != "image_encoder"]:
        raise ModelError(f"it has no {', '.join(missing)}", where=where, fix=FIX)
    shape, made = dict(UNet2DConditionModel.load_config(base, subfolder="unet")), dict[str, Any]()
    for name in ("unet", "reference_unet"):
        taken = _sides(parts[name], "conv_in.weight", where)[1]
        made[name] = UNet2DConditionModel.from_config({**shape, "in_channels": taken})
    guider = parts["depth_guider"]
    odd = range(1, sum(key.startswith("blocks.") for key in guider) // 2, 2)
    strided = [f"blocks.{i}.weight" for i in odd]  # pairs: one keeps the size, one halves it
    widths = [_sides(guider, key, where)[0] for key in ("conv_in.weight", *strided)]
    made["depth_guider"] = DepthGuider(_sides(guider, "conv_out.weight", where)[0], tuple(widths))
    projection = {f"proj.{key.rpartition('.')[2]}": t for key, t in parts["image_tokens"].items()}
    made["image_tokens"] = ImageTokens(*_sides(projection, "proj.weight", where)[::-1])
    if "image_encoder" in parts:
        made["image_encoder"] = CLIPVisionModel(CLIPVisionConfig.from_pretrained(encoder))
    parts["image_tokens"] = projection
    for name, model in made.items():
        _fill(name, model, parts[name], where)
    if "image_encoder" not in parts:
        made["image_encoder"] = CLIPVisionModel.from_pretrained(encoder, use_safetensors=True)
    exact = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    known = DDIMScheduler.load_config(base, subfolder="scheduler")
    inside = {} if vae else {"subfolder": "vae"}
    return MimicBrushPipeline(
        vae=AutoencoderKL.from_pretrained(vae or base, use_safetensors=True, **inside),
        scheduler=DDIMScheduler.from_config({**known, **exact}),
        feature_extractor=CLIPImageProcessor(),
        **{name: model.eval() for name, model in made.items()},
    )


def _file(path: Path) -> Path:
    """The one checkpoint of a folder. Raises ModelError for none or several."""
    if not path.is_dir():
        return path
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(found) != 1:
        problem = f"{len(found)} checkpoints are in this folder"
        raise ModelError(problem, where=str(path), fix="Name the file.")
    return found[0]


def _split(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """A table of tables, or of tensors with prefixes, by our names of the parts."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        table = value if isinstance(value, Mapping) else {"": value}
        for inner, tensor in table.items():
            path = f"{key}.{inner}".rstrip(".")
            for ours, names in PARTS.items():
                for prefix in (f"{name}." for name in names if path.startswith(f"{name}.")):
                    parts.setdefault(ours, {})[path.removeprefix(prefix)] = tensor
    return parts


def _sides(state: State, key: str, where: str) -> tuple[int, ...]:
    """Shape of a tensor. Raises ModelError where it is missing."""
    if key not in state:
        raise ModelError(f"it has no {key}", where=where, fix=FIX)
    return tuple(state[key].shape)


def _fill(name: str, model: nn.Module, state: State, where: str) -> None:
    """All weights of a part; of the reference U-Net those that nobody reads may be missing."""
    own, unread = model.state_dict(), _unread(model) if name == "reference_unet" else ()
    given = {key.removeprefix("vision_model."): tensor for key, tensor in state.items()}
    beside = ("visual_projection.weight", "embeddings.position_ids")
    given = {key: t for key, t in given.items() if key not in beside or key in own}
    missing = [k for k in own if k not in given and not k.startswith(unread)]
    odd = [k for k in given if k not in own or given[k].shape != own[k].shape]
    if missing or odd:
        problem = (
            f"its {name} has no {missing[0]}" if missing else f"its {name} has another {odd[0]}"
        )
        count = len(missing) + len(odd)
        raise ModelError(f"{problem} ({count} such tensors)", where=where, fix=FIX)
    model.load_state_dict({k: given.get(k, torch.zeros_like(t)) for k, t in own.items()})


def _unread(unet: nn.Module) -> tuple[str, ...]:
    """Prefixes of a U-Net's weights behind its last self-attention's norm."""
    block = max(site for site in readers(unet) if site.startswith("up")).removesuffix(".attn1")
    behind = tuple(f"{block}.{part}." for part in ("attn1", "attn2", "ff", "norm2", "norm3"))
    return "conv_norm_out.", "conv_out.", f"{block.split('.transformer')[0]}.proj_out.", *behind
