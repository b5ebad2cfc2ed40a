"""MimicBrush on tiny models: rows, the bank, depth, files as published, bad input, compositions."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import compositions
import folders
import inlay
from inlay import ConfigError, InputError, ModelError, PlanConflict, backbones
from inlay.backbones import mimicbrush_files
from inlay_config.config import Experiment
from inlay_config.images import to_pil
from inlay_plugins import depths
from invariants import CASES
from models import mimicbrush, stable_diffusion
from spies import plugin

DRAW = torch.Generator().manual_seed(5)
PICTURE, SHOWN = (
    to_pil(torch.rand(1, 3, *size, generator=DRAW))[0] for size in [(24, 40), (50, 80)]
)
MASK = torch.zeros(1, 1, 24, 40)
MASK[..., 4:14, 8:30] = 1


@pytest.fixture(scope="module")
def pipe():
    return mimicbrush()


def session(options, beside=None, pipe=None, **more):
    plugins = {"imitation": options, **(beside or {})}
    return inlay.Session(pipe or mimicbrush(), plugins, device="cpu", **more)


def run(options, beside=None, pipe=None, mask=MASK, of=None, tracer=None, scheduler=None, **asked):
    """`imitation` on the picture, 2 steps."""
    made = of or session(options, beside, pipe, tracer=tracer, scheduler=scheduler)
    asked = {"image": PICTURE, "steps": 2, "seed": 3, "guidance": 5.0, "size": (24, 40)} | asked
    return made.run(mask=None if mask is None else to_pil(mask)[0], **asked)


def latent(*args, **asked):
    return run(*args, **asked).latents["edit"]


def test_its_invariant_holds(shown, pipe):
    recorder = compositions.Recorder()
    made = run({"image": shown}, {"recorder": recorder}, pipe, tracer=recorder)
    CASES["imitation"].holds(compositions.Made({"imitation": {}}, made, recorder), None)
    assert CASES["imitation"].model == recorder.run.backbone.name


def test_a_null_row_is_the_plain_unet(shown, pipe):
    """And the other row is not, whatever the mix: only a mix of 0 makes it one."""
    preds, kept = [], {}
    watch = plugin(
        inputs=lambda kwargs: kept.update(kwargs),
        post_step=lambda step: preds.append(dict(step.preds)),
    )
    for mix in (0.0, 0.5, 1.0):
        run({"image": shown, "mix": mix}, {"watch": watch}, pipe, steps=1)
    with torch.no_grad():
        null, text = pipe.unet(**kept).sample.split(1)
    for mix, seen in zip((0.0, 0.5, 1.0), preds, strict=True):
        torch.testing.assert_close(seen["edit/null"], null)
        same = torch.allclose(seen["edit/text"], text, rtol=1e-4, atol=1e-5)
        assert same is (mix == 0)


@pytest.mark.parametrize("guidance", [1.0, 0.0])
def test_guidance_may_be_one_or_less(shown, pipe, guidance):
    """Published code stops there."""
    rows = []
    watch = plugin(inputs=lambda kwargs: rows.append(len(kwargs["sample"])))
    made = run({"image": shown}, {"watch": watch}, pipe, guidance=guidance, steps=1)
    assert rows == [1] and torch.isfinite(made.latents["edit"]).all()


def test_an_exemplar_is_read_once_for_all_pictures_and_runs(shown, pipe):
    """One row per step, no further than it is read; another seed or target asks for none."""
    calls, whole, other = [], [], pipe.reference_unet
    hooks = [other.register_forward_pre_hook(lambda _, args: calls.append(args[0]))]
    hooks.append(other.conv_out.register_forward_hook(lambda *_: whole.append(1)))
    one = session({"image": shown}, pipe=pipe)
    first = run({}, of=one, n=2)
    assert [len(z) for z in calls] == [1, 1] and not whole
    moved = MASK.flip(-1)
    again = run({}, of=one, seed=4), run({}, of=one, mask=moved), run({}, of=one, n=2)
    assert len(calls) == 2
    torch.testing.assert_close(again[2].latents["edit"], first.latents["edit"])
    fresh = latent({"image": shown, "bank": 0.0}, pipe=pipe, mask=moved)
    torch.testing.assert_close(again[1].latents["edit"], fresh)
    assert len(calls) == 4
    for hook in hooks:
        hook.remove()


def test_a_batch_holds_what_single_runs_give(shown, pipe):
    noise = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(0))
    both = latent({"image": shown}, pipe=pipe, n=2, noise={"edit": noise})
    for one, alone in zip(both, noise, strict=True):
        made = latent({"image": shown}, pipe=pipe, noise={"edit": alone[None]})
        torch.testing.assert_close(one[None], made, rtol=1e-4, atol=1e-4)


class Deep(nn.Module):
    """A depth network: the mean of what it is shown."""

    def __init__(self):
        super().__init__()
        self.weight, self.shown = nn.Parameter(torch.ones(1)), []

    def forward(self, pixels):
        self.shown.append(pixels)
        return type("Out", (), {"predicted_depth": pixels.mean(1) + self.weight})


class Processor:
    image_mean = (0.5, 0.4, 0.3)

    def __call__(self, images, return_tensors, image_mean):
        pixels = torch.tensor(np.asarray(images)).permute(2, 0, 1)[None] / 255
        mean = torch.tensor(image_mean).view(1, 3, 1, 1)
        return type("Out", (), {"pixel_values": (pixels - mean) / 0.2})


def test_depth_is_of_the_picture_or_of_nothing(shown, pipe, tmp_path, monkeypatch):
    """A file, a network with its mean as published or right, or zeros."""
    network = Deep()
    monkeypatch.setattr(depths, "load", lambda name, where: (network, Processor()))
    free = latent({"image": shown}, pipe=pipe)
    named = latent({"image": shown, "depth": "a/model"}, pipe=pipe)
    assert not network.shown[0].any() and not torch.equal(free, named)
    kept = {"image": shown, "depth": "a/model", "keep_shape": True}
    latent(kept, pipe=pipe)
    latent({**kept, "depth_mean": "right"}, pipe=pipe)
    published, right = network.shown[1:]
    off = torch.tensor(Processor.image_mean).view(1, 3, 1, 1) * (1 - 1 / 255) / 0.2
    torch.testing.assert_close(published - right, off.expand_as(right))
    near = torch.zeros(24, 40)
    near[:, 20:] = 1
    to_pil(near[None, None])[0].save(grey := tmp_path / "depth.png")
    np.save(tmp_path / "depth.npy", near.numpy())
    by_file = {"image": shown, "keep_shape": True}
    one = latent({**by_file, "depth": str(grey)}, pipe=pipe)
    two = latent({**by_file, "depth": str(tmp_path / "depth.npy")}, pipe=pipe)
    assert torch.equal(one, two) and not torch.equal(one, free)
    unread = latent({"image": shown, "depth": str(grey)}, pipe=pipe)
    assert torch.equal(unread, free)


@pytest.fixture(scope="module")
def depth_anything(tmp_path_factory):
    """A tiny one, in a folder."""
    return folders.save_depth_anything(tmp_path_factory.mktemp("depth"))


@torch.no_grad()
def test_a_depth_model_of_transformers_sees_the_picture(depth_anything):
    """Its own numbers, in 0..1 minus the mean, or minus a 255th of it, by the deviation."""
    folder, network = depth_anything
    found, grey = depths.load(str(folder), "depth"), Image.new("RGB", (28, 28), (102,) * 3)
    for published, mean in ((True, 0.5 / 255), (False, 0.5)):
        pixels = torch.full((1, 3, 28, 28), (0.4 - mean) / 0.25)
        wanted = network(pixels).predicted_depth[:, None]
        made = depths.estimate(found, grey, published, blank=False)
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
        blank = depths.estimate(found, grey, published, blank=True)
        torch.testing.assert_close(blank, network(0 * pixels).predicted_depth[:, None])
        assert not torch.allclose(made, blank)


def test_a_folder_is_loaded_and_planned(shown, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = latent({"image": shown}, pipe=str(tmp_path))
    torch.testing.assert_close(loaded, latent({"image": shown}, pipe=pipe), rtol=1e-4, atol=1e-4)
    bare = inlay.Session(backbones.skeleton(str(tmp_path)), {"imitation": {"image": shown}})
    plan = bare.plan(Experiment(steps=4, guidance=5.0), (24, 40), ["image", "mask"])
    assert plan.evaluations == {"edit": 8}


@pytest.fixture(scope="module")
def published(pipe, tmp_path_factory):
    """The parts of a checkpoint as published, and the folders of what others published."""
    folder = tmp_path_factory.mktemp("published")
    parts = {
        "unet": pipe.unet,
        "referencenet": pipe.reference_unet,
        "image_proj": pipe.image_tokens,
        "image_encoder": pipe.image_encoder,
        "depth_guider": pipe.depth_guider,
    }
    table = {name: dict(part.state_dict()) for name, part in parts.items()}
    for key in [k for k in table["referencenet"] if k.startswith(("conv_norm_out", "conv_out"))]:
        del table["referencenet"][key]
    stable_diffusion().save_pretrained(folder / "base")
    pipe.image_encoder.save_pretrained(folder / "image_encoder")
    pipe.vae.save_pretrained(folder / "vae")
    known = {"encoder": str(folder / "image_encoder"), "vae": str(folder / "vae")}
    return table, {**known, "base": str(folder / "base")}


@pytest.mark.parametrize("kind", ["tables", "flat"])
def test_published_files_become_a_pipeline(published, pipe, shown, tmp_path, kind):
    """One checkpoint: a table of tables in a pickle, or flat names in safetensors."""
    table, others = published
    flat = {f"{part}.{key}": t for part, state in table.items() for key, t in state.items()}
    if kind == "tables":
        torch.save(table, tmp_path / "mimicbrush.bin")
    else:
        save_file(flat, tmp_path / "mimicbrush.safetensors")
    loaded = mimicbrush_files.load(tmp_path, **others)
    loaded.feature_extractor = pipe.feature_extractor
    assert loaded.scheduler.config.steps_offset == 1
    made = latent({"image": shown}, pipe=loaded)
    torch.testing.assert_close(made, latent({"image": shown}, pipe=pipe), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda t: t.pop("image_proj"), "it has no image_tokens"),
        (lambda t: t.pop("referencenet"), "it has no reference_unet"),
        (lambda t: t["unet"].pop("conv_in.weight"), r"it has no conv_in\.weight"),
        (lambda t: t["unet"].pop("conv_out.bias"), r"its unet has no conv_out\.bias"),
        (
            lambda t: t["depth_guider"].update({"conv_in.weight": torch.zeros(4, 3, 3, 3)}),
            r"its depth_guider has another conv_in\.weight",
        ),
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_refused(published, tmp_path, spoil, problem):
    table, others = published
    table = {name: dict(state) for name, state in table.items()}
    spoil(table)
    torch.save(table, file := tmp_path / "mimicbrush.bin")
    with pytest.raises(ModelError, match=problem):
        mimicbrush_files.load(file, **others)


def test_models_of_another_kind_are_refused(shown):
    with pytest.raises(ModelError, match=r"model: its U-Net takes 9 channels, .* gives 13"):
        inlay.Session(mimicbrush(channels=9))
    with pytest.raises(ModelError, match="its reference U-Net takes 9 channels"):
        inlay.Session(mimicbrush(reference=9))
    pipe = mimicbrush()
    pipe.image_tokens = None
    with pytest.raises(ModelError, match="no image_tokens, its projection"):
        inlay.Session(pipe)
    with pytest.raises(ModelError, match=r"plugins\.imitation: sd has no reference U-Net"):
        text = {name: {"embeds": torch.rand(1, 4, 16)} for name in ("edit", "negative")}
        run({"image": shown}, pipe=stable_diffusion(), conds=text)
    with pytest.raises(ModelError, match=r"was given 4\. Add the plugin `imitation`"):
        inlay.Session(mimicbrush()).run(image=PICTURE, steps=1, size=(24, 40))


def test_what_cannot_be_used_is_refused(shown, pipe, tmp_path):
    Image.new("RGB", (90, 4)).save(tmp_path / "tiny.png")
    Image.new("L", (9000, 9000)).save(tmp_path / "huge.png")
    (tmp_path / "empty.png").touch()
    np.save(tmp_path / "flat.npy", np.zeros(5))
    where = r"plugins\.imitation\.image: "
    with pytest.raises(ConfigError, match=where + "there is no exemplar"):
        run({}, pipe=pipe)
    for name, problem in (("tiny", "90x4 pixels"), ("huge", "too large"), ("empty", "cannot be")):
        with pytest.raises(InputError, match=where + f".*{problem}"):
            run({"image": str(tmp_path / f"{name}.png")}, pipe=pipe)
    with pytest.raises(PlanConflict, match=r"imitation needs 'mask:user'"):
        run({"image": shown}, pipe=pipe, mask=None)
    with pytest.raises(InputError, match=r"plugins\.imitation: the mask is empty"):
        run({"image": shown}, pipe=pipe, mask=torch.zeros(1, 1, 24, 40))
    with pytest.raises(ConfigError, match=r"imitation\.mix: 2.0 is no share"):
        run({"image": shown, "mix": 2}, pipe=pipe)
    with pytest.raises(ConfigError, match=r"imitation\.depth: keep_shape needs"):
        run({"image": shown, "keep_shape": True}, pipe=pipe)
    kept = {"image": shown, "keep_shape": True}
    with pytest.raises(InputError, match=r"imitation\.depth: .*holds \(5,\)"):
        run({**kept, "depth": str(tmp_path / "flat.npy")}, pipe=pipe)
    with pytest.raises(ModelError, match=r"imitation\.depth: '.*absent' is no depth"):
        run({**kept, "depth": str(tmp_path / "absent")}, pipe=pipe)


@pytest.mark.parametrize("edges", [(0, 24, 0, 10), (0, 24, 0, 40), (23, 24, 39, 40)])
def test_a_hole_may_touch_the_border(shown, pipe, edges):
    top, bottom, left, right = edges
    mask = torch.zeros(1, 1, 24, 40)
    mask[..., top:bottom, left:right] = 1
    assert torch.isfinite(latent({"image": shown}, pipe=pipe, mask=mask, steps=1)).all()


def test_exemplars_are_told_apart_and_lie_on_white(pipe, tmp_path):
    """By their pixels alone; a transparent one is a white one."""
    pictures = {"clear": Image.new("RGBA", (40, 40), (255, 0, 0, 0)), "other": SHOWN}
    pictures["white"] = Image.new("RGB", (40, 40), "white")
    made = {}
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
        made[name] = run({"image": str(tmp_path / f"{name}.png")}, pipe=pipe, steps=1)
    assert torch.equal(made["clear"].latents["edit"], made["white"].latents["edit"])
    hashes = {name: result.manifest["exemplar"]["sha256"] for name, result in made.items()}
    assert hashes["clear"] == hashes["white"] != hashes["other"]


def test_it_composes_with_blending_guidance_and_ranking(shown, pipe):
    """Outside the mask the source stays to the end, CLIP's gradient goes through both maps, and the
    better of two pictures is first."""
    beside = {
        "source_trajectory": {},
        "latent_blend": {"steps": [[0, 1]], "mask": "mask:user"},
        "clip_guidance": {"prompts": "a red bus", "scale": 10.0},
        "rank": {"prompts": "a red bus", "mask": "mask:user"},
    }
    solver = {"scheduler": "EulerDiscreteScheduler"}  # its last step leaves no noise
    made = run({"image": shown}, beside, pipe, n=2, **solver)
    clean = made.board["latent:source"]
    outside = torch.nn.functional.interpolate(MASK, clean.shape[-2:]) == 0
    for one in made.latents["edit"].split(1):
        assert torch.equal(one[outside.expand_as(one)], clean[outside.expand_as(clean)])
    assert made.board["rank:scores"].diff() >= 0
    del beside["clip_guidance"]
    unguided = latent({"image": shown}, beside, pipe, n=2, **solver)
    assert not torch.equal(unguided, made.latents["edit"])
