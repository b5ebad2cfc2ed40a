"""What the U-Net of Paint by Example is prompted with: CLIP's class token through the mapper, as
published; or, to see what that bottleneck is for, all of CLIP's tokens, or words.

All three are written in the layout of Paint by Example and drawn by its experiments. Words come to
a pipeline by `speak`, since that layout has no text encoder.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers.pipelines.deprecated import paint_by_example as published
from torch import Tensor, nn
from transformers import PreTrainedModel  # diffusers looks for it beside a class that it loads

from inlay_train.latent_diffusion import embedded, pipeline


class LongPrompt(published.PaintByExampleImageEncoder):
    """All tokens of CLIP through the mapper, `b t c`; the learned null prompt has as many as
    `config.prompt_tokens`."""

    def __init__(self, config: Any, proj_size: int | None = None) -> None:
        super().__init__(config, proj_size)
        self.uncond_vector = nn.Parameter(torch.randn(1, config.prompt_tokens, self.proj_size))

    def forward(self, pixel_values: Tensor, return_uncond_vector: bool = False) -> Any:
        tokens = through(self, self.model(pixel_values=pixel_values).last_hidden_state)
        return (tokens, self.uncond_vector) if return_uncond_vector else tokens


def encoder(vision: PreTrainedModel, width: int, tokens: int = 1) -> PreTrainedModel:
    """The exemplar's encoder around a vision tower, its mapper and null prompt fresh, for prompts
    of this many tokens `width` wide."""
    config = vision.config
    config.projection_dim = width
    if tokens == 1:
        made = published.PaintByExampleImageEncoder(config)
    else:
        config.prompt_tokens = tokens
        made = LongPrompt(config)
    made.model.load_state_dict(vision.state_dict())
    return made


def through(encoder: Any, tokens: Tensor) -> Tensor:
    """CLIP's tokens `b t d` as the U-Net attends to them, `b t c`."""
    mapped: Tensor = encoder.final_layer_norm(encoder.mapper(tokens))
    prompt: Tensor = encoder.proj_out(mapped)
    return prompt


@torch.no_grad()
def speak(pipe: Any, words: str, base: str = "toybox/sd") -> None:
    """From now on a pipeline that was trained with `prompt: text` draws these words in place of any
    exemplar. base: the model that it began with, whose text encoder reads them."""
    prompt = embedded(*_reader(base), [words])
    pipe.image_encoder.forward = lambda pixel_values: prompt


@cache
def _reader(base: str) -> tuple[Any, Any]:
    pipe = pipeline(base)
    return pipe.tokenizer, pipe.text_encoder
