"""INLAY_TRACE and --profile: every hook call and site is seen, and looking changes nothing."""

import pytest
import torch

import inlay
from inlay.cli.trace import Tracer
from models import conds, flux
from spies import Editor, Spy


@pytest.fixture(scope="module")
def pipe():
    return flux()


def run(pipe, tracer=None):
    session = inlay.Session(pipe, {"edit": Editor(active=[1]), "spy": Spy()}, tracer=tracer)
    return session, session.run(conds=conds(), steps=3).latents["edit"]


def test_every_hook_call_site_and_model_call_is_counted(pipe):
    tracer = Tracer()
    session, _ = run(pipe, tracer)
    sites = len(session.backbone.sites)
    assert tracer.spent["pre_step", "spy"][0] == 3
    assert tracer.spent["attention", "edit"][0] == sites
    assert {who for what, who in tracer.spent if what == "site"} == set(session.backbone.modules)
    assert tracer.spent["model", "FluxTransformer2DModel"][0] == 3
    inside = sum(seconds for (what, _), (_, seconds) in tracer.spent.items() if what == "site")
    assert 0 < inside < tracer.spent["model", "FluxTransformer2DModel"][1]


def test_the_table_names_what_took_longest_first(pipe):
    tracer = Tracer()
    run(pipe, tracer)
    lines = tracer.table().splitlines()
    assert lines[2].startswith("| model | FluxTransformer2DModel | 3 |")
    assert len(lines) == 2 + len(tracer.spent)


def test_looking_changes_nothing_and_is_undone(pipe):
    forward = pipe.transformer.forward
    session, traced = run(pipe, Tracer())
    assert torch.equal(traced, run(pipe)[1])
    assert pipe.transformer.forward == forward
    impls = session.manager.hook.inlay_pre_step.get_hookimpls()
    assert [impl.function.__name__ for impl in impls] == ["inlay_pre_step"]


def test_the_environment_prints_every_hook_call(pipe, monkeypatch, capsys):
    monkeypatch.setenv("INLAY_TRACE", "1")
    run(pipe)
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["post_step", "spy"] in [line[:2] for line in lines]
    assert all(line[-1] == "ms" for line in lines)
    monkeypatch.setenv("INLAY_TRACE", "")
    run(pipe)
    assert capsys.readouterr().err == ""
