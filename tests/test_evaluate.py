"""run.evaluate: predictions besides the step's own, counted, differentiable, without edits."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler

import inlay
from inlay import PluginError
from inlay_config.config import Experiment, Prompt
from models import conds, flux, stable_diffusion
from spies import Editor, plugin

MODELS = {
    "flow": lambda: (flux(), None),
    "vp": lambda: (stable_diffusion(), None),
    "ve": lambda: (stable_diffusion(), EulerDiscreteScheduler()),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def run(model, act, *others, rows=100, **options):
    """Two steps with a plugin that acts in post_step."""
    pipe, scheduler = model
    asking = plugin(declare=lambda need: need.evaluations(rows), post_step=act)
    plugins = {"asking": asking} | {f"p{i}": p for i, p in enumerate(others)}
    given = conds(pooled=hasattr(pipe, "transformer"))
    options = {"steps": 2, "size": 32, "seed": 3, "guidance": 2.0} | options
    return inlay.Session(pipe, plugins, scheduler).run(conds=given, **options)


def test_at_the_same_latents_it_is_the_same_prediction(model):
    def act(run, step):
        here = dict.fromkeys(step.preds, step.x["edit"])
        found = run.evaluate(step, here)
        for branch, pred in step.preds.items():
            torch.testing.assert_close(found[branch], pred, rtol=1e-5, atol=1e-6)

    run(model, act, n=2)


def test_edits_do_not_act_in_it(model):
    found, plain = [], []
    ask = lambda run, step: found.append(run.evaluate(step, {"edit/text": run.x_T["edit", "edit"]}))  # noqa: E731
    see = lambda run, step: plain.append(run.evaluate(step, {"edit/text": run.x_T["edit", "edit"]}))  # noqa: E731
    run(model, ask, Editor(options={"keys": "all", "gain": 3.0}))
    run(model, see)
    for edited, without in zip(found, plain, strict=True):
        assert torch.equal(edited["edit/text"], without["edit/text"])


def test_another_condition_and_the_gradient_towards_it(model):
    def act(run, step):
        cond = run.conds["edit/text"]
        embeds = cond.embeds.clone().requires_grad_()
        x = {"edit/text": step.x["edit"]}
        with torch.enable_grad():
            other = type(cond)(embeds, cond.pooled)
            pred = run.evaluate(step, x, conds={"edit/text": other})["edit/text"]
            (slope,) = torch.autograd.grad(pred.square().sum(), embeds)
        assert torch.isfinite(slope).all() and slope.abs().sum() > 0
        moved = type(cond)(torch.zeros_like(cond.embeds), cond.pooled)
        muted = run.evaluate(step, x, conds={"edit/text": moved})["edit/text"]
        assert not torch.allclose(muted, pred, atol=1e-5)

    run(model, act)


def test_a_site_may_compute_something_else(model):
    """Each site's own function in place of attention; afterwards everything is as it was."""
    seen = []

    def values(sdpa, q, k, v, *args, **kwargs):
        seen.append(q.shape)
        return sdpa(q, k, v * 2, *args, **kwargs)

    def act(run, step):
        x = {"edit/text": step.x["edit"]}
        plain = run.evaluate(step, x)["edit/text"]
        site = min(run.plan.sites)
        doubled = run.evaluate(step, x, programs={site: values})["edit/text"]
        assert not torch.allclose(doubled, plain)
        assert torch.equal(run.evaluate(step, x)["edit/text"], plain)

    run(model, act, Editor(options={"keys": "all", "gain": 1.0}))
    assert len(seen) == 2


def test_more_than_declared_is_refused(model):
    ask = lambda run, step: run.evaluate(step, {"edit/text": step.x["edit"]})  # noqa: E731
    run(model, ask, rows=2)
    with pytest.raises(PluginError, match=r"run\.evaluate: 2 rows were asked for, declared: .*1"):
        run(model, ask, rows=1)


def test_the_plan_counts_it(model):
    asking = plugin(declare=lambda need: need.evaluations(17))
    plan = inlay.Session(*model[:1], {"asking": asking}, model[1]).plan(
        Experiment(prompt=Prompt("", "a", "b"), steps=2, size=[32, 32]), None, []
    )
    assert plan.evaluations["asked for by asking"] == 17
    assert "asking: up to 17 forward units on request" in str(plan)
