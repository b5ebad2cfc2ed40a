"""`inlay`: the verbs, and what an error looks like.

Exit codes: 0 done; 1 an error of ours; 2 a mistake in what was asked; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from inlay.cli import models
from inlay.cli.listing import plugins
from inlay.cli.plan import plan
from inlay.cli.run import run
from inlay.cli.scene import scene
from inlay.cli.verbs import Verbs
from inlay_config.errors import InlayError

app = typer.Typer(
    name="inlay",
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 internal error, 2 a mistake in what was asked, 130 interrupted.",
)
app.command()(run)
app.command()(plan)
app.command()(scene)
app.command()(plugins)
app.add_typer(models.app, name="models")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"inlay {version('inlay')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Edit pictures with diffusion models. Methods are plugins, experiments YAML files."""


def main() -> None:
    """The console script: one message and an exit code, no traceback unless asked for."""
    try:
        app()
    except SystemExit as ended:
        code = ended.code
        if code == 130:
            _fail("interrupted; nothing unfinished was written", 130)
    except InlayError as error:
        code = _fail(str(error), 2, where=error.where, fix=error.fix)
    except Exception as error:
        if os.environ.get("INLAY_DEBUG"):
            raise
        kind = type(error).__name__
        code = _fail(f"{kind}: {error} (set INLAY_DEBUG=1 for the traceback)", 1)
    sys.exit(code)


def _fail(message: str, code: int, **details: str) -> int:
    if "--json" in sys.argv:
        typer.echo(json.dumps({"error": message, "exit_code": code, **details}))
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(message, err=True)
    return code
