"""`inlay augment`: a folder of pictures in, as many with an object more out, labelled."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from inlay.cli import output
from inlay.cli.listing import Json
from inlay_config import config
from inlay_config.errors import ConfigError, InlayError, InputError

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def augment(
    folder: Annotated[Path, typer.Argument(help="Of pictures; NAME.txt beside one captions it.")],
    objects: Annotated[str, typer.Option(help="What to insert: names, separated by commas.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Over the experiment.")
    ] = None,
    experiment: Annotated[str, typer.Option(help="A name or YAML file that inserts.")] = "addit",
    out: Annotated[str, typer.Option(metavar="DIR", help="Where to write.")] = "outputs/augment",
    per: Annotated[int, typer.Option(min=1, help="Objects for each picture, one at a time.")] = 1,
    caption: Annotated[str, typer.Option(help="Of pictures without one.")] = "a picture",
    template: Annotated[
        str, typer.Option(help="The edit prompt; {caption}, {object} and {a} (a or an) are known.")
    ] = "{caption} with {a} {object}",
    labels: Annotated[
        Path | None, typer.Option(help="COCO annotations of the pictures, to be carried over.")
    ] = None,
    area: Annotated[
        str, typer.Option(metavar="LOW,HIGH", help="Shares of the picture an object may cover.")
    ] = "0.002,0.5",
    tries: Annotated[int, typer.Option(min=1, help="Seeds until the area is right.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of objects and runs.")] = 0,
    as_json: Json = False,
) -> None:
    """Insert objects into pictures; write pictures, masks and COCO annotations. Resumes."""
    from inlay_bench.augment import coco
    from inlay_bench.records import Records, locked

    names = [name.strip() for name in objects.split(",") if name.strip()]
    low, high = _area(area)
    pictures = sorted(p for p in _listed(folder) if p.suffix.lower() in PICTURES)
    if not names or not pictures:
        lacking = "no object is named" if not names else "there is no picture"
        raise InputError(lacking, where="--objects" if not names else str(folder))
    _prompt(template, caption, names[0])
    known = coco.read(labels) if labels else None
    exp = config.load(experiment, overrides or ())
    if "subject_mask" not in exp.plugins:
        fix = "Use one whose plugins publish mask:subject, such as addit."
        raise ConfigError(f"'{experiment}' says not where the object is", fix=fix)
    root = output.resolve(out)
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    identity: dict[str, Any] = {
        "experiment": config.to_dict(exp),
        "folder": folder.name,
        "objects": names,
    }
    identity |= {"caption": caption, "template": template, "area": [low, high], "seed": seed}
    counts = {"inserted": 0, "left out": 0, "unreadable": 0}
    with locked(root):
        records = Records(root / "records.jsonl", identity)
        insert = _Insertion(exp, template, (low, high), tries)
        for path in pictures:
            for k in range(per):
                if not records.done(item := f"{path.name} {k}"):
                    records.append(_record(insert, path, item, caption, names, seed, root))
                state = records.latest[item]["outcome"]
                counts[state] += 1
                if not as_json:
                    typer.echo(f"{item}: {state}", err=True)
        made = [r for r in records.latest.values() if r["outcome"] == "inserted"]
        coco.write(root / "annotations.json", made, names, known)
    typer.echo(json.dumps({"out": str(root), **counts}) if as_json else f"{root}: {counts}")


class _Insertion:
    """The experiment with one model and a session per object."""

    def __init__(
        self, exp: config.Experiment, template: str, area: tuple[float, float], tries: int
    ) -> None:
        from inlay_bench.methods import Pipelines

        self.exp, self.template, self.area, self.tries = exp, template, area, tries
        self.pipelines, self.sessions = Pipelines(), dict[str, Any]()

    def __call__(
        self, picture: Any, caption: str, name: str, seed: int
    ) -> tuple[Any, Any, int] | None:
        """(picture, mask `h w`, seed) of the first try whose object has the right size."""
        import numpy as np

        from inlay_bench.augment.coco import footprint
        from inlay_config.images import to_pil

        before = np.asarray(picture)
        prompts = {"source": caption, "edit": _prompt(self.template, caption, name)}
        asked = {k: getattr(self.exp, k) for k in ("guidance", "true_cfg", "size", "steps")}
        for again in range(seed, seed + self.tries):
            result = self._session(name).run(prompts, picture, **asked, seed=again)
            made = to_pil(result.images["edit"])[0].resize(picture.size)
            near = to_pil(result.board["mask:subject"][:1])[0].resize(picture.size)
            mask = footprint(before, np.asarray(made), np.asarray(near) > 0)
            if self.area[0] <= mask.mean() <= self.area[1]:
                return made, mask, again
        return None

    def _session(self, name: str) -> Any:
        from inlay import Session

        if name not in self.sessions:
            plugins = {k: dict(v or {}) for k, v in self.exp.plugins.items()}
            plugins["subject_mask"]["subject"] = name
            given: dict[str, Any] = {"resolve": self.exp.resolve, "gradient": self.exp.gradient}
            pipe = self.pipelines(self.exp)
            self.sessions[name] = Session(pipe, plugins, self.exp.scheduler, **given)
        return self.sessions[name]


def _record(
    insert: _Insertion, path: Path, item: str, caption: str, names: list[str], seed: int, root: Path
) -> dict[str, Any]:
    """What came of one picture and one object, after its files are written."""
    from PIL import Image

    from inlay_bench.augment.coco import annotation
    from inlay_config.images import open_image, save

    draw = random.Random(f"{seed} {item}")
    name, first = draw.choice(names), draw.randrange(2**31)
    record: dict[str, Any] = {"item": item, "state": "done", "source": path.name, "object": name}
    try:
        picture = open_image(path, str(path))
    except InlayError as error:
        return {**record, "outcome": "unreadable", "error": str(error)}
    beside = path.with_suffix(".txt")
    said = beside.read_text(encoding="utf-8").strip() if beside.is_file() else caption
    found = insert(picture, said, name, first)
    if found is None:
        return {**record, "outcome": "left out"}
    made, mask, used = found
    file = f"{path.name.replace('.', '-')}-{item.rsplit(' ', 1)[1]}.png"
    save(made, root / "images" / file)
    save(Image.fromarray(mask.astype("uint8") * 255), root / "masks" / file)
    record |= {"outcome": "inserted", "file_name": file, "seed": used, "caption": said}
    return record | {"width": made.width, "height": made.height, "annotation": annotation(mask)}


def _prompt(template: str, caption: str, name: str) -> str:
    a = "an" if name[:1].lower() in "aeiou" else "a"
    try:
        return template.format(caption=caption, object=name, a=a)
    except (KeyError, IndexError, ValueError) as error:
        problem, fix = f"{template!r} cannot be filled: {error}", "Use {caption}, {object}, {a}."
        raise ConfigError(problem, where="--template", fix=fix) from error


def _area(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        fix = "Write two shares, such as 0.002,0.5."
        raise ConfigError(f"{text!r} is no range of areas", where="--area", fix=fix)
    return low, high


def _listed(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise InputError("there is no such folder", where=str(folder))
    return folder.iterdir()
