"""CLIPs by name as functions, what they are compared with, and candidates ranked by them."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPProcessor, SiglipConfig, SiglipImageProcessor, SiglipModel

import inlay
import inlay_toybox
import toys
from inlay import ConfigError, InputError, ModelError
from inlay_plugins import clips
from inlay_plugins.rank import Rank
from inlay_toybox import world
from models import pixel

FOLDER = inlay_toybox.path("clip")


@pytest.fixture(scope="module")
def clip() -> clips.Clip:
    return clips.load("toybox/clip")


def test_a_clip_answers_as_its_own_classes_do_and_is_kept(clip):
    scene = world.render(world.views("cow", 1, 9)[0]).image
    model, processor = CLIPModel.from_pretrained(FOLDER), CLIPProcessor.from_pretrained(FOLDER)
    inputs = processor(text=["a cow", "a bus"], images=Image.fromarray(scene),
                       padding=True, return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        out = model(**inputs)
    ours = clip.images(torch.from_numpy(scene).permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(ours, out.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        clip.texts(["a cow", "a bus"]), out.text_embeds, atol=1e-5, rtol=1e-4
    )
    assert clips.load("toybox/clip") is clip and clip.side == 64


def test_a_gradient_reaches_pictures_and_nothing_else(clip):
    picture = torch.rand(1, 3, 64, 64, requires_grad=True)
    clip.images(picture).sum().backward()
    assert picture.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> str:
    """A random SigLIP of 16 px and 12 tokens, with the toybox's words."""
    folder = tmp_path_factory.mktemp("siglip")
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shared |= {"num_attention_heads": 2}
    text = shared | {"vocab_size": 649, "max_position_embeddings": 12, "projection_size": 16}
    torch.manual_seed(0)
    vision = shared | {"image_size": 16, "patch_size": 8}
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, folder)
    return str(folder)


def test_a_siglip_is_a_clip_of_its_own_size_and_context(siglip):
    model = clips.load(siglip)
    assert model.side == 16
    assert model.images(torch.rand(2, 3, 16, 16)).norm(dim=-1).allclose(torch.ones(2))
    alone, batched = model.texts(["a cow"]), model.texts(["a cow", "a red bus on the road"])
    torch.testing.assert_close(alone[0], batched[0])
    with pytest.raises(InputError, match=r"tokens, .* reads 12"):
        model.texts(["a cow and a bus and a cow and a bus and a cow and a bus"])


def test_a_prompt_beyond_the_context_is_refused(clip):
    with pytest.raises(InputError, match=r"tokens, toybox/clip reads 32\. Shorten it"):
        clip.texts(["a cow", "a cow on the grass " * 20])


def test_what_is_no_clip_is_refused(tmp_path):
    with pytest.raises(ModelError, match="clip model: no model 'toybox/clp'"):
        clips.load("toybox/clp")
    with pytest.raises(ModelError, match=r"no config\.json in"):
        clips.load(str(tmp_path))
    with pytest.raises(ModelError, match=r"toybox/flux|no config\.json"):
        clips.load("toybox/flux")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="is no CLIP"):
        clips.load(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="is not safetensors"):
        clips.load(str(tmp_path))


def test_weights_that_are_not_whole_are_refused(tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(FOLDER, folder)
    state = CLIPModel.from_pretrained(FOLDER).state_dict()
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not whole: no visual_projection\.weight"):
        clips.load(str(folder))


def test_distances_of_unit_vectors():
    a = torch.tensor([1.0, 0.0], requires_grad=True)
    for degrees in (0.0, 30.0, 90.0, 170.0):
        angle = torch.tensor(degrees).deg2rad()
        b = torch.stack([angle.cos(), angle.sin()])
        assert clips.spherical(a, b).item() == pytest.approx(float(angle) ** 2 / 2, abs=1e-4)
        assert clips.cosine(a, b).item() == pytest.approx(1 - float(angle.cos()), abs=1e-6)
        (slope,) = torch.autograd.grad(clips.spherical(a, b), a)
        assert slope.isfinite().all()


def test_targets_weigh_sentences_and_pictures(clip, tmp_path):
    scene = world.render(world.views("cow", 1, 9)[0]).image
    Image.fromarray(scene).save(tmp_path / "cow.png")
    file = str(tmp_path / "cow.png")
    seen = clip.images(torch.from_numpy(scene).permute(2, 0, 1)[None] / 255)
    near = clips.Target.of(clip, {}, {file: 1.0}, "images").distances(seen, "cosine")
    assert near.abs().max() < 1e-5
    words = {"a cow": 3.0, "a bus": -1.0}
    mixed = clips.Target.of(clip, words, {}, "").distances(seen, "spherical")
    cow, bus = (clips.spherical(seen, clip.texts([word])) for word in words)
    torch.testing.assert_close(mixed, 0.75 * cow - 0.25 * bus)
    with pytest.raises(InputError, match="images: there is no file"):
        clips.Target.of(clip, {}, {"gone.png": 1.0}, "images")


def test_weights_are_read_in_three_ways():
    assert clips.weights_of("a dog", "prompts") == {"a dog": 1.0}
    assert clips.weights_of(["a dog", "a cat"], "prompts") == {"a dog": 1.0, "a cat": 1.0}
    assert clips.weights_of({"a dog": 2}, "prompts") == {"a dog": 2.0}
    for wrong in ({"a dog": "much"}, {"a dog": 0}):
        with pytest.raises(ConfigError, match=r"prompts: .* is no list of weights"):
            clips.weights_of(wrong, "prompts")


def ranker(stored: dict, prefix: str = "", **options) -> Rank:
    plugin = Rank(Rank.Config(**options), "rank", [toys.clip(stored, 21, prefix)])
    plugin.texts, plugin.files = {"as stored": 1.0}, {}
    return plugin


@pytest.mark.parametrize(
    ("mode", "antialias", "key"),
    [
        ("reference", False, "distance_as_coded"),
        ("reference", True, "distance_as_coded_antialias"),
        ("fixed", False, "distance_fixed"),
    ],
)
def test_the_published_ranking_and_the_right_one(mode, antialias, key):
    stored, card = toys.golden("bd_rank")
    plugin = ranker(stored, mode=mode, antialias=antialias, batch=4)
    scores = plugin.scores(stored["candidates01"], stored["mask"])
    assert (scores - stored[key]).abs().max() < card["tolerance_max_abs"]["distance_*"]
    if f"order_{key[9:]}" in stored:
        assert torch.equal(scores.argsort(), stored[f"order_{key[9:]}"])


def test_the_ranking_of_blended_latent_diffusion():
    """Cosine, of pictures that are black outside the mask."""
    stored, card = toys.golden("bld_extras")
    black = stored["rank.samples01"] * stored["rank.mask"]
    plugin = ranker(stored, "rank.", scope="image", distance="cosine", antialias=False)
    scores = plugin.scores(black, None)
    assert (scores - stored["rank.distance"]).abs().max() < card["tolerance_max_abs"][
        "rank.distance"
    ]
    assert torch.equal(scores.argsort(), stored["rank.order"])


def test_both_scopes_are_averaged():
    stored, _ = toys.golden("bd_rank")
    mask, image, both = (
        ranker(stored, scope=scope).scores(stored["candidates01"], m)
        for scope, m in (("mask", stored["mask"]), ("image", None), ("both", stored["mask"]))
    )
    torch.testing.assert_close(both, (mask + image) / 2)


def test_candidates_are_sorted_and_all_kept_with_their_scores():
    plain = inlay.Session(pixel()).run("a cow", steps=2, n=5, seed=1)
    session = inlay.Session(pixel(), {"rank": {"scope": "image", "batch": 2}})
    ranked = session.run("a cow", steps=2, n=5, seed=1)
    order, scores = ranked.board["rank:order"], ranked.board["rank:scores"]
    assert (scores.diff() >= 0).all() and sorted(order.tolist()) == list(range(5))
    assert torch.equal(ranked.images["edit"], plain.images["edit"][order])
    assert torch.equal(ranked.latents["edit"], plain.latents["edit"][order])
    assert ranked.manifest["rank"] == {"scores": scores.tolist(), "order": order.tolist()}
    again = session.plugins["rank"].scores(ranked.images["edit"], None)
    torch.testing.assert_close(again, scores)


def test_the_named_thing_is_ranked_first():
    shown = [world.render(world.views(name, 1, 9)[0]).image for name in ("bus", "cow", "kite")]
    pictures = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2) / 255
    for name, place in (("a cow", 1), ("a kite", 2)):
        plugin = Rank(Rank.Config(scope="image"), "rank")
        plugin.texts, plugin.files = {name: 1.0}, {}
        assert plugin.scores(pictures, None).argmin() == place


def test_candidates_may_be_ranked_by_a_picture(tmp_path):
    shown = [world.render(world.views(name, 1, 9)[0]).image for name in ("bus", "cow", "kite")]
    pictures = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2) / 255
    Image.fromarray(world.render(world.views("cow", 2, 4)[1]).image).save(tmp_path / "cow.png")
    for images, place in (([], 0), ([str(tmp_path / "cow.png")], 1)):
        config = Rank.Config(scope="image", images=images)
        session = inlay.Session(pixel(), {"rank": Rank(config, "rank")})
        session.run("a bus", steps=1)  # says what to look for
        assert session.plugins["rank"].scores(pictures, None).argmin() == place
