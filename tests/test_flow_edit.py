"""FlowEdit and RF-Inversion against their papers' formulas, written out on the tiny models."""

from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import inlay
from inlay import ConfigError, Session
from inlay_config.config import Experiment, Prompt
from inlay_plugins.rf_inversion import towards
from inlay_plugins.source_trajectory import SourceTrajectory
from models import conds, flux, stable_diffusion
from spies import plugin

CLEAN = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(3))  # FLUX, 32x32 pixels
PROMPT = {"source": "a", "edit": "b"}


@pytest.fixture(scope="module")
def pipe():
    return flux()


def velocity(pipe, x, sigma, cond, guidance):
    """The tiny FLUX, asked directly."""
    embeds = conds()[cond]
    ids = torch.stack(torch.meshgrid(torch.zeros(1), *[torch.arange(8.0)] * 2, indexing="ij"), -1)
    with torch.no_grad():
        return pipe.transformer(
            hidden_states=x,
            timestep=(sigma * 1000 / 1000).expand(len(x)),
            guidance=torch.full((len(x),), guidance),
            pooled_projections=embeds["pooled"].expand(len(x), -1),
            encoder_hidden_states=embeds["embeds"].expand(len(x), -1, -1),
            txt_ids=torch.zeros(12, 3),
            img_ids=ids.reshape(64, 3),
            return_dict=False,
        )[0]


def run(pipe, name, options, clean=CLEAN, watch=None, **asked):
    plugins = {"source_trajectory": SourceTrajectory(latent=clean), name: options}
    plugins |= {"watch": watch} if watch else {}
    known = {"steps": 5, "size": 32, "seed": 2, "guidance": 4.0, "conds": conds()}
    return Session(pipe, plugins).run(PROMPT, **(known | asked))


def sigmas(pipe, steps=5):
    base = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    inlay.backbones.adapt(pipe).set_timesteps(base, steps, None, (32, 32))
    return base.sigmas


# FlowEdit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_max", "n_min", "n_avg"), [(5, 0, 1), (4, 0, 3), (4, 2, 2), (0.8, 0, 1)]
)
def test_flow_edit_is_algorithm_1(pipe, n_max, n_min, n_avg):
    """z += Δσ·mean[v(z + z_src - x; edit) - v(z_src; source)], then freely from z_src + z - x."""
    levels, z, drawn = sigmas(pipe), CLEAN, {}
    first, free = 5 - (4 if n_max == 0.8 else n_max), 5 - n_min

    def noise(i, k):
        name = f"flow_edit/flow_source{'' if k == 1 else f'_{k}'}/{i}"
        g = torch.Generator().manual_seed(100 * i + k)
        return drawn.setdefault(name, torch.randn(CLEAN.shape, generator=g))

    for i in range(first, free):
        here, change = levels[i], []
        for k in range(1, n_avg + 1):
            source = (1 - here) * CLEAN + here * noise(i, k)
            moved = velocity(pipe, z + source - CLEAN, here, "edit", 4.0)
            change.append(moved - velocity(pipe, source, here, "source", 1.5))
        z = z + (levels[i + 1] - here) * torch.stack(change).mean(0)
    for i in range(free, 5):
        if i == free:
            z = z + (1 - levels[i]) * CLEAN + levels[i] * noise(i, 1) - CLEAN
        z = z + (levels[i + 1] - levels[i]) * velocity(pipe, z, levels[i], "edit", 4.0)
    for k in range(1, n_avg + 1):
        noise(free, k)

    options = {"n_max": n_max, "n_min": n_min, "n_avg": n_avg, "guidance": 1.5}
    ours = run(pipe, "flow_edit", options, noise=drawn).latents["edit"]
    torch.testing.assert_close(ours, z, rtol=1e-4, atol=2e-5)


def test_the_same_prompt_and_guidance_change_nothing(pipe):
    same = {name: conds()["edit"] for name in ("source", "edit")}
    made = run(pipe, "flow_edit", {}, conds=same)
    torch.testing.assert_close(made.latents["edit"], CLEAN, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", [flux, stable_diffusion])
def test_pictures_have_noise_of_their_own_in_every_step(family):
    model, seen = family(), []
    clean = CLEAN if family is flux else torch.zeros(1, 4, 16, 16)

    def observe(step):
        x = step.x["flow_source"]
        seen.extend((x - step.frame.alpha * clean) / step.frame.sigma)

    encoded = conds(pooled=family is flux)
    made = run(model, "flow_edit", {}, clean, plugin(observe=observe), n=2, conds=encoded)
    assert len(seen) == 8
    distances = torch.pdist(torch.stack(seen).flatten(1))
    assert distances.min() > 1
    assert not torch.equal(*made.latents["edit"])


def test_flow_edit_makes_one_call_per_step_and_the_plan_counts_its_rows(pipe):
    calls = []
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    run(pipe, "flow_edit", {"n_max": 4, "n_min": 1, "n_avg": 2})
    hook.remove()
    assert len(calls) == 4
    plugins = {"source_trajectory": {}, "flow_edit": {"n_max": 4, "n_min": 1, "n_avg": 2}}
    asked = Experiment(prompt=Prompt(**PROMPT), steps=5, size=[32, 32], n=2)
    plan = Session(pipe, plugins).plan(asked, (32, 32), ["image"])
    assert plan.evaluations["edit"] == 3 * 8 + 2


def test_what_others_blend_into_the_edit_stays(pipe):
    """The edit's distance to the source is read from its latent: where it is the source, it is."""

    def post_step(step):
        if step.index < step.total - 1:
            keep = torch.arange(64).view(1, 64, 1) < 32
            x = torch.where(keep, step.x_next["edit"], step.x_next["flow_source"])
            step.x_next["edit"] = x

    made = run(pipe, "flow_edit", {}, watch=plugin(post_step=post_step))
    plain = run(pipe, "flow_edit", {})
    moved = [(m.latents["edit"] - CLEAN)[:, 32:].norm() for m in (made, plain)]
    assert 0 < moved[0] < 0.7 * moved[1]  # of the last step alone


@pytest.mark.parametrize(
    "options", [{"n_max": 6}, {"n_min": 5}, {"n_max": 2, "n_min": 2}, {"n_avg": 0}, {"n_min": -1}]
)
def test_flow_edit_without_steps_is_refused(pipe, options):
    with pytest.raises(ConfigError, match=r"plugins\.flow_edit"):
        run(pipe, "flow_edit", options)


# RF-Inversion ------------------------------------------------------------------------------------


def test_rf_inversion_is_its_two_controlled_equations(pipe):
    levels, x, start = sigmas(pipe), CLEAN, torch.Generator().manual_seed(2)
    noise = inlay.backbones.adapt(pipe).latent(1, (32, 32), start)
    for low, high in pairwise(levels.flip(0)):
        v = velocity(pipe, x, low, "negative", 0.0)
        x = x + (high - low) * (v + 0.5 * ((noise - x) / (1 - low) - v))
    for i, (high, low) in enumerate(pairwise(levels)):
        v, eta = velocity(pipe, x, high, "edit", 4.0), 0.9 if i < 2 else 0.0
        x = x + (low - high) * (v + eta * ((x - CLEAN) / high - v))
    ours = run(pipe, "rf_inversion", {"active": [0, 1]}).latents["edit"]
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=5e-5)


def test_a_full_share_leads_straight_to_the_noise_and_straight_back(pipe):
    ends = {}

    def observe(run, step):
        if step.pass_ == "rf_inversion":
            ends[step.index] = step.x_next["inverted"], run.x_T["rf_inversion", "inverted"]

    options = {"gamma": 1.0, "eta": 1.0, "active": [0.0, 1.0]}
    made = run(pipe, "rf_inversion", options, watch=plugin(observe=observe), n=2)
    torch.testing.assert_close(*ends[4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.latents["edit"], CLEAN.expand(2, -1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_it_holds_for_diffusion_models(predicts):
    model = stable_diffusion()
    model.scheduler.register_to_config(prediction_type=predicts, set_alpha_to_one=True)
    model.scheduler = type(model.scheduler).from_config(model.scheduler.config)
    clean, ends = torch.ones(1, 4, 16, 16), {}

    def observe(run, step):
        if step.pass_ == "rf_inversion":
            noise = run.x_T["rf_inversion", "inverted"]
            ends[step.index] = step.x_next["inverted"], step.next_frame, noise

    options = {"gamma": 1.0, "eta": 1.0, "active": [0.0, 1.0]}
    encoded = conds(pooled=False)
    made = run(model, "rf_inversion", options, clean, plugin(observe=observe), conds=encoded)
    x, frame, noise = ends[4]
    torch.testing.assert_close(x, frame.noise(clean, noise), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made.latents["edit"], clean, rtol=0, atol=1e-3)


def test_the_prediction_towards_a_noise_means_that_noise():
    x, noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).split(1)
    for space, predicts, sigma in (
        ("flow", "flow", 0.4),
        ("vp", "epsilon", 0.4),
        ("vp", "v_prediction", 0.4),
        ("ve", "v_prediction", 2.0),
    ):
        s = torch.tensor(sigma)
        alpha = {"flow": 1 - s, "vp": (1 - s**2).sqrt(), "ve": torch.tensor(1.0)}[space]
        frame = inlay.Frame(alpha, s, space, predicts)
        said = frame.x0(towards(frame, x, noise), x)
        torch.testing.assert_close(frame.eps(said, x), noise)


@pytest.mark.parametrize(
    ("options", "where"),
    [({"gamma": 1.5}, "gamma"), ({"eta": 2.0}, "eta"), ({"active": [0, 9]}, "steps 0..9")],
)
def test_shares_outside_0_to_1_are_refused(pipe, options, where):
    with pytest.raises(ConfigError, match=where):
        run(pipe, "rf_inversion", options)
