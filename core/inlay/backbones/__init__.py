"""Backbones: one file per model family. `Backbone` is what the loop needs to know about a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attention import attention_modules
from ..errors import ConfigError, ModelError
from ..events import AttnSite, Branch, Cond

FAMILIES = {
    "FluxPipeline": "flux:Flux",
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusion",
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Backbone:
    """One pipeline seen by the loop. Subclasses say how their family encodes, lays out and names tokens; they own no weights.

    Latents are in the family's own layout (`b c h w`, or FLUX's packed `b n c`); pictures are `b 3 h w` in 0..1.
    """

    name: ClassVar[str]
    denoiser_name: ClassVar[str]
    sets_begin_index: ClassVar[bool] = False
    flow: ClassVar[bool] = False

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.denoiser: nn.Module = getattr(pipe, self.denoiser_name)

    # what a family says -------------------------------------------------------------------------------------------

    def site(self, index: int, name: str, module: nn.Module, depth: float) -> AttnSite | None:
        """The description of one attention module, None when it is no softmax attention over these tokens."""
        raise ModelError(f"{type(self).__name__} describes no sites", where="backbone")

    def spans(
        self, site: AttnSite, text: int
    ) -> Callable[[int, int], tuple[dict[str, slice], dict[str, slice]]]:
        """(number of queries, number of keys) -> token slices of queries and of keys, for `text` text tokens."""
        raise ModelError(f"{type(self).__name__} names no spans", where="backbone")

    def encode_text(self, prompt: str) -> Cond:
        raise ModelError(f"{type(self).__name__} encodes no text", where="backbone")

    def latent(
        self,
        n: int,
        size: tuple[int, int],
        generator: torch.Generator | None,
        given: Tensor | None = None,
    ) -> Tensor:
        """x_T of `n` pictures, drawn as the stock pipeline draws it, or `given` moved to the device."""
        raise ModelError(f"{type(self).__name__} has no latents", where="backbone")

    def set_timesteps(
        self, scheduler: Any, steps: int, sigmas: list[float] | None, size: tuple[int, int]
    ) -> None:
        raise ModelError(f"{type(self).__name__} has no schedule", where="backbone")

    def inputs(
        self,
        sample: Tensor,
        t: Tensor,
        conds: list[tuple[Cond, int]],
        guidance: list[tuple[float, int]],
        size: tuple[int, int],
    ) -> dict[str, Any]:
        """Keyword arguments of one denoiser call; conds and guidance come with their number of rows, in row order."""
        raise ModelError(f"{type(self).__name__} takes no inputs", where="backbone")

    def cfg_scale(self, guidance: float, true_cfg: float) -> float:
        """The classifier-free scale of a lane; above 1 it gets a null branch."""
        raise ModelError(f"{type(self).__name__} has no guidance", where="backbone")

    def groups(self, branches: list[Branch]) -> tuple[tuple[str, ...], ...]:
        """Branches per model call, as the stock pipeline groups them."""
        return (tuple(b.name for b in branches),)

    def to_grid(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Latents as a picture `b c h w` of the token grid, for anything spatial."""
        return x

    def from_grid(self, grid: Tensor) -> Tensor:
        """The inverse of `to_grid`; a mask `b 1 h w` becomes one that broadcasts over latents."""
        return grid

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Token grid (h, w) of a picture size in pixels."""
        return size[0] // self.multiple, size[1] // self.multiple

    # what all share -----------------------------------------------------------------------------------------------

    @property
    def multiple(self) -> int:
        """Picture sides must be multiples of this many pixels."""
        return int(self.pipe.vae_scale_factor)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        return attention_modules(self.denoiser)

    @cached_property
    def sites(self) -> tuple[AttnSite, ...]:
        count = max(len(self.modules) - 1, 1)
        found = (
            self.site(i, name, m, i / count) for i, (name, m) in enumerate(self.modules.items())
        )
        return tuple(s for s in found if s is not None)

    @property
    def device(self) -> torch.device:
        """Where tensors must be: the pipeline's device, or the accelerator that an offload hook moves modules to."""
        hook = getattr(self.denoiser, "_hf_hook", None)
        offloaded = getattr(hook, "execution_device", None)
        return (
            torch.device(offloaded)
            if offloaded is not None
            else next(self.denoiser.parameters()).device
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    def fit(
        self, size: int | list[int] | tuple[int, int] | None, picture: tuple[int, int] | None
    ) -> tuple[int, int]:
        """(height, width) in pixels: `size` as asked (sides rounded down to what the model allows), else the picture's shape at the model's
        native area, else the native size. Raises ConfigError below one token."""
        native = self.native_size
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
        elif picture is not None:
            ratio = (native[0] * native[1] / (picture[0] * picture[1])) ** 0.5
            height, width = (
                max(self.multiple, round(side * ratio / self.multiple) * self.multiple)
                for side in picture
            )
        else:
            height, width = native
        height, width = (
            height // self.multiple * self.multiple,
            width // self.multiple * self.multiple,
        )
        if min(height, width) < 2 * self.multiple:
            raise ConfigError(f"{height}x{width} pixels is too small for this model", where="size",
                              fix=f"Use at least {2 * self.multiple}x{2 * self.multiple}.")  # fmt: skip
        return height, width

    @property
    def native_size(self) -> tuple[int, int]:
        """The size the model was trained at; a model folder may state it in its card (`toybox.json`: {"size": 64})."""
        raise ModelError(f"{type(self).__name__} has no native size", where="backbone")

    def denoise(self, kwargs: dict[str, Any], role: str) -> Tensor:
        """One model call. Caches of diffusers keep text and null apart by the context's name."""
        context = getattr(self.denoiser, "cache_context", None)
        with context({"text": "cond", "null": "uncond"}[role]) if context else nullcontext():
            output: Tensor = self.denoiser(**kwargs, return_dict=False)[0]
        return output

    def encode_image(self, image: Tensor) -> Tensor:
        """Clean latent (mode, not a sample) of pictures `b 3 h w` in 0..1."""
        if self.pipe.vae is None:
            raise ModelError(
                "this pipeline has no VAE, so no picture can be encoded",
                where="model",
                fix="Load it with its VAE.",
            )
        vae = self.pipe.vae
        z = vae.encode((image * 2 - 1).to(self.device, vae.dtype)).latent_dist.mode()
        return self.pack(
            (z - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
        )

    def decode(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Pictures `b 3 h w` in 0..1 of clean latents, by the pipeline's own arithmetic."""
        vae = self.pipe.vae
        z = self.unpack(x, size) / vae.config.scaling_factor
        shift = getattr(vae.config, "shift_factor", None)
        image = vae.decode(
            (z + shift if shift is not None else z).to(vae.dtype), return_dict=False
        )[0]
        pictures: Tensor = self.pipe.image_processor.postprocess(image, output_type="pt")
        return pictures

    def pack(self, z: Tensor) -> Tensor:
        """VAE latents `b c h w` -> model layout."""
        return z

    def unpack(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return x

    def memory(self, size: tuple[int, int], rows: int, edits: bool, probes: int) -> dict[str, int]:
        """Bytes by purpose, arithmetic only: weights, and the largest attention site's Q, K, V, output (keys doubled by an append)."""
        width = max((s.heads * s.dim for s in self.sites), default=0)
        tokens, item = self.tokens(size), torch.finfo(self.dtype).bits // 8
        parts = [m for m in vars(self.pipe).values() if isinstance(m, nn.Module)]
        weights = sum(p.numel() * p.element_size() for m in parts for p in m.parameters())
        attention = rows * tokens * width * item * (6 if edits else 4)
        return {
            "weights": weights,
            "attention": attention,
            "probes": probes * tokens * width * item,
        }

    def tokens(self, size: tuple[int, int]) -> int:
        """Tokens of the longest attention sequence."""
        raise ModelError(f"{type(self).__name__} counts no tokens", where="backbone")


def adapt(pipe: Any) -> Backbone:
    """The backbone of a live pipeline, by its class. Raises ModelError for a family without an adapter."""
    for cls in type(pipe).__mro__:
        if cls.__name__ in FAMILIES:
            module, name = FAMILIES[cls.__name__].split(":")
            backbone: Backbone = getattr(import_module(f"{__name__}.{module}"), name)(pipe)
            return backbone
    raise ModelError(
        f"no backbone for {type(pipe).__name__}",
        where="model",
        fix=f"Supported: {', '.join(FAMILIES)}.",
    )


def load(
    path: str,
    dtype: str = "float32",
    device: str = "auto",
    offload: str = "none",
    revision: str | None = None,
) -> Any:
    """A pipeline by folder or hub name: safetensors only, no remote code, on its device. Raises ModelError."""
    from diffusers import DiffusionPipeline

    place = torch.device(
        device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("this machine has no CUDA device", where="device", fix="Use device=cpu.")
    if offload != "none" and place.type == "cpu":
        raise ModelError(f"offload={offload} moves modules to an accelerator, and the device is the CPU", where="offload",
                         fix="Use offload=none, or device=cuda.")  # fmt: skip
    try:
        pipe = DiffusionPipeline.from_pretrained(
            path, dtype=DTYPES[dtype], use_safetensors=True, revision=revision
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}", where="model",
                         fix="Give a folder or hub name of a diffusers pipeline with safetensors weights.") from error  # fmt: skip
    if offload == "model":
        pipe.enable_model_cpu_offload(device=place)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=place)
    else:
        pipe.to(place)
    return pipe


def skeleton(path: str, revision: str | None = None) -> Any:
    """The pipeline without weights: networks on the meta device, real tokenizers and scheduler. For `inlay plan`."""
    import diffusers
    import transformers

    try:
        config = diffusers.DiffusionPipeline.load_config(path, revision=revision)
        parts: dict[str, Any] = {}
        for name, entry in config.items():
            if not isinstance(entry, list) or entry[1] is None:
                continue
            library = {"diffusers": diffusers, "transformers": transformers}[entry[0]]
            cls, where = getattr(library, entry[1]), {"subfolder": name, "revision": revision}
            if name.startswith("tokenizer") or name == "scheduler":
                parts[name] = cls.from_pretrained(path, **where)
            elif issubclass(cls, diffusers.ModelMixin):
                with torch.device("meta"):
                    parts[name] = cls.from_config(cls.load_config(path, **where))
            elif name.startswith("text_encoder"):
                with torch.device("meta"):
                    parts[name] = cls(transformers.AutoConfig.from_pretrained(path, **where))
            else:
                parts[name] = None
        cls = getattr(diffusers, config["_class_name"])
        return cls(
            **parts, **({"requires_safety_checker": False} if "safety_checker" in parts else {})
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{path} cannot be planned: {' '.join(str(error).split())[:300]}", where="model",
                         fix="Give a folder or hub name of a diffusers pipeline.") from error  # fmt: skip


def card(pipe: Any) -> dict[str, Any]:
    """What a model folder says about itself in `inlay.json` (size, max_sequence_length, guidance, true_cfg, steps); {} without one."""
    import json

    path = Path(str(getattr(pipe.config, "_name_or_path", "") or "")) / "inlay.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}
