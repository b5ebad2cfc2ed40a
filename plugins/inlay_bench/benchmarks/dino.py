"""DINO (Caron et al., 2021) as metrics see through it: whole pictures, and their structure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from inlay_bench.networks import digest_of
from inlay_config.errors import ModelError

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MARGIN = 256 / 224  # whole pictures are resized to 256 and cropped to 224


class Dino:
    """A transformers `ViTModel`: any folder or hub name of DINO's transformers.

    name, digest: for reports. side: pixels of the square it sees.
    """

    def __init__(self, model: nn.Module, name: str, digest: str) -> None:
        self.model, self.name, self.digest = model.eval().requires_grad_(False), name, digest
        config: Any = model.config
        self.side: int = config.image_size
        keys = [m for n, m in model.named_modules() if n.endswith(("k_proj", "attention.key"))]
        self.last_keys = keys[-1]

    @classmethod
    def from_pretrained(cls, where: str | Path) -> Dino:
        """Raises ModelError when there is no whole transformer of this kind."""
        from transformers import ViTModel

        try:
            model, told = ViTModel.from_pretrained(
                where, add_pooling_layer=False, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            fix = "Give a folder or a name with a ViTModel, such as facebook/dino-vits16."
            raise ModelError(f"no DINO: {error}", where=str(where), fix=fix) from error
        if told["missing_keys"]:
            missing = ", ".join(sorted(told["missing_keys"])[:3])
            raise ModelError(f"the weights are not whole: no {missing}", where=str(where))
        return cls(model, str(where), digest_of(model))

    def images(self, x: Tensor) -> Tensor:
        """Pictures `b 3 h w` in 0..1 as unit vectors `b d`: the class token; the shorter side is
        resized (bicubic), the middle is cropped."""
        height, width = x.shape[-2:]
        scale = round(self.side * MARGIN) / min(height, width)
        size = [round(height * scale), round(width * scale)]
        x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((length - self.side) // 2 for length in x.shape[-2:])
        seen = x[..., top : top + self.side, left : left + self.side]
        return F.normalize(self._run(seen)[:, 0])

    def structure(self, x: Tensor) -> Tensor:
        """Cosines of the last layer's keys with each other, `b tokens tokens` (Tumanyan et al.,
        Splicing ViT Features, 2022); pictures are squashed to the side."""
        held: list[Tensor] = []
        hook = self.last_keys.register_forward_hook(lambda *seen: held.append(seen[2]))
        try:
            self._run(F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True))
        finally:
            hook.remove()
        keys = F.normalize(held[0], dim=-1)
        return keys @ keys.mT

    def _run(self, x: Tensor) -> Tensor:
        shape = (1, 3, 1, 1)
        mean, deviation = (torch.tensor(value).view(shape) for value in (MEAN, DEVIATION))
        with torch.no_grad():
            return self.model(pixel_values=(x - mean) / deviation).last_hidden_state


def structure_distance(network: Dino, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of the structures of pictures `b 3 h w` in 0..1: `b`, 0 = equal."""
    return (network.structure(x) - network.structure(y)).square().mean((1, 2))
