"""What a user can get wrong: one message with a place and a way out, exit code 2, no file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import folders
from shell import Invoke
from test_images import png_header

LONG = "a very " * 200 + "long dog"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folders.save_flux(tmp_path_factory.mktemp("flux")))


@pytest.fixture
def invoke(invoke: Invoke, model: str) -> Invoke:
    """`inlay WORDS... model=...`, unless the words name one."""

    def call(*words: str) -> tuple[int, str, str]:
        named = any(word.startswith("model=") for word in words)
        return invoke(*words, *(() if named else (f"model={model}",)))

    return call


def refused(invoke: Invoke, *words: str) -> str:
    """The message of a refused run; it is the only one, and nothing was written."""
    before = sorted(Path().rglob("*"))
    code, out, err = invoke("run", *words)
    assert code == 2, err
    assert out == "" and err.count("error:") == 1 and "Traceback" not in err
    assert sorted(Path().rglob("*")) == before
    return err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "steps: 0 cannot be used. It must be 1 or more."),
        ("n=0", "n: 0 cannot be used"),
        ("size=1", "size: "),
        ("prompt.edti=a dog", "prompt.edti: unknown key. Did you mean 'edit'?"),
        ("scheduler=EulerDiscretScheduler", "scheduler: no scheduler 'EulerDiscretScheduler'"),
        ("scheduler=os.system", "scheduler: no scheduler 'os.system'"),
        ("model=toybox/flx", "model: no model 'toybox/flx'. Did you mean 'toybox/flux'?"),
        ("model=./nowhere", "model: no model './nowhere'"),
        (f"prompt.edit={LONG}", "prompt"),
        ("plugins.structur_transfer={}", "no plugin 'structur_transfer'. Did you mean"),
        ("plugins.weighted_attention.gama=2", "gama: unknown key. Did you mean 'gamma'?"),
        ("plugins.weighted_attention.gamma=.nan", "attention.gamma: nan is not a finite number"),
        ("plugins.weighted_attention.windows.double=[0, 99]", "steps 0..99 are outside a run"),
        ("plugins.structure_transfer.step=7", "plugins.structure_transfer.step"),
        ("subject=zebra", "plugins.subject_mask.subject: 'zebra' is not in the prompt"),
        ("offload=model", "offload"),
        ("device=cuda:7", "device"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(invoke: Invoke, override: str, message: str) -> None:
    words = ["addit", "steps=3", "prompt.source=the grass", "prompt.edit=a dog", override]
    assert message in refused(invoke, *words)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing.png", None, "input.image: there is no file 'missing.png'"),
        ("text.png", b"no picture", "input.image: 'text.png' cannot be read"),
        ("half.png", png_header(64, 64), "input.image: 'half.png' cannot be read"),
        ("huge.png", png_header(20_000, 20_000), "input.image: 'huge.png' is too large"),
    ],
)
def test_pictures_that_cannot_be_used(
    invoke: Invoke, name: str, data: bytes | None, message: str
) -> None:
    if data is not None:
        Path(name).write_bytes(data)
    assert message in refused(invoke, "addit", "steps=3", f"input.image={name}")
    error = refused(invoke, "t2i", "steps=3", f"input.mask={name}")
    assert message.replace("input.image", "input.mask") in error


@pytest.mark.parametrize("kind", ["RGBA", "L", "I;16", "turned", "1x1"])
def test_unusual_pictures_work(invoke: Invoke, kind: str) -> None:
    picture, options = Image.new("RGB", (24, 16), (200, 30, 10)), {}
    if kind in ("RGBA", "L"):
        picture = picture.convert(kind)
    elif kind == "I;16":
        picture = Image.fromarray(np.full((16, 24), 40_000, dtype=np.uint16))
    elif kind == "1x1":
        picture = picture.resize((1, 1))
    else:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    picture.save("me.png", **options)
    code, _, err = invoke("run", "addit", "steps=3", "input.image=me.png", "--out", "x")
    assert code == 0, err
    sides = Image.open("x/images/edit.png").size
    assert sides[0] < sides[1] if kind == "turned" else sides[0] >= sides[1]


@pytest.mark.parametrize("out", ["../../x", "../x", "a/../../x", "file", "file/x", "/proc/x"])
def test_folders_that_cannot_be_written(invoke: Invoke, out: str) -> None:
    Path("file").write_text("in the way")
    assert "out" in refused(invoke, "t2i", "steps=3", "--out", out)
    assert "out" in refused(invoke, "t2i", "steps=3", f"out={out}")


def test_a_read_only_folder(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the system's answer is played."""
    Path("locked").mkdir()

    def deny(**_: object) -> str:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr("inlay.cli.output.tempfile.mkdtemp", deny)
    assert "cannot write there: Permission denied" in refused(invoke, "t2i", "--out", "locked")


def test_a_model_that_is_not_safetensors(invoke: Invoke, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "is not safetensors" in refused(invoke, "t2i", f"model={folder}")


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["evil", "Pipeline"]},
        {"_class_name": "FluxPipeline", "vae": ["evil", "Model"]},
        {"_class_name": "NoSuchPipeline"},
        {},
    ],
)
def test_a_model_that_brings_code(invoke: Invoke, tmp_path: Path, index: dict[str, object]) -> None:
    folder = tmp_path / "evil"
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    for place in (folder, folder / "vae"):
        (place / "evil.py").write_text("open('owned', 'w')\nclass Model: ...\nclass Pipeline: ...")
    assert "model" in refused(invoke, "t2i", f"model={folder}")
    assert not Path("owned").exists()


def test_plan_refuses_what_run_refuses(invoke: Invoke) -> None:
    for words in (
        ["addit", "steps=0"],
        ["addit", "input.image=no.png"],
        ["addit", "steps=x"],
    ):
        code, out, err = invoke("plan", *words)
        assert (code, out) == (2, "") and err.startswith("error: ")
