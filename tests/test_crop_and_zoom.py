"""A small mask in a large picture: the box around it, what the model sees, what comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inlay
from inlay import ConfigError, PlanConflict
from inlay_config.images import to_pil, to_tensor
from inlay_plugins import masks
from models import conds, flux, paint_by_example, pixel, stable_diffusion
from spies import plugin

PROMPT = {"source": "a road", "edit": "a dog on a road"}
STEPS, SIDE = 2, 32


def smooth(height: int, width: int) -> Any:
    """A picture: red grows to the right, green downwards."""
    y = torch.linspace(0, 1, height).view(-1, 1).expand(height, width)
    x = torch.linspace(0, 1, width).expand(height, width)
    return to_pil(torch.stack([x, y, torch.full_like(x, 0.5)])[None])[0]


def spot(height: int, width: int, left: int, top: int, right: int, bottom: int) -> Any:
    mask = torch.zeros(1, 1, height, width)
    mask[..., top:bottom, left:right] = 1
    return to_pil(mask)[0]


# the box -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spot", "size", "margin", "zoom", "box"),
    [
        ((40, 50, 50, 70), (32, 32), 0.5, 8.0, (25, 40, 65, 80)),  # twice the longer side
        ((40, 50, 50, 70), (32, 64), 0.5, 8.0, (5, 40, 85, 80)),
        ((40, 50, 50, 70), (32, 32), 0.0, 8.0, (35, 50, 55, 70)),
        ((0, 90, 10, 100), (32, 32), 0.5, 8.0, (0, 80, 20, 100)),  # moved into the picture
        ((40, 50, 42, 52), (32, 32), 0.5, 4.0, (28, 38, 53, 63)),  # no more than four times
        ((10, 10, 90, 90), (32, 32), 0.5, 8.0, (0, 0, 100, 100)),  # as large as can be
        ((0, 0, 100, 100), (32, 32), 0.5, 8.0, (0, 0, 100, 100)),
        ((40, 50, 50, 70), (32, 32), 0.5, 1.0, (0, 0, 100, 100)),
        ((0, 0, 0, 0), (32, 32), 0.5, 8.0, (0, 0, 100, 100)),  # an empty mask
        ((5, 40, 95, 60), (64, 32), 0.0, 8.0, (0, 0, 100, 100)),  # no such box holds it
    ],
)
def test_the_box_holds_the_mask_and_has_the_runs_shape(
    spot: Any, size: Any, margin: float, zoom: float, box: Any
) -> None:
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[spot[1] : spot[3], spot[0] : spot[2]] = True
    assert masks.around(mask, size, margin, zoom) == box


# a run -------------------------------------------------------------------------------------------


def seen() -> tuple[dict[str, Any], Any]:
    kept: dict[str, Any] = {}

    def prepare(run: Any) -> None:
        kept.update(run.board)

    return kept, plugin(prepare=prepare)


@pytest.mark.parametrize("keep", ["mask", "box"])
def test_the_model_sees_the_box_and_the_rest_comes_back_bit_for_bit(keep: str) -> None:
    height, width, hole = 90, 140, (100, 50, 112, 58)
    picture, mask = smooth(height, width), spot(height, width, *hole)
    kept, spy = seen()
    plugins = {"crop_and_zoom": {"feather": 4, "keep": keep}, "spy": spy, "source_trajectory": {}}
    session = inlay.Session(flux(), plugins)
    made = session.run(PROMPT, picture, mask, steps=STEPS, conds=conds(), size=SIDE)
    left, top, right, bottom = box = made.board["box:crop"]
    assert box == (94, 42, 118, 66)  # twice the mask's longer side
    original = to_tensor(picture)
    crop = original[..., top:bottom, left:right]
    assert torch.equal(kept["image:original"], crop)
    assert torch.equal(kept["image:source"], masks.resize_bicubic(crop, (SIDE, SIDE)))
    assert kept["mask:user"].shape == (1, 1, SIDE, SIDE)
    assert kept["mask:user"].mean() == pytest.approx(12 * 8 / 24**2, abs=0.01)
    edit = made.images["edit"]
    assert edit.shape == original.shape
    changed = (edit != original).any(1)[0]
    frame = torch.zeros(height, width, dtype=torch.bool)
    if keep == "mask":
        frame[hole[1] - 4 : hole[3] + 4, hole[0] - 4 : hole[2] + 4] = True
    else:
        frame[top:bottom, left:right] = True
    assert changed.any() and not (changed & ~frame).any()
    assert changed[hole[1] : hole[3], hole[0] : hole[2]].float().mean() > 0.9
    assert torch.equal(made.board["image:original"], original)  # all is as it was
    assert made.board["image:source"].shape == (1, 3, SIDE, SIDE)


def test_masks_and_maps_of_others_are_put_into_the_picture() -> None:
    def declare(need: Any) -> None:
        need.publish("mask:mine")

    def prepare(run: Any) -> None:
        run.board["mask:mine"] = torch.ones(1, 1, 4, 4)

    height, width = 60, 60
    plugins = {"crop_and_zoom": {}, "mine": plugin(declare=declare, prepare=prepare)}
    session = inlay.Session(flux(), plugins)
    mask = spot(height, width, 20, 20, 30, 30)
    made = session.run(PROMPT, smooth(height, width), mask, steps=1, conds=conds(), size=SIDE)
    left, top, right, bottom = made.board["box:crop"]
    wanted = torch.zeros(1, 1, height, width)
    wanted[..., top:bottom, left:right] = 1
    torch.testing.assert_close(made.board["mask:mine"], wanted)


def test_a_mask_of_the_whole_picture_changes_nothing() -> None:
    mask = spot(40, 40, 0, 0, 40, 40)
    runs = [
        inlay.Session(flux(), {**more, "source_trajectory": {}}).run(
            PROMPT, smooth(40, 40), mask, steps=1, conds=conds(), size=SIDE
        )
        for more in ({}, {"crop_and_zoom": {}})
    ]
    assert torch.equal(runs[0].images["edit"], runs[1].images["edit"])


MASKED = {"mask": "mask:user"}
BLEND = {"latent_blend": {"steps": [[0.0, 1.0]], "mask": "mask:user"}}


@pytest.mark.parametrize(
    ("pipe", "plugins"),
    [
        (flux, {"source_trajectory": {}, **BLEND, "paste_back": {"mask": "mask:user"}}),
        (stable_diffusion, {"source_trajectory": {}, **BLEND}),
        (stable_diffusion, {"letterbox": {}, "source_trajectory": {}, "sdedit": MASKED}),
        (pixel, {"source_trajectory": {}, **BLEND, "paste_back": {"mask": "mask:user"}}),
        (paint_by_example, {"exemplar": {}, "source_trajectory": {}, **BLEND, "paste_back": {}}),
    ],
)
def test_it_composes_with_what_edits_inside_a_mask(pipe: Any, plugins: Any, tmp_path: Any) -> None:
    height, width, hole = 100, 80, (30, 60, 40, 72)
    plugins = {name: dict(options) for name, options in plugins.items()}
    words: dict[str, Any] = {"prompt": PROMPT, "conds": conds()}
    if pipe in (pixel, paint_by_example):
        words = {}
    if "exemplar" in plugins:
        smooth(20, 20).save(tmp_path / "this.png")
        plugins["exemplar"] = {"image": str(tmp_path / "this.png")}
        plugins["paste_back"] = {"mask": "mask:user"}
    session = inlay.Session(pipe(), {"crop_and_zoom": {}, **plugins})
    picture, mask = smooth(height, width), spot(height, width, *hole)
    made = session.run(image=picture, mask=mask, steps=4, size=SIDE, **words)
    edit, original = made.images["edit"], to_tensor(picture)
    assert edit.shape == original.shape
    changed = (edit != original).any(1)[0]
    outside = torch.ones(height, width, dtype=torch.bool)
    outside[hole[1] - 10 : hole[3] + 10, hole[0] - 10 : hole[2] + 10] = False
    assert changed.any() and not (changed & outside).any()


# what is refused ---------------------------------------------------------------------------------


def test_bad_options_and_a_missing_mask_are_told() -> None:
    for options, problem in (
        ({"margin": -1}, "margin: -1.0 cannot be used"),
        ({"zoom": 0.5}, "zoom: 0.5 cannot be used"),
        ({"feather": -2}, "feather: -2 cannot be used"),
        ({"keep": "all"}, "keep"),
    ):
        with pytest.raises(ConfigError, match=problem):
            session = inlay.Session(flux(), {"crop_and_zoom": options})
            session.run(PROMPT, smooth(40, 40), spot(40, 40, 1, 1, 9, 9), steps=1, conds=conds())
    with pytest.raises(PlanConflict, match="image:mask"):
        inlay.Session(flux(), {"crop_and_zoom": {}}).run(PROMPT, smooth(40, 40), conds=conds())
    late = {"source_trajectory": {}, "crop_and_zoom": {}}
    with pytest.raises(PlanConflict, match="crop_and_zoom"):
        inlay.Session(flux(), late).run(
            PROMPT, smooth(40, 40), spot(40, 40, 1, 1, 9, 9), conds=conds()
        )
