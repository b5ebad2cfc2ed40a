"""The toybox's tasks for exemplars: what they know, what a method is given, rows that paste."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inlay_bench import exemplars, measures, methods, pasting, pictures, report, runner, tasks
from inlay_bench.measures import MEASURES
from inlay_bench.tasks import Item, Task
from inlay_config.errors import InputError
from inlay_toybox import quality
from inlay_toybox.quality.exemplars import right_colour, same_paint


@pytest.fixture(scope="module")
def detector() -> Any:
    return measures.detector()


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return tasks.load("toybox-exemplar").items(6, seed=0)


def numbers(name: str, item: Item, picture: Any, **networks: Any) -> dict[str, float | None]:
    assert item.picture is not None
    made = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return MEASURES[name].function(measures.evidence(item, item.picture, made, networks))


# items -------------------------------------------------------------------------------------------


def test_the_truth_differs_from_the_input_in_the_region_alone() -> None:
    for item in quality.exemplar_items(12):
        before = np.asarray(item.picture)
        changed = (before != item.truth).any(-1)
        assert changed.any() and not (changed & ~item.region).any()
        assert (item.mask & item.region).sum() == item.mask.sum()
        assert item.cutout.shape == item.exemplar.size[::-1] and item.cutout.any()


def test_every_third_object_has_colours_and_they_are_told_apart() -> None:
    found = list(quality.exemplar_items(18))
    assert [i.name for i in found[::3]] == ["car", "bus", "balloon"] * 2
    for item in found[::3]:
        assert right_colour(item.truth, item.mask, item.name, item.colour)
        exemplar = np.asarray(item.exemplar)
        assert right_colour(exemplar, item.cutout, item.name, item.colour)
    assert next(quality.exemplar_items(2, seed=1)).target != found[0].target


def test_a_texture_is_another_colour_and_a_part_is_half_an_object() -> None:
    for item in quality.imitation_items(10):
        before, after = item.source.things[-1], item.target.things[-1]
        if item.kind == "texture":
            assert not same_paint(before, after.colour) and (item.region == item.mask).all()
            assert right_colour(item.truth, item.mask, item.name, item.colour)
            assert not right_colour(np.asarray(item.picture), item.mask, item.name, item.colour)
        else:
            assert item.source == item.target
            assert 0.2 < (item.mask & item.region).sum() / item.mask.sum() < 0.8
    only = quality.imitation_items(3, kinds=("part",))
    assert [item.kind for item in only] == ["part"] * 3
    with pytest.raises(ValueError, match="a dog has no colours"):
        right_colour(np.zeros((2, 2, 3), np.uint8), np.ones((2, 2), bool), "dog", None)


def test_an_unknown_kind_of_imitation_is_refused() -> None:
    task = tasks.load("toybox-imitation")
    tasks.adapt(task, ["kinds=[whole]"])
    with pytest.raises(InputError, match="no such kinds"):
        task.items(1, 0)


# measures ----------------------------------------------------------------------------------------


def test_the_true_picture_is_the_exemplar_and_the_input_is_not(
    items: list[Item], detector: Any
) -> None:
    seen = [numbers("exemplar-identity", i, i.truth["picture"], detector=detector) for i in items]
    assert np.mean([s["identity"] for s in seen]) == 1
    assert {s["colour"] for s in seen} == {None, 1.0}
    missed = [numbers("exemplar-identity", i, i.picture, detector=detector) for i in items]
    assert all(m["likeness"] == 0 and m["colour"] is None for m in missed)
    other = items[0]
    repainted = np.asarray(other.truth["picture"])[..., ::-1].copy()
    found = numbers("exemplar-identity", other, repainted, detector=detector)
    assert found["colour"] in (None, 0.0)


def test_the_true_object_has_its_own_texture_and_a_repainted_one_has_not(
    items: list[Item], detector: Any
) -> None:
    for item in items[::3]:  # of classes that have colours
        true = np.asarray(item.truth["picture"])
        mask = item.truth["mask"][..., None]
        other = np.where(mask, np.roll(true, 1, -1), true)
        same, changed = (numbers("texture", item, p, detector=detector) for p in (true, other))
        assert (same["texture"] or 0) > 0.95
        assert changed["texture"] is None or changed["texture"] < 0.7
        assert numbers("texture", item, item.picture, detector=detector) == {"texture": None}


def test_a_pasted_rectangle_is_told_from_a_picture_that_goes_on(
    items: list[Item], detector: Any
) -> None:
    for item in items[:3]:
        assert item.picture is not None
        left, top, right, bottom = exemplars.region.crop(exemplars.region_of(_evidence(item)))
        copy = item.picture.copy()
        copy.paste(item.given["exemplar"].resize((right - left, bottom - top)), (left, top))
        pasted, true = (numbers("copied", item, p)["copied"] for p in (copy, item.truth["picture"]))
        assert pasted is not None and true is not None
        around = {
            name: numbers("around-object", item, p, detector=detector)["psnr_around"]
            for name, p in (("copy", copy), ("true", item.truth["picture"]))
        }
        assert around["true"] == 99 and (around["copy"] or 0) < 40
        outside = numbers("outside-region", item, copy)
        assert (outside["psnr_outside"], outside["ssim_outside"]) == (99.0, pytest.approx(1))
        assert numbers("true-region", item, item.truth["picture"])["psnr_true"] == 99
        assert (numbers("true-region", item, copy)["psnr_true"] or 99) < 30


def test_an_exemplar_that_fills_its_region_correlates_fully() -> None:
    texture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8))
    picture = Image.new("RGB", (48, 48), "grey")
    region = np.zeros((48, 48), bool)
    region[10:30, 20:40] = True
    item = Item("one", picture, {}, 0, truth={"region": region}, given={"exemplar": texture})
    copy = picture.copy()
    copy.paste(texture, (20, 10))
    assert numbers("copied", item, copy)["copied"] == pytest.approx(1, abs=0.01)
    smooth = Image.linear_gradient("L").resize((48, 48)).convert("RGB")
    assert (numbers("copied", item, smooth)["copied"] or 0) < 0.5
    with pytest.raises(InputError, match="no region is known"):
        numbers("outside-region", Item("two", picture, {}, 0), picture)


def _evidence(item: Item) -> measures.Evidence:
    return measures.evidence(item, item.picture, item.picture, {})


# rows that paste ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def square() -> tuple[Item, Image.Image]:
    """A red disc as the exemplar, a grey gradient with a square region."""
    y, x = np.mgrid[:40, :40]
    disc = (x - 20) ** 2 + (y - 20) ** 2 < 15**2
    exemplar = Image.fromarray(np.where(disc[..., None], (200, 30, 30), 255).astype(np.uint8))
    source = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    region = np.zeros((64, 64), bool)
    region[16:48, 20:52] = True
    truth = {"region": region, "cutout": disc}
    return Item("one", source, {}, 0, truth=truth, given={"exemplar": exemplar}), source


@pytest.mark.parametrize("name", list(pasting.PASTES))
def test_an_object_is_pasted_within_the_region(name: str, square: tuple[Item, Any]) -> None:
    item, source = square
    (method, *_) = methods.build([name], Task(model=""))
    made, before = np.asarray(method(item, source)), np.asarray(source)
    changed = (made != before).any(-1)
    assert changed.any() and not (changed & ~item.truth["region"]).any()
    assert made[32, 36, 0] > made[32, 36, 1] + 20  # still red in the middle
    assert (made[17, 21] == before[17, 21]).all()  # the region's corner is outside the disc


def test_poisson_blending_keeps_gradients_and_meets_the_outline() -> None:
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 12)[:, None, None] * np.ones((12, 12, 3))
    inside = np.zeros((12, 12))
    inside[3:9, 3:9] = 1
    assert np.allclose(pasting.poisson(ramp, ramp / 2 + ramp / 2 + 0.3, inside), ramp)
    flat = pasting.poisson(ramp, np.full_like(ramp, 0.9), inside)
    assert np.allclose(flat, ramp)  # no gradients: harmonic, and a ramp is harmonic
    corner = np.zeros((12, 12))
    corner[:5, :5] = 1
    blended = pasting.poisson(ramp, rng.random(ramp.shape), corner)
    assert np.isfinite(blended).all() and np.array_equal(blended[5:], ramp[5:])
    whole = pasting.poisson(ramp, ramp + 0.1, np.ones((12, 12)))
    assert np.allclose(whole, ramp + 0.1)


def test_colour_transfer_goes_towards_the_picture_around() -> None:
    source = np.full((8, 8, 3), 0.2) + np.linspace(0, 0.1, 8)[:, None, None]
    pasted, opacity = np.full((8, 8, 3), 0.9), np.zeros((8, 8))
    opacity[2:6, 2:6] = 1
    moved = pasting.colour_transfer(source, pasted, opacity)
    assert 0.3 < moved[3, 3].mean() < 0.9 and np.array_equal(moved[0], source[0])


def test_without_an_exemplar_nothing_can_be_pasted() -> None:
    picture = Image.new("RGB", (8, 8))
    (method, *_) = methods.build(["paste"], Task(model=""))
    with pytest.raises(InputError, match="nobody knows what to paste"):
        method(Item("one", picture, {}, 0), picture)


# an evaluation -----------------------------------------------------------------------------------


class Looks(methods.Method):
    """Returns the input, and notes what it was given."""

    name, identity = "looks", {"method": "looks"}

    def __call__(self, item: Item, source: Image.Image) -> Image.Image:
        return source


def test_what_a_method_is_given_is_kept_and_shown(tmp_path: Path, items: list[Item]) -> None:
    task = tasks.load("toybox-exemplar")
    task.measures = ["copied"]
    done = runner.evaluate(task, [Looks()], tmp_path, 2)
    kept = Image.open(pictures.path_of(tmp_path, "given-exemplar", "0001"))
    assert np.array_equal(np.asarray(kept), np.asarray(items[1].given["exemplar"]))
    paths = report.write(report.summarise(done), tmp_path)
    assert "<b>exemplar</b>" in paths["html"].read_text()
    whole = pictures.fingerprint(items[0], items[0].picture)
    other = Item("0", items[0].picture, {}, 0, given={**items[0].given, "mask": items[0].picture})
    assert whole != pictures.fingerprint(other, items[0].picture)
    assert whole != pictures.digest_of(items[0].picture)


def test_an_experiment_gets_the_mask_and_the_exemplars_path(
    tmp_path: Path, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fill.yaml"
    path.write_text("model: toybox/sd\nplugins: {exemplar: {fit: crop}}\n")
    task = tasks.load("toybox-exemplar")
    method = methods.build([str(path)], task)[0]
    asked: list[Any] = []

    class Spy:
        def __init__(self, plugins: Any) -> None:
            self.plugins = plugins

        def run(self, prompts: Any, image: Any, mask: Any, **more: Any) -> Any:
            asked.append((self.plugins, prompts, mask, more["seed"]))
            raise RuntimeError("enough")

    monkeypatch.setattr(method, "_session_of", lambda exp: Spy(exp.plugins))
    for item in islice(items, 2):
        with pytest.raises(RuntimeError, match="enough"):
            method(item, item.picture)
    (first, prompts, mask, _), (second, *_) = asked
    assert first["exemplar"]["fit"] == "crop" and prompts["edit"] == items[0].texts["target"]
    assert mask is items[0].given["mask"]
    shown = Image.open(first["exemplar"]["image"])
    assert np.array_equal(np.asarray(shown), np.asarray(items[0].given["exemplar"]))
    assert first["exemplar"]["image"] != second["exemplar"]["image"]
