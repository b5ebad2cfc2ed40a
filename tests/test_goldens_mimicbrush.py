"""MimicBrush against stored numbers of the published code (tests/goldens/README.md)."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import nn

import inlay
from inlay.backbones.mimicbrush_forward import imitate, reference
from inlay.backbones.mimicbrush_pipeline import DepthGuider, MimicBrushPipeline
from inlay_config.images import to_tensor
from inlay_plugins.letterbox import Letterbox
from inlay_plugins.paste_back import PasteBack
from spies import plugin
from toys import golden

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def unets():
    """The imitative one, and the reference one up to where it is read."""
    made = []
    for name in ("imitative", "reference"):
        weights, card = golden(f"mimicbrush_unet_{name}")
        unet = UNet2DConditionModel(**card["kwargs"])
        wanting = unet.load_state_dict(weights, strict=False)
        assert not wanting.unexpected_keys and bool(wanting.missing_keys) == (name == "reference")
        made.append(unet.eval())
    return made


@torch.no_grad()
def test_the_two_forwards(unets):
    """Half of the joint attention, half of the own one, and a null row that sees nothing."""
    stored, card = golden("mimicbrush_forward")
    unet, other = (u.double() for u in unets)
    given = {name: x.double() if x.is_floating_point() else x for name, x in stored.items()}
    found = reference(other, given["z_ref"], given["timestep"], given["tokens_cond"])
    for site, r in found.items():
        torch.testing.assert_close(r, given[f"bank.{site.removesuffix('.attn1')}"], **CLOSE)
    sample = torch.cat([given[name] for name in card["channel_order"]], 1).repeat(2, 1, 1, 1)
    tokens = torch.cat([given["tokens_cond"], given["tokens_null"]])
    made = imitate(unet, found, sample, given["timestep"], tokens, rows=1).flip(0)
    torch.testing.assert_close(made, given["eps_rows"], **CLOSE)
    plain = imitate(unet, found, sample, given["timestep"], tokens, rows=0).flip(0)
    torch.testing.assert_close(plain, given["eps_rows_without_reference"], **CLOSE)
    paper = imitate(unet, found, sample, given["timestep"], tokens, mix=1.0, rows=1).flip(0)
    assert (paper - given["eps_rows"]).abs().max() > 0.1
    for model in unets:
        model.float()


@torch.no_grad()
def test_the_depth_guider():
    stored, card = golden("mimicbrush_depth_guider")
    guider = DepthGuider(block_out_channels=tuple(card["kwargs"]["block_out_channels"]))
    prefix = "weight."
    guider.load_state_dict(
        {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    )
    made = guider(stored["depth_map"])[..., ::4, ::4]
    torch.testing.assert_close(made, stored["depth_latent"], rtol=0, atol=2e-6)


class Seen(nn.Module):
    """CLIP's tokens as stored: of the exemplar, and of nothing where all pixels are zero."""

    def __init__(self, stored):
        super().__init__()
        self.config = SimpleNamespace(image_size=24, patch_size=12)
        self.stored, self.weight = stored, nn.Parameter(torch.zeros(1))

    def forward(self, pixels, output_hidden_states):
        tokens = self.stored["tokens_cond" if bool(pixels.any()) else "tokens_null"]
        return SimpleNamespace(hidden_states=[tokens, None])


class Guided(nn.Module):
    def __init__(self, stored):
        super().__init__()
        self.config, self.stored = SimpleNamespace(channels=4), stored

    def forward(self, depth, grid):
        assert depth.shape[-2:] == (24, 32) and not depth.any()
        return self.stored["depth_latent"]


def test_the_published_run(unets, tmp_path):
    """From pictures to a picture: draws, black hole, mask, 13 channels, null row, guidance."""
    stored, card = golden("mimicbrush_run")
    vae = AutoencoderKL(**card["vae_kwargs"]).eval()
    vae.load_state_dict({k[4:]: v for k, v in stored.items() if k.startswith("vae.")})
    pipe = MimicBrushPipeline(
        vae=vae,
        unet=unets[0],
        reference_unet=unets[1],
        image_encoder=Seen(stored),
        image_tokens=nn.Identity(),
        depth_guider=Guided(stored),
        scheduler=DDIMScheduler(**card["scheduler_kwargs"]),
        feature_extractor=lambda images, return_tensors: SimpleNamespace(
            pixel_values=to_tensor(images)
        ),
    )
    shown, rows, states = [], [], []
    watch = plugin(
        inputs=lambda kwargs: shown.append(kwargs["sample"]),
        post_step=lambda step: (
            rows.append(torch.cat([step.preds["edit/null"], step.preds["edit/text"]])),
            states.append(step.x_next["edit"]),
        ),
    )
    picture, mask, exemplar = (
        Image.fromarray(stored[f"{name}_u8"].numpy()) for name in ("source", "mask", "reference")
    )
    exemplar.save(path := tmp_path / "exemplar.png")
    plugins = {"imitation": {"image": str(path), "posterior": "sample"}, "watch": watch}
    made = inlay.Session(pipe, plugins).run(
        image=picture,
        mask=mask,
        guidance=card["guidance_scale"],
        steps=card["num_inference_steps"],
        size=(24, 32),
        noise={
            "edit": stored["noise_init"],
            "imitation/exemplar": stored["noise_z_ref"],
            "imitation/background": stored["noise_z_bg"],
        },
    )
    torch.testing.assert_close(shown[0], stored["unet_input_first"], **CLOSE)
    torch.testing.assert_close(
        torch.stack([rows[0], rows[-1]]), stored["eps_rows"], rtol=0, atol=1e-4
    )
    torch.testing.assert_close(torch.stack(states), stored["latents"], rtol=0, atol=5e-4)
    image = made.images["edit"].permute(0, 2, 3, 1)
    torch.testing.assert_close(image, stored["image01"], rtol=0, atol=1e-4)


def framed(stored, name):
    """Letterbox in MimicBrush's way, on its board."""
    given = {key: stored[f"{name}.{key}_u8"] for key in ("source_rgb", "mask")}
    picture, mask = (to_tensor(Image.fromarray(array.numpy())) for array in given.values())
    board = {"image:original": picture, "image:mask": mask}
    board |= {"image:source": torch.zeros(1, 3, 64, 64), "mask:user": torch.zeros(1, 1, 64, 64)}
    box = Letterbox(Letterbox.Config(fill="white", resize="plain"))
    box.acts, run = True, SimpleNamespace(board=board, size=(64, 64))
    box.inlay_prepare(run=run)
    return box, run


def grey(picture):
    """`1 c h w` in 0..1 as 0..255, `h w c`."""
    return (255 * picture[0]).permute(1, 2, 0)


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_the_square_frame(name):
    """Bilinear in fixed point there: a grey level; the mask is exact."""
    stored, _ = golden("mimicbrush_prepost")
    _, run = framed(stored, name)
    off = grey(run.board["image:source"]) - stored[f"{name}.square_rgb_u8"]
    assert off.abs().max() <= 1
    mask = stored[f"{name}.mask_square_u8"]
    assert torch.equal(grey(run.board["mask:user"])[..., 0].round().byte(), mask)


def test_the_way_back_and_the_paste():
    stored, _ = golden("mimicbrush_prepost")
    box, run = framed(stored, "tall")
    prediction = to_tensor(Image.fromarray(stored["tall.prediction_rgb_u8"].numpy()))
    result = SimpleNamespace(images={"edit": prediction})
    box.inlay_final(run=run, result=result)
    cropped = stored["tall.prediction_cropped_rgb_u8"]
    assert (grey(result.images["edit"]) - cropped).abs().max() <= 1
    result.images["edit"] = to_tensor(Image.fromarray(cropped.numpy()))
    paste = PasteBack(PasteBack.Config(mask="image:mask", blur=10))
    paste.acts = True
    paste.inlay_final(run=run, result=result)
    off = grey(result.images["edit"])[::2] - stored["tall.pasted_rgb"]
    assert off.abs().max() < 1e-3
