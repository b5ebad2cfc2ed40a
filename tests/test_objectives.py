"""Losses of plugins: one backward through the step's own forward, against finite differences."""

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

import inlay
from inlay import ConfigError, ModelError, PlanConflict
from inlay.backbones.levels import variance
from inlay_config.config import Experiment, Gradient, Prompt
from models import conds, flux, pixel, stable_diffusion
from spies import plugin

MODELS = {
    "flow": (flux, None),
    "vp": (stable_diffusion, None),
    "ve": (stable_diffusion, EulerDiscreteScheduler()),
}
STEPS = 3


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    make, scheduler = MODELS[request.param]
    return make(), scheduler


def target(x, seed=5):
    return torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed))


def loss_of(x0, weight=1.0):
    """Per picture: a weighted product with fixed noise, and a square, so that its slope moves."""
    return weight * (x0 * target(x0) + 0.1 * x0.square()).flatten(1).sum(1)


def objective(weight=1.0, through="model", active=None, seen=None, loss=loss_of):
    """A plugin with this loss; seen: what each step's x0 was before and after the move."""

    def say(step, lane):
        return loss(step.x0[lane], weight)

    def denoised(run, step):
        if seen is not None and "edit" in run.unguided:
            seen.append((step, run.unguided["edit"], step.x0["edit"]))

    def declare(need):
        need.grad("edit", active=active, through=through)

    return plugin(declare=declare, objective=say, denoised=denoised)


def run(model, *plugins, gradient=None, **options):
    pipe, scheduler = model
    listed = {f"p{i}": p for i, p in enumerate(plugins)}
    session = inlay.Session(pipe, listed, scheduler, gradient=Gradient(**gradient or {}))
    given = {} if session.backbone.name == "pixel" else conds(pooled=hasattr(pipe, "transformer"))
    options = {
        "steps": STEPS,
        "size": 16 if not given else 32,
        "seed": 3,
        "guidance": 2.0,
    } | options
    return session.run(conds=given, **options)


def gradient_of(seen, index=0):
    """g of a step, from how x0 was moved."""
    step, before, after = seen[index]
    return (before - after) * step.frame.alpha / step.frame.sigma**2


def test_the_gradient_is_the_slope_of_the_loss_along_any_direction(model):
    """Central differences over x of the first guided step, through the model and its guidance."""
    seen, moves = [], {}

    def moved(by):
        def pre_step(step):
            if step.index == 1:
                step.x["edit"] = step.x["edit"] + by * direction(step.x["edit"])

        losses = []
        say = plugin(
            pre_step=pre_step,
            denoised=lambda step: losses.append(loss_of(step.x0["edit"].double())),
        )
        run(model, say)
        return losses[1].sum().double()

    def direction(x):
        return target(x, 11).expand_as(x) / x[0].numel() ** 0.5

    run(model, objective(active=[1], seen=seen))
    g = gradient_of([s for s in seen if s[0].index == 1])
    moves["ours"] = (g * direction(g)).sum()
    h = 0.2  # over all elements together
    moves["numeric"] = (moved(h) - moved(-h)) / (2 * h)
    torch.testing.assert_close(moves["ours"].double(), moves["numeric"], rtol=2e-2, atol=1e-3)


def test_through_x0_takes_the_prediction_as_it_is(model):
    seen = []
    run(model, objective(through="x0", seen=seen, active=[1]))
    step, before, _ = next(s for s in seen if s[0].index == 1)
    slope = target(before) + 0.2 * before  # of loss_of, by hand
    torch.testing.assert_close(
        gradient_of([s for s in seen if s[0].index == 1]), slope / step.frame.alpha,
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def test_losses_of_all_plugins_are_summed(model):
    alone, together = [], []
    run(model, objective(3.0, seen=alone, active=[1]))
    run(model, objective(1.0, active=[1]), objective(2.0, seen=together, active=[1]))
    one, two = (gradient_of([s for s in seen if s[0].index == 1]) for seen in (alone, together))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_one_forward_per_step_whatever_is_asked(model):
    calls = []
    denoiser = inlay.Session(model[0]).backbone.denoiser
    handle = denoiser.register_forward_hook(lambda *_: calls.append(1))
    run(model)
    plain = len(calls)
    run(model, objective(), objective(through="x0"))
    handle.remove()
    assert len(calls) == 2 * plain


def test_a_loss_that_is_a_constant_moves_nothing(model):
    flat = objective(loss=lambda x0, weight: torch.ones(x0.shape[0]))
    assert torch.equal(run(model, flat).latents["edit"], run(model).latents["edit"])


def test_each_picture_has_its_own_gradient(model):
    """Two pictures move as each alone would: losses are summed over the batch, not averaged."""
    both = run(model, objective(10.0), n=2).latents["edit"]
    noise = inlay.Session(model[0]).backbone.latent(2, (32, 32), torch.Generator().manual_seed(3))
    for i in range(2):
        one = run(model, objective(10.0), noise={"edit": noise[i : i + 1]}).latents["edit"]
        torch.testing.assert_close(both[i : i + 1], one, rtol=1e-3, atol=1e-4)


def test_nothing_stays_in_the_graph(model):
    grads = []

    def look(step):
        tensors = (step.x["edit"], step.output["edit"], step.x_next["edit"], *step.preds.values())
        grads.extend(t.requires_grad for t in (*tensors, step.x0["edit"]))

    run(model, objective(), plugin(post_step=look))
    assert grads and not any(grads)


@pytest.mark.parametrize("failing", [False, True])
def test_weights_ask_for_gradients_again_afterwards(model, failing):
    def fail(step):
        if failing:
            raise RuntimeError("out of luck")

    denoiser = inlay.Session(model[0]).backbone.denoiser
    asked = []
    watch = plugin(
        pre_step=lambda: asked.append(any(p.requires_grad for p in denoiser.parameters()))
    )
    try:
        run(model, watch, objective(), plugin(post_step=fail), gradient={"checkpoint": True})
    except RuntimeError:
        assert failing
    assert not any(asked)
    assert all(p.requires_grad for p in denoiser.parameters())
    assert not denoiser.is_gradient_checkpointing


def test_checkpointing_changes_no_gradient(model):
    plain = run(model, objective()).latents["edit"]
    recomputed = run(model, objective(), gradient={"checkpoint": True}).latents["edit"]
    torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


def test_the_policy_acts_on_the_sum_picture_by_picture(model):
    def slope(**policy):
        seen = []
        run(model, objective(active=[1], seen=seen), gradient=policy, n=2)
        return gradient_of([s for s in seen if s[0].index == 1]).flatten(1)

    plain = slope()
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(slope(scale=3.0), 3 * plain, **close)
    unit = slope(normalize=True)
    torch.testing.assert_close(unit.square().mean(1), torch.ones(2), **close)
    torch.testing.assert_close(unit, plain / plain.square().mean(1, True).sqrt(), **close)
    limit = float(plain.norm(dim=1).mean())
    clipped = slope(clip=limit).norm(dim=1)
    torch.testing.assert_close(clipped, plain.norm(dim=1).clamp_max(limit), **close)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named_or_skipped(model, value):
    broken = objective(loss=lambda x0, weight: (x0 * value).flatten(1).sum(1))
    with pytest.raises(
        ModelError, match=r"objective, lane edit, step \d: the gradient is not finite"
    ):
        run(model, broken)
    skipped = run(model, broken, gradient={"on_nonfinite": "skip"}).latents["edit"]
    torch.testing.assert_close(skipped, run(model).latents["edit"], rtol=1e-4, atol=1e-5)


def test_losses_rest_while_the_signal_is_weak():
    asked = Experiment(prompt=Prompt("", "a", "b"), steps=10, size=[32, 32])
    session = inlay.Session(flux(), {"p": objective()})
    plan = session.plan(asked, None, [])
    assert min(plan.grads[0].steps) > 0  # a flow model starts at alpha 0
    first = min(plan.grads[0].steps)
    assert f"p: loss of edit through model, steps {first}-9" in str(plan)
    asked.gradient = Gradient(alpha_min=0.5)
    assert min(session.plan(asked, None, []).grads[0].steps) > first


def test_losses_are_said_in_declared_steps_only(model):
    said = []

    def say(step, lane):
        said.append(step.index)
        return loss_of(step.x0[lane])

    first = plugin(declare=lambda need: need.grad("edit", active=[2]), objective=say)
    run(model, first, objective())
    assert said == [2]


def test_a_lane_that_is_not_there_has_no_loss(model):
    lost = plugin(declare=lambda need: need.grad("other"), objective=lambda step, lane: None)
    with pytest.raises(PlanConflict, match="p0 acts on 'other', which is not there"):
        run(model, lost)


VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range")


@pytest.mark.parametrize("kind", VARIANCES)
def test_the_variance_is_the_schedulers_own(kind):
    scheduler = DDPMScheduler(variance_type=kind, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    frames = inlay.tabulate(scheduler)
    output = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps[:-1]):
        own = scheduler._get_variance(t, output[:, 3:] if "learned" in kind else None)
        own = own.exp() if kind in ("fixed_small_log", "fixed_large_log", "learned_range") else own
        if kind == "fixed_small_log":  # exp(0.5 log) there: the deviation
            own = scheduler._get_variance(t) ** 2
        ours = variance(kind, frames[i], frames[i + 1], output, output[:, :3])
        torch.testing.assert_close(ours, own.to(ours), rtol=1e-3, atol=1e-7)


def test_apply_mean_moves_the_next_latent_by_the_variance_times_the_gradient():
    """x_next of the guided run = that of the plain one - Sigma g, in the first guided step."""
    moved, seen = {}, []

    def keep(name):
        return plugin(post_step=lambda step: moved.setdefault(name, (step, step.x_next["edit"])))

    model = pixel(), None
    run(model, keep("plain"))
    run(model, objective(20.0), keep("guided"), gradient={"apply": "mean", "alpha_min": 0.0})
    run(model, objective(20.0, seen=seen), gradient={"alpha_min": 0.0})
    step, latent = moved["guided"]
    sigma = variance("learned_range", step.frame, step.next_frame, step.output["edit"], latent)
    expected = moved["plain"][1] - sigma * gradient_of(seen)
    torch.testing.assert_close(latent, expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(latent, moved["plain"][1], atol=1e-4)


def test_apply_mean_needs_a_scheduler_with_a_variance():
    with pytest.raises(ConfigError, match=r"gradient\.apply: .* has no variance to move the mean"):
        run((stable_diffusion(), None), objective(), gradient={"apply": "mean"})


@pytest.mark.parametrize(
    "wrong", [{"apply": "noise"}, {"through": "vae"}, {"on_nonfinite": "ignore"}]
)
def test_policies_that_are_unknown_are_refused(wrong):
    with pytest.raises(ConfigError, match=rf"gradient\.{next(iter(wrong))}: .* cannot be used"):
        Gradient(**wrong)


def test_a_learned_variance_survives_a_moved_x0():
    """The scheduler adds the noise that the model asked for, whatever x0 became."""
    seen = []
    model = pixel(), None

    def look(step):
        seen.append((step.output["edit"][:, 3:], step.x0["edit"]))

    run(model, objective(20.0), plugin(post_step=look))
    assert all(output.shape[1] == 3 and x0.shape[1] == 3 for output, x0 in seen)
