"""SAM 2 (Ravi et al. 2024) by name as a function: a picture and hints at an object, to its mask.

Two backends: the `sam2` package's image predictor, and an ONNX pair through onnxruntime. No hooks.
Pictures are `3 h w` in 0..1; coordinates are pixels of the picture, (x, y).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from inlay import ConfigError, ModelError, read_checkpoint, resolve_model
from inlay_plugins import masks

CONFIG, WEIGHTS = "config.yaml", "model.safetensors"
ENCODER, DECODER = "encoder.ort", "decoder.onnx"
CHECKPOINTS = (".pt", ".safetensors")
FETCHED = "sam2-onnx"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
CLICK, CORNERS, NOTHING = 1.0, (2.0, 3.0), -1.0  # labels of points in SAM's prompt encoder
REFUSED = {"weights_path": "it reads a file of its own", "compile_image_encoder": "it compiles"}
"""Arguments that do more than build a module, and why a folder cannot set them."""


@dataclass(frozen=True)
class Hint:
    """Where an object is. points: pixels on it; box: left, top, right, bottom; logits: a rough mask
    `h w` of any size, log odds, positive inside. several: ask for three answers, not one."""

    points: Sequence[tuple[int, int]] = ()
    box: Sequence[float] | None = None
    logits: Tensor | None = None
    several: bool = False

    def centres(self) -> np.ndarray:
        """The middles of the pixels, float32 `k 2`."""
        return np.asarray(self.points, np.float32).reshape(-1, 2) + 0.5

    def low_resolution(self, side: int) -> np.ndarray | None:
        """The rough mask as a segmenter takes it, float32 `1 side side`."""
        if self.logits is None:
            return None
        return masks.resize_bilinear(self.logits[None, None].float().cpu(), (side, side))[0].numpy()


Answer = tuple[Tensor, Tensor]
"""Masks bool `m h w`, and how well the model thinks they overlap the object, `m`."""


class Segmenter(Protocol):
    """Answers for the hints at one picture; the picture is encoded once."""

    def answers(self, picture: Tensor, hints: Sequence[Hint]) -> list[Answer]: ...


class Sam2:
    """Over the package's `SAM2ImagePredictor`."""

    def __init__(self, predictor: Any) -> None:
        self.predictor = predictor
        self.side: int = predictor.model.sam_prompt_encoder.mask_input_size[0]

    def answers(self, picture: Tensor, hints: Sequence[Hint]) -> list[Answer]:
        values = (picture.float().clamp(0, 1) * 255).round().byte()
        self.predictor.set_image(values.permute(1, 2, 0).cpu().numpy())
        found = []
        for hint in hints:
            given: dict[str, Any] = {"box": hint.box and np.asarray(hint.box, np.float32)}
            if hint.points:
                given |= {"point_coords": hint.centres(), "point_labels": np.ones(len(hint.points))}
            given["mask_input"] = hint.low_resolution(self.side)
            seen, quality, _ = self.predictor.predict(**given, multimask_output=hint.several)
            found.append((torch.from_numpy(seen) > 0, torch.from_numpy(quality)))
        self.predictor.reset_predictor()
        return found


class OnnxSam2:
    """Over two sessions of onnxruntime. encoder: normalised picture to features; decoder: features,
    points (a box is two of them), and a rough mask, to logits and quality. It always gives several
    answers."""

    def __init__(self, encoder: Any, decoder: Any) -> None:
        self.encoder, self.decoder = encoder, decoder
        self.input = encoder.get_inputs()[0].name
        self.square: tuple[int, int] = tuple(encoder.get_inputs()[0].shape[-2:])
        shapes = {given.name: given.shape for given in decoder.get_inputs()}
        self.side: int = shapes["mask_input"][-1]

    def answers(self, picture: Tensor, hints: Sequence[Hint]) -> list[Answer]:
        size = picture.shape[-2:]
        seen = F.interpolate(picture[None].float().cpu(), self.square, mode="bilinear",
                             align_corners=False, antialias=True)  # fmt: skip
        mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
        encoded = self.encoder.run(None, {self.input: ((seen - mean) / deviation).numpy()})
        names = (output.name for output in self.encoder.get_outputs())
        features = dict(zip(names, encoded, strict=True))
        found = []
        for hint in hints:
            logits, quality = self.decoder.run(
                ["masks", "iou_predictions"], features | self._told(hint, size)
            )
            shown = masks.resize_bilinear(torch.from_numpy(logits), size)[0] > 0
            found.append((shown, torch.from_numpy(quality)[0]))
        return found

    def _told(self, hint: Hint, size: Sequence[int]) -> dict[str, np.ndarray]:
        """The decoder's inputs for a hint at a picture of `size` (h, w)."""
        corners = np.asarray([] if hint.box is None else hint.box, np.float32).reshape(-1, 2)
        points = np.concatenate([corners, hint.centres()])
        labels = [*CORNERS[: len(corners)], *(CLICK for _ in hint.points)]
        if not labels:  # the decoder wants a point
            points, labels = np.zeros((1, 2), np.float32), [NOTHING]
        scale = np.asarray([self.square[1] / size[1], self.square[0] / size[0]], np.float32)
        rough = hint.low_resolution(self.side)
        none = np.zeros((1, self.side, self.side), np.float32)
        return {
            "point_coords": (points * scale)[None],
            "point_labels": np.asarray([labels], np.float32),
            "mask_input": (none if rough is None else rough)[None],
            "has_mask_input": np.asarray([rough is not None], np.float32),
        }


def segment(
    segmenter: Segmenter, picture: Tensor, hints: Sequence[Hint], union: bool = False
) -> Tensor:
    """What the hints point at, all together, bool `h w`; of several answers to a hint the `best`,
    or with `union` all of them."""
    mask = torch.zeros(picture.shape[-2:], dtype=torch.bool)
    answers = segmenter.answers(picture, hints) if hints else []
    for hint, (seen, quality) in zip(hints, answers, strict=True):
        mask |= seen.any(0) if union else best(hint, seen, quality)
    return mask


def best(hint: Hint, seen: Tensor, quality: Tensor) -> Tensor:
    """Of the answers `m h w` to a hint the one `h w` that the model thinks best; of those to a
    rough mask the one that overlaps it most, as a part of the object may be drawn better."""
    if hint.logits is None:
        return seen[quality.argmax()]
    rough = masks.resize_bilinear(hint.logits[None, None].float().cpu(), seen.shape[-2:])[0] > 0
    overlap = (seen & rough).flatten(1).sum(1) / (seen | rough).flatten(1).sum(1)
    return seen[overlap.argmax()]


def check(name: str, config: str, where: str) -> None:
    """What can be said of a segmenter's name and configuration before it is loaded. Raises
    ConfigError for a checkpoint file without a configuration that the package knows, and for a
    configuration of anything else."""
    if Path(name).suffix in CHECKPOINTS:
        if config not in (known := configurations()):
            problem = f"'{config}' is no configuration of SAM 2" if config else "it is not said"
            fix = f"A checkpoint file needs one of {', '.join(known)}."
            raise ConfigError(problem, where=f"{where}.segmenter_config", fix=fix)
    elif config:
        problem = f"'{name}' brings its own configuration"
        fix = "Leave it out, or name a .pt or .safetensors file."
        raise ConfigError(problem, where=f"{where}.segmenter_config", fix=fix)


@cache
def load(name: str, config: str = "", device: str = "cpu") -> Segmenter:
    """A segmenter, kept for the next run.

    name: a shipped one (toybox/sam2); the fetched ONNX pair (sam2-onnx); a folder with config.yaml
    and model.safetensors, or with encoder.ort and decoder.onnx; a hub name of the package
    (facebook/sam2.1-hiera-large); a checkpoint file, whose config is named (sam2.1_hiera_l).
    Raises ModelError for what is missing or does not fit.
    """
    if name == FETCHED or (Path(name) / DECODER).is_file():
        return _load_onnx(name, device)
    try:
        from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES as HUB
        from sam2.build_sam import build_sam2
    except ImportError as error:
        fix = "pip install 'inlay[segment]'"
        raise ModelError("the package sam2 is not installed", where=name, fix=fix) from error
    file = Path(name)
    if name in HUB:
        config, published = HUB[name]
        file = _downloaded(name, published)
    elif file.suffix in CHECKPOINTS:
        config = configurations()[config]
    else:
        folder = Path(resolve_model(name, "segmenter", CONFIG))
        if not folder.is_dir():
            fix = f"Name one of {', '.join(HUB)}, a folder, or a checkpoint file."
            raise ModelError(f"'{name}' is no SAM 2 of the hub", where="segmenter", fix=fix)
        return Sam2(predictor(read(folder).to(device)))
    values = _values(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # hydra's, of the package's own configuration
        model = build_sam2(config, device="cpu")
    return Sam2(predictor(_fitted(model, values, file).to(device)))


def configurations() -> dict[str, str]:
    """The package's configurations: name (sam2.1_hiera_l) -> path inside it."""
    folders = ("configs/sam2", "configs/sam2.1")
    try:
        listed = [(f, e.name) for f in folders for e in (resources.files("sam2") / f).iterdir()]
    except ModuleNotFoundError:
        return {}
    return {name.removesuffix(".yaml"): f"{folder}/{name}" for folder, name in sorted(listed)}


def read(folder: Path) -> Any:
    """The model of a folder with config.yaml and model.safetensors. Raises ModelError when a file
    is missing or none, and when they do not fit."""
    return _fitted(described(folder / CONFIG), _values(folder / WEIGHTS), folder / WEIGHTS)


def described(file: Path) -> Any:
    """The model that a configuration file describes, see `build`. Raises ModelError."""
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        given = tree["model"]  # type: ignore[index,call-overload]
    except Exception as error:  # YAML's, OmegaConf's, and a mapping that is none
        raise ModelError(f"no SAM 2 is described there: {error}", where=str(file)) from error
    return build(given, str(file))


def build(given: Any, where: str) -> Any:
    """A model with random weights, of its configuration. It names classes, and only those that the
    package's own configurations name are built, so that nobody's runs code. Raises ModelError."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    if not isinstance(given, dict):
        raise ModelError(f"no SAM 2 is described there: {given!r}", where=where)
    ours = resources.files("sam2")
    shipped = (OmegaConf.load(str(ours / path)) for path in configurations().values())
    known = {
        value
        for each in shipped
        for key, value in _entries(OmegaConf.to_container(each))
        if key == "_target_"
    }
    for key, value in _entries(given):
        if key == "_target_" and value not in known:
            raise ModelError(f"'{value}' is no part of SAM 2 and is not built", where=where)
        if value and key in REFUSED:
            raise ModelError(f"'{key}' cannot be set: {REFUSED[key]}", where=where)
    try:
        return instantiate(OmegaConf.create(given), _target_whitelist_=sorted(known)).eval()
    except (InstantiationException, AttributeError) as error:
        raise ModelError(f"SAM 2 cannot be built: {error}", where=where) from error


def _entries(node: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of a tree of mappings and lists."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield key, value
        yield from _entries(value)
    for value in node if isinstance(node, list) else ():
        yield from _entries(value)


def _downloaded(name: str, file: str) -> Path:
    """A file of a hub repository. Raises ModelError when it is neither here nor reachable."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        fix = f"Download {file} and give its path."
        raise ModelError(f"'{name}' cannot be had: {reason}", where="segmenter", fix=fix) from error


def _values(file: Path) -> dict[str, Tensor]:
    """A checkpoint's values by name. Raises ModelError when it is not there, or none."""
    values = read_checkpoint(file, fix := "Give a checkpoint of SAM 2.")
    if file.suffix == ".safetensors":
        return {key: value.float() for key, value in values.items()}
    if not isinstance(held := values.get("model"), dict):
        raise ModelError("it has no table 'model'", where=str(file), fix=fix)
    return held


def _fitted(model: Any, values: dict[str, Tensor], file: Path) -> Any:
    """The model with a checkpoint's values. Raises ModelError when they do not fit."""
    try:
        model.load_state_dict(values)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        fix = "Name the configuration that it was trained with."
        problem = f"the checkpoint does not fit its configuration: {reason}"
        raise ModelError(problem, where=str(file), fix=fix) from error
    return model


def predictor(model: Any) -> Any:
    """The package's image predictor over a model of any size."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)
        made = SAM2ImagePredictor(model.eval().requires_grad_(False))
    # The package writes down the feature maps of 1024-pixel models; these are the model's own.
    side = model.image_size // model.backbone_stride
    made._bb_feat_sizes = [(4 * side, 4 * side), (2 * side, 2 * side), (side, side)]
    return made


def _load_onnx(name: str, device: str) -> OnnxSam2:
    try:
        import onnxruntime
    except ImportError as error:
        fix = "pip install 'inlay[onnx]'"
        raise ModelError("onnxruntime is not installed", where=name, fix=fix) from error
    try:
        folder = Path(resolve_model(name, "segmenter", DECODER))
    except ModelError as error:
        fix = f"Run `inlay models fetch {FETCHED}`."
        raise ModelError(f"'{name}' has not been fetched", where="segmenter", fix=fix) from error
    wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    here = onnxruntime.get_available_providers()
    providers = [each for each in (*wanted, "CPUExecutionProvider") if each in here]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        encoder, decoder = (
            onnxruntime.InferenceSession(folder / file, options, providers=providers)
            for file in (ENCODER, DECODER)
        )
        return OnnxSam2(encoder, decoder)
    except Exception as error:  # onnxruntime raises classes of its own for each kind of failure
        reason = " ".join(str(error).split())[:200]
        fix = f"Give a folder with {ENCODER} and {DECODER}."
        raise ModelError(f"no SAM 2 for onnxruntime: {reason}", where=name, fix=fix) from error
