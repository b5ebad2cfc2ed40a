"""`inlay run`: experiments in, folders of pictures out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from inlay.cli.listing import Json
from inlay_config import config
from inlay_config.config import Experiment
from inlay_config.errors import ConfigError


def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="EXPERIMENT... [KEY=VALUE]...", show_default=False,
                       help="Names or YAML files, then overrides such as subject=dog."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where to write; outputs/EXPERIMENT if not given."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Repeat the run of a manifest.json or PNG."),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Write profile.md: time per event, plugin and site."),
    ] = False,
    trace_images: Annotated[
        bool,
        typer.Option("--trace-images", help="Write film.png and film.webp: every step's pictures."),
    ] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Run experiments; write images, masks, manifest.json and a contact sheet."""
    from inlay.cli import output, replay

    overrides = [word for word in words or () if "=" in word]
    names = _expand([word for word in words or () if "=" not in word])
    if bool(names) == bool(source):
        raise ConfigError("name an experiment, or give --from FILE", fix="See `inlay run --help`.")
    if source:
        jobs = {source.stem: replay.load(source, overrides)}
    else:
        jobs = {Path(name).stem: config.load(name, overrides) for name in names}
        if len(jobs) < len(names):
            raise ConfigError("two experiments of one name", fix="Run them one by one.")
    asked = out or next(iter(jobs.values())).out
    root = output.resolve(asked or "outputs")
    folders = {name: root if asked and len(jobs) == 1 else root / name for name in jobs}
    for folder in folders.values():
        output.check(folder)
    shown = {"profile": profile, "film": trace_images, "quiet": as_json}
    given = {Path(name).stem: name for name in names}
    reports = [
        _play(given[name], overrides, folders[name], quiet=as_json)
        if job.scene
        else _run(job, folders[name], **shown)
        for name, job in jobs.items()
    ]
    if len(jobs) > 1:
        _stack_sheets(list(folders.values()), root)
    if as_json:
        typer.echo(json.dumps(reports, indent=2))


def _expand(names: list[str]) -> list[str]:
    """A packaged folder of experiments (`demo`) stands for all of them."""
    known = config.experiments()
    inside = {name: [k for k in known if k.startswith(f"{name}/")] for name in names}
    return [each for name in names for each in inside[name] or [name]]


def _play(name: str, overrides: list[str], folder: Path, quiet: bool) -> dict[str, Any]:
    """A scene: a folder for each object."""
    from inlay.cli import insertion

    hush_loading_bars()
    told = insertion.play(name, overrides, folder, quiet)
    if not quiet:
        typer.echo(insertion.table(told, folder))
    return {"out": str(folder), "scene": told}


def _run(job: Experiment, folder: Path, profile: bool, film: bool, quiet: bool) -> dict[str, Any]:
    from inlay.cli.film import Film
    from inlay.cli.ladder import climb
    from inlay.cli.output import staged
    from inlay.cli.progress import Progress
    from inlay.cli.sheet import contact_sheet
    from inlay.cli.trace import Tracer
    from inlay_config.images import save

    hush_loading_bars()
    with staged(folder) as stage:
        with Progress(quiet) as progress:
            tracer, roll = Tracer() if profile else None, Film() if film else None

            def told(event: dict[str, Any]) -> None:
                progress.update(event)
                if roll:
                    roll.update(event)

            result = climb(job, told, tracer)
        result.save(stage)
        save(contact_sheet(result, job), stage / "sheet.png")
        if roll:
            roll.save(stage)
        if tracer:
            (stage / "profile.md").write_text(tracer.table(), encoding="utf-8")
    if not quiet:
        typer.echo(f"{folder}: images, masks, manifest.json, sheet.png")
    return {"out": str(folder), "manifest": result.manifest}


def hush_loading_bars() -> None:
    """One progress bar is enough: the run's own."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _stack_sheets(folders: list[Path], root: Path) -> None:
    from inlay.cli.sheet import stack
    from inlay_config.images import open_image, save

    save(stack([open_image(folder / "sheet.png") for folder in folders]), root / "sheet.png")
