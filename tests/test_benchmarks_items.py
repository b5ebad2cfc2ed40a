"""Items of published benchmarks from miniature folders of the same layout, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from pyarrow import parquet

import miniatures
from inlay_bench import tasks
from inlay_bench.benchmarks.frame import Frame
from inlay_bench.benchmarks.pie_bench import decode, plain
from inlay_bench.benchmarks.words import new_phrase
from inlay_bench.tasks import Item
from inlay_config.errors import ConfigError, InputError

MAKERS: dict[str, Callable[[Path], Path]] = {
    "emu-edit": miniatures.emu_edit,
    "magicbrush": miniatures.magicbrush,
    "pie-bench": miniatures.pie_bench,
    "affordance-set": miniatures.affordance_set,
    "coco-exemplar": miniatures.coco_exemplar,
    "mimicbrush-bench": miniatures.mimicbrush_bench,
    "ip2p-tradeoff": miniatures.ip2p,
}


def items(name: str, root: Path | str, *options: str, n: int = 100) -> list[Item]:
    """The items of a shipped task, as `inlay eval NAME --data ROOT --data OPTION` has them."""
    task = tasks.load(name)
    tasks.adapt(task, [str(root), *options])
    return task.items(n, seed=0)


# layouts -----------------------------------------------------------------------------------------


def test_emu_edit_keeps_items_that_say_what_to_add(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = items("emu-edit", miniatures.emu_edit(tmp_path), "side=32")
    assert [item.id for item in found] == ["0", "1", "6"]
    assert [item.texts["subject"] for item in found] == ["red hat", "canoe", "bicycle"]
    assert found[0].texts["instruction"] == "instruction 0" and found[2].seed == 6
    assert "4 of 7 items are left out" in caplog.text
    assert found[0].picture is not None and found[0].picture.size == (32, 32)
    everything = items("emu-edit", tmp_path, "side=32", "noisy=true")
    assert len(everything) == 7 and everything[5].texts["subject"] == ""
    (local,) = items("emu-edit", tmp_path, "kind=local")
    assert local.texts["subject"] == "wooden"
    assert [item.id for item in items("emu-edit", tmp_path, n=2)] == ["0", "1"]


def test_emu_edit_reads_the_other_split(tmp_path: Path) -> None:
    miniatures.emu_edit(tmp_path, split="test")
    assert len(items("emu-edit", tmp_path, "split=test")) == 3
    with pytest.raises(InputError, match=r"this is no Emu-Edit test set: no validation-\*.parquet"):
        items("emu-edit", tmp_path)


def test_magicbrush_gives_every_turn_its_true_pictures(tmp_path: Path) -> None:
    found = items("magicbrush", miniatures.magicbrush(tmp_path), "side=0")
    assert [item.id for item in found] == ["139-1", "139-2", "30-1"]
    second = found[1]
    assert second.picture is not None
    assert np.array_equal(second.picture, miniatures.scene(40, (64, 64)))  # the truth after turn 1
    assert np.array_equal(second.truth["target"], miniatures.scene(80, (64, 64)))
    texts = {k: second.texts[k] for k in ("source", "target", "local", "subject")}
    assert texts == {
        "source": "a room with a lamp",
        "target": "a room with a lamp with a cat",
        "local": "a cat",
        "subject": "cat",
    }
    assert found[2].texts["local"] == found[2].texts["target"]  # nobody described it
    assert [i.id for i in items("magicbrush", tmp_path, "first=true")] == ["139-1", "30-1"]


def test_magicbrush_reads_parquet_that_holds_the_captions(tmp_path: Path) -> None:
    row = {
        "img_id": "139",
        "turn_index": 1,
        "instruction": "add a lamp",
        "source_global_caption": "a room",
        "target_global_caption": "a room with a lamp",
        "target_local_caption": "a lamp",
        "source_img": miniatures.held(miniatures.scene(1)),
        "mask_img": miniatures.held(miniatures.scene(2)),
        "target_img": miniatures.held(miniatures.scene(3)),
    }
    miniatures.save_rows(tmp_path / "data/dev-00000-of-00001.parquet", [row])
    (item,) = items("magicbrush", tmp_path, "side=16")
    assert (item.id, item.texts["local"], item.texts["subject"]) == ("139-1", "a lamp", "lamp")
    assert item.truth["target"].shape == (16, 16, 3)


def test_pie_bench_has_the_region_to_edit(tmp_path: Path) -> None:
    found = items("pie-bench", miniatures.pie_bench(tmp_path), "side=64")
    assert [item.id for item in found] == ["211000000000", "211000000001"]
    first = found[0]
    assert (first.texts["source"], first.texts["target"]) == ("a table", "a table with a blue cup")
    assert [item.texts["subject"] for item in found] == ["a blue cup", "tree"]
    wanted = np.zeros((64, 64), bool)
    wanted[32:56, 16:48] = True
    inner = (slice(1, -1), slice(1, -1))  # the frame of one pixel is always in it
    assert np.array_equal(first.truth["mask"][inner], wanted[inner])
    assert found[1].truth["mask"].all()
    assert len(items("pie-bench", tmp_path, "types=[0, 2]")) == 3


def test_pie_bench_pp_is_read_from_its_parquet_files(tmp_path: Path) -> None:
    miniatures.pie_bench_pp(tmp_path)
    (item,) = items("pie-bench", tmp_path)
    assert item.id == "211000000000"
    mask = item.truth["mask"]
    assert mask[256].all() and mask[257, :256].all() and not mask[257, 256:-1].any()


def test_an_affordance_set_keeps_its_boxes_on_the_picture(tmp_path: Path) -> None:
    found = items("affordance-set", miniatures.affordance_set(tmp_path), "side=32")
    assert [item.id for item in found] == ["park-0", "park-1"]
    assert found[0].facts["boxes"] == [[0, 16, 16, 32], [16, 24, 32, 32]]
    (whole, _) = items("affordance-set", tmp_path, "side=0")
    assert whole.facts["boxes"][0] == [16, 32, 48, 64] and whole.texts["subject"] == "dog"


# the frame, words, masks -------------------------------------------------------------------------


def test_the_frame_takes_the_middle_of_picture_mask_and_boxes() -> None:
    frame = Frame((96, 64), 32)
    assert frame.box == (16, 0, 80, 64)
    picture = np.asarray(frame.picture(miniatures.scene()))
    assert picture.shape == (32, 32, 3)
    assert picture[0, 0, 0] == pytest.approx(16.5 / 95 * 255, abs=2)
    mask = np.zeros((64, 96), bool)
    mask[:32, :48] = True
    assert frame.mask(mask)[:16, :16].all() and frame.mask(mask).sum() == 256
    assert frame.boxes([[0, 0, 16, 10], [0, 0, 48, 200]]) == [[0, 0, 16, 32]]
    whole = Frame((96, 64), 0)
    assert whole.picture(miniatures.scene(0, (48, 32))).size == (96, 64)


@pytest.mark.parametrize(
    ("before", "after", "phrase"),
    [
        ("a road", "a road with a red car", "red car"),
        ("a man", "A man and his dog, sleeping", "dog, sleeping"),
        ("A Quiet Lake", "a quiet lake", ""),
        ("a lake", "the lake with", ""),
        ("a cat on a sofa", "a hat on a cat on a sofa", "hat"),
    ],
)
def test_new_words_are_found_as_they_stand(before: str, after: str, phrase: str) -> None:
    assert new_phrase(before, after) == phrase and phrase in after


def test_masks_and_prompts_of_pie_bench_are_decoded() -> None:
    mask = decode([513, 2, 512 * 512 - 3, 9], "here")  # a run past the end stops there
    assert mask[1, 1:3].all() and mask[1, 3:-1].sum() == 0
    assert mask[0].all() and mask[-1].all() and mask[:, 0].all() and mask[:, -1].all()
    assert plain("a [red]  car [] on a[ ]road") == "a red car on a road"


# what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_a_benchmark_without_its_files_says_where_to_name_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its files are not here.*--data WHERE"):
        tasks.load(name).items(1, seed=0)
    with pytest.raises(InputError, match="there is no folder"):
        items(name, tmp_path / "nowhere")
    (tmp_path / "else.txt").touch()
    with pytest.raises(InputError, match=r"this is no .*\(there is else.txt\)"):
        items(name, tmp_path)


def test_a_hub_name_that_cannot_be_fetched_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'nobody/nothing' is no folder and cannot be fetched"):
        items("emu-edit", "nobody/nothing")


@pytest.mark.parametrize("name", MAKERS)
def test_options_that_nobody_knows_are_refused(name: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path)
    with pytest.raises(ConfigError, match="unexpected keyword argument 'shade'"):
        items(name, tmp_path, "shade=3")


def spoil(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("magicbrush", r"item 139-2: there is no file .*139-output2.png"),
        ("pie-bench", r"item 211000000001: there is no file .*211000000001.jpg"),
        ("affordance-set", "there is no file .*park-1.png"),
    ],
)
def test_a_missing_picture_is_named(tmp_path: Path, name: str, problem: str) -> None:
    MAKERS[name](tmp_path)
    last = {
        "magicbrush": "images/139/139-output2.png",
        "pie-bench": "annotation_images/2_folder/1_artificial/211000000001.jpg",
        "affordance-set": "park-1.png",
    }
    (tmp_path / last[name]).unlink()
    with pytest.raises(InputError, match=problem):
        items(name, tmp_path)


def emu_rows(root: Path) -> tuple[Path, list[dict[str, Any]]]:
    path = root / "data/validation-00001-of-00002.parquet"
    return path, parquet.read_table(path).to_pylist()


def test_emu_edit_in_disorder_is_named(tmp_path: Path) -> None:
    miniatures.emu_edit(tmp_path)
    path, rows = emu_rows(tmp_path)
    miniatures.save_rows(path, [{**rows[1], "image": None}])
    with pytest.raises(InputError, match="item 6: its picture is missing"):
        items("emu-edit", tmp_path)
    miniatures.save_rows(path, [{**rows[1], "idx": 0}])
    with pytest.raises(InputError, match="two items are called '0'"):
        items("emu-edit", tmp_path)
    miniatures.save_rows(path, [{"idx": 1, "picture": 2}])
    with pytest.raises(InputError, match=r"no column 'task' \(there are idx, picture\)"):
        items("emu-edit", tmp_path)
    path.write_bytes(b"PAR1 torn")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        items("emu-edit", tmp_path)
    with pytest.raises(InputError, match="no item of the class 'dance'"):
        items("emu-edit", miniatures.emu_edit(tmp_path), "kind=dance")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda c: {"139": [{"input": "a", "instruction": "b"}]},
            "139-1: the entry has no 'output'",
        ),
        (lambda c: {"139": ["a"]}, "139-1: the entry is no object"),
        (lambda c: {"139": [{**c["139"][0], "output": "x.png"}]}, "the entry has no 'x.png'"),
        (lambda c: "139", "must be an object"),
    ],
)
def test_magicbrush_in_disorder_is_named(tmp_path: Path, change: Any, problem: str) -> None:
    miniatures.magicbrush(tmp_path)
    spoil(tmp_path / "edit_sessions.json", change)
    with pytest.raises(InputError, match=problem):
        items("magicbrush", tmp_path)
    (tmp_path / "local_descriptions.json").write_text("[")
    with pytest.raises(InputError, match=r"local_descriptions.json: cannot be read as JSON"):
        items("magicbrush", tmp_path)
    (tmp_path / "local_descriptions.json").unlink()
    with pytest.raises(InputError, match=r"local_descriptions.json: there is no such file"):
        items("magicbrush", tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("mask", [1, 2, 3], "its mask is no list of starts and lengths: 3 numbers"),
        ("mask", "one two", "its mask is no list of starts and lengths"),
        ("mask", [-1, 2], "its mask is no list"),
        ("editing_prompt", "", "the entry has no 'editing_prompt'"),
        ("editing_type_id", "0", "no item of the types 2"),
    ],
)
def test_pie_bench_in_disorder_is_named(
    tmp_path: Path, key: str, value: object, problem: str
) -> None:
    miniatures.pie_bench(tmp_path)
    spoil(
        tmp_path / "mapping_file.json",
        lambda c: {"211000000000": {**c["211000000000"], key: value}},
    )
    with pytest.raises(InputError, match=problem):
        items("pie-bench", tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"subject_token": "cat"}, "entry 1: 'cat' is not in 'a park with a bench and a dog'"),
        ({"boxes": [[1, 2, 3]]}, r"\[1, 2, 3\] is no box in a picture of 96x64"),
        ({"boxes": [[0, 0, 97, 10]]}, "is no box"),
        ({"boxes": []}, r"\[\] is no box"),
        ({"boxes": None}, "None is no box"),
        ({"boxes": [[0, 0, 10, 10]]}, "all its boxes are cropped away"),
        ({"src_prompt": None}, "entry 1: the entry has no 'src_prompt'"),
        ({"image": "../park-1.png"}, "climbs out of"),
        ({"image": "park-0.png"}, "two items are called 'park-0'"),
        ({"id": "a b"}, "'a b' is no item id"),
    ],
)
def test_an_affordance_set_in_disorder_is_named(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    miniatures.affordance_set(tmp_path)
    spoil(tmp_path / "items.json", lambda c: [c[0], {**c[1], **change}])
    with pytest.raises(InputError, match=problem):
        items("affordance-set", tmp_path)


def test_networks_and_data_of_the_command_line_are_checked() -> None:
    task = tasks.load("emu-edit")
    with pytest.raises(ConfigError, match="'judge' says no place"):
        tasks.adapt(task, networks=["judge"])
    with pytest.raises(ConfigError, match=r"no 'jugde'.*judge"):
        tasks.adapt(task, networks=["jugde=somewhere"])
    with pytest.raises(ConfigError, match="is no value"):
        tasks.adapt(tasks.load("emu-edit"), ["side=[1"])
