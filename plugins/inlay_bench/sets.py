"""Measures of all pictures of a method together, against a set of real ones: Fréchet distances and
the quality score. They have no number per item, so no interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from inlay_bench.measures import Column, Numbers
from inlay_bench.metrics import frechet, quality_score
from inlay_bench.pictures import path_of
from inlay_bench.tasks import Item, Task
from inlay_config.errors import InputError
from inlay_config.images import open_image, to_tensor

GROUP = "All pictures together"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
COMPONENTS = 20  # of the quality score's mixture


class Gallery:
    """A set of pictures, and what networks see in them; each network looks once.

    pictures: an iterator over them anew, `1 3 h w` in 0..1.
    """

    def __init__(
        self, pictures: Callable[[], Iterator[Tensor]], networks: Mapping[str, Any]
    ) -> None:
        self.pictures, self.networks = pictures, networks
        self._features: dict[str, Tensor] = {}
        self._mixture: quality_score.Mixture | None = None

    def features(self, network: str) -> Tensor:
        """`n d` of a network."""
        if network not in self._features:
            look = self.networks[network].features
            with torch.no_grad():
                seen = [look(x).float().cpu() for x in self.pictures()]
            self._features[network] = torch.cat(seen) if seen else torch.zeros(0, 1)
        return self._features[network]

    def statistics(self, network: str) -> frechet.Statistics:
        return frechet.Statistics().update(self.features(network))

    def mixture(self) -> quality_score.Mixture:
        """Gaussians fitted to what the judge sees."""
        if self._mixture is None:
            self._mixture = quality_score.fit(self.features("judge"), COMPONENTS)
        return self._mixture


@dataclass(frozen=True)
class SetMeasure:
    """A column, the networks behind it, and its number from a method's and the real pictures;
    ValueError where there are too few."""

    column: Column
    networks: tuple[str, ...]
    function: Callable[[Gallery, Gallery], float]


def clip_frechet(made: Gallery, real: Gallery) -> float:
    """The Fréchet distance that Paint by Example publishes as FID: of CLIP's projected features, as
    they are before they are made unit vectors."""
    return frechet.distance(made.statistics("judge"), real.statistics("judge"))


def fid(made: Gallery, real: Gallery) -> float:
    """The FID (Heusel et al., 2017)."""
    return frechet.distance(made.statistics("inception"), real.statistics("inception"))


def quality(made: Gallery, real: Gallery) -> float:
    """The quality score (Gu et al., 2020) under a mixture fitted to the real pictures."""
    return quality_score.quality_score(real.mixture(), made.features("judge"))


SETS: dict[str, SetMeasure] = {
    "clip-frechet": SetMeasure(
        Column("clip_frechet", "CLIP-Fréchet", "Fréchet distance of CLIP's features to those of "
               "the real pictures, which Paint by Example publishes as FID", better="lower",
               digits=2),
        ("judge",),
        clip_frechet,
    ),
    "fid": SetMeasure(
        Column("fid", "FID", "Fréchet distance of Inception's features", better="lower", digits=2),
        ("inception",),
        fid,
    ),
    "quality-score": SetMeasure(
        Column("quality_score", "QS", f"how likely the pictures are under {COMPONENTS} Gaussians "
               "fitted to CLIP's features of the real ones, 0..100", digits=2),
        ("judge",),
        quality,
    ),
}  # fmt: skip


def measure(
    task: Task,
    items: Sequence[Item],
    methods: Sequence[str],
    out: Path,
    networks: Mapping[str, Any],
    absent: Mapping[str, str],
    callback: Callable[[str, int, int, str], None] | None = None,
) -> dict[str, Numbers]:
    """The set measures of a task for every method, from the pictures in `out`; None where there are
    too few. Raises InputError when there are no real pictures."""
    chosen = [SETS[name] for name in task.sets if name not in absent]
    if not chosen:
        return {}
    real = Gallery(lambda: reals(task, items), networks)
    found: dict[str, Numbers] = {}
    for method in methods:
        if callback:
            callback(method, len(items), len(items), "all pictures together")
        paths = [path_of(out, method, item.id) for item in items]
        made = Gallery(lambda paths=paths: _shown(paths), networks)  # type: ignore[misc]
        found[method] = {each.column.key: _number(each, made, real) for each in chosen}
    return found


def _number(each: SetMeasure, made: Gallery, real: Gallery) -> float | None:
    try:
        return each.function(made, real)
    except ValueError:  # fewer pictures than it needs
        return None


def _shown(paths: Sequence[Path]) -> Iterator[Tensor]:
    """Pictures that are there: a method may have failed on some."""
    for path in paths:
        if path.is_file():
            with Image.open(path) as picture:
                yield to_tensor(picture.convert("RGB"))


def reals(task: Task, items: Sequence[Item]) -> Iterator[Tensor]:
    """The real pictures: of the task's folder, brought to the items' square; else the items' true
    ones. Raises InputError where there are none."""
    if not task.real:
        for item in items:
            if "picture" not in item.truth:
                fix = "Name a folder of real pictures: --data real=FOLDER."
                raise InputError("it has no true picture", where=f"item {item.id}", fix=fix)
            yield to_tensor(Image.fromarray(item.truth["picture"]))
        return
    folder = Path(task.real)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        fix = "Name a folder of real pictures: --data real=FOLDER."
        raise InputError("there are no pictures", where=str(folder), fix=fix)
    from inlay_bench.benchmarks.frame import Frame

    sides = [item.picture.width for item in items if item.picture is not None]
    for path in paths:
        picture = open_image(path, str(path))
        yield to_tensor(Frame(picture.size, sides[0] if sides else 512).picture(picture))
