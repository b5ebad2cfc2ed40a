"""Models that ship as what they learned beyond another model of the toybox.

A folder with ``delta.safetensors`` holds, for every weight that differs from the base's, two
factors of low rank or the whole difference, in 8-bit integers with a scale per row; of other files
those that differ. ``expand`` writes the stock layout from it into the cache, once. A model of
another kind, which shares a part with its base and no more, ships its own files as they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

NAME = "delta.safetensors"
SHIPPED = Path(__file__).parent / "models"


def write(
    tuned: Path,
    base: Path,
    folder: Path,
    rank: int,
    sources: Mapping[str, str] | None = None,
    inherit: tuple[str, ...] = ("tokenizer", "vae"),
    called: str = "",
) -> int:
    """Write what ``tuned`` has beyond ``base``, both in stock layouts.

    Args:
        tuned: a folder of any layout.
        base: folder of the model that it was trained from, one of ``inlay_toybox.MODELS``.
        folder: where to write; below ``models/`` to ship it.
        rank: of the factors. What was trained with at most this rank loses nothing but bits. What
            the base has not, or has fewer channels of, is kept whole. With 0 files that differ ship
            as they are, weights too, and nothing is inherited unlike.
        sources: weights of ``tuned`` ("reference/unet/x.safetensors") -> those of ``base`` with
            which they are compared ("unet/x.safetensors"; "../clip/x.safetensors" is of another
            model), where the names differ.
        inherit: folders whose files are the base's, where it has them.
        called: name of the base, where its folder is not called so, as an expanded one is not.

    Returns:
        Bytes written.
    """
    sources = dict(sources or {})
    files = sorted(str(p.relative_to(tuned)) for p in tuned.rglob("*") if p.is_file())
    folder.mkdir(parents=True, exist_ok=True)
    streams, weights = Streams(), dict[str, dict[str, tuple[list[int], int | None]]]()
    for file in files:
        known = _known(base, sources.get(file, file))
        if rank and file.endswith(".safetensors"):
            new, old = load_file(tuned / file), load_file(known) if known.is_file() else {}
            weights[file] = {}
            for name, value in new.items():
                begun = counterpart(value, name, old)
                change = value.float() - like(value, name, old)
                # What began from nothing is of no low rank.
                kept = rank if begun is not None and begun.shape == value.shape else value.numel()
                weights[file][name] = list(value.shape), streams.write(change, kept)
        elif rank and known.is_file() and Path(file).parts[0] in inherit:
            continue
        elif not known.is_file() or _content(known) != _content(tuned / file):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(_content(tuned / file))
    told = {"base": called or base.name, "files": files, "sources": sources, "weights": weights}
    partial = folder / f".{NAME}.partial"
    save_file(streams.tensors(), partial, {key: json.dumps(v) for key, v in told.items()})
    partial.replace(folder / NAME)
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _known(base: Path, file: str) -> Path:
    """A file of the base, or of a model beside it ("../clip/model.safetensors"), or beside those
    that ship, where the base is one that was expanded itself."""
    beside = file.startswith("../") and not (base / file).is_file()
    return SHIPPED / file.removeprefix("../") if beside else base / file


def _content(file: Path) -> bytes:
    """A file without the path that a config's weights were read from, which is of one machine."""
    content = file.read_bytes()
    if file.suffix == ".json":
        known = json.loads(content)
        if isinstance(known, dict) and known.pop("_name_or_path", None) is not None:
            return json.dumps(known, indent=2, sort_keys=True).encode() + b"\n"
    return content


class Streams:
    """Matrices one after another as integers of -127..127 and one scale per row."""

    def __init__(self, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        tensors = tensors or {}
        self.integers = tensors.get("integers", torch.zeros(0, dtype=torch.int8))
        self.scales = tensors.get("scales", torch.zeros(0, dtype=torch.bfloat16))
        self.read_integers = self.read_scales = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"integers": self.integers, "scales": self.scales}

    def write(self, change: torch.Tensor, rank: int) -> int | None:
        """Append a difference -> the rank of its factors, 0 where it is whole, None where there is
        none."""
        if not change.any():
            return None
        flat = change.reshape(len(change), -1) if change.ndim > 1 else change.reshape(1, -1)
        out, into = flat.shape
        if rank * (out + into) >= out * into:
            self._append(flat)
            return 0
        left, size, right = torch.linalg.svd(flat, full_matrices=False)
        root = size[:rank, None].sqrt()
        self._append(left[:, :rank].T * root)
        self._append(right[:rank] * root)
        return rank

    def read(self, shape: list[int], rank: int) -> torch.Tensor:
        """The next difference, in float32."""
        out = shape[0] if len(shape) > 1 else 1
        into = math.prod(shape) // out
        if not rank:
            return self._next(out, into).reshape(shape)
        up = self._next(rank, out)
        return (up.T @ self._next(rank, into)).reshape(shape)

    def _append(self, rows: torch.Tensor) -> None:
        scale = (rows.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
        integers = (rows / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.integers = torch.cat([self.integers, integers.flatten()])
        self.scales = torch.cat([self.scales, scale])

    def _next(self, rows: int, columns: int) -> torch.Tensor:
        first, self.read_integers = self.read_integers, self.read_integers + rows * columns
        begin, self.read_scales = self.read_scales, self.read_scales + rows
        integers = self.integers[first : self.read_integers].view(rows, columns)
        return integers.float() * self.scales[begin : self.read_scales].float()[:, None]


def counterpart(
    value: torch.Tensor, name: str, base: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """The base's weight of this name, or of the end of it ("model.vision.x" is "vision.x" there; a
    vision tower's "model.x" is the "vision_model.x" of a whole CLIP), of this shape or a smaller
    one; None where there is none.
    """
    parts = name.split(".")
    for first in range(len(parts)):
        end = ".".join(parts[first:])
        old = base.get(end, base.get(f"vision_{end}"))
        if old is None or old.ndim != value.ndim:
            continue
        if all(a <= b for a, b in zip(old.shape, value.shape, strict=True)):
            return old
    return None


def like(value: torch.Tensor, name: str, base: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The base's weight with zeros where the new one has more channels; zeros alone where there is
    none.
    """
    grown, old = torch.zeros(value.shape), counterpart(value, name, base)
    if old is not None:
        grown[tuple(slice(0, side) for side in old.shape)] = old.float()
    return grown


def expand(folder: Path, base: Path) -> Path:
    """The folder in the stock layout, below the user's cache ($INLAY_CACHE); made when it is not
    there. Weights have the type of the base's, new ones are in bfloat16, those of another model in
    float32, since transformers loads a model in the type of its file.

    Raises:
        OSError: the cache cannot be written to.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("INLAY_CACHE") or home / "inlay") / "toybox"
    made = cache / f"{folder.name}-{_digest(folder, base)}"
    if made.is_dir():
        return made
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
    try:
        _write_stock(folder, base, partial)
        partial.chmod(0o755)
        if not made.is_dir():
            partial.rename(made)
    except OSError:
        if not made.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return made


def base_of(folder: Path) -> str:
    """Name of the model that a delta is to be added to."""
    with safe_open(folder / NAME, "pt") as stored:
        return json.loads(stored.metadata()["base"])


def _write_stock(folder: Path, base: Path, target: Path) -> None:
    with safe_open(folder / NAME, "pt") as stored:
        told = {key: json.loads(value) for key, value in stored.metadata().items()}
    streams = Streams(load_file(folder / NAME))
    for file in told["files"]:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        known = _known(base, told["sources"].get(file, file))
        if file not in told["weights"]:
            shutil.copyfile(folder / file if (folder / file).is_file() else known, target / file)
            continue
        old, tensors = load_file(known) if known.is_file() else {}, {}
        kinds = {tensor.dtype for tensor in old.values()}
        kind = kinds.pop() if len(kinds) == 1 else torch.bfloat16
        if ".." in told["sources"].get(file, ""):
            kind = torch.float32
        for name, (shape, rank) in told["weights"][file].items():
            value = like(torch.zeros(shape), name, old)
            if rank is not None:
                value += streams.read(shape, rank)
            tensors[name] = value.to(kind)
        save_file(tensors, target / file, {"format": "pt"})


def _digest(folder: Path, base: Path) -> str:
    """Of all that the expanded folder is made of."""
    digest = hashlib.sha256()
    with safe_open(folder / NAME, "pt") as stored:
        sources = json.loads(stored.metadata()["sources"]).values()
    for root in (folder, base):
        for file in sorted(p for p in root.rglob("*") if p.is_file()):
            digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    for name in sorted(name for name in sources if ".." in name):
        digest.update(name.encode() + _known(base, name).read_bytes())
    return digest.hexdigest()[:12]
