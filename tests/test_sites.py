"""`inlay plan --sites`: the calls that are promised are the calls that are made."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import inlay
from inlay.cli.sites import site_costs, site_table
from inlay_attention import Store
from inlay_config.config import Experiment, Prompt
from models import conds, flux, stable_diffusion
from spies import plugin

TAKES = {"from_": "source", "keys": "image"}
SAID = {  # operation: (what is declared, what is said, its cost; None: it depends on the keys)
    "gain": ({"keys": "image"}, lambda on: on.gain("image", 1.5), 1.0),
    "scale": ({"keys": "image"}, lambda on: on.scale("image", 1.5), 1.0),
    "bias": ({"keys": "image"}, lambda on: on.bias("image", 1.5), 1.0),
    "align": (TAKES, lambda on: on.align(**TAKES), 1.0),
    "route qk": (TAKES | {"how": "qk"}, lambda on: on.route(qk="source", keys="image"), 1.0),
    "route kv": (TAKES | {"how": "kv"}, lambda on: on.route(kv="source", keys="image"), 1.0),
    "append join": (TAKES | {"how": "join"}, lambda on: on.append(**TAKES), None),
    "append side": (TAKES | {"how": "side"}, lambda on: on.append(**TAKES, how="side"), None),
    "append sum": (TAKES | {"how": "sum"}, lambda on: on.append(**TAKES, how="sum"), 1.0),
    "mix": (TAKES, lambda on: on.mix(**TAKES, alpha=0.4), 1.5),
    "map": ({"keys": "text"}, lambda on: on.map((0,), torch.eye(1)), 1.0),
    "identity": ({}, lambda on: on.identity(), 0.5),
    "patch": ({}, lambda on: on.patch(lambda q, k, v, mask, attend: attend(q, k, v, mask)), 1.0),
}
MODELS = {"flux": flux, "sd": stable_diffusion}


@pytest.fixture(scope="module", params=MODELS)
def pipe(request):
    return MODELS[request.param]()


def lane(need):
    need.lane("source", prompt="source", n=1, seed=9, keep=False)


def editor(op, declared, said, **more):
    def declare(need):
        sites = need.select(kind=["joint", "cross" if declared.get("keys") == "text" else "self"])
        need.edit(op.split()[0], "edit", sites, **declared, **more)

    def attention(edits):
        said(edits.on("edit", more.get("queries", "all")))

    return plugin(declare=declare, attention=attention)


def reader(read):
    def declare(need):
        need.probe("w", "edit/text", (0, 1), need.select(kind=["joint", "cross"]), None, read)

    return plugin(declare=declare)


def promised(session, monkeypatch):
    """Costs of one step, for prompts as long as those of the tests."""
    length = conds()["edit"]["embeds"].shape[1]
    monkeypatch.setattr(type(session.backbone), "text_tokens", length)
    asked = Experiment(prompt=Prompt("a", "b", "c"), steps=1, size=[32, 32], guidance=2.0)
    return site_costs(session.plan(asked, None, []), session.backbone)


def run(session):
    return session.run(conds=conds(pooled=session.backbone.flow), steps=1, size=32, guidance=2.0)


def made(session, monkeypatch):
    """(rows, queries, keys) of every call inside the denoiser, how often."""
    seen, stock = [], F.scaled_dot_product_attention

    def watch(q, k, v, *args, **options):
        seen.append((q.shape[0], q.shape[2], k.shape[2]))
        return stock(q, k, v, *args, **options)

    inside = []
    hooks = (
        session.backbone.denoiser.register_forward_pre_hook(lambda *_: seen.clear()),
        session.backbone.denoiser.register_forward_hook(lambda *_: inside.extend(seen)),
    )
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", watch)
        run(session)
    for hook in hooks:
        hook.remove()
    return Counter(inside)


def kept(session, monkeypatch):
    """The costs, if what they promise is made, and one call at every site that is not in them."""
    costs = promised(session, monkeypatch)
    wanted = Counter(call for cost in costs for _ in cost.sites for call in cost.calls)
    counted = made(session, monkeypatch)
    assert not wanted - counted
    plain = len(session.backbone.sites) - sum(len(cost.sites) for cost in costs)
    assert (counted - wanted).total() == plain
    return costs


@pytest.mark.parametrize("op", SAID)
def test_the_calls_of_every_operation_are_those_it_makes(pipe, op, monkeypatch):
    declared, said, cost = SAID[op]
    plugins = {"source": plugin(declare=lane), "edit": editor(op, declared, said)}
    costs = kept(inlay.Session(pipe, plugins), monkeypatch)
    assert costs and all(cost in (None, c.cost) for c in costs)


@pytest.mark.parametrize("how", ["join", "side"])
def test_more_keys_cost_what_they_are(pipe, how, monkeypatch):
    """Two of four rows see the source's image too; on FLUX the second call has as many."""
    declared, said, _ = SAID[f"append {how}"]
    plugins = {"source": plugin(declare=lane), "edit": editor("append", declared, said)}
    (first, *_) = kept(inlay.Session(pipe, plugins), monkeypatch)
    text, tokens = (12, 64) if hasattr(pipe, "transformer") else (0, 256)
    assert first.cost == pytest.approx(1 + 0.5 * tokens / (tokens + text))


@pytest.mark.parametrize("read", ["columns", "mass"])
def test_a_probe_costs_one_row_more(pipe, read, monkeypatch):
    costs = kept(inlay.Session(pipe, {"read": reader(read)}), monkeypatch)
    assert costs and all(1 < cost.cost <= 2 for cost in costs)


def test_edits_of_some_queries_part_the_call(monkeypatch):
    declared, said, _ = SAID["gain"]
    plugins = {"edit": editor("gain", declared, said, queries="image")}
    (cost,) = kept(inlay.Session(flux(), plugins), monkeypatch)
    assert len(cost.calls) == 2 and cost.cost == 1.0


def test_a_replayed_lane_costs_nothing(pipe, monkeypatch):
    declared, said, _ = SAID["append join"]
    plugins = {"source": plugin(declare=lane), "edit": editor("append", declared, said)}
    stored = inlay.Session(pipe, plugins, store=Store())
    recorded = promised(stored, monkeypatch)
    run(stored)
    replayed = kept(stored, monkeypatch)
    assert {name.split("/")[0] for cost in recorded for name in cost.branches} == {"edit", "source"}
    assert {name.split("/")[0] for cost in replayed for name in cost.branches} == {"edit"}


def test_the_table_names_calls_and_cost(monkeypatch):
    declared, said, _ = SAID["mix"]
    plugins = {"source": plugin(declare=lane), "edit": editor("mix", declared, said)}
    session = inlay.Session(flux(), plugins)
    lines = site_table(promised(session, monkeypatch)).splitlines()
    path = "transformer_blocks.0.attn … single_transformer_blocks.1.attn"
    assert lines[2] == f"pass edit, steps 0, 4 sites ({path})"
    assert lines[4] == "  1 calls: 3 x 76 x 76 (rows x queries x keys), 1.50 of plain"
