"""`inlay models`: what ships here, what can be fetched or converted. Listing imports no torch."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from inlay.cli.convert import convert
from inlay.cli.listing import Json, show
from inlay_config import registry

app = typer.Typer(help="List the models that ship here; fetch weights that metrics need.")


@app.callback(invoke_without_command=True)
def models(context: typer.Context, as_json: Json = False) -> None:
    """List the models that ship here; a folder or a hub name works as well."""
    if context.invoked_subcommand is None:
        show(registry.models(), ("family", "summary"), as_json)


@app.command()
def fetch(
    name: Annotated[
        str | None, typer.Argument(help="What to fetch; listed when not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch weights that metrics need, checked and converted to safetensors."""
    if name is None:
        show(registry.downloads(), ("summary", "licence"), as_json)
        return
    path = registry.fetch(name)
    typer.echo(json.dumps({"name": name, "path": str(path)}) if as_json else f"{name}: {path}")


app.command()(convert)
