"""PixArt-alpha and PixArt-Sigma: a DiT with self- and cross-attention over T5's tokens, CFG in one
batch; a variance that the model learned is dropped, as the stock pipelines do."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import retrieve_timesteps
from torch import Tensor

from ..events import AttnSite
from .base import Backbone, Size, Spans
from .text import Cond, pieces


class PixArt(Backbone):
    """PixArtAlphaPipeline and PixArtSigmaPipeline, called without resolution binning. A lane's
    `guidance` is its CFG scale; `true_cfg` does not apply."""

    name, denoiser_name = "pixart", "transformer"

    @property
    def patch(self) -> int:
        return int(self.denoiser.config.patch_size)

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor) * self.patch

    @property
    def native_size(self) -> Size:
        side = self.denoiser.config.sample_size * int(self.pipe.vae_scale_factor)
        return self.card.get("height", side), self.card.get("width", side)

    @property
    def text_tokens(self) -> int:
        most = 120 if "Alpha" in type(self.pipe).__name__ else 300
        return int(self.card.get("max_sequence_length", most))

    def tokens(self, size: Size) -> int:
        height, width = self.grid(size)
        return height * width

    def site(self, index: int, name: str, module: Any, depth: float) -> AttnSite:
        kind: Literal["cross", "self"] = "cross" if name.endswith("attn2") else "self"
        width = module.inner_dim // module.heads
        return AttnSite(name, index, kind, "transformer", depth, module.heads, width)

    def spans(self, site: AttnSite, text: int) -> Spans:
        names = "text" if site.kind == "cross" else "image"
        return lambda queries, keys: ({"image": slice(0, queries)}, {names: slice(0, keys)})

    def pieces(self, prompt: str) -> list[str]:
        return pieces(self.pipe.tokenizer, prompt, self.text_tokens)

    def encode_text(self, prompt: str) -> Cond:
        tokens = self.pieces(prompt)
        options = {"device": self.device, "max_sequence_length": self.text_tokens}
        embeds, mask, _, _ = self.pipe.encode_prompt(prompt, False, **options)
        return Cond(embeds, None, tokens, mask)

    def set_timesteps(self, scheduler: Any, steps: int, sigmas: Any, size: Size) -> None:
        retrieve_timesteps(scheduler, steps, self.device, None, sigmas)

    def inputs(
        self,
        sample: Tensor,
        t: Tensor,
        conds: list[tuple[Cond, int]],
        guidance: list[tuple[float, int]],
        size: Size,
    ) -> dict[str, Any]:
        masks = [c.mask.expand(n, -1) for c, n in conds if c.mask is not None]
        return {
            "hidden_states": sample,
            "encoder_hidden_states": torch.cat([c.embeds.expand(n, -1, -1) for c, n in conds]),
            "encoder_attention_mask": torch.cat(masks) if masks else None,
            "timestep": t.expand(sample.shape[0]),
            "added_cond_kwargs": self._micro_conditions(sample, size),
        }

    def cfg_scale(self, guidance: float, true_cfg: float) -> float:
        return guidance

    def denoise(self, kwargs: dict[str, Any], role: str) -> Tensor:
        output = super().denoise(kwargs, role)
        return output[:, : self.denoiser.config.in_channels]

    def _micro_conditions(self, sample: Tensor, size: Size) -> dict[str, Tensor | None]:
        """Size and aspect, which PixArt-alpha's 1024 px models are told."""
        if not self.denoiser.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        rows = sample.shape[0]
        told = {"resolution": [float(side) for side in size], "aspect_ratio": [size[0] / size[1]]}
        return {key: sample.new_tensor([value]).expand(rows, -1) for key, value in told.items()}
