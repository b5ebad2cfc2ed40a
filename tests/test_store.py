"""Lanes recorded once and replayed: equal results, fewer rows, and no answer for another source."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import save_file

import inlay
from inlay import ConfigError, InputError, PlanConflict
from inlay.cli.experiment import execute, planned
from inlay_attention import Store
from inlay_config.config import Experiment, Prompt, load
from models import conds, flux, stable_diffusion
from spies import Editor, plugin

OPS = {
    "append": {"from_": "source", "keys": "image", "gain": 1.3},
    "align": {"from_": "source", "keys": "image"},
    "route qk": {"qk": "source"},
    "route kv": {"kv": "source"},
    "mix": {"from_": "source", "keys": "image", "alpha": 0.4},
}
MODELS = {"flux": flux, "sd": stable_diffusion}


def source(need):
    need.lane("source", prompt="source", n=1, seed=9, keep=False)


def session(pipe, kind="append", store=None, **editor):
    op, options = kind.split()[0], dict(OPS[kind])
    how = {"how": "join"} if op == "append" else {}
    editor = Editor(op, options=options | how, **{"select": {"kind": ("self", "joint")}} | editor)
    return inlay.Session(pipe, {"source": plugin(declare=source), "edit": editor}, store=store)


def run(made, prompt="edit", **options):
    """The edit lane's last latent under one of the three random prompts."""
    given = conds(pooled=made.backbone.name == "flux")
    given["edit"] = given[prompt]
    options = {"steps": 3, "size": 32, "seed": 3, "guidance": 2.0} | options
    return made.run(conds=given, **options).latents["edit"]


@pytest.fixture(scope="module", params=MODELS)
def pipe(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("kind", OPS)
def test_a_replay_equals_the_batch(pipe, kind):
    store, plain = Store(), session(pipe, kind)
    expected = {prompt: run(plain, prompt) for prompt in ("edit", "negative")}
    stored = session(pipe, kind, store)
    assert torch.equal(run(stored), expected["edit"])  # recording changes nothing
    assert store.tensors
    for prompt, latent in expected.items():
        torch.testing.assert_close(run(stored, prompt), latent, rtol=0, atol=2e-5)
    assert not torch.allclose(expected["edit"], expected["negative"], atol=1e-3)


def test_a_replay_evaluates_the_edit_alone(pipe):
    calls = []
    shared = {"options": OPS["append"] | {"how": "join"}, "select": {"kind": ("self", "joint")}}
    plugins = {
        "source": plugin(declare=source),
        "edit": Editor("append", **shared),
        "count": plugin(inputs=lambda rows: calls.extend(rows)),
    }
    store = Store()
    run(inlay.Session(pipe, plugins, store=store))
    recorded = list(calls)
    calls.clear()
    run(inlay.Session(pipe, plugins, store=store))
    assert {name.split("/")[0] for name in recorded} == {"source", "edit"}
    assert calls == [name for name in recorded if name.startswith("edit")]


def test_the_plan_counts_what_is_stored_and_what_is_left_to_do(pipe):
    store, asked = Store(), Experiment(prompt=Prompt("a", "b", "c"), steps=3, size=[32, 32])
    before = session(pipe, store=store).plan(asked, None, [])
    run(session(pipe, store=store), guidance=3.5)
    after = session(pipe, store=store).plan(asked, None, [])
    rows = sum(b.n for b in before.passes[0].branches if b.lane == "source")
    assert before.evaluations["edit"] - after.evaluations["edit"] == rows * asked.steps
    kept = [t.nbytes for key, t in store.tensors.items() if key.split("/")[4] in ("k", "v")]
    exact = hasattr(pipe, "unet")  # joint sites are counted with the longest prompt
    assert before.memory["store"] == sum(kept) if exact else before.memory["store"] > sum(kept)


def test_a_file_holds_it_all(pipe, tmp_path):
    path = str(tmp_path / "deep" / "source.safetensors")
    expected = run(session(pipe, "mix", Store(path)))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["source.safetensors"]
    again = Store(path)
    assert again.facts
    torch.testing.assert_close(run(session(pipe, "mix", again)), expected, rtol=0, atol=2e-5)


def test_half_precision_is_half_as_large_and_close(pipe):
    full, half = Store(), Store(dtype="bfloat16")
    expected = run(session(pipe, store=full))
    run(session(pipe, store=half))
    keys = [key for key in full.tensors if key.split("/")[4] in ("k", "v")]
    assert all(2 * half.tensors[key].nbytes == full.tensors[key].nbytes for key in keys)
    close = run(session(pipe, store=half))
    torch.testing.assert_close(close, expected, rtol=0, atol=0.05)
    assert not torch.equal(close, expected)


def test_more_sites_and_steps_may_be_kept_for_later_edits(pipe):
    """Recorded under one plugin, replayed under another that takes more."""
    plain = inlay.Session(
        pipe, {"source": plugin(declare=source)}, store=(store := Store(sites="*"))
    )
    run(plain)
    expected = run(session(pipe, "route qk"))
    torch.testing.assert_close(run(session(pipe, "route qk", store)), expected, rtol=0, atol=2e-5)


def test_what_was_not_kept_is_missed_by_name(pipe):
    store = Store()
    run(session(pipe, "route kv", store, active=[0]))
    with pytest.raises(InputError, match=r"store: it holds no edit/source/.*/1/k/.*Record anew"):
        run(session(pipe, "route kv", store))


def test_what_is_read_of_a_stored_lane_is_kept_too(pipe):
    def declare(need):
        source(need)
        need.probe("seen", "source/text", (0, 2), need.select(kind=("cross", "joint")))

    read = []
    reader = plugin(declare=declare, post_step=lambda step: read.append(step.probes["seen"]))
    store = Store()
    for _ in range(2):
        run(inlay.Session(pipe, {"reader": reader}, store=store))
    first, second = read[:3], read[3:]
    for before, after in zip(first, second, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[site], after[site]) for site in before)


def test_a_store_never_answers_for_another_source(pipe):
    store = Store()
    run(session(pipe, store=store))
    other = flux(1) if hasattr(pipe, "transformer") else stable_diffusion(1)
    wrong = {
        "model": lambda: run(session(other, store=store)),
        "size": lambda: run(session(pipe, store=store), size=48),
        "steps": lambda: run(session(pipe, store=store), steps=4),
    }
    for name, act in wrong.items():
        with pytest.raises(InputError, match=f"store: recorded with {name} .*, this run has .*"):
            act()
    with pytest.raises(InputError, match=r"recorded with prompt of edit/source/(null|text) "):
        made = session(pipe, store=store)
        made.run(conds=conds(8, pooled=made.backbone.name == "flux"), steps=3, size=32, seed=3)
    moved = plugin(declare=lambda need: need.lane("source", prompt="source", seed=10, keep=False))
    with pytest.raises(InputError, match="step 0: lane source is not where it was"):
        run(inlay.Session(pipe, {"source": moved}, store=store))
    torch.testing.assert_close(  # and is as good as before
        run(session(pipe, store=store)), run(session(pipe)), rtol=0, atol=2e-5
    )


def test_scheduler_and_dtype_are_facts_too():
    pipe, store = stable_diffusion(), Store()
    run(session(pipe, store=store))
    editor = Editor("append", options=OPS["append"] | {"how": "join"})
    plugins = {"source": plugin(declare=source), "edit": editor}
    with pytest.raises(InputError, match="recorded with scheduler DDIMScheduler"):
        run(inlay.Session(pipe, plugins, EulerDiscreteScheduler(), store=store))
    with pytest.raises(InputError, match=r"recorded with dtype torch\.float32"):
        run(session(pipe.to(torch.bfloat16), store=store))


def test_a_small_budget_is_refused_before_the_first_step(pipe):
    evaluated = []
    made = session(pipe, store=Store(budget="1 KiB"))
    made.backbone.denoiser.register_forward_hook(lambda *_: evaluated.append(1))
    with pytest.raises(ConfigError, match=r"store.budget: [\d,]+ bytes are more than .* 1,024"):
        run(made)
    assert not evaluated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "much"}, "store.budget: 'much' is no size"),
        ({"dtype": "float8"}, "store.dtype: 'float8' cannot be used"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Store(**options)


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_file_that_is_no_store_is_refused(tmp_path, content):
    path = tmp_path / "source.safetensors"
    if content is None:
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"store.path: .* is no store"):
        Store(str(path))


def test_a_run_that_fails_leaves_the_store_empty(pipe, tmp_path):
    def fail(step):
        if step.index == 2:
            raise RuntimeError("out of luck")

    path = tmp_path / "source.safetensors"
    store = Store(str(path))
    broken = plugin(post_step=fail)
    plugins = {"source": plugin(declare=source), "broken": broken}
    with pytest.raises(RuntimeError, match="out of luck"):
        run(inlay.Session(pipe, plugins, store=store))
    assert not store.facts
    assert not store.tensors
    assert not path.exists()


def test_a_lane_that_depends_on_the_edit_cannot_be_stored(pipe):
    options = OPS["append"] | {"from_": "edit", "how": "join"}
    plugins = {
        "source": plugin(declare=source),
        "edit": Editor("append", "source", options=options),
    }
    with pytest.raises(PlanConflict, match="lets lane source depend on the edit"):
        run(inlay.Session(pipe, plugins, store=Store()))


def test_an_experiment_records_its_source_in_a_file_and_replays_it(tmp_path):
    """Add-it with two prompts on one drawn source; the second draws nothing of it."""
    path = tmp_path / "source.safetensors"
    overrides = ["size=32", "steps=6", f"store.path={path}", "prompt.source=a road", "subject=cow"]
    rows = {}
    for prompt in ("a cow on the road", "a brown cow on the road"):
        exp = load("addit", [*overrides, f"prompt.edit={prompt}"])
        rows[prompt] = planned(exp)[1].evaluations
        stored = execute(exp).latents["edit"]
        exp.store.path = None
        torch.testing.assert_close(stored, execute(exp).latents["edit"], rtol=0, atol=1e-4)
    first, second = rows.values()
    assert second["source"] == 0 < first["source"]
    assert second["edit"] == 5 * 2 < first["edit"]  # text and null; step 0 is overwritten
    assert path.stat().st_size > 0
