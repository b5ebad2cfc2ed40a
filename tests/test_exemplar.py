"""Paint by Example: stock's numbers bit for bit, one token as a bias, files as published."""

import pytest
import torch
from diffusers import PNDMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

import compositions
import inlay
from folders import save_paint_by_example
from inlay import ConfigError, InputError, ModelError, PlanConflict, backbones
from inlay_config.config import Experiment
from inlay_config.images import to_pil, to_tensor
from invariants import CASES
from models import paint_by_example, stable_diffusion
from spies import plugin

DRAW = torch.Generator().manual_seed(5)
PICTURE, SHOWN = (
    to_pil(torch.rand(1, 3, *size, generator=DRAW))[0] for size in [(24, 40), (50, 80)]
)
MASK = torch.zeros(1, 1, 24, 40)
MASK[..., 4:14, 8:30] = 1
EXACT = {"bias": False}


def run(options, beside=None, pipe=None, scheduler=None, mask=MASK, **asked):
    """`exemplar` on the picture, 3 steps."""
    plugins = {"exemplar": options, **(beside or {})}
    session = inlay.Session(pipe or paint_by_example(), plugins, scheduler, device="cpu")
    asked = {"image": PICTURE, "steps": 3, "seed": 3, "guidance": 5.0, "size": (24, 40)} | asked
    return session.run(mask=None if mask is None else to_pil(mask)[0], **asked)


def stock(scheduler=None, n=1, mask=MASK, kind="latent", example=SHOWN, guidance=5.0):
    """The stock pipeline's own call of the same."""
    pipe = paint_by_example()
    pipe.scheduler = inlay.Session(pipe, scheduler=scheduler).scheduler
    pipe.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 3, "guidance_scale": guidance, "num_images_per_prompt": n}
    generator = torch.Generator().manual_seed(3)
    picture = 2 * to_tensor(PICTURE) - 1
    return pipe(example, picture, mask, generator=generator, output_type=kind, **asked).images


def pndm():
    """As published: PLMS."""
    settings = {"skip_prk_steps": True, "set_alpha_to_one": False}
    return PNDMScheduler.from_config(paint_by_example().scheduler.config, **settings)


@pytest.mark.parametrize(
    "scheduler", [pndm(), "DDIMScheduler", "DDPMScheduler"], ids=["plms", "ddim", "ddpm"]
)
@pytest.mark.parametrize(("n", "guidance"), [(1, 5.0), (2, 1.0)])
def test_it_is_the_stock_pipeline_bit_for_bit(shown, scheduler, n, guidance):
    options = {**EXACT, "image": shown, "fit": "crop"}
    made = run(options, scheduler=scheduler, n=n, guidance=guidance)
    given = {"scheduler": scheduler, "n": n, "guidance": guidance}
    assert torch.equal(made.latents["edit"], stock(**given))
    assert torch.equal(made.images["edit"], stock(**given, kind="pt"))


def test_a_mask_off_the_grid_and_a_whole_exemplar_are_where_stock_is_another(shown):
    """Nearest and squashed is what stock does with an exemplar that is square already."""
    odd = torch.zeros(1, 1, 24, 40)
    odd[..., 3:15, 0:21] = 1
    square = SHOWN.resize((32, 32), Image.Resampling.BICUBIC)
    theirs = stock(mask=odd, example=square)
    near = run({**EXACT, "image": shown, "resize": "nearest"}, mask=odd).latents["edit"]
    assert torch.equal(near, theirs)
    smooth = run({**EXACT, "image": shown}, mask=odd).latents["edit"]
    assert (smooth - theirs).abs().max() > 1e-4
    cut = run({**EXACT, "image": shown, "fit": "crop", "resize": "nearest"}, mask=odd)
    assert (cut.latents["edit"] - theirs).abs().max() > 1e-4


def test_one_token_is_a_bias_vector(shown):
    """The same picture without a single query of cross-attention, and stock's processors after."""
    pipe, calls = paint_by_example(), []
    asked = [m.to_q for name, m in pipe.unet.named_modules() if name.endswith("attn2")]
    hooks = [q.register_forward_hook(lambda *_: calls.append(1)) for q in asked]
    fast = run({"image": shown}, pipe=pipe, n=2)
    assert not calls
    exact = run({**EXACT, "image": shown}, pipe=pipe, n=2)
    assert len(calls) == 3 * len(hooks)
    both = fast.latents["edit"], exact.latents["edit"]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)


def test_processors_come_back_after_a_run_that_failed(shown):
    def fail(step):
        raise RuntimeError

    pipe = paint_by_example()
    before = {name: id(p) for name, p in pipe.unet.attn_processors.items()}
    with pytest.raises(RuntimeError):
        run({"image": shown}, {"fail": plugin(pre_step=fail)}, pipe)
    run({"image": shown}, pipe=pipe, steps=1)
    assert {name: id(p) for name, p in pipe.unet.attn_processors.items()} == before


def test_its_invariant_holds(shown):
    recorder = compositions.Recorder()
    made = run({"image": shown}, {"recorder": recorder})
    CASES["exemplar"].holds(compositions.Made({"exemplar": {}}, made, recorder), None)
    assert CASES["exemplar"].model == recorder.run.backbone.name


def test_it_composes_with_blending_ranking_and_further_guidance(shown):
    """Outside the mask the source stays to the end, CLIP's gradient moves what is inside, and the
    better of two pictures is first."""
    beside = {
        "source_trajectory": {},
        "latent_blend": {"steps": [[0, 2]], "mask": "mask:user"},
        "clip_guidance": {"prompts": "a red bus", "scale": 10.0},
        "rank": {"prompts": "a red bus", "mask": "mask:user"},
        "pag": {"scale": 1.0},
    }
    made = run({"image": shown}, beside, scheduler="EulerDiscreteScheduler", n=2)
    clean = made.board["latent:source"]
    outside = torch.nn.functional.interpolate(MASK, clean.shape[-2:]) == 0
    for latent in made.latents["edit"].split(1):
        assert torch.equal(latent[outside.expand_as(latent)], clean[outside.expand_as(clean)])
    assert made.board["rank:scores"].diff() >= 0
    del beside["clip_guidance"]
    unguided = run({"image": shown}, beside, scheduler="EulerDiscreteScheduler", n=2)
    assert not torch.equal(unguided.latents["edit"], made.latents["edit"])


def test_a_folder_in_the_published_layout_is_loaded_and_planned(shown, tmp_path):
    folder = save_paint_by_example(tmp_path / "model")
    loaded = run({"image": shown}, pipe=str(folder)).latents["edit"]
    torch.testing.assert_close(loaded, run({"image": shown}).latents["edit"], rtol=1e-4, atol=1e-4)
    bare = inlay.Session(backbones.skeleton(str(folder)), {"exemplar": {"image": shown}})
    plan = bare.plan(Experiment(steps=4, guidance=5.0), (24, 40), ["image", "mask"])
    assert plan.evaluations == {"edit": 8}
    file = folder / "image_encoder" / "model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if not k.startswith("proj_out")}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"image_encoder: the exemplar's encoder has no proj_out\."
    ):
        inlay.Session(str(folder))


def test_a_unet_with_other_channels_is_refused():
    with pytest.raises(ModelError, match=r"model: its U-Net takes 4 channels, .* gives 9"):
        inlay.Session(paint_by_example(channels=4))


def test_it_needs_a_model_of_its_kind_and_the_model_needs_it(shown):
    with pytest.raises(ModelError, match=r"plugins\.exemplar: sd takes no exemplar"):
        text = {name: {"embeds": torch.rand(1, 4, 16)} for name in ("edit", "negative")}
        run({"image": shown}, pipe=stable_diffusion(), conds=text)
    with pytest.raises(ModelError, match=r"was given 4\. Add the plugin `exemplar`"):
        inlay.Session(paint_by_example()).run(image=PICTURE, steps=1, size=(24, 40))


@pytest.mark.parametrize("edges", [(0, 24, 0, 10), (0, 24, 0, 40), (23, 24, 39, 40)])
def test_a_hole_may_touch_the_border(shown, edges):
    top, bottom, left, right = edges
    mask = torch.zeros(1, 1, 24, 40)
    mask[..., top:bottom, left:right] = 1
    assert torch.isfinite(run({"image": shown}, mask=mask, steps=1).images["edit"]).all()


def test_an_exemplar_with_alpha_lies_on_white(tmp_path):
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    Image.new("RGB", (40, 40), "white").save(tmp_path / "white.png")
    both = [run({"image": str(tmp_path / f"{n}.png")}, steps=1) for n in ("clear", "white")]
    assert torch.equal(*(made.latents["edit"] for made in both))


def test_the_manifest_tells_exemplars_apart(shown, tmp_path):
    """The same pixels in another file are the same exemplar."""
    SHOWN.save(tmp_path / "copy.bmp")
    SHOWN.rotate(180).save(tmp_path / "other.png")
    files = (shown, tmp_path / "copy.bmp", tmp_path / "other.png")
    manifests = [run({"image": str(file)}, steps=1).manifest for file in files]
    first, copy, other = (manifest["exemplar"]["sha256"] for manifest in manifests)
    assert first == copy != other


def test_what_cannot_be_used_is_refused(shown, tmp_path):
    Image.new("RGB", (90, 4)).save(tmp_path / "tiny.png")
    Image.new("L", (9000, 9000)).save(tmp_path / "huge.png")
    (tmp_path / "empty.png").touch()
    where = r"plugins\.exemplar\.image: "
    with pytest.raises(ConfigError, match=where + "there is no exemplar"):
        run({})
    for name, problem in (("tiny", "90x4 pixels"), ("huge", "too large"), ("empty", "cannot be")):
        with pytest.raises(InputError, match=where + f".*{problem}"):
            run({"image": str(tmp_path / f"{name}.png")})
    with pytest.raises(PlanConflict, match=r"exemplar needs 'mask:user'"):
        run({"image": shown}, mask=None)
    with pytest.raises(InputError, match=r"plugins\.exemplar: the mask is empty"):
        run({"image": shown}, mask=torch.zeros(1, 1, 24, 40))
