"""`inlay augment`: objects inserted into a folder, with boxes and masks that are theirs."""

import json

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from inlay import ConfigError, InputError
from inlay_bench.augment import cli, coco
from inlay_toybox.world import render, sample

BOXES = [[40, 40, 5, 5], [12, 12, 10, 10], [25, 25, 20, 20]]  # aside, hidden, touched
app = typer.Typer()
app.command()(cli.augment)
ASKED = ["--objects", "cow,house", "steps=8", "--tries", "1", "--area", "0.001,0.9"]


def insert(folder, out, *words):
    words = [str(folder), "--out", str(out), *(words or ASKED), "--json"]
    return CliRunner().invoke(app, words, catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two scenes with captions, one broken file and one that is no picture."""
    root = tmp_path_factory.mktemp("pictures")
    for seed in (70001, 70002):
        scene = sample(seed)
        Image.fromarray(render(scene).image).save(root / f"{seed}.png")
        (root / f"{seed}.txt").write_text("a view of the grass")
    (root / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (root / "notes.md").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    labels = folder / "labels.json"
    labels.write_text(
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "70001.png"}],
                "annotations": [{"id": 1, "image_id": 7, "category_id": 4, "bbox": [1, 2, 3, 4]}],
                "categories": [{"id": 4, "name": "kite"}],
            }
        )
    )
    out = tmp_path_factory.mktemp("out")
    done = insert(folder, out, *ASKED, "--labels", str(labels))
    assert done.exit_code == 0, done.output
    return out, json.loads(done.stdout)


def test_pictures_masks_and_annotations_belong_together(made):
    out, counts = made
    data = json.loads((out / "annotations.json").read_text())
    assert counts["unreadable"] == 1
    assert counts["inserted"] == len(data["images"]) >= 1
    names = {kind["id"]: kind["name"] for kind in data["categories"]}
    for image in data["images"]:
        things = [t for t in data["annotations"] if t["image_id"] == image["id"]]
        ours = next(t for t in things if names[t["category_id"]] in ("cow", "house"))
        with Image.open(out / "masks" / image["file_name"]) as file:
            mask = np.asarray(file) > 0
        assert mask.shape == (image["height"], image["width"])
        assert ours["area"] == mask.sum() > 0
        x, y, width, height = ours["bbox"]
        assert mask[y : y + height, x : x + width].sum() == mask.sum()
        drawn = coco.inside(ours["segmentation"], mask.shape)
        assert (drawn & mask).sum() / (drawn | mask).sum() > 0.9


def test_polygons_enclose_the_pixels_they_were_drawn_around():
    mask = np.zeros((24, 32), bool)
    mask[3:11, 2:9], mask[15:20, 20:32] = True, True  # apart, one at the edge
    drawn = coco.inside(coco.annotation(mask)["segmentation"], mask.shape)
    assert (drawn != mask).sum() <= 8  # a corner each


def test_the_mask_is_where_the_picture_changed(made, folder):
    out, _ = made
    for line in (out / "records.jsonl").read_text().splitlines()[1:]:
        record = json.loads(line)
        if record["outcome"] != "inserted":
            continue
        before = np.asarray(Image.open(folder / record["source"]).convert("RGB"), dtype=int)
        after = np.asarray(Image.open(out / "images" / record["file_name"]), dtype=int)
        mask = np.asarray(Image.open(out / "masks" / record["file_name"])) > 0
        change = np.abs(after - before).max(-1)
        assert change[mask].mean() > 2 * change[~mask].mean()


def test_labels_of_the_picture_are_carried_over(made):
    data = json.loads((made[0] / "annotations.json").read_text())
    kites = [t for t in data["annotations"] if t["category_id"] == 4]
    assert [t["bbox"] for t in kites] == [[1, 2, 3, 4]]


def test_what_is_done_is_not_done_again(made, folder, monkeypatch):
    out, counts = made
    before = (out / "annotations.json").read_text()
    monkeypatch.setattr(cli, "_record", lambda *_: pytest.fail("it was done already"))
    (out / "annotations.json").unlink()
    again = insert(folder, out, *ASKED, "--labels", str(folder / "labels.json"))
    assert json.loads(again.stdout) == counts
    assert (out / "annotations.json").read_text() == before


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--objects", " , "], InputError, "no object is named"),
        (["--objects", "cow", "--area", "3"], ConfigError, "--area: '3' is no range"),
        (["--objects", "cow", "--template", "{b}"], ConfigError, "--template: .* cannot be filled"),
        (["--objects", "cow", "--experiment", "t2i"], ConfigError, "says not where the object is"),
        (["--objects", "cow", "--labels", "notes.md"], InputError, "holds no COCO annotations"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_model_loads(
    folder, tmp_path, words, error, message, monkeypatch
):
    monkeypatch.chdir(folder)
    with pytest.raises(error, match=message):
        insert(folder, tmp_path / "out", *words)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no picture"):
        insert(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="there is no such folder"):
        insert(tmp_path / "none", tmp_path / "out")


def test_what_the_object_hides_is_no_label_any_more(tmp_path):
    thing = {"image_id": 1, "category_id": 1}
    known = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{**thing, "id": i, "bbox": b} for i, b in enumerate(BOXES)],
        "categories": [{"id": 1, "name": "duck"}],
    }
    ours = {"bbox": [10, 10, 20, 20], "area": 400, "segmentation": [], "iscrowd": 0}
    record = {"file_name": "a-0.png", "source": "a.png", "width": 64, "height": 64}
    coco.write(
        tmp_path / "a.json", [record | {"object": "cow", "annotation": ours}], ["cow"], known
    )
    data = json.loads((tmp_path / "a.json").read_text())
    assert [t["bbox"] for t in data["annotations"]] == [BOXES[0], BOXES[2], ours["bbox"]]
    assert [t["category_id"] for t in data["annotations"]] == [1, 1, 2]


def test_specks_are_no_object():
    before, after = np.zeros((2, 20, 20, 3), np.uint8)
    after = after.copy()
    after[5:12, 4:10] = 200
    after[18, 18] = 200
    mask = coco.footprint(before, after, np.ones((20, 20), bool))
    assert mask[5:12, 4:10].all()
    assert mask.sum() == 7 * 6


def test_an_articles_sound_is_the_words():
    assert cli._prompt("{a} {object} in {caption}", "fog", "owl") == "an owl in fog"
    assert cli._prompt("{a} {object} in {caption}", "fog", "cow") == "a cow in fog"
