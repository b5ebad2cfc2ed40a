"""Solvers from clean to noise: against a written-out reference, diffusers, and their round trip."""

from itertools import pairwise

import diffusers
import pytest
import torch

import inlay
from compositions import picture
from inlay import ConfigError, InlayError, backbones
from inlay_config import registry
from inlay_config.config import Experiment, Prompt
from inlay_plugins.inversion import DdimInverter, Inverter, MidpointInverter
from models import conds, flux, stable_diffusion
from spies import plugin


def schedule(name="FlowMatchEulerDiscreteScheduler", steps=6, **options):
    made = getattr(diffusers, name)(**options)
    made.set_timesteps(steps)
    return made


def slope(x, t):
    """A velocity that depends on both."""
    return torch.sin(2 * x) + t / 1000


def climb(inverter, x, predict=slope):
    """x after each evaluation, as the loop drives a solver."""
    path = [x]
    for t in inverter.timesteps:
        path.append(
            inverter.step(predict(inverter.scale_model_input(path[-1], t), t), t, path[-1])[0]
        )
    return path


CLEAN = torch.tensor([[0.9, -0.4, 0.1]])


def test_rf_solver_is_the_explicit_midpoint():
    base = schedule()
    sigmas, x = base.sigmas.flip(0), CLEAN
    path = climb(MidpointInverter(base, reuse=False), CLEAN)
    assert len(path) == 13
    for k, (low, high) in enumerate(pairwise(sigmas)):
        middle = x + (high - low) / 2 * slope(x, 1000 * low)
        x = x + (high - low) * slope(middle, 500 * (low + high))
        torch.testing.assert_close(path[2 * k + 2], x)
        assert torch.equal(path[2 * k + 1], path[2 * k])  # the step's start, until it is made


def test_fireflow_reuses_the_slope_halfway_through_the_step_before():
    base = schedule()
    sigmas, x = base.sigmas.flip(0), CLEAN
    path, v = climb(MidpointInverter(base, reuse=True), CLEAN), slope(CLEAN, 0)
    assert len(path) == 8
    for k, (low, high) in enumerate(pairwise(sigmas)):
        v = slope(x + (high - low) / 2 * v, 500 * (low + high))
        x = x + (high - low) * v
        torch.testing.assert_close(path[k + 2], x)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("reaches_zero", [True, False])
def test_ddim_is_the_inverse_scheduler_of_diffusers(predicts, reaches_zero):
    options = {"prediction_type": predicts, "clip_sample": False, "steps_offset": 1}
    options |= {"set_alpha_to_one": reaches_zero, "timestep_spacing": "leading"}
    base, theirs = schedule("DDIMScheduler", **options), schedule("DDIMInverseScheduler", **options)
    inverter, x = DdimInverter(base), CLEAN
    assert torch.equal(inverter.timesteps, theirs.timesteps)
    for ours, t in zip(climb(inverter, CLEAN)[1:], theirs.timesteps, strict=True):
        x = theirs.step(slope(x, t), t, x, return_dict=False)[0]
        torch.testing.assert_close(ours, x)


def test_midpoints_are_for_flow_models_and_ddim_is_not():
    with pytest.raises(ConfigError, match="invert flow models"):
        MidpointInverter(schedule("DDIMScheduler"), reuse=True)
    with pytest.raises(ConfigError, match="ddim inverts diffusion models"):
        DdimInverter(schedule())


def test_higher_order_ends_nearer_to_the_exact_solution():
    exact = climb(Inverter(schedule(steps=500), 1), CLEAN)[-1]

    def error(inverter):
        return float((climb(inverter, CLEAN)[-1] - exact).norm())

    euler, midpoint = Inverter(schedule(), 1), MidpointInverter(schedule(), reuse=False)
    fireflow = MidpointInverter(schedule(), reuse=True)
    assert error(midpoint) < error(fireflow) < error(euler) / 4


@pytest.mark.parametrize(
    ("provide", "iterations", "evaluations"),
    [("invert", 1, 5), ("invert", 3, 15), ("rf_solver", 2, 10), ("fireflow", 2, 6)],
)
def test_the_plan_counts_what_the_inversion_evaluates(provide, iterations, evaluations):
    pipe, calls = flux(), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    options = {"provide": provide, "fixed_point_iterations": iterations, "seed": 1}
    session = inlay.Session(pipe, {"source_trajectory": options})
    asked = Experiment(prompt=Prompt(source="a", edit="b"), steps=5, size=[32, 32])
    assert session.plan(asked, (32, 32), ["image"]).evaluations["invert"] == evaluations
    session.run({"source": "a", "edit": "b"}, picture()[0], steps=5, size=32, conds=conds())
    assert len(calls) == evaluations + 5


def test_ddim_inversion_of_a_source_is_refused_on_a_flow_model_and_runs_on_a_unet():
    plugins = {"source_trajectory": {"provide": "ddim"}}
    options = {"image": picture()[0], "steps": 3, "size": 32}
    prompt = {"source": "a", "edit": "b"}
    with pytest.raises(InlayError, match="ddim inverts diffusion models"):
        inlay.Session(flux(), plugins).run(prompt, conds=conds(), **options)
    made = inlay.Session(stable_diffusion(), plugins).run(
        prompt, conds=conds(pooled=False), **options
    )
    assert made.images["source"].shape == (1, 3, 32, 32)


def round_trip(pipe, provide, iterations=1):
    """How far a picture of the toybox is from itself after inversion and plain sampling under the
    same prompt, relative."""

    def begin(run, pass_, x):
        if pass_ == "edit":
            x["edit"] = run.finals["invert"]["source"]

    options = {"provide": provide, "fixed_point_iterations": iterations}
    plugins = {"source_trajectory": options, "restart": plugin(begin=begin)}
    same = {"source": "a view of the grass", "edit": "a view of the grass"}
    made = inlay.Session(pipe, plugins).run(same, picture()[0], guidance=1.0, size=64, steps=8)
    clean = made.board["latent:source"]
    return float((made.latents["edit"] - clean).norm() / clean.norm())


def test_every_solver_returns_nearer_to_the_picture_than_euler():
    pipe = backbones.load(registry.resolve_model("toybox/flux"), "float32", "cpu", "none", None)
    euler = round_trip(pipe, "invert")
    others = {"rf_solver": 1, "fireflow": 1, "invert": 2}
    errors = {name: round_trip(pipe, name, iterations) for name, iterations in others.items()}
    print({"euler": euler, **errors})
    assert max(errors.values()) < 0.8 * euler
