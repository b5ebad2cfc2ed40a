"""Variants of experiments as methods, and the items that papers call hard."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import folders
from inlay_bench import methods, runner, tasks
from inlay_bench.tasks import Item, Task
from inlay_config.errors import ConfigError

KINDS = ("terse", "crowded", "again")


def task_of(kind: str) -> Task:
    task = tasks.load("toybox-affordance")
    tasks.adapt(task, [f"kind={kind}"])
    return task


# variants ----------------------------------------------------------------------------------------


def test_a_variant_is_the_experiment_with_overrides_of_its_own() -> None:
    names = ["addit", "addit@true_cfg=4@weighted_attention.gamma=1.3", "addit@latent_blend=null"]
    task = tasks.load("toybox-affordance")
    plain, other, bare = methods.build(names, task, ["steps=5"])[:3]
    assert [m.name for m in (plain, other, bare)] == names
    told = [m.identity["method"] for m in (plain, other, bare)]
    assert [m["true_cfg"] for m in told] == [3.0, 4.0, 3.0]
    assert [m["plugins"]["weighted_attention"]["gamma"] for m in told] == [1.15, 1.3, 1.15]
    assert ["latent_blend" in m["plugins"] for m in told] == [True, True, False]
    assert {m["steps"] for m in told} == {5}


def test_a_variant_keeps_its_file_name_and_no_folder() -> None:
    assert methods.name_of("my/own.yaml@model=toybox/sd") == "own@model=toybox-sd"
    assert methods.variant("own.yaml@seed=1@sdedit.strength=0.5") == (
        "own.yaml",
        ["seed=1", "plugins.sdedit.strength=0.5"],
    )


def test_a_comma_in_brackets_does_not_end_a_method() -> None:
    said = "copy,addit@latent_blend.steps=[[0.5, 1.0]],addit@guidance={edit: 2, source: 1},,vae"
    assert methods.split(said) == [
        "copy",
        "addit@latent_blend.steps=[[0.5, 1.0]]",
        "addit@guidance={edit: 2, source: 1}",
        "vae",
    ]


def test_a_variant_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'plugins.gamma' is not an override"):
        methods.build(["addit@gamma"], tasks.load("toybox-affordance"))


def test_several_pictures_of_an_item_come_in_one_batch(tmp_path: Path) -> None:
    task = tasks.load("toybox-affordance")
    words = [f"model={folders.save_flux(tmp_path)}", "steps=2", "plugins={}"]
    edit = methods.Edit("t2i", task, words, methods.Pipelines())
    item = min(task.items(8, 0), key=lambda item: len(item.texts["target"]))
    one, other = edit.several(item, item.picture, 2)
    assert one.size == other.size == item.picture.size and one.tobytes() != other.tobytes()
    assert edit(item, item.picture).size == item.picture.size


# hard items --------------------------------------------------------------------------------------


def test_hard_items_are_what_they_are_called() -> None:
    plain = tasks.load("toybox-affordance").items(5, 0)
    terse, crowded, again = (task_of(kind).items(5, 0) for kind in KINDS)
    for usual, item in zip(plain, terse, strict=True):
        assert usual.picture.tobytes() == item.picture.tobytes()
        assert item.texts["source"].startswith("a view of")
        assert item.texts["subject"] in item.texts["target"]
        assert " and " not in item.texts["target"]
    for item in crowded:
        assert len(item.facts["things"]) == 3 and item.facts["class"] not in item.facts["things"]
        assert not item.truth["present"].any()
    for item in again:
        assert item.facts["things"] == [item.facts["class"]]
        assert item.texts["target"].count(item.texts["subject"]) == 2
        assert item.truth["present"].any()
    assert not {item.texts["source"] for item in crowded} & {item.texts["source"] for item in again}


@pytest.mark.parametrize("name", [*KINDS, "beside"])
def test_the_truth_of_hard_items_scores_as_it_should(tmp_path: Path, name: str) -> None:
    """Of a class that is there already, only what is new is found."""
    task = tasks.load("toybox-beside") if name == "beside" else task_of(name)
    task.measures = ["inclusion", "affordance"] + ["side"] * (name == "beside")
    done = runner.evaluate(task, [methods.Twin(), methods.Copy()], tmp_path, 8)
    numbers = {m: [r["numbers"] for r in done.records[m].values()] for m in ("twin", "copy")}
    assert all(n["inclusion"] == n["affordance_all"] == 1 for n in numbers["twin"])
    assert all(n["inclusion"] == 0 for n in numbers["copy"])
    if name == "beside":
        assert all(n["side"] == 1 for n in numbers["twin"])
        assert all(n["side"] is None for n in numbers["copy"])


def test_the_wrong_side_is_told(tmp_path: Path) -> None:
    class Mirrored(methods.Twin):
        def __call__(self, item: Item, source):
            from PIL import ImageOps

            return ImageOps.mirror(super().__call__(item, source))

    task = tasks.load("toybox-beside")
    task.measures = ["side"]
    done = runner.evaluate(task, [Mirrored()], tmp_path, 8)
    sides = [r["numbers"]["side"] for r in done.records["twin"].values()]
    assert np.mean([side for side in sides if side is not None]) < 0.4


def test_sides_take_turns_and_other_kinds_are_refused() -> None:
    items = tasks.load("toybox-beside").items(4, 0)
    assert [item.facts["side"] for item in items] == ["left of", "right of"] * 2
    assert all(item.facts["side"] in item.texts["target"] for item in items)
    with pytest.raises(ConfigError, match=r"no kind 'ters'.*'terse'"):
        list(islice(tasks.PROVIDERS["toybox-insertion"](0, kind="ters"), 1))
