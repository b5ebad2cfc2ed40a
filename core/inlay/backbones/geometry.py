"""Pixels, latents and tokens: how large things are in each, and from one to the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from einops import rearrange, repeat
from torch import Tensor

from inlay_config.errors import ConfigError

from ..events import AttnSite

Size = tuple[int, int]


class Geometry(ABC):
    """The sizes of a model family: (height, width) in pixels unless said otherwise."""

    pipe: Any

    @property
    @abstractmethod
    def native_size(self) -> Size:
        """The size that the model was trained at."""

    @property
    @abstractmethod
    def text_tokens(self) -> int:
        """Length to which prompts are padded."""

    @abstractmethod
    def tokens(self, size: Size) -> int:
        """Tokens of the longest attention sequence."""

    @property
    def patch(self) -> int:
        """Side of a token in latents that the model itself cuts into patches."""
        return 1

    @property
    def multiple(self) -> int:
        """Pixels per token."""
        return int(self.pipe.vae_scale_factor)

    @property
    def divisor(self) -> int:
        """Picture sides are multiples of it."""
        return self.multiple

    def to_grid(self, x: Tensor, size: Size) -> Tensor:
        """Latents as `b c h w` of the token grid, for anything spatial."""
        p = self.patch
        return x if p == 1 else rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p)

    def from_grid(self, grid: Tensor) -> Tensor:
        """Inverse of `to_grid`; a mask `b 1 h w` becomes one that broadcasts over latents."""
        p = self.patch
        if grid.shape[1] == 1 and p > 1:
            return repeat(grid, "b c h w -> b c (h p) (w q)", p=p, q=p)
        return grid if p == 1 else rearrange(grid, "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)

    def grid(self, size: Size) -> Size:
        """(height, width) in tokens."""
        return size[0] // self.multiple, size[1] // self.multiple

    def lengths(self, site: AttnSite, size: Size) -> Size:
        """(queries, keys) of a site, in tokens."""
        height, width = (-(-side // site.scale) for side in self.grid(size))
        image, text = height * width, self.text_tokens
        joint = text + image
        return {"self": (image, image), "cross": (image, text), "joint": (joint, joint)}[site.kind]

    def fit(self, size: Any, picture: Size | None) -> Size:
        """A size the model allows: `size` (side or pair) rounded down, else the picture's shape at
        the model's native area, else the native size. Raises ConfigError below two divisors."""
        height, width = self.native_size
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
        elif picture is not None:
            ratio = (height * width / (picture[0] * picture[1])) ** 0.5 / self.divisor
            height, width = (max(2, round(side * ratio)) * self.divisor for side in picture)
        height, width = (side // self.divisor * self.divisor for side in (height, width))
        if min(height, width) < 2 * self.divisor:
            problem = f"{height}x{width} pixels is too small for this model"
            raise ConfigError(problem, where="size", fix=f"Use {2 * self.divisor} or more.")
        return height, width
