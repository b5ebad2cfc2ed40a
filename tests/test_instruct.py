"""InstructPix2Pix: stock's numbers bit for bit, rows that are not needed, files as published."""

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline

import compositions
import inlay
from folders import save_instruct
from inlay import ConfigError, ModelError, PlanConflict, backbones
from inlay_config.config import Experiment, Prompt
from inlay_config.images import to_pil, to_tensor
from invariants import CASES
from models import conds, instruct_pix2pix, stable_diffusion

PICTURE = to_pil(torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(5)))[0]
MASK = torch.zeros(1, 1, 24, 40)
MASK[..., 4:14, 8:30] = 1


def run(plugins, pipe=None, scheduler=None, **asked):
    """`plugins` on the picture, 3 steps with the scale of the text at 7.5."""
    session = inlay.Session(pipe or instruct_pix2pix(), plugins, scheduler)
    asked = {"image": PICTURE, "steps": 3, "seed": 3, "guidance": 7.5, "size": (24, 40)} | asked
    return session.run(conds=conds(pooled=False), **asked)


def stock(scheduler, n, text, image, kind="latent"):
    """The stock pipeline's own call of the same."""
    pipe, given = instruct_pix2pix(), conds(pooled=False)
    pipe.scheduler = inlay.Session(pipe, scheduler=scheduler).scheduler
    pipe.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": given["edit"]["embeds"]}
    embeds["negative_prompt_embeds"] = given["negative"]["embeds"]
    call = {"num_inference_steps": 3, "guidance_scale": text, "image_guidance_scale": image}
    generator = torch.Generator().manual_seed(3)
    shown = to_tensor(PICTURE)
    return pipe(
        image=shown,
        generator=generator,
        num_images_per_prompt=n,
        output_type=kind,
        **embeds,
        **call,
    ).images


def planned(image_scale, text_scale, **fields):
    session = inlay.Session(instruct_pix2pix(), {"instruct": {"image_scale": image_scale}})
    asked = Experiment(prompt=Prompt(edit="swap"), steps=4, guidance=text_scale, **fields)
    return session.plan(asked, (24, 40), ["image"])


@pytest.mark.parametrize(
    "scheduler",
    ["EulerAncestralDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"],
)
@pytest.mark.parametrize(("n", "text", "image"), [(1, 7.5, 1.5), (2, 3.0, 2.0)])
def test_it_is_the_stock_pipeline_bit_for_bit(scheduler, n, text, image):
    plugins = {"instruct": {"image_scale": image}}
    made = run(plugins, scheduler=scheduler, n=n, guidance=text)
    assert torch.equal(made.latents["edit"], stock(scheduler, n, text, image))
    assert torch.equal(made.images["edit"], stock(scheduler, n, text, image, "pt"))


@pytest.mark.parametrize(("text", "image"), [(7.5, 1.0), (2.0, 2.0)])
def test_a_row_of_no_weight_is_left_out_and_the_picture_is_the_same(text, image):
    made = run({"instruct": {"image_scale": image}}, guidance=text).latents["edit"]
    torch.testing.assert_close(made, stock(None, 1, text, image), rtol=1e-4, atol=1e-4)


def test_the_plan_shows_the_rows_that_are_left():
    assert planned(1.5, 7.5).evaluations == {"edit": 12}
    full, picture, both, one = (planned(*s) for s in ((1.5, 7.5), (1, 7.5), (2, 2), (1, 1)))
    assert full.passes[0].groups == (("edit/text", "edit/image", "edit/null"),)
    assert picture.passes[0].groups == (("edit/text", "edit/image"),)
    assert both.passes[0].groups == (("edit/text", "edit/null"),)
    assert one.passes[0].groups == (("edit/text",),)
    assert [p.evaluations["edit"] for p in (full, picture, both, one)] == [12, 8, 8, 4]
    assert planned(1, {"edit": 7.5, "other": 1.0}).evaluations == {"edit": 8}
    assert "8 forward units, calls [edit/text, edit/image]" in str(picture)


def test_a_scale_below_one_still_guides():
    """Where stock turns all guidance off; as published."""
    low, none = (run({"instruct": {"image_scale": s}}).latents["edit"] for s in (0.5, 1.0))
    assert (low - none).abs().max() > 1e-3
    assert torch.equal(stock(None, 1, 7.5, 0.5), stock(None, 1, 1.0, 1.0))


def test_its_invariant_holds():
    recorder = compositions.Recorder()
    made = run({"instruct": {}, "recorder": recorder}, guidance=3.0)
    case = compositions.Made({"instruct": {}}, made, recorder)
    CASES["instruct"].holds(case, None)
    assert CASES["instruct"].model == recorder.run.backbone.name


def test_it_composes_with_blending_guidance_and_ranking():
    """Outside the mask the source stays, CLIP's gradient moves what is inside, and the better of
    two pictures comes first."""
    plugins = {
        "source_trajectory": {},
        "instruct": {},
        "latent_blend": {"steps": [[0, 2]], "mask": "mask:user"},
        "clip_guidance": {"prompts": "a red bus", "scale": 10.0},
        "rank": {"prompts": "a red bus", "mask": "mask:user"},
    }
    ancestral = "EulerAncestralDiscreteScheduler"
    made = run(plugins, scheduler=ancestral, mask=to_pil(MASK)[0], n=2)
    clean = made.board["latent:source"]
    outside = torch.nn.functional.interpolate(MASK, clean.shape[-2:]) == 0
    for latent in made.latents["edit"]:
        assert torch.equal(latent[outside[0].expand_as(latent)], clean[outside.expand_as(clean)])
    assert made.board["rank:scores"].diff() >= 0
    free = run({"instruct": {}}, scheduler=ancestral, n=2).latents["edit"]
    assert (free - made.latents["edit"][made.board["rank:order"].argsort()]).abs().max() > 1e-3
    del plugins["clip_guidance"]
    unguided = run(plugins, scheduler=ancestral, mask=to_pil(MASK)[0], n=2)
    assert not torch.equal(unguided.latents["edit"], made.latents["edit"])


def test_further_guidance_adds_to_it():
    plain = run({"instruct": {}}).latents["edit"]
    pushed = run({"instruct": {}, "pag": {"scale": 1.0}}).latents["edit"]
    assert (plain - pushed).abs().max() > 1e-3


def test_a_folder_is_loaded_and_planned(tmp_path):
    """In the published layout: prompts are encoded as stock encodes them."""
    folder = save_instruct(tmp_path / "model")
    session = inlay.Session(str(folder), {"instruct": {}}, device="cpu")
    made = session.run("swap", PICTURE, guidance=7.5, size=(24, 40), steps=2, seed=3)
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    generator, shown = torch.Generator().manual_seed(3), to_tensor(PICTURE)
    asked = {"num_inference_steps": 2, "output_type": "latent"}
    latents = pipe("swap", shown, generator=generator, **asked).images
    assert torch.equal(made.latents["edit"], latents)
    asked = Experiment(prompt=Prompt(edit="swap"), steps=2, guidance=7.5)
    bare = inlay.Session(backbones.skeleton(str(folder)), {"instruct": {}})
    assert bare.plan(asked, (24, 40), ["image"]).evaluations == {"edit": 6}


def test_a_unet_with_other_channels_is_refused():
    with pytest.raises(ModelError, match=r"model: its U-Net takes 9 channels, .* gives 8"):
        inlay.Session(instruct_pix2pix(channels=9))


def test_it_needs_a_model_of_its_kind_and_the_model_needs_it():
    with pytest.raises(ModelError, match=r"plugins\.instruct: sd does not see a picture"):
        run({"instruct": {}}, pipe=stable_diffusion())
    with pytest.raises(ModelError, match=r"was given 4\. Add the plugin `instruct`"):
        run({})


def test_what_cannot_be_used_is_refused():
    with pytest.raises(PlanConflict, match=r"instruct needs 'image:source'"):
        run({"instruct": {}}, image=None)
    with pytest.raises(ConfigError, match=r"plugins\.instruct\.image_scale: -1"):
        run({"instruct": {"image_scale": -1.0}})
