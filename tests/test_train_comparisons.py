"""What the exemplar recipes are compared with: prompts that are no bottleneck, no prior, other
data, no reference U-Net. Each is a setting, and is drawn by the experiments of the real ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import folders
import inlay
from inlay.backbones.mimicbrush_forward import imitate, reference
from inlay_config.errors import ConfigError
from inlay_toybox.classes import BY_NAME
from inlay_train import boxes, exemplar_prompts, recipes, trainer
from inlay_train.encoded import told
from inlay_train.imitation_pairs import Strength
from inlay_train.self_reference import Settings
from inlay_train.views import Changes, Masking, Sources, Views

TINY = ["size=16", "train.batch=2", "train.precision=fp32", "train.workers=0", "train.warmup=0"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return folders.save_stable_diffusion(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return folders.save_vision_tower(tmp_path_factory.mktemp("clip"))


def paint(base, clip, *words):
    return build("paint_by_example", base, clip, "data.open_images=null", *words)


def mimic(base, clip, *words):
    small = [
        "inpainting=null",
        "depth_model=null",
        "data.clips=null",
        "data.sift=false",
        "depth_widths=[4,8,8]",
    ]
    return build("mimicbrush", base, clip, *small, *words)


def build(name, base, clip, *words):
    shared = [f"model={base}", f"clip={clip}", "data.toybox=4", *TINY]
    cls, cfg = recipes.load(name, [*shared, *words])
    return cls(cfg)


@pytest.mark.parametrize("prompt", ["tokens", "text"])
def test_other_prompts_are_trained_and_drawn_by_the_exemplars_experiment(
    prompt, base, clip, tmp_path
):
    recipe = paint(base, clip, f"prompt={prompt}", "encoded=true", "null_by=sample")
    trained = recipe.trained()
    assert any("attn2.to_q" in name for name in trained)
    assert any(name.startswith("encoder.mapper") for name in trained) is (prompt == "tokens")
    folder = trainer.train(recipe, tmp_path / "out", max_steps=2)
    recipe.train(False)
    pictures = [Image.new("RGB", (24, 24), colour) for colour in ("red", "blue")]
    made = []
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
        plugins = {"exemplar": {"image": str(tmp_path / f"{i}.png")}}
        session = inlay.Session(folder, plugins, device="cpu")
        if prompt == "text":
            exemplar_prompts.speak(session.backbone.pipe, "bus" if i else "red cow", str(base))
        hole = Image.new("L", (16, 16), 255)
        asked = {"image": pictures[0].resize((16, 16)), "steps": 2, "seed": 1, "guidance": 3.0}
        made.append(session.run(mask=hole, **asked).latents["edit"])
    assert all(latent.isfinite().all() for latent in made)
    assert not torch.equal(*made)
    encoder = session.backbone.pipe.image_encoder
    assert type(encoder) is exemplar_prompts.LongPrompt
    assert torch.equal(encoder.uncond_vector, recipe.encoder.uncond_vector)
    if prompt == "tokens":
        pixels = torch.rand(1, 3, 32, 32)
        states = encoder.model(pixels).last_hidden_state
        through = exemplar_prompts.through(recipe.encoder, states)
        torch.testing.assert_close(encoder(pixels), through)


def test_words_are_of_the_object_in_the_hole_and_of_the_toybox_alone(base, clip, tmp_path):
    recipe = paint(base, clip, "prompt=text", "null=0.0")
    rows = [recipe.data(tmp_path).draw(i, np.random.default_rng(i)) for i in range(4)]
    words = [row["words"] for row in rows]
    assert all(word.endswith(tuple(BY_NAME)) for word in words) and len(set(words)) > 1
    exemplars = torch.stack([row["exemplar"] for row in rows])
    seen = recipe._token({"words": words, "exemplar": exemplars})
    torch.testing.assert_close(seen[1], recipe._token({"words": words[1:2]})[0])
    torch.testing.assert_close(recipe._prompt(seen), seen, rtol=0, atol=0)
    (tmp_path / "boxes.csv").write_text("ImageID,XMin,XMax,YMin,YMax\n0,0.1,0.6,0.2,0.7")
    listed = boxes.Sources(open_images=str(tmp_path / "boxes.csv"))
    with pytest.raises(ConfigError, match=r"no words are known for boxes.*data\.toybox alone"):
        boxes.SelfReference(listed, 16, 16, Settings(), named=True)


def test_without_the_prior_a_unet_begins_with_random_weights(base, clip):
    known, fresh = (
        paint(base, clip, f"prior={prior}", "train.seed=7") for prior in ("true", "false")
    )
    changed = [
        not torch.equal(a, b)
        for (name, a), b in zip(known.unet.named_parameters(), fresh.unet.parameters(), strict=True)
        if "attn1.to_q.weight" in name
    ]
    assert changed and all(changed)
    for a, b in zip(known.vae.parameters(), fresh.vae.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_mix_of_nothing_needs_no_reference_unet(base, clip):
    """And is what the two U-Nets compute with a mix of 0."""
    recipe = mimic(base, clip, "mix=0.0", "drop_depth=0.0")
    assert not any(name.startswith("reference_unet") for name in recipe.trained())
    given, time = torch.randn(2, 13, 8, 8), torch.tensor([40, 700])
    shown, prompt = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        read = reference(recipe.reference_unet, shown, time, prompt)
        both = imitate(recipe.unet, read, given, time, prompt, 0.0)
        alone = imitate(recipe.unet, {}, given, time, prompt, 0.0)
        torch.testing.assert_close(both, alone)
        assert (imitate(recipe.unet, read, given, time, prompt) - alone).abs().max() > 1e-4
    data = recipe.data(None)
    rows = [data.draw(i, np.random.default_rng(i)) for i in range(2)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    recipe.reference_unet.forward = None
    assert float(recipe(batch).detach()) > 0


def test_single_scenes_are_their_own_reference():
    still = Strength(0.0, 0.0, 0.0, (1.0, 1.0), 0.0, 0.0)
    views = {
        share: Views(
            Sources(toybox=9, sift=False, single=share), 32, Masking(), Changes(still, still)
        )
        for share in (0.0, 0.5, 1.0)
    }
    alike = {
        share: np.mean([_alike(data.draw(i, np.random.default_rng(i))) for i in range(9)])
        for share, data in views.items()
    }
    assert alike[0.0] == 0 and 0 < alike[0.5] < 1 and alike[1.0] == 1


def _alike(row):
    return float((row["source"] - row["reference"]).abs().mean()) < 0.03


def test_rows_that_were_encoded_before_a_setting_was_are_still_known():
    assert "single" not in told(Sources(toybox=3))
    assert told(Sources(toybox=3, single=0.25))["single"] == 0.25
