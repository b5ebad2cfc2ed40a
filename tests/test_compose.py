"""docs/compose.md is true: each pair of first-party plugins was run, and both effects are there."""

from functools import cache
from itertools import product

import pytest
import torch

import compositions
from compositions import CASES, MODELS, PAIRS, PLUGINS, SHIPPED
from inlay import ConfigError, PlanConflict, PluginError, backbones
from inlay_config import registry

VISIBLE = 1 / 1020  # a quarter of a step of an 8-bit pixel


@cache
def pipe(model):
    return backbones.load(registry.resolve_model(model), "float32", "cpu", "none", None)


@cache
def alone(model, *names):
    return compositions.run(pipe(model), model, *names)


def test_every_plugin_has_an_invariant():
    assert set(CASES) == set(SHIPPED), "add the plugin's case to tests/invariants.py"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_alone_acts_and_keeps_its_invariant(model, name):
    made, without = alone(model, name), alone(model, *CASES[name].companions)
    CASES[name].holds(made, without)
    with pytest.raises((AssertionError, KeyError, PluginError)):  # else it says nothing
        CASES[name].holds(without, without)
    assert torch.equal(made.picture, without.picture) is not CASES[name].draws
    assert set(CASES[name].board) <= set(made.board)


def everywhere():
    """Every pair on every model; by default a quarter of that, in turn (`make compose`: all)."""
    for (i, pair), (j, model) in product(enumerate(PAIRS), enumerate(MODELS)):
        marks = pytest.mark.slow if (i + j) % 4 else ()
        yield pytest.param(model, *pair, id=f"{model}-{'-'.join(pair)}", marks=marks)


@pytest.mark.parametrize(("model", "a", "b"), list(everywhere()))
def test_a_pair_composes_or_is_refused(model, a, b):
    """Composes: the picture differs from each alone, unless a plugin only publishes, which then
    moves no bit of the picture; and both invariants hold. Needs: they hold in the run of the two.
    Refused: both are named, and a winner that the message asks for settles it.
    """
    if needs := compositions.needs(a, b):
        made = alone(model, needs)
        for one in (a, b):
            CASES[one].holds(made, alone(model, *CASES[needs].companions))
        return
    try:
        made = compositions.run(pipe(model), model, a, b)
    except (PlanConflict, ConfigError) as error:
        assert a in str(error) and b in str(error)
        if "resolve:" in str(error):
            rule = {"site": "*", "winner": b}
            assert compositions.verdict(pipe(model), model, a, b, [rule]) == "composes"
        return
    for one, other in ((a, b), (b, a)):
        without = alone(model, other)
        CASES[one].holds(made, without)
        assert set(CASES[one].board) <= set(made.board)
        moved = (made.picture - without.picture).abs().max()
        assert moved > VISIBLE if CASES[one].draws else moved == 0
