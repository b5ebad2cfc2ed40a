"""Diffusers' Stable Diffusion under the names of the original program: the inverse of a conversion,
for tests."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def unet_key(key: str, layers: int, crossed: list[bool]) -> str:
    """crossed: of each upper block, whether it has cross-attention."""
    inner = ""
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", key):
        way, block, kind, layer, inner = match.groups()
        if way == "down":
            place = f"input_blocks.{(layers + 1) * int(block) + int(layer) + 1}"
        else:
            place = f"output_blocks.{(layers + 1) * int(block) + int(layer)}"
        place += ".0" if kind == "resnets" else ".1"
    elif match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", key):
        return f"input_blocks.{(layers + 1) * (int(match[1]) + 1)}.0.op.{match[2]}"
    elif match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", key):
        block = int(match[1])
        slot = 2 if crossed[block] else 1
        return f"output_blocks.{(layers + 1) * block + layers}.{slot}.conv.{match[2]}"
    else:
        kind = "resnets" if "resnets" in key else ""
        ours = next(name for name in UNET if key.startswith(f"{name}."))
        place, inner = UNET[ours], key.removeprefix(f"{ours}.")
    if kind == "resnets":
        part, _, last = inner.rpartition(".")
        inner = f"{RESNET[part]}.{last}"
    return f"{place}.{inner}"


def vae_key(key: str, levels: int) -> str:
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(
        r"up_blocks\.(\d)\.resnets\.(\d)",
        lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}",
        key,
    )
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key
    )
    for ours, theirs in VAE.items():
        key = key.replace(ours, theirs)
    return key


def state_of(pipe: Any, average: nn.Module | None = None) -> dict[str, Tensor]:
    """A pipeline's tensors as the original program saves them; average: another U-Net of the shape,
    whose weights are the exponential moving average."""
    layers = pipe.unet.config.layers_per_block
    crossed = [kind.startswith("CrossAttn") for kind in pipe.unet.config.up_block_types]
    state = {}
    for key, tensor in pipe.unet.state_dict().items():
        state[f"model.diffusion_model.{unet_key(key, layers, crossed)}"] = tensor
    for key, tensor in average.state_dict().items() if average else ():
        flat = f"diffusion_model.{unet_key(key, layers, crossed)}".replace(".", "")
        state[f"model_ema.{flat}"] = tensor
    levels = len(pipe.vae.config.down_block_types)
    for key, tensor in pipe.vae.state_dict().items():
        theirs = vae_key(key, levels)
        square = "mid.attn_1" in theirs and tensor.dim() == 2  # convolutions of one pixel
        state[f"first_stage_model.{theirs}"] = tensor[..., None, None] if square else tensor
    for key, tensor in pipe.text_encoder.state_dict().items():
        name = key if key.startswith("text_model.") else f"text_model.{key}"
        state[f"cond_stage_model.transformer.{name}"] = tensor
    return state
