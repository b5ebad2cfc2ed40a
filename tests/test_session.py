"""The public API: what a session takes, what a result holds."""

import pytest
import torch
from PIL import Image

import inlay
from folders import save_flux
from inlay import Cond, ConfigError, InputError, ModelError
from models import conds, flux, stable_diffusion
from spies import Editor, plugin


@pytest.fixture(scope="module")
def pipe():
    return flux()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("model") / "flux")


def latent(pipe, plugins=None, **options):
    given = {"conds": conds(pooled=hasattr(pipe, "transformer")), "steps": 2, "seed": 3}
    return inlay.Session(pipe, plugins).run(**given | options).latents["edit"]


# what goes in ---------------------------------------------------------------------------------


def test_a_pipeline_and_its_folder_draw_the_same(folder):
    by_name = inlay.Session(str(folder), device="cpu")
    live = inlay.Session(by_name.backbone.pipe)
    first = by_name.run("a dog", steps=2, seed=3)
    assert torch.equal(first.latents["edit"], live.run("a dog", steps=2, seed=3).latents["edit"])
    assert first.images["edit"].shape == (1, 3, 32, 32)


def test_a_prompt_may_be_a_word_or_one_per_lane(folder):
    session = inlay.Session(str(folder), device="cpu")
    alone = session.run("a dog", steps=2).latents["edit"]
    named = session.run({"source": "a cat", "edit": "a dog"}, steps=2).latents["edit"]
    other = session.run("a cat", steps=2).latents["edit"]
    assert torch.equal(alone, named)
    assert not torch.equal(alone, other)


def test_a_negative_prompt_counts_under_true_guidance_alone(folder):
    session = inlay.Session(str(folder), device="cpu")

    def run(negative, true_cfg):
        prompts = {"edit": "a dog", "negative": negative}
        return session.run(prompts, steps=2, true_cfg=true_cfg).latents["edit"]

    assert torch.equal(run("", 1.0), run("grey", 1.0))
    assert not torch.equal(run("", 3.0), run("grey", 3.0))


def test_ready_conditions_are_taken_by_prompt_and_by_branch(pipe):
    given = conds()
    same = {"edit": Cond(**given["edit"]), "negative": given["negative"]}
    assert torch.equal(latent(pipe, true_cfg=2.0), latent(pipe, true_cfg=2.0, conds=same))
    swapped = given | {"edit/text": given["source"]}
    assert torch.equal(latent(pipe, conds=swapped), latent(pipe, conds={"edit": given["source"]}))


def test_a_misspelt_prompt_is_refused(pipe):
    with pytest.raises((ConfigError, TypeError), match="edits"):
        latent(pipe, prompt={"edits": "a dog"})


@pytest.mark.parametrize("kind", ["path", "picture", "tensor"])
def test_a_picture_may_come_in_three_forms(pipe, tmp_path, kind):
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    picture.save(tmp_path / "in.png")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    tensor = pixels.reshape(1, 30, 40, 3).permute(0, 3, 1, 2) / 255
    forms = {"path": str(tmp_path / "in.png"), "picture": picture, "tensor": tensor}
    seen = {}
    watch = plugin(prepare=lambda run: seen.update(run.board, size=run.size))
    latent(pipe, {"watch": watch}, image=forms[kind])
    assert torch.allclose(seen["image:original"], tensor, atol=1 / 255)
    height, width = seen["size"]
    assert seen["image:source"].shape == (1, 3, height, width) and width > height
    assert seen["image:source"].amin() >= 0 and seen["image:source"].amax() <= 1


def test_what_is_no_picture_is_refused(pipe):
    with pytest.raises(InputError, match=r"input\.image: "):
        latent(pipe, image=3)


def test_sigmas_replace_the_schedule(pipe):
    sigmas, seen = [1.0, 0.6, 0.2], []
    watch = plugin(observe=lambda step: seen.append(float(step.frame.sigma)))
    latent(pipe, {"watch": watch}, sigmas=sigmas, steps=3)
    shifted = inlay.Session(pipe).scheduler.config.use_dynamic_shifting
    assert shifted and len(seen) == 3 and seen[0] == pytest.approx(1.0)
    assert sorted(seen, reverse=True) == seen and seen[1] != pytest.approx(2 / 3, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: 0 cannot be used"),
        ({"n": 0}, "n: 0 cannot be used"),
        ({"seed": -1}, "seed: -1 cannot be used"),
        ({"guidance": -2.0}, r"guidance: -2\.0 cannot be used"),
        ({"size": 2}, "size: .* too small"),
    ],
)
def test_numbers_out_of_range_are_refused(pipe, options, message):
    with pytest.raises(ConfigError, match=message):
        latent(pipe, **options)


def test_an_unknown_plugin_is_refused_with_a_suggestion(pipe):
    with pytest.raises(ConfigError, match=r"no plugin 'latent_blent'.*latent_blend"):
        inlay.Session(pipe, {"latent_blent": {}})


def test_an_unknown_option_is_refused_with_its_path(pipe):
    with pytest.raises(ConfigError, match=r"plugins\.latent_blend\.stpes: unknown key"):
        inlay.Session(pipe, {"latent_blend": {"stpes": [1]}})


def test_a_preset_is_its_plugins_with_the_options_merged(pipe):
    session = inlay.Session(pipe, {"addit": {"weighted_attention": {"gamma": 1.3}}})
    assert list(session.plugins)[:2] == ["source_trajectory", "structure_transfer"]
    assert session.plugins["weighted_attention"].cfg.gamma == 1.3


def test_one_plugin_may_be_used_twice_under_two_names(pipe):
    session = inlay.Session(pipe, {"one": {"use": "paste_back"}, "two": {"use": "paste_back"}})
    assert [p.name for p in session.plugins.values()] == ["one", "two"]
    assert type(session.plugins["one"]) is type(session.plugins["two"])


# what comes out -------------------------------------------------------------------------------


def test_a_result_holds_pictures_latents_board_and_manifest(pipe):
    publish = plugin(
        declare=lambda need: need.publish("mask:all"),
        prepare=lambda run: run.board.update({"mask:all": torch.ones(1, 1, 8, 8)}),
    )
    result = inlay.Session(pipe, {"all": publish}).run(conds=conds(), steps=2, seed=5, n=2)
    assert result.images["edit"].shape == (2, 3, 32, 32)
    assert result.images["edit"].amin() >= 0 and result.images["edit"].amax() <= 1
    assert result.latents["edit"].shape == (2, 64, 16)
    assert result.board["mask:all"].sum() == 64
    manifest = result.manifest
    assert manifest["experiment"]["steps"] == 2 and manifest["seed"] == 5
    assert {"plan", "versions", "device", "dtype", "threads", "weights", "timings"} <= set(manifest)
    assert len(manifest["plan"]) == 16 and manifest["timings"]["edit"] > 0


def test_a_result_is_saved_whole(pipe, tmp_path):
    result = inlay.Session(pipe).run(conds=conds(), steps=2)
    result.save(tmp_path / "made")
    files = sorted(
        p.relative_to(tmp_path / "made").as_posix() for p in (tmp_path / "made").rglob("*.*")
    )
    assert files == ["images/edit.png", "manifest.json"]
    with Image.open(tmp_path / "made" / "images" / "edit.png") as picture:
        assert picture.size == (32, 32) and picture.mode == "RGB"


def test_the_plan_in_the_manifest_is_the_plan_of_the_plugins(pipe):
    plans = {
        inlay.Session(pipe, plugins).run(conds=conds(), steps=2).manifest["plan"]
        for plugins in ({}, {"edit": Editor()}, {"edit": Editor(active=[0])})
    }
    assert len(plans) == 3


def test_values_that_are_not_finite_are_an_error_and_no_picture(pipe):
    def poison(step):
        step.x_next["edit"] = step.x_next["edit"] * float("nan")

    with pytest.raises(ModelError, match="final, lane edit: values are not finite"):
        latent(pipe, {"poison": plugin(post_step=poison)})


def test_a_unet_takes_the_same_calls():
    result = inlay.Session(stable_diffusion(), {"edit": Editor()}).run(
        conds=conds(pooled=False), steps=2, n=2, guidance={"edit": 5.0}, size=(24, 40)
    )
    assert result.images["edit"].shape == (2, 3, 24, 40)
    assert result.latents["edit"].shape == (2, 4, 12, 20)
