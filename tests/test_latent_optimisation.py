"""CLIP moves an autoencoder's latent without a diffusion model."""

import pytest
import torch
import torch.nn.functional as F

import compositions
from inlay import ConfigError, ModelError, PlanConflict, Session
from invariants import CASES
from models import conds, flux, pixel, stable_diffusion
from spies import plugin

MASK = torch.zeros(1, 1, 16, 16)
MASK[..., 4:12, 4:12] = 1
MAKE = {"pixel": pixel, "sd": stable_diffusion, "flux": flux}


def moved(kind="pixel", beside=None, loss=None, seed=3, **options):
    """A run on a tiny random model; the mask is in the middle."""
    recorder = compositions.Recorder()
    session = Session(
        MAKE[kind](),
        {
            "watch": plugin(prepare=lambda run: setattr(recorder, "run", run)),
            "source_trajectory": {},
            "clip_guidance": {"scale": 100.0} | (loss or {}),
            **(beside or {}),
            "latent_optimisation": {"iterations": 12} | options,
            "recorder": recorder,
        },
    )
    size = session.backbone.native_size
    picture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    asked = {"conds": {} if kind == "pixel" else conds(pooled=kind == "flux"), "n": 2}
    mask = F.interpolate(MASK, size)
    result = session.run("a cow", picture, mask, steps=3, guidance=2.0, seed=seed, **asked)
    return result, recorder


def made(kind="pixel", **options):
    return moved(kind, **options)[0]


@pytest.mark.parametrize("kind", MAKE)
def test_the_loss_falls_without_an_evaluation_and_the_rest_stays(kind):
    result, recorder = moved(kind)
    first, last = result.record["latent_optimisation"]["loss"]
    assert last < 0.97 * first
    kept = compositions.Made({}, result, recorder)
    CASES["latent_optimisation"].holds(kept, None)
    free = compositions.Made({}, *moved(kind, mask="", loss={"mask": ""}))
    with pytest.raises(AssertionError):
        CASES["latent_optimisation"].holds(free, None)
    assert result.images["edit"].shape == (2, *result.images["source"].shape[1:])
    assert result.manifest["latent_optimisation"]["iterations"] == 12


def test_it_goes_on_while_it_may_and_faster_at_a_higher_rate():
    losses = [
        made(iterations=n, rate=rate).record["latent_optimisation"]["loss"][1]
        for n, rate in ((4, 0.01), (12, 0.01), (12, 0.05))
    ]
    assert losses[0] > losses[1] > losses[2]


def test_a_seed_repeats_it_and_decides_noise_and_warps():
    noise = {"start": "noise", "beside": None}
    one, same, other = (made(**noise, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.images["edit"], same.images["edit"])
    assert not torch.equal(one.images["edit"], other.images["edit"])
    start, source = one.board["start:edit"], one.board["latent:source"].expand(2, -1, -1, -1)
    assert torch.equal(start * (1 - MASK), source * (1 - MASK))
    assert not torch.equal(start[0], start[1])
    first, second = made().images["edit"]  # nothing is drawn
    assert torch.equal(first, second)


def test_a_background_loss_holds_what_is_free_to_move():
    """Its gradient is added to CLIP's, which alone would move all that it sees."""
    everywhere = {"mask": "", "loss": {"mask": ""}}
    held = {"background_loss": {"lpips": 0.0, "l2": 1e5}}
    outside = []
    for beside in ({}, held):
        result = made(beside=beside, **everywhere)
        far = result.latents["edit"] - result.board["latent:source"]
        outside.append(float(((1 - MASK) * far).square().mean()))
    assert 0 < 2 * outside[1] < outside[0]


def test_what_cannot_be_optimised_is_refused():
    with pytest.raises(ConfigError, match=r"latent_optimisation: there is no loss to go down"):
        plugins = {"source_trajectory": {}, "latent_optimisation": {}}
        Session(pixel(), plugins).run(image=torch.rand(1, 3, 16, 16), mask=MASK, steps=1)
    with pytest.raises(PlanConflict, match=r"published by structure_transfer and by latent_opt"):
        made(beside={"structure_transfer": {"step": 1}})
    with pytest.raises(PlanConflict, match=r"latent_optimisation needs range_loss, .*later"):
        listed = ("source_trajectory", "latent_optimisation", "range_loss")
        Session(pixel(), {key: {} for key in listed}).run("a cow", mask=MASK, steps=1)
    for key in ("iterations", "rate"):
        with pytest.raises(ConfigError, match=rf"latent_optimisation\.{key}: 0.* moves nothing"):
            made(**{key: 0})
    with pytest.raises(ModelError, match="latent_optimisation: it went out of bounds"):
        made(rate=1e37)
