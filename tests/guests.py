"""Tiny pipelines of many kinds, each with a stock call: what guest mode is tried on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import backbone_zoo
import models
from models import conds

STEPS, SEED = 3, 5


@dataclass(frozen=True)
class Stock:
    """build() -> a pipeline; options: of its call, beside prompts, steps and seed."""

    build: Callable[[], Any]
    options: dict[str, Any]
    pooled: bool = False
    masked: bool = False

    def pipe(self) -> Any:
        pipe = self.build()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe: Any, **options: Any) -> Any:
        """What the pipeline returns for random embeddings; pictures `n 3 h w` unless asked else."""
        given = {"num_inference_steps": STEPS, "output_type": "pt", **self.options, **options}
        given.setdefault("generator", torch.Generator().manual_seed(SEED))
        for name, prefix in (("edit", ""), ("negative", "negative_")):
            made = conds()[name]
            given.setdefault(f"{prefix}prompt_embeds", made["embeds"])
            if self.pooled:
                given.setdefault(f"{prefix}pooled_prompt_embeds", made["pooled"])
            if self.masked:
                given[f"{prefix}prompt_attention_mask"] = torch.ones(1, 12, dtype=torch.int64)
        return pipe(**given).images


def around(denoiser: Callable[[], Any], pipeline: str) -> Callable[[], Any]:
    """A pipeline of a denoiser that no adapter knows."""

    def build() -> Any:
        parts = {"vae": models.stable_diffusion_3().vae, "text_encoder": None, "tokenizer": None}
        torch.manual_seed(0)
        parts["transformer"] = denoiser()[0].eval()
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return getattr(diffusers, pipeline)(**parts)

    return build


def controlled() -> Any:
    """Stable Diffusion with a ControlNet of random weights."""
    parts = models.stable_diffusion().components
    parts.pop("image_encoder")
    torch.manual_seed(1)
    extra = diffusers.ControlNetModel.from_unet(
        parts["unet"], conditioning_embedding_out_channels=(8, 8)
    )
    torch.nn.init.normal_(extra.controlnet_mid_block.weight)
    build = diffusers.StableDiffusionControlNetPipeline
    return build(**parts, controlnet=extra, requires_safety_checker=False)


def rebuilt(pipeline: str, build: Callable[[], Any]) -> Callable[[], Any]:
    """The same parts in another pipeline."""
    return lambda: getattr(diffusers, pipeline)(
        **{k: v for k, v in build().components.items() if k != "image_encoder"}, **LOOSE[pipeline]
    )


LOOSE: dict[str, dict[str, Any]] = {
    "StableDiffusionImg2ImgPipeline": {"requires_safety_checker": False},
    "StableDiffusionInpaintPipeline": {"requires_safety_checker": False},
    "FluxImg2ImgPipeline": {},
    "FluxKontextPipeline": {},
}
PICTURE = (torch.linspace(0, 255, 3 * 32 * 32).round() / 255).reshape(1, 3, 32, 32)
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., 8:24, 8:24] = 1
FLUX = {"true_cfg_scale": 2.0, "height": 32, "width": 32}
FROM = {"image": PICTURE, "strength": 0.5, "num_inference_steps": 4}

STOCK = {
    "sd": Stock(models.stable_diffusion, {"guidance_scale": 3.0}),
    "sdxl": Stock(models.stable_diffusion_xl, {"guidance_scale": 3.0}, pooled=True),
    "flux": Stock(models.flux, FLUX, pooled=True),
    "sd3": Stock(models.stable_diffusion_3, {"guidance_scale": 3.0}, pooled=True),
    "img2img": Stock(
        rebuilt("StableDiffusionImg2ImgPipeline", models.stable_diffusion),
        {"guidance_scale": 3.0, **FROM},
    ),
    "inpaint": Stock(
        rebuilt("StableDiffusionInpaintPipeline", models.stable_diffusion),
        {"guidance_scale": 3.0, "mask_image": MASK, "height": 32, "width": 32, **FROM},
    ),
    "controlnet": Stock(controlled, {"guidance_scale": 3.0, "image": PICTURE}),
    "flux img2img": Stock(
        rebuilt("FluxImg2ImgPipeline", models.flux), {**FLUX, **FROM}, pooled=True
    ),
    "kontext": Stock(
        rebuilt("FluxKontextPipeline", models.flux),
        {**FLUX, "image": PICTURE, "max_area": 32 * 32, "_auto_resize": False},
        pooled=True,
    ),
    "aura_flow": Stock(
        around(backbone_zoo.aura_flow, "AuraFlowPipeline"),
        {"guidance_scale": 3.0, "height": 32, "width": 32},
        masked=True,
    ),
    "lumina_2": Stock(
        around(backbone_zoo.lumina_2, "Lumina2Pipeline"),
        {"guidance_scale": 3.0, "height": 64, "width": 64},
        masked=True,
    ),
}
