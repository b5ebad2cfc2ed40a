"""`inlay plan`: everything that is decided before the first step; no weights are loaded."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from inlay.cli.listing import Json
from inlay.cli.tables import plan_data
from inlay_config import config


def plan(
    experiment: Annotated[str, typer.Argument(help="Name of an experiment, or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    as_json: Json = False,
) -> None:
    """Show passes, lanes, branches, sites, order per event, windows, evaluations and memory."""
    loaded = config.load(experiment, overrides or ())
    from inlay.cli.experiment import plan_experiment

    decided = plan_experiment(loaded)
    typer.echo(json.dumps(plan_data(decided), indent=2) if as_json else str(decided))
