"""Recipes of Paint by Example and MimicBrush, and the pairs that they are trained on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import PaintByExamplePipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionModel

import folders
import models
from inlay.backbones.mimicbrush_pipeline import MimicBrushPipeline
from inlay_config.errors import ConfigError, InputError, ModelError
from inlay_toybox import imitation, world
from inlay_train import boxes, encoded, imitation_pairs, mimicbrush, recipes, self_reference
from inlay_train.self_reference import SAMPLES, Settings
from inlay_train.views import Changes, Masking, Sources, Views

TINY = ["size=16", "train.batch=2", "train.precision=fp32", "train.workers=0", "train.warmup=0"]
BOX = (20, 10, 44, 50)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return folders.save_stable_diffusion(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A vision tower, as wide as the base's prompts."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(2)
    CLIPVisionModel(models.mimicbrush().image_encoder.config).save_pretrained(folder)
    CLIPImageProcessor(
        crop_size={"height": 32, "width": 32}, size={"shortest_edge": 32}
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def depth_anything(tmp_path_factory):
    return folders.save_depth_anything(tmp_path_factory.mktemp("depth"))[0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Scenes in two clips, one torn, and alone; boxes as COCO and Open Images write them."""
    root = tmp_path_factory.mktemp("photos")
    rows, things = [], []
    for i in range(4):
        views = imitation.views(i + 2)
        clip = root / f"clip{i % 2}"
        clip.mkdir(exist_ok=True)
        for scene, name in ((views.source, "a"), (views.reference, "b")):
            Image.fromarray(world.render(scene, 32).image).save(clip / f"{i}{name}.png")
        drawn = world.render(views.source, 48)
        Image.fromarray(drawn.image).save(root / f"{i}.jpg")
        left, top, right, bottom = (float(side) for side in drawn.boxes[0])
        rows.append({"id": i, "file_name": f"{i}.jpg", "width": 48, "height": 48})
        box = [left, top, right - left, bottom - top]
        things.append({"image_id": i, "bbox": box, "iscrowd": 0})
    (root / "2.jpg").write_bytes((root / "2.jpg").read_bytes()[:90])
    things += [{"image_id": 0, "bbox": [0, 0, 48, 48], "iscrowd": 0}]
    things += [{"image_id": 1, "bbox": [0, 0, 24, 24], "iscrowd": 1}]
    held = {"images": rows, "annotations": things}
    (root / "instances.json").write_text(json.dumps(held))
    lines = ["ImageID,XMin,XMax,YMin,YMax,IsGroupOf,IsDepiction"]
    lines += ["0,0.1,0.6,0.2,0.7,0,0", "0,0.1,0.6,0.2,0.7,1,0", "1,0.0,0.1,0.0,0.1,0,0"]
    (root / "boxes.csv").write_text("\n".join(lines))
    return root


def build(name, *words):
    cls, cfg = recipes.load(name, [*TINY, *words])
    return cls(cfg)


def rng(seed=0):
    return np.random.default_rng(seed)


# self-reference ----------------------------------------------------------------------------------


def test_a_hole_is_an_extended_box_or_four_curves_around_the_object():
    curved = 0
    for seed in range(60):
        mask, wide = self_reference.hole(BOX, 64, 60, rng(seed), Settings(jitter=1))
        left, top, right, bottom = wide
        assert 0 <= left <= BOX[0] <= BOX[2] <= right <= 64
        assert 0 <= top <= BOX[1] <= BOX[3] <= bottom <= 60
        assert BOX[0] - left <= 0.4 * BOX[0] and right - BOX[2] <= 0.4 * (64 - BOX[2])
        whole = torch.zeros(1, 60, 64)
        whole[:, top:bottom, left:right] = 1
        curved += not torch.equal(mask, whole)
        assert mask[:, 12:48, 22:42].all()  # all but the object's rim, which jitter may leave
        near = F.max_pool2d(whole, 5, 1, 2)
        assert not (mask > near).any()
    assert 20 <= curved <= 40


def test_a_curve_has_twenty_points_each_one_to_five_pixels_off():
    wide = (12, 4, 56, 56)
    points = np.array(self_reference.outline(BOX, wide, rng(), 5))
    assert points.shape == (4 * SAMPLES, 2)
    u = np.arange(SAMPLES) / SAMPLES
    upper = 2 * u * (1 - u) * wide[1] + (1 - 2 * u * (1 - u)) * BOX[1]
    off = np.abs(points[:SAMPLES, 1] - upper)
    assert off.min() > 1 - 1e-9 and off.max() < 5 + 1e-9
    np.testing.assert_allclose(off, off.round(), atol=1e-9)


def test_a_crop_contains_the_hole_and_is_a_square():
    for seed in range(30):
        left, top, right, bottom = self_reference.window((30, 12, 60, 40), 100, 50, rng(seed))
        assert right - left == bottom - top <= 50
        assert 0 <= left <= 30 and 60 <= right <= 100 and 0 <= top <= 12 and 40 <= bottom <= 50
    assert self_reference.window((10, 0, 90, 40), 100, 50, rng()) == (0, 0, 100, 50)


def test_an_exemplar_without_augmentation_is_the_grown_box():
    picture = torch.rand(3, 60, 64, generator=torch.Generator().manual_seed(0))
    still = Settings(grow=4, rotate=0.0, blur=0.0, bend=0.0, crop=False, elastic=0.0)
    wanted = picture[:, 6:54, 16:48]
    made = {
        tuple(self_reference.make(picture, BOX, 60, 48, rng(i), still).exemplar.shape)
        for i in (0, 1)
    }
    assert made == {(3, 48, 48)}
    flat = F.interpolate(wanted[None], (48, 48), mode="bilinear", antialias=True)[0]
    left = self_reference.augmented(wanted, 48, rng(), Settings(still=True))
    torch.testing.assert_close(left, flat)
    seen = [self_reference.augmented(wanted, 48, rng(i), still) for i in range(8)]
    flips = [bool((s - flat.flip(-1)).abs().max() < 1e-4) for s in seen]
    same = [bool((s - flat).abs().max() < 1e-4) for s in seen]
    assert all(a != b for a, b in zip(flips, same, strict=True)) and any(flips) and any(same)


def test_an_exemplar_is_turned_blurred_and_bent_and_the_same_seed_draws_the_same():
    picture = torch.rand(3, 60, 64, generator=torch.Generator().manual_seed(0))
    pairs = [self_reference.make(picture, BOX, 32, 24, rng(i // 2), Settings()) for i in range(12)]
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        for a, b in zip(vars(one).values(), vars(other).values(), strict=True):
            assert torch.equal(a, b)
    shown = torch.stack([pair.exemplar for pair in pairs[::2]])
    assert shown.shape == (6, 3, 24, 24) and shown.min() >= 0 and shown.max() <= 1
    assert (shown[1:] - shown[0]).abs().mean((1, 2, 3)).min() > 0.01


def test_an_exemplar_may_be_cut_out_of_a_finer_picture():
    """The same place of it, and nothing else changes."""
    fine = torch.rand(3, 120, 128, generator=torch.Generator().manual_seed(0))
    coarse, still = F.avg_pool2d(fine, 2), Settings(grow=4, still=True)
    pairs = [
        self_reference.make(coarse, BOX, 32, 48, rng(), still, finer) for finer in (None, fine)
    ]
    for name in ("picture", "mask"):
        assert torch.equal(*(getattr(pair, name) for pair in pairs))
    cut = fine[None, :, 12:108, 32:96]
    wanted = F.interpolate(cut, (48, 48), mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(pairs[1].exemplar, wanted)
    assert (pairs[0].exemplar - wanted).abs().max() > 0.01


def test_an_elastic_transform_moves_by_hundredths_of_a_pixel_as_published():
    """Uniform moves of a pixel behind a Gaussian of 50 of 224 pixels: their deviation is that of
    white noise, 1 / sqrt(3), over 2 sqrt(pi) times the Gaussian's."""
    moves = self_reference._moves(224, rng(), Settings().elastic) * 224 / 2
    assert moves.shape == (224, 224, 2) and 0.0005 < np.abs(moves).max() < 0.05
    middle = [self_reference._moves(32, rng(i), 1.0)[16, 16] / 2 for i in range(300)]
    wanted = 1 / np.sqrt(3) / (2 * np.sqrt(np.pi) * 32 * 50 / 224)
    assert np.std(middle) == pytest.approx(wanted, rel=0.15)
    ramp = torch.linspace(0, 1, 32).expand(3, 32, 32)
    still = np.eye(2, 3, dtype=np.float32)
    pushed = self_reference._warped(ramp, still, np.full((32, 32, 2), 2 / 31, np.float32))
    torch.testing.assert_close(pushed[:, :, :-1], ramp[:, :, 1:])


def test_boxes_are_read_as_coco_and_open_images_write_them(photos):
    rows = dict(boxes.coco(photos / "instances.json", photos))
    assert [file.name for file in rows] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert all(
        len(found) == 1 for found in rows.values()
    )  # the crowd and the whole picture do not fit
    ((file, found),) = boxes.open_images(photos / "boxes.csv", photos)
    assert (file, found) == (photos / "0.jpg", [(0.1, 0.2, 0.6, 0.7)])
    with pytest.raises(InputError, match="images and annotations"):
        list(boxes.coco(photos / "boxes.csv", photos))
    with pytest.raises(InputError, match="XMin"):
        list(boxes.open_images(photos / "instances.json", photos))
    with pytest.raises(ConfigError, match="nothing to train on"):
        boxes.SelfReference(boxes.Sources(), 16, 16, Settings())


# two views ---------------------------------------------------------------------------------------


def test_cells_with_matches_are_holes_more_often():
    points = np.array([(0.05, 0.05), (0.95, 0.45)])
    masks = torch.stack([imitation_pairs.grid(points, 40, rng(i), (4, 4)) for i in range(600)])
    cells = F.avg_pool2d(masks, 10)
    assert set(cells.unique().tolist()) == {0.0, 1.0}
    share = cells.mean(0)[0]
    matched = share[0, 0], share[1, 3]
    assert all(float(s) == pytest.approx(0.75, abs=0.06) for s in matched)
    share[0, 0] = share[1, 3] = 0.5
    assert float((share - 0.5).abs().max()) < 0.08
    sizes = {
        int(imitation_pairs.grid(points[:0], 90, rng(i)).diff().ne(0).any(1).sum()) + 1
        for i in range(80)
    }
    assert max(sizes) <= 10
    assert imitation_pairs.grid(points[:0], 9, rng(), (3, 3), plain=0.0).sum() == 9


def test_features_are_matched_where_both_views_show_the_same():
    views = imitation.views(40)
    one, other = (
        torch.from_numpy(world.render(scene, 256).image).permute(2, 0, 1) / 255
        for scene in (views.source, views.source.mirrored())
    )
    found = imitation_pairs.matches(one, one)
    assert len(found) >= 10 and found.min() >= 0 and found.max() <= 1
    moved = torch.roll(one, (16, 32), (1, 2))
    again = imitation_pairs.matches(one, moved)
    assert len(again) >= 8
    assert imitation_pairs.matches(one, torch.zeros_like(other)).shape == (0, 2)


def test_frames_make_a_pair_that_are_neither_alike_nor_unrelated():
    views = imitation.views(3)
    one, other = (
        torch.from_numpy(world.render(scene).image).permute(2, 0, 1) / 255
        for scene in (views.source, views.reference)
    )
    assert imitation_pairs.similarity(one, one) == pytest.approx(1)
    assert not imitation_pairs.makes_pair(one, one)
    assert imitation_pairs.makes_pair(one, other)
    assert not imitation_pairs.makes_pair(one, torch.rand(3, 64, 64))


def test_an_augmented_view_is_white_where_it_shows_nothing():
    picture = torch.full((3, 20, 30), 0.25)
    still = imitation_pairs.Strength(0.0, 0.0, 0.0, (1.0, 1.0), 0.0, 0.0)
    same = imitation_pairs.augmented(picture, rng(), still)
    torch.testing.assert_close(same, picture, rtol=0, atol=1e-6)
    small = imitation_pairs.Strength(0.0, 0.0, 0.0, (0.5, 0.5), 0.0, 0.0)
    shrunk = imitation_pairs.augmented(picture, rng(), small)
    assert (shrunk[:, 0] == 1).all() and float(shrunk[0, 10, 15]) == pytest.approx(0.25)
    assert float((shrunk[0] < 0.5).float().mean()) == pytest.approx(0.25, abs=0.02)
    tilted = imitation_pairs.Strength(0.0, 0.0, 0.0, (1.0, 1.0), 0.3, 0.0)
    seen = [imitation_pairs.augmented(picture, rng(i), tilted) for i in (1, 1, 2)]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_a_picture_stands_in_the_middle_of_a_white_square():
    square = imitation_pairs.squared(torch.zeros(3, 10, 30), 30)
    assert (square[:, :10] == 1).all() and (square[:, 10:20] == 0).all()
    assert (square[:, 20:] == 1).all()


def test_views_of_clips_scenes_and_single_pictures(photos):
    folder = Views(Sources(clips=str(photos)), 24, Masking(), Changes())
    assert [len(frames) for frames in folder.clips] == [1, 1, 1, 1, 4, 4]
    for index in (0, 4):
        row = folder.draw(index, rng(index))
        assert {k: tuple(v.shape) for k, v in row.items()} == {
            "source": (3, 24, 24),
            "reference": (3, 24, 24),
            "mask": (1, 24, 24),
            "depth": (1, 24, 24),
        }
    with pytest.raises(InputError, match=r"2\.jpg"):
        folder.draw(2, rng())
    toys = Views(Sources(toybox=9, objects=1.0, zoom=1.0, sift=False), 64, Masking(), Changes())
    row = toys.draw(3, rng())
    assert 0.01 < float(row["mask"].mean()) < 0.7 and row["depth"].max() > 0
    with pytest.raises(ConfigError, match="nothing to train on"):
        Views(Sources(), 24, Masking(), Changes())


def test_two_scenes_have_the_same_things_and_depth_grows_downwards():
    views = imitation.views(3)
    for a, b in zip(views.source.things, views.reference.things, strict=False):
        assert (a.name, a.colour) == (b.name, b.colour)
    empty = world.Scene(views.source.ground, False, views.source.look)
    depth = imitation.depth(empty, world.render(empty))
    assert (np.diff(depth[:, 0]) >= 0).all() and depth[0, 0] == 0 and depth[-1, 0] > 0.97
    drawn = world.render(views.source)
    assert len(np.unique(imitation.depth(views.source, drawn)[drawn.masks[0]])) == 1


# recipes -----------------------------------------------------------------------------------------


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
        conv = mimicbrush.hole_filler(str(folder), 4).conv_in
        made = conv(torch.cat([z, hole, around], 1))
        inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
        assert torch.allclose(made[inner], wanted[inner], atol=1e-5) is same
    with pytest.raises(ModelError, match="takes 4 channels, not 9"):
        mimicbrush.hole_filler(str(base), 4)


@torch.no_grad()
def test_the_projection_begins_near_the_prompts_that_the_u_net_knows(base, clip, tmp_path):
    """No other linear map is nearer, in squares, to what a Paint by Example makes of the same."""
    models.paint_by_example().save_pretrained(tmp_path / "painter")
    recipe = mimic(base, clip, f"inpainting={tmp_path / 'painter'}", "data.toybox=24")
    rows = recipe.data(None)
    shown = torch.stack([encoded.row(rows, i, {})["reference"] for i in range(24)])
    tokens = recipe.image_tokens(recipe._hidden(shown))
    wanted = mimicbrush.exemplar_prompts(str(tmp_path / "painter"))(shown)
    off = tokens - wanted
    assert off.mean((0, 1)).abs().max() < 1e-3 * wanted.abs().max()
    assert off.square().mean() < 1.001 * (wanted - wanted.mean(0)).square().mean()
    fresh = mimic(base, clip, "data.toybox=24").image_tokens(recipe._hidden(shown))
    assert off.square().mean() < 0.5 * (fresh - wanted).square().mean()
    assert mimicbrush.exemplar_prompts(str(base)) is None


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
