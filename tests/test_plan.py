"""The plan: what is decided before the first step, and every conflict that is refused there."""

from functools import cache, partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import inlay
from folders import save_flux
from inlay import ConfigError, InputError, PlanConflict, Window, backbones
from inlay.backbones import adapt
from inlay.cli.experiment import plan_experiment, planned
from inlay.cli.words import find_words, words_data, words_table
from inlay_config import config
from inlay_config.config import Experiment, Prompt
from models import (
    conds,
    flux,
    instruct_pix2pix,
    mimicbrush,
    paint_by_example,
    pixel,
    stable_diffusion,
)
from spies import Editor, plugin


@pytest.fixture(scope="module")
def pipe():
    return flux()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("model") / "flux")


def plan(pipe, plugins, steps=4, inputs=(), skip_dead_rows=True, **fields):
    prompt = Prompt(source="a road", edit="a dog on a road")
    asked = Experiment(prompt=prompt, steps=steps, size=[32, 32], **fields)
    session = inlay.Session(pipe, plugins, skip_dead_rows=skip_dead_rows)
    return session.plan(asked, None, list(inputs))


def declare(f):
    return plugin(declare=f)


def lane(**fields):
    return declare(lambda need: need.lane("source", prompt="source", **fields))


# windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (2, [0, 1, 2]),
        ([3, 5], [3, 4, 5]),
        ([0.0, 0.5], [0, 1, 2, 3, 4]),
        ([0.35, 1.0], [4, 5, 6, 7, 8, 9]),
        (0.3, [0, 1, 2]),
        ({"start": 0.8}, [8, 9]),
        ([0.5, 0.5], []),
    ],
)
def test_a_window_is_steps_or_progress(value, steps):
    assert list(Window.parse(value, "plugins.p.active").steps(10)) == steps


@pytest.mark.parametrize("off", [None, -1])
def test_a_window_may_be_off(off):
    assert Window.parse(off, "plugins.p.active") is None


@pytest.mark.parametrize(
    "value", [[5, 3], [0.2, 1.5], [-2, 3], float("nan"), "early", [1], [0, 1, 2], [0.0, None]]
)
def test_a_window_that_is_none_is_refused_with_its_path(value):
    with pytest.raises(ConfigError, match=r"^plugins\.p\.active: "):
        Window.parse(value, "plugins.p.active")


def test_a_window_outside_the_run_is_refused(pipe):
    with pytest.raises(ConfigError, match=r"plugins\.edit: steps 2\.\.9 are outside a run of 4"):
        plan(pipe, {"edit": Editor(active=Window(2, 9))})


# lanes, branches, rows ------------------------------------------------------------------------


def test_rows_are_counted_in_forward_units(pipe):
    """One unit is one row in one step: a following source in 2 of 4 steps makes 6 units."""
    made = plan(pipe, {"lane": lane(active=[0, 1], follows=True)})
    assert made.evaluations == {"edit": 6}
    assert [made.passes[0].rows(i) for i in range(4)] == [2, 2, 1, 1]
    everything = plan(pipe, {"lane": lane(active=[0, 1], follows=True)}, skip_dead_rows=False)
    assert everything.evaluations == {"edit": 8}


def test_a_lane_lives_while_others_attend_to_it(pipe):
    options = {"from_": "source", "keys": "image"}
    edit = Editor("append", options=options, active=[1, 2])
    made = plan(pipe, {"lane": lane(follows=True), "edit": edit})
    source, _ = made.passes[0].lanes
    assert source.steps == (1, 2) and source.owners == ("lane",)


def test_sources_come_first_whoever_declares_first(pipe):
    other = declare(lambda need: need.lane("exemplar", prompt="source"))
    made = plan(pipe, {"other": other, "lane": lane()}, true_cfg=2.0)
    assert [ln.name for ln in made.passes[0].lanes] == ["exemplar", "source", "edit"]
    texts = ("exemplar/text", "source/text", "edit/text")
    assert made.passes[0].groups == (texts, tuple(t.replace("text", "null") for t in texts))


def test_equal_lanes_merge_and_unequal_lanes_are_refused(pipe):
    made = plan(pipe, {"one": lane(seed=3), "two": lane(seed=3)})
    assert made.passes[0].lanes[0].owners == ("one", "two")
    message = r"lane \('edit', 'source'\): one wants seed=3, two seed=4"
    with pytest.raises(PlanConflict, match=message):
        plan(pipe, {"one": lane(seed=3), "two": lane(seed=4)})


def test_passes_run_in_the_order_they_are_declared_and_the_edit_last(pipe):
    def two(need):
        for name in ("second", "first"):
            need.pass_(name)
            need.lane("source", name, prompt="source")

    assert [p.name for p in plan(pipe, {"two": declare(two)}).passes] == ["second", "first", "edit"]


# conflicts ------------------------------------------------------------------------------------


def publish(key):
    return declare(lambda need: need.publish(key))


def consume(key):
    return declare(lambda need: need.consume(key))


def test_two_publishers_of_one_key_are_refused(pipe):
    with pytest.raises(PlanConflict, match="'mask:subject' is published by one and by two"):
        plan(pipe, {"one": publish("mask:subject"), "two": publish("mask:subject")})


def test_a_key_that_nobody_publishes_is_refused(pipe):
    with pytest.raises(PlanConflict, match=r"plugins\.b: b needs 'mask:x', which nobody publishes"):
        plan(pipe, {"a": publish("mask:y"), "b": consume("mask:x")})


def test_a_key_that_is_published_later_is_refused_with_the_right_order(pipe):
    with pytest.raises(
        PlanConflict, match=r"early needs late, which comes later\. Put late above early"
    ):
        plan(pipe, {"early": consume("mask:x"), "late": publish("mask:x")})
    made = plan(pipe, {"late": publish("mask:x"), "early": consume("mask:x")})
    assert made.publishes == {"mask:x": "late"}


def test_what_the_caller_gives_is_published_by_the_input(pipe):
    made = plan(pipe, {"mask": consume("mask:user")}, inputs=["mask"])
    assert made.publishes == {"mask:user": "input", "image:mask": "input"}


def test_after_and_before_are_checked_and_never_reordered(pipe):
    first, second = publish("a:a"), publish("b:b")
    first.after = ("second",)
    with pytest.raises(
        PlanConflict, match=r"first needs second, which comes later\. Put second above first"
    ):
        plan(pipe, {"first": first, "second": second})
    plan(pipe, {"second": second, "first": first})
    first.after, first.before = (), ("second", "absent")
    with pytest.raises(PlanConflict, match="second needs first, which comes later"):
        plan(pipe, {"second": second, "first": first})


def summed(**options):
    options = {"from_": "source", "keys": "image", "how": "sum", **options}
    return Editor("append", options=options)


def test_two_sums_into_the_same_keys_are_refused(pipe):
    message = r"site \S+, step 0, lane edit: one \(append sum\) and two "
    with pytest.raises(PlanConflict, match=message):
        plan(pipe, {"lane": lane(), "one": summed(), "two": summed()})


def test_sums_that_never_meet_compose(pipe):
    one, two = summed(), summed()
    one.active, two.active = [0, 1], [2, 3]
    apart = plan(pipe, {"lane": lane(), "one": one, "two": two})
    assert [sorted(e.steps) for e in apart.edits] == [[0, 1], [2, 3]]
    one, two = summed(), summed()
    one.select, two.select = {"block": ["double"]}, {"block": ["single"]}
    first, second = plan(pipe, {"lane": lane(), "one": one, "two": two}).edits
    assert not first.sites & second.sites
    joined = summed()
    joined.options = joined.options | {"how": "join"}
    both = plan(pipe, {"lane": lane(), "one": summed(), "two": joined})
    assert [e.how for e in both.edits] == ["sum", "join"]


def test_attending_to_a_lane_that_nobody_declares_is_refused(pipe):
    with pytest.raises(PlanConflict, match="edit attends to lane 'source', which nobody declares"):
        plan(pipe, {"edit": summed()})


def test_editing_a_lane_that_nobody_declares_is_refused(pipe):
    with pytest.raises(PlanConflict, match="edit acts on 'ghost', which is not there"):
        plan(pipe, {"edit": Editor(target="ghost")})


def test_reading_a_lane_that_nobody_declares_is_refused(pipe):
    def read(need):
        need.probe("p", "ghost/text", (0,), need.select())

    with pytest.raises(PlanConflict, match="read acts on 'ghost/text', which is not there"):
        plan(pipe, {"read": declare(read)})


@pytest.mark.parametrize("what", ["edit", "probe"])
def test_a_branch_that_the_lane_has_not_is_refused(pipe, what):
    """Without guidance there is no null row: an edit on it would silently do nothing."""

    def ask(need):
        if what == "edit":
            need.edit("gain", "edit/null", need.select())
        else:
            need.probe("p", "edit/null", (0,), need.select())

    with pytest.raises(PlanConflict, match="ask acts on 'edit/null', which is not there"):
        plan(pipe, {"ask": declare(ask)})
    plan(pipe, {"ask": declare(ask)}, true_cfg=2.0)


def test_sites_that_match_nothing_are_refused(pipe):
    edit = Editor(select={"kind": ["cross"]})
    with pytest.raises(
        ConfigError, match=r"plugins\.edit: no attention site of kind .*cross.*joint"
    ):
        plan(pipe, {"edit": edit})


def test_a_site_that_the_model_has_not_is_refused(pipe):
    def ask(need):
        need.edit("gain", "edit", frozenset({"no.such.site"}))

    with pytest.raises(ConfigError, match=r"plugins\.ask: no attention site 'no\.such\.site'"):
        plan(pipe, {"ask": declare(ask)})


def test_a_prompt_that_is_missing_is_refused(pipe):
    asks = declare(lambda need: need.lane("source", prompt="exemplar"))
    with pytest.raises(ConfigError, match=r"prompt\.exemplar: lane 'source' needs the prompt"):
        plan(pipe, {"asks": asks})


def test_an_edit_that_was_not_declared_is_refused_when_emitted(pipe):
    class Rogue(Editor):
        @inlay.hookimpl
        def inlay_attention(self, edits):
            edits.on("edit").scale("all", 2.0)

    session = inlay.Session(pipe, {"rogue": Rogue()})
    message = r"attention, step 0, site \S+: rogue emitted an undeclared edit: scale on edit"
    with pytest.raises(inlay.PluginError, match=message):
        session.run(conds=conds(), steps=1)


def test_edits_are_asked_for_inside_their_windows_only(pipe):
    editor = Editor(active=[1, 3], select={"block": ["single"]})
    inlay.Session(pipe, {"edit": editor}).run(conds=conds(), steps=4)
    names = sorted(n for n in adapt(pipe).modules if n.startswith("single"))
    assert editor.seen == [(step, name) for step in (1, 3) for name in names]


# what it says ---------------------------------------------------------------------------------


def test_the_digest_is_of_the_decisions(pipe):
    first = plan(pipe, {"edit": Editor(active=[0, 1])})
    assert first.digest == plan(flux(seed=5), {"edit": Editor(active=[0, 1])}).digest
    assert len(first.digest) == 16
    others = [
        plan(pipe, {"edit": Editor(active=[0, 2])}),
        plan(pipe, {"edit": Editor("scale", options={}, active=[0, 1])}),
        plan(pipe, {"edit": Editor(active=[0, 1])}, steps=5),
        plan(pipe, {}),
    ]
    assert len({p.digest for p in [first, *others]}) == 5


TABLE = """\
flux, 32x32 px, 4 steps, n = 1

pass edit: 6 forward units, calls [source/text, edit/text]
  lane source: prompt source, n 1, seed 0, guidance 3.5, steps 0-1 (lane)
  lane edit: prompt edit, n 1, seed 0, guidance 3.5, steps 0-3 (core)

attention: 4 sites subscribed
  share: append on edit from source (join), 4 sites, steps 0-1

order of plugins per event
  declare: lane -> share
  attention: share

board: empty
conflicts: none
"""


def test_a_branch_is_under_one_prompt_in_all_passes(pipe):
    def two(need):
        need.pass_("before")
        need.lane("twice", "before", prompt="source")
        need.lane("twice", prompt="edit")

    with pytest.raises(PlanConflict, match=r"passes: a branch has two prompts.*twice/text"):
        plan(pipe, {"two": declare(two)})


def test_the_table_says_it_all(pipe):
    options = {"from_": "source", "keys": "image"}
    share = Editor("append", options=options, active=[0, 1])
    table = str(plan(pipe, {"lane": lane(follows=True), "share": share}))
    text, memory = table.split("memory: ")
    assert text == TABLE
    assert "weights" in memory and "attention" in memory


RECORDED = Path(__file__).parent / "plans"
SHIPPED = [n for n in config.experiments() if not n.startswith(("presets/", "demo"))]
PUBLISHED = {  # described by configurations that ship here: parameters of the denoiser
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 859_520_964,
    "stabilityai/stable-diffusion-xl-base-1.0": 2_567_463_684,
    "stabilityai/stable-diffusion-3-medium-diffusers": 2_028_328_000,
    "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520,
    "stabilityai/stable-diffusion-3.5-large": 8_056_627_520,
    "timbrooks/instruct-pix2pix": 859_532_484,
    "Fantasy-Studio/Paint-by-Example": 859_535_364,
}
TINY = {
    "toybox/ddpm": pixel,
    "256x256_diffusion_uncond.pt": pixel,
    "toybox/sd": stable_diffusion,
    "mimicbrush": mimicbrush,
    "toybox/mimicbrush": mimicbrush,
    "toybox/paint-by-example": paint_by_example,
}
TINY |= {f"toybox/{name}": instruct_pix2pix for name in ("instruct", "magicbrush", "erasedraw")}
PICTURED = {  # experiments that want pictures of the caller's
    "instruct": ["input.image"],
    "instruct_sd15": ["input.image"],
    "magicbrush": ["input.image"],
    "erasedraw": ["input.image"],
    "crop_and_zoom": ["input.image", "input.mask"],
    "ip_adapter": ["plugins.ip_adapter.image"],
    "exemplar": ["input.image", "input.mask", "plugins.exemplar.image"],
    "exemplar_toybox": ["input.image", "input.mask", "plugins.exemplar.image"],
    "exemplar_attention": ["input.image", "input.mask", "plugins.exemplar_attention.image"],
    "mimicbrush": ["input.image", "input.mask", "plugins.imitation.image"],
    "mimicbrush_toybox": ["input.image", "input.mask", "plugins.imitation.image"],
    "blended_image_guided": ["plugins.clip_guidance.images"],
    "blended_piece": ["plugins.scribble.picture"],
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_experiment_is_planned_as_recorded(folder, name, tmp_path):
    """A published model at its own size, others on a tiny one of their kind; no weight is loaded.
    After a change that is meant: write the new table."""
    model, over = config.load(name).model, ["device=cpu"]
    if model in TINY:
        TINY[model]().save_pretrained(folder := tmp_path)
    if model not in PUBLISHED:
        over += [f"model={folder}", "size=32", "scheduler=null"]
    Image.new("RGB", (32, 32)).save(picture := tmp_path / "picture.png")
    over += [f"{key}={picture}" for key in PICTURED.get(name, ())]
    made = plan_experiment(config.load(name, over), partial(config.load, name, over))
    assert str(made) + "\n" == (RECORDED / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_described_whole(name):
    """To the last parameter of its weights, in the type that is asked for."""
    pipe = backbones.skeleton(name, dtype="bfloat16")
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    held = {(p.device.type, p.dtype) for network in networks for p in network.parameters()}
    assert len(networks) >= 3 and held == {("meta", torch.bfloat16)}
    assert sum(p.numel() for p in adapt(pipe).denoiser.parameters()) == PUBLISHED[name]


TEXT_DRIVEN = [
    "source_trajectory", "structure_transfer", "weighted_attention", "subject_mask", "latent_blend",
    "presence", "prompt_to_prompt", "local_blend", "attention_injection", "null_text", "sdedit",
    "flow_edit", "rf_inversion",
]  # fmt: skip


@cache
def experiments():
    return [config.load(name) for name in SHIPPED]


@pytest.mark.parametrize("plugin", TEXT_DRIVEN)
def test_every_text_driven_method_is_there_for_the_toybox_and_for_a_full_size_model(plugin):
    using = {experiment.model for experiment in experiments() if plugin in experiment.plugins}
    assert using & PUBLISHED.keys() and any(model.startswith("toybox/") for model in using)


def test_every_hub_model_of_the_experiments_is_described():
    hub = {experiment.model for experiment in experiments() if "/" in experiment.model}
    assert {model for model in hub if not model.startswith("toybox/")} <= PUBLISHED.keys()


@pytest.mark.parametrize("held", [True, False])
def test_words_are_looked_for_where_there_is_a_tokenizer(folder, held):
    """Else they are said to be unchecked."""
    asked = Experiment(model=str(folder), prompt=Prompt(edit="a dog, a bus"), size=[32, 32])
    asked.plugins = {"reweight": {"words": {"bus": 2.0}}}
    session, made = planned(asked)
    if not held:
        session.backbone.pipe.tokenizer_2 = None
    (word,) = find_words(made, session.backbone)
    assert (word.branch, word.word) == ("edit/text", "bus")
    assert words_data([word])[0]["checked"] is held
    pieces = session.backbone.pieces("a dog, a bus") if held else []
    assert [pieces[i] for i in word.tokens or ()] == list("bus" if held else "")
    assert ("unchecked" in words_table([word])) is not held


def test_a_word_that_is_missing_is_refused_with_its_option(folder):
    asked = Experiment(model=str(folder), prompt=Prompt("a cat", "a dog"), size=[32, 32])
    asked.plugins = {"prompt_to_prompt": {"weights": {"cat": 2.0}, "self_tokens": 1024}}
    session, made = planned(asked)
    with pytest.raises(InputError, match=r"^plugins\.prompt_to_prompt\.weights: 'cat' is not in"):
        find_words(made, session.backbone)


def test_planning_puts_networks_on_the_meta_device(folder):
    pipe = backbones.skeleton(str(folder))
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        assert {p.device.type for p in part.parameters()} == {"meta"}
    assert pipe.tokenizer_2("a dog")["input_ids"]


def test_memory_is_arithmetic_on_the_largest_batch(pipe):
    one, two = plan(pipe, {}), plan(pipe, {"lane": lane()})
    parameters = sum(p.numel() for p in [*pipe.transformer.parameters(), *pipe.vae.parameters()])
    assert one.memory["weights"] == 4 * parameters
    assert two.memory["attention"] == 2 * one.memory["attention"]


def test_a_unet_offers_self_and_cross_sites_at_three_scales():
    sites = adapt(stable_diffusion()).sites
    assert {s.kind for s in sites} == {"self", "cross"}
    assert {s.block for s in sites} == {"down", "mid", "up"}
    assert {s.scale for s in sites} == {1, 2, 4}
    assert torch.allclose(torch.tensor([s.depth for s in sites]), torch.linspace(0, 1, len(sites)))
