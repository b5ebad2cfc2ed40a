"""Scenes of several objects: one after another, chosen, taken back, killed and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import folders
import inlay
from inlay import ConfigError
from inlay.cli import ladder
from inlay.cli.experiment import plan_experiment
from inlay.cli.sheet import scene_sheet
from inlay_config import config
from inlay_config.images import open_image

OBJECTS = [
    {"subject": "dog", "prompt": "a dog on a road"},
    {"subject": "red car", "prompt": "a dog and a red car on a road"},
    {"subject": "kite", "prompt": "a dog, a red car and a kite"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folders.save_flux(tmp_path_factory.mktemp("flux")))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The subjects that were run."""
    seen: list[str] = []
    climb = ladder.climb

    def counted(exp, *args, **options):
        seen.append(exp.subject)
        return climb(exp, *args, **options)

    monkeypatch.setattr(ladder, "climb", counted)
    return seen


def write(model: str, *objects: dict, **fields: object) -> None:
    told = {"model": model, "device": "cpu", "steps": 2, "n": 2, "size": 32, "scene": objects}
    told["prompt"] = {"source": "a road"}
    told["plugins"] = {
        "source_trajectory": {},
        "structure_transfer": {"step": 0},
        "presence": {"subject": "${subject}"},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(told | fields))


def state(folder: str = "out") -> dict:
    return json.loads(Path(folder, "scene.json").read_text())


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(open_image(path))


def test_a_sheet_keeps_the_shape_of_every_picture() -> None:
    square, wide = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (128, 64), "blue")
    for first, second, side in ((square, wide, 256), (wide, square, 512)):
        sheet = scene_sheet([("dog", [("before", first), ("0", second)], 1)])
        for colour, ratio in (((0, 0, 255), 2), ((255, 0, 0), 1)):
            rows, columns = (np.asarray(sheet) == colour).all(-1).nonzero()
            width, height = int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1
            assert width == ratio * height and max(width, height) in (side, 256)


def test_each_object_goes_into_the_picture_taken_before_it(invoke, model, runs):
    write(model, *OBJECTS)
    code, out, err = invoke("run", "mine.yaml", "--out", "out")
    assert code == 0, err
    assert runs == ["dog", "red car", "kite"]
    told = state()
    assert [d["folder"] for d in told["done"]] == ["1-dog", "2-red-car", "3-kite"]
    assert "2 red car: out/2-red-car/images/edit-" in out
    for before, done in zip(told["done"], told["done"][1:], strict=False):
        manifest = json.loads(Path("out", before["folder"], "manifest.json").read_text())
        taken = manifest["presence"]["best"]
        assert before["scores"] == manifest["presence"]["scores"]
        into = pixels(f"out/{before['folder']}/images/edit-{taken}.png")
        assert (pixels(f"out/{done['folder']}/images/source.png") == into).all()
    manifest = json.loads(Path("out/2-red-car/manifest.json").read_text())["experiment"]
    assert manifest["prompt"] == {"source": OBJECTS[0]["prompt"], "edit": OBJECTS[1]["prompt"],
                                  "negative": ""}  # fmt: skip
    assert manifest["subject"] == manifest["plugins"]["presence"]["subject"] == "red car"
    assert open_image("out/sheet.png").width > 3 * 256
    assert invoke("run", "--from", "out/2-red-car/manifest.json", "--out", "again")[0] == 0
    for name in ("edit-0.png", "edit-1.png"):
        assert (pixels(f"again/images/{name}") == pixels(f"out/2-red-car/images/{name}")).all()


def test_a_killed_scene_goes_on_and_a_changed_object_is_made_again(
    invoke, model, runs, monkeypatch
):
    write(model, *OBJECTS)
    with monkeypatch.context() as patched:
        climb = ladder.climb

        def killed(exp, *args, **options):
            if exp.subject == "kite":
                raise KeyboardInterrupt
            return climb(exp, *args, **options)

        patched.setattr(ladder, "climb", killed)
        assert invoke("run", "mine.yaml", "--out", "out")[0] == 130
    assert [d["subject"] for d in state()["done"]] == ["dog", "red car"]
    assert not Path("out/3-kite").exists()
    assert "1 to go: inlay scene out --resume" in invoke("scene", "out")[1]
    runs.clear()
    assert invoke("scene", "out", "--resume")[0] == 0
    assert runs == ["kite"]
    assert invoke("run", "mine.yaml", "--out", "out")[0] == 0
    assert runs == ["kite"]  # nothing is left to do
    write(model, OBJECTS[0], OBJECTS[1] | {"seed": 7}, OBJECTS[2])
    runs.clear()
    assert invoke("run", "mine.yaml", "--out", "out")[0] == 0
    assert runs == ["red car", "kite"]


def test_a_user_picks_undoes_and_goes_on(invoke, model, runs):
    write(model, OBJECTS[0] | {"pick": "user"}, OBJECTS[1])
    _, out, _ = invoke("run", "mine.yaml", "--out", "out")
    assert runs == ["dog"] and "choose: inlay scene out --pick NUMBER --resume" in out
    other = 1 - state()["done"][0]["best"]
    assert invoke("scene", "out", "--pick", other, "--resume")[0] == 0
    assert runs == ["dog", "red car"]
    into = pixels(f"out/1-dog/images/edit-{other}.png")
    assert (pixels("out/2-red-car/images/source.png") == into).all()

    code, out, _ = invoke("scene", "out", "--pick", 1 - other, "--object", 1, "--json")
    assert code == 0 and [d["picked"] for d in json.loads(out)["done"]] == [1 - other]

    assert invoke("scene", "out", "--resume")[0] == 0
    assert invoke("scene", "out", "--undo")[0] == 0
    assert [d["subject"] for d in state()["done"]] == ["dog"]
    assert invoke("scene", "out", "--resume")[0] == 0
    assert runs[-1] == "red car" and state()["done"][1]["folder"] == "2-red-car-1"
    first, second = (pixels(f"out/{f}/images/edit-0.png") for f in ("2-red-car", "2-red-car-1"))
    assert (first != second).any()


def test_a_picture_of_yours_is_where_it_begins_and_costs_no_evaluation(model, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    path = tmp_path / "me.png"
    Image.fromarray(picture).save(path)
    exp = config.load("addit_scene", [f"model={model}", "device=cpu", "size=32"])
    generated = plan_experiment(exp)
    given = plan_experiment(config.over(exp, {"input": {"image": str(path)}}))
    assert [p.name for p in generated.passes] == ["source", "edit"]
    assert [p.name for p in given.passes] == ["edit"]
    rows = {ln.name: len(ln.steps) for ln in given.passes[0].lanes}
    assert rows["edit"] >= rows["source"]  # only where the edit attends to it


@pytest.mark.parametrize(
    ("objects", "problem"),
    [
        ([{"subject": "dog"}], "scene[0]: no prompt"),
        ([OBJECTS[0], {"prompt": "a kite"}], "scene[1]: no subject"),
        ([OBJECTS[0] | {"pick": 3}], "scene[0].pick: 3 cannot be picked"),
        ([OBJECTS[0] | {"stepz": 3}], "scene[0].stepz: unknown key"),
    ],
)
def test_an_object_that_cannot_be_inserted_is_named(invoke, model, objects, problem):
    write(model, *objects)
    code, _, err = invoke("run", "mine.yaml", "--out", "out")
    assert code == 2 and problem in err
    assert not Path("out").exists()


def test_mistakes_in_what_is_asked_of_a_scene_are_told(invoke, model):
    code, _, err = invoke("scene", "nowhere")
    assert code == 2 and "nowhere/scene.json: holds no scene" in err
    Path("out").mkdir()
    Path("out/scene.json").write_text('{"inlay_scene": 1, "done": 3}')
    assert invoke("scene", "out")[0] == 2
    Path("out/scene.json").unlink()
    write(model, OBJECTS[0])
    assert invoke("run", "mine.yaml", "--out", "out")[0] == 0
    for words, problem in (
        (("--pick", 2), "there is no candidate 2"),
        (("--pick", 0, "--object", 2), "there is no object 2"),
        (("--pick", 0, "--undo"), "to pick and to undo at once"),
    ):
        code, _, err = invoke("scene", "out", *words)
        assert code == 2 and problem in err


def test_a_scene_is_no_single_result(invoke, model):
    write(model, *OBJECTS)
    with pytest.raises(ConfigError, match="a result for each object"):
        inlay.run("mine.yaml")
