"""Paint by Example against stored numbers of the published code (tests/goldens/README.md)."""

import pytest
import torch
from diffusers import DDIMScheduler, PaintByExamplePipeline, PNDMScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessor

import inlay
from spies import plugin
from toys import ToyLatent, ToyVAE, assemble, golden

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SOLVERS = {
    "plms": PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
    "ddim": DDIMScheduler(**NOISE, clip_sample=False, steps_offset=1, set_alpha_to_one=False),
}


class Encoder(nn.Module):
    """Answers with the stored token, if it is shown what was shown there."""

    def __init__(self, stored):
        super().__init__()
        self.stored, self.uncond_vector = stored, nn.Parameter(stored["null_vector"])

    def forward(self, pixels):
        there = self.stored["reference_224_every_16th"].float()  # rounded to half precision
        torch.testing.assert_close(pixels[..., ::16, ::16], there, rtol=1e-3, atol=1e-3)
        return self.stored["cond"]


def pipe(stored, card, name):
    """12x12 latents of 96x96 pixels."""
    noises = [stored[f"{name}.noise_z_k"]]
    vae = ToyVAE(stored["enc_W"], stored["dec_W"], card["scale_factor"], noises)
    vae.config.latent_channels = 4
    return assemble(
        PaintByExamplePipeline,
        unet=ToyLatent(stored["eps_M"], stored["eps_P"], 12, stored["eps_E"]),
        vae=vae,
        scheduler=SOLVERS[name],
        image_encoder=Encoder(stored),
        feature_extractor=CLIPImageProcessor(),
        vae_scale_factor=8,
        image_processor=VaeImageProcessor(vae_scale_factor=8),
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_the_published_run(name, tmp_path):
    """Greys of the mask, the grid of the mask, the exemplar's square, guidance, the solver; PLMS
    makes its first step in two calls, which diffusers counts as states of their own."""
    stored, card = golden("pbe_run")
    states, shown = [], []
    watch = plugin(
        post_step=lambda step: states.append(step.x_next["edit"]),
        inputs=lambda kwargs: shown.append(kwargs["sample"]),
    )
    path = tmp_path / "exemplar.png"
    Image.fromarray(stored["reference_u8"].numpy()).save(path)
    made = inlay.Session(
        pipe(stored, card, name), {"exemplar": {"image": str(path)}, "watch": watch}
    ).run(
        image=Image.fromarray(stored["image_u8"].numpy()),
        mask=Image.fromarray(stored["mask_u8"].numpy()),
        guidance=card["scale"],
        steps=card["steps"],
        size=96,
        noise={"edit": stored[f"{name}.x_T"]},
    )
    further = torch.cat([stored[f"{name}.z_k"], stored["k_latent"]], 1)
    torch.testing.assert_close(shown[0][:, 4:], further.repeat(2, 1, 1, 1), rtol=0, atol=1e-5)
    counted = states[1:] if name == "plms" else states
    for i, z in zip(card["stored_steps"], stored[f"{name}.z"], strict=True):
        torch.testing.assert_close(counted[i], z, rtol=0, atol=2e-4)
    if name == "plms":
        written = (made.images["edit"][0] * 255).byte().permute(1, 2, 0)[::2, ::2]
        off = written.int() - stored["plms.result_u8_every_2nd"].int()
        assert off.abs().max() <= 1
