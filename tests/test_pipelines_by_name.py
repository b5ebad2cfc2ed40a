"""Pipelines that Blended Diffusion and Blended Latent Diffusion were published on, by folder."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    LDMTextToImagePipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from transformers import BertTokenizer

from inlay import InputError, Session, backbones
from inlay.backbones import text
from models import pixel

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "bus", "##es", "red")
CODED = {  # both kinds of autoencoder that it was published with, cells of 8x8 pixels
    "kl": lambda: AutoencoderKL(**AUTOENCODER, down_block_types=("DownEncoderBlock2D",) * 4),
    "vq": lambda: VQModel(**AUTOENCODER, down_block_types=("DownEncoderBlock2D",) * 4),
}
AUTOENCODER = {
    "block_out_channels": (4,) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "scaling_factor": 0.2,
}


def ldm(kind: str) -> LDMTextToImagePipeline:
    """A tiny random one of 64x64 pixels."""
    torch.manual_seed(0)
    bert = LDMBertConfig(
        vocab_size=len(WORDS), d_model=16, encoder_layers=1, encoder_attention_heads=2,
        encoder_ffn_dim=16, head_dim=8, max_position_embeddings=77,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=77)
    parts = [CODED[kind]().eval(), LDMBertModel(bert).eval(), tokenizer, unet.eval()]
    return LDMTextToImagePipeline(*parts, DDIMScheduler(clip_sample=False))


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_latent_diffusion_is_its_own_pipeline_bit_for_bit(kind, guidance):
    pipe, asked = ldm(kind), {"num_inference_steps": 3, "guidance_scale": guidance}
    generator = torch.Generator().manual_seed(5)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe("a red bus", generator=generator, output_type="pt", **asked).images
    ours = Session(pipe).run("a red bus", steps=3, guidance=guidance, seed=5)
    assert torch.equal(ours.images["edit"], stock)


@pytest.mark.parametrize("kind", CODED)
def test_latent_diffusion_is_planned_and_blended_from_a_folder(kind, tmp_path):
    """Outside the mask the latent ends as the source's; a word is where its token is."""
    ldm(kind).save_pretrained(tmp_path)
    bare = backbones.skeleton(str(tmp_path))
    assert {p.device.type for p in (*bare.bert.parameters(), *bare.vqvae.parameters())} == {"meta"}
    blend = {"steps": [[0.0, 1.0]], "noise": "shared", "mask": "mask:region"}
    plugins = {"region": {}, "source_trajectory": {}, "latent_blend": blend}
    plugins |= {"reweight": {"words": {"bus": 2.0}}}
    session = Session(str(tmp_path), plugins, device="cpu")
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    result = session.run("a red bus", picture, steps=3, guidance=4.0, n=2)
    far = (result.latents["edit"] - result.board["latent:source"]).abs()
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 2:6] = True
    assert far[..., ~inside].max() < 1e-5 < 0.1 < far[..., inside].max()
    again = session.backbone.pixels(result.board["latent:source"], (64, 64))
    assert again.shape == picture.shape
    told = session.backbone.encode_text("a red buses")
    assert told.tokens[1:-1] == ["▁a", "▁red", "▁bus", "es"]
    assert text.find(told, "red") == (2,) and text.find(told, "buses") == (3, 4)
    with pytest.raises(InputError, match="the model takes 77"):
        session.run("a bus " * 50, picture, steps=1)


def test_an_unconditional_ddim_pipeline_is_its_own_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel.from_config({**pixel().unet.config, "out_channels": 3})
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    stock = pipe(generator=generator, num_inference_steps=4, output_type="np").images
    ours = Session(str(tmp_path), device="cpu").run(steps=4, seed=3).images["edit"]
    assert torch.equal(ours, torch.from_numpy(stock).permute(0, 3, 1, 2))
