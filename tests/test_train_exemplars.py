"""Recipes of Paint by Example and MimicBrush."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import PaintByExamplePipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPVisionModel

import folders
import models
from inlay.backbones.mimicbrush_pipeline import MimicBrushPipeline
from inlay_config.errors import InputError, ModelError
from inlay_train import boxes, encoded, mimicbrush, recipes
from inlay_train.self_reference import Settings

TINY = ["size=16", "train.batch=2", "train.precision=fp32", "train.workers=0", "train.warmup=0"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return folders.save_stable_diffusion(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return folders.save_vision_tower(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def depth_anything(tmp_path_factory):
    return folders.save_depth_anything(tmp_path_factory.mktemp("depth"))[0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return folders.save_photos(tmp_path_factory.mktemp("photos"))


def build(name, *words):
    cls, cfg = recipes.load(name, [*TINY, *words])
    return cls(cfg)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_paint_by_example_trains_from_the_command_line_and_stock_loads_it(
    base, clip, photos, invoke, tmp_path
):
    words = [f"model={base}", f"clip={clip}", f"data.coco={photos / 'instances.json'}", *TINY]
    words += ["data.open_images=null", f"data.pictures={photos}"]
    code, _, told = invoke(
        "train", "paint_by_example", *words, "--max-steps", 20, "--out", tmp_path / "out"
    )
    assert code == 0, told
    assert "1 broken pictures skipped" in told
    pipe = PaintByExamplePipeline.from_pretrained(tmp_path / "out" / "model")
    begun = CLIPVisionModel.from_pretrained(clip)
    for a, b in zip(pipe.image_encoder.model.parameters(), begun.parameters(), strict=True):
        assert torch.equal(a, b)
    later = paint(tmp_path / "out" / "model", clip)  # a recipe goes on from what it wrote
    for part, made in ((later.unet, pipe.unet), (later.encoder, pipe.image_encoder)):
        state = made.state_dict()
        assert all(torch.equal(p, state[name]) for name, p in part.named_parameters())
    with pytest.raises(ModelError, match="it has no text encoder"):
        paint(tmp_path / "out" / "model", clip, "prompt=text")
    pipe.set_progress_bar_config(disable=True)
    shown = Image.new("RGB", (40, 40), "red")
    mask = torch.ones(1, 1, 16, 16)
    made = pipe(shown, torch.zeros(1, 3, 16, 16), mask, num_inference_steps=1, output_type="pt")
    assert made.images.isfinite().all() and pipe.unet.config.in_channels == 9


def paint(base, clip, *words):
    data = ["data.open_images=null", "data.toybox=4"]
    return build("paint_by_example", f"model={base}", f"clip={clip}", *data, *words)


def rows_of(recipe, n):
    side = recipe.cfg.size
    torch.manual_seed(0)
    return {
        "picture": torch.rand(n, 3, side, side),
        "mask": torch.zeros(n, 1, side, side).index_fill(-1, torch.arange(4, 12), 1.0),
        "exemplar": torch.rand(n, 3, 32, 32),
    }


def test_one_token_is_computed_as_stock_does_and_new_channels_do_nothing_at_first(base, clip):
    recipe = paint(base, clip)
    given, token = torch.randn(2, 9, 8, 8), torch.randn(2, 1, 16)
    with torch.no_grad():
        fast = recipe.unet(given, 10, token).sample
        blind = recipe.unet(torch.cat([given[:, :4], 0 * given[:, 4:]], 1), 10, token).sample
        torch.testing.assert_close(fast, blind, rtol=0, atol=0)
        recipe.unet.set_attn_processor(AttnProcessor2_0())
        torch.testing.assert_close(recipe.unet(given, 10, token).sample, fast, rtol=1e-4, atol=1e-5)
    idle = [name for name, p in recipe.unet.named_parameters() if not p.requires_grad]
    assert idle and all("attn2.to_q" in n or "attn2.to_k" in n or ".norm2" in n for n in idle)


@pytest.mark.parametrize("by", ["batch", "sample"])
def test_a_fifth_sees_the_learned_vector(base, clip, by):
    recipe = paint(base, clip, f"null_by={by}")
    token = torch.zeros(8, 16)
    torch.manual_seed(3)
    with torch.no_grad():
        prompts = torch.cat([recipe._prompt(token)[:, 0] for _ in range(400)])
        null = (prompts == recipe.encoder.uncond_vector[0]).all(-1).view(400, 8)
    assert float(null.float().mean()) == pytest.approx(0.2, abs=0.06)
    assert bool((null.all(1) | ~null.any(1)).all()) is (by == "batch")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_model_that_knows_the_noise_has_no_loss(base, clip, kind, monkeypatch):
    recipe = paint(base, clip, "emphasis=3.0")
    recipe.levels.register_to_config(prediction_type=kind)
    rows = recipe.seen(rows_of(recipe, 3))
    rows["clean"][:, 1] = 0  # its latent is its mean
    clean = recipe.vae.config.scaling_factor * rows["clean"][:, 0]

    def know(given, time, *rest, **options):
        alpha = recipe.levels.alphas_cumprod[time][:, None, None, None].sqrt()
        sigma = (1 - alpha**2).sqrt()
        noise = (given[:, :4] - alpha * clean) / sigma
        return (noise if kind == "epsilon" else alpha * noise - sigma * clean,)

    monkeypatch.setattr(recipe.unet, "forward", know)
    assert float(recipe(rows)) < 1e-6


def test_encoded_rows_are_those_that_are_drawn_and_are_read_back(base, clip, tmp_path):
    recipe = paint(base, clip, "encoded=true")
    made = recipe.data(tmp_path)
    again = recipe.data(tmp_path)
    assert len(made) == len(again) == 4
    for name, tensor in made.draw(2, rng()).items():
        assert torch.equal(tensor, again.draw(2, rng())[name])
    plain = boxes.SelfReference(recipe.cfg.data, 16, 32, recipe.cfg.pairs)
    mask = plain.draw(2, np.random.default_rng([2, 4]))["mask"]
    torch.testing.assert_close(made.draw(2, rng())["mask"], mask, rtol=0, atol=1e-3)
    assert float(recipe(recipe.seen(rows_of(recipe, 2)))) > 0


def test_a_row_that_cannot_be_drawn_stays_broken_when_encoded(photos, tmp_path):
    listed = boxes.Sources(coco=str(photos / "instances.json"), pictures=str(photos))
    data = boxes.SelfReference(listed, 16, 16, Settings())
    made = encoded.encode(data, lambda b: {"mask": b["mask"]}, tmp_path / "rows.safetensors", "x")
    assert len(made) == 4 and list(made.broken) == [2]
    with pytest.raises(InputError, match=r"2\.jpg"):
        made.draw(2, rng())


def test_mimicbrush_trains_from_the_command_line_and_its_pipeline_loads_it(
    base, clip, depth_anything, photos, invoke, tmp_path
):
    words = [
        f"model={base}",
        "inpainting=null",
        f"depth_model={depth_anything}",
        f"clip={clip}",
        f"data.clips={photos}",
        *TINY,
    ]
    words += ["depth_widths=[4,8,8]", "data.sift=false"]
    code, _, told = invoke(
        "train", "mimicbrush", *words, "--max-steps", 20, "--out", tmp_path / "out"
    )
    assert code == 0, told
    assert "1 broken pictures skipped" in told
    pipe = MimicBrushPipeline.from_pretrained(tmp_path / "out" / "model")
    assert pipe.unet.config.in_channels == 13 and pipe.reference_unet.config.in_channels == 4
    begun, later = mimic(base, clip), mimic(tmp_path / "out" / "model", clip)
    for name, parameter in pipe.unet.named_parameters():
        assert torch.equal(parameter, dict(later.unet.named_parameters())[name])
    for part in ("unet", "reference_unet", "image_encoder"):
        old = dict(getattr(begun.pipe, part).named_parameters())
        moved = [n for n, p in getattr(pipe, part).named_parameters() if not torch.equal(p, old[n])]
        assert moved, part


def mimic(base, clip, *words):
    data = ["data.clips=null", "data.toybox=4", "data.sift=false", "depth_widths=[4,8,8]"]
    data += ["inpainting=null", "depth_model=null"]
    return build("mimicbrush", f"model={base}", f"clip={clip}", *data, *words)


def test_the_imitative_u_net_may_begin_as_one_that_fills_holes(base, clip, tmp_path):
    """Channels of Paint by Example are put in the order of Stable Diffusion's inpainting, and what
    is kept becomes the hole; the border's zeros, which mean neither, are left out."""
    painter, plain = models.paint_by_example(), tmp_path / "inpainting"
    painter.save_pretrained(tmp_path / "painter")
    torch.manual_seed(0)
    z, around, hole = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 6, 6), torch.rand(1, 1, 6, 6)
    wanted = painter.unet.conv_in(torch.cat([z, around, 1 - hole], 1))
    painter.unet.save_pretrained(plain / "unet")
    (plain / "model_index.json").write_text("{}")
    for folder, same in ((tmp_path / "painter", True), (plain, False)):
        conv = mimicbrush.hole_filler(str(folder), 4)[0].conv_in
        made = conv(torch.cat([z, hole, around], 1))
        inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
        assert torch.allclose(made[inner], wanted[inner], atol=1e-5) is same
        assert (mimicbrush.hole_filler(str(folder), 4)[1] is not None) is same
    with pytest.raises(ModelError, match="takes 4 channels, not 9"):
        mimicbrush.hole_filler(str(base), 4)


@torch.no_grad()
def test_the_projection_begins_near_the_prompts_that_the_u_net_knows(base, clip, tmp_path):
    """No other linear map is nearer, in squares, to what a Paint by Example makes of the same."""
    models.paint_by_example().save_pretrained(tmp_path / "painter")
    recipe = mimic(base, clip, f"inpainting={tmp_path / 'painter'}", "data.toybox=24")
    rows = recipe.data(None)
    shown = torch.stack([encoded.row(rows, i, {})["reference"] for i in range(24)])
    hidden = mimicbrush.hidden_of(recipe.pipe, shown)
    tokens = recipe.image_tokens(hidden)
    wanted = mimicbrush.hole_filler(str(tmp_path / "painter"), 4)[1](shown)
    off = tokens - wanted
    assert off.mean((0, 1)).abs().max() < 1e-3 * wanted.abs().max()
    assert off.square().mean() < 1.001 * (wanted - wanted.mean(0)).square().mean()
    fresh = mimic(base, clip, "data.toybox=24").image_tokens(hidden)
    assert off.square().mean() < 0.5 * (fresh - wanted).square().mean()
    recipe.save(tmp_path / "made")
    later = mimic(tmp_path / "made", clip, f"inpainting={tmp_path / 'painter'}", "data.toybox=8")
    for name, weight in later.image_tokens.state_dict().items():  # who goes on begins nothing anew
        assert torch.equal(weight, recipe.image_tokens.state_dict()[name])


def test_a_reference_u_net_that_is_not_trained_stays_as_it_is(base, clip):
    recipe = mimic(base, clip, "train_reference=false")
    assert not [name for name in recipe.trained() if name.startswith("reference_unet")]
    rows = recipe.data(None)
    drawn = [rows.draw(i, rng(i)) for i in range(2)]
    recipe({name: torch.stack([row[name] for row in drawn]) for name in drawn[0]}).backward()
    assert not [name for name, p in recipe.trained().items() if p.grad is None]


@torch.no_grad()
def test_photographs_have_the_depth_that_a_network_sees(base, clip, depth_anything, monkeypatch):
    """Scenes keep the true one. Who drops it sees what the network says of nothing, as in a run."""
    recipe = mimic(base, clip, f"depth_model={depth_anything}")
    assert not any("depth_network" in name for name in recipe.trained())
    source, depth = torch.rand(3, 3, 16, 16).mul(255).round() / 255, torch.zeros(3, 1, 16, 16)
    depth[1] = 0.5
    known = recipe._depth(depth, source)
    assert torch.equal(known[1], depth[1])
    network, processor = recipe.depths
    picture = Image.fromarray((source[2] * 255).byte().permute(1, 2, 0).numpy())
    mean = [m / 255 for m in processor.image_mean]
    pixels = processor(images=picture, return_tensors="pt", image_mean=mean).pixel_values
    for seen, wanted in ((known[2:], pixels), (recipe.flat, 0 * pixels)):
        near = network(wanted).predicted_depth[:, None]
        torch.testing.assert_close(seen, F.interpolate(near, (16, 16), mode="bilinear"))
    assert (known[2] - recipe.flat[0]).abs().max() > 1e-3

    heard = []
    monkeypatch.setattr(recipe.depth_guider, "forward", lambda d, grid: heard.append(d) or d)
    for _ in range(40):
        recipe._shape(known, torch.zeros(3, 4, 8, 8))
    dropped = (torch.cat(heard) == recipe.flat).flatten(1).all(1).float()
    assert float(dropped.mean()) == pytest.approx(0.5, abs=0.15)


def test_what_is_not_read_is_not_trained_and_everything_else_has_a_gradient(base, clip):
    recipe = mimic(base, clip, "drop_depth=0.0", "drop_reference=0.3")
    data = recipe.data(None)
    batch = {
        k: torch.stack([data.draw(i, rng(i))[k] for i in range(3)]) for k in data.draw(0, rng())
    }
    torch.manual_seed(1)
    recipe(batch).backward()
    without = [name for name, p in recipe.trained().items() if p.grad is None]
    assert not without


def test_rows_that_drop_their_reference_do_not_see_it(base, clip):
    """Their prompt is CLIP's view of nothing, and another reference changes nothing for them."""
    batch = {"mask": torch.arange(8.0)}
    torch.manual_seed(0)
    shares = []
    for _ in range(200):
        made = mimicbrush._ordered(batch, 0.1)
        shares.append(float(made["reads"].float().mean()))
        assert sorted(made["mask"].tolist()) == list(range(8))
        assert made["reads"][0] and (made["reads"].int().diff() <= 0).all()
    assert np.mean(shares) == pytest.approx(0.9, abs=0.03)
    recipe = mimic(base, clip)
    hidden = torch.randn(3, 5, 16)
    with torch.no_grad():
        prompt = recipe._prompt(hidden, 1)
        nothing = recipe.tower(torch.zeros(1, 3, 32, 32), output_hidden_states=True)
        blank = recipe.image_tokens(nothing.hidden_states[-2])
    torch.testing.assert_close(prompt[1:], blank.expand(2, -1, -1))
    torch.testing.assert_close(prompt[:1], recipe.image_tokens(hidden[:1]))


def test_settings_that_contradict_each_other_are_refused(base, clip, tmp_path):
    with pytest.raises(ModelError, match="tower: false"):
        mimic(base, clip, "encoded=true").data(tmp_path)
    odd = folders.save_instruct(tmp_path / "odd")
    with pytest.raises(ModelError, match="takes 8 channels"):
        mimic(odd, clip)
    with pytest.raises(ModelError, match="takes 8 channels"):
        paint(odd, clip)
