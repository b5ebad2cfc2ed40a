"""The command line: speed, folders, replay, interruption, and what a script can rely on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import folders
from inlay.cli import main as cli
from inlay.cli.progress import Progress
from inlay_config import config
from inlay_config.images import open_image
from shell import Invoke


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folders.save_flux(tmp_path_factory.mktemp("flux")))


@pytest.mark.parametrize("words", [["--help"], ["plugins"], ["models"], ["plugins", "--json"]])
def test_listing_answers_without_torch(words: list[str]) -> None:
    code = "import sys; from inlay.cli.main import main\ntry: main()\n"
    code += "except SystemExit as e: sys.exit(e.code or (9 if 'torch' in sys.modules else 0))"
    started = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    print(f"inlay {' '.join(words)}: {time.perf_counter() - started:.2f} s")
    assert ended.returncode == 0 and ended.stdout


def test_help_documents_exit_codes_and_verbs(invoke: Invoke) -> None:
    code, out, _ = invoke("--help")
    assert code == 0
    for word in ("run", "plan", "plugins", "models", "Exit codes: 0 done", "130"):
        assert word in out


def test_listings_are_tables_and_json(invoke: Invoke) -> None:
    for verb, name in (("plugins", "latent_blend"), ("models", "toybox/flux")):
        assert name in invoke(verb)[1]
        code, out, _ = invoke(verb, "--json")
        assert code == 0 and json.loads(out)[name]["summary"]


def test_version(invoke: Invoke) -> None:
    assert invoke("--version") == (0, "inlay 0.1.0\n", "")


def test_a_run_fills_the_folder_and_repeats_bit_for_bit(
    invoke: Invoke, model: str, tmp_path: Path
) -> None:
    words = ("t2i", f"model={model}", "steps=3", "n=2", "prompt.edit=a dog", "seed=5")
    code, out, err = invoke("run", *words, "--out", "first")
    assert (code, out) == (0, "first: images, masks, manifest.json, sheet.png\n"), err
    assert "edit: 3 steps" in err
    first = tmp_path / "first"
    assert {p.name for p in first.iterdir()} == {"images", "manifest.json", "sheet.png"}
    assert open_image(first / "sheet.png").width > 256

    assert invoke("run", "--from", first / "manifest.json", "--out", "second")[0] == 0
    picture = first / "images" / "edit-1.png"
    assert invoke("run", "--from", picture, f"model={model}", "--out", "third")[0] == 0
    for name in ("edit-0.png", "edit-1.png"):
        pixels = [
            np.asarray(open_image(tmp_path / f / "images" / name))
            for f in ("first", "second", "third")
        ]
        assert (pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all()


def test_addit_on_a_picture_repeats_bit_for_bit(invoke: Invoke, model: str, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(picture).save("me.png")
    words = (f"model={model}", "steps=4", "input.image=me.png", "prompt.source=the grass")
    code, _, err = invoke("run", "addit_paste", *words, "--out", "first")
    assert code == 0, err
    first = tmp_path / "first"
    assert (first / "masks" / "subject.png").is_file()
    sheet = open_image(first / "sheet.png")
    assert sheet.width > 4 * 256  # input, source, edit, mask, attention
    carried = first / "images" / "edit.png"
    again = ("run", "--from", carried, f"model={model}", "input.image=me.png", "--out", "second")
    code, _, err = invoke(*again)
    assert code == 0, err
    assert (
        np.asarray(open_image("second/images/edit.png")) == np.asarray(open_image(carried))
    ).all()


def test_json_reports_the_manifest(invoke: Invoke, model: str) -> None:
    code, out, err = invoke("run", "t2i", f"model={model}", "steps=2", "--out", "x", "--json")
    report = json.loads(out)
    assert code == 0 and err == "" and len(report) == 1
    assert report[0]["out"] == "x"
    assert report[0]["manifest"] == json.loads(Path("x/manifest.json").read_text())


def test_several_experiments_share_one_sheet(invoke: Invoke, model: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"extends: t2i\nsteps: 2\nmodel: {model}\n")
    assert invoke("run", "a.yaml", "b.yaml", "--out", "both")[0] == 0
    sheets = [open_image(f"both/{name}/sheet.png") for name in ("a", "b")]
    assert open_image("both/sheet.png").height == sum(sheet.height for sheet in sheets)
    code, _, err = invoke("run", "a.yaml", "./a.yaml")
    assert code == 2 and "two experiments of one name" in err


def test_without_out_results_go_to_outputs(invoke: Invoke, model: str) -> None:
    assert invoke("run", "t2i", f"model={model}", "steps=1")[0] == 0
    assert Path("outputs/t2i/images/edit.png").is_file()
    assert invoke("run", "t2i", f"model={model}", "steps=1", "out=mine")[0] == 0
    assert Path("mine/images/edit.png").is_file()


def test_a_second_run_replaces_the_first_whole(invoke: Invoke, model: str) -> None:
    for n in (2, 1):
        assert invoke("run", "t2i", f"model={model}", "steps=1", f"n={n}", "--out", "x")[0] == 0
    Path("x/notes.txt").write_text("mine")
    assert sorted(p.name for p in Path("x/images").iterdir()) == ["edit.png"]
    assert invoke("run", "t2i", f"model={model}", "steps=1", "--out", "x")[0] == 0
    assert Path("x/notes.txt").read_text() == "mine"  # what is not ours stays


def test_ctrl_c_in_mid_run_leaves_nothing(
    invoke: Invoke, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Progress, event: dict[str, Any]) -> None:
        if event.get("step") == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "update", interrupt)
    held = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    try:
        code, out, err = invoke("run", "t2i", f"model={model}", "steps=4", "--out", "x/y")
    finally:
        signal.signal(signal.SIGINT, held)
    assert (code, out) == (
        130,
        "",
    ) and err.strip() == "error: interrupted; nothing unfinished was written"
    assert list(Path().iterdir()) == []


def test_an_earlier_result_survives_a_failed_run(
    invoke: Invoke, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run", "t2i", f"model={model}", "steps=2", "--out", "x")
    assert invoke(*words)[0] == 0
    before = {p: p.read_bytes() for p in Path("x").rglob("*") if p.is_file()}

    def fail(self: Progress, event: dict[str, Any]) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(Progress, "update", fail)
    code, _, err = invoke(*words)
    assert code == 1 and "ZeroDivisionError: boom (set INLAY_DEBUG=1" in err
    assert "Traceback" not in err
    assert {p: p.read_bytes() for p in Path("x").rglob("*") if p.is_file()} == before
    monkeypatch.setenv("INLAY_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["inlay", *words])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_progress_names_pass_step_sigma_pace_and_plugins(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    step = {"pass": "edit", "steps": 4, "sigma": 0.5, "active": ["latent_blend"]}
    with Progress(quiet=False) as progress:
        progress.update({"kind": "pass", **step})
        progress.update({"kind": "step", "step": 2, **step})
        progress.update({"kind": "done"})
    shown = capfd.readouterr().err
    for word in ("edit", "3/4", "sigma 0.500", "s/step", "latent_blend"):
        assert word in shown


def test_plan_shows_passes_and_json(invoke: Invoke, model: str) -> None:
    code, out, err = invoke("plan", "t2i", f"model={model}", "steps=3")
    assert code == 0 and "pass edit" in out and err == ""
    code, out, _ = invoke("plan", "t2i", f"model={model}", "steps=3", "--json")
    assert code == 0 and json.loads(out)["steps"] == 3


def test_replay_refuses_other_pictures_and_weights(
    invoke: Invoke, model: str, tmp_path: Path
) -> None:
    Image.new("RGB", (32, 32), "red").save("me.png")
    words = ("t2i", f"model={model}", "steps=1", "input.image=me.png", "--out", "x")
    assert invoke("run", *words)[0] == 0
    again = ("run", "--from", "x/manifest.json", "--out", "y")
    Image.new("RGB", (32, 32), "blue").save("me.png")
    code, _, err = invoke(*again)
    assert code == 2 and "input.image: 'me.png' is not the recorded picture" in err
    Path("me.png").unlink()
    assert "there is no file 'me.png' here" in invoke(*again)[2]
    Image.new("RGB", (32, 32), "red").save("moved.bmp")
    assert invoke(*again, "input.image=moved.bmp")[0] == 0

    record = json.loads(Path("x/manifest.json").read_text())
    record["weights"], record["inputs"] = "other", {}
    Path("z.json").write_text(json.dumps(record))
    code, _, err = invoke("run", "--from", "z.json")
    assert code == 2 and "the weights of" in err


def test_every_verb_knows_json_errors(invoke: Invoke) -> None:
    for words in (["run", "adit"], ["plan", "adit"], ["plugins", "adit"]):
        code, out, _ = invoke(*words, "--json")
        assert code == json.loads(out)["exit_code"] == 2 and "adit" in json.loads(out)["error"]


def test_a_folder_of_packaged_experiments_runs_them_all() -> None:
    from inlay.cli.run import _expand

    inside = [name for name in config.experiments() if name.startswith("presets/")]
    assert _expand(["t2i", "presets"]) == ["t2i", *inside]
