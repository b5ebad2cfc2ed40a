"""Schedulers: which are taken and which refused, and how a lane drives its own copy."""

import copy

import diffusers
import pytest
import torch

import models
from inlay import ConfigError, ModelError
from inlay.backbones import adapt
from inlay.backbones.levels import tabulate
from inlay.backbones.schedulers import advance, choose, scale_input, solver, steps_of
from test_frames import DETERMINISTIC, SD, build, output

MODEL = {False: adapt(models.stable_diffusion()), True: adapt(models.flux())}


@pytest.mark.parametrize(
    ("name", "flow"),
    [
        ("DEISMultistepScheduler", False),
        ("DPMSolverSinglestepScheduler", False),
        ("HeunDiscreteScheduler", False),
        ("LMSDiscreteScheduler", False),
        ("UniPCMultistepScheduler", True),
        ("DPMSolverMultistepScheduler", True),
    ],
)
def test_a_class_name_takes_the_configuration_of_the_model(name, flow):
    made = choose(MODEL[flow], name)
    assert type(made).__name__ == name
    if not flow:
        assert made.config.beta_end == 0.012
    else:
        assert made.config.use_flow_sigmas and made.config.prediction_type == "flow_prediction"
    MODEL[flow].set_timesteps(made, 5, None, (32, 32))
    assert len(tabulate(made)) == len(made.timesteps) + 1


def test_no_name_and_its_own_name_keep_the_scheduler_of_the_model():
    own = MODEL[True].pipe.scheduler
    assert choose(MODEL[True], None) is own
    assert choose(MODEL[True], "FlowMatchEulerDiscreteScheduler") is own
    instance = diffusers.UniPCMultistepScheduler(**SD)
    assert choose(MODEL[False], instance) is instance


@pytest.mark.parametrize(
    ("name", "flow", "message"),
    [
        ("DDMIScheduler", False, r"scheduler: no scheduler 'DDMIScheduler'\. Did you mean 'DD"),
        ("FlowMatchEulerDiscreteScheduler", False, "does not solve a diffusion model"),
        ("DDIMScheduler", True, "does not solve a flow model. Use FlowMatchEuler"),
        ("EDMEulerScheduler", False, "does not step from .output, t, x. alone"),
        ("RePaintScheduler", False, "does not step from .output, t, x. alone"),
        ("UnCLIPScheduler", False, "cannot be built for this model"),
        ("DiscreteDDIMScheduler", False, "cannot be driven"),
        ("FlowMatchHeunDiscreteScheduler", True, "cannot be driven"),
    ],
)
def test_what_cannot_solve_the_model_is_refused(name, flow, message):
    with pytest.raises(ConfigError, match=message):
        choose(MODEL[flow], name)


@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_interpolated_half_steps_have_no_frame(name):
    with pytest.raises(ModelError, match=r"noises step 0 with .* its table says"):
        tabulate(build(name, SD))


def test_a_scheduler_without_levels_has_no_frame():
    with pytest.raises(ModelError, match="neither a sigma per timestep nor alphas_cumprod"):
        tabulate(build("IPNDMScheduler", {}))


def test_evaluations_belong_to_the_steps_of_the_user():
    assert steps_of(build("DDIMScheduler", SD, 4), 4) == [0, 1, 2, 3]
    assert steps_of(build("HeunDiscreteScheduler", SD, 3), 3) == [0, 0, 1, 1, 2]
    assert steps_of(build(*DETERMINISTIC["pndm"], 4), 4) == [0, 0, 1, 2, 3]


def test_a_repeated_timestep_has_one_level():
    scheduler = build(*DETERMINISTIC["pndm"], 4)
    first, second, third, *_ = tabulate(scheduler)
    assert scheduler.timesteps[1] == scheduler.timesteps[2]
    assert second == third and first.sigma > second.sigma


@pytest.mark.parametrize("case", ["euler", "flow euler", "flow heun"])
def test_frames_are_read_before_a_begin_index_is_set(case):
    """With one set, diffusers noises every timestep with the first level: a table from it lies."""
    base = build(*DETERMINISTIC[case])
    levels = [float(f.sigma) for f in tabulate(base)]
    assert levels == sorted(levels, reverse=True) and levels[0] > levels[1]
    begun = copy.deepcopy(base)
    begun.set_begin_index(0)
    assert base.begin_index is None
    solver(base, 2, "edit", begin=True)
    assert base.begin_index is None
    if case == "flow heun":  # its noising is not consulted: it ignores t and changes the scheduler
        assert [float(f.sigma) for f in tabulate(begun)] == levels
    else:
        with pytest.raises(ModelError, match="noises step 1"):
            tabulate(begun)


def test_tabulating_leaves_the_scheduler_as_it_was():
    base = build(*DETERMINISTIC["flow heun"])
    before = copy.deepcopy(base.__dict__)
    tabulate(base)
    assert before.keys() == base.__dict__.keys()
    assert torch.equal(before["sigmas"], base.sigmas) and before["_step_index"] == base.step_index


@pytest.mark.parametrize("case", ["ddim", "euler", "dpm++", "unipc", "flow euler", "flow unipc"])
@pytest.mark.parametrize("begin", [False, True])
def test_a_late_lane_starts_its_solver_at_its_own_index(case, begin):
    """From x at step 2 on, the exact model leads to x0, as it does from the start."""
    base = build(*DETERMINISTIC[case])
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 4, 8, 8, generator=g)
    frames, own = tabulate(base), solver(base, 2, "edit", begin)
    x = frames[2].noise(x0, eps)
    for i in range(2, 5):
        t = base.timesteps[i]
        scaled = scale_input(own, x, t)
        if frames[i].space == "ve":
            torch.testing.assert_close(scaled, x / (frames[i].sigma ** 2 + 1).sqrt())
        x = advance(own, output(frames[i], x, x0, eps), t, x, torch.Generator())
        torch.testing.assert_close(x, frames[i + 1].noise(x0, eps), rtol=0, atol=1e-4)


def test_a_solver_with_a_history_of_calls_cannot_start_late():
    base = build(*DETERMINISTIC["pndm"])
    with pytest.raises(ConfigError, match="lane edit: PNDMScheduler cannot start at evaluation 2"):
        solver(base, 2, "edit", False)


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_the_noise_of_a_solver_comes_from_the_generator_of_its_lane(name):
    scheduler, x = build(name, SD), torch.ones(1, 4, 8, 8)
    outcomes = []
    for seed in (1, 1, 2):
        own, t = copy.deepcopy(scheduler), scheduler.timesteps[0]
        g = torch.Generator().manual_seed(seed)
        outcomes.append(advance(own, x * 0.1, t, scale_input(own, x, t), g))
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])
