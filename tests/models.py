"""Tiny random models of the true classes, the same on every machine and in every order of tests."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PaintByExamplePipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    pipelines,
)
from diffusers.pipelines.deprecated import paint_by_example as published
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from inlay.backbones.mimicbrush_pipeline import DepthGuider, ImageTokens, MimicBrushPipeline

pipelines.paint_by_example = published  # as which published folders know it, and new ones are saved


def _vae(channels: int, **extra) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        **extra,
    ).eval()


def flux(seed: int = 0) -> FluxPipeline:
    """2 double and 2 single blocks, head width 16, 16 text channels; tokens of 4x4 pixels."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(4, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipe.default_sample_size = 16  # 32 px and 64 tokens, unless a test asks for another size
    return pipe


def _unet(seed: int, channels: int) -> UNet2DConditionModel:
    """Three levels with 22 attention modules of two heads, text width 16."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def stable_diffusion(seed: int = 0) -> StableDiffusionPipeline:
    """The U-Net above and a VAE of factor 2."""
    return StableDiffusionPipeline(unet=_unet(seed, 4), vae=_vae(4), **_without_text())


def instruct_pix2pix(seed: int = 0, channels: int = 8) -> StableDiffusionInstructPix2PixPipeline:
    """The same with further channels for the picture."""
    return StableDiffusionInstructPix2PixPipeline(
        unet=_unet(seed, channels), vae=_vae(4), **_without_text()
    )


def paint_by_example(seed: int = 0, channels: int = 9) -> PaintByExamplePipeline:
    """The same with channels for the picture around a hole; CLIP of 32 px and width 16."""
    unet, parts = _unet(seed, channels), {**_without_text(), "feature_extractor": _square()}
    parts = {
        name: part for name, part in parts.items() if name not in ("text_encoder", "tokenizer")
    }
    encoder = published.PaintByExampleImageEncoder(_vision()).eval()
    return PaintByExamplePipeline(unet=unet, vae=_vae(4), image_encoder=encoder, **parts)


def mimicbrush(seed: int = 0, channels: int = 13, reference: int = 4) -> MimicBrushPipeline:
    """Two of these U-Nets; an exemplar is five tokens."""
    unet, other = _unet(seed, channels), _unet(seed + 1, reference)
    return MimicBrushPipeline(
        unet=unet,
        reference_unet=other,
        vae=_vae(4),
        image_encoder=CLIPVisionModel(_vision()).eval(),
        image_tokens=ImageTokens(16, 16).eval(),
        depth_guider=DepthGuider(4, (4, 8, 8)).eval(),
        scheduler=_ddim(),
        feature_extractor=_square(),
    )


def _vision() -> CLIPVisionConfig:
    one = {"hidden_size": 16, "intermediate_size": 16, "image_size": 32, "patch_size": 16}
    config = CLIPVisionConfig(num_hidden_layers=4, num_attention_heads=2, **one)
    config.projection_dim = 16
    return config


def _square() -> CLIPImageProcessor:
    small = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    return CLIPImageProcessor(**small)


def _without_text() -> dict:
    parts = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    return {**dict.fromkeys(parts), "scheduler": _ddim(), "requires_safety_checker": False}


def stable_diffusion_xl(seed: int = 0) -> StableDiffusionXLPipeline:
    """Two levels of two heads, text width 16, pooled width 16, VAE factor 2."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline(
        vae=_vae(4), unet=unet, scheduler=scheduler, add_watermarker=False, **parts
    )


def stable_diffusion_3(seed: int = 0) -> StableDiffusion3Pipeline:
    """Two joint blocks of two heads of width 8, tokens of 4x4 pixels, text width 16."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    ).eval()
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    names += ("tokenizer", "tokenizer_2", "tokenizer_3")
    return StableDiffusion3Pipeline(
        vae=_vae(4, shift_factor=0.1, scaling_factor=0.4),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(names),
    )


def pixart(seed: int = 0) -> PixArtSigmaPipeline:
    """Two blocks of two heads of width 8, tokens of 4x4 pixels, text width 16, learned variance."""
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        patch_size=2,
    ).eval()
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    parts = {"tokenizer": None, "text_encoder": None}
    return PixArtSigmaPipeline(vae=_vae(4), transformer=transformer, scheduler=scheduler, **parts)


def pixel(seed: int = 0) -> DDPMPipeline:
    """An unconditional U-Net of three levels on 16x16 pixels, with a learned variance."""
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=True)
    return DDPMPipeline(unet=unet, scheduler=scheduler)


def conds(seed: int = 7, text: int = 12, pooled: bool = True) -> dict[str, dict]:
    """Random embeddings for the prompts source, edit and negative."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name in ("source", "edit", "negative"):
        embeds = torch.randn(1, text, 16, generator=g)
        extra = torch.randn(1, 16, generator=g) if pooled else None
        made[name] = {"embeds": embeds, "pooled": extra}
    return made
