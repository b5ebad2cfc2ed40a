"""Fine-tuning by matrices of low rank (LoRA, Hu et al. 2021): W + U D with U = 0 at first. What it
learns is small to ship, and merges into the weights of the stock class.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import ConfigMixin
from torch import Tensor, nn
from torch.nn.utils import parametrize

_INSIDE = ".parametrizations.weight."


class LowRank(nn.Module):
    """weight `o i …` -> weight + up `o r` @ down `r i…`."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, into = len(weight), weight[0].numel()
        self.up = nn.Parameter(torch.zeros(out, rank))
        self.down = nn.Parameter(torch.randn(rank, into) / math.sqrt(into))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def add(module: nn.Module, rank: int) -> None:
    """Train a module's linear layers, convolutions and embeddings by matrices of this rank;
    everything that would not be smaller so is trained whole. rank 0: everything is."""
    module.requires_grad_(True)
    for layer in list(module.modules()) if rank else []:
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding):
            weight = layer.weight
            out, into = len(weight), weight[0].numel()
            if rank * (out + into) < out * into:
                weight.requires_grad_(False)
                parametrize.register_parametrization(layer, "weight", LowRank(weight, rank))


def merged(module: nn.Module) -> dict[str, Tensor]:
    """The state that a module of the stock class loads."""
    layers = dict(module.named_modules())
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        layer, inside, part = name.partition(_INSIDE)
        if not inside:
            state[name] = value
        elif part == "original":
            weight = layers[layer].weight
            assert isinstance(weight, Tensor)
            state[f"{layer}.weight"] = weight.detach()
    return state


def stock(module: Any) -> Any:
    """A module of the stock class with the merged weights, to be written."""
    config = module.config
    made = module.from_config(config) if isinstance(module, ConfigMixin) else type(module)(config)
    made.load_state_dict(merged(module))
    return made
