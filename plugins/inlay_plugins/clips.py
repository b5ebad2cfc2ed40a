"""CLIP and SigLIP as functions: pictures and sentences to unit vectors, and their distances.

No hooks. Nothing has parameters that ask for a gradient, so one flows to the pictures alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from inlay import ConfigError, InputError, ModelError, open_image, resolve_model


def spherical(a: Tensor, b: Tensor) -> Tensor:
    """2 asin²(|a - b| / 2): half the square of the angle, as Blended Diffusion's code has it."""
    half = (a - b).norm(dim=-1) / 2
    return 2 * half.clamp(max=1 - 1e-6).asin() ** 2


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of the angle, as Blended Diffusion's paper has it (eq. 4)."""
    return 1 - (a * b).sum(-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "spherical": spherical,
    "cosine": cosine,
}
"""Name -> a distance of unit vectors `… d`, 0 for equal ones."""


@dataclass(frozen=True)
class Clip:
    """side: of the square it sees, in pixels. mean, deviation: `1 3 1 1`, of its input.
    see: normalised pictures `b 3 side side` to `b d`; read: sentences to `k d`.
    """

    name: str
    side: int
    mean: Tensor
    deviation: Tensor
    see: Callable[[Tensor], Tensor]
    read: Callable[[list[str]], Tensor]

    def images(self, pictures: Tensor, normalise: bool = True) -> Tensor:
        """Pictures `b 3 side side` in 0..1 as unit vectors `b d`; differentiable.
        normalise: False leaves out mean and deviation, as Blended Diffusion's ranking does."""
        pictures = pictures.to(self.mean)
        pictures = (pictures - self.mean) / self.deviation if normalise else pictures
        return F.normalize(self.see(pictures).float(), dim=-1)

    def texts(self, sentences: list[str]) -> Tensor:
        """Sentences as unit vectors `k d`."""
        return F.normalize(self.read(sentences).float(), dim=-1)

    def files(self, paths: list[str], where: str) -> Tensor:
        """Picture files, squashed to the square, as unit vectors `k d`."""
        square, seen = (self.side, self.side), []
        for path in paths:
            picture = open_image(path, where).resize(square, Image.Resampling.BICUBIC)
            values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            seen.append(values.view(*square, 3).permute(2, 0, 1).float() / 255)
        return self.images(torch.stack(seen))


@dataclass(frozen=True)
class Target:
    """What pictures are compared with: unit vectors `k d`, weights `k` whose sizes add up to 1."""

    vectors: Tensor
    weights: Tensor

    @classmethod
    def of(
        cls, clip: Clip, texts: Mapping[str, float], files: Mapping[str, float], where: str
    ) -> Target:
        """Sentences and picture files with their weights; a negative one pushes away."""
        parts = [clip.texts(list(texts))] if texts else []
        parts += [clip.files(list(files), where)] if files else []
        weights = torch.tensor([*texts.values(), *files.values()]).to(parts[0])
        return cls(torch.cat(parts), weights / weights.abs().sum())

    def distances(self, seen: Tensor, distance: str) -> Tensor:
        """The weighted distance of unit vectors `b d`, `b`."""
        return DISTANCES[distance](seen[:, None], self.vectors) @ self.weights


def weights_of(given: Any, where: str) -> dict[str, float]:
    """`a dog`, `[a dog, a cat]` or `{a dog: 1, a cat: -0.5}` as text -> weight.

    Raises ConfigError for anything else, and when all weights are 0.
    """
    given = [given] if isinstance(given, str) else given
    listed = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given, 1.0)
    numbers = all(isinstance(w, int | float) for w in listed.values())
    if not numbers or (listed and not any(listed.values())):
        raise ConfigError(f"{given!r} is no list of weights", where=where,
                          fix="Write {a dog: 1.0, a cat: -0.5}.")  # fmt: skip
    return {str(text): float(weight) for text, weight in listed.items()}


def asked(
    prompts: Any, images: Any, prompt: str, where: str
) -> tuple[dict[str, float], dict[str, float]]:
    """What a plugin compares pictures with, texts and picture files with their weights: its own, or
    the run's prompt where it names neither. Raises ConfigError where all say nothing."""
    texts, files = (
        weights_of(prompts or [], f"{where}.prompts"),
        weights_of(images, f"{where}.images"),
    )
    if not (texts or files):
        texts = weights_of(prompt, "prompt.edit")
    if "" in texts:
        raise ConfigError("CLIP is told nothing to look for", where=f"{where}.prompts",
                          fix="Give prompt.edit, prompts or images.")  # fmt: skip
    return texts, files


@cache
def load(name: str, device: str = "cpu") -> Clip:
    """A CLIPModel or SiglipModel by shipped name (toybox/clip), folder or hub name; kept for the
    next run. Raises ModelError when there is none, or its weights are not whole.
    """
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    where = "clip model"
    place = resolve_model(name, where, "config.json")
    try:
        options: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}
        model, told = AutoModel.from_pretrained(place, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(place)
        processor = AutoImageProcessor.from_pretrained(place)
        side, context = model.config.vision_config.image_size, model.config.text_config
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason, fix = " ".join(str(error).split())[:300], "Give a CLIPModel or SiglipModel."
        raise ModelError(f"'{name}' is no CLIP: {reason}", where=where, fix=fix) from error
    if told["missing_keys"]:  # transformers would draw them at random
        missing = ", ".join(sorted(told["missing_keys"])[:3])
        raise ModelError(f"the weights of '{name}' are not whole: no {missing}", where=where)
    model.to(device).eval().requires_grad_(False)
    longest, siglip = context.max_position_embeddings, model.config.model_type.startswith("siglip")

    def read(sentences: list[str]) -> Tensor:
        for sentence in sentences:
            if (length := len(tokenizer(sentence)["input_ids"])) > longest:
                problem = f"{sentence[:60]!r} has {length} tokens, {name} reads {longest}"
                raise InputError(problem, where="prompt", fix="Shorten it.")
        padding = {"padding": "max_length", "max_length": longest} if siglip else {"padding": True}
        tokens = tokenizer(sentences, return_tensors="pt", **padding).to(device)
        return model.get_text_features(**tokens).pooler_output

    def see(pictures: Tensor) -> Tensor:
        return model.get_image_features(pixel_values=pictures).pooler_output

    mean = torch.tensor(processor.image_mean, device=device).view(1, 3, 1, 1)
    deviation = torch.tensor(processor.image_std, device=device).view(1, 3, 1, 1)
    return Clip(name, side, mean, deviation, see, read)
