"""The networks behind metrics, each with a name and a digest of its weights for reports.

`judge` is the toybox's own; `lpips` and `inception` are the published ones, which
`inlay models fetch lpips|fid` brings here (`inlay_bench.fetch`). Nothing is downloaded by using
them. None has parameters that require a gradient, so one flows only to pictures that ask for it.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from inlay_bench import inception as fid
from inlay_bench import packages
from inlay_config.errors import ModelError

if TYPE_CHECKING:
    from transformers import CLIPModel


class Named(Protocol):
    """What a report prints of a network."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of its weights."""


class Encoder(Named, Protocol):
    """Puts pictures and sentences into one space."""

    @property
    def side(self) -> int:
        """Pixels of the square it sees."""

    def images(self, x: Tensor) -> Tensor:
        """Pictures `b 3 h w` in 0..1 as unit vectors `b d`; differentiable."""

    def texts(self, sentences: list[str]) -> Tensor:
        """Sentences as unit vectors `b d`."""


class Distance(Named, Protocol):
    """A perceptual distance of pictures `b 3 h w` in 0..1."""

    def distances(self, x: Tensor, y: Tensor) -> Tensor:
        """One number per pair, `b`, 0 = equal."""

    def maps(self, x: Tensor, y: Tensor) -> Tensor:
        """The distance at every pixel, `b 1 h w`."""


class Features(Named, Protocol):
    """Features for distances between sets of pictures."""

    def features(self, x: Tensor) -> Tensor:
        """Pictures `b 3 h w` in 0..1 as vectors `b d`."""


class ClipEncoder:
    """A transformers `CLIPModel` as an `Encoder`: any folder or hub name with its tokenizer.

    Pictures are prepared as the folder's image processor says (resize, crop, mean and deviation),
    in torch and therefore differentiably; sizes are antialiased as Pillow's are.
    """

    def __init__(self, model: CLIPModel, tokenizer: Any, processor: Any, name: str, digest: str):
        self.name, self.digest = name, digest
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.side: int = model.config.vision_config.image_size
        self.squash = "shortest_edge" not in dict(processor.size)
        bilinear = int(processor.resample) == Image.Resampling.BILINEAR
        self.resize = "bilinear" if bilinear else "bicubic"  # torch has no Lanczos
        shape = (1, 3, 1, 1)
        self.mean = torch.tensor(processor.image_mean, device=model.device).view(shape)
        self.deviation = torch.tensor(processor.image_std, device=model.device).view(shape)

    @classmethod
    def from_pretrained(
        cls, where: str | Path, name: str | None = None, device: str | torch.device = "cpu"
    ) -> ClipEncoder:
        """Load a folder or hub name. Raises ModelError when it is no whole CLIP model."""
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

        try:
            model, told = CLIPModel.from_pretrained(
                where, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = CLIPTokenizerFast.from_pretrained(where)
            processor = CLIPImageProcessor.from_pretrained(where)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            fix = "Give a folder or a name with a CLIPModel, its tokenizer and image processor."
            raise ModelError(f"no CLIP model: {error}", where=str(where), fix=fix) from error
        if told["missing_keys"]:  # transformers would draw them at random
            missing = ", ".join(sorted(told["missing_keys"])[:3])
            raise ModelError(f"the weights are not whole: no {missing}", where=str(where))
        return cls(model.to(device), tokenizer, processor, name or str(where), digest_of(model))

    def images(self, x: Tensor) -> Tensor:
        return F.normalize(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Pictures `b 3 h w` in 0..1 as vectors `b d` of any length."""
        seen = (self.prepare(x) - self.mean) / self.deviation
        pooled = self.model.vision_model(pixel_values=seen).pooler_output
        return self.model.visual_projection(pooled)

    def texts(self, sentences: list[str]) -> Tensor:
        tokens = self.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        read = self.model.text_model(**tokens.to(self.model.device))
        return F.normalize(self.model.text_projection(read.pooler_output))

    def prepare(self, x: Tensor) -> Tensor:
        """Pictures at the encoder's side, still in 0..1; those that have it are left alone."""
        x = x.to(self.mean)
        height, width = x.shape[-2:]
        if height == width == self.side:
            return x
        size = [self.side, self.side]
        if not self.squash:
            size = [self.side * length // min(height, width) for length in (height, width)]
        x = F.interpolate(x, size, mode=self.resize, antialias=True).clamp(0, 1)
        top, left = ((length - self.side) // 2 for length in x.shape[-2:])
        return x[..., top : top + self.side, left : left + self.side]


class Lpips:
    """LPIPS 0.1 (Zhang et al., 2018), held by the `lpips` package's class."""

    def __init__(self, net: nn.Module, trunk: str, digest: str):
        self.net, self.name, self.digest = net, f"LPIPS 0.1 ({trunk})", digest

    def distances(self, x: Tensor, y: Tensor) -> Tensor:
        return self._run(x, y, spatial=False).flatten()

    def maps(self, x: Tensor, y: Tensor) -> Tensor:
        return self._run(x, y, spatial=True)

    def _run(self, x: Tensor, y: Tensor, spatial: bool) -> Tensor:
        self.net.spatial = spatial  # type: ignore[assignment]  # a plain attribute of the class
        parameter = next(self.net.parameters())
        return self.net(x.to(parameter), y.to(parameter), normalize=True)


class FidInception(nn.Module):
    """The FID's features; torchmetrics' `FrechetInceptionDistance(feature=...)` holds it."""

    name, num_features = "FID Inception (2015)", fid.DIMENSIONS

    def __init__(self, net: nn.Module, digest: str):
        super().__init__()
        self.net, self.digest = net, digest

    def forward(self, images: Tensor) -> Tensor:
        """Bytes `b 3 h w` as vectors `b 2048`."""
        return self.net(fid.prepare(images.to(next(self.net.parameters()))))

    def features(self, x: Tensor) -> Tensor:
        return self((x.clamp(0, 1) * 255).round())


def judge(where: str = "toybox/judge", device: str | torch.device = "cpu") -> ClipEncoder:
    """The CLIP that judges: by default the toybox's, which no method is guided by; else a folder or
    hub name."""
    import inlay_toybox

    folder = inlay_toybox.path("judge") if where == "toybox/judge" else where
    return ClipEncoder.from_pretrained(folder, where, device)


def lpips(net: str = "alex", device: str | torch.device = "cpu") -> Lpips:
    """LPIPS with the trunk `alex` or `vgg`, from the fetched weights.

    Raises ModelError when they were not fetched, or do not fit.
    """
    weights = fetched("lpips", f"{net}.safetensors")
    return Lpips(filled(blank_lpips(net), weights).to(device), net, file_digest(weights))


def inception(device: str | torch.device = "cpu") -> FidInception:
    """The network of the FID, from the fetched weights.

    Raises ModelError when they were not fetched, or do not fit.
    """
    weights = fetched("fid", "inception.safetensors")
    return FidInception(filled(blank_inception(), weights).to(device), file_digest(weights))


def blank_lpips(net: str) -> nn.Module:
    """The `lpips` package's class without values."""
    import lpips as package

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision deprecates the spelling the package uses
        return package.LPIPS(pretrained=False, pnet_rand=True, net=net, verbose=False)


def blank_inception() -> nn.Module:
    """The FID's network without values."""
    with torch.device("meta"):
        return fid.network()


def fetched(kind: str, file: str) -> Path:
    """A fetched file. Raises ModelError, with the command that fetches it."""
    path = packages.folder(kind) / file
    if not path.is_file():
        fix = f"Run `inlay models fetch {kind}`."
        raise ModelError(f"'{path}' has not been fetched", where=f"the network {kind}", fix=fix)
    return path


def filled(blank: nn.Module, weights: Path) -> nn.Module:
    """A module without values, given those of a file. Raises ModelError unless every one fits."""
    fix = "Delete it and run `inlay models fetch` again."
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot be read: {error}", where=str(weights), fix=fix) from error
    return fill(blank, tensors, str(weights), fix)


def fill(blank: nn.Module, tensors: dict[str, Tensor], where: str, fix: str = "") -> nn.Module:
    """A module without values, given these. Raises ModelError unless every one fits."""
    try:
        blank.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise ModelError(f"the weights do not fit: {told}", where=where, fix=fix) from error
    return blank.eval().requires_grad_(False)


def file_digest(path: Path) -> str:
    """Twelve hexadecimal digits of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def digest_of(module: nn.Module) -> str:
    """Twelve hexadecimal digits of a module's values, whatever file they came from."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
