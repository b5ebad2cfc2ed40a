"""Pictures in and out. Everything that is opened from a file is opened by `open_image`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from inlay_config.errors import InputError
from inlay_config.manifest import portable

if TYPE_CHECKING:  # torch takes seconds to import; a bad picture is told at once
    from torch import Tensor

    from inlay.events import Result

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 64_000_000
BOARD = {"image": ("image:source", "image:original"), "mask": ("mask:user", "image:mask")}
LANCZOS = Image.Resampling.LANCZOS


def open_image(path: str | Path, where: str = "input.image") -> Image.Image:
    """The picture as RGB, 8 bits, upright; transparency over white, the first of several frames.

    Raises InputError, before decoding, for more than 64 Mpx or another format than `FORMATS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            image: Image.Image = Image.open(path, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
        return _plain_rgb(image)
    except FileNotFoundError as error:
        raise InputError(f"there is no file '{path}'", where=where) from error
    except Image.DecompressionBombError as error:
        limit = f"Scale it down to {MAX_PIXELS // 10**6} megapixels or fewer."
        raise InputError(f"'{path}' is too large: {error}", where=where, fix=limit) from error
    except Exception as error:  # decoders raise anything on broken bytes
        formats = f"Use a {', '.join(FORMATS)} file."
        raise InputError(f"'{path}' cannot be read: {error}", where=where, fix=formats) from error


def as_pictures(**given: Any) -> dict[str, Image.Image]:
    """What is given of image (as RGB) and mask (as L): a path, a PIL picture or a tensor `1 c h w`
    in 0..1; None is left out. Raises InputError for anything else."""
    pictures = {}
    for kind, value in given.items():
        if value is None:
            continue
        where = f"input.{kind}"
        if isinstance(value, str | Path):
            picture = open_image(value, where)
        elif isinstance(value, Image.Image):
            picture = _plain_rgb(value)
        elif hasattr(value, "detach"):  # a tensor, told without importing torch
            picture = to_pil(value)[0]
        else:
            fix = "Give a path, a PIL picture or a tensor."
            raise InputError(f"{type(value).__name__} is no picture", where=where, fix=fix)
        pictures[kind] = picture.convert("L" if kind == "mask" else "RGB")
    return pictures


def on_board(pictures: Mapping[str, Any], size: tuple[int, int], device: Any) -> dict[str, Tensor]:
    """Input pictures as board values: at the model's size (height, width), and as they came."""
    values = {}
    for kind, picture in pictures.items():
        fitted, *originals = BOARD[kind]
        values[fitted] = to_tensor(picture.resize(size[::-1], LANCZOS)).to(device)
        values |= {original: to_tensor(picture) for original in originals}
    return values


def to_tensor(image: Image.Image) -> Tensor:
    """RGB or L to float32 `1 c h w` in 0..1."""
    import torch

    array = np.atleast_3d(np.asarray(image, dtype=np.float32) / 255)
    return torch.from_numpy(array).permute(2, 0, 1)[None].contiguous()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Float `b c h w` in 0..1 (clamped), c = 1 or 3, to 8-bit pictures."""
    arrays = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)
            for array in arrays.numpy()]  # fmt: skip


def save(image: Image.Image, path: Path, manifest: Mapping[str, Any] | None = None) -> None:
    """Write a PNG, the portable manifest in its text chunk `inlay`."""
    text = PngImagePlugin.PngInfo()
    if manifest:
        text.add_itxt("inlay", json.dumps(portable(manifest)))
    with whole(path) as partial:
        image.save(partial, format="PNG", pnginfo=text)


def save_result(result: Result, folder: str | Path) -> None:
    """images/LANE.png (LANE-0.png ... for several), masks/NAME.png, and manifest.json last."""
    lanes = [("images", lane, batch) for lane, batch in result.images.items()]
    for kind, name, batch in [*lanes, *(("masks", *item) for item in result.board.of("mask"))]:
        for i, image in enumerate(pictures := to_pil(batch)):
            file = f"{name}-{i}.png" if len(pictures) > 1 else f"{name}.png"
            path = safe_join(Path(folder, kind), file)
            path.parent.mkdir(parents=True, exist_ok=True)
            save(image, path, result.manifest if kind == "images" else None)
    with whole(Path(folder, "manifest.json")) as partial:
        text = json.dumps(result.manifest, indent=2, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, renamed at the end: `path` is whole or not there."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def safe_join(folder: str | Path, name: str) -> Path:
    """`folder/name`, refused when it would climb out of the folder."""
    path = Path(folder, name)
    if "\0" in name or not path.resolve().is_relative_to(Path(folder).resolve()):
        raise InputError(f"'{name}' climbs out of '{folder}'", where="out", fix="Use a plain name.")
    return path


def _plain_rgb(image: Image.Image) -> Image.Image:
    """Upright, 8 bits, transparency over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits; Pillow's own conversion clips instead of scaling."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError("neither 8 nor 16 bits a channel")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))
