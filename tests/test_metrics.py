"""The metrics: against stored numbers (tests/goldens/README.md), other libraries and their laws."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from inlay_bench.metrics import affordance, clip, contact, frechet, perceptual, pixels, region
from inlay_bench.metrics.frechet import Statistics
from inlay_bench.metrics.quality_score import Mixture, quality_score
from inlay_toybox import quality, world
from inlay_toybox.classes import BY_NAME
from inlay_toybox.detector import Detector

GOLDENS = Path(__file__).parent / "goldens"
FAST = settings(max_examples=25, deadline=None)
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
CLIP_DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


@cache
def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / f"metrics_{name}.safetensors")


class ToyClip:
    """The stored numbers' encoder: sentences are looked up, pictures go through two matrices."""

    name, digest, side = "toy", "0" * 12, 224

    def __init__(self, data: dict[str, torch.Tensor], texts: torch.Tensor, normalise: bool = True):
        self.data, self.vectors, self.normalise = data, texts, normalise

    def images(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - CLIP_MEAN) / CLIP_DEVIATION if self.normalise else x
        pooled = F.adaptive_avg_pool2d(x, 4).flatten(1)
        return F.normalize(torch.tanh(pooled @ self.data["clip_W1"].T) @ self.data["clip_W2"].T)

    def texts(self, sentences: list[str]) -> torch.Tensor:
        return F.normalize(self.vectors[[int(sentence) for sentence in sentences]])


def picture(array: torch.Tensor) -> torch.Tensor:
    """A stored `h w 3` picture in bytes as `1 3 h w` in 0..1."""
    return array.permute(2, 0, 1)[None].float() / 255


def random_pictures(seed: int, n: int = 2, size: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# CLIP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "prepare"), [("range01", clip.published), ("as_coded", clip.as_coded)]
)
def test_directions_and_similarities_are_the_published_ones(variant, prepare) -> None:
    data = golden("clip_direction")
    encoder = ToyClip(data, data["text_features"].flatten(0, 1))
    found = clip.similarities(
        encoder, data["image_0"], data["image_1"], list("0246"), list("1357"), prepare
    )
    for ours, name in zip(found, ("sim_0", "sim_1", "sim_direction", "sim_image"), strict=True):
        torch.testing.assert_close(ours, data[f"{variant}.{name}"], atol=1e-5, rtol=0)


def test_the_direction_of_no_change_is_zero() -> None:
    data = golden("clip_direction")
    encoder = ToyClip(data, data["text_features"].flatten(0, 1))
    x = data["image_0"]
    found = clip.similarities(encoder, x, x, list("0246"), list("1357"))
    assert found.direction.tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(found.image, torch.ones(4))


# L1, L2, PSNR, SSIM ---------------------------------------------------------------------------


def test_magicbrush_numbers_are_the_published_ones() -> None:
    data = golden("magicbrush")
    encoder = ToyClip(data, data["text_features"], normalise=False)
    made, meant = [], []
    for i in range(3):
        files = [
            Image.fromarray(data[f"pair{i}.{name}_u8"].numpy()) for name in ("generated", "target")
        ]
        for ours, name in zip(pixels.magicbrush(*files), ("l1", "l2"), strict=True):
            assert ours == pytest.approx(data[f"pair{i}.{name}"].item(), abs=1e-6)
        small = [
            torch.tensor(np.asarray(f.resize((28, 28), Image.Resampling.BICUBIC))) for f in files
        ]
        made.append(picture(small[0]))
        meant.append(picture(small[1]))
    made, meant, captions = torch.cat(made), torch.cat(meant), list("012")
    for ours, name in (
        (clip.image_similarity(encoder, made, meant), "clip_i_toy"),
        (clip.text_similarity(encoder, made, captions), "clip_t_toy_generated"),
        (clip.text_similarity(encoder, meant, captions), "clip_t_toy_target"),
    ):
        assert ours.double().mean().item() == pytest.approx(data[name].item(), abs=1e-5)


@FAST
@given(st.integers(0, 10_000), st.floats(0.01, 0.3))
def test_psnr_and_ssim_are_those_of_scikit_image(seed: int, noise: float) -> None:
    x = random_pictures(seed, 1).double()
    y = (x + noise * (random_pictures(seed + 1, 1) - 0.5)).clamp(0, 1)
    ours, theirs = (t[0].permute(1, 2, 0).numpy() for t in (x, y))
    assert pixels.psnr(x, y).item() == pytest.approx(
        peak_signal_noise_ratio(ours, theirs, data_range=1), abs=1e-9
    )
    _, full = structural_similarity(
        ours,
        theirs,
        gaussian_weights=True,
        use_sample_covariance=False,
        data_range=1.0,
        channel_axis=2,
        full=True,
    )
    inner = (0, slice(None), slice(5, -5), slice(5, -5))  # borders are mirrored differently
    theirs_map = torch.tensor(full).permute(2, 0, 1)[None]
    torch.testing.assert_close(pixels.ssim_map(x, y)[inner], theirs_map[inner], atol=1e-6, rtol=0)
    assert pixels.ssim(x, y).item() == pytest.approx(full.mean(), abs=2e-2)


@FAST
@given(st.integers(0, 10_000))
def test_only_the_pixels_that_count_count(seed: int) -> None:
    x = random_pictures(seed)
    where = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    where[..., :16] = True
    y = torch.where(where, x, 1 - x)
    assert pixels.l1(x, y, where).tolist() == pixels.l2(x, y, where).tolist() == [0, 0]
    assert pixels.psnr(x, y, where).tolist() == [pixels.CEILING] * 2
    torch.testing.assert_close(pixels.ssim(x, y, where), torch.ones(2))
    whole = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    for measure in (pixels.l1, pixels.l2, pixels.psnr, pixels.ssim):
        torch.testing.assert_close(measure(x, y, whole), measure(x, y))
        assert (measure(x, y, ~where) != measure(x, x)).all()
        assert measure(x, y, torch.zeros_like(where)).isnan().all()


# affordance -----------------------------------------------------------------------------------


def test_affordance_has_both_published_readings() -> None:
    data = golden("affordance")
    scores: dict[str, list[float | None]] = {"single": [], "union": []}
    for i in range(5):
        objects, allowed = data[f"image{i}.object_boxes"], data[f"image{i}.gt_boxes"]
        for name, measure in (("single", affordance.single), ("union", affordance.union)):
            shares = measure(objects, allowed)
            torch.testing.assert_close(shares, data[f"image{i}.fraction_{name}"], atol=1e-6, rtol=0)
            scores[name].append(affordance.picture_score(shares))
    for name, found in scores.items():
        stored = data[f"per_image_{name}"].tolist()
        assert [score or 0 for score in found] == pytest.approx(stored, abs=1e-6)
        total = affordance.average(found)
        assert total.score == pytest.approx(data[f"score_{name}"].item(), abs=1e-6)
        assert (total.empty, total.total) == (1, 5)
    kept = affordance.average(scores["single"]).found_only
    assert kept == pytest.approx(data["score_single_skip_empty"].item(), abs=1e-6)


BOX = st.tuples(*(st.integers(0, 20) for _ in range(2)), *(st.integers(1, 12) for _ in range(2)))


@FAST
@given(st.lists(BOX, min_size=1, max_size=4), st.lists(BOX, max_size=4))
def test_shares_of_boxes_are_those_of_their_pixels(objects, allowed) -> None:
    def corners(boxes):
        rows = [(x, y, x + w, y + h) for x, y, w, h in boxes]
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)

    def painted(boxes):
        masks = torch.zeros(len(boxes), 32, 32, dtype=torch.bool)
        for mask, (x, y, w, h) in zip(masks, boxes, strict=True):
            mask[y : y + h, x : x + w] = True
        return masks

    union = affordance.union(corners(objects), corners(allowed))
    single = affordance.single(corners(objects), corners(allowed))
    region = painted(allowed).any(0) if allowed else torch.zeros(32, 32, dtype=torch.bool)
    torch.testing.assert_close(union, affordance.by_masks(painted(objects), region))
    assert ((single >= 0) & (single <= union + 1e-12) & (union <= 1 + 1e-12)).all()
    boxes = affordance.boxes_of(region.numpy(), coverage=1.0, limit=1000)
    drawn = painted([(int(a), int(b), int(c - a), int(d - b)) for a, b, c, d in boxes])
    assert torch.equal(drawn.any(0) if len(boxes) else torch.zeros_like(region), region)
    assert drawn.sum() == region.sum()  # they do not overlap


def test_true_objects_are_well_placed_in_every_reading() -> None:
    for item in quality.insertion_items(40, seed=2):
        mask, allowed = torch.from_numpy(item.mask)[None], torch.from_numpy(item.allowed)
        box, region = torch.from_numpy(world.boxes_of(item.mask[None])), item.allowed
        boxes = affordance.boxes_of(region)
        assert affordance.by_masks(mask, allowed) >= 0.5
        assert affordance.union(box, boxes) >= 0.5
        for left, top, right, bottom in boxes.long().tolist():
            assert region[top:bottom, left:right].all()


def test_no_object_is_told_apart() -> None:
    assert affordance.picture_score(torch.zeros(0)) is None
    empty = affordance.average([None, None])
    assert (empty.score, empty.empty) == (0, 2) and np.isnan(empty.found_only)
    assert affordance.by_masks(torch.zeros(1, 4, 4).bool(), torch.ones(4, 4).bool()).item() == 0
    assert np.isnan(affordance.average([]).score)


# sets of pictures -----------------------------------------------------------------------------


def test_frechet_distances_are_the_published_ones() -> None:
    data = golden("pbe")
    b = Statistics().update(data["frechet_b"])
    whole = frechet.distance(Statistics().update(data["frechet_a"]), b)
    assert whole == pytest.approx(data["frechet"].item(), abs=1e-8)
    few = Statistics().update(data["frechet_a"][: int(data["frechet_singular_rows"])])
    singular = frechet.distance(few, b)
    assert singular == pytest.approx(data["frechet_singular"].item(), abs=1e-3)


@FAST
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 29))
def test_frechet_distance_is_a_distance_however_features_arrive(seed, n, cut) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = Statistics().update(x), Statistics().update(y + 1)
    parts = frechet.collect(lambda part: part, [x[:cut], x[cut:]])
    torch.testing.assert_close(parts.covariance, a.covariance)
    torch.testing.assert_close(a.covariance, torch.cov(x.T))
    assert frechet.distance(parts, a) == pytest.approx(0, abs=1e-6)
    assert frechet.distance(a, b) == pytest.approx(frechet.distance(b, a), abs=1e-6)
    shifted = Statistics().update(x + 2)
    assert frechet.distance(a, shifted) == pytest.approx(8 * 4, abs=1e-6)


def test_one_picture_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="two pictures or more, there are 1"):
        frechet.distance(*[Statistics().update(torch.zeros(1, 4))] * 2)


def test_quality_score_is_the_published_one() -> None:
    data = golden("pbe")
    mixture = Mixture(data["gmm_weights"], data["gmm_means"], data["gmm_covariances"])
    used = mixture.log_likelihood(data["qs_features"][:100])
    torch.testing.assert_close(used, data["qs_loglik"], atol=0.01, rtol=0)
    score = quality_score(mixture, data["qs_features"], whole_batches=True)
    assert score == pytest.approx(data["qs"].item(), abs=1e-4)
    assert 0 <= quality_score(mixture, data["qs_features"]) <= 100
    flat = Mixture(mixture.weights, mixture.means, torch.zeros_like(mixture.covariances))
    with pytest.raises(ValueError, match="not positive definite"):
        quality_score(flat, data["qs_features"])


# regions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["box", "blob"])
def test_region_similarity_is_the_published_one(shape: str) -> None:
    data = golden("pbe")
    encoder = ToyClip(data, torch.zeros(1, 16))
    edited, mask = picture(data["region_result_u8"]), data[f"region_{shape}.mask_u8"] == 255
    left, top, right, bottom = region.crop(mask, "reference")
    seen = (edited[..., top:bottom, left:right] - CLIP_MEAN) / CLIP_DEVIATION
    torch.testing.assert_close(seen[0], data[f"region_{shape}.crop"], atol=1e-5, rtol=0)
    file = Image.fromarray(data["region_reference_u8"].numpy())
    squashed = file.resize((224, 224), Image.Resampling.BICUBIC)
    exemplar = picture(torch.tensor(np.asarray(squashed)))
    score = region.region_score(encoder, edited, mask, exemplar, "reference")
    assert score == pytest.approx(data[f"region_{shape}.score"].item(), abs=1e-3)
    ours = region.region_score(encoder, edited, mask, picture(data["region_reference_u8"]))
    assert ours != pytest.approx(score, abs=1)  # the whole bounding box is another crop


def test_a_region_is_its_bounding_box_and_never_empty() -> None:
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[2:5, 3:8] = True
    assert region.crop(mask) == (3, 2, 8, 5)
    assert region.crop(mask, "reference") == (3, 2, 7, 4)
    with pytest.raises(ValueError, match="mask is empty"):
        region.crop(torch.zeros_like(mask))
    mask[2:] = torch.eye(9).flip(1).bool()[2:]
    with pytest.raises(ValueError, match="use the mode 'fixed'"):
        region.crop(mask, "reference")


class Squares:
    """A perceptual distance in closed form: squared differences of the mean over colours."""

    name, digest = "squares", "0" * 12

    def maps(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x - y).mean(1, keepdim=True).square()

    def distances(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.maps(x, y).mean((1, 2, 3))


def test_a_perceptual_distance_counts_inside_the_mask_only() -> None:
    x, y = random_pictures(0), random_pictures(1)
    where = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    where[..., :8] = True
    inside = perceptual.lpips(Squares(), x, y, where)
    torch.testing.assert_close(inside, perceptual.lpips(Squares(), x[..., :8], y[..., :8]))
    assert perceptual.lpips(Squares(), x, torch.where(where, x, y), where).tolist() == [0, 0]


# contact --------------------------------------------------------------------------------------


def test_true_objects_have_contact_and_pasted_ones_have_not() -> None:
    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array).copy()).permute(2, 0, 1) / 255

    items = list(quality.insertion_items(60, seed=1))
    sources = torch.stack([tensor(item.picture) for item in items])
    truths = torch.stack([tensor(world.render(item.target).image) for item in items])
    masks = torch.stack([torch.from_numpy(item.mask) for item in items])
    pasted = torch.where(masks[:, None], truths, sources)
    detector = Detector.from_pretrained()
    found: dict[tuple[str, bool], list[bool | None]] = defaultdict(list)
    for edited, touches in ((truths, True), (pasted, False)):
        for i, seen in enumerate(detector.detect(edited)):
            habitat, best = BY_NAME[items[i].name].habitat, seen.best(items[i].name)
            for mask in (masks[i],) if best is None else (masks[i], seen.masks[best]):
                judged = contact.present(sources[i], edited[i], mask, habitat)
                found[habitat, touches].append(judged)
    assert {*found["sky", True], *found["sky", False]} == {None}
    for habitat in contact.THRESHOLD:
        right, wrong = (
            [judged for judged in found[habitat, touches] if judged is not None]
            for touches in (True, False)
        )
        assert min(len(right), len(wrong)) >= 20
        assert np.mean(right) >= 0.95 and np.mean(wrong) <= 0.05, habitat


def test_contact_that_cannot_be_seen_is_not_judged() -> None:
    x = torch.full((3, 32, 32), 0.5)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    assert contact.present(x, x, mask, "land") is None
    mask[20:, :] = True  # fills the picture to its lower edge
    assert contact.present(x, x, mask, "land") is None
    assert contact.present(x, x, mask, "water") is None
    assert contact.present(x, x, mask, "sky") is None
