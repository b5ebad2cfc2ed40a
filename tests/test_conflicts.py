"""Every cell of the conflict table: what composes is exact, what does not is refused by name."""

import importlib.util

import pytest
import torch

import inlay
import pages
from explicit import MATRIX, Site
from inlay import ConfigError, PlanConflict
from inlay_attention import Probe
from inlay_attention.conflicts import KINDS, DeclaredEdit, clash, settle, table, verdict
from inlay_config.config import Experiment, Prompt
from models import conds, flux
from spies import Editor, plugin

EXAMPLES = {  # (op, options) of each kind of edit, on the text's three keys where it matters
    "align": ("align", {"from_": "source", "keys": "image"}),
    "scale": ("scale", {"keys": (0, 1), "weight": 2.0}),
    "bias": ("bias", {"keys": "image", "bias": 0.7}),
    "gain": ("gain", {"keys": "image", "gain": 1.2}),
    "map": ("map", {"keys": "text", "matrix": MATRIX}),
    "mix": ("mix", {"from_": "source", "keys": "text", "alpha": 0.3}),
    "route qk": ("route", {"qk": "source"}),
    "route kv": ("route", {"kv": "source"}),
    "append join": ("append", {"from_": "source", "keys": "image", "gain": 0.9}),
    "append sum": (
        "append",
        {"from_": "source", "keys": "image", "gain": 0.4, "own": 0.6, "how": "sum"},
    ),
    "append side": ("append", {"from_": "source", "keys": "image", "gain": 0.5, "how": "side"}),
    "identity": ("identity", {}),
    "patch": ("patch", {"function": lambda q, k, v, mask, attend: attend(q, k, v, mask)}),
}
EDITS = [kind for kind in KINDS if kind != "probe"]
PAIRS = [(a, b) for i, a in enumerate(EDITS) for b in EDITS[i:]]


def declared(kind, plugin, **fields):
    op, _, how = kind.partition(" ")
    from_ = "source" if op in ("align", "mix", "route", "append") else ""
    fields = {"sites": frozenset({"s", "t"}), "steps": frozenset({0, 1}), **fields}
    return DeclaredEdit(plugin, op, fields.pop("lane", "edit"), from_=from_, how=how, **fields)


def said(kind, plugin):
    op, options = EXAMPLES[kind]
    return (op, "edit", "all", {**options, "plugin": plugin})


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=lambda kind: kind.replace(" ", "-"))
def test_two_edits_meet(a, b):
    first, second = declared(a, "one"), declared(b, "two")
    if not clash(first, second):
        assert settle([first, second], [], []) == ((first, second), ())
        site = Site([said(a, "one"), said(b, "two")])
        expected, _ = site.explicit()
        torch.testing.assert_close(site.run(), expected, rtol=0, atol=1e-12)
        return
    assert verdict(a, b).startswith("refused")
    message = rf"site s, step 0, lane edit: one \({a}\) and two \({b}\) meet: "
    with pytest.raises(PlanConflict, match=message):
        settle([first, second], [], [])
    kept, dropped = settle([first, second], [], [{"site": "*", "winner": "two"}])
    assert [e.plugin for e in kept if e.sites] == ["two"]
    assert [(e.plugin, e.sites) for e in dropped] == [("one", frozenset({"s", "t"}))]


def test_the_table_holds_every_pair_and_says_what_is_said_of_it():
    assert len(table()) == len(KINDS) * (len(KINDS) + 1) // 2
    refused = {pair for pair, cell in table().items() if cell.startswith("refused")}
    assert ("map", "mix") in refused
    assert ("patch", "probe") in refused
    assert ("gain", "append join") not in refused
    assert table()["route qk", "route kv"] == "composes"
    assert table()["map", "map"].startswith("refused unless one plugin")


@pytest.mark.parametrize("kind", ["map", "mix", "append sum"])
def test_one_plugin_may_say_what_two_may_not(kind):
    assert settle([declared(kind, "one"), declared(kind, "one")], [], [])[1] == ()


def test_equal_routes_compose_and_different_ones_do_not():
    one, two = declared("route qk", "one"), declared("route qk", "two")
    assert not clash(one, two)
    other = DeclaredEdit("two", "route", "edit", one.sites, one.steps, "exemplar", "qk")
    with pytest.raises(PlanConflict, match="they take the maps of different branches"):
        settle([one, other], [], [])


@pytest.mark.parametrize(
    "apart",
    [
        {"sites": frozenset({"u"})},
        {"steps": frozenset({2})},
        {"lane": "source"},
        {"pass_": "source"},
    ],
    ids=["sites", "steps", "lanes", "passes"],
)
def test_edits_that_never_meet_do_not_clash(apart):
    assert settle([declared("map", "one"), declared("map", "two", **apart)], [], [])[1] == ()


def test_branches_of_a_lane_meet_the_lane_and_not_each_other():
    null, text = (declared("map", n, lane=f"edit/{n}") for n in ("null", "text"))
    assert settle([null, text], [], [])[1] == ()
    with pytest.raises(PlanConflict, match=r"lane edit/text: lane \(map\) and text \(map\)"):
        settle([declared("map", "lane"), text], [], [])


def test_spans_of_queries_meet_when_they_overlap():
    text, image = (declared("map", n, queries=n) for n in ("text", "image"))
    assert settle([text, image], [], [])[1] == ()
    with pytest.raises(PlanConflict):
        settle([text, declared("map", "every")], [], [])


def test_a_patched_map_cannot_be_read():
    patch = declared("patch", "one")
    probe = Probe("p", "two", "edit/text", "columns", frozenset("s"), frozenset({1}), (0,))
    with pytest.raises(PlanConflict, match=r"step 1, branch edit/text: two reads the map that one"):
        settle([patch], [probe], [])
    elsewhere = Probe("p", "two", "edit/null", "columns", frozenset("z"), frozenset({1}), (0,))
    assert settle([patch], [elsewhere], []) == ((patch,), ())


def test_a_winner_can_be_chosen_by_site():
    one, two = declared("map", "one"), declared("map", "two")
    rules = [{"site": "s", "winner": "one"}, {"site": "t*", "winner": "two"}]
    kept, dropped = settle([one, two], [], rules)
    assert {(e.plugin, *e.sites) for e in kept} == {("one", "s"), ("two", "t")}
    assert {(e.plugin, *e.sites) for e in dropped} == {("one", "t"), ("two", "s")}


@pytest.mark.parametrize(
    "rule", [{"site": "nowhere", "winner": "one"}, {"site": "*", "winner": "three"}]
)
def test_a_rule_that_settles_nothing_is_refused(rule):
    edits = [declared("map", "one"), declared("map", "two", sites=frozenset("u"))]
    with pytest.raises(ConfigError, match=r"resolve\[0\]: settles nothing|resolve\[0\]"):
        settle(edits, [], [rule])


# in a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return flux()


def lane():
    return plugin(declare=lambda need: need.lane("source", prompt="source"))


def final(pipe, plugins, **session):
    return inlay.Session(pipe, plugins, **session).run(conds=conds(), steps=2).latents["edit"]


def mixed(alpha):
    return Editor("mix", options={"from_": "source", "keys": "image", "alpha": alpha})


def test_the_winner_acts_as_if_the_loser_were_not_there(pipe):
    plugins = {"lane": lane(), "one": mixed(0.2), "two": mixed(0.9)}
    with pytest.raises(PlanConflict, match=r"one \(mix\) and two \(mix\) meet: both take the map"):
        final(pipe, plugins)
    settled = final(pipe, plugins, resolve=[{"site": "*", "winner": "two"}])
    assert torch.equal(settled, final(pipe, {"lane": lane(), "two": mixed(0.9)}))
    assert not torch.equal(settled, final(pipe, {"lane": lane(), "one": mixed(0.2)}))


def test_the_record_and_the_plan_say_what_was_dropped(pipe):
    session = inlay.Session(
        pipe,
        {"lane": lane(), "one": mixed(0.2), "two": mixed(0.9)},
        resolve=[{"site": "*", "winner": "two"}],
    )
    result = session.run(conds=conds(), steps=2)
    assert result.record["experiment"]["resolve"] == [{"site": "*", "winner": "two"}]
    prompt = Prompt(source="a road", edit="a dog on a road")
    asked = Experiment(prompt=prompt, steps=2, size=[32, 32], **session.setup)
    assert "resolved, dropped: one: mix on edit from source" in str(session.plan(asked, None, []))


@pytest.mark.parametrize("rule", [{"site": "*"}, {"site": "*", "winner": "a", "loser": "b"}])
def test_a_rule_names_a_site_and_a_winner(rule):
    with pytest.raises(ConfigError, match=r"resolve\[0\].* is no rule"):
        Experiment(resolve=[rule])


@pytest.mark.parametrize("name", ["attention.md", "compose.md", "backbones.md"])
def test_a_page_shows_what_the_code_decides(name):
    spec = importlib.util.spec_from_file_location("generate", pages.ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert name in generate.PARTS and len(generate.PARTS) == 3
    page = pages.ROOT / "docs" / name
    assert page.read_text(encoding="utf-8") == generate.written(page), "run `make docs`"
