"""The task of edits inside a mask: its items, what is measured of them, the section of results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pages
from inlay_bench import measures, methods, tasks
from inlay_bench.measures import MEASURES
from inlay_bench.metrics import seam
from inlay_bench.tasks import Item
from inlay_config import config

TASK = tasks.load("toybox-blending")


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return TASK.items(4, seed=0)


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    return {name: measures.NETWORKS[name]() for name in ("detector", "judge")}


def numbers(item: Item, picture: Any, networks: dict[str, Any]) -> dict[str, float | None]:
    made = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    seen = measures.evidence(item, item.picture, made, networks)
    return {k: v for name in TASK.measures for k, v in MEASURES[name].function(seen).items()}


def test_the_mask_is_where_the_true_object_is(items: list[Item]) -> None:
    for item in items:
        mask = np.asarray(item.given["mask"]) > 0
        assert (mask == item.truth["region"]).all() and 0 < mask.mean() < 0.7
        assert not (item.truth["footprint"] & ~mask).any()
        article, _, words = item.texts["phrase"].partition(" ")
        assert words == item.texts["subject"] and item.texts["phrase"] in item.texts["target"]
        assert article == ("an" if words[0] in "aeiou" else "a")


def test_a_scene_may_come_several_times_with_other_seeds() -> None:
    task = tasks.load("toybox-blending")
    tasks.adapt(task, ["repeats=3"])
    found = task.items(5, seed=0)
    assert [item.id for item in found] == ["0000-0", "0000-1", "0000-2", "0001-0", "0001-1"]
    assert [item.seed for item in found] == [0, 1, 2, 3, 4]
    assert found[0].picture == found[2].picture != found[3].picture


def test_the_true_picture_has_the_object_and_the_input_has_not(
    items: list[Item], networks: dict[str, Any]
) -> None:
    true = [numbers(item, item.truth["picture"], networks) for item in items]
    same = [numbers(item, item.picture, networks) for item in items]
    assert {t["inside"] for t in true} == {1.0} and {s["inside"] for s in same} == {0.0}
    assert {n["other"] for n in (*true, *same)} == {0.0}
    assert {(n["equal"], n["psnr_beyond"]) for n in (*true, *same)} == {(1.0, 99.0)}
    nearer = [(t["clip_inside"] or 0) - (s["clip_inside"] or 0)
              for t, s in zip(true, same, strict=True)]  # fmt: skip
    assert np.mean(nearer) > 0.2


def test_an_object_of_another_class_or_beside_the_mask_is_not_the_one(
    items: list[Item], networks: dict[str, Any]
) -> None:
    one, other = items[0], next(i for i in items if i.facts["class"] != items[0].facts["class"])
    told = replace(other, facts={**other.facts, "class": one.facts["class"]})
    found = numbers(told, other.truth["picture"], networks)
    assert (found["inside"], found["other"]) == (0.0, 1.0)
    mask = np.zeros_like(one.truth["region"])
    mask[:3, :3] = True
    beside = replace(one, truth={**one.truth, "region": mask})
    seen = numbers(beside, one.truth["picture"], networks)
    assert (seen["inside"], seen["other"], seen["equal"]) == (0.0, 0.0, 0.0)


def test_one_bit_beyond_the_feather_is_no_equal_background(items: list[Item]) -> None:
    item = items[0]
    rows, columns = np.nonzero(~item.truth["region"])
    distance = [np.abs(np.argwhere(item.truth["region"]) - p).max(1).min()
                for p in zip(rows, columns, strict=True)]  # fmt: skip
    for reach, equal in ((measures.MARGIN, 1.0), (measures.MARGIN + 1, 0.0)):
        place = next(k for k, d in enumerate(distance) if d == reach)
        changed = np.array(item.picture)
        changed[rows[place], columns[place], 0] ^= 1
        seen = measures.evidence(item, item.picture, Image.fromarray(changed), {})
        assert MEASURES["outside-equal"].function(seen)["equal"] == equal


# the seam ----------------------------------------------------------------------------------------

BOX = torch.zeros(32, 32, dtype=torch.bool)
BOX[8:20, 10:24] = True


def test_a_border_like_its_surroundings_scores_one() -> None:
    flat = torch.full((2, 3, 32, 32), 0.4)
    assert seam.ratio(flat, BOX).tolist() == pytest.approx([1, 1])
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    both = ramp / 2 + ramp.mT / 2  # as steep along columns as along rows
    assert float(seam.ratio(both, BOX)) == pytest.approx(1)
    noise = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert float(seam.ratio(noise, BOX).mean()) == pytest.approx(1, abs=0.02)


def test_a_pasted_patch_scores_its_step_over_the_steps_around() -> None:
    pasted = torch.where(BOX, 0.7, 0.2).expand(1, 3, 32, 32)
    assert float(seam.ratio(pasted, BOX)) == pytest.approx((0.5 + 1 / 255) * 255, rel=1e-4)
    far = torch.full((1, 3, 32, 32), 0.2)
    far[..., 28:, :] = 1.0  # further than 4 pixels from the border: nothing is seen of it
    assert float(seam.ratio(far, BOX)) == pytest.approx(1)


def test_a_mask_without_a_border_has_no_seam() -> None:
    assert seam.ratio(torch.rand(1, 3, 8, 8), torch.ones(8, 8, dtype=torch.bool)).isnan().all()


# methods and the section -------------------------------------------------------------------------


def test_a_method_gets_the_mask_and_keeps_its_experiments_gradient(items: list[Item]) -> None:
    small = ["steps=2", "plugins.extending_augmentations=null", "plugins.structure_transfer=null"]
    method = methods.Edit("blended_diffusion", TASK, small, methods.Pipelines())
    made = np.asarray(method(items[0], items[0].picture))
    inside = items[0].truth["region"]
    before = np.asarray(items[0].picture)
    assert (made[~inside] == before[~inside]).all() and (made[inside] != before[inside]).any()
    _, session = method._session
    assert session.setup["gradient"] == config.load("blended_diffusion").gradient


@pytest.fixture
def section(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(pages.ROOT / "benchmarks")
    import blending

    monkeypatch.setattr(blending, "OUT", tmp_path / "blending")
    return blending


def test_every_row_of_the_section_can_be_built(section: Any) -> None:
    names = [section.method_of(row, TASK).name for row in section.ROWS]
    assert len(set(names)) == len(section.ROWS)
    assert {name for *pair, _ in section.PAIRS for name in pair} <= {r.name for r in section.ROWS}


def test_rows_are_measured_once_and_stand_in_one_table(
    section: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {row.name: row for row in section.ROWS if row.method in ("copy", "twin")}
    monkeypatch.setattr(section, "PLAIN", rows["twin"])
    done = {row: section.evaluate(row, 2) for row in rows.values()}
    head, _, *lines = section.means(done)
    assert head.startswith("|  | items | inclusion | another | CLIP score | equal |")
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| the true picture", "2", "1.000 [1.000, 1.000]"],
        ["| the input", "2", "0.000 [0.000, 0.000]"],
    ]
    monkeypatch.setattr(section, "PAIRS", (("twin", "copy", "truth"),))
    assert "| truth | 2 | +1.000 [+1.000, +1.000] |" in section.comparisons(done)[2]
    several = {rows["twin"]: section.evaluate(rows["twin"], 1, repeats=2)}
    assert section.diversities(several)[2] == "| the true picture | 2 of 2 | 1 | 0.000 |"
    monkeypatch.setattr(section, "SHEET", {"true": "twin"})
    assert section.sheet(done, 2).size == (2 * 2 * (2 * 66 + 6), 2 * (66 + 12))
