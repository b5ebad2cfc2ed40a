"""With no plugin, latents and pictures are bit-identical to the stock pipelines."""

import json

import diffusers
import pytest
import torch

import inlay
import inlay_toybox
from models import (
    conds,
    flux,
    pixart,
    pixel,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)
from spies import plugin

SD_SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "PNDMScheduler",
]
FLOW_SCHEDULERS = [
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
]


@pytest.mark.parametrize("scheduler", SD_SCHEDULERS)
@pytest.mark.parametrize(("guidance", "n"), [(1.0, 1), (7.5, 2)])
def test_stable_diffusion_is_bit_identical(scheduler, guidance, n):
    pipe, given = stable_diffusion(), conds(pooled=False)
    session = inlay.Session(pipe, scheduler=scheduler)
    pipe.scheduler = session.scheduler
    pipe.set_progress_bar_config(disable=True)
    ours = session.run(guidance=guidance, n=n, steps=5, seed=3, conds=given)
    call = {
        "prompt_embeds": given["edit"]["embeds"],
        "negative_prompt_embeds": given["negative"]["embeds"],
        "num_inference_steps": 5,
        "guidance_scale": guidance,
        "num_images_per_prompt": n,
    }
    stock = pipe(**call, generator=torch.Generator().manual_seed(3), output_type="latent").images
    assert torch.equal(ours.latents["edit"], stock)
    pictures = pipe(**call, generator=torch.Generator().manual_seed(3), output_type="pt").images
    assert torch.equal(ours.images["edit"], pictures)


@pytest.mark.parametrize("scheduler", FLOW_SCHEDULERS)
@pytest.mark.parametrize(("true_cfg", "n", "size"), [(1.0, 1, (32, 32)), (3.0, 2, (24, 40))])
def test_flux_is_bit_identical(scheduler, true_cfg, n, size):
    pipe, given = flux(), conds()
    session = inlay.Session(pipe, scheduler=scheduler)
    pipe.scheduler = session.scheduler
    pipe.set_progress_bar_config(disable=True)
    ours = session.run(true_cfg=true_cfg, n=n, size=size, steps=5, seed=3, conds=given)
    call = {
        "prompt_embeds": given["edit"]["embeds"].expand(n, -1, -1),
        "pooled_prompt_embeds": given["edit"]["pooled"].expand(n, -1),
        "negative_prompt_embeds": given["negative"]["embeds"].expand(n, -1, -1),
        "negative_pooled_prompt_embeds": given["negative"]["pooled"].expand(n, -1),
        "true_cfg_scale": true_cfg,
        "num_inference_steps": 5,
        "guidance_scale": 3.5,
        "height": size[0],
        "width": size[1],
    }
    stock = pipe(**call, generator=torch.Generator().manual_seed(3), output_type="latent").images
    assert torch.equal(ours.latents["edit"], stock)
    pictures = pipe(**call, generator=torch.Generator().manual_seed(3), output_type="pt").images
    assert torch.equal(ours.images["edit"], pictures)


@pytest.mark.parametrize("scheduler", [s for s in SD_SCHEDULERS if s != "DDPMScheduler"])
@pytest.mark.parametrize(("guidance", "n", "size"), [(1.0, 1, (32, 32)), (6.0, 2, (24, 40))])
def test_stable_diffusion_xl_is_bit_identical(scheduler, guidance, n, size):
    assert_same_as_stock(stable_diffusion_xl(), scheduler, guidance, n, size)


@pytest.mark.parametrize("scheduler", FLOW_SCHEDULERS)
@pytest.mark.parametrize(("guidance", "n", "size"), [(1.0, 1, (32, 32)), (6.0, 2, (24, 40))])
def test_stable_diffusion_3_is_bit_identical(scheduler, guidance, n, size):
    assert_same_as_stock(stable_diffusion_3(), scheduler, guidance, n, size)


def assert_same_as_stock(pipe, scheduler, guidance, n, size):
    """A pipeline with pooled text and CFG by `guidance_scale`, against its own call."""
    given = conds()
    session = inlay.Session(pipe, scheduler=scheduler)
    pipe.scheduler = session.scheduler
    pipe.set_progress_bar_config(disable=True)
    ours = session.run(guidance=guidance, n=n, size=size, steps=5, seed=3, conds=given)
    call = {
        "prompt_embeds": given["edit"]["embeds"].expand(n, -1, -1),
        "pooled_prompt_embeds": given["edit"]["pooled"].expand(n, -1),
        "negative_prompt_embeds": given["negative"]["embeds"].expand(n, -1, -1),
        "negative_pooled_prompt_embeds": given["negative"]["pooled"].expand(n, -1),
        "guidance_scale": guidance,
        "num_inference_steps": 5,
        "height": size[0],
        "width": size[1],
    }
    for kind, made in (("latent", ours.latents["edit"]), ("pt", ours.images["edit"])):
        generator = torch.Generator().manual_seed(3)
        assert torch.equal(made, pipe(**call, generator=generator, output_type=kind).images)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize(("guidance", "n", "size"), [(1.0, 1, (32, 32)), (4.5, 2, (24, 40))])
def test_pixart_is_bit_identical(scheduler, guidance, n, size):
    pipe, given = pixart(), conds(pooled=False)
    for cond, length in zip(given.values(), (12, 7, 3), strict=True):
        cond["mask"] = (torch.arange(12) < length).long()[None]
    session = inlay.Session(pipe, scheduler=scheduler)
    pipe.scheduler = session.scheduler
    pipe.set_progress_bar_config(disable=True)
    ours = session.run(guidance=guidance, n=n, size=size, steps=5, seed=3, conds=given)
    call = {
        "prompt_embeds": given["edit"]["embeds"].expand(n, -1, -1),
        "prompt_attention_mask": given["edit"]["mask"].expand(n, -1),
        "negative_prompt_embeds": given["negative"]["embeds"].expand(n, -1, -1),
        "negative_prompt_attention_mask": given["negative"]["mask"].expand(n, -1),
        "negative_prompt": None,
        "guidance_scale": guidance,
        "num_inference_steps": 5,
        "height": size[0],
        "width": size[1],
        "use_resolution_binning": False,
    }
    for kind, made in (("latent", ours.latents["edit"]), ("pt", ours.images["edit"])):
        generator = torch.Generator().manual_seed(3)
        assert torch.equal(made, pipe(**call, generator=generator, output_type=kind).images)


@pytest.mark.parametrize("n", [1, 2])
def test_the_unconditional_pixel_model_is_bit_identical(n):
    """Stock draws with a learned variance; its pictures are the latents."""
    pipe = pixel()
    pipe.set_progress_bar_config(disable=True)
    ours = inlay.Session(pipe).run(n=n, steps=8, seed=3)
    stock = pipe(n, torch.Generator().manual_seed(3), 8, output_type="pt").images
    assert torch.equal(ours.images["edit"], stock)
    assert torch.equal((ours.latents["edit"] / 2 + 0.5).clamp(0, 1), stock)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_solvers_without_a_learned_variance_drop_it(scheduler):
    pipe = pixel()
    ours = inlay.Session(pipe, scheduler=scheduler).run(steps=5, seed=3).latents["edit"]
    solver = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    solver.set_timesteps(5)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for t in solver.timesteps:
            x = solver.step(pipe.unet(x, t).sample[:, :3], t, x).prev_sample
    assert torch.equal(ours, x)


def test_x0_written_in_pixel_space_keeps_the_variance():
    """Writing back the x0 that was read changes nothing beyond rounding, the variance included."""
    pipe = pixel()

    def same(step):
        step.x0["edit"] = step.x0["edit"].clone()

    plain = inlay.Session(pipe).run(steps=6, seed=3).latents["edit"]
    written = inlay.Session(pipe, {"same": plugin(denoised=same)}).run(steps=6, seed=3)
    torch.testing.assert_close(written.latents["edit"], plain, rtol=1e-4, atol=1e-5)


def test_schedulers_of_the_matrix_exist():
    assert all(hasattr(diffusers, name) for name in SD_SCHEDULERS + FLOW_SCHEDULERS)


@pytest.mark.parametrize("scheduler", FLOW_SCHEDULERS)
@pytest.mark.parametrize("true_cfg", [1.0, 3.0])
def test_the_shipped_model_is_bit_identical(scheduler, true_cfg):
    """toybox/flux from its name, prompts encoded by itself, against stock from_pretrained."""
    folder = inlay_toybox.path("flux")
    session = inlay.Session("toybox/flux", scheduler=scheduler, device="cpu")
    prompt = {"edit": "a red bus on the road", "negative": ""}
    ours = session.run(prompt, guidance=1.0, true_cfg=true_cfg, steps=4, seed=3)
    pipe = diffusers.FluxPipeline.from_pretrained(folder)
    pipe.scheduler = session.scheduler
    pipe.set_progress_bar_config(disable=True)
    settings = json.loads((folder / "settings.json").read_text())
    settings |= {"num_inference_steps": 4, "true_cfg_scale": true_cfg, "guidance_scale": 1.0}
    for kind, made in (("latent", ours.latents["edit"]), ("pt", ours.images["edit"])):
        generator = torch.Generator().manual_seed(3)
        stock = pipe(prompt["edit"], **settings, generator=generator, output_type=kind).images
        assert torch.equal(made, stock)


def test_the_shipped_stable_diffusion_draws_the_stock_picture():
    """Its autoencoder is FLUX's, whose shift the stock pipeline knows nothing of."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(inlay_toybox.path("sd"))
    pipe.set_progress_bar_config(disable=True)
    ours = inlay.Session(pipe).run("a cow on the grass", steps=3, guidance=3.0, seed=5).images
    settings = json.loads((inlay_toybox.path("sd") / "settings.json").read_text())
    settings |= {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    stock = pipe("a cow on the grass", generator=torch.Generator().manual_seed(5), **settings)
    assert torch.equal(ours["edit"], stock.images)
