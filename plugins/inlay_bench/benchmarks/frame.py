"""One square frame for all that an item has: pictures, masks, boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Frame:
    """The central square of a picture, at `side` pixels; side 0 leaves everything as it is.

    size: width and height of the picture.
    """

    size: tuple[int, int]
    side: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the square in the picture."""
        short = min(self.size)
        left, top = ((length - short) // 2 for length in self.size)
        return left, top, left + short, top + short

    def picture(self, image: Image.Image) -> Image.Image:
        """The picture in the frame. One of another size is first brought to the size."""
        if image.size != self.size:
            image = image.resize(self.size, Image.Resampling.LANCZOS)
        if not self.side:
            return image
        return image.resize((self.side, self.side), Image.Resampling.LANCZOS, box=self.box)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """A mask, bool `h w`, in the frame; each pixel is its nearest."""
        image = Image.fromarray(mask.astype(np.uint8) * 255)
        if image.size != self.size:
            image = image.resize(self.size, Image.Resampling.NEAREST)
        if self.side:
            image = image.resize((self.side, self.side), Image.Resampling.NEAREST, box=self.box)
        return np.asarray(image) > 127

    def boxes(self, boxes: Sequence[Sequence[float]]) -> list[list[float]]:
        """Boxes (left, top, right, bottom in pixels) in the frame; those outside are dropped."""
        if not self.side:
            return [[float(value) for value in box] for box in boxes]
        left, top, right, _ = self.box
        scale = self.side / (right - left)
        moved = [
            [min(max((value - start) * scale, 0.0), float(self.side))
             for value, start in zip(box, (left, top, left, top), strict=True)]
            for box in boxes
        ]  # fmt: skip
        return [box for box in moved if box[2] > box[0] and box[3] > box[1]]
