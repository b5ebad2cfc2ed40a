"""Recipes of the instruction models, their pairs, and pairs that are made by Prompt-to-Prompt."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

import folders
from inlay_config import config
from inlay_config.errors import ConfigError, InputError, ModelError
from inlay_plugins import clips
from inlay_toybox import edits
from inlay_train import edit_data, low_rank, pairs, prompt_pairs, recipes, trainer
from inlay_train.edit_data import EditPairs, Sources

TINY = ["size=16", "train.batch=2", "train.precision=fp32", "train.workers=0", "train.warmup=0"]
TINY += ["train.accumulate=1", "data.dataset=null"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return folders.save_stable_diffusion(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    return folders.save_instruct(tmp_path_factory.mktemp("instruct"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pairs, the third of which is torn."""
    root = tmp_path_factory.mktemp("pairs")
    for i in range(6):
        before, after = (Image.new("RGB", (24, 16 + 4 * i), (40 * i, k, 90)) for k in (10, 200))
        pairs.append(root, str(i), before, after, {"edit_prompt": f"add {i}"})
    torn = root / "2-after.png"
    torn.write_bytes(torn.read_bytes()[:40])
    return root


def build(name, *words):
    cls, cfg = recipes.load(name, [*TINY, *words])
    return cls(cfg)


def batch(recipe, n=4):
    torch.manual_seed(1)
    before, after = torch.rand(2, n, 3, 16, 16) * 2 - 1
    return {"before": before, "after": after, "instruction": ["add a dog"] * n}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("instruct_pix2pix", []),
        ("magicbrush", ["rank=2", "text=true"]),
        ("erasedraw", ["data.toybox=5", "data.folder=null", "data.kinds=[add]", "encoded=true"]),
    ],
)
def test_it_trains_from_the_command_line_and_stock_loads_it(
    name, words, base, instruct, folder, invoke, tmp_path
):
    model = base if name == "instruct_pix2pix" else instruct
    words = [f"model={model}", f"data.folder={folder}", *TINY, *words]
    code, out, told = invoke("train", name, *words, "--max-steps", 20, "--out", tmp_path / "out")
    assert code == 0, told
    assert out.strip() == str(tmp_path / "out" / "model")
    assert ("1 broken pictures skipped" in told) is (name != "erasedraw")
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "out" / "model")
    assert pipe.unet.config.in_channels == 8
    begun = StableDiffusionInstructPix2PixPipeline.from_pretrained(model)
    kinds = ("unet", "text_encoder")
    moved = {
        kind: any(
            not torch.equal(a, b)
            for a, b in zip(
                getattr(pipe, kind).parameters(),
                getattr(begun, kind).parameters(),
                strict=True,
            )
            if a.shape == b.shape
        )
        for kind in kinds
    }
    assert moved == {"unet": True, "text_encoder": "text=true" in words}
    later = build(name, f"model={tmp_path / 'out' / 'model'}", "rank=0")  # it goes on from that
    for part, made in ((later.unet, pipe.unet), (later.text_encoder, pipe.text_encoder)):
        state = made.state_dict()
        assert all(torch.equal(p, state[key]) for key, p in part.named_parameters())
    pipe.set_progress_bar_config(disable=True)
    made = pipe("add 1", torch.rand(1, 3, 16, 16), num_inference_steps=1, output_type="pt").images
    assert made.isfinite().all()


def test_the_new_channels_do_nothing_at_first(base):
    recipe = build("instruct_pix2pix", f"model={base}")
    noisy, shown, words = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), recipe.read(["a", "b"])
    with torch.no_grad():
        seen = recipe.unet(torch.cat([noisy, shown], 1), 10, words).sample
        blind = recipe.unet(torch.cat([noisy, 0 * shown], 1), 10, words).sample
    torch.testing.assert_close(seen, blind, rtol=0, atol=0)
    assert recipe.unet.conv_in.weight[:, 4:].abs().sum() == 0


def test_noise_that_hides_all_is_for_models_that_predict_velocities(base, tmp_path):
    with pytest.raises(ConfigError, match="zero_snr"):
        build("instruct_pix2pix", f"model={base}", "zero_snr=true")
    pipe = StableDiffusionPipeline.from_pretrained(base)
    kind = {"prediction_type": "v_prediction"}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **kind)
    pipe.save_pretrained(tmp_path / "base")
    recipe = build("instruct_pix2pix", f"model={tmp_path / 'base'}", "zero_snr=true")
    assert recipe.levels.alphas_cumprod[-1] < 1e-6
    assert recipe(batch(recipe)).isfinite()
    recipe.save(tmp_path / "model")
    made = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "model")
    assert torch.equal(made.scheduler.alphas_cumprod, recipe.levels.alphas_cumprod)


def test_conditions_are_dropped_as_published(base, monkeypatch):
    """5 % text alone, 5 % both, 5 % the picture alone: one number decides."""
    recipe = build("instruct_pix2pix", f"model={base}")
    heard, seen = [], []

    def listen(words):
        heard.extend(words)
        return torch.zeros(len(words), 4, 16)

    def look(sample, *rest, **options):
        seen.extend(sample[:, 4:].abs().amax((1, 2, 3)).tolist())
        return (sample[:, :4],)

    monkeypatch.setattr(recipe, "read", listen)
    monkeypatch.setattr(recipe.unet, "forward", look)
    clean = torch.ones(4000, 4, 2, 2)
    recipe.forward({"before": clean, "after": clean, "instruction": ["add"] * 4000})
    silent, dark = np.array(heard) == "", np.array(seen) == 0
    for wanted, found in (
        (0.05, silent & ~dark),
        (0.05, silent & dark),
        (0.05, ~silent & dark),
        (0.85, ~silent & ~dark),
    ):
        assert found.mean() == pytest.approx(wanted, abs=0.012)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_is_what_the_model_predicts(base, kind, monkeypatch):
    """A U-Net that knows the noise has no loss."""
    recipe = build("instruct_pix2pix", f"model={base}", "dropout=0.0", "emphasis=3.0")
    recipe.levels.register_to_config(prediction_type=kind)
    clean = 0.3 * torch.randn(3, 4, 8, 8)
    scaled = recipe.vae.config.scaling_factor * clean

    def know(sample, time, *rest, **options):
        alpha = recipe.levels.alphas_cumprod[time].sqrt()[:, None, None, None]
        sigma = (1 - alpha.square()).sqrt()
        noise = (sample[:, :4] - alpha * scaled) / sigma
        return (noise if kind == "epsilon" else alpha * noise - sigma * scaled,)

    monkeypatch.setattr(recipe.unet, "forward", know)
    given = {"before": clean, "after": clean, "instruction": ["x"] * 3}
    assert recipe.forward(given) < 1e-8
    wrong = "v_prediction" if kind == "epsilon" else "epsilon"
    recipe.levels.register_to_config(prediction_type=wrong)
    assert recipe.forward(given) > 1e-2


def test_timesteps_lean_towards_noise_when_shifted(base):
    recipe = build("instruct_pix2pix", f"model={base}")
    clean = torch.zeros(20_000, 1)
    for shift, mean in ((1.0, 0.5), (1.6, 0.58)):
        recipe.cfg.shift = shift
        times = recipe.times(clean)
        assert times.min() >= 0 and times.max() == 999
        assert times.float().mean() / 1000 == pytest.approx(mean, abs=0.02)


def test_low_rank_changes_weights_by_that_rank_and_merges(base):
    recipe = build("instruct_pix2pix", f"model={base}", "rank=1")
    before = low_rank.merged(recipe.unet)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = recipe.unet.get_submodule(name)
    assert not layer.parametrizations.weight.original.requires_grad
    assert recipe.unet.conv_in.bias.requires_grad
    with torch.no_grad():
        layer.parametrizations.weight[0].up.normal_()
    after = low_rank.merged(recipe.unet)
    assert before.keys() == after.keys() and not [key for key in after if "parametriz" in key]
    change = after[f"{name}.weight"] - before[f"{name}.weight"]
    assert torch.linalg.matrix_rank(change) == 1
    assert all(torch.equal(after[k], before[k]) for k in after if k != f"{name}.weight")


def test_models_of_other_channels_are_refused(base, tmp_path):
    with pytest.raises(ModelError, match=r"its U-Net sees no picture\. Train instruct_pix2pix"):
        build("magicbrush", f"model={base}")
    recipe = build("instruct_pix2pix", f"model={base}")
    recipe.unet.register_to_config(in_channels=9)
    with pytest.raises(ModelError, match="takes 9 channels, not 4 or 8"):
        recipe.prepared(recipe.unet)


# pairs ----------------------------------------------------------------------------------------


def test_pairs_are_cut_and_mirrored_alike(tmp_path):
    values = np.arange(30 * 20 * 3, dtype=np.uint32).reshape(20, 30, 3) % 251
    picture = Image.fromarray(values.astype(np.uint8))
    pairs.append(tmp_path, "0", picture, picture, {"edit_prompt": "nothing"})
    data = EditPairs(Sources(folder=str(tmp_path)), 16, grow=1.2, flip=0.5)
    rows = [data.draw(0, np.random.default_rng(i)) for i in range(6)]
    assert all(torch.equal(row["before"], row["after"]) for row in rows)
    assert len({row["before"].sum().item() for row in rows}) > 3
    plain = EditPairs(Sources(folder=str(tmp_path)), 20)
    first = plain.draw(0, np.random.default_rng(0))
    assert first["before"].shape == (3, 20, 20) and first["before"].abs().max() <= 1
    plain.flip = 1.0
    mirrored = plain.draw(0, np.random.default_rng(0))
    assert torch.equal(mirrored["before"], first["before"].flip(-1))


def test_sources_add_up(folder):
    data = EditPairs(Sources(folder=str(folder), repeat=2, toybox=3, kinds=["remove"]), 16)
    assert len(data) == 15
    assert data.draw(7, np.random.default_rng(0))["instruction"] == "add 1"
    words = [data.draw(i, np.random.default_rng(0))["instruction"] for i in range(12, 15)]
    assert all(word.startswith(("remove", "delete", "take")) for word in words)
    with pytest.raises(InputError, match=r"2-after\.png"):
        data.draw(2, np.random.default_rng(0))


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The library `datasets`, which keeps what it converts in a folder of this test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return datasets


def test_an_image_folder_of_the_library_datasets_is_a_folder_of_pairs(
    library, base, folder, tmp_path
):
    """The layout of `inlay pairs` is its own; a torn picture is found when it is drawn."""
    made, wanted = EditPairs(Sources(dataset=str(folder)), 16), EditPairs(Sources(str(folder)), 16)
    assert len(made) == len(wanted) == 6
    for index in (0, 5):
        rows = [data.draw(index, np.random.default_rng(0)) for data in (made, wanted)]
        assert rows[0]["instruction"] == rows[1]["instruction"] == f"add {index}"
        for name in ("before", "after"):
            assert torch.equal(rows[0][name], rows[1][name])
    with pytest.raises(InputError, match="row 2: cannot be read"):
        made.draw(2, np.random.default_rng(0))
    recipe = build("instruct_pix2pix", f"model={base}", f"data.dataset={folder}")
    trainer.train(recipe, tmp_path / "out", max_steps=2)
    assert (tmp_path / "out" / "model" / "model_index.json").exists()


def test_a_table_of_the_library_datasets_names_its_columns(
    library, instruct, tmp_path, monkeypatch
):
    pictures = {
        name: [Image.new("RGB", (20, 20), (level, 60 * i, 0)) for i in range(4)]
        for name, level in (("source_img", 0), ("target_img", 255))
    }
    rows = {**pictures, "instruction": [f"make it {i}" for i in range(4)]}
    kinds = {name: library.Image() for name in pictures}
    features = library.Features({**kinds, "instruction": library.Value("string")})
    table = library.Dataset.from_dict(rows, features)
    table.to_parquet(str(tmp_path / "table" / "train.parquet"))
    columns = {"before": "source_img", "after": "target_img", "instruction": "instruction"}
    made = EditPairs(Sources(dataset=str(tmp_path / "table"), columns=columns), 16)
    drawn = made.draw(3, np.random.default_rng(0))
    assert len(made) == 4 and drawn["instruction"] == "make it 3"
    assert (drawn["before"][0] == -1).all() and (drawn["after"][0] == 1).all()
    words = [f"data.columns.{key}={name}" for key, name in columns.items()]
    recipe = build("magicbrush", f"model={instruct}", f"data.dataset={tmp_path / 'table'}", *words)
    trainer.train(recipe, tmp_path / "out", max_steps=2)
    assert (tmp_path / "out" / "model" / "model_index.json").exists()
    with pytest.raises(ConfigError, match=r"data\.columns: no column 'original_image'"):
        EditPairs(Sources(dataset=str(tmp_path / "table")), 16)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        EditPairs(Sources(dataset="x"), 16)


def test_what_cannot_be_trained_on_is_named(tmp_path):
    with pytest.raises(ConfigError, match="data: nothing to train on"):
        EditPairs(Sources(), 16)
    with pytest.raises(ConfigError, match="no kind of edit 'paint'"):
        EditPairs(Sources(toybox=3, kinds=["paint"]), 16)
    with pytest.raises(InputError, match=r"metadata\.jsonl: there is no such file"):
        EditPairs(Sources(folder=str(tmp_path)), 16)
    (tmp_path / "metadata.jsonl").write_text('{"edit_prompt": "x"}\n')
    with pytest.raises(InputError, match=r"line 1: no object with original_image_file_name"):
        EditPairs(Sources(folder=str(tmp_path)), 16)


def test_encoded_pairs_are_read_back_while_they_are_of_the_same(folder, tmp_path):
    calls = []

    def encoder(pictures):
        calls.append(len(pictures))
        return pictures[:, :2, ::8, ::8]

    data = EditPairs(Sources(folder=str(folder)), 16, flip=0.5)
    made = edit_data.encode(data, encoder, tmp_path / "e.safetensors", "one", chunk=4)
    assert calls == [16, 8] and made.latents.shape == (6, 2, 2, 2, 2, 2)
    again = edit_data.encode(data, encoder, tmp_path / "e.safetensors", "one")
    assert len(calls) == 2 and torch.equal(again.latents, made.latents)
    assert again.words == made.words and again.broken == made.broken == {2}
    with pytest.raises(InputError, match=r"2-after\.png"):
        again.draw(2, np.random.default_rng(0))
    plain = EditPairs(Sources(folder=str(folder)), 16).draw(4, np.random.default_rng(0))
    row = again.draw(4, np.random.default_rng(0))
    sides = [plain["after"], plain["after"].flip(-1)]
    assert any(torch.allclose(row["after"], encoder(s[None])[0], atol=2e-3) for s in sides)
    edit_data.encode(data, encoder, tmp_path / "e.safetensors", "another", chunk=6)
    assert calls[3:] == [24]


# pairs by Prompt-to-Prompt --------------------------------------------------------------------


def test_the_filter_asks_for_likeness_captions_and_direction():
    """Of the world's exact edits most pass; another edit's captions do not."""
    clip, least = clips.load("toybox/clip"), torch.tensor(list(prompt_pairs.TOYBOX.values()))
    kept, wrong, drawn = 0, 0, [edits.draw(seed, ["add"]) for seed in range(24)]
    for edit, other in zip(drawn, [*drawn[1:], drawn[0]], strict=True):
        before, after = (_picture(scene) for scene in (edit.before, edit.after))
        for told, is_right in ((edit, True), (other, False)):
            texts = (told.before.caption, told.after.caption)
            near = prompt_pairs.similarities(clip, before, after, texts)
            passed = bool((near >= least).all())
            kept, wrong = kept + (passed and is_right), wrong + (passed and not is_right)
    assert kept >= 16
    assert wrong <= 1


def _picture(scene):
    from inlay_toybox import world

    return torch.from_numpy(world.render(scene).image).permute(2, 0, 1)[None] / 255


def test_pairs_are_made_from_one_noise_and_the_work_goes_on(tmp_path, invoke):
    words = ["toybox", "steps=3", "dtype=float32", "--samples", 4, "--keep", 3]
    words += ["--least", "-1,-1,-1", "--out", tmp_path / "pairs"]
    assert invoke("pairs", *words, "--n", 1)[0] == 0
    first = pairs.read(tmp_path / "pairs")
    code, out, told = invoke("pairs", *words, "--n", 2)
    assert code == 0 and "'triplets': 2, 'kept': 6" in out and told.count("kept;") == 1
    made = pairs.read(tmp_path / "pairs")
    assert made[:3] == first and len(made) == 6
    lines = (tmp_path / "pairs" / "metadata.jsonl").read_text().splitlines()
    facts = [json.loads(line) for line in lines]
    assert facts[0]["edit_prompt"] == edits.draw(0).instruction
    assert all(0.1 <= f["share"] <= 0.9 and 2 <= f["guidance"] <= 4 for f in facts)
    best = [f["direction"] for f in facts[:3]]
    assert best == sorted(best, reverse=True)
    before, after = (np.asarray(Image.open(path), float) for path in made[0][:2])
    assert before.shape == (64, 64, 3) and np.corrcoef(before.flat, after.flat)[0, 1] > 0.3


def test_pairs_that_cannot_be_made_are_refused(tmp_path):
    exp = config.load("t2i", ["model=toybox/sd"])
    with pytest.raises(ConfigError, match="no prompt_to_prompt"):
        prompt_pairs.Maker(exp, None, prompt_pairs.Making())
    with pytest.raises(ConfigError, match="--least"):
        prompt_pairs.bounds("0.2,0.3")
    file = tmp_path / "triplets.jsonl"
    file.write_text('{"input": "a lake ", "edit": "add a swan", "output": "a swan"}\n' * 3)
    found = list(pairs.triplets(str(file), 2, 0))
    assert found == [pairs.Triplet("a lake", "add a swan", "a swan")] * 2
    with pytest.raises(InputError, match="there is no such file"):
        list(pairs.triplets(str(tmp_path / "none.jsonl"), 2, 0))
