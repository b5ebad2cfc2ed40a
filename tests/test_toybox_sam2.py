"""The small SAM 2 works through the package's own image predictor, and a folder runs no code."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch.nn import functional as F

import inlay_toybox
from inlay import ModelError
from inlay_plugins.segmentation import described
from inlay_toybox import segmenter, training, world
from inlay_toybox.quality import segmentation
from inlay_toybox.recipes import sam2


@pytest.fixture(scope="module")
def predictor() -> SAM2ImagePredictor:
    return segmenter.predictor()


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, np.ndarray]:
    """A picture and its object's body."""
    drawn = world.render(world.views("bus", 1, seed=3)[0], 64)
    return drawn.image, drawn.masks[0]


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped model's folder."""
    shipped = inlay_toybox.path("sam2")
    for name in (segmenter.CONFIG, segmenter.WEIGHTS):
        (tmp_path / name).write_bytes((shipped / name).read_bytes())
    return tmp_path


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_the_shipped_model_is_small_and_in_float32():
    model = segmenter.load()
    assert isinstance(model, SAM2Base)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) <= 0.9e6
    files = list(inlay_toybox.path("sam2").iterdir())
    assert sum(f.stat().st_size for f in files) < 2e6


@pytest.mark.filterwarnings("ignore:.*hydra.utils.instantiate:UserWarning")
def test_the_packages_own_configuration_reader_builds_the_same_model():
    config = OmegaConf.load(inlay_toybox.path("sam2") / segmenter.CONFIG)
    ours, theirs = segmenter.load(), instantiate(config.model, _recursive_=True).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(1, 3, ours.image_size, ours.image_size)
    with torch.no_grad():
        features = [model.forward_image(image)["vision_features"] for model in (ours, theirs)]
    torch.testing.assert_close(*features, rtol=0, atol=0)


def test_the_packages_own_configurations_are_built():
    with resources.as_file(resources.files("sam2") / "configs/sam2.1/sam2.1_hiera_t.yaml") as file:
        model = described(file)
    assert sum(p.numel() for p in model.parameters()) // 100_000 == 389  # 38.9 M as published
    side = segmenter.predictor(model)._bb_feat_sizes
    assert side == [(256, 256), (128, 128), (64, 64)]


def test_points_boxes_and_masks_find_the_body(predictor, scene):
    image, body = scene
    predictor.set_image(image)
    middle = segmentation.centre(body) + 0.5
    masks, quality, logits = predictor.predict(middle[None], np.array([1]))
    side = predictor.model.sam_prompt_encoder.mask_input_size[0]
    assert masks.shape == (3, 64, 64)
    assert logits.shape == (3, side, side)
    assert ((quality >= 0) & (quality <= 1)).all()
    assert iou(masks[quality.argmax()] > 0, body) > 0.7
    prompts = {
        "box": {"box": world.boxes_of(body[None])[0]},
        "mask": {"mask_input": segmentation.rough(body, side)},
        "hint and click": {
            "point_coords": middle[None],
            "point_labels": np.array([1]),
            "mask_input": logits[quality.argmax()][None],
        },
    }
    for kind, prompt in prompts.items():
        masks, _, _ = predictor.predict(**prompt, multimask_output=False)
        assert masks.shape == (1, 64, 64)
        assert iou(masks[0] > 0, body) > 0.7, kind


def test_a_click_decides_which_of_two_objects_is_meant(predictor):
    drawn = next(
        d
        for d in (world.render(world.sample(seed, held_out=True)) for seed in range(10**7, 10**8))
        if len(d.masks) == 2 and d.masks.sum((1, 2)).min() > 150
    )
    predictor.set_image(drawn.image)
    for body, other in zip(drawn.masks, drawn.masks[::-1], strict=True):
        point = segmentation.centre(body)[None] + 0.5
        masks, quality, _ = predictor.predict(point, np.array([1]))
        best = masks[quality.argmax()] > 0
        assert iou(best, body) > 0.5 > iou(best, other)


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (96, 64), (50, 120)])
def test_pictures_of_any_size_keep_their_size(predictor, scene, shape):
    image, body = scene
    resized = np.array(Image.fromarray(image).resize(shape[::-1], Image.Resampling.BILINEAR))
    target = np.array(Image.fromarray(body).resize(shape[::-1], Image.Resampling.NEAREST))
    predictor.set_image(resized)
    masks, quality, _ = predictor.predict(
        segmentation.centre(target)[None] + 0.5, np.array([1]), multimask_output=True
    )
    assert masks.shape == (3, *shape)
    assert iou(masks[quality.argmax()] > 0, target) > 0.6


def test_the_same_prompt_gives_the_same_bits(scene):
    answers = []
    for _ in range(2):
        predictor = segmenter.predictor()
        predictor.set_image(scene[0])
        answers.append(predictor.predict(box=np.array([8, 8, 40, 40]), return_logits=True)[0])
    np.testing.assert_array_equal(*answers)


def test_one_click_finds_bodies_of_scenes_nobody_trained_on(predictor):
    overlaps = segmentation.segmentation_accuracy(36, predictor=predictor)
    assert len(overlaps["click"].values) >= 50
    assert overlaps["click"].mean > 0.75
    assert overlaps["box"].mean > 0.75
    assert overlaps["click"].mean > overlaps["disc"].mean + 0.2
    assert overlaps["disc"].half.total == len(overlaps["mask"].values)


def test_measuring_counts_a_perfect_and_an_empty_mask():
    body = np.zeros((8, 8), bool)
    body[2:6, 1:4] = True
    overlap = segmentation.Overlap()
    overlap.add(body, body)
    overlap.add(np.zeros_like(body), body)
    assert overlap.mean == 0.5
    assert (overlap.half.hits, overlap.close.hits, overlap.half.total) == (1, 1, 2)
    assert body[tuple(segmentation.centre(body)[::-1])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_target_": "os.system"}, "os.system"),
        ({"_target_": "sam2.modeling.sam2_base.torch.hub.load"}, "torch.hub.load"),
        ({"weights_path": "elsewhere.pt"}, "weights_path"),
        ({"stages": [1, 2]}, "Hiera"),
        ({"embed_dim": 24}, "ImageEncoder"),
    ],
)
def test_a_configuration_builds_sam_2_and_nothing_else(folder, change, message):
    config = yaml.safe_load((folder / segmenter.CONFIG).read_text())
    config["model"]["image_encoder"]["trunk"].update(change)
    (folder / segmenter.CONFIG).write_text(yaml.safe_dump(config))
    with pytest.raises(ModelError, match=message):
        segmenter.load(folder)


def test_a_folder_that_is_no_model_is_refused_by_name(folder):
    (folder / segmenter.CONFIG).write_text("model: !!python/object/apply:os.getcwd []")
    with pytest.raises(ModelError, match="no SAM 2 is described there"):
        segmenter.load(folder)
    (folder / segmenter.CONFIG).write_text("model: 3")
    with pytest.raises(ModelError, match="no SAM 2 is described there: 3"):
        segmenter.load(folder)
    (folder / segmenter.CONFIG).unlink()
    with pytest.raises(ModelError, match=r"config\.yaml: no SAM 2 is described there: .*No such"):
        segmenter.load(folder)


def test_weights_that_do_not_fit_are_refused_by_name(folder):
    weights = load_file(folder / segmenter.WEIGHTS)
    name = "sam_mask_decoder.iou_token.weight"
    save_file({**weights, name: weights[name][:, :8].contiguous()}, folder / segmenter.WEIGHTS)
    with pytest.raises(ModelError, match=name):
        segmenter.load(folder)
    (folder / segmenter.WEIGHTS).write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError, match="checkpoint of SAM 2"):
        segmenter.load(folder)


def test_clicks_boxes_and_hints_of_the_recipe_are_where_they_say():
    torch.manual_seed(0)
    data = training.batch(range(40, 52), 64)
    index, truth = sam2.bodies(data)
    assert len(index) == len(truth)
    one = torch.arange(len(truth))
    for weights, expected in ((sam2.inside(truth), 1.0), (sam2.around(truth), 0.0)):
        column, row = (sam2.draw_pixels(weights)[:, 0] * 64).long().unbind(1)
        assert (truth[one, 0, row, column] == expected).all()
    places, labels = sam2.two_points(truth)
    assert set(labels.unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    corners = places[labels[:, 0] == 2]
    assert (corners[:, 1] > corners[:, 0]).all()
    soft = F.interpolate(sam2.hints(truth, 32), (64, 64), mode="bilinear") > 0
    overlap = (soft & truth.bool()).sum((1, 2, 3)) / (soft | truth.bool()).sum((1, 2, 3))
    assert 0.3 < overlap.mean() < 0.95


def test_the_loss_prefers_the_right_mask_and_lets_one_of_three_learn():
    truth = torch.zeros(1, 1, 64, 64)
    truth[..., 20:40, 20:40] = 1
    right, wrong = 8 * (2 * truth - 1), -8 * (2 * truth - 1)
    sure = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    three = torch.cat([right, right, wrong, wrong], 1).requires_grad_()
    value = sam2.loss(three, sure, truth)
    assert value < 0.01
    assert sam2.loss(torch.cat([wrong] * 4, 1), sure, truth) > 1
    value.backward()
    assert three.grad is not None
    assert three.grad[:, 2:].abs().max() == 0


def test_the_recipe_goes_on_from_its_state_or_from_given_weights(tmp_path):
    def trained(out, **options):
        folder = sam2.train(0.0001, tmp_path / out, torch.device("cpu"), batch_size=4, **options)
        return folder, load_file(folder / segmenter.WEIGHTS)

    folder, first = trained("a")
    assert segmenter.load(folder).image_size == sam2.architecture()["model"]["image_size"]
    _, spent = trained("a", resume=True)  # the budget is spent: nothing may change
    finer, further = trained("b", resume=True, start=folder, size=96)
    assert segmenter.load(finer).image_size == 192
    for key, value in first.items():
        torch.testing.assert_close(spent[key], value, rtol=0, atol=0)
        torch.testing.assert_close(further[key], value, rtol=0.1, atol=0.05)
    frequencies = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    changed = {key for key, value in first.items() if not torch.equal(further[key], value)}
    assert changed
    assert frequencies not in changed
