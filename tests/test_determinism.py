"""The same run twice is the same picture bit for bit, and nothing around it is disturbed."""

import random
import threading

import numpy as np
import pytest
import torch

import inlay
from models import conds, flux, stable_diffusion
from spies import Editor, Spy


def run(pipe, plugins=None, seed=3, **options):
    given = conds(pooled=hasattr(pipe, "transformer"))
    session = inlay.Session(pipe, plugins, options.pop("scheduler", None))
    return session.run(conds=given, steps=3, seed=seed, **options)


@pytest.mark.parametrize("family", [flux, stable_diffusion])
def test_the_same_seed_is_the_same_picture_bit_for_bit(family):
    edit = {"edit": Editor()}
    first, second = run(family(), edit), run(family(), {"edit": Editor()})
    assert torch.equal(first.latents["edit"], second.latents["edit"])
    assert torch.equal(first.images["edit"], second.images["edit"])
    assert first.manifest["plan"] == second.manifest["plan"]
    other = run(family(), edit, seed=4)
    assert not torch.equal(first.latents["edit"], other.latents["edit"])


def test_a_session_runs_again_as_it_ran_before():
    """No state of one run leaks into the next, stochastic solvers and plugins included."""
    session = inlay.Session(
        stable_diffusion(), {"edit": Editor(), "spy": Spy()}, "EulerAncestralDiscreteScheduler"
    )
    runs = [session.run(conds=conds(pooled=False), steps=3, seed=s) for s in (3, 4, 3)]
    assert torch.equal(runs[0].latents["edit"], runs[2].latents["edit"])
    assert not torch.equal(runs[0].latents["edit"], runs[1].latents["edit"])


def test_global_generators_and_settings_are_left_alone():
    def settings():
        numbers = np.random.get_state()[1].tolist()  # noqa: NPY002  (the global one is the point)
        grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
        return random.getstate(), numbers, torch.get_rng_state().tolist(), grad, threads

    pipe = flux()
    before = settings()
    run(pipe, {"edit": Editor()})
    assert settings() == before


def test_the_pipeline_is_left_as_it_was():
    pipe = stable_diffusion()
    scheduler, config = pipe.scheduler, dict(pipe.scheduler.config)
    timesteps = pipe.scheduler.timesteps.clone()
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    run(pipe, {"edit": Editor()}, scheduler="EulerDiscreteScheduler")
    assert pipe.scheduler is scheduler and dict(scheduler.config) == config
    assert torch.equal(scheduler.timesteps, timesteps)
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())


def test_a_run_beside_a_busy_thread_is_the_same():
    pipe, stop = flux(), threading.Event()
    alone = run(pipe, {"edit": Editor()}).latents["edit"]

    def disturb():
        while not stop.is_set():
            torch.manual_seed(0)
            torch.rand(64)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        beside = run(pipe, {"edit": Editor()}).latents["edit"]
    finally:
        stop.set()
        thread.join()
    assert torch.equal(alone, beside)
