"""Edit pairs to train on: from a folder, from the library `datasets`, from the toybox."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from inlay_config.errors import ConfigError, InputError
from inlay_config.images import open_image, whole
from inlay_train import pairs
from inlay_train.recipe import Sample

Loaded = tuple[Any, Any, str]
"""Picture before and after (path, PIL picture or toybox scene), and the instruction."""


@dataclass
class Sources:
    """Where pairs come from; what is named is trained on together.

    folder: of `inlay pairs`, or in its layout (`inlay_train.pairs`); repeat: how often its pairs
    come in an epoch. dataset: hub name or local path for `datasets.load_dataset`, with split and
    the columns before, after and instruction. toybox: number of exact edits of its scenes, of the
    `kinds` add, remove, replace, recolour, light (all, if none is named).
    """

    folder: str | None = None
    repeat: int = 1
    dataset: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(
        default_factory=lambda: {
            "before": pairs.BEFORE,
            "after": pairs.AFTER,
            "instruction": pairs.WORDS,
        }
    )
    toybox: int = 0
    kinds: list[str] = field(default_factory=list)


class EditPairs:
    """Pairs as pictures `3 s s` in -1..1, both cut alike.

    size: s. grow: largest share by which the shorter side exceeds it before a random square is cut;
    flip: how often both are mirrored.
    """

    def __init__(self, sources: Sources, size: int, grow: float = 1.0, flip: float = 0.0) -> None:
        self.size, self.grow, self.flip = size, grow, flip
        self.parts: list[tuple[int, Callable[[int], Loaded]]] = []
        if sources.folder:
            listed = pairs.read(Path(sources.folder))
            self.parts += [(len(listed), listed.__getitem__)] * sources.repeat
        if sources.dataset:
            self.parts.append(_from_datasets(sources))
        if sources.toybox:
            self.parts.append((sources.toybox, _toybox(sources.kinds)))
        if not self.parts:
            fix = "Name a folder, a dataset or a number of toybox edits."
            raise ConfigError("nothing to train on", where="data", fix=fix)

    def __len__(self) -> int:
        return sum(length for length, _ in self.parts)

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        before, after, words = self._load(index)
        grown = round(self.size * rng.uniform(1.0, self.grow))
        corner, mirror = rng.random(2), bool(rng.random() < self.flip)
        cut = [self._cut(picture, grown, corner, mirror) for picture in (before, after)]
        return {"before": cut[0], "after": cut[1], "instruction": words}

    def _load(self, index: int) -> Loaded:
        for length, load in self.parts:
            if index < length:
                before, after, words = load(index)
                return self._open(before), self._open(after), words
            index -= length
        raise IndexError(index)

    def _open(self, picture: Any) -> Image.Image:
        if isinstance(picture, Path):
            return open_image(picture, str(picture))
        if isinstance(picture, Image.Image):
            return picture.convert("RGB")
        from inlay_toybox import world

        return Image.fromarray(world.render(picture, self.size).image)

    def _cut(
        self, picture: Image.Image, grown: int, corner: np.ndarray[Any, Any], mirror: bool
    ) -> Tensor:
        scale = grown / min(picture.size)
        shape = [max(self.size, round(side * scale)) for side in picture.size]
        if tuple(shape) != picture.size:
            picture = picture.resize((shape[0], shape[1]), Image.Resampling.LANCZOS)
        x, y = (int(c * (side - self.size + 1)) for c, side in zip(corner, shape, strict=True))
        values = np.array(picture.crop((x, y, x + self.size, y + self.size)))
        values = np.ascontiguousarray(values[:, ::-1] if mirror else values)
        return torch.from_numpy(values).permute(2, 0, 1).float() / 127.5 - 1


def _toybox(kinds: list[str]) -> Callable[[int], Loaded]:
    from inlay_toybox import edits

    if unknown := set(kinds) - set(edits.KINDS):
        fix = f"One of {', '.join(edits.KINDS)}."
        raise ConfigError(f"no kind of edit '{unknown.pop()}'", where="data.kinds", fix=fix)

    def load(index: int) -> Loaded:
        edit = edits.draw(index, kinds or edits.MIXTURE)
        return edit.before, edit.after, edit.instruction

    return load


def _from_datasets(sources: Sources) -> tuple[int, Callable[[int], Loaded]]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        fix = "Install it: pip install datasets."
        raise ConfigError(
            "there is no library `datasets`", where="data.dataset", fix=fix
        ) from error
    table = datasets.load_dataset(sources.dataset, split=sources.split)
    columns = [sources.columns[key] for key in ("before", "after", "instruction")]
    if missing := [name for name in columns if name not in table.column_names]:
        fix = f"It has {', '.join(table.column_names)}."
        raise ConfigError(f"no column '{missing[0]}'", where="data.columns", fix=fix)

    def load(index: int) -> Loaded:
        try:
            row = table[index]
        except (OSError, SyntaxError, ValueError) as error:  # pictures are decoded here
            raise InputError(f"cannot be read: {error}", where=f"row {index}") from error
        before, after, words = (row[name] for name in columns)
        return before, after, str(words)

    return len(table), load


class EncodedPairs:
    """Pairs encoded once, for models whose autoencoder takes longer than a training step.

    latents: float16 `n m 2 c h w`, m = 2 where mirrored pictures are there too, drawn half of the
    time; then before and after. words: instructions, or why the pair cannot be read.
    """

    def __init__(self, latents: Tensor, words: list[str], broken: set[int]) -> None:
        self.latents, self.words, self.broken = latents, words, broken

    def __len__(self) -> int:
        return len(self.words)

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        if index in self.broken:
            raise InputError(self.words[index])
        before, after = self.latents[index, int(rng.integers(self.latents.shape[1]))].float()
        return {"before": before, "after": after, "instruction": self.words[index]}


def encode(
    data: EditPairs, encoder: Callable[[Tensor], Tensor], file: Path, identity: str, chunk: int = 32
) -> EncodedPairs:
    """Encode pairs, or read them back from `file` where it has the same `identity`.

    encoder: pictures `b 3 s s` in -1..1 to latents `b c h w`.
    """
    if file.exists():
        with safe_open(file, "pt") as stored:
            told = stored.metadata()
            if told.get("identity") == identity:
                broken = set(json.loads(told["broken"]))
                return EncodedPairs(stored.get_tensor("latents"), json.loads(told["words"]), broken)
    flips = (0.0, 1.0) if data.flip else (0.0,)
    words, missing, stacks = list[str](), set[int](), list[Tensor]()
    for first in range(0, len(data), chunk):
        pictures = []
        for index in range(first, min(first + chunk, len(data))):
            drawn, text = _plain(data, index, flips)
            words.append(text)
            missing |= set() if drawn else {index}
            pictures += drawn or [torch.zeros(3, data.size, data.size)] * 2 * len(flips)
        stacks.append(encoder(torch.stack(pictures)).half().cpu())
    latents = torch.cat(stacks)
    latents = latents.contiguous().view(len(data), len(flips), 2, *latents.shape[1:])
    told = {"identity": identity, "words": json.dumps(words), "broken": json.dumps(sorted(missing))}
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        save_file({"latents": latents}, partial, told)
    return EncodedPairs(latents, words, missing)


def _plain(data: EditPairs, index: int, flips: tuple[float, ...]) -> tuple[list[Tensor], str]:
    """Pictures of a pair in the order of `EncodedPairs`, and its words; of a broken one, none."""
    rng, pictures, words = np.random.default_rng(0), list[Tensor](), ""
    for flip in flips:
        data.flip = flip
        try:
            drawn = data.draw(index, rng)
        except InputError as error:
            return [], str(error)
        pictures += [drawn["before"], drawn["after"]]
        words = drawn["instruction"]
    return pictures, words
