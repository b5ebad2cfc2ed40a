"""Pixel diffusion models of OpenAI's guided-diffusion (ADM), converted to diffusers.

An ADM checkpoint is a bare state dict, for instance ``256x256_diffusion_uncond.pt``. Stock
``UNet2DModel`` computes the same function, with residual blocks that change the resolution
(``downsample_type="resnet"``), so a conversion is a renaming. What a state dict does not tell is
an argument: channels per attention head, picture side, order of the attention's channels.

Source: Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", section 3 and
appendix; class-conditional models keep their label embedding.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from inlay_config.errors import ModelError

Order = Literal["legacy", "new"]
"""How query, key and value lie in a checkpoint's ``qkv``: head by head ("legacy"), or as wholes."""

_FIX = "Give an unconverted checkpoint of guided-diffusion's U-Net, such as \
256x256_diffusion_uncond.pt."
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0"}
_OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "label_emb": "class_embedding",
}


@dataclass(frozen=True)
class Layout:
    """What the names and shapes of a checkpoint tell.

    Attributes:
        base: channels of the timestep's embedding.
        widths: channels of each level, finest first.
        attends: which levels have attention.
        depth: residual blocks of a level on the way down.
        residual: whether residual blocks change the resolution, not convolutions.
        scale_shift: whether the timestep scales and shifts, or is added.
        inputs, outputs: channels of pictures and answers.
        classes: number of labels, or None.
    """

    base: int
    widths: tuple[int, ...]
    attends: tuple[bool, ...]
    depth: int
    residual: bool
    scale_shift: bool
    inputs: int
    outputs: int
    classes: int | None

    @classmethod
    def read(cls, state: Mapping[str, torch.Tensor], where: str) -> Layout:
        """Infer the layout; raises ModelError when these are not the names of an ADM U-Net."""
        blocks = {int(name.split(".")[1]) for name in state if name.startswith("input_blocks.")}
        try:
            changes = [i for i in sorted(blocks) if _upsampler(state, i)]
            period = changes[0] + 1 if changes else max(1, len(blocks))
            firsts = [f"input_blocks.{1 + i}" for i in range(0, len(blocks), period)]
            widths = tuple(state[f"{first}.0.out_layers.3.weight"].shape[0] for first in firsts)
            time = state["input_blocks.1.0.emb_layers.1.weight"]
            labels = state.get("label_emb.weight")
            return cls(
                base=state["time_embed.0.weight"].shape[1],
                widths=widths,
                attends=tuple(f"{first}.1.qkv.weight" in state for first in firsts),
                depth=period - 1,
                residual=bool(changes) and not _upsampler(state, changes[0]).endswith(".conv"),
                scale_shift=time.shape[0] == 2 * widths[0],
                inputs=state["input_blocks.0.0.weight"].shape[1],
                outputs=state["out.2.weight"].shape[0],
                classes=None if labels is None else labels.shape[0],
            )
        except (KeyError, IndexError, ValueError) as error:
            problem = f"not an ADM U-Net: it has no tensor {error}" if state else "it is empty"
            raise ModelError(problem, where=where, fix=_FIX) from error

    def config(self, head_channels: int, size: int | None) -> dict[str, Any]:
        """Arguments of ``UNet2DModel``; ``size`` is 8 times the number of halvings by default, as
        in every published model.
        """
        plain = "ResnetDownsampleBlock2D" if self.residual else "DownBlock2D"
        down = tuple("AttnDownBlock2D" if attends else plain for attends in self.attends)
        up = tuple(kind.replace("Down", "Up") for kind in reversed(down))
        how = "resnet" if self.residual else "conv"
        return {
            "sample_size": size or 8 * 2 ** (len(self.widths) - 1),
            "in_channels": self.inputs,
            "out_channels": self.outputs,
            "block_out_channels": self.widths,
            "layers_per_block": self.depth,
            "down_block_types": down,
            "up_block_types": up,
            "downsample_type": how,
            "upsample_type": how,
            "resnet_time_scale_shift": "scale_shift" if self.scale_shift else "default",
            "attention_head_dim": head_channels,
            "attn_norm_num_groups": 32,
            "norm_num_groups": 32,
            "num_class_embeds": self.classes,
        }

    def modules(self, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Name in the checkpoint to name in diffusers, of every block and layer."""
        names = dict(_OUTER)
        last, period = len(self.widths) - 1, self.depth + 1
        names |= _block("middle_block.0", "mid_block.resnets.0", _RESIDUAL)
        names |= _block("middle_block.1", "mid_block.attentions.0", _ATTENTION)
        names |= _block("middle_block.2", "mid_block.resnets.1", _RESIDUAL)
        for level, attends in enumerate(self.attends):
            theirs, ours = level * period + 1, f"down_blocks.{level}"
            for i in range(self.depth):
                names |= _layer(f"input_blocks.{theirs + i}", ours, i, attends)
            if level < last:
                change, ours = f"input_blocks.{theirs + self.depth}.0", f"{ours}.downsamplers.0"
                names |= _block(change, ours, _RESIDUAL if self.residual else {"op": "conv"})
            theirs, ours = (last - level) * period, f"up_blocks.{last - level}"
            for i in range(period):
                names |= _layer(f"output_blocks.{theirs + i}", ours, i, attends)
            if level > 0:
                change = _upsampler(state, theirs + self.depth).removesuffix(".conv")
                table = _RESIDUAL if self.residual else {"conv": "conv"}
                names |= _block(change, f"{ours}.upsamplers.0", table)
        return names


def _upsampler(state: Mapping[str, torch.Tensor], index: int) -> str:
    """Name of what doubles the resolution in an output block, or "": it comes after the residual
    block, and after its attention when there is one.
    """
    for place in (1, 2):
        prefix = f"output_blocks.{index}.{place}"
        if f"{prefix}.conv.weight" in state:
            return f"{prefix}.conv"
        if f"{prefix}.in_layers.0.weight" in state:
            return prefix
    return ""


def _block(theirs: str, ours: str, table: dict[str, str]) -> dict[str, str]:
    return {f"{theirs}.{key}": f"{ours}.{value}" for key, value in table.items()}


def _layer(theirs: str, ours: str, index: int, attends: bool) -> dict[str, str]:
    names = _block(f"{theirs}.0", f"{ours}.resnets.{index}", _RESIDUAL)
    if attends:
        names |= _block(f"{theirs}.1", f"{ours}.attentions.{index}", _ATTENTION)
    return names


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
            raise ModelError(f"unknown tensor {key}", where=where, fix=_FIX)
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
        raise ModelError(f"not a whole ADM U-Net: {reason}", where=where, fix=_FIX) from error
    return model.eval()


def load_adm(path: str | Path, **options: Any) -> UNet2DModel:
    """Read an ADM checkpoint (``.pt``, or the same tensors in ``.safetensors``) and convert it.

    Nothing but tensors is unpickled. ``options`` are those of ``convert``. Raises ModelError that
    names the file.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        fix = "Check the path; checkpoints are not part of a repository."
        raise ModelError("there is no such file", where=str(path), fix=fix) from error
    except pickle.UnpicklingError as error:
        problem = "it holds Python objects beside tensors, or is no checkpoint; nothing was run"
        raise ModelError(problem, where=str(path), fix=_FIX) from error
    except Exception as error:  # what is no pickle fails in any way it likes
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(f"cannot be read: {reason}", where=str(path), fix=_FIX) from error
    if not (isinstance(state, dict) and all(torch.is_tensor(v) for v in state.values())):
        raise ModelError("it is not a plain table of tensors", where=str(path), fix=_FIX)
    return convert(state, where=str(path), **options)


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
