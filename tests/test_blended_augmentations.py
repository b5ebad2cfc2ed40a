"""The extending augmentations against stored numbers, and what is drawn for them."""

import math

import pytest
import torch
import torch.nn.functional as F

import toys
from inlay import ConfigError, Session
from inlay_plugins.extending_augmentations import ExtendingAugmentations
from models import pixel

WHITE = torch.ones(1, 1, 32, 32)


def made(**options) -> ExtendingAugmentations:
    return ExtendingAugmentations(ExtendingAugmentations.Config(**options))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", ["p1", "p07"])
@pytest.mark.parametrize(("mode", "key"), [("reference", "output"), ("fixed", "output_kornia090")])
def test_the_published_warps(mode, key, case):
    """Both sampling rules, from the stored matrices, all of which act or, in `p07`, some;
    every second row and column is stored."""
    stored, card = toys.golden("bd_augment")
    side = card["output_size"]
    picture = stored.get(f"{case}.input", stored["p1.input"])
    seen = F.adaptive_avg_pool2d(picture, side).repeat(card["aug_num"] - 1, 1, 1, 1)
    kinds = ("affine", "perspective")
    applied = torch.stack([stored[f"{case}.{kind}_applied"] for kind in kinds])
    matrices = (stored[f"{case}.{kind}"] for kind in kinds)
    warped = made(mode=mode).warp(seen, *matrices, applied)
    off = (warped[..., ::2, ::2] - stored[f"{case}.{key}"]).abs().max()
    assert off < card["tolerance_max_abs"]["output"]


def test_the_matrices_are_those_of_the_published_parameters():
    """Drawn angles, shifts and corners give matrices as the stored ones do."""
    stored, card = toys.golden("bd_augment")
    side, centre = card["output_size"], (card["output_size"] - 1) / 2
    affine, perspective = made(mode="reference").draw(200, side, rng())
    for matrix, angle, shift in zip(
        stored["p1.affine"], stored["p1.angle_deg"], stored["p1.translation_px"], strict=True
    ):
        middle = matrix @ torch.tensor([centre, centre, 1.0])
        torch.testing.assert_close(middle[:2] - centre, shift, atol=1e-4, rtol=0)
        assert math.degrees(math.atan2(matrix[1, 0], matrix[0, 0])) == pytest.approx(
            float(angle), abs=1e-3
        )
    middles = (affine @ torch.tensor([centre, centre, 1.0]))[:, :2] - centre
    assert middles[:, 0].abs().max() < 1e-4
    assert 0.08 * side < middles[:, 1].abs().max() <= 0.1 * side + 1e-4
    angles = torch.atan2(affine[:, 1, 0], affine[:, 0, 0]).rad2deg().abs()
    assert 14 < angles.max() <= 15 + 1e-4
    corners = torch.tensor(
        [[0.0, 0, 1], [side - 1, 0, 1], [side - 1, side - 1, 1], [0, side - 1, 1]]
    )
    moved = torch.einsum("kij,cj->kci", perspective, corners)
    inwards = (moved[..., :2] / moved[..., 2:] - corners[:, :2]).abs()
    assert inwards.min() > -1e-3 and 0.33 * side < inwards.max() <= 0.35 * side + 1e-3


def test_fixed_shifts_go_both_ways():
    middle = torch.tensor([15.5, 15.5, 1.0])
    moved = (made().draw(100, 32, rng())[0] @ middle)[:, :2] - 15.5
    assert (moved.abs().amax(0) > 2).all()


def test_copies_lie_one_after_the_other_and_the_first_is_untouched():
    pictures = torch.stack([torch.full((3, 32, 32), v) for v in (0.25, -0.5)])
    copies = made(copies=4, affine=1.0, perspective=1.0).augment(pictures, WHITE, 21, rng())
    assert copies.shape == (8, 3, 21, 21)
    assert torch.equal(copies[:2], F.adaptive_avg_pool2d(pictures, 21))
    centres = copies[:, 0, 10, 10]
    torch.testing.assert_close(centres, torch.tensor([0.25, -0.5] * 4))
    assert torch.equal(made(copies=1).augment(pictures, WHITE, 21, rng()), copies[:2])


def test_a_seed_repeats_the_warps_and_probabilities_turn_them_off():
    picture = torch.rand(1, 3, 32, 32, generator=rng(5))
    one, same, other = (made().augment(picture, WHITE, 32, rng(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    still = made(affine=0.0, perspective=0.0).augment(picture, WHITE, 32, rng())
    assert torch.equal(still, picture.expand(8, -1, -1, -1))
    pooled = made(copies=64).augment(picture, WHITE, 32, rng())
    untouched = (pooled == picture).flatten(1).all(1).float().mean()
    assert 0.02 < untouched < 0.25  # 0.09 of the copies and the first


def test_the_mask_is_warped_with_the_picture_and_a_gradient_comes_back_through_it():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    picture = torch.ones(1, 3, 32, 32, requires_grad=True)
    copies = made(copies=16).augment(picture, mask, 32, rng())
    areas = copies.detach()[:, 0].sum((1, 2))
    assert areas[0] == 256 and areas.min() < 200
    copies.square().sum().backward()
    assert (picture.grad * (1 - mask)).abs().max() == 0
    assert (picture.grad * mask).abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copies": 0}, "plugins.augment.copies: no copy"),
        ({"affine": 1.5}, "plugins.augment.affine: 1.5 is no share"),
        ({"distortion": -0.1}, "plugins.augment.distortion"),
    ],
)
def test_wrong_options_are_refused(options, message):
    session = Session(pixel(), {"augment": made(**options)})
    with pytest.raises(ConfigError, match=message):
        session.run(steps=2)
