"""Pictures in and out. Everything that is opened from a file is opened by `open_image`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from inlay.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import; a bad picture should not
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 64_000_000


def open_image(path: str | Path, where: str = "input.image") -> Image.Image:
    """The picture as RGB, 8 bits, upright; transparency over white, the first of several frames.

    Raises InputError, before decoding, for more than 64 Mpx or another format than `FORMATS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            image = Image.open(path, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            image = _eight_bits(image)
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"there is no file '{path}'", where=where) from error
    except Image.DecompressionBombError as error:
        limit = f"Scale it down to {MAX_PIXELS // 10**6} megapixels or fewer."
        raise InputError(f"'{path}' is too large: {error}", where=where, fix=limit) from error
    except Exception as error:  # decoders raise anything on broken bytes
        formats = f"Use a {', '.join(FORMATS)} file."
        raise InputError(f"'{path}' cannot be read: {error}", where=where, fix=formats) from error


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


def save(image: Image.Image, path: Path, **options: Any) -> None:
    """Write beside, then rename: the file is whole or not there."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        image.save(partial, format="PNG", **options)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def safe_join(folder: str | Path, name: str) -> Path:
    """`folder/name`, refused when it would climb out of the folder."""
    path = Path(folder, name)
    if "\0" in name or not path.resolve().is_relative_to(Path(folder).resolve()):
        raise InputError(f"'{name}' climbs out of '{folder}'", where="out", fix="Use a plain name.")
    return path


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits; Pillow's own conversion clips instead of scaling."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError("neither 8 nor 16 bits a channel")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))
