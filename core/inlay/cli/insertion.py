"""Scenes: objects inserted one after another, each into the picture that was chosen before it.

`inlay run` of an experiment with a list `scene` makes all of them; OUT/scene.json keeps what was
done and chosen, so that a killed scene goes on, and `inlay scene` chooses otherwise or takes back.
Each object has a folder with its candidates and the manifest that repeats them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay_config import config, images, manifest
from inlay_config.config import Experiment
from inlay_config.errors import ConfigError, InputError

if TYPE_CHECKING:
    from PIL import Image

FILE, FORMAT = "scene.json", 1
OBJECT = ("subject", "prompt", "source", "pick")  # other keys of an object are the experiment's
Load = Callable[[Mapping[str, Any]], Experiment]


@dataclass
class Done:
    """An object that was inserted. asked: digest of all that its pictures depend on; folder: beside
    scene.json; before: the picture it was inserted into, "": none is kept; pictures: the
    candidates' files; scores, best: of the plugin `presence`, [] and 0: nobody judged; picked: the
    user's, None: the best is taken."""

    asked: str
    subject: str
    folder: str
    before: str
    pictures: list[str]
    scores: list[float]
    best: int
    picked: int | None = None

    @property
    def taken(self) -> int:
        return self.best if self.picked is None else self.picked


@dataclass
class State:
    """scene.json. experiment, overrides: as they were given to `inlay run`; done: objects in order;
    again: how often the object at a place (a decimal) was undone: it is drawn with another seed."""

    experiment: str
    overrides: list[str]
    done: list[Done] = field(default_factory=list)
    again: dict[str, int] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        with images.whole(folder / FILE) as partial:
            text = json.dumps({"inlay_scene": FORMAT, **asdict(self)}, indent=2)
            partial.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> State:
        """Raises InputError when there is no scene, or one of another version."""
        path = folder / FILE
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            if told.pop("inlay_scene") != FORMAT:
                raise ValueError("written by another version")
            return cls(**{**told, "done": [Done(**each) for each in told["done"]]})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fix = "Make one: inlay run addit_scene --out DIR."
            raise InputError(f"holds no scene ({error})", where=str(path), fix=fix) from error


def write(state: State, folder: Path) -> None:
    """scene.json, and the sheet of what is done."""
    from inlay.cli.sheet import scene_sheet

    state.write(folder)
    if state.done:
        images.save(scene_sheet(_rows(state, folder)), folder / "sheet.png")


def first(exp: Experiment, load: Load | None = None) -> Experiment:
    """The experiment of a scene's first object; of no scene, itself. load: with a layer over its
    file; None: over `exp`, where references such as ${subject} have their values already."""
    if not exp.scene:
        return exp
    layered = load or (lambda layer: config.over(exp, layer))
    return _asked(layered, exp, 0, exp.input.image, 0)


def play(name: str, overrides: list[str], folder: Path, quiet: bool = False) -> dict[str, Any]:
    """Insert what is not inserted yet, up to an object whose `pick: user` is open.

    An object is made again, and those after it, when anything that its pictures depend on has
    changed: its options, the picture before it, what was picked there. Returns scene.json.
    """
    exp = config.load(name, overrides)
    _check(exp)
    known = State.read(folder) if (folder / FILE).exists() else State(name, overrides)
    state = State(name, overrides, known.done, known.again)
    pipe = None
    for i in range(len(exp.scene)):
        before = state.done[i - 1] if i else None
        picture = str(folder / before.pictures[before.taken]) if before else exp.input.image
        again = state.again.get(str(i), 0)
        step = _asked(lambda layer: config.load(name, overrides, layer), exp, i, picture, again)
        if i >= len(state.done) or state.done[i].asked != _digest(step):
            from inlay.cli import experiment

            pipe = experiment.load(step) if pipe is None else pipe
            place = f"{i + 1}-{_slug(exp.scene[i]['subject'])}" + (f"-{again}" if again else "")
            made = _insert(step, folder, place, pipe, quiet)
            state.done = [*state.done[:i], made]
            write(state, folder)
        if exp.scene[i].get("pick") == "user" and state.done[i].picked is None:
            break
    return {"inlay_scene": FORMAT, **asdict(state)}


def table(told: Mapping[str, Any], folder: Path) -> str:
    """What was done, a line per object, and what is next."""
    lines = []
    for i, each in enumerate(told["done"], 1):
        done = Done(**each)
        by = "best" if done.picked is None else "picked"
        scores = " ".join(f"{score:+.2f}" for score in done.scores)
        lines.append(f"{i} {done.subject}: {folder / done.pictures[done.taken]} ({by}; {scores})")
    exp = config.load(told["experiment"], told["overrides"])
    at = len(told["done"])
    if at and exp.scene[at - 1].get("pick") == "user" and told["done"][-1]["picked"] is None:
        lines.append(f"choose: inlay scene {folder} --pick NUMBER --resume")
    elif at < len(exp.scene):
        lines.append(f"{len(exp.scene) - at} to go: inlay scene {folder} --resume")
    return "\n".join(lines)


def _check(exp: Experiment) -> None:
    for i, thing in enumerate(exp.scene):
        for key in ("subject", "prompt"):
            if not isinstance(thing.get(key), str) or not thing[key].strip():
                fix = "Write {subject: dog, prompt: a dog on the grass}."
                raise ConfigError(f"no {key}", where=f"scene[{i}]", fix=fix)
        if thing.get("pick", "best") not in ("best", "user"):
            problem = f"{thing['pick']!r} cannot be picked"
            raise ConfigError(problem, where=f"scene[{i}].pick", fix="Use best or user.")


def _asked(load: Load, exp: Experiment, i: int, picture: str | None, again: int) -> Experiment:
    """The experiment of object i: the scene's, the object's own keys, the picture before it."""
    _check(exp)
    thing = exp.scene[i]
    source = thing.get("source", exp.scene[i - 1]["prompt"] if i else exp.prompt.source)
    layer = {key: value for key, value in thing.items() if key not in OBJECT}
    layer |= {"subject": thing["subject"], "scene": []}
    layer["prompt"] = {"source": source, "edit": thing["prompt"]}
    layer["input"] = {**(layer.get("input") or {}), "image": picture}
    try:
        asked = load(layer)
    except ConfigError as error:
        where = f"scene[{i}].{error.where}".rstrip(".")
        raise ConfigError(error.problem, where=where, fix=error.fix) from error
    asked.seed += again
    return asked


def _digest(exp: Experiment) -> str:
    """Of an experiment with the pixels of its pictures in place of their names."""
    told = config.to_dict(exp) | {"out": None}
    given = {kind: path for kind, path in told["input"].items() if path}
    told["input"] = {
        kind: manifest.hash_image(images.open_image(path, f"input.{kind}"))
        for kind, path in given.items()
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _insert(exp: Experiment, folder: Path, place: str, pipe: Any, quiet: bool) -> Done:
    """Run one object; its folder appears whole."""
    from inlay.cli.ladder import JUDGE, climb
    from inlay.cli.output import staged
    from inlay.cli.progress import Progress
    from inlay.cli.sheet import contact_sheet

    with staged(folder / place) as stage:
        with Progress(quiet) as progress:
            result = climb(exp, progress.update, pipe=pipe)
        result.save(stage)
        images.save(contact_sheet(result, exp), stage / "sheet.png")
    said = result.record.get(JUDGE, {"scores": [], "best": 0})
    count = len(result.images["edit"])
    names = [f"edit-{k}.png" if count > 1 else "edit.png" for k in range(count)]
    files = [f"{place}/images/{name}" for name in names]
    before = f"{place}/images/source.png" if "source" in result.images else ""
    return Done(_digest(exp), exp.subject, place, before, files, said["scores"], said["best"])


def _rows(state: State, folder: Path) -> list[tuple[str, list[tuple[str, Image.Image]], int]]:
    """For the sheet: the subject, its pictures with their titles, which of them is taken."""
    rows = []
    for i, done in enumerate(state.done):
        before = state.done[i - 1].pictures[state.done[i - 1].taken] if i else done.before
        shown = [("before", images.open_image(folder / before))] if before else []
        for k, file in enumerate(done.pictures):
            score = f"  {done.scores[k]:+.2f}" if done.scores else ""
            shown.append((f"{k}{score}", images.open_image(folder / file)))
        rows.append((done.subject, shown, len(shown) - len(done.pictures) + done.taken))
    return rows


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.strip().lower()).strip("-") or "object"
