"""The loop: which event comes when, what a plugin may change, which rows are evaluated."""

import pytest
import torch

import inlay
from inlay import PluginError
from models import conds, flux, stable_diffusion
from spies import Editor, Spy, plugin

STEPS = 4


@pytest.fixture(scope="module")
def pipe():
    return flux()


@pytest.fixture(scope="module")
def sd():
    return stable_diffusion()


def run(pipe, plugins=None, scheduler=None, session=None, **options):
    session = session or inlay.Session(pipe, plugins, scheduler)
    given = {"conds": conds(pooled=hasattr(pipe, "transformer")), "steps": STEPS, "seed": 3}
    return session.run(**given | options)


def flow_of(pipe, plugins=None, **options):
    return run(pipe, plugins, **options).latents["edit"]


# order of events ------------------------------------------------------------------------------


def test_events_come_in_the_order_of_the_loop(pipe):
    spy = Spy()
    run(pipe, {"spy": spy}, steps=2)
    step = ["pre_step", "inputs", "combine", "denoised", "post_step", "observe"]
    events = ["declare", "prepare", "begin", *step, *step, "final"]
    assert [event for _, event, _ in spy.log] == events
    assert [place for _, event, place in spy.log if event == "post_step"] == [0, 1]
    assert ("spy", "prepare", ["edit/text"]) in spy.log
    assert ("spy", "final", ["edit"]) in spy.log


def test_true_guidance_calls_the_model_as_the_stock_pipelines_do(pipe, sd):
    """FLUX evaluates text and null in two calls, a U-Net both in one, null first."""
    spy = Spy()
    run(pipe, {"spy": spy}, steps=1, true_cfg=2.0)
    assert [p for _, event, p in spy.log if event == "inputs"] == [("edit/text",), ("edit/null",)]
    spy = Spy()
    run(sd, {"spy": spy}, steps=1, guidance=7.5)
    assert [p for _, event, p in spy.log if event == "inputs"] == [("edit/null", "edit/text")]


def test_plugins_run_in_the_order_they_are_listed(pipe):
    log = []
    names = ["c", "a", "b"]
    run(pipe, {name: Spy(log, name) for name in names}, steps=1)
    for event in ("declare", "prepare", "begin", "pre_step", "denoised", "post_step", "final"):
        assert [name for name, e, _ in log if e == event] == names


def test_live_plugins_keep_their_place_among_registered_ones(pipe):
    first = plugin(post_step=lambda step: None)
    last = plugin(post_step=lambda step: None)
    session = inlay.Session(pipe, {"first": first, "paste_back": {}, "last": last})
    assert list(session.plugins) == ["first", "paste_back", "last"]


def test_a_solver_with_two_evaluations_per_step_tells_them_apart(sd):
    steps = []
    watch = plugin(observe=lambda step: steps.append((step.index, step.eval, step.last_eval)))
    run(sd, {"watch": watch}, "HeunDiscreteScheduler", steps=3, guidance=1.0)
    heun = [(0, 0, False), (0, 1, True), (1, 2, False), (1, 3, True), (2, 4, True)]
    assert steps == heun


# folds ----------------------------------------------------------------------------------------


def test_pre_step_replaces_x_before_the_forward(pipe):
    seen = []

    def pre_step(step):
        step.x["edit"] = torch.zeros_like(step.x["edit"])

    write = plugin(
        pre_step=pre_step, inputs=lambda kwargs: seen.append(kwargs["hidden_states"].abs().max())
    )
    run(pipe, {"write": write}, steps=1)
    assert float(seen[0]) == 0


def test_begin_replaces_the_initial_latent(pipe):
    def begin(run, x):
        assert torch.equal(x["edit"], run.x_T["edit", "edit"])
        x["edit"] = x["edit"] * 0.5

    x = {}
    write = plugin(begin=begin, observe=lambda step: x.setdefault("first", step.x["edit"]))
    run(pipe, {"write": write}, steps=1)
    plain = {}
    watch = plugin(observe=lambda step: plain.setdefault("first", step.x["edit"]))
    run(pipe, {"watch": watch}, steps=1)
    assert torch.equal(x["first"], plain["first"] * 0.5)


def test_folds_see_what_earlier_plugins_wrote(pipe):
    def add(step):
        step.x_next["edit"] = torch.zeros_like(step.x_next["edit"]) + 1

    def triple(step):
        step.x_next["edit"] = step.x_next["edit"] * 3

    one, three = plugin(post_step=add), plugin(post_step=triple)
    x = flow_of(pipe, {"one": one, "three": three}, steps=1)
    assert torch.equal(x, torch.full_like(x, 3.0))
    y = flow_of(pipe, {"three": three, "one": one}, steps=1)
    assert torch.equal(y, torch.ones_like(y))


def test_x0_that_is_written_reaches_the_scheduler(pipe, sd):
    """A constant x0 at every step ends there; DDIM's last level keeps a little noise (0.03)."""

    def denoised(step):
        step.x0["edit"] = torch.full_like(step.x["edit"], 0.25)

    for model in (pipe, sd):
        x = flow_of(model, {"write": plugin(denoised=denoised)}, guidance=1.0)
        torch.testing.assert_close(x, torch.full_like(x, 0.25), rtol=0, atol=0.15)


def test_x0_that_is_only_read_moves_no_bit(pipe, sd):
    read = plugin(denoised=lambda step: step.x0["edit"].abs().max())
    for model in (pipe, sd):
        assert torch.equal(flow_of(model, {"read": read}), flow_of(model))


def test_x0_is_the_frames_estimate_at_every_event(pipe):
    def check(step):
        expected = step.frame.x0(step.output["edit"], step.x["edit"])
        torch.testing.assert_close(step.x0["edit"], expected)
        seen.append(step.eval)

    seen = []
    for event in ("denoised", "post_step", "observe"):
        run(pipe, {"watch": plugin(**{event: check})})
    assert seen == [*range(STEPS)] * 3


def test_inputs_change_what_the_model_is_given(pipe):
    def inputs(kwargs):
        kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"] * 0

    assert not torch.allclose(flow_of(pipe, {"mute": plugin(inputs=inputs)}), flow_of(pipe))


def test_combine_has_one_owner_and_its_tensor_is_stepped(sd):
    """Returning the text prediction alone is what guidance 1 computes."""
    own = plugin(combine=lambda text, null: text if null is not None else None)
    x = flow_of(sd, {"own": own}, guidance=7.5)
    torch.testing.assert_close(x, flow_of(sd, guidance=1.0), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(x, flow_of(sd, guidance=7.5), atol=1e-3)
    late = plugin(combine=lambda text: text * 0)
    assert torch.equal(flow_of(sd, {"own": own, "late": late}, guidance=7.5), x)


def test_final_replaces_pictures(pipe):
    def final(result):
        result.images["edit"] = result.images["edit"] * 0 + 0.5

    result = run(pipe, {"grey": plugin(final=final)})
    assert torch.equal(result.images["edit"], torch.full_like(result.images["edit"], 0.5))


# observers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["x", "x0", "x_next", "output", "preds"])
def test_observers_cannot_write(pipe, what):
    def observe(step):
        branch = "edit/text" if what == "preds" else "edit"
        getattr(step, what)[branch] = torch.zeros(1)

    with pytest.raises((TypeError, PluginError)):
        run(pipe, {"rogue": plugin(observe=observe)}, steps=1)


def test_observers_see_the_step_as_it_was_and_as_it_became(pipe):
    before, after = [], []

    def post_step(step):
        step.x_next["edit"] = step.x_next["edit"] + 1

    def observe(step):
        before.append(step.x["edit"].clone())
        after.append(step.x_next["edit"].clone())

    watch = plugin(post_step=post_step, observe=observe)
    x = flow_of(pipe, {"watch": watch})
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after, strict=False))
    assert torch.equal(after[-1], x)


def test_the_callback_follows_the_run(pipe):
    events = []
    run(pipe, {"gain": Editor(active=[1, 2])}, callback=events.append)
    assert events[0] == {"kind": "pass", "pass": "edit", "steps": STEPS}
    steps = events[1:-1]
    assert [e["step"] for e in steps] == [0, 1, 2, 3]
    assert [e["active"] for e in steps] == [[], ["gain"], ["gain"], []]
    assert [e["sigma"] for e in steps] == sorted((e["sigma"] for e in steps), reverse=True)
    assert events[-1] == {"kind": "done"}


# lanes ----------------------------------------------------------------------------------------


def lanes(**source):
    """A plugin with a lane `source` and a count of the rows of each model call."""
    made = plugin(
        declare=lambda need: need.lane("source", prompt="source", **source),
        inputs=lambda step, rows: made.rows.append((step.index, tuple(rows))),
    )
    made.rows = []
    return made


def test_a_second_lane_rides_in_the_same_call(pipe):
    made = lanes(seed=9)
    result = run(pipe, {"lanes": made})
    assert made.rows == [(i, ("source/text", "edit/text")) for i in range(STEPS)]
    assert set(result.images) == set(result.latents) == {"source", "edit"}


def test_a_lane_is_solved_as_if_it_were_alone(pipe):
    """Same prompt embedding, same seed: the lane beside another ends where it ends alone."""
    given = conds()
    alone = run(pipe, seed=9, conds={"edit": given["source"]}).latents["edit"]
    beside = run(pipe, {"lanes": lanes(seed=9)}).latents["source"]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)


def test_rows_outside_a_window_cost_nothing(pipe):
    """A lane with its own trajectory runs to the end once it began; one that follows may skip."""
    made = lanes(active=[2])
    result = run(pipe, {"lanes": made})
    both, one = ("source/text", "edit/text"), ("edit/text",)
    assert made.rows == [(0, one), (1, one), (2, both), (3, both)]
    made = lanes(active=[0, 2], follows=True)
    result = run(pipe, {"lanes": made})
    assert made.rows == [(0, both), (1, one), (2, both), (3, one)]
    assert "source" not in result.latents


def test_dead_rows_can_be_kept_for_comparison(pipe):
    made = lanes(active=[0, 2], follows=True)
    session = inlay.Session(pipe, {"lanes": made}, skip_dead_rows=False)
    run(pipe, session=session)
    assert made.rows == [(i, ("source/text", "edit/text")) for i in range(STEPS)]


def test_windows_of_one_lane_merge_by_union(pipe):
    made = lanes(active=[0], follows=True, seed=1)
    other = plugin(
        declare=lambda need: need.lane("source", prompt="source", active=[3], follows=True, seed=1)
    )
    run(pipe, {"lanes": made, "other": other})
    assert [i for i, rows in made.rows if len(rows) == 2] == [0, 3]


@pytest.mark.parametrize("scheduler", [None, "UniPCMultistepScheduler"])
def test_a_late_lane_starts_its_solver_at_its_own_index(pipe, scheduler):
    """From the same x at step 2, a lane that starts there ends where the whole lane ends."""
    at = {}
    keep = plugin(observe=lambda step: at.setdefault(step.index, step.x["edit"].clone()))
    options = {"conds": {"edit": conds()["edit"], "source": conds()["edit"]}}
    whole = run(pipe, {"keep": keep}, scheduler, **options).latents["edit"]

    def pre_step(step):
        if step.index == 2:
            step.x["source"] = at[2]

    late = lanes(active=[2, 3])
    write = plugin(pre_step=pre_step)
    result = run(pipe, {"late": late, "write": write}, scheduler, **options)
    exact = scheduler is None  # a multi-step solver starts again with first order
    tolerance = 1e-5 if exact else 0.2
    torch.testing.assert_close(result.latents["source"], whole, rtol=tolerance, atol=tolerance)
    assert exact or not torch.equal(result.latents["source"], whole)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_lane_that_skips_steps_is_scaled_for_the_step_it_is_in(sd, scheduler):
    """Euler divides the model's input by hypot(sigma, 1): that of the step, not of a counter."""
    seen = []

    def inputs(step, rows, kwargs):
        if "source/text" in rows:
            given = kwargs["sample"][rows["source/text"]]
            scale = (step.frame.sigma**2 + 1).sqrt()
            torch.testing.assert_close(given * scale, step.x["source"], rtol=1e-5, atol=1e-5)
            seen.append(step.index)

    def pre_step(run, step):
        step.x["source"] = run.x_T["edit", "source"] * step.frame.sigma

    follow = plugin(
        declare=lambda need: need.lane("source", prompt="source", active=[0, 2, 3], follows=True),
        pre_step=pre_step,
        inputs=inputs,
    )
    run(sd, {"follow": follow}, scheduler, guidance=1.0)
    assert seen == [0, 2, 3]


def test_n_pictures_are_the_rows_of_one_draw(pipe):
    """The stock pipeline draws n latents at once: n = 2 is one draw of twice the size."""
    two = run(pipe, n=2)
    assert two.latents["edit"].shape[0] == two.images["edit"].shape[0] == 2
    assert not torch.equal(two.latents["edit"][0], two.latents["edit"][1])


def test_lanes_may_have_different_guidance(pipe, sd):
    """FLUX embeds each row's own scale; a U-Net's lane at 1 has no null row at all."""
    scales = []
    watch = plugin(
        declare=lambda need: need.lane("source", prompt="source"),
        inputs=lambda kwargs: scales.append(kwargs["guidance"].tolist()),
    )
    run(pipe, {"watch": watch}, guidance={"source": 1, "edit": 3.5}, steps=1)
    assert scales == [[1.0, 3.5]]
    made = lanes()
    run(sd, {"lanes": made}, guidance={"source": 1.0, "edit": 7.5}, steps=1)
    assert made.rows == [(0, ("source/text", "edit/null", "edit/text"))]


def test_a_pass_before_the_edit_leaves_its_end_to_the_edit(pipe):
    def declare(need):
        need.pass_("generate")
        need.lane("source", pass_="generate", prompt="source", seed=9)

    seen = {}

    def begin(run, pass_, x):
        seen[pass_] = (sorted(x), {k: sorted(v) for k, v in run.finals.items()})

    events = []
    result = run(pipe, {"two": plugin(declare=declare, begin=begin)}, callback=events.append)
    assert seen["generate"] == (["source"], {})
    assert seen["edit"] == (["edit"], {"generate": ["source"]})
    assert [e["pass"] for e in events if e["kind"] == "pass"] == ["generate", "edit"]
    given = conds()
    alone = run(pipe, seed=9, conds={"edit": given["source"]}).latents["edit"]
    assert torch.equal(result.latents["source"], alone)


# noise ----------------------------------------------------------------------------------------


def noisy(store):
    def prepare(run):
        store.append(run.noise("grain", (2, 3)))
        store.append(torch.randn(3, generator=run.rng("noisy", "other")))

    return plugin(prepare=prepare)


def test_another_plugin_never_moves_a_plugins_noise(pipe):
    alone, beside, seeded = [], [], []
    greedy = plugin(prepare=lambda run: torch.randn(99, generator=run.rng("greedy")))
    x = flow_of(pipe, {"noisy": noisy(alone)})
    y = flow_of(pipe, {"greedy": greedy, "noisy": noisy(beside), "more": noisy([])})
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
    assert torch.equal(x, y)
    run(pipe, {"noisy": noisy(seeded)}, seed=4)
    assert not any(torch.equal(a, b) for a, b in zip(alone, seeded, strict=True))


def test_any_noise_can_be_injected_by_name(pipe):
    grain, start = torch.full((2, 3), 7.0), {}
    store = []
    made = noisy(store)
    watch = plugin(begin=lambda x: start.update(x))
    given = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(1))
    noise = {"grain": grain, "edit": given}
    run(pipe, {"noisy": made, "watch": watch}, noise=noise, size=32, steps=1)
    assert torch.equal(store[0], grain)
    assert torch.equal(start["edit"], given)


# precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [flux, stable_diffusion])
def test_half_precision_runs_on_the_cpu_and_stays_finite(family, dtype):
    pipe = family().to(dtype)
    editor = Editor("scale", options={"keys": "all", "weight": 1.2, "renorm": True})
    result = run(pipe, {"edit": editor})
    assert result.latents["edit"].dtype == dtype
    assert torch.isfinite(result.images["edit"]).all()
    assert result.manifest["dtype"] == str(dtype).removeprefix("torch.")
