"""The benchmark of MimicBrush (Chen et al., 2024): parts composed and textures transferred, within
one object (the true picture is known) and across two.

Its files were not released. The layout is that of its code: four folders, named by what they hold
(PartComp or Texture; Within or Cross), with `NAME_source.png`, `NAME_source_mask.png`,
`NAME_reference.png`, and where they are known `NAME_reference_mask.png` and a prompt in
`prompts.json` (NAME: words).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inlay_bench.benchmarks import files
from inlay_bench.benchmarks.frame import Frame
from inlay_bench.tasks import Item, provider
from inlay_config.errors import InputError

NAME = "MimicBrush benchmark"
SETS = tuple((kind, pair) for kind in ("partcomp", "texture") for pair in ("within", "cross"))
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@provider("mimicbrush-bench")
def mimicbrush_bench(
    seed: int, data: str = "", sets: Sequence[str] = (), side: int = 512
) -> Iterator[Item]:
    """Items set by set.

    data: the folder of the four sets, or some of them. sets: some of PartComp-Within,
    PartComp-Cross, Texture-Within, Texture-Cross; all by default. Raises InputError for files of
    another layout, a source without mask or reference, an empty mask.
    """
    root = files.root_of(data, NAME, ["*"])
    wanted = {str(name).lower() for name in sets}
    known = {"-".join(words) for words in SETS}
    if unknown := wanted - known:
        fix = f"Name some of {', '.join(sorted(known))}."
        raise InputError(f"no such sets: {', '.join(sorted(unknown))}", where="sets", fix=fix)
    found = [
        (folder, kind, pair)
        for folder in sorted(p for p in root.iterdir() if p.is_dir())
        for kind, pair in SETS
        if kind in folder.name.lower() and pair in folder.name.lower()
    ]
    if not found:
        raise files.wrong_layout(root, NAME, "PartComp-Within, Texture-Cross, ...")
    number = seed
    for folder, kind, pair in found:
        if wanted and f"{kind}-{pair}" not in wanted:
            continue
        prompts = folder / "prompts.json"
        words = files.read_json(prompts) if prompts.is_file() else {}
        for path in sorted(p for p in folder.iterdir() if p.stem.endswith("_source")):
            yield _item(path, kind, pair, words, side, number)
            number += 1


def _item(path: Path, kind: str, pair: str, words: dict[str, Any], side: int, seed: int) -> Item:
    name = path.stem.removesuffix("_source")
    where = f"{NAME}, {path.parent.name}, item {name}"
    source = files.picture(path, where)
    reference, drawn = (
        files.picture(_beside(path.parent, f"{name}_{what}", where), where)
        for what in ("reference", "source_mask")
    )
    frame = Frame(source.size, side)
    region = frame.mask(_mask(drawn, source.size))
    if not region.any():
        raise InputError("its mask is empty", where=where)
    known = _find(path.parent, f"{name}_reference_mask")
    shown = reference
    if known:
        box = Image.fromarray(_mask(files.picture(known, where), reference.size)).getbbox()
        if box is None:
            raise InputError("its reference's mask is empty", where=where)
        shown = reference.crop(box)
    picture = frame.picture(source)
    truth = {"region": region}
    if pair == "within":  # the source is the answer: a method may not look into the region
        truth["picture"] = np.array(picture)
        hidden = np.array(picture)
        hidden[region] = 0
        picture = Image.fromarray(hidden)
    return Item(
        id=f"{kind}-{pair}-{name}",
        picture=picture,
        texts={"source": "", "target": str(words.get(name, ""))},
        seed=seed,
        truth=truth,
        facts={"kind": kind, "pair": pair},
        given={
            "mask": Image.fromarray(region.astype(np.uint8) * 255),
            "exemplar": reference,
            "shown": shown,
        },
    )


def _mask(drawn: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Where a mask's picture is white, bool `h w`, at a size."""
    return np.asarray(drawn.convert("L").resize(size, Image.Resampling.NEAREST)) > 127


def _find(folder: Path, stem: str) -> Path | None:
    return next((p for s in SUFFIXES if (p := folder / f"{stem}{s}").is_file()), None)


def _beside(folder: Path, stem: str, where: str) -> Path:
    found = _find(folder, stem)
    if found is None:
        raise InputError(f"there is no {stem}.png", where=where)
    return found
