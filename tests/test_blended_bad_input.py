"""What is wrong with a mask, a prompt, a scale or a scribble is said on the command line; what is
odd is scaled or thresholded as documented."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from inlay import Session
from models import pixel
from shell import Invoke

GUIDED = ("blended_diffusion", "steps=2", "n=1", "plugins.structure_transfer.step=0")
SCRIBBLE = "plugins.scribble.strokes=[{points: [[0.1, 0.1], [0.9, 0.9]]}]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixel().save_pretrained(folder := tmp_path_factory.mktemp("pixel"))
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> None:
    """In the folder that `inlay` is called from: a picture, and masks of several kinds."""
    Image.new("RGB", (16, 16), "grey").save(tmp_path / "me.png")
    Image.new("L", (16, 16), 0).save(tmp_path / "black.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "white.png")


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*GUIDED, "input.mask=black.png"), "plugins.region: nothing is left to be edited"),
        ((*GUIDED, "input.mask=white.png", "plugins.region.invert=true"), "nothing is left"),
        ((*GUIDED, "input.mask=gone.png"), "input.mask: there is no file 'gone.png'"),
        ((*GUIDED, f"prompt.edit={'a red bus ' * 30}"), "toybox/clip reads 32. Shorten it"),
        ((*GUIDED, "plugins.clip_guidance.scale=.nan"), "scale: nan is not a finite number"),
        ((*GUIDED, "plugins.clip_guidance.scale=1e38"), "gradient is not finite. Lower the loss's"),
        ((*GUIDED, "scheduler=DDIMScheduler"), "gradient.apply: DDIMScheduler has no variance"),
        ((*GUIDED, "scheduler=EulerDiscreteScheduler"), "has no variance to move the mean by"),
        ((*GUIDED, "plugins.clip_guidance.clips=[me.png]"), "clip model: no model 'me.png'"),
        (("blended/scribble", "steps=2", "n=1", SCRIBBLE), "drawn pixels are outside the mask"),
    ],
)
def test_it_is_refused_in_one_line(invoke: Invoke, model: Path, words, message):
    code, out, err = invoke("run", *words, "input.image=me.png", f"model={model}", "device=cpu")
    assert code == 2 and out == "", err
    assert err.count("error:") == 1 and message in err and "Traceback" not in err
    assert not Path("outputs").exists()


def edited(mask: Image.Image, **region):
    """The picture and the region of a run of two steps."""
    blend = {"steps": [[0, 1]], "mask": "mask:region"}
    plugins = {"region": region, "source_trajectory": {}, "latent_blend": blend}
    picture = Image.new("RGB", (16, 16), "grey")
    result = Session(pixel(), plugins).run("", picture, mask, steps=2, seed=4)
    return result.images["edit"], result.board["mask:region"]


def test_a_mask_of_another_size_is_scaled_to_the_picture():
    """Bytes of a mask 24 wide and 8 high, its right half white."""
    odd, same = Image.new("L", (24, 8)), Image.new("L", (16, 16))
    odd.paste(255, (12, 0, 24, 8))
    same.paste(255, (8, 0, 16, 16))
    edits, regions = zip(*(edited(mask, threshold=0.5) for mask in (odd, same)), strict=True)
    assert torch.equal(*regions) and torch.equal(*edits)


def test_greys_are_in_part_the_edits_until_a_threshold_says_which():
    """By default a grey pixel is mixed; `threshold` makes it the one or the other."""
    grey = Image.new("L", (16, 16))
    grey.paste(64, (8, 0, 16, 16))
    (mixed, soft), (all_, ones) = edited(grey), edited(grey, threshold=0.0)
    assert soft.unique().tolist() == pytest.approx([0, 64 / 255], abs=1e-6)
    assert ones.unique().tolist() == [0, 1]
    source = torch.full_like(mixed, 128 / 255)
    far = [(made - source)[..., 8:].abs().mean() for made in (mixed, all_)]
    assert 0 < far[0] < far[1]
    white = Image.new("L", (16, 16), 255)
    everywhere, full = edited(white)
    assert full.min() == 1 and torch.equal(everywhere, plain())


def plain() -> torch.Tensor:
    """The model's own picture."""
    return Session(pixel()).run("", size=16, steps=2, seed=4).images["edit"]
