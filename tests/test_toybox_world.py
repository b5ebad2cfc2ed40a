"""The toybox world: determinism, captions, masks that agree, plausible places, held-out pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from inlay_toybox import captions, quality, world
from inlay_toybox.classes import BY_NAME, CLASSES, GROUNDS, HELD_OUT, PAIRS
from inlay_toybox.cli import main
from inlay_toybox.sprites import sprite


def crowded(n: int, size: int = 64) -> list[tuple[world.Scene, world.Rendering]]:
    """Scenes with at least one object, and their renderings."""
    scenes = [s for s in map(world.sample, range(3 * n)) if s.things][:n]
    return [(scene, world.render(scene, size)) for scene in scenes]


def test_there_are_32_classes_over_6_grounds_and_a_tenth_of_the_pairs_is_held_out():
    assert len(CLASSES) == 32
    assert len(GROUNDS) == 6
    assert set(PAIRS) >= HELD_OUT
    assert 0.08 <= len(HELD_OUT) / len(PAIRS) <= 0.12
    for toy in CLASSES:
        assert any((toy.name, g) not in HELD_OUT for g in toy.grounds)


@pytest.mark.parametrize("size", [64, 128])
def test_the_same_seed_draws_the_same_picture(size):
    first, second = (world.render(world.sample(11), size) for _ in range(2))
    assert first.image.shape == (size, size, 3)
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.masks, second.masks)
    assert (world.render(world.sample(12), size).image != first.image).any()


def test_a_scene_looks_the_same_at_64_and_128_pixels():
    for scene, small in crowded(20):
        large = world.render(scene, 128).image.reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.abs(large - small.image).mean() < 9


def test_the_training_sampler_never_draws_a_held_out_pair_and_the_other_one_does():
    assert not any(world.sample(seed).held_out for seed in range(2000))
    assert any(world.sample(seed, held_out=True).held_out for seed in range(500))


def test_every_trained_pair_occurs():
    seen = {(t.name, s.ground) for s in map(world.sample, range(6000)) for t in s.things}
    assert seen == set(PAIRS) - HELD_OUT


def test_captions_name_objects_ground_and_light():
    red_bus = world.Thing("bus", "red", 0.3, 0.8, 0.4)
    cow = world.Thing("cow", None, 0.7, 0.8, 0.3)
    kite = world.Thing("kite", None, 0.7, 0.3, 0.3)
    elephant = world.Thing("elephant", None, 0.7, 0.3, 0.3)
    assert captions.caption([red_bus, cow], "grass", True) == (
        "a red bus and a cow on the grass at sunset"
    )
    assert captions.caption([cow, kite], "snow", False) == "a cow in the snow and a kite in the sky"
    assert captions.caption([kite], "sea", False) == "a kite in the sky over the sea"
    assert captions.caption([], "lake", False) == "a view of the lake"
    assert captions.caption([elephant, cow, kite], "road", False, flat=True) == (
        "an elephant, a cow and a kite on the road"
    )
    assert captions.subject(red_bus) == "red bus"


def test_masks_boxes_and_footprints_agree():
    for scene, drawn in crowded(60):
        assert len(drawn.masks) == len(scene.things)
        for mask, footprint, box in zip(drawn.masks, drawn.footprints, drawn.boxes, strict=True):
            assert mask.any()
            assert not (mask & ~footprint).any()
            left, top, right, bottom = box.astype(int)
            outside = mask.copy()
            outside[top:bottom, left:right] = False
            assert not outside.any()
            assert mask[top].any() and mask[bottom - 1].any()
            assert mask[:, left].any() and mask[:, right - 1].any()
        for a, b in itertools.combinations(drawn.masks, 2):
            assert not (a & b).any()


def test_a_twin_differs_only_inside_the_footprint():
    for scene, drawn in crowded(60):
        for index in range(len(scene.things)):
            twin = world.render(scene.without(index))
            changed = (twin.image != drawn.image).any(-1)
            faint = np.abs(twin.image.astype(int) - drawn.image).max(-1) > 12
            assert not (faint & ~drawn.footprints[index]).any()
            assert (changed & drawn.masks[index]).any()


def test_objects_stand_where_they_belong_and_chance_stays_below_045():
    chances = []
    for scene, drawn in crowded(200):
        for index, thing in enumerate(scene.things):
            allowed = world.affordance(scene.without(index), thing.name)
            visible = drawn.masks[index]
            assert world.well_placed(visible, allowed), (scene.caption, thing)
            chances.append(world.chance(visible, allowed, seed=index))
    assert 0.2 < np.mean(chances) < 0.45


def test_a_class_may_not_stand_over_a_foreign_ground():
    lake = next(s for s in map(world.sample, range(100)) if s.ground == "lake")
    assert not world.affordance(lake, "cow").any()
    assert world.affordance(lake, "swan").any()
    assert not world.well_placed(np.zeros((64, 64), bool), np.ones((64, 64), bool))


def test_views_show_one_object_in_different_places():
    scenes = world.views("car", 5, seed=3, colour="blue")
    assert len({s.things[0].x for s in scenes}) == 5
    assert {(t.name, t.colour) for s in scenes for t in s.things} == {("car", "blue")}


def test_a_mirrored_scene_mirrors_its_objects():
    scene, drawn = crowded(1)[0]
    box = world.render(scene.mirrored()).boxes[0]
    assert abs(box[0] + drawn.boxes[0][2] - 64) <= 2


def test_colours_recolour_and_unknown_ones_are_refused():
    red, _ = sprite("car", "red", 32)
    blue, _ = sprite("car", "blue", 32)
    assert red[..., 0].sum() > red[..., 2].sum()
    assert blue[..., 2].sum() > blue[..., 0].sum()
    with pytest.raises(ValueError, match="red, blue, green"):
        sprite("car", "plaid", 32)


def test_insertion_items_hold_a_task_and_its_truth():
    for item in quality.insertion_items(12, seed=1):
        assert item.subject in item.target_caption
        assert item.subject not in item.source_caption
        assert BY_NAME[item.name].name in item.subject
        assert len(item.target.things) == len(item.source.things) + 1
        assert item.picture.size == (64, 64)
        assert world.well_placed(item.mask, item.allowed)
        assert not (item.mask & ~item.footprint).any()
        assert 0 <= item.chance <= 1


def test_render_writes_a_sheet(tmp_path, capsys):
    out = tmp_path / "deep" / "sheet.png"
    assert main(["render", "--n", "9", "--out", str(out), "--captions"]) == 0
    assert out.exists()
    assert len(capsys.readouterr().out.strip().splitlines()) == 10
