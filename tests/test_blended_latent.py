"""Blended Latent Diffusion: its three published orders, against stored numbers and by meaning."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import nn

import toys
from inlay import ConfigError, InputError, ModelError, Plugin, Session, Window, hookimpl
from inlay_plugins.reconstruct_background import ReconstructBackground
from inlay_plugins.region import Region
from inlay_plugins.source_trajectory import SourceTrajectory
from models import conds, pixel, stable_diffusion
from spies import plugin

SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = SCALED | {"clip_sample": False, "set_alpha_to_one": False}
SHAPES = [(1, (4, 8)), (2, (8, 3))]  # channels of the stored decoder
MASK = torch.zeros(1, 1, 16, 16)
MASK[..., 4:12, 4:12] = 1


class States(Plugin):
    """x before the model and after the blend, and the source there, at each step; a mask on the
    board."""

    def __init__(self, mask=None):
        super().__init__()
        self.seen, self.after, self.source, self.mask = [], [], [], mask

    @hookimpl
    def inlay_declare(self, need):
        if self.mask is not None:
            need.publish("mask:given")

    @hookimpl
    def inlay_prepare(self, run):
        if self.mask is not None:
            run.board["mask:given"] = self.mask

    @hookimpl
    def inlay_observe(self, run, step):
        self.seen.append(step.x["edit"])
        self.after.append(step.x_next["edit"])
        self.source.append(run.board["trajectory:source"](step, 1))


def given(stored: dict) -> dict:
    return {
        "edit": {"embeds": stored["cond"]},
        "source": {"embeds": stored["cond"]},
        "negative": {"embeds": stored["uncond"]},
    }


def source(stored: dict) -> torch.Tensor:
    """The source picture in 0..1."""
    return stored["image_u8"].permute(2, 0, 1)[None] / 255


def apart(ours: list, stored: torch.Tensor) -> torch.Tensor:
    """The largest difference in the steps that are stored: first, middle, last."""
    chosen = torch.stack([ours[i] for i in (0, len(ours) // 2, len(ours) - 1)])
    return (chosen - stored).abs().max()


@pytest.mark.parametrize("variant", ["plain", "shrink", "pixel", "invert"])
def test_the_published_latent_diffusion_order(variant):
    """Blended before each call, at the call's own level; the mask may shrink, and grows if it was
    inverted; a tail in pixels."""
    stored, card = toys.golden("bld_ldm")
    mine = {k.split(".")[1]: v for k, v in stored.items() if k.startswith(f"ldm_{variant}.")}
    options, tolerance = card["variants"][variant], card["tolerance_max_abs"]
    skipped, shrink = options.get("skip_steps", 0), options.get("mask_dilation_iterations", 0)
    shrink = -shrink if options.get("invert_mask") else shrink
    tail = 10 - round(10 * options.get("percentage_of_pixel_blending", 0))
    pipe = toys.latent_pipe(
        stored, DDIMScheduler(**DDIM, steps_offset=1), noises=mine.get("noise_reencode", ())
    )
    clean = toys.mix(stored["enc_W"], F.avg_pool2d(source(stored) * 2 - 1, 8))
    clean = 0.18215 * (clean + 0.3 * mine["noise_source"])
    states = States(mine["latent_masks"][-1:])
    blend = {"steps": [[skipped, tail - 1]], "noise": "shared", "when": "before", "shrink": shrink}
    blend |= {"pace": "published"}
    plugins = {
        "states": states,
        "source_trajectory": SourceTrajectory(latent=clean),
        "structure_transfer": {"step": skipped},
        "latent_blend": blend | {"mask": "mask:given"},
    }
    noise = {"edit": mine["noise_init"]}
    noise |= {f"latent_blend/{skipped + i}": n for i, n in enumerate(mine["noise_bg"])}
    if tail < 10:
        plugins["pixel_blend"] = {"active": [tail, 9], "level": "current"}
        noise |= {f"pixel_blend/{tail + i}": n for i, n in enumerate(mine["noise_renoise"])}
    Session(pipe, plugins).run(
        image=source(stored),
        mask=(stored["mask_u8"] >= 128).float()[None, None],
        conds=given(stored), guidance=5.0, steps=10, n=2, noise=noise, size=96,
    )  # fmt: skip
    assert apart(states.seen, mine["model_input"]) < tolerance["model_input, x_after"]
    assert apart(states.after, mine["x_after"]) < tolerance["model_input, x_after"]


def test_the_published_stable_diffusion_2_order():
    """From pure noise at a quarter of the way; blended after each step, at the level just left."""
    stored, card = toys.golden("bld_sd2")
    toy, _ = toys.golden("bld_ldm")
    generator = torch.Generator().manual_seed(card["seed"])
    draws = [torch.randn(2, 4, 12, 12, generator=generator) for _ in range(10)]
    states = States(stored["latent_mask"])
    late = plugin(declare=lambda need: need.lane("edit", active=Window(3, 11)))
    blend = {"steps": [[3, 11]], "noise": "own", "level": "current", "mask": "mask:given"}
    Session(
        toys.latent_pipe(toy, DDIMScheduler(**DDIM)),
        {"states": states, "late": late, "source_trajectory": {}, "latent_blend": blend},
    ).run(
        image=source(toy), conds=given(toy), guidance=7.5, steps=12, n=2, size=96,
        noise={"edit": draws[0]} | {f"latent_blend/{3 + i}": n for i, n in enumerate(draws[1:])},
    )  # fmt: skip
    tolerance = card["tolerance_max_abs"]["eps_rows, z_*"]
    assert apart(states.after, stored["z_after_blend"]) < tolerance


def test_the_published_stable_diffusion_xl_order():
    """From the noised source at a quarter of the way, with Euler's sigmas."""
    stored, card = toys.golden("bld_sdxl")
    toy, _ = toys.golden("bld_ldm")
    states = States(stored["latent_mask"])
    scheduler = EulerDiscreteScheduler(**SCALED, timestep_spacing="leading", steps_offset=1)
    blend = {"steps": [[3, 11]], "noise": "own", "level": "current", "mask": "mask:given"}
    plugins = {"states": states, "source_trajectory": {}, "structure_transfer": {"step": 3}}
    noise = {f"latent_blend/{3 + i}": n for i, n in enumerate(stored["noise_bg"])}
    Session(
        toys.latent_pipe(toy, scheduler, card["scaling_factor"]), plugins | {"latent_blend": blend}
    ).run(
        image=source(toy), conds=given(toy), guidance=5.0, steps=12, n=2, size=96,
        noise=noise | {"edit": stored["noise_init"]},
    )  # fmt: skip
    tolerance = card["tolerance_max_abs"]["eps_rows, z_*"]
    assert apart(states.seen, stored["z_in"]) < tolerance
    assert apart(states.after, stored["z_after_blend"]) < tolerance


def blended(pipe, steps=4, mask=MASK, **options):
    """A run on a random model with the source put back in all steps: result, source, states."""
    states = States()
    latent_blend = {"steps": [[0.0, 1.0]], "mask": "mask:user"} | options
    plugins = {"source_trajectory": {}, "latent_blend": latent_blend, "states": states}
    session = Session(pipe, plugins)
    size = session.backbone.native_size
    picture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    mask = F.interpolate(mask, size)
    result = session.run(image=picture, mask=mask, conds=conds(), steps=steps, guidance=2.0, n=2)
    return result, result.board["latent:source"], states


def test_at_the_next_level_the_background_ends_as_the_source_exactly():
    pipe = stable_diffusion()
    pipe.scheduler = DDIMScheduler(**SCALED, clip_sample=False)
    clean = blended(pipe, noise="shared")
    outside = F.interpolate(MASK, clean[1].shape[-2:]) == 0
    for noise in ("source", "shared", "own"):
        result, source, _ = blended(pipe, noise=noise)
        far = (result.latents["edit"] - source).abs() * outside
        assert far.max() < 1e-6
        left, source, _ = blended(pipe, noise=noise, level="current")
        assert ((left.latents["edit"] - source).abs() * outside).max() > 1e-3


@pytest.mark.parametrize(
    ("noise", "same", "still"),
    [("source", True, True), ("shared", True, False), ("own", False, False)],
)
def test_whose_noise_a_background_has(noise, same, still):
    """same: in all pictures; still: in all steps."""
    _, _, states = blended(stable_diffusion(), noise=noise, steps=3)
    first, second = (x[..., :4, :] for x in states.after[0])
    assert torch.equal(first, second) == same
    pairs = zip(states.after[:2], states.source[:2], strict=True)
    assert all(torch.equal(x[:1, :, :4], s[..., :4, :]) for x, s in pairs) == still
    assert not torch.equal(states.after[0][:1, :, :4], states.after[1][:1, :, :4])


def test_a_shrinking_mask_loses_a_cell_at_a_time_and_ends_as_it_is():
    point = torch.zeros(1, 1, 16, 16)
    point[..., 8, 8] = 1
    _, _, states = blended(pixel(), steps=6, mask=point, shrink=2)
    pairs = zip(states.after, states.source, strict=True)
    changed = [int(((x - s).abs().amax((0, 1)) > 0).sum()) for x, s in pairs]
    assert changed == [25, 25, 9, 9, 1, 1]
    _, _, states = blended(pixel(), steps=6, mask=1 - point, shrink=-2)
    pairs = zip(states.after, states.source, strict=True)
    kept = [int(((x - s).abs().amax((0, 1)) == 0).sum()) for x, s in pairs]
    assert kept == changed


def test_soft_edges_mix_and_the_add_it_mode_hardens_them():
    pipe, soft = pixel(), torch.full((1, 1, 16, 16), 0.25)
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    mixed, source, _ = blended(pipe, steps=2, mask=soft)
    hard, *_ = blended(pipe, steps=2, mask=soft, mode="reference")
    free, *_ = blended(pipe, steps=2, mask=torch.ones(1, 1, 16, 16))
    torch.testing.assert_close(hard.latents["edit"], free.latents["edit"])
    far = [(made.latents["edit"] - source).abs().mean() for made in (mixed, free)]
    assert far[0] < far[1]


def test_blending_in_pixels_leaves_the_source_outside_but_for_the_autoencoder():
    pipe = stable_diffusion()
    pipe.scheduler = DDIMScheduler(**SCALED, clip_sample=False)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mask = F.interpolate(MASK, (32, 32))
    seen = {}

    def remember(step):
        seen["x0"] = step.x0["edit"]

    session = Session(
        pipe,
        {
            "source_trajectory": {},
            "pixel_blend": {"active": [3, 3]},
            "watch": plugin(observe=remember),
        },
    )
    result = session.run(image=picture, mask=mask, conds=conds(), steps=4, guidance=2.0)
    pixels = session.backbone.pixels(seen["x0"], (32, 32)) / 2 + 0.5
    expected = session.backbone.encode_image(mask * pixels + (1 - mask) * picture)
    torch.testing.assert_close(result.latents["edit"], expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(("tune", "key"), [("decoder", "weights"), ("latent", "latents")])
def test_the_published_reconstruction_of_the_background(tune, key):
    """The decoder is tuned to the picture, or the latent; both are as before afterwards."""
    stored, card = toys.golden("bld_extras")
    decoder = nn.ModuleDict({f"conv{i}": nn.Conv2d(*io, 3, padding=1) for i, io in SHAPES})
    decoder.load_state_dict(
        {k[8:]: v for k, v in stored.items() if k.startswith("decoder.")}, strict=True
    )

    def pixels(z, size):
        hidden = decoder["conv1"](z / card["scale_factor"]).tanh()
        return decoder["conv2"](hidden.repeat_interleave(8, 2).repeat_interleave(8, 3))

    vae = SimpleNamespace(decoder=decoder)
    backbone = SimpleNamespace(
        pixels=pixels,
        decode=lambda z, size: (pixels(z, size) / 2 + 0.5).clamp(0, 1),
        pipe=SimpleNamespace(vae=vae),
    )
    source = stored["background"] / 2 + 0.5
    board = {"image:source": source, "mask:user": stored["mask"]}
    run = SimpleNamespace(backbone=backbone, board=board, size=(32, 32))
    result = SimpleNamespace(
        images={"edit": stored["foreground"] / 2 + 0.5}, latents={"edit": stored["latent"]}
    )
    plugin = ReconstructBackground(ReconstructBackground.Config(tune=tune))
    plugin.acts, latent = True, stored["latent"].clone()
    with torch.no_grad():
        plugin.inlay_final(run, result)
    off = (result.images["edit"] - stored[f"{key}.result01"]).abs().max()
    assert off < card["tolerance_max_abs"]["result01"]
    assert torch.equal(stored["latent"], latent)
    for name, weight in decoder.named_parameters():
        assert torch.equal(weight, stored[f"decoder.{name}"]) and weight.grad is None
        assert weight.requires_grad


def test_a_model_without_decoder_is_told():
    session = Session(pixel(), {"tuned": ReconstructBackground()})
    with pytest.raises(ModelError, match=r"no decoder to be tuned\. Use paste_back"):
        session.run(image=torch.rand(1, 3, 16, 16), mask=MASK, steps=1)
    session = Session(
        pixel(), {"tuned": ReconstructBackground(ReconstructBackground.Config(steps=-1))}
    )
    with pytest.raises(ConfigError, match=r"plugins\.tuned\.steps: -1 is below 0"):
        session.run(image=torch.rand(1, 3, 16, 16), mask=MASK, steps=1)


def region(mask=None, **options) -> torch.Tensor:
    board = {} if mask is None else {"mask:user": mask}
    run = SimpleNamespace(board=board, size=(8, 10), device=torch.device("cpu"))
    Region(Region.Config(**options)).inlay_prepare(run)
    return board["mask:region"]


def test_a_region_decides_greys_then_grows_then_swaps():
    grey = torch.zeros(1, 1, 9, 9)
    grey[..., 4, 4], grey[..., 0, 0] = 1, 0.2
    assert torch.equal(region(grey), grey)
    assert region(grey, threshold=0.0).sum() == 2 and region(grey, threshold=0.5).sum() == 1
    grown = region(grey, threshold=0.5, grow=1)
    assert grown.sum() == 9 and region(grown, grow=-1).sum() == 1
    assert torch.equal(region(grey, threshold=0.5, grow=1, invert=True), 1 - grown)


def test_a_region_of_nothing_is_refused():
    white = torch.ones(1, 1, 16, 16)
    for mask, options in ((0 * MASK, {}), (MASK, {"grow": -4}), (white, {"invert": True})):
        with pytest.raises(InputError, match=r"plugins\.Region: nothing is left to be edited"):
            region(mask, **options)


def test_without_a_mask_a_region_is_its_box():
    box = region(box=[0.5, 0.25, 1.0, 0.5])
    assert box.shape == (1, 1, 8, 10) and box.sum() == 10 and box[..., 2:4, 5:].all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("latent_blend", {"background": "lane", "noise": "own"}, "of a noised background"),
        ("region", {"threshold": 1.5}, "1.5 is outside 0..1"),
        ("region", {"box": [0.5, 0.0, 0.2, 1.0]}, "is no box"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    session = Session(pixel(), {"source_trajectory": {}, "plugin": {"use": name} | options})
    with pytest.raises(ConfigError, match=message):
        session.run(image=torch.rand(1, 3, 16, 16), mask=MASK, steps=2)


def test_a_black_mask_is_refused_and_a_white_one_leaves_nothing_to_put_back():
    session = Session(pixel(), {"source_trajectory": {}, "pixel_blend": {"active": [0, 1]}})
    picture = torch.rand(1, 3, 16, 16)
    with pytest.raises(InputError, match="mask:user: the mask is black everywhere"):
        session.run(image=picture, mask=torch.zeros(1, 1, 16, 16), steps=2)
    pipe = pixel()
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    white, *_ = blended(pipe, mask=torch.ones(1, 1, 16, 16))
    plain = Session(pipe).run(conds=conds(), steps=4, n=2)
    torch.testing.assert_close(white.latents["edit"], plain.latents["edit"])
