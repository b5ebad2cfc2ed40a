"""A tiny random FLUX pipeline on disk, with tokenizers and text encoders."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

import models

WIDTH, TOKENS = 16, 32


def save_flux(folder: Path) -> Path:
    """Write the pipeline; prompts are spelled letter by letter, so words are several tokens."""
    pipe = models.flux()
    torch.manual_seed(1)
    letters = [*string.ascii_letters, *string.digits, *",.'-"]
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate([*letters, *(f"{x}</w>" for x in letters), *ends])}
    clip = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    t5 = T5TokenizerFast(
        vocab=[*pieces, *((x, -1.0) for x in ["▁", *letters])], extra_ids=0, model_max_length=TOKENS
    )
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2
    )
    pipe.register_modules(
        tokenizer=clip,
        tokenizer_2=t5,
        text_encoder=CLIPTextModel(clip_config).eval(),
        text_encoder_2=T5EncoderModel(t5_config).eval(),
    )
    pipe.save_pretrained(folder)
    settings = {"height": 32, "width": 32, "max_sequence_length": TOKENS}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder
