"""Similarities in the space of an image-text encoder (CLIP): of pictures, sentences and changes.

All are cosines of unit vectors, -1..1. The encoder prepares pictures by its own configuration;
`published` and `as_coded` are the preparations of the InstructPix2Pix evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from inlay_bench.networks import Encoder

Preparation = Callable[[Tensor, int], Tensor]


class Similarities(NamedTuple):
    """Four cosines per edited picture, `b` each.

    Attributes:
        source: the picture before with its caption. edited: the picture after with its caption
            (Add-it's CLIP_out).
        direction: the change of the pictures with the change of the captions (CLIP_dir). 0 when
            either did not change.
        image: the picture before with the picture after (CLIP_im).
    """

    source: Tensor
    edited: Tensor
    direction: Tensor
    image: Tensor


def published(x: Tensor, side: int) -> Tensor:
    """Pictures as InstructPix2Pix shows them to CLIP: squashed to a square by bicubic interpolation
    without antialiasing."""
    return F.interpolate(x, (side, side), mode="bicubic", align_corners=False)


def as_coded(x: Tensor, side: int) -> Tensor:
    """`published`, with the slip of the released evaluation: pictures in -1..1 where the encoder
    expects 0..1. Only for comparison with numbers made that way."""
    return published(2 * x - 1, side)


def image_similarity(encoder: Encoder, x: Tensor, y: Tensor) -> Tensor:
    """Cosine of two pictures each, `b` (CLIP-I; Gal et al., Textual Inversion, 2022)."""
    return F.cosine_similarity(encoder.images(x), encoder.images(y))


def text_similarity(encoder: Encoder, x: Tensor, sentences: Sequence[str]) -> Tensor:
    """Cosine of a picture and its sentence each, `b` (CLIP-T; Hessel et al., CLIPScore, 2021,
    without its factor and clipping)."""
    return F.cosine_similarity(encoder.images(x), encoder.texts(list(sentences)))


def direction(before: Tensor, after: Tensor, text_before: Tensor, text_after: Tensor) -> Tensor:
    """Cosine of the change of the pictures and the change of the sentences, from embeddings `b d`
    (Gal et al., StyleGAN-NADA, 2021). 0 when either did not change."""
    return F.cosine_similarity(
        F.normalize(after) - F.normalize(before), F.normalize(text_after) - F.normalize(text_before)
    )


def similarities(
    encoder: Encoder,
    before: Tensor,
    after: Tensor,
    captions_before: Sequence[str],
    captions_after: Sequence[str],
    prepare: Preparation | None = None,
) -> Similarities:
    """The four numbers of the InstructPix2Pix evaluation (Brooks et al., 2023), each picture and
    sentence encoded once.

    prepare: how pictures are brought to the encoder's side; by default its own way.
    """
    pictures = [before, after]
    if prepare:
        pictures = [prepare(x, encoder.side) for x in pictures]
    seen_before, seen_after = (encoder.images(x) for x in pictures)
    said_before, said_after = (encoder.texts(list(c)) for c in (captions_before, captions_after))
    return Similarities(
        source=F.cosine_similarity(seen_before, said_before),
        edited=F.cosine_similarity(seen_after, said_after),
        direction=direction(seen_before, seen_after, said_before, said_after),
        image=F.cosine_similarity(seen_before, seen_after),
    )
