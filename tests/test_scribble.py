"""Edits that start from a scribble, or from a piece of another picture, inside a mask."""

import pytest
import torch
from PIL import Image

import compositions
from inlay import ConfigError, InputError, Session
from models import conds, pixel, stable_diffusion

GREY = torch.full((1, 3, 16, 16), 0.2)  # a byte's worth
MASK = torch.zeros(1, 1, 16, 16)
MASK[..., 4:12, 4:12] = 1
DOT = {"colour": "red", "width": 0.25, "points": [[0.5, 0.5]]}
LINE = {"colour": "#0000ff", "width": 0.125, "points": [[0.35, 0.5], [0.65, 0.5]]}


def session(pipe=None, beside=None, **options):
    start = {"guide": "latent:scribbled", "step": 2}
    plugins = {"source_trajectory": {}, "scribble": options, "structure_transfer": start}
    plugins |= {"recorder": compositions.Recorder()} | (beside or {})
    return Session(pipe or pixel(), plugins)


def made(mask=MASK, image=GREY, **options):
    return session(**options).run("a cow", image, mask, steps=4, n=2, seed=1)


def test_strokes_lie_over_each_other_and_nothing_else_changes():
    drawn = made(strokes=[LINE, DOT]).images["scribble"]
    red, blue = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])
    assert torch.equal(drawn[0, :, 8, 8], red) and torch.equal(drawn[0, :, 8, 5], blue)
    rows, columns = (drawn != GREY).any(1)[0].nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 10, 4, 11)
    assert torch.equal(made(strokes=[DOT, LINE]).images["scribble"][0, :, 8, 8], blue)


def test_the_edit_starts_from_it_and_the_background_from_the_source():
    watched = session(strokes=[DOT])
    result = watched.run("a cow", GREY, MASK, steps=4, n=2, seed=1)
    recorder = watched.plugins["recorder"]
    first, noise = recorder.steps[0], recorder.run.x_T["edit", "edit"]
    assert first.index == 2
    guide = result.images["scribble"] * 2 - 1
    torch.testing.assert_close(first.x["edit"], first.frame.noise(guide, noise))
    assert torch.equal(result.board["latent:source"], GREY * 2 - 1)
    assert torch.equal(result.board["latent:scribbled"], guide)


def test_a_source_that_is_drawn_first_is_scribbled_upon():
    pipe = stable_diffusion()
    given = conds() | {"source": conds()["edit"]}
    run = session(pipe, strokes=[DOT], mask="mask:user")
    mask = torch.ones(1, 1, 32, 32)
    result = run.run("a cow", mask=mask, conds=given, steps=4, guidance=2.0)
    source, drawn = result.images["source"], result.images["scribble"]
    assert torch.equal(source[..., :8, :], drawn[..., :8, :])
    assert (drawn[0, :, 16, 16] == torch.tensor([1.0, 0, 0])).all()


def test_a_piece_of_another_picture_fills_the_masks_box_or_its_own(tmp_path):
    other = Image.new("RGB", (20, 10), "black")
    other.paste("lime", (10, 0, 20, 10))
    other.save(tmp_path / "other.png")
    piece = {"picture": str(tmp_path / "other.png")}
    lime, black = torch.tensor([0, 1.0, 0]), torch.zeros(3)
    whole = made(**piece).images["scribble"][0]
    assert torch.equal(whole[:, 8, 4], black) and torch.equal(whole[:, 8, 11], lime)
    assert torch.equal(whole[:, 3], GREY[0, :, 3]) and (whole[:, 4, 4:12] != 0.2).all()
    right = made(**piece, cut=[0.5, 0.0, 1.0, 1.0]).images["scribble"][0]
    assert (right[:, 4:12, 4:12] == lime.view(3, 1, 1)).all()
    placed = made(**piece, cut=[0.5, 0.0, 1.0, 1.0], box=[0.5, 0.65, 0.6, 0.7], strokes=[LINE])
    placed = placed.images["scribble"][0]
    assert torch.equal(placed[:, 10, 9], lime) and torch.equal(placed[:, 4], GREY[0, :, 3])
    assert torch.equal(placed[:, 8, 8], torch.tensor([0, 0, 1.0]))


def test_what_leaves_the_mask_is_refused_or_cut():
    """What is wholly outside is refused either way: nothing would be left of it."""
    half = DOT | {"points": [[0.25, 0.5]]}
    with pytest.raises(InputError, match=r"scribble: \d+ of \d+ drawn pixels are outside the mask"):
        made(strokes=[half])
    cut = made(strokes=[half], outside="cut").images["scribble"]
    assert torch.equal(cut * (1 - MASK), GREY * (1 - MASK)) and not torch.equal(cut, GREY)
    away = DOT | {"points": [[0.05, 0.05]]}
    for outside in ("refuse", "cut"):
        with pytest.raises(InputError, match="Move them, widen the mask"):
            made(strokes=[away], outside=outside)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "scribble: there is nothing to draw"),
        ({"strokes": [{"colour": "red"}]}, r"scribble\.strokes\[0\]: .* is no stroke"),
        ({"strokes": [DOT, DOT | {"colour": "rde"}]}, r"strokes\[1\]"),
        ({"strokes": [DOT | {"points": [[0.5, 1.5]]}]}, "is no stroke"),
        ({"strokes": [DOT | {"size": 3}]}, "is no stroke"),
        ({"strokes": ["red"]}, "is no stroke"),
        ({"strokes": [DOT], "box": [0.5, 0.5, 0.5, 1.0]}, r"scribble\.box: .* is no box"),
    ],
)
def test_what_is_no_scribble_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        made(**options)


def test_a_picture_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"plugins\.scribble\.picture: there is no file 'gone"):
        made(picture="gone.png")
