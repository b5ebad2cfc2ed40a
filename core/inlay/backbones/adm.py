"""Pixel diffusion models of OpenAI's guided-diffusion (ADM), converted to diffusers.

An ADM checkpoint is a bare state dict, for instance ``256x256_diffusion_uncond.pt``. Stock
``UNet2DModel`` computes the same function, with residual blocks that change the resolution
(``downsample_type="resnet"``), so a conversion is a renaming. What a state dict does not tell is
an argument: channels per attention head, picture side, order of the attention's channels.

Source: Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", section 3 and
appendix; class-conditional models keep their label embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from inlay_config.checkpoint_files import read
from inlay_config.errors import ModelError

from .adm_layout import FIX, Layout

Order = Literal["legacy", "new"]
"""How query, key and value lie in a checkpoint's ``qkv``: head by head ("legacy"), or as wholes."""


def _split(qkv: torch.Tensor, head_channels: int, order: Order) -> tuple[torch.Tensor, ...]:
    """Weight ``[3 c, c, 1]`` or bias ``[3 c]`` of the joint projection to query, key and value,
    each over all heads and with memory of its own.
    """
    parts = (-1, 3, head_channels) if order == "legacy" else (3, -1, head_channels)
    axis = 1 if order == "legacy" else 0
    grouped = qkv.reshape(*parts, *qkv.shape[1:2])
    return tuple(part.flatten(0, 1).clone() for part in grouped.unbind(axis))


def convert(
    state: Mapping[str, torch.Tensor],
    *,
    head_channels: int = 64,
    size: int | None = None,
    order: Order = "legacy",
    where: str = "checkpoint",
) -> UNet2DModel:
    """An ADM state dict as a diffusers model with equal outputs, in the checkpoint's dtype.

    Args:
        state: tensors by their guided-diffusion names; on the meta device too.
        head_channels: channels of an attention head, ``num_head_channels`` in guided-diffusion.
        size: side of the pictures in pixels; 8 at the coarsest level by default.
        order: "new" for models trained with ``use_new_attention_order``.
        where: file name for messages.

    Raises:
        ModelError: the names are not those of an ADM U-Net, tensors are missing, left over or of
            another shape, or the architecture is beyond ``UNet2DModel``: a first level whose width
            is not the base width (``channel_mult`` starting with 0.5, as in the 512 px model).
    """
    layout = Layout.read(state, where)
    if layout.widths[0] != layout.base:
        problem = (
            f"the first level has {layout.widths[0]} channels and the timestep's embedding"
            f" {layout.base}; diffusers' UNet2DModel has one number for both"
        )
        raise ModelError(problem, where=where, fix="Use the 64, 128 or 256 pixel model.")
    attending = {w for w, attends in zip(layout.widths, layout.attends, strict=True) if attends}
    odd = [width for width in attending | {layout.widths[-1]} if width % head_channels]
    if odd:
        problem = f"{odd[0]} channels do not divide into heads of {head_channels}"
        raise ModelError(problem, where=where, fix="Give the model's num_head_channels.")
    modules = layout.modules(state)
    ours: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        name = modules.get(module)
        if name is None:
            raise ModelError(f"unknown tensor {key}", where=where, fix=FIX)
        if name.endswith(".qkv"):
            stem = name.removesuffix("qkv")
            parts = _split(tensor, head_channels, order)
            ours |= {f"{stem}to_{k}.{leaf}": v for k, v in zip("qkv", parts, strict=True)}
        elif name.endswith("to_out.0"):
            ours[f"{name}.{leaf}"] = tensor.flatten(1) if leaf == "weight" else tensor
        else:
            ours[f"{name}.{leaf}"] = tensor
    try:
        with torch.device("meta"):
            model = UNet2DModel(**layout.config(head_channels, size))
        model.load_state_dict(ours, strict=True, assign=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split(":", 1)[-1].split())[:300]
        raise ModelError(f"not a whole ADM U-Net: {reason}", where=where, fix=FIX) from error
    return model.eval()


def load_adm(path: str | Path, **options: Any) -> UNet2DModel:
    """Read an ADM checkpoint (``.pt``, or the same tensors in ``.safetensors``) and convert it.

    Nothing but tensors is unpickled. ``options`` are those of ``convert``. Raises ModelError that
    names the file.
    """
    state = read(Path(path), FIX)
    if not all(torch.is_tensor(v) for v in state.values()):
        raise ModelError("it is not a plain table of tensors", where=str(path), fix=FIX)
    return convert(state, where=str(path), **options)


def is_file(path: str | Path) -> bool:
    """Whether a model's name is a checkpoint file."""
    return Path(path).is_file() and Path(path).suffix == ".pt"


def pipeline(path: str | Path) -> DDPMPipeline:
    """The checkpoint of a published model with its schedule, as ``load_adm`` reads it."""
    model = load_adm(path)
    pipe = DDPMPipeline(model, adm_scheduler(model))
    pipe.register_to_config(_name_or_path=str(path))
    return pipe


def adm_scheduler(model: UNet2DModel) -> DDPMScheduler:
    """The schedule of the published pixel models: 1,000 linear steps, the variance learned when
    the model answers with twice the channels.
    """
    learned = model.config["out_channels"] == 2 * model.config["in_channels"]
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        variance_type="learned_range" if learned else "fixed_large",
    )
