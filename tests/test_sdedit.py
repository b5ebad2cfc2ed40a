"""SDEdit against diffusers' image-to-image and inpainting, stored numbers, and its own promises."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
)
from torch import nn

import toys
from inlay import ConfigError, Frame, PlanConflict, Session
from inlay_config.config import Experiment, Prompt
from inlay_plugins.schedules import img2img_start
from inlay_plugins.source_trajectory import SourceTrajectory
from models import conds, flux, stable_diffusion
from spies import plugin
from test_goldens_addit import golden, rel, tiny_flux

FLOW, FLOW_CARD = toys.golden("sdedit_flow")
VP, VP_CARD = toys.golden("sdedit_vp")
LATENT = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))  # of 32x32 pixels
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., 8:24, 4:20] = 1


def sdedit(pipe, latent=LATENT, scheduler=None, watch=None, **options):
    """A run from a clean latent; options: of the plugin, and of the run where it knows them."""
    given = {k: options.pop(k) for k in ("size", "steps", "n") if k in options}
    if torch.is_tensor(options.get("mask")):
        given["mask"], options["mask"] = options["mask"], "mask:user"
    plugins = {"source_trajectory": SourceTrajectory(latent=latent), "sdedit": options}
    if watch:
        plugins = {"watch": watch} | plugins
    session = Session(pipe, plugins, scheduler=scheduler)
    known = {"conds": conds(pooled=hasattr(pipe, "transformer")), "size": 32, "steps": 6}
    return session.run({"source": "a", "edit": "b"}, seed=4, guidance=3.0, **(known | given))


def packed(latent):
    """FLUX's layout of `b c h w`."""
    cells = latent.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


# as diffusers does it ----------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.35, 0.5, 1.0])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_it_is_image_to_image_of_stable_diffusion(scheduler, strength):
    """Given a latent; of a picture, diffusers samples the VAE's posterior and we take its mode."""
    pipe = stable_diffusion()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    parts = {**pipe.components, "requires_safety_checker": False}
    stock = StableDiffusionImg2ImgPipeline(**parts)
    stock.set_progress_bar_config(disable=True)
    embeds = conds(pooled=False)
    theirs = stock(
        prompt_embeds=embeds["edit"]["embeds"],
        negative_prompt_embeds=embeds["negative"]["embeds"],
        image=LATENT,
        strength=strength,
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
    ).images
    ours = sdedit(pipe, strength=strength, steps=10).latents["edit"]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("strength", [0.35, 0.5, 1.0])
def test_it_is_image_to_image_of_flux(strength):
    pipe, embeds = flux(), conds()["edit"]
    stock = FluxImg2ImgPipeline(**pipe.components)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        prompt_embeds=embeds["embeds"],
        pooled_prompt_embeds=embeds["pooled"],
        image=LATENT,
        height=32,
        width=32,
        strength=strength,
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
    ).images
    ours = sdedit(pipe, packed(LATENT), strength=strength, steps=10).latents["edit"]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", FLOW_CARD["cases"])
def test_a_flow_follows_the_stored_pipelines(case):
    common, after = golden("addit_common")[0], []
    embeds = {"embeds": common["prompt_embeds"][[1]], "pooled": common["pooled"][[1]]}
    pixels = FLOW[f"{case}.edit_mask_pixels"].float() if case.startswith("inpaint") else None
    options = {} if pixels is None else {"mask": "mask:user"}
    options["strength"] = FLOW_CARD["cases"][case].get("strength", 0.7)
    plugins = {
        "source_trajectory": SourceTrajectory(latent=packed(FLOW["source_latent"])),
        "sdedit": options,
        "watch": plugin(observe=lambda step: after.append(step.x_next["edit"])),
    }
    Session(tiny_flux(), plugins).run(
        {"source": "a", "edit": "b"},
        mask=pixels,
        size=128,
        steps=FLOW_CARD["N"],
        guidance=FLOW_CARD["guidance"],
        conds={"edit": embeds, "source": embeds},
        noise={"edit": packed(FLOW["noise"])},
    )
    stored = FLOW[f"{case}.latents_after_step"]
    assert len(after) == len(stored)
    for ours, theirs in zip(after, stored, strict=True):
        assert rel(ours[0], theirs) < 2e-6


class Wave(nn.Module):
    """The stored run's noise prediction."""

    def __init__(self):
        super().__init__()
        self.unit = nn.Parameter(torch.ones(()))
        self.config = SimpleNamespace(sample_size=8, in_channels=3, block_out_channels=(1,))

    def forward(self, sample, timestep, return_dict=False):
        return (0.5 * sample.tanh() * (1 + float(timestep) / VP_CARD["T"]),)


@pytest.mark.parametrize("masked", ["unmasked", "half", "per_channel"])
def test_the_published_run_is_followed_with_its_noisy_ending(masked, monkeypatch):
    """The published mask is 1 where the picture is kept; fresh noise is not drawn there."""
    t, noise, after = VP_CARD["t"], VP["noise"], []
    draws = (noise[k] for k in range(len(noise)) if 0 < k % (t + 1) < t)  # the last are not used
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(draws)
    )
    scheduler = DDPMScheduler(VP_CARD["T"], trained_betas=VP["betas"].tolist(), clip_sample=False)
    pipe = toys.assemble(DDPMPipeline, unet=Wave(), scheduler=scheduler)

    def declare(need):
        need.publish("mask:open")

    def begin(run, pass_):
        run.board["mask:open"] = 1 - VP[f"keep_mask.{masked}"].float()[None]
        run.x_T[pass_, "edit"] = noise[13 if pass_ == "edit" else 0]

    def observe(run, step):
        after.append(step.x_next["edit"])

    made = sdedit(
        pipe,
        VP["image01"][None] * 2 - 1,
        watch=plugin(declare=declare, begin=begin, observe=observe),
        mask="mask:open",
        strength=t / VP_CARD["T"],
        repeats=2,
        mode="reference",
        steps=VP_CARD["T"],
        size=8,
        n=2,
    )
    assert len(after) == 2 * t
    ends = torch.stack([after[t - 1], made.latents["edit"]])
    torch.testing.assert_close(ends, VP[f"{masked}.samples"], rtol=1e-5, atol=5e-6)
    stored = zip((1, 6, 13, 18, 23), VP[f"{masked}.x_before_step"][[0, 1, 3, 4, 5]], strict=True)
    for k, x in stored:
        torch.testing.assert_close(after[k - 1], x, rtol=1e-5, atol=5e-6)


# where it starts ---------------------------------------------------------------------------------


def test_strength_counts_up_for_a_flow_and_down_otherwise():
    one, half = torch.tensor(1.0), torch.tensor(0.5)
    for space, start in (("flow", 6), ("vp", 7)):
        levels = [(0, Frame(half, one, space, "epsilon"))]
        assert img2img_start(0.35, None, levels, 10, "x") == start


def test_sigma_is_the_first_step_at_that_noise_or_below():
    sigmas = [1.0, 0.8, 0.5, 0.2]
    levels = [(i, Frame(1 - torch.tensor(s), torch.tensor(s), "flow", "flow"))
              for i, s in enumerate(sigmas)]  # fmt: skip
    starts = [img2img_start(None, s, levels, 4, "x") for s in (1.0, 0.9, 0.8, 0.3, 0.2)]
    assert starts == [0, 1, 1, 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5, "sigma": 0.5}, "both say where to start"),
        ({"strength": 0.1}, r"plugins\.sdedit\.strength: 0\.1 of 6 steps"),
        ({"strength": 1.5}, r"plugins\.sdedit\.strength"),
        ({"sigma": 0.01}, r"plugins\.sdedit\.sigma: no step starts at 0\.01"),
        ({"repeats": 0}, r"plugins\.sdedit\.repeats"),
    ],
)
def test_what_starts_nowhere_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        sdedit(flux(), packed(LATENT), **options)


def test_it_needs_a_picture_to_start_from():
    with pytest.raises(PlanConflict, match="'latent:source', which nobody publishes"):
        Session(flux(), {"sdedit": {}}).run("b", conds=conds(), steps=4)


def test_the_plan_counts_the_steps_that_are_made():
    plugins = {"source_trajectory": {}, "sdedit": {"sigma": 0.7, "repeats": 3}}
    session, prompt = Session(flux(), plugins), Prompt(source="a", edit="b")
    asked = Experiment(prompt=prompt, steps=10, size=[32, 32])
    made = sum(float(frame.sigma) <= 0.7 for _, frame in session.plan(
        asked, None, []).request.levels())  # fmt: skip
    units = session.plan(asked, None, []).evaluations
    assert units == {"source": 10, "sdedit_1": made, "sdedit_2": made, "edit": made} and made < 10


# masks, repeats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [flux, stable_diffusion])
def test_outside_the_mask_the_guide_comes_back(family):
    pipe = family()
    latent = packed(LATENT) if family is flux else LATENT
    after, frames = [], []

    def observe(run, step):
        after.append((step.x_next["edit"], step.next_frame, run.x_T["edit", "edit"]))

    made = sdedit(pipe, latent, watch=plugin(observe=observe), mask=MASK, strength=1.0)
    cells = torch.nn.functional.adaptive_avg_pool2d(MASK, 16).expand(1, 4, 16, 16)
    outside = (packed(cells) if family is flux else cells) == 0
    for x, frame, noise in after[:-1]:
        frames.append(frame)
        assert torch.equal(x[outside], frame.noise(latent, noise)[outside])
    assert torch.equal(made.latents["edit"][outside], latent[outside])
    assert not torch.isclose(made.latents["edit"][~outside], latent[~outside]).any(dim=0).all()


def test_noise_around_the_mask_is_fresh_where_the_solver_draws_noise():
    seen = {}
    for scheduler in (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler):
        around = seen[scheduler] = []

        def observe(step, around=around):
            frame, corner = step.next_frame, step.x_next["edit"][0, :, 0, 0]
            if step.index < step.total - 1:
                around.append((corner - frame.alpha * LATENT[0, :, 0, 0]) / frame.sigma)

        pipe = stable_diffusion()
        own = scheduler.from_config(pipe.scheduler.config)
        sdedit(pipe, scheduler=own, watch=plugin(observe=observe), mask=MASK)
    fixed, fresh = (torch.stack(around) for around in seen.values())
    assert len(fixed) == len(fresh) == 2
    assert torch.allclose(fixed[0], fixed[1], atol=1e-4)
    assert not torch.allclose(fresh[0], fresh[1], atol=0.1)


def test_darker_pixels_are_released_later():
    """Four columns of strength 1, 2/3, 1/3 and none, over three steps."""
    grey = torch.ones(1, 1, 32, 32)
    for column, share in enumerate((1.0, 2 / 3, 1 / 3, 0.0)):
        grey[..., 8 * column : 8 * column + 8] = round(share * 255 + 0.5) / 255 if share else 0.0
    kept = []

    def observe(run, step):
        noised = step.next_frame.noise(LATENT, run.x_T["edit", "edit"])
        noised = LATENT if step.index == step.total - 1 else noised
        same = (step.x_next["edit"] == noised).all(1)[0]
        kept.append([bool(same[:, 4 * c : 4 * c + 4].all()) for c in range(4)])

    sdedit(stable_diffusion(), watch=plugin(observe=observe), mask=grey, grey="release")
    assert kept == [
        [False, True, True, True],
        [False, False, True, True],
        [False, False, False, True],
    ]


def test_a_grey_mask_mixes():
    after = []
    watch = plugin(observe=lambda step: after.append(step.x_next["edit"]))
    plain = []
    sdedit(stable_diffusion(), watch=plugin(
        observe=lambda step: plain.append(step.x_next["edit"])), strength=1 / 6)  # fmt: skip
    sdedit(stable_diffusion(), watch=watch, mask=torch.full_like(MASK, 51 / 255), strength=1 / 6)
    torch.testing.assert_close(after[0], 0.2 * plain[0] + 0.8 * LATENT)


def test_each_repeat_starts_from_the_last_with_noise_of_its_own():
    starts, ends = [], []

    def observe(run, step):
        if step.index == 3:
            starts.append((step.x["edit"], step.frame, run.x_T[step.pass_, "edit"]))
        if step.index == 5:
            ends.append(step.x_next["edit"])

    sdedit(stable_diffusion(), watch=plugin(observe=observe), repeats=3, n=2)
    assert len(ends) == 3
    for guide, (x, frame, noise) in zip([LATENT, *ends[:2]], starts, strict=True):
        torch.testing.assert_close(x, frame.noise(guide, noise))
    noises = torch.stack([noise for *_, noise in starts]).flatten(0, 1)
    assert len(noises.flatten(1).unique(dim=0)) == 6
