"""Rows that recipes with exemplars are trained on: an object cut out of its own picture, and two
views of one scene."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import folders
from inlay_config.errors import ConfigError, InputError
from inlay_toybox import imitation, world
from inlay_train import boxes, imitation_pairs, self_reference
from inlay_train.self_reference import SAMPLES, Settings
from inlay_train.views import Changes, Masking, Sources, Views

BOX = (20, 10, 44, 50)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return folders.save_photos(tmp_path_factory.mktemp("photos"))


def rng(seed=0):
    return np.random.default_rng(seed)


# self-reference ----------------------------------------------------------------------------------


def test_a_hole_is_an_extended_box_or_four_curves_around_the_object():
    curved = 0
    for seed in range(60):
        mask, wide = self_reference.hole(BOX, 64, 60, rng(seed), Settings(jitter=1))
        left, top, right, bottom = wide
        assert 0 <= left <= BOX[0] <= BOX[2] <= right <= 64
        assert 0 <= top <= BOX[1] <= BOX[3] <= bottom <= 60
        assert BOX[0] - left <= 0.4 * BOX[0] and right - BOX[2] <= 0.4 * (64 - BOX[2])
        whole = torch.zeros(1, 60, 64)
        whole[:, top:bottom, left:right] = 1
        curved += not torch.equal(mask, whole)
        assert mask[:, 12:48, 22:42].all()  # all but the object's rim, which jitter may leave
        near = F.max_pool2d(whole, 5, 1, 2)
        assert not (mask > near).any()
    assert 20 <= curved <= 40


def test_a_curve_has_twenty_points_each_one_to_five_pixels_off():
    wide = (12, 4, 56, 56)
    points = np.array(self_reference.outline(BOX, wide, rng(), 5))
    assert points.shape == (4 * SAMPLES, 2)
    u = np.arange(SAMPLES) / SAMPLES
    upper = 2 * u * (1 - u) * wide[1] + (1 - 2 * u * (1 - u)) * BOX[1]
    off = np.abs(points[:SAMPLES, 1] - upper)
    assert off.min() > 1 - 1e-9 and off.max() < 5 + 1e-9
    np.testing.assert_allclose(off, off.round(), atol=1e-9)


def test_a_crop_contains_the_hole_and_is_a_square():
    for seed in range(30):
        left, top, right, bottom = self_reference.window((30, 12, 60, 40), 100, 50, rng(seed))
        assert right - left == bottom - top <= 50
        assert 0 <= left <= 30 and 60 <= right <= 100 and 0 <= top <= 12 and 40 <= bottom <= 50
    assert self_reference.window((10, 0, 90, 40), 100, 50, rng()) == (0, 0, 100, 50)


def test_an_exemplar_without_augmentation_is_the_grown_box():
    picture = torch.rand(3, 60, 64, generator=torch.Generator().manual_seed(0))
    still = Settings(grow=4, rotate=0.0, blur=0.0, bend=0.0, crop=False, elastic=0.0)
    wanted = picture[:, 6:54, 16:48]
    made = {
        tuple(self_reference.make(picture, BOX, 60, 48, rng(i), still).exemplar.shape)
        for i in (0, 1)
    }
    assert made == {(3, 48, 48)}
    flat = F.interpolate(wanted[None], (48, 48), mode="bilinear", antialias=True)[0]
    left = self_reference.augmented(wanted, 48, rng(), Settings(still=True))
    torch.testing.assert_close(left, flat)
    seen = [self_reference.augmented(wanted, 48, rng(i), still) for i in range(8)]
    flips = [bool((s - flat.flip(-1)).abs().max() < 1e-4) for s in seen]
    same = [bool((s - flat).abs().max() < 1e-4) for s in seen]
    assert all(a != b for a, b in zip(flips, same, strict=True)) and any(flips) and any(same)


def test_an_exemplar_is_turned_blurred_and_bent_and_the_same_seed_draws_the_same():
    picture = torch.rand(3, 60, 64, generator=torch.Generator().manual_seed(0))
    pairs = [self_reference.make(picture, BOX, 32, 24, rng(i // 2), Settings()) for i in range(12)]
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        for a, b in zip(vars(one).values(), vars(other).values(), strict=True):
            assert torch.equal(a, b)
    shown = torch.stack([pair.exemplar for pair in pairs[::2]])
    assert shown.shape == (6, 3, 24, 24) and shown.min() >= 0 and shown.max() <= 1
    assert (shown[1:] - shown[0]).abs().mean((1, 2, 3)).min() > 0.01


def test_an_exemplar_may_be_cut_out_of_a_finer_picture():
    """The same place of it, and nothing else changes."""
    fine = torch.rand(3, 120, 128, generator=torch.Generator().manual_seed(0))
    coarse, still = F.avg_pool2d(fine, 2), Settings(grow=4, still=True)
    pairs = [
        self_reference.make(coarse, BOX, 32, 48, rng(), still, finer) for finer in (None, fine)
    ]
    for name in ("picture", "mask"):
        assert torch.equal(*(getattr(pair, name) for pair in pairs))
    cut = fine[None, :, 12:108, 32:96]
    wanted = F.interpolate(cut, (48, 48), mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(pairs[1].exemplar, wanted)
    assert (pairs[0].exemplar - wanted).abs().max() > 0.01


def test_an_elastic_transform_moves_by_hundredths_of_a_pixel_as_published():
    """Uniform moves of a pixel behind a Gaussian of 50 of 224 pixels: their deviation is that of
    white noise, 1 / sqrt(3), over 2 sqrt(pi) times the Gaussian's."""
    moves = self_reference._moves(224, rng(), Settings().elastic) * 224 / 2
    assert moves.shape == (224, 224, 2) and 0.0005 < np.abs(moves).max() < 0.05
    middle = [self_reference._moves(32, rng(i), 1.0)[16, 16] / 2 for i in range(300)]
    wanted = 1 / np.sqrt(3) / (2 * np.sqrt(np.pi) * 32 * 50 / 224)
    assert np.std(middle) == pytest.approx(wanted, rel=0.15)
    ramp = torch.linspace(0, 1, 32).expand(3, 32, 32)
    still = np.eye(2, 3, dtype=np.float32)
    pushed = self_reference._warped(ramp, still, np.full((32, 32, 2), 2 / 31, np.float32))
    torch.testing.assert_close(pushed[:, :, :-1], ramp[:, :, 1:])


def test_boxes_are_read_as_coco_and_open_images_write_them(photos):
    rows = dict(boxes.coco(photos / "instances.json", photos))
    assert [file.name for file in rows] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert all(
        len(found) == 1 for found in rows.values()
    )  # the crowd and the whole picture do not fit
    ((file, found),) = boxes.open_images(photos / "boxes.csv", photos)
    assert (file, found) == (photos / "0.jpg", [(0.1, 0.2, 0.6, 0.7)])
    with pytest.raises(InputError, match="images and annotations"):
        list(boxes.coco(photos / "boxes.csv", photos))
    with pytest.raises(InputError, match="XMin"):
        list(boxes.open_images(photos / "instances.json", photos))
    with pytest.raises(ConfigError, match="nothing to train on"):
        boxes.SelfReference(boxes.Sources(), 16, 16, Settings())


# two views ---------------------------------------------------------------------------------------


def test_cells_with_matches_are_holes_more_often():
    points = np.array([(0.05, 0.05), (0.95, 0.45)])
    masks = torch.stack([imitation_pairs.grid(points, 40, rng(i), (4, 4)) for i in range(600)])
    cells = F.avg_pool2d(masks, 10)
    assert set(cells.unique().tolist()) == {0.0, 1.0}
    share = cells.mean(0)[0]
    matched = share[0, 0], share[1, 3]
    assert all(float(s) == pytest.approx(0.75, abs=0.06) for s in matched)
    share[0, 0] = share[1, 3] = 0.5
    assert float((share - 0.5).abs().max()) < 0.08
    sizes = {
        int(imitation_pairs.grid(points[:0], 90, rng(i)).diff().ne(0).any(1).sum()) + 1
        for i in range(80)
    }
    assert max(sizes) <= 10
    assert imitation_pairs.grid(points[:0], 9, rng(), (3, 3), plain=0.0).sum() == 9


def test_features_are_matched_where_both_views_show_the_same():
    views = imitation.views(40)
    one, other = (
        torch.from_numpy(world.render(scene, 256).image).permute(2, 0, 1) / 255
        for scene in (views.source, views.source.mirrored())
    )
    found = imitation_pairs.matches(one, one)
    assert len(found) >= 10 and found.min() >= 0 and found.max() <= 1
    moved = torch.roll(one, (16, 32), (1, 2))
    again = imitation_pairs.matches(one, moved)
    assert len(again) >= 8
    assert imitation_pairs.matches(one, torch.zeros_like(other)).shape == (0, 2)


def test_frames_make_a_pair_that_are_neither_alike_nor_unrelated():
    views = imitation.views(3)
    one, other = (
        torch.from_numpy(world.render(scene).image).permute(2, 0, 1) / 255
        for scene in (views.source, views.reference)
    )
    assert imitation_pairs.similarity(one, one) == pytest.approx(1)
    assert not imitation_pairs.makes_pair(one, one)
    assert imitation_pairs.makes_pair(one, other)
    assert not imitation_pairs.makes_pair(one, torch.rand(3, 64, 64))


def test_an_augmented_view_is_white_where_it_shows_nothing():
    picture = torch.full((3, 20, 30), 0.25)
    still = imitation_pairs.Strength(0.0, 0.0, 0.0, (1.0, 1.0), 0.0, 0.0)
    same = imitation_pairs.augmented(picture, rng(), still)
    torch.testing.assert_close(same, picture, rtol=0, atol=1e-6)
    small = imitation_pairs.Strength(0.0, 0.0, 0.0, (0.5, 0.5), 0.0, 0.0)
    shrunk = imitation_pairs.augmented(picture, rng(), small)
    assert (shrunk[:, 0] == 1).all() and float(shrunk[0, 10, 15]) == pytest.approx(0.25)
    assert float((shrunk[0] < 0.5).float().mean()) == pytest.approx(0.25, abs=0.02)
    tilted = imitation_pairs.Strength(0.0, 0.0, 0.0, (1.0, 1.0), 0.3, 0.0)
    seen = [imitation_pairs.augmented(picture, rng(i), tilted) for i in (1, 1, 2)]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_a_picture_stands_in_the_middle_of_a_white_square():
    square = imitation_pairs.squared(torch.zeros(3, 10, 30), 30)
    assert (square[:, :10] == 1).all() and (square[:, 10:20] == 0).all()
    assert (square[:, 20:] == 1).all()


def test_views_of_clips_scenes_and_single_pictures(photos):
    folder = Views(Sources(clips=str(photos)), 24, Masking(), Changes())
    assert [len(frames) for frames in folder.clips] == [1, 1, 1, 1, 4, 4]
    for index in (0, 4):
        row = folder.draw(index, rng(index))
        assert {k: tuple(v.shape) for k, v in row.items()} == {
            "source": (3, 24, 24),
            "reference": (3, 24, 24),
            "mask": (1, 24, 24),
            "depth": (1, 24, 24),
        }
    with pytest.raises(InputError, match=r"2\.jpg"):
        folder.draw(2, rng())
    toys = Views(Sources(toybox=9, objects=1.0, zoom=1.0, sift=False), 64, Masking(), Changes())
    row = toys.draw(3, rng())
    assert 0.01 < float(row["mask"].mean()) < 0.7 and row["depth"].max() > 0
    with pytest.raises(ConfigError, match="nothing to train on"):
        Views(Sources(), 24, Masking(), Changes())


def test_two_scenes_have_the_same_things_and_depth_grows_downwards():
    views = imitation.views(3)
    for a, b in zip(views.source.things, views.reference.things, strict=False):
        assert (a.name, a.colour) == (b.name, b.colour)
    empty = world.Scene(views.source.ground, False, views.source.look)
    depth = imitation.depth(empty, world.render(empty))
    assert (np.diff(depth[:, 0]) >= 0).all() and depth[0, 0] == 0 and depth[-1, 0] > 0.97
    drawn = world.render(views.source)
    assert len(np.unique(imitation.depth(views.source, drawn)[drawn.masks[0]])) == 1
