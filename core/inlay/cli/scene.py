"""`inlay scene`: what `inlay run` made of a scene; choose otherwise, take back, go on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from inlay.cli.listing import Json
from inlay.cli.run import hush_loading_bars
from inlay_config.errors import ConfigError


def scene(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `inlay run` wrote.")],
    pick: Annotated[
        int | None, typer.Option(help="Take this candidate, by the number in its file name.")
    ] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Take an object back; it is drawn anew next time.")
    ] = False,
    object_: Annotated[
        int | None, typer.Option("--object", help="Which object, from 1; the last if not given.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the scene.")] = False,
    as_json: Json = False,
) -> None:
    """Show a scene, choose another candidate, take objects back, go on."""
    from inlay.cli.insertion import FORMAT, State, play, table, write

    state = State.read(folder)
    if undo and pick is not None:
        raise ConfigError("to pick and to undo at once", where="inlay scene", fix="Do one of them.")
    if undo or pick is not None:
        place = len(state.done) if object_ is None else object_
        if not 1 <= place <= len(state.done):
            fix = f"{len(state.done)} are inserted."
            raise ConfigError(f"there is no object {place}", where="--object", fix=fix)
        chosen = state.done[place - 1]
        if undo:
            state.again[str(place - 1)] = state.again.get(str(place - 1), 0) + 1
            state.done = state.done[: place - 1]
        elif pick is not None:
            if not 0 <= pick < len(chosen.pictures):
                fix = f"Use 0 to {len(chosen.pictures) - 1}."
                raise ConfigError(f"there is no candidate {pick}", where="--pick", fix=fix)
            moved, chosen.picked = pick != chosen.taken, pick
            state.done = state.done[:place] if moved else state.done
        write(state, folder)
    told = {"inlay_scene": FORMAT, **asdict(state)}
    if resume:
        hush_loading_bars()
        told = play(state.experiment, state.overrides, folder, quiet=as_json)
    typer.echo(json.dumps(told, indent=2) if as_json else table(told, folder))
