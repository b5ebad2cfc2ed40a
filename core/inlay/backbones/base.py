"""What the loop needs to know about a pipeline; a family fills in the abstract part in one file."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from inlay_attention import Seam, attention_modules
from inlay_config.errors import ModelError

from ..events import AttnSite, Branch
from .geometry import Geometry
from .geometry import Size as Size
from .text import Cond

Spans = Callable[[int, int], tuple[dict[str, slice], dict[str, slice]]]


class Backbone(Geometry):
    """A pipeline as the loop sees it; it owns no weights.

    Latents are in the family's layout (`b c h w`, or FLUX's packed `b n c`), pictures `b 3 h w` in
    0..1, sizes (height, width) in pixels.
    name: the family. denoiser_name: the pipeline's attribute. flow: the model predicts velocity.
    sets_begin_index: the stock pipeline calls scheduler.set_begin_index(0).
    """

    name: ClassVar[str]
    denoiser_name: ClassVar[str]
    flow: ClassVar[bool] = False
    sets_begin_index: ClassVar[bool] = False

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.denoiser: Any = getattr(pipe, self.denoiser_name)

    @abstractmethod
    def site(self, index: int, name: str, module: Any, depth: float) -> AttnSite:
        """Describe one attention module."""

    @abstractmethod
    def spans(self, site: AttnSite, text: int) -> Spans:
        """(queries, keys) -> token slices of both by name, for a prompt of `text` tokens."""

    @abstractmethod
    def encode_text(self, prompt: str) -> Cond:
        """The prompt as the stock pipeline encodes it. Raises InputError when it is too long."""

    @abstractmethod
    def set_timesteps(self, scheduler: Any, steps: int, sigmas: Any, size: Size) -> None:
        """As the stock pipeline sets them (FLUX shifts with the picture's size)."""

    @abstractmethod
    def inputs(
        self,
        sample: Tensor,
        t: Tensor,
        conds: list[tuple[Cond, int]],
        guidance: list[tuple[float, int]],
        size: Size,
    ) -> dict[str, Any]:
        """Keyword arguments of one denoiser call; conds and guidance with their number of rows."""

    @abstractmethod
    def cfg_scale(self, guidance: float, true_cfg: float) -> float:
        """The classifier-free scale of a lane; above 1 it gets a null branch."""

    def pieces(self, prompt: str) -> list[str]:
        """Tokens as text, in the order of the embedding's rows; none where no words are read."""
        return []

    def latent(
        self, n: int, size: Size, generator: torch.Generator | None, given: Tensor | None = None
    ) -> Tensor:
        """x_T of n pictures, drawn as the stock pipeline draws it; or `given`, on the device."""
        if given is not None:
            return given.to(self.device, self.dtype)
        sides = (side * self.patch for side in self.grid(size))
        shape = (n, self.channels, *sides)
        return randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype)

    def groups(self, branches: list[Branch]) -> tuple[tuple[str, ...], ...]:
        """Branches per model call, as the stock pipeline groups them."""
        return (tuple(b.name for b in branches),)

    def pack(self, z: Tensor) -> Tensor:
        """VAE latents `b c h w` in model layout."""
        return z

    def unpack(self, x: Tensor, size: Size) -> Tensor:
        """Inverse of `pack`."""
        return x

    @property
    def channels(self) -> int:
        """Channels of x_T: all that the model takes, where it takes nothing else."""
        return int(self.denoiser.config.in_channels)

    @property
    def decodes(self) -> bool:
        """Whether final latents can be made pictures."""
        return self.pipe.vae is not None

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Attention modules of the denoiser by path."""
        return attention_modules(self.denoiser)

    @cached_property
    def sites(self) -> tuple[AttnSite, ...]:
        last = max(len(self.modules) - 1, 1)
        listed = enumerate(self.modules.items())
        return tuple(self.site(i, name, module, i / last) for i, (name, module) in listed)

    @property
    def device(self) -> torch.device:
        """Where tensors go: the denoiser's device, or the one an offload hook moves it to."""
        hook = getattr(self.denoiser, "_hf_hook", None)
        away = getattr(hook, "execution_device", None)
        here = next(self.denoiser.parameters()).device if away is None else torch.device(away)
        return torch.device("cpu") if here.type == "meta" else here  # a plan still has noise levels

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @cached_property
    def card(self) -> dict[str, Any]:
        """How a local model folder says it is to be sampled (`settings.json`: height, width,
        max_sequence_length ...); {} where it says nothing."""
        folder = str(self.pipe.config.get("_name_or_path") or "")
        path = Path(folder) / "settings.json"
        return dict(json.loads(path.read_text())) if folder and path.is_file() else {}

    @contextmanager
    def frozen(self, seam: Seam, checkpoint: bool) -> Iterator[None]:
        """Gradients go to latents: no weight asks for one; activations may be recomputed."""
        asking = [p for p in self.denoiser.parameters() if p.requires_grad]
        recompute = checkpoint and not self.denoiser.is_gradient_checkpointing
        try:
            for p in asking:
                p.requires_grad_(False)
            if recompute:
                self.denoiser.enable_gradient_checkpointing(seam.checkpoint)
            yield
        finally:
            for p in asking:
                p.requires_grad_(True)
            if recompute:
                self.denoiser.disable_gradient_checkpointing()

    def denoise(self, kwargs: dict[str, Any], role: str) -> Tensor:
        """One model call; diffusers' caches keep text and null apart by the context's name."""
        context = getattr(self.denoiser, "cache_context", None)
        with context("uncond" if role == "null" else "cond") if context else nullcontext():
            return self.denoiser(**kwargs, return_dict=False)[0]

    def encode_image(self, image: Tensor) -> Tensor:
        """Clean latents (the mode, not a sample) of pictures."""
        vae = self.pipe.vae
        if vae is None:
            fix = "Load it with its VAE."
            raise ModelError("this pipeline cannot encode pictures", where="model", fix=fix)
        z = vae.encode((image * 2 - 1).to(self.device, vae.dtype)).latent_dist.mode()
        shift = (vae.config.shift_factor if self.flow else None) or 0.0
        return self.pack((z - shift) * vae.config.scaling_factor).to(self.dtype)

    def pixels(self, x: Tensor, size: Size) -> Tensor:
        """Pictures of clean latents in about -1..1, not clamped: what losses see, in the graph."""
        vae = self.pipe.vae
        shift = vae.config.shift_factor if self.flow else None  # others' pipelines know of none
        z = self.unpack(x, size) / vae.config.scaling_factor
        z = (z if shift is None else z + shift).to(vae.dtype)
        return vae.decode(z, return_dict=False)[0]

    def decode(self, x: Tensor, size: Size) -> Tensor:
        """Pictures of clean latents, by the stock pipeline's own arithmetic."""
        return self.pipe.image_processor.postprocess(self.pixels(x, size), output_type="pt")

    @cached_property
    def weights(self) -> int:
        """Bytes of all networks."""
        parts = [part for part in vars(self.pipe).values() if isinstance(part, nn.Module)]
        return sum(p.numel() * p.element_size() for m in parts for p in m.parameters())

    def memory(self, size: Size, rows: int, edits: bool, probes: int) -> dict[str, int]:
        """Bytes by purpose, by arithmetic; attention: Q, K, V and output of the largest."""
        width = max((s.heads * s.dim for s in self.sites), default=0)
        one = self.tokens(size) * width * torch.finfo(self.dtype).bits // 8
        attention = rows * one * (6 if edits else 4)
        return {"weights": self.weights, "attention": attention, "probes": probes * one}
