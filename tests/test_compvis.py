"""Checkpoints of the original programs: tiny random ones in exactly their layout."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

import compvis_layout
import folders
import miniatures
import models
from inlay import Session, backbones
from inlay.backbones import compvis
from inlay_config import manifest, registry
from inlay_config.errors import ModelError
from shell import Invoke


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in diffusers' layout."""
    return folders.save_instruct(tmp_path_factory.mktemp("instruct"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder, safety_checker=None)


@pytest.fixture(scope="module")
def averaged() -> torch.nn.Module:
    """The U-Net whose weights are the moving average."""
    return models.instruct_pix2pix(seed=5).unet


def saved(path: Path, state: dict[str, Any]) -> Path:
    """A checkpoint as Lightning 1.4 writes it: callbacks under their class, weights inside."""
    program = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": program.__name__})
    program.ModelCheckpoint = callback  # type: ignore[attr-defined]
    known = dict(sys.modules)
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[program.__name__] = program
    try:
        callbacks = {callback: {"best_model_score": torch.tensor(0.1), "best_model_path": "x.ckpt"}}
        whole = {"epoch": 52, "global_step": 4999, "callbacks": callbacks, "state_dict": state}
        torch.save(whole, path)
    finally:
        for name in set(sys.modules) - set(known):
            del sys.modules[name]
    return path


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


# what is read ------------------------------------------------------------------------------------


def test_the_average_takes_the_unets_place(
    tmp_path: Path, folder: Path, pipe: Any, averaged: torch.nn.Module
) -> None:
    file = saved(tmp_path / "MagicBrush-epoch-52.ckpt", compvis_layout.state_of(pipe, averaged))
    made = compvis.load(file, str(folder))
    assert same(made.unet, averaged) and not same(made.unet, pipe.unet)
    assert same(made.vae, pipe.vae) and same(made.text_encoder, pipe.text_encoder)
    assert made.scheduler.config == pipe.scheduler.config and made.safety_checker is None
    assert made.tokenizer.get_vocab() == pipe.tokenizer.get_vocab()
    plain = compvis.load(file, str(folder), average=False, dtype="bfloat16")
    assert plain.unet.dtype == torch.bfloat16
    assert torch.equal(plain.unet.conv_in.weight, pipe.unet.conv_in.weight.bfloat16())


def test_a_checkpoint_beside_configurations_is_a_model(
    tmp_path: Path, folder: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    for part in folder.iterdir():
        (place / part.name).symlink_to(part)
    file = place / "erasedraw.safetensors"
    state = compvis_layout.state_of(pipe)
    save_file({key: value.contiguous().clone() for key, value in state.items()}, file)
    assert registry.resolve_model(str(file)) == str(file)
    picture = miniatures.scene(60, (32, 32))
    runs = []
    for name in (str(file), str(folder)):
        session = Session(name, {"instruct": {}}, "EulerAncestralDiscreteScheduler")
        runs.append(session.run("cat", picture, guidance=7.5, steps=2, seed=3))
    assert torch.equal(runs[0].latents["edit"], runs[1].latents["edit"])
    assert runs[0].manifest["weights"] == manifest.hash_weights(file) != ""
    skeleton = backbones.skeleton(str(file))
    assert skeleton.unet.device.type == "meta" and skeleton.unet.config.in_channels == 8


def test_configurations_of_published_models_ship_here(folder: Path, pipe: Any) -> None:
    state = compvis_layout.state_of(pipe)
    for channels, name in compvis.BASES.items():
        conv = torch.zeros(320, channels, 3, 3)
        assert compvis.base_of(Path("nowhere/x.ckpt"), {**state, compvis.FIRST: conv}) == name
        shipped = compvis.data_path("models") / name.replace("/", "--")
        held = json.loads((shipped / "unet" / "config.json").read_text())
        assert held["in_channels"] == channels
    with pytest.raises(ModelError, match="takes 5 channels, none of 4, 8"):
        compvis.base_of(Path("x.ckpt"), {compvis.FIRST: torch.zeros(1, 5, 3, 3)})


# what is written ---------------------------------------------------------------------------------


def test_a_checkpoint_is_converted_to_a_folder(
    tmp_path: Path, folder: Path, pipe: Any, invoke: Invoke
) -> None:
    file = saved(tmp_path / "instruct-pix2pix-00-22000.ckpt", compvis_layout.state_of(pipe))
    out = tmp_path / "converted"
    code, _, said = invoke("models", "convert", str(file), "--out", str(out), "--base", str(folder))
    assert code == 0, said
    made = DiffusionPipeline.from_pretrained(out)
    assert type(made) is type(pipe) and same(made.unet, pipe.unet)
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    code, _, said = invoke("models", "convert", str(file), "--out", str(out))
    assert code != 0 and "it is there already" in said


# what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "problem"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", r"it has no model\.diffusion_model"),
        ("model.diffusion_model.middle_block.1.norm.weight", "it lacks tensors of the unet"),
        ("first_stage_model.decoder.conv_in.weight", "it lacks tensors of the vae"),
        ("model_ema.diffusion_modelout2bias", "its average has no model_ema.diffusion_modelout2"),
        ("cond_stage_model.", "it cannot be converted"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_named(
    tmp_path: Path, folder: Path, pipe: Any, averaged: torch.nn.Module, lost: str, problem: str
) -> None:
    state = compvis_layout.state_of(pipe, averaged if "ema" in lost else None)
    file = tmp_path / "torn.ckpt"
    torch.save({k: v for k, v in state.items() if not k.startswith(lost)}, file)
    with pytest.raises(ModelError, match=problem):
        compvis.load(file, str(folder))


class Hostile:
    """Would run on being unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_no_code_of_a_checkpoint_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "callbacks": Hostile()}, "bad.ckpt")
    with pytest.raises(ModelError, match="Python objects beside tensors"):
        compvis.load("bad.ckpt")
    assert not Path("ran").exists()
    Path("empty.ckpt").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be read"):
        backbones.load("empty.ckpt")
    Image.new("RGB", (4, 4)).save("me.png")
    code, _, said = invoke("plan", "instruct", "model=me.png", "input.image=me.png")
    assert code != 0 and "'me.png' is no model" in said
