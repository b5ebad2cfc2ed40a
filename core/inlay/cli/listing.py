"""`inlay plugins`, and how any list is shown. Listing imports no torch."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from inlay_config import registry

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def plugins(
    name: Annotated[str | None, typer.Argument(help="Show this plugin's options.")] = None,
    as_json: Json = False,
) -> None:
    """List the plugins, or one plugin's options and their defaults."""
    if name is None:
        show(registry.plugins(), ("summary", "tested", "maturity", "source"), as_json)
        return
    cls: Any = registry.plugin_class(name, where="plugins")
    defaults = dataclasses.asdict(cls.Config())
    options = {
        field.name: {"type": field.type, "default": defaults[field.name]}
        for field in dataclasses.fields(cls.Config)
    }
    if as_json:
        typer.echo(json.dumps({"name": name, "options": options}, indent=2, default=str))
    else:
        typer.echo(f"{inspect.getdoc(cls)}\n\n{inspect.getdoc(cls.Config)}\n")
        show(options, ("type", "default"), as_json)


def show(rows: Mapping[str, Mapping[str, Any]], columns: Iterable[str], as_json: bool) -> None:
    """Print rows by name: a table of these columns, or JSON of everything."""
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("name", *columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for name, row in rows.items():
        cells = [row.get(column, "") for column in columns]
        table.add_row(name, *(", ".join(c) if isinstance(c, list) else str(c) for c in cells))
    Console().print(table)
