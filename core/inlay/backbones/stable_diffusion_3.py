"""Stable Diffusion 3 and 3.5: joint attention over [image | text], latents `b c h w` read in 2x2
patches, CFG in one batch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    calculate_shift,
    retrieve_timesteps,
)
from torch import Tensor

from ..events import AttnSite
from .base import Backbone, Size, Spans
from .text import Cond, pieces


class StableDiffusion3(Backbone):
    """StableDiffusion3Pipeline. A lane's `guidance` is its CFG scale; `true_cfg` does not apply.
    The text is CLIP's 77 tokens and T5's behind them; words are found in CLIP's."""

    name, denoiser_name, flow = "sd3", "transformer", True

    @property
    def patch(self) -> int:
        return int(self.denoiser.config.patch_size)

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor) * self.patch

    @property
    def native_size(self) -> Size:
        side = self.pipe.default_sample_size * int(self.pipe.vae_scale_factor)
        return self.card.get("height", side), self.card.get("width", side)

    @property
    def t5_tokens(self) -> int:
        return int(self.card.get("max_sequence_length", 256))

    @property
    def text_tokens(self) -> int:
        return int(self.pipe.tokenizer_max_length) + self.t5_tokens

    def tokens(self, size: Size) -> int:
        height, width = self.grid(size)
        return self.text_tokens + height * width

    def site(self, index: int, name: str, module: Any, depth: float) -> AttnSite:
        kind: Literal["self", "joint"] = "self" if name.endswith("attn2") else "joint"
        width = module.inner_dim // module.heads
        return AttnSite(name, index, kind, "double", depth, module.heads, width)

    def spans(self, site: AttnSite, text: int) -> Spans:
        def of(n: int) -> dict[str, slice]:
            if site.kind == "self":
                return {"image": slice(0, n)}
            return {"image": slice(0, n - text), "text": slice(n - text, n)}

        return lambda queries, keys: (of(queries), of(keys))

    def pieces(self, prompt: str) -> list[str]:
        most = int(self.pipe.tokenizer_max_length)
        tokens = pieces(self.pipe.tokenizer, prompt, most, cut=True)
        if self.pipe.tokenizer_3 is not None:
            tokens += [""] * (most - len(tokens))
            tokens += pieces(self.pipe.tokenizer_3, prompt, self.t5_tokens)
        return tokens

    def encode_text(self, prompt: str) -> Cond:
        tokens = self.pieces(prompt)
        options = {"device": self.device, "max_sequence_length": self.t5_tokens}
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, **options
        )
        return Cond(embeds, pooled, tokens)

    def set_timesteps(self, scheduler: Any, steps: int, sigmas: Any, size: Size) -> None:
        options, config = {}, scheduler.config
        if config.get("use_dynamic_shifting", None):
            height, width = self.grid(size)
            bounds = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5}
            limits = [config.get(key, default) for key, default in bounds.items()]
            options["mu"] = calculate_shift(height * width, *limits, config.get("max_shift", 1.16))
        retrieve_timesteps(scheduler, steps, self.device, sigmas=sigmas, **options)

    def inputs(
        self,
        sample: Tensor,
        t: Tensor,
        conds: list[tuple[Cond, int]],
        guidance: list[tuple[float, int]],
        size: Size,
    ) -> dict[str, Any]:
        pooled = [c.pooled.expand(n, -1) for c, n in conds if c.pooled is not None]
        return {
            "hidden_states": sample,
            "timestep": t.expand(sample.shape[0]),
            "encoder_hidden_states": torch.cat([c.embeds.expand(n, -1, -1) for c, n in conds]),
            "pooled_projections": torch.cat(pooled),
            "joint_attention_kwargs": None,
        }

    def cfg_scale(self, guidance: float, true_cfg: float) -> float:
        return guidance
