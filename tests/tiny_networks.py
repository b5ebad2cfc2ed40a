"""Tiny random networks of the true transformers classes on disk: CLIP, DINO, Grounding-DINO."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertTokenizerFast,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    SwinConfig,
    ViTConfig,
    ViTModel,
)

LETTERS = string.ascii_lowercase
SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
}


def save_clip(folder: Path) -> Path:
    """A `CLIPModel` of 32 pixels that spells words letter by letter."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {**SIZE, **ends, "vocab_size": len(words), "max_position_embeddings": 48}
    vision = {**SIZE, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    vocab = {word: i for i, word in enumerate(words)}
    CLIPTokenizerFast(vocab=vocab, merges=[], model_max_length=48).save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    """A `ViTModel` of 32 pixels."""
    torch.manual_seed(1)
    config = ViTConfig(**SIZE, image_size=32, patch_size=8, qkv_bias=True)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def save_grounding_dino(folder: Path) -> Path:
    """A `GroundingDinoForObjectDetection` with 12 queries; its boxes are anywhere."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", *LETTERS]
    pieces += [f"##{letter}" for letter in LETTERS]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    swin = SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )
    bert = BertConfig(vocab_size=len(vocab), **SIZE, max_position_embeddings=64)
    config = GroundingDinoConfig(
        backbone_config=swin,
        text_config=bert,
        num_queries=12,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        d_model=32,
        max_text_len=64,
    )
    torch.manual_seed(2)
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    image = GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 144})
    GroundingDinoProcessor(image, BertTokenizerFast(vocab=vocab)).save_pretrained(folder)
    return folder
