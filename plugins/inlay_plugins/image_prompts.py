"""Weights of IP-Adapters: files to tokens of a picture, and key and value weights by site. No
hooks; names are converted by diffusers' own loader, and no attention processor is replaced."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from inlay import ModelError

FIX = "Give an IP-Adapter for this model: a file, or OWNER/REPOSITORY/FILE of the hub."
ENCODER = "Name the one that the adapter was trained with in the option `encoder`."


@dataclass
class Adapter:
    """projection: from what CLIP sees to tokens of the prompt's width. encoder, processor: CLIP's
    vision tower and how it wants pictures. weights: by site, of keys and values, `inner c`."""

    projection: nn.Module
    encoder: Any
    processor: Any
    weights: dict[str, tuple[Tensor, Tensor]]

    @torch.no_grad()
    def tokens(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        """Tokens `1 m c` of a picture, and of none."""
        from diffusers.models.embeddings import ImageProjection

        pixels = self.processor(picture, return_tensors="pt").pixel_values
        pixels = pixels.to(self.encoder.device, self.encoder.dtype)
        if isinstance(self.projection, ImageProjection):
            seen = self.encoder(pixels).image_embeds
            both = seen, torch.zeros_like(seen)
        else:
            both = tuple(
                self.encoder(x, output_hidden_states=True).hidden_states[-2]
                for x in (pixels, torch.zeros_like(pixels))
            )
        shown, absent = (self.projection(x) for x in both)
        return shown, absent


def load(denoiser: Any, file: str, encoder: str, where: str) -> Adapter:
    """An adapter for a U-Net of diffusers. Raises ModelError for a file that is none, that is of
    face identities, that fits another model, or whose encoder is not there or is another."""
    from diffusers.models.embeddings import ImageProjection
    from diffusers.models.model_loading_utils import load_state_dict
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    path, beside = _found(file, where)
    try:
        state = _parts(load_state_dict(path))
        if _of_faces(state):
            problem = (
                f"'{file}' reads a face recogniser's numbers (FaceID), not CLIP's of a picture"
            )
            raise ModelError(problem, where=where, fix="Give a plain, Plus or Full Face adapter.")
        projection = denoiser._convert_ip_adapter_image_proj_to_diffusers(
            state["image_proj"], low_cpu_mem_usage=False
        )
        processors = denoiser._convert_ip_adapter_attn_to_diffusers(
            [state], low_cpu_mem_usage=False
        )
        weights = {
            name.removesuffix(".processor"): (p.to_k_ip[0].weight, p.to_v_ip[0].weight)
            for name, p in processors.items()
            if hasattr(p, "to_k_ip")
        }
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(f"'{file}' is no such adapter: {reason}", where=where, fix=FIX) from error
    name, inside = (encoder, {}) if encoder else beside
    try:
        tower = CLIPVisionModelWithProjection.from_pretrained(name, use_safetensors=True, **inside)
    except (OSError, ValueError) as error:
        problem = f"CLIP's vision tower is not at '{name}'"
        raise ModelError(problem, where=where, fix=ENCODER) from error
    plain = isinstance(projection, ImageProjection)
    seen = tower.config.projection_dim if plain else tower.config.hidden_size
    read = next(m for m in projection.modules() if isinstance(m, nn.Linear)).in_features
    if seen != read:
        problem = f"CLIP's vision tower at '{name}' is {seen} wide, the adapter reads {read}"
        raise ModelError(problem, where=where, fix=ENCODER)
    side = tower.config.image_size
    processor = CLIPImageProcessor(size=side, crop_size=side)  # as diffusers' loader makes it
    return Adapter(projection.eval(), tower.eval(), processor, weights)


def _found(file: str, where: str) -> tuple[str, tuple[str, dict[str, str]]]:
    """A local path, and where the encoder beside it is: a name, and a folder in it."""
    if Path(file).is_file():
        return file, (str(Path(file).parent / "image_encoder"), {})
    owner, _, rest = file.partition("/")
    name, _, inner = rest.partition("/")
    if not inner or file.startswith((".", "/", "~")):
        raise ModelError(f"there is no file '{file}'", where=where, fix=FIX)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(f"{owner}/{name}", inner)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        problem = f"'{file}' is no file and cannot be fetched"
        raise ModelError(problem, where=where, fix=FIX) from error
    folder = f"{inner.rpartition('/')[0]}/image_encoder".lstrip("/")
    return path, (f"{owner}/{name}", {"subfolder": folder})


def _of_faces(state: dict[str, dict[str, Tensor]]) -> bool:
    """FaceID, plain or Plus: two layers and a norm, where the others have one, four or a resampler;
    low-rank weights for the U-Net come with it."""
    names = state["image_proj"].keys()
    low_rank = any("_lora." in key for key in state["ip_adapter"])
    return low_rank or {"proj.0.weight", "norm.weight"} <= names


def _parts(state: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The two tables of an adapter, which a safetensors file has as prefixes."""
    if "image_proj" in state and "ip_adapter" in state:
        return {name: state[name] for name in ("image_proj", "ip_adapter")}
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in state.items():
        part, _, inner = key.partition(".")
        if part in parts:
            parts[part][inner] = tensor
    if not (parts["image_proj"] and parts["ip_adapter"]):
        raise KeyError("image_proj and ip_adapter")
    return parts
