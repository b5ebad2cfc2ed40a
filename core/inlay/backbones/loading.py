"""From a name to a pipeline: with its weights, or as a skeleton without them."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from inlay_config.config import data_path
from inlay_config.errors import ModelError

from . import adm, compvis
from .base import Backbone

FAMILIES = {
    "FluxPipeline": "flux:Flux",
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionInstructPix2PixPipeline": "conditioned:InstructPix2Pix",
    "PaintByExamplePipeline": "conditioned:PaintByExample",
    "MimicBrushPipeline": "mimicbrush:MimicBrush",
    "StableDiffusionXLPipeline": "stable_diffusion_xl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "stable_diffusion_3:StableDiffusion3",
    "PixArtAlphaPipeline": "pixart:PixArt",
    "PixArtSigmaPipeline": "pixart:PixArt",
    "LDMTextToImagePipeline": "latent_diffusion:LatentDiffusion",
    "DDPMPipeline": "pixel_unet:PixelUNet",
    "DDIMPipeline": "pixel_unet:PixelUNet",
}


def adapt(pipe: Any) -> Backbone:
    """The backbone of a live pipeline, or one that is made already. Raises ModelError for a family
    without an adapter."""
    if isinstance(pipe, Backbone):
        return pipe
    for cls in type(pipe).__mro__:
        if cls.__name__ in FAMILIES:
            return family(cls.__name__)(pipe)
    fix = f"Supported: {', '.join(FAMILIES)}. Plugins that need no more than attention and the "
    fix += "picture act in the own call of any other one: inlay.attach(pipe, plugins)."
    raise ModelError(f"no backbone for {type(pipe).__name__}", where="model", fix=fix)


def family(pipeline: str) -> type[Backbone]:
    """The adapter of a pipeline class that is listed."""
    module, name = FAMILIES[pipeline].split(":")
    adapter: type[Backbone] = getattr(import_module(f"{__package__}.{module}"), name)
    return adapter


def load(
    path: str,
    dtype: str = "float32",
    device: str = "auto",
    offload: str = "none",
    revision: str | None = None,
) -> Any:
    """A pipeline by folder or hub name, on its device: safetensors only, no remote code; or one of
    Stable Diffusion's or guided-diffusion's original checkpoints, a file, of which tensors alone
    are read.

    Raises ModelError when it cannot be loaded, or the device or offload is not to be had.
    """
    from diffusers import DiffusionPipeline

    cuda = torch.cuda.is_available()
    place = torch.device(("cuda" if cuda else "cpu") if device == "auto" else device)
    if place.type == "cuda" and not cuda:
        raise ModelError("there is no CUDA device here", where="device", fix="Use device=cpu.")
    if offload != "none" and place.type == "cpu":
        problem = f"offload={offload} moves modules to an accelerator, and the device is the CPU"
        raise ModelError(problem, where="offload", fix="Use offload=none, or device=cuda.")
    options = {"use_safetensors": True, "revision": revision}
    _names()
    try:
        if compvis.is_file(path):
            pipe = compvis.load(path, dtype=dtype)
        elif adm.is_file(path):
            pipe = adm.pipeline(path).to(getattr(torch, dtype))
        else:
            pipe = DiffusionPipeline.from_pretrained(path, dtype=getattr(torch, dtype), **options)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise _unusable(path, error) from error
    if offload == "model":
        pipe.enable_model_cpu_offload(device=place)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=place)
    else:
        pipe.to(place)
    return pipe


def skeleton(path: str, revision: str | None = None, dtype: str = "float32") -> Any:
    """The pipeline without weights: networks on the meta device, true tokenizers and scheduler.

    Nothing is fetched for a published model whose configuration ships here: its tokenizers are
    those that were fetched before, or None. Raises ModelError when there is no such pipeline.
    """
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers, **_names()}
    if adm.is_file(path):
        return adm.pipeline(path).to("meta", getattr(torch, dtype))
    if compvis.is_file(path):
        path = compvis.base_of(Path(path), compvis.state_of(Path(path)))
    shipped = data_path("models") / path.replace("/", "--")
    home = str(shipped) if shipped.is_dir() and not revision else path
    try:
        config = diffusers.DiffusionPipeline.load_config(home, revision=revision)
        parts: dict[str, Any] = {}
        for name, entry in config.items():
            if not isinstance(entry, list) or len(entry) != 2:
                continue
            cls = getattr(libraries.get(entry[0]), str(entry[1]), None)
            if home == path or (shipped / name).is_dir():
                parts[name] = _part(cls, home, {"subfolder": name, "revision": revision})
            else:
                parts[name] = _fetched(cls, path, name)
            if isinstance(parts[name], torch.nn.Module):  # diffusers' own `to` warns of rounding
                torch.nn.Module.to(parts[name], getattr(torch, dtype))
        if "safety_checker" in parts:
            parts |= {"safety_checker": None, "requires_safety_checker": False}
        pipe = getattr(diffusers, config["_class_name"])(**parts)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _unusable(path, error) from error
    pipe.register_to_config(_name_or_path=path)
    return pipe


def _names() -> dict[str, Any]:
    """Modules by the names that folders know them by, put where diffusers looks for them: what it
    has moved since, and a pipeline that it lacks."""
    import diffusers
    from diffusers import pipelines
    from diffusers.pipelines import latent_diffusion
    from diffusers.pipelines.deprecated import paint_by_example

    from . import mimicbrush_pipeline

    pipelines.paint_by_example = paint_by_example
    diffusers.MimicBrushPipeline = mimicbrush_pipeline.MimicBrushPipeline
    named = {module.__name__: module for module in (paint_by_example, mimicbrush_pipeline)}
    named["latent_diffusion"] = latent_diffusion
    return {"paint_by_example": paint_by_example, **named}


def _part(cls: Any, path: str, where: dict[str, Any]) -> Any:
    """A component: networks without their weights, anything else as it is."""
    from diffusers import ModelMixin
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

    if cls is None:
        return None
    with torch.device("meta"):
        if issubclass(cls, ModelMixin):
            return cls.from_config(cls.load_config(path, **where))
        if issubclass(cls, PreTrainedModel):
            stored, _ = PreTrainedConfig.get_config_dict(path, **where)  # its own kind, if known
            known = stored.get("model_type") in CONFIG_MAPPING
            kind = AutoConfig if known else cls.config_class
            return cls(kind.from_pretrained(path, **where))
    return cls.from_pretrained(path, **where)


def _fetched(cls: Any, path: str, name: str) -> Any:
    """A tokenizer of a published model that is on this machine already, else None."""
    held = try_to_load_from_cache(path, f"{name}/tokenizer_config.json")
    return cls.from_pretrained(Path(held).parent) if isinstance(held, str) else None


def _unusable(path: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300]
    if absent := _absent(Path(path)):
        reason = f"it has no {' and no '.join(absent)}: {reason}"
    fix = "Give a folder or hub name of a diffusers pipeline with safetensors weights."
    return ModelError(f"'{path}' cannot be loaded: {reason}", where="model", fix=fix)


def _absent(folder: Path) -> list[str]:
    """Parts that a pipeline's index lists and its folder lacks."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        listed = [name for name, kind in index.items() if isinstance(kind, list) and kind[0]]
    except (OSError, ValueError, AttributeError, IndexError):  # no such folder, or a broken index
        return []
    return [name for name in listed if not (folder / name).is_dir()]
