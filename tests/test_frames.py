"""Frames: x = alpha·x0 + sigma·eps at every evaluation, and what a prediction means."""

import diffusers
import pytest
import torch

from inlay import Frame
from inlay.backbones.levels import tabulate
from inlay.backbones.schedulers import advance, scale_input

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
ZERO_SNR = {  # alpha = 0 at the first step, where an eps model would say nothing about x0
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    **SD,
}
DETERMINISTIC = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, **SD}),
    "ddim zero snr": ("DDIMScheduler", ZERO_SNR),
    "euler": ("EulerDiscreteScheduler", SD),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True, **SD}),
    "heun": ("HeunDiscreteScheduler", SD),
    "lms": ("LMSDiscreteScheduler", SD),
    "dpm++": ("DPMSolverMultistepScheduler", SD),
    "dpm++ karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, **SD}),
    "unipc": ("UniPCMultistepScheduler", SD),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, **SD}),
    "flow euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "flow dpm++": ("DPMSolverMultistepScheduler", FLOW),
    "flow unipc": ("UniPCMultistepScheduler", FLOW),
}
STOCHASTIC = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False, **SD}),
    "euler a": ("EulerAncestralDiscreteScheduler", SD),
}
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
STEPS = 5  # divides 1000: elsewhere DDIM steps from one rounding of t to another


def build(name, options, steps=STEPS):
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def output(frame, x, x0, eps):
    """What a perfect model answers, written from the papers' definitions and not from `Frame`."""
    alpha, sigma = float(frame.alpha), float(frame.sigma)
    return {
        "epsilon": lambda: eps,
        "sample": lambda: x0,
        "flow": lambda: eps - x0,  # Lipman et al. 2023; x = (1 - sigma)·x0 + sigma·eps
        # Salimans & Ho 2022, on the unit-variance sample (Karras et al. 2022 for VE)
        "v_prediction": lambda: (alpha * eps - sigma * x0) / (alpha**2 + sigma**2) ** 0.5,
    }[frame.predicts]()


def solve(scheduler, x0, eps):
    """Drive a scheduler with a model that knows x0 and, in a deterministic run, eps.

    Yields (frame, x) before each evaluation and once after the last.
    """
    frames, generator = tabulate(scheduler), torch.Generator().manual_seed(5)
    x = frames[0].alpha * x0 + frames[0].sigma * eps
    for i, t in enumerate(scheduler.timesteps):
        yield frames[i], x
        noise = (x - frames[i].alpha * x0) / frames[i].sigma
        scale_input(scheduler, x, t)
        x = advance(scheduler, output(frames[i], x, x0, noise), t, x, generator)
    yield frames[-1], x


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_x_is_alpha_x0_plus_sigma_eps_at_every_evaluation(case):
    scheduler = build(*DETERMINISTIC[case])
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    count = 0
    for frame, x in solve(scheduler, x0, eps):
        expected = frame.alpha * x0 + frame.sigma * eps
        scale = max(1.0, float(frame.sigma))
        torch.testing.assert_close(x / scale, expected / scale, rtol=0, atol=1e-4)
        count += 1
    assert count == len(scheduler.timesteps) + 1
    torch.testing.assert_close(x, x0, rtol=0, atol=0.15)


@pytest.mark.parametrize("case", STOCHASTIC)
def test_stochastic_solvers_keep_a_residual_of_unit_variance(case):
    scheduler = build(*STOCHASTIC[case], steps=10)
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(1, 4, 128, 128, generator=g), torch.randn(1, 4, 128, 128, generator=g)
    for frame, x in list(solve(scheduler, x0, eps))[:-1]:
        residual = (x - frame.alpha * x0) / frame.sigma
        assert abs(float(residual.std()) - 1) < 0.02
        assert abs(float(residual.mean())) < 0.02
        assert abs(float((residual * x0).mean())) < 0.02


@pytest.mark.parametrize("case", ["ddim", "euler", "dpm++", "unipc"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_type_means_what_its_scheduler_says(case, prediction):
    name, options = DETERMINISTIC[case]
    scheduler = build(name, options | {"prediction_type": prediction})
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 4, 8, 8, generator=g)
    for frame, x in solve(scheduler, x0, eps):
        scale = max(1.0, float(frame.sigma))
        expected = frame.alpha * x0 + frame.sigma * eps
        torch.testing.assert_close(x / scale, expected / scale, rtol=0, atol=1e-4)


LEVELS = {
    "vp": (0.6, 0.8),
    "ve": (1.0, 7.3),
    "flow": (0.3, 0.7),
}


@pytest.mark.parametrize("space", LEVELS)
@pytest.mark.parametrize("predicts", [*PREDICTIONS, "flow"])
def test_pred_and_x0_are_inverse(space, predicts):
    alpha, sigma = (torch.tensor(v) for v in LEVELS[space])
    frame = Frame(alpha, sigma, space, predicts)
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(3, 4, generator=g), torch.randn(3, 4, generator=g)
    x = frame.noise(x0, eps)
    torch.testing.assert_close(x, alpha * x0 + sigma * eps)
    torch.testing.assert_close(frame.eps(x0, x), eps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frame.x0(frame.pred(x0, x), x), x0, rtol=1e-4, atol=1e-5)
    pred = torch.randn(3, 4, generator=g)
    torch.testing.assert_close(frame.pred(frame.x0(pred, x), x), pred, rtol=1e-4, atol=1e-5)
