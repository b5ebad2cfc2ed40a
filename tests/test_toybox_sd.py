"""toybox/sd: loads in stock diffusers, draws what is asked, trains further, runs in inlay."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from safetensors import safe_open

import inlay
import inlay_toybox
from inlay.cli import main as inlay_cli
from inlay_toybox import quality, text, training
from inlay_toybox.cli import main
from inlay_toybox.latents import encode
from inlay_toybox.quality.figures import home
from inlay_toybox.recipes import sd


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(inlay_toybox.path("sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_of_one_type_and_shares_the_autoencoder(pipe):
    assert sum(p.numel() for p in pipe.unet.parameters()) <= 2.1e6
    assert sum(p.numel() for p in pipe.text_encoder.parameters()) <= 0.4e6
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    shared = inlay_toybox.path("flux") / "vae"
    for file in (inlay_toybox.path("sd") / "vae").iterdir():
        assert file.read_bytes() == (shared / file.name).read_bytes()
        assert not (home("sd") / "vae" / file.name).exists()  # it ships once
    assert pipe.safety_checker is None
    assert not pipe.config.requires_safety_checker


def test_words_and_picture_attend_at_two_resolutions_or_more(pipe):
    sides: dict[bool, set[int]] = {False: set(), True: set()}

    def note(module: Attention, _: object, kwargs: dict, output: torch.Tensor) -> None:
        sides[kwargs.get("encoder_hidden_states") is not None].add(int(output.shape[1] ** 0.5))

    hooks = [
        m.register_forward_hook(note, with_kwargs=True)
        for m in pipe.unet.modules()
        if isinstance(m, Attention)
    ]
    with torch.no_grad():
        pipe.unet(torch.zeros(1, 8, 16, 16), 10, torch.zeros(1, text.TOKENS, text.WIDTH))
    for hook in hooks:
        hook.remove()
    assert sides[True] >= {8, 16}
    assert sides[False] >= {8, 16}


def test_unseen_prompts_are_drawn(pipe):
    shares = quality.object_accuracy(pipe, 16, num_inference_steps=20)
    assert shares["objects"].value >= 0.7
    assert shares["objects"].value > shares["swapped"].value + 0.3


def test_other_stock_schedulers_draw_the_same_scene(pipe):
    prompt, settings = "a red bus on the road", quality.settings(inlay_toybox.path("sd"))
    pictures = []
    for kind in (DDIMScheduler, PNDMScheduler):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        noise = torch.Generator().manual_seed(0)
        pictures.append(pipe(prompt, generator=noise, output_type="pt", **settings).images)
    assert (pictures[0] - pictures[1]).abs().mean() < 0.1


def test_the_stock_pipeline_decodes_what_the_recipe_calls_latents(pipe):
    """The stock pipeline ignores the autoencoder's shift; the recipe leaves it in."""
    images = training.batch(range(training.UNSEEN, training.UNSEEN + 8), 64).images
    with torch.no_grad():
        latents = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
        packed = encode(pipe.vae, images)
    torch.testing.assert_close(
        sd.unpack(packed, pipe.vae), latents * pipe.vae.config.scaling_factor
    )


def test_noise_levels_lean_towards_noise():
    torch.manual_seed(0)
    times = sd.timesteps(20_000, 1000, torch.device("cpu"))
    assert times.min() >= 0
    assert times.max() == 999
    assert 0.2 < (times > 830).float().mean() < 0.3


def progress(folder: Path) -> tuple[int, float]:
    with safe_open(folder / "state.safetensors", "pt") as state:
        notes = state.metadata()
    return int(notes["step"]), float(notes["elapsed"])


def test_resume_trains_the_shipped_weights_further(tmp_path, monkeypatch):
    """A few steps from the shipped weights alone, then a few more from the folder they left."""
    monkeypatch.setattr(sd, "preview", functools.partial(sd.preview, n=2))
    monkeypatch.setattr(sd, "train", functools.partial(sd.train, scenes=64, report_every=1))
    order = ["train", "sd", "--resume", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*order, "--minutes", "0.02"]) == 0
    steps, seconds = progress(tmp_path)
    assert steps >= 1
    first = float((tmp_path / "loss.csv").read_text().splitlines()[1].split(",")[2])
    assert first < 0.6  # fresh weights begin above 1
    assert main([*order, "--minutes", str(seconds / 60 + 0.02)]) == 0
    assert progress(tmp_path)[0] > steps
    settings = json.loads((tmp_path / "sd" / "settings.json").read_text())
    assert settings == quality.settings(inlay_toybox.path("sd"))
    StableDiffusionPipeline.from_pretrained(tmp_path / "sd")


def test_it_runs_by_its_name(tmp_path, monkeypatch, capfd):
    session = inlay.Session("toybox/sd", device="cpu")
    assert session.backbone.name == "sd"
    monkeypatch.chdir(tmp_path)
    for words in (["plan", "t2i"], ["run", "t2i", "--out", "here"]):
        order = [*words, "model=toybox/sd", "steps=2", "guidance=5.0"]
        monkeypatch.setattr(sys, "argv", ["inlay", *order])
        with pytest.raises(SystemExit) as ended:
            inlay_cli.main()
        assert not ended.value.code, capfd.readouterr().err
    assert list(tmp_path.rglob("*.png"))


def test_addit_inserts_into_a_picture_of_the_unet():
    """The plugins of Add-it on a U-Net: something new inside the mask, the source outside."""
    names = ["model=toybox/sd", "guidance=3.0", "true_cfg=1.0", "device=cpu", "steps=12"]
    result = inlay.run("addit", names)
    source, edit = result.images["source"], result.images["edit"]
    mask = result.board["mask:subject"]
    assert 0 < mask.mean() < 0.5
    inside = torch.nn.functional.interpolate(mask, source.shape[-2:]) > 0
    moved = (edit - source).abs().mean(1, keepdim=True)
    assert moved[inside].mean() > 5 * moved[~inside].mean()
