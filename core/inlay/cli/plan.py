"""`inlay plan`: everything that is decided before the first step; no weights are loaded."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

import typer

from inlay.cli.listing import Json
from inlay.cli.tables import plan_data
from inlay_config import config


def plan(
    experiment: Annotated[str, typer.Argument(help="Name of an experiment, or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    sites: Annotated[bool, typer.Option("--sites", help="Attention calls, site by site.")] = False,
    as_json: Json = False,
) -> None:
    """Show passes, lanes, branches, sites, order per event, windows, evaluations and memory."""
    loaded = config.load(experiment, overrides or ())
    from inlay.cli.experiment import planned

    session, decided = planned(loaded, partial(config.load, experiment, overrides or ()))
    if not sites:
        from inlay.cli.words import find_words, words_data, words_table

        words = find_words(decided, session.backbone)
        if as_json:
            data = plan_data(decided) | {"words": words_data(words)}
            typer.echo(json.dumps(data, indent=2))
        else:
            typer.echo("\n".join(filter(None, (str(decided), words_table(words)))))
        return
    from inlay.cli.sites import site_costs, site_table

    costs = site_costs(decided, session.backbone)
    if as_json:
        typer.echo(json.dumps([vars(cost) for cost in costs], indent=2))
    else:
        typer.echo(site_table(costs))
