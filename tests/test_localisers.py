"""Localisers: what segmenters and detectors are told, and what happens when nothing is seen."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizerFast,
    ViTImageProcessor,
)

import tiny_networks
from inlay import ConfigError, InlayError, InputError, ModelError, Session
from inlay_plugins import detection, masks, segmentation
from inlay_plugins.segmentation import Hint
from inlay_toybox import world
from models import conds, flux
from test_goldens_addit import golden

WORDS = ["▁a", "▁dog", "▁on", "▁a", "▁bed", "</s>", *[""] * 6]
PROMPT = {"source": "a bed", "edit": "a dog on a bed"}


def run(localiser: str, n: int = 1, mask: Image.Image | None = None, pipe=None, **options):
    """One run on a tiny FLUX at 32x32 px, 8x8 tokens."""
    given = conds()
    for name in given:
        given[name]["tokens"] = WORDS
    options = {"subject": "dog", "localiser": localiser, "step": 2, "count": 1} | options
    session = Session(pipe or flux(), {"subject_mask": options})
    return session.run(PROMPT, size=32, steps=4, n=n, conds=given, mask=mask)


@pytest.fixture(scope="module")
def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """A picture `3 64 64` and its object's body."""
    drawn = world.render(world.views("bus", 1, seed=3)[0], 64)
    return torch.from_numpy(drawn.image).permute(2, 0, 1) / 255, torch.from_numpy(drawn.masks[0])


class Stub:
    """A segmenter that answers every hint with the same masks, and remembers what it was told."""

    def __init__(self, *answers: torch.Tensor) -> None:
        self.found, self.hints = torch.stack(answers), []

    def answers(self, picture, hints):
        self.hints += hints
        quality = torch.linspace(0.9, 0.1, len(self.found))
        return [(self.found.expand(-1, *picture.shape[-2:]), quality) for _ in hints]


@pytest.fixture
def stub(monkeypatch) -> Stub:
    """Every segmenter finds the left half, or else the top half."""
    left, top = torch.zeros(32, 32, dtype=torch.bool), torch.zeros(32, 32, dtype=torch.bool)
    left[:, :16], top[:16] = True, True
    made = Stub(left, top)
    monkeypatch.setattr(segmentation, "load", lambda *_: made)
    return made


# what a segmenter is told ------------------------------------------------------------------------


def test_boxes_are_those_of_the_published_code():
    stored, card = golden("addit_maps_localise")
    for case in (name for name in card["cases"] if f"{name}.box_xyxy" in stored):
        mask = stored[f"{case}.mask"].view(1, 1, 64, 64)
        assert list(masks.box(mask, card["image_size"])) == stored[f"{case}.box_xyxy"].tolist(), (
            case
        )


def test_a_rough_mask_is_positive_exactly_inside():
    heat = torch.rand(1, 1, 9, 7, generator=torch.Generator().manual_seed(0))
    heat = masks.minmax(heat)
    mask = masks.otsu(heat)
    assert torch.equal(masks.log_odds(heat, mask) > 0, mask > 0)


def test_the_map_reaches_the_segmenter_as_clicks_a_box_or_logits(stub):
    plain = run("attention")
    heat, mask = plain.board["map:subject"], plain.board["mask:subject"]
    clicks = plain.board["points:subject"][0]
    wanted = {
        ("points", "fixed"): Hint(clicks, several=len(clicks) == 1),
        ("points", "reference"): Hint(clicks),
        ("box", "fixed"): Hint(box=masks.box(mask, (32, 32))),
        ("mask", "fixed"): Hint(clicks[:1], logits=masks.log_odds(heat, mask)[0, 0]),
    }
    for (localiser, mode), hint in wanted.items():
        made = run(localiser, mode=mode)
        told = stub.hints.pop()
        if mode == "fixed":
            assert told.points == hint.points and told.box == hint.box
            chosen = segmentation.best(told, stub.found, torch.tensor([0.9, 0.1]))
            assert torch.equal(made.board["mask:subject"][0, 0] > 0, chosen)
        assert told.several == hint.several
        assert (told.logits is None) == (hint.logits is None)
        if hint.logits is not None:
            assert torch.equal(told.logits, hint.logits)
        assert made.board["map:subject"].shape == (1, 1, 32, 32)


def test_the_published_box_is_a_union_and_the_published_mask_no_logits(stub):
    made = run("box", mode="reference")
    assert stub.hints.pop().several
    assert torch.equal(made.board["mask:subject"][0, 0] > 0, stub.found.any(0))
    run("mask", mode="reference")
    told = stub.hints.pop()
    assert told.points == () and told.logits.unique().tolist() == [0, 1]


def test_every_picture_has_its_own_mask_and_dilation_counts_token_cells(stub):
    made = run("points", n=2, dilate=1)
    assert len(stub.hints) == 2 and made.board["mask:subject"].shape == (2, 1, 32, 32)
    assert made.board["mask:subject"][0, 0, 0].sum() == 16 + 4
    assert len(made.board["points:subject"]) == 2


@pytest.mark.parametrize(("value", "said"), [(False, "finds nothing"), (True, "the whole picture")])
def test_without_an_answer_the_attention_map_is_used(stub, value, said):
    stub.found = torch.full((1, 32, 32), value)
    with pytest.warns(UserWarning, match=said):
        made = run("points")
    coarse = run("attention").board["mask:subject"]
    assert torch.equal(
        made.board["mask:subject"], (masks.resize_bilinear(coarse, (32, 32)) >= 0.5).float()
    )


def test_several_masks_are_found_in_one_run_under_keys_of_their_own(stub):
    given = conds()
    for name in given:
        given[name]["tokens"] = WORDS
    one = {"use": "subject_mask", "subject": "dog", "step": 2, "count": 1}
    plugins = {
        "coarse": {**one, "key": "coarse"},
        "fine": {**one, "key": "fine", "localiser": "points"},
    }
    board = Session(flux(), plugins).run(PROMPT, size=32, steps=4, conds=given).board
    assert torch.equal(board["mask:coarse"], run("attention").board["mask:subject"])
    assert torch.equal(board["mask:fine"][0, 0] > 0, stub.found[0])


def test_a_map_without_contrast_asks_no_segmenter(stub):
    pipe = flux()
    for name, module in pipe.transformer.named_modules():
        if name.endswith(("to_k", "add_k_proj")):  # equal logits everywhere
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for localiser in ("points", "box", "mask"):
        with pytest.warns(UserWarning, match="constant") as told:
            made = run(localiser, pipe=pipe)
        assert made.board["mask:subject"].min() == 1 and made.board["points:subject"] == [[]]
        assert len(told) == 1 and not stub.hints


def test_a_segmenter_is_loaded_once_per_process(monkeypatch):
    segmentation.load.cache_clear()
    real, counted = segmentation.read, []
    monkeypatch.setattr(segmentation, "read", lambda *a: counted.append(a) or real(*a))
    with warnings.catch_warnings():  # a random model's picture may hold no object, which is told
        warnings.simplefilter("ignore")
        for localiser in ("points", "box", "mask"):
            assert run(localiser, segmenter="toybox/sam2").board["mask:subject"].any()
    assert len(counted) == 1


# detectors ---------------------------------------------------------------------------------------


def save_clipseg(folder: Path) -> str:
    """A random CLIPSeg of 32 pixels with the letters of `tiny_networks`."""
    tiny_networks.save_clip(folder)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": 54}
    text = {**tiny_networks.SIZE, **ends, "max_position_embeddings": 48}
    vision = {**tiny_networks.SIZE, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPSegConfig(
        text_config=text, vision_config=vision, projection_dim=24, extract_layers=[0, 1],
        reduce_dim=16, decoder_num_attention_heads=2, decoder_intermediate_size=16,
    )  # fmt: skip
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    images = ViTImageProcessor(size={"height": 32, "width": 32})
    tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    CLIPSegProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory) -> str:
    return save_clipseg(tmp_path_factory.mktemp("clipseg"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> str:
    return str(tiny_networks.save_grounding_dino(tmp_path_factory.mktemp("dino")))


def test_grounding_dino_gives_its_surest_box_to_the_segmenter(dino, stub, scene, monkeypatch):
    found = detection.grounding_dino(dino)
    box = found.box(scene[0], "red Bus", 0.0)
    image = Image.fromarray((scene[0] * 255).byte().permute(1, 2, 0).numpy())
    given = found.processor(images=image, text="a red bus.", return_tensors="pt")
    out = found.model(**given)
    scores = out.logits.sigmoid().amax(-1)[0]
    x, y, w, h = out.pred_boxes[0, scores.argmax()].tolist()
    wanted = [64 * edge for edge in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
    assert box == pytest.approx(wanted, abs=1e-3)
    assert found.box(scene[0], "red bus", 1.0) is None
    assert detection.grounding_dino(dino) is found

    made = run("grounding_dino", detector=dino, threshold=0.0)
    told = stub.hints.pop()
    assert len(told.box) == 4 and told.points == () and not told.several
    assert torch.equal(made.board["mask:subject"][0, 0] > 0, stub.found[0])
    monkeypatch.setattr(detection.GroundingDino, "box", lambda *_: None)
    with pytest.warns(UserWarning, match="grounding_dino finds nothing"):
        run("grounding_dino", detector=dino)
    assert not stub.hints


def test_clipseg_is_thresholded_where_it_is_hot(clipseg, scene, monkeypatch):
    found = detection.clipseg(clipseg)
    image = Image.fromarray((scene[0] * 255).byte().permute(1, 2, 0).numpy())
    given = found.processor(text=["a photo of a bus"], images=[image], return_tensors="pt")
    logits = found.model(**given).logits.view(1, 1, 32, 32)
    wanted = masks.resize_bilinear(logits.sigmoid(), (64, 64))[0, 0]
    torch.testing.assert_close(found.heat(scene[0], "a bus"), wanted)

    made = run("clipseg", detector=clipseg)
    heat, mask = made.board["map:subject"], made.board["mask:subject"]
    assert heat.shape == (1, 1, 32, 32) and torch.equal(mask, masks.otsu(heat))
    monkeypatch.setattr(detection.ClipSeg, "heat", lambda *_: torch.full((32, 32), 0.3))
    with pytest.warns(UserWarning, match="CLIPSeg's heat is constant"):
        run("clipseg", detector=clipseg)


def test_detectors_that_are_none_are_named(dino, clipseg, tmp_path):
    with pytest.raises(ModelError, match=r"detector: no config\.json"):
        detection.clipseg(str(tmp_path))
    shutil.copytree(clipseg, tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    weights = {k: v for k, v in weights.items() if not k.startswith("decoder.film_mul")}
    save_file(weights, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"not whole: no decoder\.film_mul"):
        detection.clipseg(str(tmp_path / "part"))


# the user ----------------------------------------------------------------------------------------


def painted(box: tuple[int, int, int, int], size: tuple[int, int] = (32, 32)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def test_a_users_mask_is_fitted_and_grey_counts_from_a_half_on():
    made = run("user", mask=painted((16, 8, 48, 40), (64, 64)))
    wanted = torch.zeros(1, 1, 32, 32)
    wanted[..., 4:20, 8:24] = 1
    assert torch.equal(made.board["mask:subject"], wanted)
    assert torch.equal(run("user", box=[0.25, 0.125, 0.75, 0.625]).board["mask:subject"], wanted)
    ((x, y),) = [clicks[0] for clicks in made.board["points:subject"]]
    assert wanted[0, 0, y, x] == 1
    grown = run("user", mask=painted((16, 8, 48, 40), (64, 64)), dilate=1).board["mask:subject"]
    assert torch.equal(grown, masks.dilate(wanted, 4))


def test_masks_that_edit_nothing_or_everything_are_told():
    with pytest.raises(InputError, match=r"mask:user: the mask is empty.*Paint white"):
        run("user", mask=painted((0, 0, 0, 0)))
    with pytest.warns(UserWarning, match="the whole picture"):
        assert run("user", mask=painted((0, 0, 32, 32))).board["mask:subject"].min() == 1
    inverted = ImageOps.invert(painted((8, 8, 20, 20)))
    with pytest.warns(UserWarning, match="is it inverted"):
        run("user", mask=inverted)


# options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("localiser", "options", "said"),
    [
        ("sam", {}, r"no localiser 'sam'.*points, box, mask, grounding_dino, clipseg, user"),
        ("user", {}, r"subject_mask\.box: no mask is given"),
        ("user", {"box": [0.5, 0, 0.2, 1]}, "is no box"),
        ("clipseg", {"threshold": 1.0}, "threshold in 0..1"),
        ("points", {"segmenter": "x.pt"}, r"segmenter_config: it is not said.*sam2\.1_hiera_l"),
        (
            "box",
            {"segmenter": "x.pt", "segmenter_config": "sam3"},
            "'sam3' is no configuration of SAM 2",
        ),
        ("mask", {"segmenter_config": "sam2.1_hiera_l"}, "brings its own configuration"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(localiser, options, said):
    with pytest.raises(InlayError, match=said) as told:
        run(localiser, **options)
    assert isinstance(told.value, ConfigError)


def test_a_model_that_makes_no_pictures_has_only_attention(stub):
    pipe = flux()
    pipe.register_modules(vae=None)
    with pytest.raises(ConfigError, match="localiser: points looks at pictures"):
        run("points", pipe=pipe)
