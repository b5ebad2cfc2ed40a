"""A pipeline of any kind as a backbone: its denoiser's family where inlay knows it, else its sites
and spans by trial. What a pipeline does itself (encode, schedule, call) is refused here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NoReturn

from einops import rearrange
from torch import Tensor, nn

from inlay import AttnSite, ModelError
from inlay.backbones import Backbone, family
from inlay.backbones.base import Size, Spans
from inlay.backbones.token_spans import SiteSpans, probe
from inlay_attention import attention_modules

FAMILIES = {  # denoiser -> the pipeline whose adapter knows its tokens
    "FluxTransformer2DModel": "FluxPipeline",
    "PixArtTransformer2DModel": "PixArtSigmaPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "UNet2DModel": "DDPMPipeline",
}
KINDS: tuple[Literal["self", "cross", "joint"], ...] = ("self", "cross", "joint")


class Visited(Backbone):
    """What guest mode changes of a family. guided: whether the call evaluates a null branch.
    packed: picture tokens of the model's first argument `b n c`; 0 for latents `b c h w`."""

    guided, packed, shown = True, 0, (0, 0)

    @property
    def config(self) -> Any:
        """Where a session reads the model's name."""
        return self.pipe.config

    def fit(self, size: Any, picture: Size | None) -> Size:
        """The size of the call is not ours to choose."""
        return (size[0], size[1]) if size else self.native_size

    def cfg_scale(self, guidance: float, true_cfg: float) -> float:
        """Above 1: there is a null branch. The scale itself is the pipeline's."""
        return 2.0 if self.guided else 1.0

    def look(self, arguments: Mapping[str, Any], text: int, size: Size) -> None:
        """See the arguments of a model call for a picture of this size, before it is planned."""
        first, self.shown = next(iter(arguments.values())), size
        self.packed = first.shape[1] if isinstance(first, Tensor) and first.dim() == 3 else 0

    def spans(self, site: AttnSite, text: int) -> Spans:
        return self.apart(super().spans(site, text))  # type: ignore[safe-super]

    def apart(self, named: Spans) -> Spans:
        """Tokens behind the picture's own are those of a "reference" (FLUX.1 Kontext)."""
        own = math.prod(self.grid(self.shown))

        def cut(spans: dict[str, slice]) -> dict[str, slice]:
            image = spans.get("image", slice(0, 0))
            if image.stop - image.start <= own:
                return spans
            middle = image.start + own
            reference = slice(middle, image.stop)
            return spans | {"image": slice(image.start, middle), "reference": reference}

        def spans(queries: int, keys: int) -> tuple[dict[str, slice], dict[str, slice]]:
            asking, asked = named(queries, keys)
            return cut(asking), cut(asked)

        return spans if self.packed > own else named

    def encode_text(self, prompt: str) -> NoReturn:
        raise self._not_ours("encodes prompts")

    def set_timesteps(self, scheduler: Any, steps: int, sigmas: Any, size: Size) -> NoReturn:
        raise self._not_ours("sets the timesteps")

    def inputs(self, *_: Any, **__: Any) -> NoReturn:
        raise self._not_ours("calls the model")

    def _not_ours(self, what: str) -> ModelError:
        problem = f"the pipeline {what} itself in guest mode"
        return ModelError(problem, where=self.name, fix="Use inlay.Session.")


class Tried(Visited):
    """A denoiser nobody described. Before its first call every module may be a site of any kind."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._found: dict[int, dict[str, SiteSpans]] = {}
        self._most = self._side = 0

    def look(self, arguments: Mapping[str, Any], text: int, size: Size) -> None:
        """Try where tokens lie under prompts of `text` tokens, unless that is known."""
        if size != self.shown:
            self._found.clear()
        super().look(arguments, text, size)
        if text in self._found:
            return
        self._found[text] = found = probe(self.denoiser, (), arguments)
        for name in ("modules", "sites"):
            vars(self).pop(name, None)
        self._most = max((_length(spans.queries) for spans in found.values()), default=0)
        self._side = round((size[0] * size[1] / max(self._most, 1)) ** 0.5)
        if self.packed:  # 2 x 2 latents to a token, in every family that packs them
            self._side = 2 * self._pixels

    @property
    def known(self) -> dict[str, SiteSpans]:
        """Spans by site, as the latest length of text has them; {} before the first call."""
        return next(reversed(self._found.values()), {})

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        found = {name: self.denoiser.get_submodule(name) for name in self.known}
        return found or attention_modules(self.denoiser)

    @cached_property
    def sites(self) -> tuple[AttnSite, ...]:
        every = super().sites
        return every if self.known else tuple(replace(s, kind=k) for s in every for k in KINDS)

    def site(self, index: int, name: str, module: Any, depth: float) -> AttnSite:
        heads = int(getattr(module, "heads", 1))
        width = int(getattr(module, "inner_dim", 0)) // heads
        spans = self.known.get(name)
        here = _length(spans.queries) if spans else 0
        scale = round((self._most / here) ** 0.5) if here else 1
        kind = spans.kind if spans else KINDS[0]
        return AttnSite(name, index, kind, name.split(".")[0], depth, heads, width, scale)

    def spans(self, site: AttnSite, text: int) -> Spans:
        found = self._found[text][site.name]
        return self.apart(lambda queries, keys: (found.queries, found.keys))

    @property
    def native_size(self) -> Size:
        side = getattr(self.denoiser.config, "sample_size", None)
        sides = side if isinstance(side, list | tuple) else (side or 64, side or 64)
        return sides[-2] * self._pixels, sides[-1] * self._pixels

    @property
    def text_tokens(self) -> int:
        return next(reversed(self._found), 0)

    def tokens(self, size: Size) -> int:
        height, width = self.grid(size)
        return self.text_tokens + height * width

    @property
    def multiple(self) -> int:
        return self._side or self._pixels

    @property
    def patch(self) -> int:
        return 1 if self.packed else max(self.multiple // self._pixels, 1)

    def to_grid(self, x: Tensor, size: Size) -> Tensor:
        if self.packed:
            return rearrange(x, "b (h w) c -> b c h w", h=self.grid(size)[0])
        return super().to_grid(x, size)

    def from_grid(self, grid: Tensor) -> Tensor:
        if self.packed:
            return rearrange(grid, "b c h w -> b (h w) c")
        return super().from_grid(grid)

    @property
    def _pixels(self) -> int:
        """Pixels per latent."""
        return int(getattr(self.pipe, "vae_scale_factor", 1))


def visit(pipe: Any) -> Visited:
    """The backbone of any pipeline, by its denoiser. Raises ModelError where there is none, and
    for one that was compiled, whose code would not see what is attached now."""
    parts = ((name, getattr(pipe, name, None)) for name in ("transformer", "unet"))
    name, denoiser = next(((n, part) for n, part in parts if part is not None), ("", None))
    if denoiser is None:
        fix = "It needs a `transformer` or a `unet`, and a `scheduler`."
        raise ModelError(f"{type(pipe).__name__} has no denoiser", where="model", fix=fix)
    known = FAMILIES.get(type(denoiser).__name__)
    if known == "StableDiffusionPipeline":
        plain = all(path.endswith(("attn1", "attn2")) for path in attention_modules(denoiser))
        known = known if plain else None  # others hold text and picture in one module
    bases = (Visited, family(known)) if known else (Tried,)
    body = {"denoiser_name": name, "name": getattr(bases[-1], "name", type(denoiser).__name__)}
    made: Visited = type(f"Visited{type(denoiser).__name__}", bases, body)(pipe)
    return made


def _length(queries: Mapping[str, slice]) -> int:
    """Picture tokens among the queries."""
    image = queries.get("image", slice(0, 0))
    return int(image.stop - image.start)
