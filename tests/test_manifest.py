"""The manifest: complete on disk, discreet in pictures, sensitive to what decides the bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from inlay.board import Board
from inlay.cli import replay
from inlay.events import Result
from inlay_config import config, images, manifest
from inlay_config.errors import InputError

PICTURE = Image.new("RGB", (4, 4), "red")


def record(tmp_path: Path) -> dict[str, Any]:
    """What a run hands to `manifest.build`."""
    overrides = [f"input.image={tmp_path}/me.png", f"model={tmp_path}/model", f"out={tmp_path}"]
    experiment = config.to_dict(config.load("addit", overrides))
    run = {"plan": "p1", "seed": 3, "timings": {"total": 1.5}}
    return {"experiment": experiment, "folder": "", "pictures": {"image": PICTURE}, **run}


def test_a_manifest_holds_what_reproduces_a_run(tmp_path: Path) -> None:
    built = manifest.build(**record(tmp_path))
    assert {"torch", "diffusers", "transformers", "numpy", "inlay", "python"} <= set(
        built["versions"]
    )
    assert built["plan"] == "p1" and built["seed"] == 3 and built["weights"] == ""
    assert built["inputs"] == {"image": manifest.hash_image(PICTURE)}
    assert config.from_dict(built["experiment"]) == config.load(
        "addit",
        [f"input.image={tmp_path}/me.png", f"model={tmp_path}/model", f"out={tmp_path}"],
    )


def test_a_picture_carries_the_manifest_without_the_machine(tmp_path: Path) -> None:
    built = manifest.build(**record(tmp_path))
    images.save(Image.new("RGB", (4, 4)), tmp_path / "x.png", built)
    text = Image.open(tmp_path / "x.png").info["inlay"]
    for private in (str(tmp_path), built["host"], "timings"):
        assert private not in text
    read = replay.read(tmp_path / "x.png")
    assert read["experiment"]["input"]["image"] == "me.png"
    assert read["experiment"]["model"] == "model" and read["experiment"]["out"] is None
    assert read["experiment"]["plugins"] == built["experiment"]["plugins"]
    assert built["experiment"]["input"]["image"] == f"{tmp_path}/me.png"  # untouched


def test_result_files(tmp_path: Path) -> None:
    board = Board({"mask:subject": "a", "mask:user": "b", "map:subject": "c"})
    board["mask:subject"], board["mask:user"] = torch.ones(2, 1, 8, 8), torch.ones(1, 1, 8, 8)
    board["map:subject"] = torch.rand(2, 1, 4, 4)
    lanes = {"source": torch.zeros(1, 3, 8, 8), "edit": torch.ones(2, 3, 8, 8)}
    Result(lanes, {}, board, record(tmp_path)).save(tmp_path / "out")
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert files == {
        "images/source.png",
        "images/edit-0.png",
        "images/edit-1.png",
        "masks/subject-0.png",
        "masks/subject-1.png",
        "masks/user.png",
        "manifest.json",
    }
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest.build(
        **record(tmp_path)
    )


def test_a_mask_name_cannot_climb_out(tmp_path: Path) -> None:
    board = Board({"mask:../../x": "a"})
    board["mask:../../x"] = torch.ones(1, 1, 8, 8)
    with pytest.raises(InputError, match="climbs out"):
        Result({}, {}, board, {}).save(tmp_path / "out")
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"inlay_manifest": 99, "experiment": {}}', "[" * 100_000],
)
def test_what_holds_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"x\.json: holds no manifest"):
        replay.read(tmp_path / "x.json")


def test_pictures_without_manifest_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="holds no manifest"):
        replay.read(tmp_path / "x.png")
    with pytest.raises(InputError, match="holds no manifest"):
        replay.read(tmp_path / "missing.png")


def test_the_image_hash_sees_pixels_not_files(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    digest = manifest.hash_image(picture)
    picture.save(tmp_path / "x.bmp")
    assert manifest.hash_image(Image.open(tmp_path / "x.bmp")) == digest
    changed = picture.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert manifest.hash_image(changed) != digest
    flat = Image.new("RGB", (4, 6))
    assert manifest.hash_image(flat) != manifest.hash_image(
        flat.transpose(Image.Transpose.ROTATE_90)
    )


def test_the_weight_hash_sees_names_and_bytes(tmp_path: Path) -> None:
    for folder, name, value in (
        ("a", "unet", 1),
        ("b", "unet", 1),
        ("c", "unet", 2),
        ("d", "vae", 1),
    ):
        (tmp_path / folder / name).mkdir(parents=True)
        save_file({"w": np.full(3, value, np.float32)}, tmp_path / folder / name / "m.safetensors")
    a, b, c, d = (manifest.hash_weights(tmp_path / name) for name in "abcd")
    assert a == b and len({a, c, d}) == 3
    save_file({"w": np.full(3, 5, np.float32)}, tmp_path / "a" / "unet" / "m.safetensors")
    assert manifest.hash_weights(tmp_path / "a") != a
    assert manifest.hash_weights(tmp_path / "nowhere") == ""
