"""What the names and shapes of a guided-diffusion (ADM) checkpoint tell: its architecture, and the
name of every module in diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from inlay_config.errors import ModelError

FIX = "Give an unconverted checkpoint of guided-diffusion's U-Net, such as \
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
            raise ModelError(problem, where=where, fix=FIX) from error

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
