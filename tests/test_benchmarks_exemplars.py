"""Benchmarks of exemplars and instructions: items from miniature folders, measures of single
pictures and of sets, rows over the values of a setting."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import miniatures
import tiny_networks
from inlay_bench import curve, measures, methods, report, runner, sets, tasks
from inlay_bench.measures import MEASURES
from inlay_bench.metrics import frechet
from inlay_bench.metrics.quality_score import fit, quality_score
from inlay_bench.networks import ClipEncoder
from inlay_bench.tasks import Item, Task
from inlay_config.errors import ConfigError, InputError
from inlay_config.images import to_tensor


def items(name: str, root: Path | str, *options: str, n: int = 100) -> list[Item]:
    """The items of a shipped task, as `inlay eval NAME --data ROOT --data OPTION` has them."""
    task = tasks.load(name)
    tasks.adapt(task, [str(root), *options])
    return task.items(n, seed=0)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("networks")
    return {
        "judge": tiny_networks.save_clip(place / "clip"),
        "dino": tiny_networks.save_dino(place / "dino"),
    }


def loaded(nets: dict[str, Path]) -> dict[str, Any]:
    return {name: measures.NETWORKS[name](str(path)) for name, path in nets.items()}


def numbers(name: str, item: Item, picture: Any, networks: Any = None) -> dict[str, float | None]:
    made = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    e = measures.evidence(item, item.picture, made, networks or {})
    found = MEASURES[name].function(e)
    assert set(found) == {column.key for column in MEASURES[name].columns}
    return found


# items -------------------------------------------------------------------------------------------


def test_cocoee_has_a_box_an_exemplar_and_the_picture(tmp_path: Path) -> None:
    found = items("coco-exemplar", miniatures.coco_exemplar(tmp_path), "side=32")
    assert [item.id for item in found] == [f"{1000 + i:012d}" for i in range(3)]
    region = np.zeros((32, 32), bool)
    region[8:24, 4:20] = True
    assert np.array_equal(found[0].truth["region"], region)
    assert found[0].given["exemplar"].size == (30, 20)
    assert np.array_equal(np.asarray(found[0].given["mask"]) > 0, region)
    assert np.array_equal(found[0].truth["picture"], np.asarray(found[0].picture))
    (tmp_path / "Ref_3500" / "000000001002_ref.png").unlink()
    with pytest.raises(InputError, match=r"item 000000001002: there is no file .*_ref.png"):
        items("coco-exemplar", tmp_path)
    Image.new("L", (64, 64)).save(tmp_path / "Mask_bbox_3500" / "000000001000_mask.png")
    with pytest.raises(InputError, match="item 000000001000: its mask is empty"):
        items("coco-exemplar", tmp_path, n=1)


def test_mimicbrush_hides_the_region_where_the_source_is_the_answer(tmp_path: Path) -> None:
    miniatures.mimicbrush_bench(tmp_path)
    cross, within, texture = items("mimicbrush-bench", tmp_path, "side=64")
    assert [i.id for i in (cross, within, texture)] == [
        "partcomp-cross-shoe",
        "partcomp-within-dog",
        "texture-cross-vase",
    ]
    hole = within.truth["region"]
    before, true = np.asarray(within.picture), within.truth["picture"]
    assert (before[hole] == 0).all() and np.array_equal(before[~hole], true[~hole])
    assert "picture" not in cross.truth and np.asarray(cross.picture)[hole].any()
    assert cross.given["shown"].size == (40, 20)  # the marked part of the reference
    assert texture.given["shown"].size == texture.given["exemplar"].size == (96, 48)
    assert (cross.texts["target"], texture.texts["target"]) == ("a red shoe", "")
    (only,) = items("mimicbrush-bench", tmp_path, "sets=[Texture-Cross]")
    assert only.facts == {"kind": "texture", "pair": "cross"}
    with pytest.raises(InputError, match="no such sets: texture"):
        items("mimicbrush-bench", tmp_path, "sets=[Texture]")
    (tmp_path / "PartComp-Within" / "dog_reference.jpg").unlink()
    with pytest.raises(InputError, match=r"item dog: there is no dog_reference.png"):
        items("mimicbrush-bench", tmp_path)


def test_the_test_split_of_instructions_is_the_last_twentieth(tmp_path: Path) -> None:
    miniatures.ip2p(tmp_path)
    found = items("ip2p-tradeoff", tmp_path, "side=0")
    assert [item.id for item in found] == ["shard-00-0000038", "shard-00-0000039"]
    first = found[0]
    assert first.texts == {
        "source": "a house 38",
        "target": "a red house 38",
        "instruction": "make it red",
    }
    assert first.picture is not None
    before, after = np.asarray(first.picture)[..., 2].mean(), first.truth["target"][..., 2].mean()
    assert after - before == pytest.approx(60, abs=2)  # of one pair
    with pytest.raises(InputError, match="there is no file"):
        items("ip2p-tradeoff", tmp_path, "whole=true")
    (tmp_path / "seeds.json").write_text(json.dumps([["shard-00/0000038", []]]))
    with pytest.raises(InputError, match="entry 0: there are no seeds"):
        items("ip2p-tradeoff", tmp_path)
    (tmp_path / "seeds.json").write_text(json.dumps([["../else", ["1"]]]))
    with pytest.raises(InputError, match="climbs out"):
        items("ip2p-tradeoff", tmp_path)
    (tmp_path / "seeds.json").write_text(json.dumps([7]))
    with pytest.raises(InputError, match=r"this is no \[folder, \[seeds\]\]"):
        items("ip2p-tradeoff", tmp_path)


def test_an_entry_without_a_caption_is_named(tmp_path: Path) -> None:
    miniatures.ip2p(tmp_path)
    path = tmp_path / "shard-00/0000038/prompt.json"
    path.write_text(json.dumps({"edit": "make it red", "output": "a red house"}))
    with pytest.raises(InputError, match="neither 'input' nor 'caption'"):
        items("ip2p-tradeoff", tmp_path)


# measures ----------------------------------------------------------------------------------------


def test_mimicbrush_is_measured_within_and_across(tmp_path: Path, nets: dict[str, Path]) -> None:
    miniatures.mimicbrush_bench(tmp_path)
    cross, within, texture = items("mimicbrush-bench", tmp_path, "side=64")
    networks = loaded(nets)
    assert numbers("within", within, within.truth["picture"]) == {
        "ssim_within": pytest.approx(1),
        "psnr_within": 99.0,
    }
    assert (numbers("within", within, within.picture)["psnr_within"] or 99) < 20
    assert set(numbers("within", cross, cross.picture).values()) == {None}
    assert set(numbers("across", within, within.picture, networks).values()) == {None}
    filled = cross.picture.copy() if cross.picture else Image.new("RGB", (64, 64))
    filled.paste(cross.given["shown"].resize((32, 32)), (16, 8))
    seen = numbers("across", cross, filled, networks)
    left = numbers("across", cross, cross.picture, networks)
    assert (seen["clip_reference"] or 0) > 99 and (seen["dino_reference"] or 0) > 95
    assert (left["clip_reference"] or 0) < (seen["clip_reference"] or 0)
    assert numbers("across", texture, texture.picture, networks)["clip_prompt"] is None


def test_the_published_region_lacks_a_row_and_a_column(
    tmp_path: Path, nets: dict[str, Path]
) -> None:
    (item, *_) = items("coco-exemplar", miniatures.coco_exemplar(tmp_path), "side=64")
    judge = loaded(nets)["judge"]
    seen = numbers("region-clip-published", item, item.picture, {"judge": judge})
    size = (judge.side, judge.side)
    crop = to_tensor(item.picture)[..., 16:47, 8:39]  # type: ignore[arg-type]
    crop = torch.nn.functional.interpolate(crop, size, mode="bilinear")
    squashed = item.given["exemplar"].resize(size, Image.Resampling.BICUBIC)
    cosine = torch.cosine_similarity(judge.images(crop), judge.images(to_tensor(squashed)))
    assert seen["region_clip_published"] == pytest.approx(100 * float(cosine), abs=1e-4)
    whole = numbers("region-clip", item, item.picture, {"judge": judge})["region_clip"]
    assert whole != pytest.approx(seen["region_clip_published"])


def test_similarities_are_measured_as_meant_and_as_coded(
    tmp_path: Path, nets: dict[str, Path]
) -> None:
    (item, _) = items("ip2p-tradeoff", miniatures.ip2p(tmp_path), "side=64")
    networks = {"judge": loaded(nets)["judge"]}
    seen = numbers("ip2p", item, item.truth["target"], networks)
    assert seen["image_fixed"] != pytest.approx(seen["image_coded"])
    same = numbers("ip2p", item, item.picture, networks)
    assert (same["direction_fixed"], same["image_fixed"]) == (0.0, pytest.approx(1))


def test_an_instruction_is_carried_out_by_the_true_picture_alone() -> None:
    detector = measures.detector()
    kinds = set()
    for item in tasks.load("toybox-instructions").items(24, seed=0):
        kinds.add(item.facts["kind"])
        networks = {"detector": detector}
        done = numbers("carried-out", item, item.truth["target"], networks)
        kept = numbers("carried-out", item, item.picture, networks)
        assert (done["carried_out"], kept["carried_out"]) == (1.0, 0.0)
        assert done[f"carried_out_{item.facts['kind']}"] == 1.0
        assert sum(value is not None for value in done.values()) == 2
    assert len(kinds) >= 4
    with pytest.raises(InputError, match=r"no such kinds: .'dance'"):
        items("toybox-instructions", "kinds=[dance]", n=1)


# sets --------------------------------------------------------------------------------------------


def test_a_mixture_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 3, generator=generator, dtype=torch.float64) * 0.3
    x[200:400] += 4
    x[400:] -= torch.tensor([5.0, 0.0, 2.0])
    mixture = fit(x, components=3, seed=1)
    order = mixture.means[:, 0].argsort()
    assert torch.allclose(mixture.weights, torch.full((3,), 1 / 3, dtype=x.dtype), atol=0.01)
    wanted = torch.tensor([[-5.0, 0, -2], [0, 0, 0], [4, 4, 4]], dtype=x.dtype)
    assert torch.allclose(mixture.means[order], wanted, atol=0.1)
    eye = torch.eye(3, dtype=x.dtype).expand(3, 3, 3)
    assert torch.allclose(mixture.covariances, eye * 0.09, atol=0.02)
    one = fit(x, components=1)
    assert torch.allclose(one.covariances[0], torch.cov(x.T, correction=0), atol=1e-5)
    assert float(mixture.log_likelihood(x).mean()) > float(one.log_likelihood(x).mean())
    assert math.isnan(quality_score(mixture, x[:10], whole_batches=True))
    with pytest.raises(ValueError, match="20 Gaussians need as many"):
        fit(x[:19])


def real_task(root: Path, nets: dict[str, Path], **more: Any) -> Task:
    task = tasks.load("coco-exemplar")
    tasks.adapt(task, [str(root), "side=32"], [f"judge={nets['judge']}"])
    task.measures, task.sets = ["copied"], ["clip-frechet", "fid", "quality-score"]
    for key, value in more.items():
        setattr(task, key, value)
    return task


def test_sets_of_pictures_are_compared_with_real_ones(
    tmp_path: Path, nets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "nothing-fetched"))
    miniatures.coco_exemplar(tmp_path / "set", count=6)
    task = real_task(tmp_path / "set", nets)
    made = methods.build(["paste"], task)
    done = runner.evaluate(task, made, tmp_path / "out", 6)
    assert "fid" in done.absent and "fid" not in done.sets["paste"]
    assert done.sets["copy"]["clip_frechet"] == pytest.approx(0, abs=1e-4)
    judge = ClipEncoder.from_pretrained(nets["judge"])
    pictures = [
        torch.cat([to_tensor(p) for p in found])
        for found in (
            [made[0](i, i.picture) for i in done.items if i.picture],
            [i.picture for i in done.items if i.picture],
        )
    ]
    own, real = (frechet.Statistics().update(judge.features(p)) for p in pictures)
    expected = frechet.distance(own, real)
    assert done.sets["paste"]["clip_frechet"] == pytest.approx(expected, rel=1e-3)
    assert done.sets["paste"]["quality_score"] is None  # six pictures, twenty Gaussians
    summary = report.summarise(done)
    texts = {k: p.read_text() for k, p in report.write(summary, tmp_path / "out").items()}
    assert f"| {expected:.2f} |" in texts["md"] and f"<b>{expected:.2f}</b>" in texts["html"]
    rows = json.loads(texts["json"])["rows"]
    assert rows[0]["values"]["clip_frechet"]["low"] is None
    assert torch.allclose(
        torch.nn.functional.normalize(judge.features(pictures[0])), judge.images(pictures[0])
    )


def test_a_folder_of_real_pictures_may_be_named(tmp_path: Path, nets: dict[str, Path]) -> None:
    miniatures.coco_exemplar(tmp_path / "set", count=2)
    task = real_task(tmp_path / "set", nets)
    found = task.items(2, 0)
    (tmp_path / "real").mkdir()
    for i in range(25):
        miniatures.scene(10 * i).save(tmp_path / "real" / f"{i}.jpg")
    tasks.adapt(task, [f"real={tmp_path / 'real'}"])
    shown = list(sets.reals(task, found))
    assert len(shown) == 25 and shown[0].shape == (1, 3, 32, 32)
    judge = ClipEncoder.from_pretrained(nets["judge"])
    gallery = sets.Gallery(lambda: iter(shown), {"judge": judge})
    assert 0 <= sets.quality(gallery, gallery) <= 100
    tasks.adapt(task, [f"real={tmp_path / 'out'}"])
    with pytest.raises(InputError, match=r"there are no pictures.*--data real=FOLDER"):
        next(sets.reals(task, found))
    bare = Item("one", found[0].picture, {}, 0)
    with pytest.raises(InputError, match="it has no true picture"):
        next(sets.reals(Task(), [bare]))


# sweeps ------------------------------------------------------------------------------------------


@pytest.fixture
def swept() -> Task:
    task = tasks.load("toybox-tradeoff")
    task.model = ""
    return task


def experiment(folder: Path, name: str, plugins: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(f"model: toybox/sd\nplugins: {plugins}\n")
    return str(path)


def test_a_method_becomes_a_row_per_value_of_its_setting(tmp_path: Path, swept: Task) -> None:
    told = experiment(tmp_path, "told", "{instruct: {}}")
    noised = experiment(tmp_path, "noised", "{source_trajectory: {}, sdedit: {}}")
    plain = experiment(tmp_path, "plain", "{source_trajectory: {}}")
    made = methods.build([told, noised, plain], swept)
    assert [m.name for m in made[:3]] == ["told-1", "told-1.2", "told-1.4"]
    assert [m.name for m in made[7:9]] == ["noised-0.3", "noised-0.5"]
    assert [m.name for m in made[10:]] == ["plain", "copy"]
    assert {m.series for m in made} == {"told", "noised", ""}
    first, second = made[0].identity["method"], made[1].identity["method"]
    assert (first["plugins"]["instruct"], second["plugins"]["instruct"]) == (
        {"image_scale": 1.0},
        {"image_scale": 1.2},
    )


def test_a_method_of_instructions_reads_the_instruction(tmp_path: Path, swept: Task) -> None:
    told = methods.build([experiment(tmp_path, "told", "{instruct: {}}")], swept)[0]
    plain = methods.build([experiment(tmp_path, "plain", "{sdedit: {}}")], swept)[0]
    assert isinstance(told, methods.Edit) and isinstance(plain, methods.Edit)
    assert told.run["prompt.edit"] == "instruction" and plain.run["prompt.edit"] == "target"
    assert "run" not in plain.identity and told.identity["run"] == told.run
    swept.run_with = {"instruct": {"prompt.edits": "instruction"}}
    with pytest.raises(ConfigError, match=r"no 'prompt\.edits'"):
        tasks.adapt(swept)


class Tinted(methods.Method):
    """Adds a tint; one setting of a series."""

    def __init__(self, name: str, tint: int, series: str = "") -> None:
        self.name, self.tint, self.series = name, tint, series
        self.identity = {"method": tint}

    def __call__(self, item: Item, source: Image.Image) -> Image.Image:
        return Image.blend(source, Image.new("RGB", source.size, "red"), self.tint / 10)


def test_settings_of_one_method_are_drawn_as_a_curve(tmp_path: Path, swept: Task) -> None:
    swept.measures, swept.curve = ["true-pixels"], ["l1", "l2"]
    rows = [Tinted("tint-1", 1, "tint"), Tinted("tint-5", 5, "tint"), methods.Copy()]
    summary = report.summarise(runner.evaluate(swept, rows, tmp_path, 3))
    found = curve.points(summary)
    assert [setting for setting, _, _ in found["tint"]] == ["1", "5"] and "copy" in found
    assert found["tint"][0][1] == summary.rows[0].values["l1"].mean
    page = report.write(summary, tmp_path)["html"].read_text()
    assert "<h2>L2 against L1</h2>" in page and page.count("<circle") >= 3
    swept.curve = []
    assert "L2 against L1" not in report.write(summary, tmp_path)["html"].read_text()
