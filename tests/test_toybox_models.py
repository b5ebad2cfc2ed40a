"""The shipped miniature models load in stock libraries and work on scenes nobody trained on."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from torch import nn

import inlay_toybox
from inlay_toybox import quality, text, training, world
from inlay_toybox.classes import NAMES
from inlay_toybox.cli import main
from inlay_toybox.detector import Detector, iou
from inlay_toybox.latents import encode
from inlay_toybox.recipes import distil, flux


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(inlay_toybox.path("flux"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_package_names_its_models_without_importing_torch():
    code = "import sys, inlay_toybox as t; t.path('flux'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    folders = {folder.name for folder in inlay_toybox.path("flux").parent.iterdir()}
    assert set(inlay_toybox.MODELS) == folders
    with pytest.raises(KeyError, match="detector"):
        inlay_toybox.path("dalle")


def test_stock_diffusers_loads_the_pipeline_and_draws_what_is_asked(pipe):
    prompts = ["a red bus on the road", "a whale on the sea", "a kite in the sky over the grass"]
    pictures = quality.generate(pipe, prompts, seed=0)
    assert pictures.shape == (3, 3, 64, 64)
    assert pictures.std((1, 2, 3)).min() > 0.05
    sky, ground = pictures[:, :, :16].mean((2, 3)), pictures[:, :, 48:].mean((2, 3))
    assert (sky[:, 2] > sky[:, 0]).all()
    assert ground[2, 1] > ground[2, 2]
    found = Detector.from_pretrained().detect(pictures)
    hits = sum(n in d.classes for n, d in zip(["bus", "whale", "kite"], found, strict=True))
    assert hits >= 2


def test_the_pipeline_is_small_and_of_one_type(pipe):
    parts = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    assert {p.dtype for m in parts for p in m.parameters()} == {torch.float32}
    trained = [m for m in parts if m is not pipe.vae]
    assert sum(p.numel() for m in trained for p in m.parameters()) <= 8e6
    assert sum(p.numel() for p in pipe.vae.parameters()) <= 1.5e6
    files = list(inlay_toybox.path("flux").rglob("*.safetensors"))
    assert len(files) == 4
    assert sum(f.stat().st_size for f in files) < 20e6


def test_the_settings_beside_the_weights_fit_the_pipeline(pipe):
    settings = json.loads((inlay_toybox.path("flux") / "settings.json").read_text())
    assert settings["max_sequence_length"] == pipe.tokenizer_2.model_max_length == text.TOKENS
    assert pipe.tokenizer.model_max_length == text.TOKENS
    assert quality.settings() == settings


def test_many_class_names_are_several_tokens_and_captions_fit(pipe):
    pieces = {name: pipe.tokenizer_2.tokenize(name) for name in NAMES}
    assert sum(len(p) > len(name.split()) for name, p in pieces.items()) >= 8
    lines = text.corpus(400)
    assert max(len(pipe.tokenizer_2(line).input_ids) for line in lines) <= text.TOKENS
    assert max(len(pipe.tokenizer(line).input_ids) for line in lines) <= text.TOKENS
    assert (
        pipe.tokenizer_2.unk_token_id
        not in pipe.tokenizer_2("A Photo, of: (xylophones)!").input_ids
    )


def test_the_tokenizers_are_learned_from_captions_the_same_way_every_time():
    lines = text.corpus(2000)
    assert text.t5_tokenizer(lines).get_vocab() == text.t5_tokenizer(lines).get_vocab()
    assert (
        text.clip_tokenizer(lines)("a cow").input_ids
        == text.clip_tokenizer(lines)("a cow").input_ids
    )


def test_the_autoencoder_gives_unseen_scenes_back(pipe):
    images = training.batch(range(training.UNSEEN, training.UNSEEN + 16), 64, held_out=True).images
    with torch.no_grad():
        latents = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
        back = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    psnr = -10 * (back - images).square().mean((1, 2, 3)).log10()
    assert psnr.mean() > 30
    scaled = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    assert abs(float(scaled.mean())) < 0.1
    assert 0.9 < float(scaled.std()) < 1.1


@pytest.mark.parametrize("size", [64, 128])
def test_the_detector_finds_classes_boxes_and_masks_in_unseen_scenes(size):
    shares = quality.detector_accuracy(60, size=size)
    assert shares["objects"].value > 0.9
    assert shares["precision"].value > 0.9
    assert shares["masks"].value > 0.85


def test_the_detector_stays_silent_over_empty_scenes():
    empty = [world.sample(training.UNSEEN + i, count=0) for i in range(12)]
    images = [torch.from_numpy(world.render(s).image).permute(2, 0, 1) / 255 for s in empty]
    found = Detector.from_pretrained().detect(torch.stack(images), threshold=0.3)
    assert sum(len(d.classes) for d in found) <= 1
    assert all(d.masks.shape == (len(d.classes), 64, 64) for d in found)


def test_intersection_over_union_of_boxes():
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4], [8, 8, 9, 9]])
    torch.testing.assert_close(iou(boxes, boxes)[0], torch.tensor([1.0, 1 / 3, 0.0]))


def test_packed_latents_hold_two_by_two_squares(pipe):
    images = training.batch(range(2), 64).images
    with torch.no_grad():
        packed = encode(pipe.vae, images)
        latents = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    squares = latents.view(2, 8, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5)
    torch.testing.assert_close(packed, squares.reshape(2, 64, 32))


@pytest.fixture
def short_previews(monkeypatch):
    """Two pictures instead of 24."""
    short = functools.partial(flux.preview, n=2)
    monkeypatch.setattr(flux, "preview", short)
    monkeypatch.setattr(distil, "preview", short)


def progress(folder: Path) -> tuple[int, float]:
    """Steps and seconds of the state in a folder."""
    with safe_open(folder / "state.safetensors", "pt") as state:
        notes = state.metadata()
    return int(notes["step"]), float(notes["elapsed"])


@pytest.mark.usefixtures("short_previews")
@pytest.mark.parametrize("name", ["vae", "detector", "flux"])
def test_resume_trains_the_shipped_weights_further(name, tmp_path, monkeypatch):
    """A few steps from the shipped weights alone, then a few more from the folder they left."""
    monkeypatch.setattr(flux, "train", functools.partial(flux.train, scenes=96))
    order = ["train", name, "--resume", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*order, "--minutes", "0.02"]) == 0
    steps, seconds = progress(tmp_path)
    assert steps >= 1
    assert main([*order, "--minutes", str(seconds / 60 + 0.02)]) == 0
    assert progress(tmp_path)[0] > steps
    assert list((tmp_path / name).rglob("*.safetensors"))


@pytest.mark.usefixtures("short_previews")
def test_distillation_starts_at_the_teacher_and_writes_its_settings(tmp_path):
    folder = distil.train(
        0.02,
        tmp_path,
        torch.device("cpu"),
        teacher=inlay_toybox.path("flux"),
        batch_size=8,
        scenes=32,
        report_every=1,
    )
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["true_cfg_scale"] == 1.0
    assert settings["guidance_scale"] == 3.5
    rows = (tmp_path / "loss.csv").read_text().splitlines()
    assert len(rows) >= 2
    assert float(rows[1].split(",")[2]) < 2.0


def test_a_recipe_without_an_autoencoder_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="autoencoder first"):
        flux.train(0.01, tmp_path, torch.device("cpu"))


def test_mistakes_on_the_command_line_end_with_code_2(tmp_path, capsys):
    assert main(["train", "flux", "--vae", str(tmp_path / "none"), "--minutes", "0.01"]) == 2
    assert "none" in capsys.readouterr().err


def test_the_schedule_warms_up_holds_and_decays():
    rates = [training.learning_rate(done, 1000) for done in (0.0, 0.4, 0.75, 1.0)]
    assert rates[0] == rates[1] == 1.0
    assert 0.4 < rates[2] < 0.6
    assert rates[3] == pytest.approx(0.02)
    assert training.learning_rate(0.0, 0) < 0.05


def test_average_swaps_with_the_weights_and_back():
    layer = nn.Linear(2, 2)
    average = training.Average({"layer": layer})
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    average.update()
    average.swap()
    assert not torch.equal(layer.weight, before + 1)
    average.swap()
    torch.testing.assert_close(layer.weight.detach(), before + 1)
