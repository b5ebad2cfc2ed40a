"""Models that take more than a prompt, on the command line: what is wrong with an exemplar, a mask
or a checkpoint, and what stops a training, is said in one line; what is odd works."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import folders
import models
from inlay_train import checkpoints, pairs
from shell import Invoke
from test_images import png_header

PAINT = ("exemplar", "model=paint", "scheduler=DDIMScheduler", "plugins.exemplar.image=this.png")
MIMIC = ("mimicbrush", "model=mimic", "size=32", "plugins.imitation.image=this.png")
INSTRUCT = ("instruct", "model=instruct", "prompt.edit=add a dog")
TRAIN = ("instruct_pix2pix", "model=base", "data.folder=pairs", "data.dataset=null", "size=16",
         "train.batch=2", "train.precision=fp32", "train.workers=0", "train.warmup=0",
         "train.checkpoint=2", "--max-steps", "4", "--out", "out")  # fmt: skip


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models as they should be and not, pictures, masks, and pairs to train on."""
    place = tmp_path_factory.mktemp("room")
    folders.save_paint_by_example(place / "paint")
    folders.save_instruct(place / "instruct")
    folders.save_stable_diffusion(place / "base")
    models.mimicbrush().save_pretrained(place / "mimic")
    models.paint_by_example(channels=4).save_pretrained(place / "paint4")
    models.mimicbrush(channels=9).save_pretrained(place / "mimic9")
    shutil.copytree(place / "instruct", place / "instruct9")
    models.instruct_pix2pix(channels=9).unet.save_pretrained(place / "instruct9" / "unet")
    shutil.copytree(place / "paint", place / "unprojected")
    file = place / "unprojected" / "image_encoder" / "model.safetensors"
    left = {name: t for name, t in load_file(file).items() if not name.startswith("proj_out")}
    save_file(left, file, {"format": "pt"})
    shutil.copytree(place / "mimic", place / "imageless")
    shutil.rmtree(place / "imageless" / "image_tokens")
    draw_pictures(place)
    (place / "pairs").mkdir()
    for i in range(4):
        both = (Image.new("RGB", (24, 24), (40 * i, k, 90)) for k in (10, 200))
        pairs.append(place / "pairs", str(i), *both, {"edit_prompt": f"add {i}"})
    return place


def draw_pictures(place: Path) -> None:
    Image.effect_noise((40, 24), 90).convert("RGB").save(place / "me.png")
    Image.effect_noise((50, 80), 90).convert("RGB").save(place / "this.png")
    Image.new("RGBA", (40, 40), (255, 0, 0, 90)).save(place / "clear.png")
    Image.new("RGB", (90, 4)).save(place / "tiny.png")
    (place / "empty.png").touch()
    (place / "huge.png").write_bytes(png_header(30_000, 30_000))
    Image.new("L", (40, 24), 0).save(place / "black.png")
    border = Image.new("L", (40, 24), 0)
    border.paste(255, (0, 6, 17, 24))
    border.save(place / "border.png")


@pytest.fixture
def call(invoke: Invoke, room: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Invoke:
    """`inlay WORDS...` beside links to what is in the room."""
    monkeypatch.chdir(tmp_path)
    for one in room.iterdir():
        (tmp_path / one.name).symlink_to(one)
    return invoke


def run(call: Invoke, *words: str) -> tuple[int, str, str]:
    given = {"input.image": "me.png", "device": "cpu", "steps": "1"}
    return call("run", *(f"{key}={value}" for key, value in given.items()), "--out", "out", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PAINT, "plugins.exemplar.image=''"), "plugins.exemplar.image: there is no exemplar"),
        (
            (*PAINT, "plugins.exemplar.image=gone.png"),
            "exemplar.image: there is no file 'gone.png'",
        ),
        ((*PAINT, "plugins.exemplar.image=empty.png"), "plugins.exemplar.image: "),
        ((*PAINT, "plugins.exemplar.image=tiny.png"), "90x4 pixels"),
        ((*PAINT, "plugins.exemplar.image=huge.png"), "too large"),
        ((*PAINT, "input.mask=black.png"), "plugins.exemplar: the mask is empty"),
        ((*PAINT, "input.mask=null"), "exemplar needs 'mask:user'"),
        ((*PAINT, "model=paint4"), "its U-Net takes 4 channels"),
        ((*PAINT, "model=unprojected"), "the exemplar's encoder has no proj_out"),
        ((*PAINT, "model=instruct"), "plugins.exemplar: "),
        ((*MIMIC, "plugins.imitation.image=empty.png"), "plugins.imitation.image: "),
        ((*MIMIC, "plugins.imitation.image=tiny.png"), "90x4 pixels"),
        ((*MIMIC, "plugins.imitation.image=huge.png"), "too large"),
        ((*MIMIC, "input.mask=black.png"), "plugins.imitation: the mask is empty"),
        ((*MIMIC, "model=mimic9"), "its U-Net takes 9 channels"),
        ((*MIMIC, "model=imageless"), "'imageless' cannot be loaded: it has no image_tokens"),
        ((*INSTRUCT, "input.image=empty.png"), "input.image: "),
        ((*INSTRUCT, "model=instruct9"), "its U-Net takes 9 channels"),
        ((*INSTRUCT, "model=base"), "plugins.instruct: sd does not see a picture"),
    ],
)
def test_it_is_refused_in_one_line(call: Invoke, words: tuple[str, ...], message: str) -> None:
    mask = () if words[0] == "instruct" else ("input.mask=border.png",)
    code, out, err = run(call, words[0], *mask, *words[1:])
    assert code == 2 and out == "", err
    assert err.count("error:") == 1 and message in err and "Traceback" not in err
    assert not Path("out").exists()


@pytest.mark.parametrize("words", [PAINT, MIMIC], ids=["exemplar", "imitation"])
def test_a_transparent_exemplar_and_a_hole_at_the_border_work(
    call: Invoke, words: tuple[str, ...]
) -> None:
    plugin = words[-1].split(".")[1]
    code, _, err = run(call, *words, f"plugins.{plugin}.image=clear.png", "input.mask=border.png")
    assert code == 0, err
    assert Path("out/images/edit.png").is_file()


# training ----------------------------------------------------------------------------------------


def held() -> int:
    """The step of the checkpoint that is there."""
    with safe_open(Path("out", checkpoints.NAME), "pt") as stored:
        return int(stored.metadata()["step"])


def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(call: Invoke) -> None:
    code, _, err = call("train", *TRAIN)
    assert code == 0 and held() == 4, err
    words = [word if word != "4" else "8" for word in TRAIN]
    code, _, err = call("train", *words, "train.rate=1e38", "--resume")
    assert code == 2 and "loss is nan in step" in err and "is of step 4" in err
    assert held() == 4


def test_a_full_disk_leaves_the_last_checkpoint(
    call: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(tensors: dict[str, torch.Tensor], path: Path, notes: dict[str, str]) -> None:
        if notes["step"] == "4":
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, notes)

    monkeypatch.setattr(checkpoints, "save_file", save)
    code, _, err = call("train", *TRAIN)
    assert code == 2 and "No space" in err and "checkpoint is of step 2" in err
    assert held() == 2 and not list(Path("out").glob(".checkpoint*"))


def test_a_folder_of_torn_pictures_is_refused_and_some_are_counted(call: Invoke) -> None:
    torn = Path("torn")
    shutil.copytree(Path("pairs").resolve(), torn)
    (torn / "1-after.png").write_bytes((torn / "1-after.png").read_bytes()[:40])
    words = ["data.folder=torn" if word == "data.folder=pairs" else word for word in TRAIN]
    code, _, err = call("train", *words)
    assert code == 0 and "1 broken pictures skipped" in err
    for file in torn.glob("*.png"):
        file.write_bytes(b"")
    code, _, err = call("train", *words[:-1], "other")
    assert code == 2 and "rows in a row cannot be read" in err
    assert err.count("error:") == 1
