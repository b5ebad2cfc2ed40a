"""Tiny random denoisers of the true classes with an example call each: what the matrix runs over.

A call has two rows: an edited one and one that nobody touches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import models

TEXT, SIDE, ROWS = 5, 8, 2  # prompt tokens, latent side, rows of a call
IMAGE = (SIDE // 2) ** 2  # tokens of a latent that is read in 2 x 2 patches
WIDTH = 16  # of prompt embeddings


@dataclass(frozen=True, eq=False)
class Family:
    """One row of the matrix. pipeline: who calls the denoiser so; make: model and its arguments;
    joint: how many tokens of what lie at a joint site, in order; adapter: the tiny pipeline of a
    family that a Session drives.
    """

    name: str
    pipeline: str
    make: Callable[[], tuple[nn.Module, dict[str, Any]]]
    joint: Mapping[str, int] = field(default_factory=dict)
    adapter: Callable[[], Any] | None = None

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model, with no gate shut, and its call."""
        torch.manual_seed(0)
        model, call = self.make()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() < 2 and float(p.abs().max()) == 0:
                    p.normal_(std=0.1)  # gates, biases and pad tokens that start shut
        return model.eval(), call | {"return_dict": False}


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompts(width: int = WIDTH) -> Tensor:
    return drawn(ROWS, TEXT, width, seed=2)


def stable_diffusion():
    call = {"sample": drawn(ROWS, 4, SIDE, SIDE), "timestep": torch.tensor(500)}
    return models.stable_diffusion().unet, call | {"encoder_hidden_states": prompts()}


def stable_diffusion_xl():
    added = {"text_embeds": drawn(ROWS, WIDTH), "time_ids": torch.full((ROWS, 6), 32.0)}
    call = {"sample": drawn(ROWS, 4, SIDE, SIDE), "timestep": torch.tensor(500)}
    call |= {"encoder_hidden_states": prompts(), "added_cond_kwargs": added}
    return models.stable_diffusion_xl().unet, call


def sd3():
    call = {"hidden_states": drawn(ROWS, 4, SIDE, SIDE), "timestep": torch.full((ROWS,), 500.0)}
    call |= {"encoder_hidden_states": prompts(), "pooled_projections": drawn(ROWS, WIDTH)}
    return models.stable_diffusion_3().transformer, call


def sd35():
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16,
        pooled_projection_dim=WIDTH, out_channels=4, pos_embed_max_size=16,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return model, sd3()[1]


def packed(channels: int, axes: int) -> dict[str, Any]:
    """What FLUX and its kin are called with: 4 x 4 picture tokens, positions of `axes` axes."""
    side = SIDE // 2
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.zeros(side * side, axes)
    ids[:, 1], ids[:, 2] = rows.flatten(), columns.flatten()
    return {
        "hidden_states": drawn(ROWS, side * side, channels),
        "encoder_hidden_states": prompts(),
        "timestep": torch.full((ROWS,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, axes),
    }


def flux():
    call = packed(16, 3) | {"pooled_projections": drawn(ROWS, 16), "guidance": torch.ones(ROWS)}
    return models.flux().transformer, call


def flux_2():
    model = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return model, packed(16, 4) | {"guidance": torch.ones(ROWS)}


def qwen_image():
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    call = packed(16, 3)
    mask = torch.ones(ROWS, TEXT, dtype=torch.bool)
    call |= {"img_shapes": [[(1, SIDE // 2, SIDE // 2)]] * ROWS, "encoder_hidden_states_mask": mask}
    return model, {k: v for k, v in call.items() if k not in ("img_ids", "txt_ids")}


def pixart():
    call = {"hidden_states": drawn(ROWS, 4, SIDE, SIDE), "timestep": torch.full((ROWS,), 500)}
    call |= {"encoder_hidden_states": prompts(), "encoder_attention_mask": padded()}
    call |= {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return models.pixart().transformer, call


def padded() -> Tensor:
    """A mask that hides the last prompt token of the second row."""
    mask = torch.ones(ROWS, TEXT)
    mask[1, -1] = 0
    return mask


def aura_flow():
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH,
        caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    call = {"hidden_states": drawn(ROWS, 4, SIDE, SIDE), "timestep": torch.full((ROWS,), 0.5)}
    return model, call | {"encoder_hidden_states": prompts()}


def chroma():
    model = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    mask = torch.cat([padded(), torch.ones(ROWS, SIDE * SIDE // 4)], dim=1).bool()
    return model, packed(16, 3) | {"attention_mask": mask}


def lumina_2():
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16, in_channels=4, hidden_size=48, num_layers=1, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 16, 16), cap_feat_dim=WIDTH,
    )  # fmt: skip
    call = {"hidden_states": drawn(ROWS, 4, SIDE, SIDE), "timestep": torch.full((ROWS,), 0.5)}
    mask = torch.ones(ROWS, TEXT, dtype=torch.bool)
    return model, call | {"encoder_hidden_states": prompts(), "encoder_attention_mask": mask}


def cogview_4():
    model = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        text_embed_dim=WIDTH, time_embed_dim=16, condition_dim=8, pos_embed_max_size=16,
        sample_size=16, rope_axes_dim=(16, 16),
    )  # fmt: skip
    call = {"hidden_states": drawn(ROWS, 4, SIDE, SIDE), "timestep": torch.full((ROWS,), 500.0)}
    sizes = torch.full((ROWS, 2), 64.0)
    call |= {"original_size": sizes, "target_size": sizes, "crop_coords": torch.zeros(ROWS, 2)}
    return model, call | {"encoder_hidden_states": prompts()}


def hunyuan_dit():
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8,
        hidden_size=16, num_layers=2, cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=16, text_len=TEXT, text_len_t5=TEXT,
        use_style_cond_and_image_meta_size=False,
    )  # fmt: skip
    call = {"hidden_states": drawn(ROWS, 4, SIDE, SIDE), "timestep": torch.full((ROWS,), 500.0)}
    call |= {"encoder_hidden_states": prompts(), "text_embedding_mask": padded()}
    call |= {"encoder_hidden_states_t5": prompts(), "text_embedding_mask_t5": padded()}
    return model, call


def z_image():
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=24, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=WIDTH, axes_dims=[4, 4, 4], axes_lens=[128, 32, 32],
    )  # fmt: skip
    call = {"x": list(drawn(ROWS, 4, 1, SIDE, SIDE)), "t": torch.full((ROWS,), 0.5)}
    return model, call | {"cap_feats": list(prompts())}


def wan():
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return model, video()


def sana():
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=WIDTH, sample_size=8,
    )  # fmt: skip
    call = {"hidden_states": drawn(ROWS, 4, SIDE, SIDE), "timestep": torch.full((ROWS,), 500)}
    return model, call | {"encoder_hidden_states": prompts(), "encoder_attention_mask": padded()}


def video() -> dict[str, Any]:
    """Two frames and their prompts."""
    call = {"hidden_states": drawn(ROWS, 4, 2, SIDE, SIDE), "timestep": torch.full((ROWS,), 500)}
    return call | {"encoder_hidden_states": prompts()}


def ltx_video():
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=2, caption_channels=WIDTH,
    )  # fmt: skip
    call = {"hidden_states": drawn(ROWS, IMAGE, 4), "timestep": torch.full((ROWS,), 500.0)}
    call |= {"encoder_hidden_states": prompts(), "encoder_attention_mask": padded()}
    return model, call | {"num_frames": 1, "height": SIDE // 2, "width": SIDE // 2}


def cogvideo_x():
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=WIDTH, num_layers=2, sample_width=SIDE,
        sample_height=SIDE, sample_frames=5, max_text_seq_length=TEXT,
    )  # fmt: skip
    return model, video() | {"hidden_states": drawn(ROWS, 2, 4, SIDE, SIDE)}


def prx():
    model = diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=WIDTH, hidden_size=16, mlp_ratio=2.0,
        num_heads=2, depth=2, axes_dim=[4, 4],
    )  # fmt: skip
    call = {"hidden_states": drawn(ROWS, 4, SIDE, SIDE), "timestep": torch.full((ROWS,), 0.5)}
    return model, call | {"encoder_hidden_states": prompts()}


def hunyuan_video():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=2, text_embed_dim=WIDTH,
        pooled_projection_dim=8, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    extra = {"pooled_projections": drawn(ROWS, 8), "guidance": torch.ones(ROWS)}
    return model, video() | extra | {"encoder_attention_mask": torch.ones(ROWS, TEXT)}


def mochi():
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=WIDTH, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip
    return model, video() | {"encoder_attention_mask": torch.ones(ROWS, TEXT).bool()}


def deep_floyd():
    model = diffusers.UNet2DConditionModel(
        sample_size=SIDE, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=4, norm_num_groups=4, addition_embed_type="text",
        addition_embed_type_num_heads=2, encoder_hid_dim=WIDTH,
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )  # fmt: skip
    call = {"sample": drawn(ROWS, 4, SIDE, SIDE), "timestep": torch.tensor(500)}
    return model, call | {"encoder_hidden_states": prompts()}


def omnigen():
    model = diffusers.OmniGenTransformer2DModel(
        in_channels=4, hidden_size=16, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=32, num_layers=2, pad_token_id=0, vocab_size=100, time_step_dim=4,
        rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
    )  # fmt: skip
    tokens = TEXT + 1 + IMAGE  # prompt, time, picture
    call = {"hidden_states": drawn(ROWS, 4, SIDE, SIDE), "timestep": torch.full((ROWS,), 0.5)}
    call |= {"input_ids": torch.ones(ROWS, TEXT).long(), "input_img_latents": []}
    call |= {"input_image_sizes": {}, "attention_mask": torch.ones(ROWS, tokens, tokens)}
    return model, call | {"position_ids": torch.arange(tokens).expand(ROWS, -1)}


TEXT_FIRST = {"text": TEXT, "image": IMAGE}
IMAGE_FIRST = {"image": IMAGE, "text": TEXT}
REGISTERS = {"rest": 8, **TEXT_FIRST}  # AuraFlow's learned tokens
PADDED = {"image": IMAGE, "rest": 16, "text": TEXT, "rest 2": 27}  # both to multiples of 32

FAMILIES = [
    Family("Stable Diffusion", "StableDiffusion", stable_diffusion, {}, models.stable_diffusion),
    Family("SDXL", "StableDiffusionXL", stable_diffusion_xl, {}, models.stable_diffusion_xl),
    Family("SD3", "StableDiffusion3", sd3, IMAGE_FIRST, models.stable_diffusion_3),
    Family("SD3.5", "StableDiffusion3", sd35, IMAGE_FIRST, models.stable_diffusion_3),
    Family("FLUX.1", "Flux", flux, TEXT_FIRST, models.flux),
    Family("FLUX.2", "Flux2", flux_2, TEXT_FIRST),
    Family("Qwen-Image", "QwenImage", qwen_image, TEXT_FIRST),
    Family("PixArt", "PixArtSigma", pixart, {}, models.pixart),
    Family("AuraFlow", "AuraFlow", aura_flow, REGISTERS),
    Family("Chroma", "Chroma", chroma, TEXT_FIRST),
    Family("Lumina 2", "Lumina2", lumina_2, TEXT_FIRST),
    Family("CogView4", "CogView4", cogview_4, TEXT_FIRST),
    Family("HunyuanDiT", "HunyuanDiT", hunyuan_dit),
    Family("Z-Image", "ZImage", z_image, PADDED),
    Family("Wan", "Wan", wan),
    Family("Sana", "Sana", sana),
    Family("LTX-Video", "LTX", ltx_video),
    Family("CogVideoX", "CogVideoX", cogvideo_x, {"text": TEXT, "image": 2 * IMAGE}),
    Family("PRX", "PRX", prx, TEXT_FIRST),
    Family("HunyuanVideo", "HunyuanVideo", hunyuan_video, {"image": 2 * IMAGE, "text": TEXT}),
]
REFUSED = {  # and what of
    Family("Mochi", "Mochi", mochi): "site .* more than once in a forward",
    Family("DeepFloyd IF", "IF", deep_floyd): "queries move with the prompt and with every part",
    Family("OmniGen", "OmniGen", omnigen): "tokens move with no input that is known",
}
