"""Sub-word tokenizers and text encoders of the toybox, in the stock CLIP and T5 classes.

The vocabularies are small on purpose: common words are one piece, many class names are two or
more, as in the large models, so that code for multi-token subjects is exercised.
"""

from __future__ import annotations

import json
import math
import string
from collections import Counter

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from inlay_toybox import captions, world

TOKENS = 32
"""Length of both token sequences; the ``max_sequence_length`` to give a stock pipeline."""

WIDTH = 128
_OPENINGS = ("a picture of ", "a photo of ")
_CORPUS = 20_000
_T5_MERGES = 143
_CLIP_MERGES = 135


def wordings(scene: world.Scene, seed: int) -> list[str]:
    """Four ways to caption a scene, the plain one twice; training picks one of them each time."""
    rng = np.random.default_rng([seed, 2])
    order = [scene.things[i] for i in rng.permutation(len(scene.things))]
    plain = scene.caption
    flat = captions.caption(order, scene.ground, scene.sunset, flat=True)
    other = captions.caption(order, scene.ground, scene.sunset)
    opening = _OPENINGS[int(rng.integers(len(_OPENINGS)))] if rng.random() < 0.5 else ""
    dressed = opening + other
    if rng.random() < 0.5:
        dressed = dressed[0].upper() + dressed[1:]
    return [plain, plain, flat, dressed]


def corpus(n: int = _CORPUS) -> list[str]:
    """The captions from which the vocabularies are learned."""
    lines: list[str] = []
    for seed in range(n // 4):
        lines += wordings(world.sample(seed), seed)
    return lines


def _merges(
    lines: list[str], splitter: pre_tokenizers.PreTokenizer, suffix: str
) -> list[tuple[str, str]]:
    """The byte-pair merges of a corpus, most frequent first."""
    learner = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    learner.pre_tokenizer = splitter
    learner.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=5_000, end_of_word_suffix=suffix, show_progress=False)
    )
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]


def t5_tokenizer(lines: list[str]) -> T5TokenizerFast:
    """A unigram tokenizer: the pieces are the first merges of the captions, scored by their
    frequency.
    """
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    merges = _merges(lines, splitter, "")[:_T5_MERGES]
    letters = [*string.ascii_letters, *string.digits, *".,;:!?'\"()-", "▁"]
    vocab = {piece: i for i, piece in enumerate([*letters, *map("".join, merges)])}
    segmenter = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    segmenter.pre_tokenizer = splitter
    counts = Counter(piece for line in lines for piece in segmenter.encode(line).tokens)
    total = sum(counts.values())
    pieces = [(piece, math.log(n / total)) for piece, n in counts.most_common()]
    pieces += [(letter, -16.0) for letter in letters if letter not in counts]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(vocab=special + pieces, extra_ids=0, model_max_length=TOKENS)


def clip_tokenizer(lines: list[str]) -> CLIPTokenizer:
    """A byte-pair tokenizer learned from captions."""
    words = pre_tokenizers.Split(
        Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True
    )
    merges = _merges([line.lower() for line in lines], words, "</w>")[:_CLIP_MERGES]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges)]
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def clip_encoder(tokenizer: CLIPTokenizer, layers: int = 1) -> CLIPTextModel:
    """A fresh CLIP text encoder; its output is ``[b, TOKENS, WIDTH]``, pooled ``[b, WIDTH]``."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """A fresh T5 encoder; its output is ``[b, TOKENS, WIDTH]``."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
        )
    )
