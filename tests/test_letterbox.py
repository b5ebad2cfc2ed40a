"""Pictures of any shape: run at their own, or in a frame, and back at their own size."""

import pytest
import torch

import inlay
from inlay import PlanConflict
from inlay_config.images import to_pil
from inlay_plugins import masks
from models import conds, flux
from spies import plugin

PROMPT = {"source": "a road", "edit": "a dog on a road"}
STEPS = 3


def smooth(height, width):
    """`1 3 h w`: red grows to the right, green downwards."""
    y = torch.linspace(0, 1, height).view(-1, 1).expand(height, width)
    x = torch.linspace(0, 1, width).expand(height, width)
    return torch.stack([x, y, torch.full_like(x, 0.5)])[None]


def spot(height, width):
    """A mask of the middle of the picture."""
    mask = torch.zeros(1, 1, height, width)
    mask[..., height // 4 : 3 * height // 4, width // 3 : 2 * width // 3] = 1
    return mask


@pytest.mark.parametrize("shape", [(40, 200), (200, 40), (61, 97), (24, 300)])
@pytest.mark.parametrize("framed", [False, True])
def test_a_picture_of_any_shape_comes_back_at_its_own_size(shape, framed):
    """And outside the mask and its feather with its own pixels."""
    picture, mask = smooth(*shape), spot(*shape)
    plugins = {"letterbox": {}} if framed else {}
    plugins |= {"source_trajectory": {}, "paste_back": {"mask": "mask:user", "feather": 2}}
    session = inlay.Session(flux(), plugins)
    given = {"image": to_pil(picture)[0], "mask": to_pil(mask)[0]}
    size = (32, 32) if framed else None
    made = session.run(PROMPT, **given, steps=STEPS, conds=conds(), size=size)
    edit, original = made.images["edit"], made.board["image:original"]
    assert edit.shape == original.shape == (1, 3, *shape)
    cells = zip(shape, made.board["mask:user"].shape[-2:], strict=True)
    reach = 2 * int(max(pixels / cell for pixels, cell in cells)) + 4  # a cell, and the feather
    outside = masks.dilate(mask, reach).expand_as(edit) == 0
    assert outside.any() and torch.equal(edit[outside], original[outside])
    assert (edit != original).any()


def seen():
    """What the model is given of the picture and the mask."""
    kept = {}

    def prepare(run):
        kept.update({k: run.board[k] for k in ("image:source", "mask:user", "box:picture")})

    return kept, plugin(prepare=prepare)


def test_in_the_frame_the_picture_keeps_its_ratio_and_its_border_fills_the_bars():
    kept, spy = seen()
    picture, mask = smooth(30, 120), torch.ones(1, 1, 30, 120)
    session = inlay.Session(flux(), {"letterbox": {}, "source_trajectory": {}, "spy": spy})
    given = {"image": to_pil(picture)[0], "mask": to_pil(mask)[0]}
    made = session.run(PROMPT, **given, steps=STEPS, conds=conds(), size=32)
    assert kept["box:picture"] == (0, 12, 32, 20)
    frame = kept["image:source"]
    wanted = masks.resize_bicubic(made.board["image:original"], (8, 32))
    torch.testing.assert_close(frame[..., 12:20, :], wanted)
    assert (frame[..., :12, :] == frame[..., 12:13, :]).all()
    assert (frame[..., 20:, :] == frame[..., 19:20, :]).all()
    assert kept["mask:user"].sum() == 8 * 32
    assert made.images["edit"].shape == made.images["source"].shape == (1, 3, 8, 32)
    assert made.board["mask:user"].shape == (1, 1, 8, 32)


def test_a_frame_of_the_pictures_shape_changes_nothing():
    picture = to_pil(smooth(32, 32))[0]
    asked = {"steps": STEPS, "conds": conds(), "size": 32}
    plain = inlay.Session(flux(), {"source_trajectory": {}}).run(PROMPT, picture, **asked)
    framed = inlay.Session(flux(), {"letterbox": {}, "source_trajectory": {}})
    assert torch.equal(framed.run(PROMPT, picture, **asked).images["edit"], plain.images["edit"])


def test_it_stands_before_all_that_look_at_the_picture():
    session = inlay.Session(flux(), {"source_trajectory": {}, "letterbox": {}})
    with pytest.raises(PlanConflict, match="Put letterbox above source_trajectory"):
        session.run(PROMPT, to_pil(smooth(32, 32))[0], steps=STEPS, conds=conds())
