"""What the papers measure, on exact cases and through tiny networks of the true classes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from transformers import CLIPModel, GroundingDinoForObjectDetection, ViTImageProcessor, ViTModel

import folders
import miniatures
import tiny_networks
from inlay_bench import methods, runner, tasks
from inlay_bench.benchmarks import dino, grounding
from inlay_bench.measures import MEASURES, Evidence
from inlay_bench.tasks import Item
from inlay_config.errors import InputError, ModelError
from inlay_config.images import to_tensor
from shell import Invoke


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny networks by the name that measures look through."""
    place = tmp_path_factory.mktemp("networks")
    vit = tiny_networks.save_dino(place / "dino")
    return {
        "judge": tiny_networks.save_clip(place / "clip"),
        "dino": vit,
        "structure": vit,
        "grounding": tiny_networks.save_grounding_dino(place / "grounding"),
    }


@pytest.fixture
def invoke(invoke: Invoke) -> Invoke:
    """Run `inlay eval WORDS...`."""
    return partial(invoke, "eval")


def evidence(
    picture: Image.Image | None = None, networks: dict[str, Any] | None = None, **more: Any
) -> Evidence:
    """A picture of the miniature scene, by default the scene itself."""
    before = miniatures.scene(0, (64, 64))
    texts = {"source": "a park", "target": "a park with a dog", "subject": "dog", "local": "a dog"}
    item = Item("one", before, texts, seed=0, **more)
    after = to_tensor(picture or before)
    return Evidence(item, to_tensor(before), after, networks or {})


def numbers(name: str, e: Evidence) -> dict[str, float | None]:
    tasks.register_all()
    found = MEASURES[name].function(e)
    assert set(found) == {column.key for column in MEASURES[name].columns}
    return found


class Scripted:
    """A detector that finds listed boxes: some in the input, some in the picture."""

    name, digest = "scripted", "0" * 12

    def __init__(self, before: Any, after: Any, source: torch.Tensor) -> None:
        self.boxes, self.source = (before, after), source

    def find(self, x: torch.Tensor, phrase: str) -> torch.Tensor:
        assert phrase == "dog"
        found = self.boxes[0 if torch.equal(x, self.source) else 1]
        return torch.tensor(found, dtype=torch.float32).reshape(-1, 4)


def looked(before: Any, after: Any, allowed: Any) -> Evidence:
    """Evidence of a changed picture in which the scripted detector finds these boxes."""
    e = evidence(miniatures.scene(9, (64, 64)), facts={"boxes": allowed})
    e.networks = {"grounding": Scripted(before, after, e.source)}
    return e


# affordance and inclusion ------------------------------------------------------------------------


def test_affordance_counts_new_objects_with_half_of_their_box_inside() -> None:
    allowed = [[0, 0, 20, 20], [20, 0, 40, 20]]
    old, inside, split, outside = [40, 40, 60, 60], [0, 0, 10, 10], [11, 0, 31, 10], [0, 30, 9, 40]
    e = looked([old], [inside, outside, [41, 40, 60, 60], [9, 0, 31, 10]], allowed)
    found = numbers("affordance-grounding", e)
    # The third is the old one; the fourth is half in one box, and wholly in both.
    assert found["affordance_single"] == pytest.approx(2 / 3)
    assert found["affordance_union"] == pytest.approx(2 / 3)
    e = looked([], [split, outside], [[0, 0, 15, 20], [15, 0, 25, 20]])
    found = numbers("affordance-grounding", e)
    assert (found["affordance_single"], found["affordance_union"]) == (0.5, 0.5)
    thirds = looked([], [[0, 0, 30, 10]], [[0, 0, 10, 20], [20, 0, 30, 20]])
    found = numbers("affordance-grounding", thirds)
    assert (found["affordance_single"], found["affordance_union"]) == (0.0, 1.0)


def test_a_picture_without_a_new_object_is_told_apart() -> None:
    for after in ([], [[0, 0, 10, 10]]):
        found = numbers("affordance-grounding", looked([[0, 0, 10, 10]], after, [[0, 0, 64, 64]]))
        assert found["affordance_single"] is None and found["affordance_single_all"] == 0.0
    assert numbers("inclusion-grounding", looked([], [], []))["inclusion"] == 0.0
    assert numbers("inclusion-grounding", looked([], [[0, 0, 9, 9]], []))["inclusion"] == 1.0
    nameless = evidence()
    nameless.item = Item("one", None, {"subject": ""}, seed=0)
    assert numbers("inclusion-grounding", nameless)["inclusion"] is None


# pixels ------------------------------------------------------------------------------------------


def test_the_masked_background_is_that_of_black_regions() -> None:
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    noise = np.random.default_rng(0).integers(0, 60, (64, 64, 3), dtype=np.uint8)
    e = evidence(Image.fromarray(noise), truth={"mask": mask})
    found = numbers("masked-background", e)
    outside = torch.from_numpy(~mask)
    x, y = e.source * outside, e.picture * outside
    assert found["psnr"] == pytest.approx(float(peak_signal_noise_ratio(y, x, 1.0)), abs=1e-3)
    ssim = structural_similarity_index_measure(y, x, data_range=1.0)
    assert found["ssim"] == pytest.approx(100 * float(ssim), abs=1e-3)
    gap = (e.source - e.picture)[..., outside].square().mean()
    assert found["mse"] == pytest.approx(1e4 * float(gap) * 0.75, rel=1e-4)  # a quarter is black
    assert found["psnr_outside"] == pytest.approx(-10 * float(gap.log10()), abs=1e-3)
    full = numbers("masked-background", evidence(truth={"mask": np.ones((64, 64), bool)}))
    assert set(full.values()) == {None}


def test_the_inside_of_the_region_does_not_matter() -> None:
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    changed = np.array(miniatures.scene(0, (64, 64)))
    changed[:32] = 0
    found = numbers("masked-background", evidence(Image.fromarray(changed), truth={"mask": mask}))
    assert (found["psnr"], found["mse"], found["psnr_outside"]) == (99.0, 0.0, 99.0)
    assert found["ssim"] == pytest.approx(100)


def test_differences_to_the_true_picture() -> None:
    target = np.array(miniatures.scene(51, (64, 64)))  # blue differs by a fifth
    found = numbers("true-pixels", evidence(truth={"target": target}))
    assert found["l1"] == pytest.approx(0.2 / 3) and found["l2"] == pytest.approx(0.04 / 3)
    with pytest.raises(InputError, match="item one: no target is known"):
        numbers("true-pixels", evidence())


# networks ----------------------------------------------------------------------------------------


def test_dino_sees_as_transformers_does(nets: dict[str, Path]) -> None:
    network = dino.Dino.from_pretrained(nets["dino"])
    model = ViTModel.from_pretrained(nets["dino"], add_pooling_layer=False).eval()
    picture = miniatures.scene(0, (60, 44))
    shown = ViTImageProcessor(
        size={"height": 37, "width": 50},  # 32 * 256 / 224 for the shorter side
        resample=Image.Resampling.BICUBIC,
        image_mean=list(dino.MEAN),
        image_std=list(dino.DEVIATION),
    )(picture, return_tensors="pt").pixel_values[..., 2:34, 9:41]
    with torch.no_grad():
        token = F.normalize(model(pixel_values=shown).last_hidden_state[:, 0])
    torch.testing.assert_close(network.images(to_tensor(picture)), token, atol=5e-3, rtol=0)
    square = to_tensor(miniatures.scene(0, (32, 32)))
    keys: list[torch.Tensor] = []
    model.layers[-1].attention.k_proj.register_forward_hook(lambda *seen: keys.append(seen[2]))
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (dino.MEAN, dino.DEVIATION))
    with torch.no_grad():
        model(pixel_values=(square - mean) / deviation)
    known = F.cosine_similarity(keys[0][:, :, None], keys[0][:, None], dim=-1)
    torch.testing.assert_close(network.structure(square), known, atol=1e-5, rtol=0)
    assert float(dino.structure_distance(network, square, square)) == 0
    other = dino.structure_distance(network, square, square.flip(3))
    assert 0 < float(other) < 4 and len(network.digest) == 12


def test_grounding_dino_finds_as_transformers_does(
    nets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grounding, "BOX", 0.0)
    network = grounding.GroundingDino.from_pretrained(nets["grounding"])
    picture = miniatures.scene(0, (60, 44))
    found = network.find(to_tensor(picture), " A Dog.")
    assert found.shape == (12, 4) and "box 0.0" in network.name
    assert (found[:, 2:] <= torch.tensor([60.5, 44.5])).all()
    model = GroundingDinoForObjectDetection.from_pretrained(nets["grounding"]).eval()
    given = network.network.processor(images=picture, text="a dog.", return_tensors="pt")
    with torch.no_grad():
        seen = model(**given)
    order = seen.logits.sigmoid().amax(-1)[0].argsort(descending=True)
    x, y, width, height = seen.pred_boxes[0][order].T * torch.tensor([[60], [44], [60], [44]])
    corners = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1)
    torch.testing.assert_close(found, corners)
    monkeypatch.setattr(grounding, "BOX", 1.0)
    assert network.find(to_tensor(picture), "a dog").shape == (0, 4)


def test_what_is_no_such_network_is_named(nets: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no DINO"):
        dino.Dino.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no config\.json"):
        grounding.GroundingDino.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"not whole|no DINO"):
        dino.Dino.from_pretrained(nets["judge"])


# whole evaluations -------------------------------------------------------------------------------


WANTED = {
    "emu-edit": {"clip_image": 1.0, "clip_direction": 0.0, "l1_input": 0.0, "dino_input": 1.0},
    "magicbrush": {},
    "pie-bench": {"structure": 0.0, "psnr": 99.0, "mse": 0.0, "ssim": 100.0},
    "affordance-set": {"clip_image": 1.0, "affordance_single_all": 0.0},
}


@pytest.mark.parametrize("name", WANTED)
def test_a_benchmark_is_evaluated_by_one_command(
    name: str, nets: dict[str, Path], tmp_path: Path, invoke: Invoke
) -> None:
    """The row `copy`: an untouched picture has known numbers, whatever random networks see."""
    make = getattr(miniatures, name.replace("-", "_"))
    words: list[object] = [name, "--data", make(tmp_path / "data"), "--data", "side=64"]
    task = tasks.load(name)
    for network in task.networks:
        words += ["--network", f"{network}={nets[network]}"]
    code, out, err = invoke(*words, "--out", "out", "--json")
    assert code == 0, err
    report = json.loads(out)
    (row,) = report["rows"]  # no autoencoder's row: the task names no model
    assert (row["method"], row["failed"]) == ("copy", 0)
    for key, value in WANTED[name].items():
        assert row["values"][key]["mean"] == pytest.approx(value, abs=1e-5), key
    for network, folder in ((n, nets[n]) for n in task.networks):
        assert report["networks"][network]["name"].startswith(str(folder))
        assert len(report["networks"][network]["digest"]) == 12
    left_out = {"masked-lpips"} if name == "pie-bench" else set()
    assert set(report["left_out"]) <= left_out
    for measure in set(task.measures) - left_out:
        for column in MEASURES[measure].columns:
            assert column.key in row["values"], column.key
    assert json.loads((tmp_path / "out/items.json").read_text())


def test_an_experiment_runs_on_a_benchmark_at_its_own_size(
    nets: dict[str, Path], tmp_path: Path, invoke: Invoke
) -> None:
    """A model of 32 pixels on pictures of 48: its result is measured at 48. With a model named, the
    autoencoder's row is there."""
    root = miniatures.pie_bench(tmp_path / "data")
    (tmp_path / "mine.yaml").write_text("plugins: {attention_maps: {words: [blue]}}")
    words: list[object] = ["pie-bench", "steps=1", "size=32", "--data", root, "--data", "side=48"]
    words += [f"model={folders.save_flux(tmp_path / 'flux')}", "--methods", "mine.yaml", "--n", 1]
    for network in ("judge", "structure"):
        words += ["--network", f"{network}={nets[network]}"]
    code, out, err = invoke(*words, "--out", "out", "--json")
    assert code == 0, err
    rows = {row["method"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["mine", "copy", "vae"]
    assert [row["failed"] for row in rows.values()] == [0, 0, 0], err
    assert rows["mine"]["values"]["psnr"]["mean"] < 99 == rows["copy"]["values"]["psnr"]["mean"]
    with Image.open(tmp_path / "out/pictures/mine/211000000000.png") as made:
        assert made.size == (48, 48)


def test_magicbrush_measures_against_the_truth(nets: dict[str, Path], tmp_path: Path) -> None:
    """A method that draws the true picture is perfect; one that leaves the input is not."""

    class Truth(methods.Copy):
        def __init__(self) -> None:
            self.name, self.identity = "truth", {"method": "the true picture"}

        def __call__(self, item: Item, source: Image.Image) -> Image.Image:
            return Image.fromarray(item.truth["target"])

    task = tasks.load("magicbrush")
    root = str(miniatures.magicbrush(tmp_path / "data"))
    tasks.adapt(task, [root, "side=0"], [f"{n}={nets[n]}" for n in task.networks])
    done = runner.evaluate(task, [Truth(), methods.Copy()], tmp_path / "out")
    perfect, copied = (done.records[name]["139-1"]["numbers"] for name in ("truth", "copy"))
    assert (perfect["l1"], perfect["l2"]) == (0.0, 0.0) and copied["l1"] > 0.04
    assert perfect["clip_target"] == pytest.approx(1) == pytest.approx(perfect["dino_target"])
    assert copied["dino_target"] < 1
    judge = CLIPModel.from_pretrained(nets["judge"]).eval()
    assert judge.config.vision_config.image_size == 32
    assert -1 <= perfect["clip_local"] <= 1


def test_a_network_that_is_not_there_leaves_its_columns_out(
    nets: dict[str, Path], tmp_path: Path, invoke: Invoke
) -> None:
    words = ["emu-edit", "--data", miniatures.emu_edit(tmp_path / "data"), "--data", "side=32"]
    for network in ("judge", "dino"):
        words += ["--network", f"{network}={nets[network]}"]
    code, out, err = invoke(*words, "--network", f"grounding={tmp_path}", "--out", "out", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert "no config.json" in report["left_out"]["inclusion-grounding"]
    assert "inclusion" not in report["rows"][0]["values"] and report["items"] == 3


def test_bad_words_of_the_command_are_errors_for_people(tmp_path: Path, invoke: Invoke) -> None:
    for words, problem in (
        (("pie-bench",), "its files are not here"),
        (("pie-bench", "--data", "nowhere"), "there is no folder 'nowhere'"),
        (("pie-bench", "--network", "judge"), "says no place"),
        (("pie-bench", "--data", tmp_path, "--data", "shade=1"), "unexpected keyword argument"),
        (("emu-edit", "--methods", "vae"), "no model"),
    ):
        code, _, err = invoke(*words)
        assert code == 2 and problem in err and "Traceback" not in err, err
