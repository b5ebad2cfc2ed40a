"""A picture that grows beyond its borders, a window of the model's size at a time."""

import pytest
import torch

import compositions
from inlay import ConfigError, PlanConflict, Session
from invariants import CASES
from models import pixel

PICTURE = torch.arange(3 * 12 * 20).reshape(1, 3, 12, 20) % 256 / 255
SIDES = ("left", "right", "top", "bottom")


def grown(image=PICTURE, beside=None, n=2, **options):
    """A run on a tiny random model of 16x16 pixels."""
    recorder = compositions.Recorder()
    plugins = {
        "extrapolate": options,
        "source_trajectory": {},
        "latent_blend": {"steps": [[0.0, 1.0]], "mask": "mask:new"},
        "recorder": recorder,
    }
    session = Session(pixel(), plugins | (beside or {}))
    return session.run("a cow", image, steps=3, n=n, size=16, seed=1), recorder


def kept(whole: torch.Tensor, side: str) -> torch.Tensor:
    """The part of the whole picture that was there."""
    height, width = PICTURE.shape[-2:]
    rows = slice(-height, None) if side == "top" else slice(height)
    columns = slice(-width, None) if side == "left" else slice(width)
    return whole[..., rows, columns]


@pytest.mark.parametrize("side", SIDES)
def test_what_was_there_stays_and_the_window_shows_the_border(side):
    """A window has the whole height of 12 or width of 20, and half of it is new."""
    result, recorder = grown(side=side)
    across = side in ("left", "right")
    whole, mask = result.images["edit"], result.board["mask:new"]
    assert whole.shape == (2, 3, *((12, 26) if across else (22, 20)))
    assert torch.equal(kept(whole, side), PICTURE.expand(2, -1, -1, -1))
    assert kept(mask, side).max() == 0 and mask.sum() == (12 * 6 if across else 20 * 10)
    assert not torch.equal(whole[0], whole[1])
    made = compositions.Made({}, result, recorder)
    CASES["extrapolate"].holds(made, None)
    window = result.board["image:source"]
    assert window.shape[-2:] == (16, 16)
    boxes = {"left": (8, 0, 16, 16), "right": (0, 0, 8, 16), "top": (0, 8, 16, 16)}
    assert result.board["box:picture"] == boxes.get(side, (0, 0, 16, 8))
    if side == "right":  # what is new mirrors what is there
        seen = torch.cat([PICTURE[..., 14:], PICTURE[..., 14:].flip(-1)], -1)
        size = {"size": (16, 16), "mode": "bicubic", "antialias": True}
        expected = torch.nn.functional.interpolate(seen, **size).clamp(0, 1)
        torch.testing.assert_close(window, expected)


def test_a_picture_that_is_narrower_than_the_rest_of_the_window_is_seen_whole():
    """20 pixels wide is a window of 20 by 20, of which 12 rows are there."""
    result, _ = grown(side="bottom", share=0.1)
    assert result.images["edit"].shape[-2:] == (20, 20)
    far, _ = grown(PICTURE[..., :4], side="right")
    assert far.images["edit"].shape[-2:] == (12, 12)
    assert far.board["box:picture"] == (0, 0, 5, 16)
    assert torch.equal(far.images["edit"][..., :4], PICTURE[..., :4].expand(2, -1, -1, -1))


def test_it_goes_on_from_its_own_result():
    """Beyond the right border, then beyond the left one."""
    first, _ = grown(side="right", n=1)
    second, _ = grown(first.images["edit"], side="left")
    assert second.images["edit"].shape[-2:] == (12, 32)
    bytes_of = (first.images["edit"] * 255).round() / 255  # a file's
    assert torch.equal(second.images["edit"][..., 6:], bytes_of.expand(2, -1, -1, -1))


def test_ranking_and_pasting_see_the_whole_picture():
    beside = {"paste_back": {"mask": "mask:new", "feather": 0}, "rank": {"mask": "mask:new"}}
    plain, _ = grown(side="right")
    result, _ = grown(side="right", beside=beside)
    order = result.board["rank:order"]
    assert torch.equal(result.images["edit"], plain.images["edit"][order])


def test_without_a_picture_all_is_new():
    result, _ = grown(image=None)
    assert result.images["edit"].shape == (2, 3, 16, 16)
    assert result.board["mask:new"].min() == 1


def test_what_cannot_be_is_refused():
    for share in (0.0, 1.0):
        with pytest.raises(ConfigError, match=rf"extrapolate\.share: {share} is no share"):
            grown(share=share)
    with pytest.raises(ConfigError, match=r"plugins\.extrapolate"):
        grown(side="up")
    with pytest.raises(PlanConflict, match="'box:picture' is published by extrapolate and by"):
        grown(beside={"letterbox": {}})
    listed = {"source_trajectory": {}, "extrapolate": {}}
    with pytest.raises(PlanConflict, match="Put extrapolate above source_trajectory"):
        Session(pixel(), listed).run("a cow", PICTURE, steps=1)
