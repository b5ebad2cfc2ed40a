"""Parts of others: a session under samplers of k-diffusion, guiders of diffusers in a session."""

import copy
from itertools import pairwise

import pytest
import torch

import inlay
import pages
from inlay import ConfigError, InputError, PlanConflict
from inlay_plugins.guider import Guider, pure
from models import conds, flux, stable_diffusion
from spies import Editor, plugin

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def sd():
    return stable_diffusion()


@pytest.fixture(scope="module")
def fl():
    return flux()


# k-diffusion ----------------------------------------------------------------------------------


def euler(denoise, x, sigmas):
    """Algorithm 2 of Karras et al. 2022 without churn, as k-diffusion writes it."""
    for now, then in pairwise(sigmas):
        x = x + (x - denoise(x, now * x.new_ones(x.shape[0]))) / now * (then - now)
    return x


def acting():
    """Attention, combine and denoised at once, in one step alone."""

    def clamp(step):
        if step.index == 1:
            step.x0["edit"] = step.x0["edit"].clamp(-1, 1)

    def weak(step, text, null, scale):
        return null + 0.5 * scale * (text - null) if step.index == 2 else None

    louder = Editor(op="scale", options={"keys": "text", "weight": 2.0}, active=[0, 1],
                    select={"kind": ["cross", "joint"]})  # fmt: skip
    return {"louder": louder, "clamp": plugin(denoised=clamp, combine=weak)}


@pytest.mark.parametrize("plugins", [dict, acting])
def test_a_sampler_s_euler_is_the_session_s(sd, plugins):
    session = inlay.Session(sd, plugins(), scheduler="EulerDiscreteScheduler")
    ours = session.run(conds=conds(), steps=4, guidance=3.0, seed=5).latents["edit"]
    solver = copy.deepcopy(session.scheduler)
    solver.set_timesteps(4)
    start = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    start = start * solver.init_noise_sigma
    options = {"sigmas": solver.sigmas, "conds": conds(), "guidance": 3.0}
    with inlay.denoiser(session, **options) as denoise:
        made = euler(denoise, start, solver.sigmas)
    torch.testing.assert_close(made, ours, **CLOSE)
    with inlay.denoiser(inlay.Session(sd), **options) as denoise:
        stock = euler(denoise, start, solver.sigmas)
    assert torch.allclose(stock, ours, **CLOSE) == (plugins is dict)


@pytest.mark.parametrize("plugins", [dict, acting])
def test_a_flow_model_is_a_denoiser_too(fl, plugins):
    levels = [0.95, 0.7, 0.4, 0.1]
    session = inlay.Session(fl, plugins())
    given = {"conds": conds(), "true_cfg": 2.0}
    ours = session.run(steps=4, seed=5, sigmas=levels, **given).latents["edit"]
    solver = copy.deepcopy(session.scheduler)
    session.backbone.set_timesteps(solver, 4, levels, (32, 32))
    sigmas = solver.sigmas / (1 - solver.sigmas)
    noise = session.backbone.latent(1, (32, 32), torch.Generator().manual_seed(5))
    with inlay.denoiser(session, sigmas=sigmas, **given) as denoise:
        made = euler(denoise, noise * (1 + sigmas[0]), sigmas)
    torch.testing.assert_close(made, ours, **CLOSE)


def test_a_sampler_may_ask_between_its_levels(sd):
    """Heun and midpoint samplers evaluate inside a step: it is still that step."""
    seen = []
    watch = plugin(denoised=lambda step: seen.append((step.index, step.total, float(step.t))))
    options = {"sigmas": [10.0, 3.0, 1.0, 0.0], "conds": conds()}
    with inlay.denoiser(inlay.Session(sd, {"watch": watch}), **options) as denoise:
        x = torch.ones(1, 4, 16, 16)
        for sigma in (10.0, 5.0, 3.0, 2.0, 1.0, 0.5):
            assert denoise(x, sigma, cond=None).shape == x.shape
    assert [index for index, *_ in seen] == [0, 0, 1, 1, 2, 2]
    times = [t for *_, t in seen]
    assert times == sorted(times, reverse=True) and {total for _, total, _ in seen} == {3}


def test_a_training_timestep_is_found_exactly(sd):
    kept = sd.scheduler.alphas_cumprod.double()
    sigmas = ((1 - kept) / kept).sqrt()[[900, 500, 20]]
    seen = []
    watch = plugin(denoised=lambda step: seen.append(float(step.t)))
    with inlay.denoiser(inlay.Session(sd, {"w": watch}), sigmas=sigmas, conds=conds()) as denoise:
        for sigma in sigmas:
            denoise(torch.ones(1, 4, 16, 16), sigma)
    assert seen == pytest.approx([900, 500, 20], abs=1e-3)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (plugin(post_step=lambda step: None), "p acts in inlay_post_step"),
        (plugin(final=lambda result: None), "p acts in inlay_final"),
        (plugin(declare=lambda need: need.lane("b", prompt="edit")), "p needs the lane 'b'"),
        (plugin(declare=lambda need: need.evaluations(2)), "p needs evaluations of its own"),
        (plugin(declare=lambda need: need.grad("edit")), "p needs the gradient"),
    ],
)
def test_what_a_sampler_decides_is_refused(sd, made, message):
    session = inlay.Session(sd, {"p": made})
    with pytest.raises(PlanConflict, match=message), inlay.denoiser(session, sigmas=[1.0]):
        pass


def test_levels_that_are_none_are_refused(sd):
    session = inlay.Session(sd)
    for sigmas in ([], [0.0], [1.0, 2.0]):
        with pytest.raises(ConfigError, match="sigmas: "), inlay.denoiser(session, sigmas=sigmas):
            pass
    x = torch.ones(2, 4, 16, 16)
    with (
        inlay.denoiser(session, sigmas=[2.0, 1.0], conds=conds()) as denoise,
        pytest.raises(InputError, match="sigma: pictures are at different levels"),
    ):
        denoise(x, torch.tensor([2.0, 1.0]))


# diffusers' guiders ---------------------------------------------------------------------------


def guided(pipe, name=None, **options):
    made = {"guider": Guider(Guider.Config(name=name, options=options))} if name else {}
    scales = {"true_cfg": 3.0} if hasattr(pipe, "transformer") else {"guidance": 3.0}
    run = inlay.Session(pipe, made).run
    return run(conds=conds(), steps=4, seed=1, **scales).latents["edit"]


@pytest.mark.parametrize("family", ["sd", "fl"])
def test_their_classifier_free_guidance_is_ours_bit_for_bit(request, family):
    pipe = request.getfixturevalue(family)
    assert torch.equal(guided(pipe, "ClassifierFreeGuidance"), guided(pipe))
    stronger = guided(pipe, "ClassifierFreeGuidance", guidance_scale=6.0)
    assert not torch.allclose(stronger, guided(pipe), atol=1e-3)


@pytest.mark.parametrize("family", ["sd", "fl"])
@pytest.mark.parametrize("name", pure())
def test_every_pure_guider_combines(request, family, name):
    options = {"AdaptiveProjectedGuidance": {"eta": 0.0}, "FrequencyDecoupledGuidance": {},
               "AdaptiveProjectedMixGuidance": {"adaptive_projected_guidance_start_step": 0},
               "ClassifierFreeGuidance": {"guidance_rescale": 0.5}}  # fmt: skip
    pipe, options = request.getfixturevalue(family), options.get(name, {})
    made = guided(pipe, name, **options)
    assert torch.isfinite(made).all() and not torch.allclose(made, guided(pipe), atol=1e-4)
    assert torch.equal(made, guided(pipe, name, **options))


def test_projected_guidance_is_its_formula(sd):
    """The parallel part of the difference is dropped (Sadat et al. 2024, eq. 5 to 7; eta 0)."""

    def projected(text, null, scale):
        difference, unit = text - null, text / text.norm()
        return null + scale * (difference - (difference * unit).sum() * unit)

    made = guided(sd, "AdaptiveProjectedGuidance", eta=0.0,
                  adaptive_projected_guidance_rescale=0.0)  # fmt: skip
    written = inlay.Session(sd, {"p": plugin(combine=projected)})
    ours = written.run(conds=conds(), steps=4, seed=1, guidance=3.0).latents["edit"]
    torch.testing.assert_close(made, ours, **CLOSE)


def test_momentum_starts_anew_in_every_run_and_counts_by_step(sd):
    momentum = {"adaptive_projected_guidance_momentum": -0.5}
    session = inlay.Session(
        sd, {"guider": {"name": "AdaptiveProjectedGuidance", "options": momentum}}
    )
    runs = [session.run(conds=conds(), steps=4, guidance=3.0).latents["edit"] for _ in range(2)]
    assert torch.equal(*runs)
    without = inlay.Session(sd, {"guider": {}}).run(conds=conds(), steps=4, guidance=3.0)
    assert not torch.allclose(runs[0], without.latents["edit"], atol=1e-4)
    only_start = guided(sd, "ClassifierFreeGuidance", start=0.0, stop=0.5)
    assert not torch.allclose(only_start, guided(sd), atol=1e-4)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"name": "SkipLayerGuidance"}, "SkipLayerGuidance needs the prediction pred_cond_skip"),
        ({"name": "PerturbedAttentionGuidance"}, "needs the prediction pred_cond_skip"),
        ({"name": "AutoGuidance"}, "AutoGuidance needs a changed model"),
        ({"name": "Adaptive"}, "no guider 'Adaptive' of diffusers. One of AdaptiveProjected"),
        ({"options": {"etta": 1}}, r"plugins\.guider\.options\.etta: unknown key"),
        ({"options": {"start": 2.0}}, r"plugins\.guider\.options: Expected `start`"),
    ],
)
def test_guiders_that_cannot_be_used_are_refused(sd, cfg, message):
    with pytest.raises(ConfigError, match=message):
        inlay.Session(sd, {"guider": cfg}).run(conds=conds(), steps=2)


def test_without_a_null_branch_nothing_is_guided(sd):
    runs = [
        inlay.Session(sd, plugins).run(conds=conds(), steps=2, guidance=1.0).latents["edit"]
        for plugins in ({}, {"guider": {}})
    ]
    assert torch.equal(*runs)


# the page -------------------------------------------------------------------------------------


def test_the_page_runs(tmp_path):
    code = "\n".join(pages.blocks(pages.read("docs/guest.md"), "python"))
    made = pages.module(code, tmp_path, "guest_page")
    assert made.heat.max() == 1 and made.latent.shape[0] == 1
    assert made.warmer.size == (64, 64) and made.pasted.shape == (64, 64, 3)
    assert torch.isfinite(made.x).all() and made.x.abs().max() < 10
