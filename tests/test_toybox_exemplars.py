"""The toybox's models that take an exemplar, as they ship: small, in stock layouts, and they show
what the exemplar shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PaintByExamplePipeline, pipelines
from diffusers.pipelines.deprecated import paint_by_example
from PIL import Image
from safetensors.torch import load_file

import inlay
import inlay_toybox
from inlay_config import config
from inlay_toybox.detector import Detector
from inlay_toybox.quality import conditioned
from inlay_toybox.quality.exemplars import exemplar_items

CAPS = {"paint-by-example": 1.6, "mimicbrush": 1.6}
PLUGINS = {"paint-by-example": "exemplar", "mimicbrush": "imitation"}
EXPERIMENTS = {"paint-by-example": "exemplar_toybox", "mimicbrush": "mimicbrush_toybox"}
ITEMS, STEPS = 6, 8


@pytest.mark.parametrize("name", CAPS)
def test_it_ships_small_and_shares_what_is_frozen(name):
    shipped = Path(inlay_toybox.__file__).parent / "models" / name
    size = sum(file.stat().st_size for file in shipped.rglob("*") if file.is_file())
    assert size <= CAPS[name] * 2**20
    folder = inlay_toybox.path(name)
    sd, clip = inlay_toybox.path("sd"), inlay_toybox.path("clip")
    vae = "vae/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(folder / vae), load_file(sd / vae)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    tower, whole = (
        load_file(folder / "image_encoder" / "model.safetensors"),
        load_file(clip / "model.safetensors"),
    )
    key = "embeddings.patch_embedding.weight"
    held = tower.get(f"model.{key}", tower.get(f"vision_model.{key}"))
    assert torch.equal(held, whole[f"vision_model.{key}"].float())


def found(images, items):
    """How many pictures have an object of the exemplar's class in the hole."""
    hits = 0
    for item, seen in zip(items, Detector.from_pretrained().detect(images), strict=True):
        inside = [
            name
            for name, mask in zip(seen.classes, seen.masks.numpy(), strict=True)
            if 2 * (mask & item.region).sum() >= mask.sum() > 0
        ]
        hits += item.name in inside
    return hits


def test_the_stock_pipeline_loads_it_and_fills_holes_as_exemplars_say():
    pipelines.paint_by_example = paint_by_example  # which diffusers moved, as for published weights
    pipe = PaintByExamplePipeline.from_pretrained(inlay_toybox.path("paint-by-example"))
    pipe.set_progress_bar_config(disable=True)
    items = list(exemplar_items(ITEMS))
    shown = [item.exemplar.resize((64, 64), Image.Resampling.BICUBIC) for item in items]
    exemplars = pipe.feature_extractor(images=shown, return_tensors="pt").pixel_values
    pictures = torch.stack(
        [torch.from_numpy(np.array(item.picture)).permute(2, 0, 1) / 127.5 - 1 for item in items]
    )
    holes = torch.stack([torch.from_numpy(item.region)[None].float() for item in items])
    generator = torch.Generator().manual_seed(0)
    drawn = pipe(
        exemplars,
        pictures,
        holes,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        generator=generator,
        output_type="pt",
    ).images
    assert found(drawn.float(), items) >= ITEMS // 2
    outside = (drawn.float() - (pictures / 2 + 0.5)).abs() * (1 - holes)
    assert float(outside.mean()) < 0.1


@pytest.mark.parametrize("name", CAPS)
def test_it_runs_from_its_experiment_and_listens_to_the_exemplar(name, tmp_path):
    """The hole is filled, the picture stays around it, and another exemplar fills it otherwise."""
    first, second = exemplar_items(2)
    exp = config.load(EXPERIMENTS[name])
    drawn = []
    for item in (first, second):
        item.exemplar.save(shown := tmp_path / f"{item.name}.png")
        plugins = {**exp.plugins, PLUGINS[name]: {"image": str(shown)}}
        session = inlay.Session(exp.model, plugins)
        asked = {"image": first.picture, "mask": Image.fromarray(first.region), "seed": 1}
        drawn.append(session.run(steps=STEPS, guidance=exp.guidance, **asked).images["edit"])
    hole = torch.from_numpy(first.region)
    picture = torch.from_numpy(np.array(first.picture)).permute(2, 0, 1)[None] / 255
    changed, other = (drawn[0] - picture).abs().mean(1)[0], (drawn[0] - drawn[1]).abs().mean(1)[0]
    assert changed[~hole].mean() < 0.01 and changed[hole].mean() > 0.05
    assert other[hole].mean() > 0.03


def test_figures_of_mimicbrush_are_of_what_the_plugin_draws(tmp_path, monkeypatch):
    """Tables draw it in batches, and Paint by Example by the stock pipeline."""
    (item,) = exemplar_items(1, seed=1)
    assert item.exemplar.width != item.exemplar.height
    monkeypatch.setattr(conditioned, "STEPS", 4)
    drawn = conditioned.imitated([item])
    item.exemplar.save(shown := tmp_path / "shown.png")
    session = inlay.Session("toybox/mimicbrush", {"imitation": {"image": str(shown)}})
    generator = torch.Generator().manual_seed(0)
    noise = {"edit": torch.randn(1, 8, 16, 16, generator=generator)}
    asked = {"image": item.picture, "mask": Image.fromarray(item.region), "noise": noise}
    made = session.run(steps=4, guidance=3.0, **asked).images["edit"]
    hole = torch.from_numpy(item.region)
    assert (made - drawn)[..., hole].abs().max() < 1e-3
